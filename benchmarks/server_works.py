"""What the server benchmarks ask: SST-2's sentences or as many of their lengths, in shapes.

A shape is a number of inputs in one request and a number of connections that each wait for their
answer. How they become requests is in `serving/questions.py`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from serving.questions import made_up_sentences


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


def sentences(data: Path | None) -> list[str]:
    """SST-2's test sentences, or as many of the same lengths."""
    if data is not None:
        lines = (data / "sst2" / "test.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]
    return made_up_sentences()
