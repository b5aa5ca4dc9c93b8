"""How good a task's answers are: accuracy, F1 per class, confusion. Pure numbers."""

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
    confusion: Tensor
    """`[C, C]` int64: rows of true class i that were predicted as class j."""


def evaluate(predicted: Tensor, classes: Tensor, class_count: int) -> Evaluation:
    """Compare predicted with true class indices, both `[B]`."""
    cells = torch.bincount(classes * class_count + predicted, minlength=class_count**2)
    confusion = cells.view(class_count, class_count)
    hits = confusion.diagonal()
    # F1 = 2 TP / (predicted + true); an absent class counts 0, as 0 / 1.
    totals = (confusion.sum(dim=0) + confusion.sum(dim=1)).clamp(min=1)
    f1 = 2 * hits / totals
    rows = len(classes)
    return Evaluation(
        rows,
        float(hits.sum()) / rows,
        float(f1.mean()),
        tuple(float(value) for value in f1),
        confusion,
    )
