"""What the engine benchmark asks for: the works, the batches and their lengths, the targets.

A work is a model and a number of sentences. Its batches have the token lengths of real data sets,
and token ids of chance: only lengths matter for speed. Each batch of many sentences follows one
data set, because a peer answers one task at a time, and is scaled to the same mean, so that
all batches hold the same number of real tokens.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model_store.native_weights import Precision
from model_store.tokenization import Encoding

MEAN_TOKENS = 32
DOCUMENT_TOKENS = 64
"""A data set whose median is above this holds documents, not sentences."""
ROWS_READ = 2000
SHORTEST = 3
FIRST_WORD = 1000
"""Token ids below it are special or unused in BERT's vocabulary."""


@dataclass(frozen=True)
class Work:
    """`sentences` sentences at once through `model`."""

    name: str
    model: str
    sentences: int


WORKS = (
    Work("bert-base-32", "bert-base", 32),
    Work("bert-base-1", "bert-base", 1),
    Work("minilm-l6-32", "minilm-l6", 32),
    Work("minilm-l6-1", "minilm-l6", 1),
)

PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "fp32")
KEEPS = (0.5, 1.0)

TARGETS = {
    ("bert-base-32", "int8", 0.5): 0.42,
    ("bert-base-32", "bf16", 0.5): 0.36,
    ("bert-base-32", "int8", 1.0): 0.55,
    ("bert-base-32", "bf16", 1.0): 0.55,
    ("bert-base-1", "int8", 0.5): 0.65,
    ("bert-base-1", "bf16", 0.5): 0.6,
    ("minilm-l6-32", "int8", 0.5): 0.45,
    ("minilm-l6-1", "int8", 0.5): 0.8,
}
"""Largest ratio of our time to OpenVINO's in the same precision, by work, precision and keep."""

TARGET_PEER = "openvino"


@dataclass(frozen=True)
class Sentences:
    """A batch in both forms: as encodings, and padded to the longest of it for the peers."""

    encodings: tuple[Encoding, ...]
    token_ids: NDArray[np.int64]  # [B, T]
    mask: NDArray[np.int64]  # [B, T], 1 at real tokens

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sentence."""
        return [len(encoding.token_ids) for encoding in self.encodings]


def read_lengths(data: Path, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Token lengths of each data set's test rows, special tokens included, by name of the set."""
    result = {}
    for file in sorted(data.glob("*/test.jsonl")):
        texts = [
            tuple(value for key, value in json.loads(line).items() if key.startswith("text"))
            for line in file.read_text().splitlines()[:ROWS_READ]
        ]
        encoded = tokenizer.encode_batch([row[0] if len(row) == 1 else row for row in texts])
        result[file.parent.name] = [sum(item.attention_mask) for item in encoded]
    if not result:
        raise SystemExit(f"{data}: no data set in it; */test.jsonl with a `text` is expected")
    return result


def sentence_sets(lengths: dict[str, list[int]]) -> dict[str, list[int]]:
    """The data sets that hold sentences; all of them if none does."""
    short = {
        name: counts for name, counts in lengths.items() if np.median(counts) <= DOCUMENT_TOKENS
    }
    return short or lengths


def batches(
    work: Work, lengths: dict[str, list[int]], count: int, vocabulary: int, longest: int, seed: int
) -> list[Sentences]:
    """`count` batches of `work`; the same arguments give the same batches."""
    generator = random.Random(seed)
    sets = sentence_sets(lengths)
    names = generator.sample(sorted(sets), len(sets))
    result = []
    for number in range(count):
        drawn = generator.choices(sets[names[number % len(names)]], k=work.sentences)
        scaled = scaled_to_mean(drawn, MEAN_TOKENS, longest, generator)
        result.append(sentences_of(scaled, vocabulary, generator))
    return result


def scaled_to_mean(
    lengths: Sequence[int], mean: int, longest: int, generator: random.Random
) -> list[int]:
    """The lengths stretched or shrunk so that their mean is exactly `mean`."""
    factor = mean * len(lengths) / sum(lengths)
    result = [min(longest, max(SHORTEST, round(length * factor))) for length in lengths]
    while (rest := mean * len(result) - sum(result)) != 0:
        step = 1 if rest > 0 else -1
        index = generator.randrange(len(result))
        result[index] = min(longest, max(SHORTEST, result[index] + step))
    return result


def sentences_of(lengths: Sequence[int], vocabulary: int, generator: random.Random) -> Sentences:
    """Sentences of these lengths, with token ids of chance."""
    first = min(FIRST_WORD, vocabulary // 2)
    encodings = tuple(
        Encoding([generator.randrange(first, vocabulary) for _ in range(length)], [0] * length, 0)
        for length in lengths
    )
    token_ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    mask = np.zeros_like(token_ids)
    for row, encoding in enumerate(encodings):
        token_ids[row, : lengths[row]] = encoding.token_ids
        mask[row, : lengths[row]] = 1
    return Sentences(encodings, token_ids, mask)
