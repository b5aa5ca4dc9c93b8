"""Everything that a localization's steps share: settings, rows made ready, networks, stage files.

Built once, before anything is computed; here a task, its rows and its backbone are checked to fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from localization.config import TaskConfig
from localization.data import Dataset, Rows
from localization.errors import ConfigError
from localization.network import Examples, Network, Progress
from localization.stages import StageFiles, key_of
from model_store.backbone import Backbone
from model_store.backend import Backend, choose
from model_store.encoder import Encoder
from model_store.manifest import MAX_LABELS
from model_store.manifest import LinearHead as LinearHeadRecord
from model_store.manifest import VerbalizerHead as VerbalizerRecord
from model_store.ops import Ops, TorchOps, fast_bf16
from model_store.ops_onednn import fastest_ops
from model_store.tokenization import InputEncoder

LATER = (
    "attribution",
    "budget",
    "refit",
    "condense",
    "scales",
    "repeats",
    "existing",
    "golden",
    "description",
)
"""Settings of what comes after the first step, or is hashed by its content."""


class Reporter(Protocol):
    """Where progress goes; `localization.console` draws it."""

    def step(self, name: str) -> Progress:
        """A new step begins; the result is called as it goes on."""
        ...

    def note(self, text: str) -> None:
        """A line for the reader."""
        ...


@dataclass(frozen=True)
class Job:
    """What the steps share."""

    config: TaskConfig
    backbone: Backbone
    dataset: Dataset
    train: Examples
    validation: Examples
    tuning: Network
    """In the precision that tuning runs in."""
    exact: Network
    """In fp32: scores, fits and golden inputs."""
    served: Encoder
    """In the precision that serves: speeds."""
    backend: Backend[Any]
    """As a server on this machine answers: figures."""
    stages: StageFiles
    key: str
    """Hash of what every step depends on."""
    report: Reporter

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in index order."""
        return self.dataset.labels

    def examples(self, rows: Rows) -> Examples:
        """Rows as token ids and class indices."""
        config, backbone = self.config, self.backbone
        return _examples(config, backbone, self.labels, rows)


def prepare(
    config: TaskConfig,
    backbone: Backbone,
    dataset: Dataset,
    work: Path,
    device: str,
    report: Reporter,
) -> Job:
    """Check that task, rows and backbone fit, and make them ready. Raises `ConfigError`."""
    if config.max_tokens + config.prompt_tokens > backbone.config.max_tokens:
        raise ConfigError(
            f"max_tokens {config.max_tokens} and prompt_tokens {config.prompt_tokens} exceed the "
            f"{backbone.config.max_tokens} tokens of backbone {backbone.name!r}"
        )
    if len(dataset.labels) > MAX_LABELS:
        raise ConfigError(f"{len(dataset.labels)} labels; a task may have {MAX_LABELS}")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the work folder {work} cannot be made: {error.strerror}") from None
    wanted = config.tuning.precision
    bf16 = wanted == "bf16" or (wanted == "auto" and fast_bf16(device))
    exact = _network(config, backbone, dataset.labels, TorchOps(torch.float32, device))
    tuning = exact
    if bf16:
        tuning = _network(config, backbone, dataset.labels, TorchOps(torch.bfloat16, device))
    # What comes later is hashed where it counts, so that another budget finds the first step done.
    settings = config.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(LATER, True),
            "tuning": {"condense_epochs", "condense_rate", "search"},
        },
    )
    return Job(
        config,
        backbone,
        dataset,
        _examples(config, backbone, dataset.labels, dataset.train),
        _examples(config, backbone, dataset.labels, dataset.validation),
        tuning,
        exact,
        Encoder(backbone.config, backbone.tensors, fastest_ops(device, bf16=bf16)),
        choose(
            backbone.config,
            backbone.tensors,
            device=device,
            precision="bf16" if bf16 else "fp32",
            threads=torch.get_num_threads(),
        ),
        StageFiles(work),
        key_of(settings, backbone.fingerprint, dataset.sha256, bf16),
        report,
    )


def head_record(
    config: TaskConfig, backbone: Backbone, labels: Sequence[str]
) -> LinearHeadRecord | VerbalizerRecord:
    """The head as the manifest describes it. Raises `ConfigError` for a word that cannot be one."""
    if config.verbalizer is None:
        return LinearHeadRecord()
    if not backbone.config.has_mlm:
        raise ConfigError(f"verbalizer: backbone {backbone.name!r} has no MLM head; leave it out")
    if sorted(config.verbalizer) != sorted(labels):
        raise ConfigError(
            f"verbalizer: names {sorted(config.verbalizer)}, the rows' labels are {sorted(labels)}"
        )
    words = tuple(config.verbalizer[label] for label in labels)
    tokens = tuple(_token(backbone, word) for word in words)
    if len(set(tokens)) != len(tokens):
        raise ConfigError(f"verbalizer: two labels have the same word among {words}")
    return VerbalizerRecord(words=words, token_ids=tokens)


def _network(config: TaskConfig, backbone: Backbone, labels: Sequence[str], ops: Ops) -> Network:
    encoder = Encoder(backbone.config, backbone.tensors, ops)
    record = head_record(config, backbone, labels)
    verbalizer = None
    if isinstance(record, VerbalizerRecord):
        verbalizer = encoder.verbalizer(torch.tensor(record.token_ids))
    return Network(encoder, config.resolved_read, verbalizer)


def _token(backbone: Backbone, word: str) -> int:
    """The one token of a label word in the middle of a sentence."""
    # Special tokens are among them: a word that the vocabulary lacks would become [UNK].
    special = backbone.tokenizer.get_added_tokens_decoder()
    # Byte-level vocabularies (RoBERTa) hold the space before a word in its token.
    for text in (f" {word}", word):
        tokens = backbone.tokenizer.encode(text, add_special_tokens=False).ids
        if len(tokens) == 1 and not (tokens[0] in special and special[tokens[0]].special):
            return tokens[0]
    raise ConfigError(
        f"verbalizer: {word!r} is not one token of backbone {backbone.name!r}; choose another word"
    )


def _examples(
    config: TaskConfig, backbone: Backbone, labels: Sequence[str], rows: Rows
) -> Examples:
    encoder = InputEncoder(
        backbone.tokenizer, backbone.config, config.resolved_template, config.max_tokens
    )
    numbers = {label: number for number, label in enumerate(labels)}
    classes = torch.tensor([numbers[label] for label in rows.labels], dtype=torch.long)
    return Examples(encoder.encode(rows.inputs), classes)
