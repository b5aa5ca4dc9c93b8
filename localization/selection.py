"""From scores to what is kept: neurons and heads under one budget, and the search for it. Pure.

Letters: `L` layers, `F` FFN width, `A` heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STEP = 0.05
"""Spacing of the keep ratios that are tried (Skeleton, section 4.4)."""

MULTIPLE = 32
"""Kept counts per layer are multiples of this: matrix units work on blocks."""


@dataclass(frozen=True)
class Kept:
    """What a task keeps of every layer, as ascending int32 indices."""

    neurons: tuple[Tensor, ...]
    heads: tuple[Tensor, ...] | None = None
    """None: all of them, shared with other tasks."""


@dataclass(frozen=True)
class Scores:
    """What `quantify` finds: larger is more important."""

    neurons: Tensor  # [L, F]
    heads: Tensor  # [L, A]


@dataclass(frozen=True)
class Costs:
    """Time or FLOPs of one forward as a sum: what each unit adds, and what is always there."""

    fixed: float
    neuron: float
    head: float

    def of(self, neurons: float, heads: float) -> float:
        """The cost with these counts over all layers."""
        return self.fixed + self.neuron * neurons + self.head * heads


def select(scores: Tensor, keep: float, scope: Literal["global", "layer"]) -> tuple[Tensor, ...]:
    """The best `keep` share of neurons, as ascending int32 indices per layer.

    `scores [L, F]`. `global` ranks all layers' neurons together, `layer` each layer's by itself.
    Counts are rounded to the nearest multiple of `MULTIPLE` (and at most F), and to the one below
    where that would keep more than the share over all layers.
    """
    layers, width = scores.shape
    if scope == "layer":
        counts = [round(keep * width)] * layers
    else:
        best = scores.flatten().argsort(descending=True, stable=True)[
            : round(keep * layers * width)
        ]
        counts = torch.bincount(best // width, minlength=layers).tolist()
    rounded = [min(width, round(count / MULTIPLE) * MULTIPLE) for count in counts]
    while sum(rounded) > round(keep * layers * width):
        # The layer that rounding has given most gives a block back.
        most = max(
            (layer for layer in range(layers) if rounded[layer]),
            key=lambda layer: rounded[layer] - counts[layer],
        )
        rounded[most] = max(0, (rounded[most] - 1) // MULTIPLE * MULTIPLE)
    return tuple(_best(row, count) for row, count in zip(scores, rounded, strict=True))


def select_within(neuron_scores: Tensor, head_scores: Tensor, costs: Costs, budget: float) -> Kept:
    """Neurons and heads whose cost fits `budget`: those that are worth most for what they cost.

    `neuron_scores [L, F]`, `head_scores [L, A]`, in the same unit. Neurons compete in blocks of
    `MULTIPLE`, best first, so that counts need no rounding afterwards. Greedy, by score per cost.
    """
    units: list[tuple[float, bool, int, int]] = []  # worth, whether a head, layer, size
    for layer, row in enumerate(neuron_scores):
        for block in row.sort(descending=True, stable=True).values.split(MULTIPLE):
            worth = float(block.sum()) / (costs.neuron * len(block))
            units.append((worth, False, layer, len(block)))
    for layer, row in enumerate(head_scores):
        units += [(float(score) / costs.head, True, layer, 1) for score in row]
    units.sort(key=lambda unit: unit[0], reverse=True)
    counts = {False: [0] * len(neuron_scores), True: [0] * len(head_scores)}
    left = budget - costs.fixed
    for _, is_head, layer, size in units:
        price = costs.head if is_head else costs.neuron * size
        if price <= left:
            counts[is_head][layer] += size
            left -= price
    return Kept(
        tuple(map(_best, neuron_scores, counts[False])),
        tuple(map(_best, head_scores, counts[True])),
    )


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending, as int32."""
    kept = scores.argsort(descending=True, stable=True)[:count]
    return kept.sort().values.to(torch.int32)


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
