"""How good a task's answers are: accuracy, and F1 per class. Pure numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """Figures over some rows; all shares are 0 to 1."""

    rows: int
    accuracy: float
    macro_f1: float
    f1: tuple[float, ...]
    """Per class, in label order; 0 for a class that neither occurs nor is predicted."""


def evaluate(predicted: Tensor, classes: Tensor, class_count: int) -> Evaluation:
    """Compare predicted with true class indices, both `[B]`."""
    hits = torch.bincount(classes[classes == predicted], minlength=class_count)
    # F1 = 2 TP / (predicted + true); an absent class counts 0, as 0 / 1.
    totals = torch.bincount(predicted, minlength=class_count)
    totals += torch.bincount(classes, minlength=class_count)
    f1 = 2 * hits / totals.clamp(min=1)
    rows = len(classes)
    return Evaluation(
        rows,
        float(hits.sum()) / rows,
        float(f1.mean()),
        tuple(float(value) for value in f1),
    )
