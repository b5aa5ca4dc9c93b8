"""What the server benchmarks ask: sentences with the lengths of SST-2's, as requests of a shape.

A shape is a number of inputs in one request and a number of connections that each wait for their
answer. Knows the server's predict route; nothing of how requests are sent.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# Words a sentence: deciles of the lengths of SST-2's test sentences.
LENGTHS = (2, 9, 11, 14, 16, 19, 21, 24, 27, 32, 47)
WORDS = """
the a of and in to is it that this film story with for as but not its you one by about too more
than an on all has like good so funny little time never characters movie even still
""".split()


@dataclass(frozen=True)
class Shape:
    """How the server is asked."""

    inputs: int
    """Of one request."""
    connections: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`64`: connections with one input a request; `16x32`: connections times inputs."""
        connections, _, inputs = text.partition("x")
        return cls(int(inputs or "1"), int(connections))

    def __str__(self) -> str:
        return f"{self.connections}x{self.inputs}"


@dataclass(frozen=True)
class Question:
    """One POST request."""

    path: str
    body: str


def sentences(data: Path | None) -> list[str]:
    """SST-2's test sentences, or as many of the same lengths."""
    if data is not None:
        lines = (data / "sst2" / "test.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]
    generator = random.Random(0)
    return [
        " ".join(generator.choices(WORDS, k=round(generator.uniform(*pair))))
        for _ in range(80)
        for pair in pairwise(LENGTHS)
    ]


def groups(texts: Sequence[str], tasks: Sequence[str], inputs: int) -> list[tuple[str, list[str]]]:
    """Tasks in turn, each with the next `inputs` texts; every text is in it, some twice."""
    count = -(-len(texts) // inputs)
    return [
        (
            tasks[number % len(tasks)],
            [texts[(number * inputs + at) % len(texts)] for at in range(inputs)],
        )
        for number in range(count)
    ]


def as_input(text: str, takes_pairs: bool) -> str | tuple[str, str]:
    """The text, or a pair of the same total length."""
    words = text.split()
    half = len(words) // 2
    return (" ".join(words[:half]), " ".join(words[half:])) if takes_pairs else text


def questions(texts: Sequence[str], takes_pairs: Mapping[str, bool], inputs: int) -> list[Question]:
    """Predict requests of `inputs` inputs each; `takes_pairs` of every task, in their turn."""
    return [
        Question(
            f"/v1/tasks/{task}/predict",
            json.dumps({"inputs": [as_input(text, takes_pairs[task]) for text in chosen]}),
        )
        for task, chosen in groups(texts, list(takes_pairs), inputs)
    ]
