"""Artifacts that answer each in their own way: every answer tells which one has given it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from model_store import artifact
from model_store.artifact import probabilities
from model_store.backbone import Backbone
from tests.overlays import fp32_encoder, random_overlay

TEXTS = ("the film was good", "a cat", "what is my new bank card ?", "lost money in the game")
LABELS = (("bad", "fair", "good"), ("no", "yes"))
TOLERANCE = 2e-3
"""How far a probability may be from its fp32 value."""


@dataclass(frozen=True)
class Variant:
    """One artifact, and what it answers to each of `TEXTS`."""

    number: int
    data: bytes
    scores: dict[str, dict[str, float]]

    def has_given(self, text: str, scores: dict[str, float]) -> bool:
        """Whether these are its answer to this text."""
        mine = self.scores[text]
        return mine.keys() == scores.keys() and all(
            abs(mine[label] - scores[label]) < TOLERANCE for label in mine
        )


def make_variants(backbone: Backbone, task: str, count: int, seed: int = 0) -> list[Variant]:
    """So many different artifacts of one task. Every second has other labels."""
    encoder = fp32_encoder(backbone)
    made: list[Variant] = []
    seeds = itertools.count(1_000 * seed)
    while len(made) < count:
        labels = LABELS[len(made) % 2]
        overlay = random_overlay(backbone, task, seed=next(seeds), labels=labels)
        rows = probabilities(encoder, backbone, overlay, TEXTS).tolist()
        scores = {
            text: dict(zip(labels, row, strict=True)) for text, row in zip(TEXTS, rows, strict=True)
        }
        # Where a text is clear to two of them, both would give the same answer.
        if all(which(made, text, scores[text]) is None for text in TEXTS):
            made.append(Variant(len(made), artifact.write(overlay), scores))
    return made


def which(variants: Sequence[Variant], text: str, scores: dict[str, float]) -> int | None:
    """The number of the variant that has given an answer; None where none has."""
    found = [one.number for one in variants if one.has_given(text, scores)]
    return found[0] if found else None
