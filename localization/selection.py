"""From scores to neuron sets, and the search for the smallest set that is good enough. Pure."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

STEP = 0.05
"""Spacing of the keep ratios that are tried (Skeleton, section 4.4)."""

MULTIPLE = 32
"""Kept counts per layer are multiples of this: matrix units work on blocks."""


def select(scores: Tensor, keep: float, scope: Literal["global", "layer"]) -> tuple[Tensor, ...]:
    """The best `keep` share of neurons, as ascending int32 indices per layer.

    `scores [L, F]`. `global` ranks all layers' neurons together, `layer` each layer's by itself.
    Counts are rounded to the nearest multiple of `MULTIPLE` (and at most F).
    """
    layers, width = scores.shape
    if scope == "layer":
        counts = [round(keep * width)] * layers
    else:
        best = scores.flatten().argsort(descending=True, stable=True)[
            : round(keep * layers * width)
        ]
        counts = torch.bincount(best // width, minlength=layers).tolist()
    result = []
    for row, count in zip(scores, counts, strict=True):
        rounded = min(width, round(count / MULTIPLE) * MULTIPLE)
        kept = row.argsort(descending=True, stable=True)[:rounded]
        result.append(kept.sort().values.to(torch.int32))
    return tuple(result)


def smallest_acceptable(acceptable: Callable[[float], bool]) -> float:
    """The smallest keep ratio, in steps of `STEP`, that is acceptable, by binary search.

    Ratio 1 is taken as acceptable without asking; at most five ratios are asked about.
    """
    low, high = 1, round(1 / STEP)
    while low < high:
        middle = (low + high) // 2
        if acceptable(round(middle * STEP, 2)):
            high = middle
        else:
            low = middle + 1
    return round(low * STEP, 2)
