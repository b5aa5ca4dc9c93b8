"""How good a task's answers are: accuracy, F1 per class, Matthews correlation. Pure numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localization.config import Metric


@dataclass(frozen=True)
class Evaluation:
    """Figures over some rows; all shares are 0 to 1."""

    rows: int
    accuracy: float
    macro_f1: float
    f1: tuple[float, ...]
    """Per class, in label order; 0 for a class that neither occurs nor is predicted."""
    matthews: float
    """Correlation of predicted with true classes, -1 to 1; 0 where one of the two is constant."""

    def value(self, metric: Metric) -> float:
        """The figure of that name."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1, "matthews": self.matthews}[
            metric
        ]


def evaluate(predicted: Tensor, classes: Tensor, class_count: int) -> Evaluation:
    """Compare predicted with true class indices, both `[B]`."""
    hits = torch.bincount(classes[classes == predicted], minlength=class_count)
    guessed = torch.bincount(predicted, minlength=class_count)
    true = torch.bincount(classes, minlength=class_count)
    # F1 = 2 TP / (predicted + true); an absent class counts 0, as 0 / 1.
    f1 = 2 * hits / (guessed + true).clamp(min=1)
    rows = len(classes)
    return Evaluation(
        rows,
        float(hits.sum()) / rows,
        float(f1.mean()),
        tuple(float(value) for value in f1),
        _matthews(int(hits.sum()), guessed.tolist(), true.tolist(), rows),
    )


def _matthews(hits: int, guessed: list[int], true: list[int], rows: int) -> float:
    """Gorodkin's R_K (2004), for two classes the usual coefficient."""
    both = rows * hits - sum(a * b for a, b in zip(guessed, true, strict=True))
    spread = (rows**2 - sum(a * a for a in guessed)) * (rows**2 - sum(b * b for b in true))
    return both / math.sqrt(spread) if spread else 0.0
