"""The Skeleton paper's modules, and the network with some of a module's neurons zeroed.

Its section 5.4 prunes not only FFN neurons but outputs of the other linear maps of a layer, too. A
neuron is here one output of one map: a row of its weight, and the bias beside it. Every map keeps
its width, and what is pruned is zero (appendix B), so that neighbours and residuals still fit:

    q, k     a dimension that either lost adds nothing to any attention score, as if both lost it:
             each is pruned by its own scores, and zeros stand where the other has a partner
    v        zero in what attention gives; the column of W_o behind it idles
    o        zero before the residual is added, which passes through unchanged
    ffn_in   zero after the activation, and so is its row of W_out: the same as removing the neuron
    ffn_out  zero before the residual is added, which passes through unchanged

A gate does this to the activations, which is the same as zeroing the weights. It shows what the
parts of a network are worth; only FFN neurons and whole heads make an overlay smaller and faster.

Letters: `L` layers, `n` packed tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from localization.network import Network, Tuned
from localization.selection import Kept
from model_store.plan import Gate, Part, Plan

Module = Literal["ffn", "attention", "dense", "all"]

PARTS: Mapping[Module, tuple[Part, ...]] = {
    "ffn": ("ffn_in",),
    "attention": ("q", "k", "v", "o"),
    "dense": ("o", "ffn_in", "ffn_out"),
    "all": ("q", "k", "v", "o", "ffn_in", "ffn_out"),
}
"""The maps of each module; their neurons compete with one another."""


@dataclass(frozen=True)
class ModuleGate:
    """A plan's gate that zeroes neurons of some maps."""

    masks: Mapping[tuple[int, Part], Tensor]
    """By layer and map `[width]`: 1 where a neuron is kept, 0 where it is pruned."""

    def __call__(self, layer: int, part: Part, x: Tensor) -> Tensor:
        mask = self.masks.get((layer, part))
        return x if mask is None else x * mask.to(x)

    @property
    def pruned(self) -> float:
        """The share of the module's neurons that are zero."""
        masks = torch.cat(list(self.masks.values()))
        return 1.0 - float(masks.mean())


def module_gate(
    scores: Mapping[Part, Tensor],
    module: Module,
    keep: float,
    scope: Literal["global", "layer"] = "global",
) -> ModuleGate:
    """The gate that keeps the best `keep` share of the neurons in all maps of `module`.

    `scores`: per map `[L, width]`, in one unit. `global` ranks all layers and maps together,
    `layer` the maps of each layer. Counts are exact up to rounding. Raises `ValueError` where a map
    of the module has no scores, or `keep` is no share.
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep {keep} is not between 0 and 1")
    missing = [part for part in PARTS[module] if part not in scores]
    if missing:
        raise ValueError(f"module {module!r} needs scores of {missing[0]!r}")
    joined = torch.cat([scores[part] for part in PARTS[module]], dim=1)
    ranked = joined.flatten()[None] if scope == "global" else joined
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, : round(keep * ranked.shape[1])]
    mask = torch.zeros(ranked.shape).scatter(1, best, 1.0).view_as(joined)
    by_part = torch.split(mask, [scores[part].shape[1] for part in PARTS[module]], dim=1)
    return ModuleGate(
        {
            (layer, part): row
            for part, rows in zip(PARTS[module], by_part, strict=True)
            for layer, row in enumerate(rows)
        }
    )


@dataclass(frozen=True)
class GatedNetwork(Network):
    """A network whose every plan has `gate`, so that tuning goes through it."""

    gate: Gate

    def frozen(self, tuned: Tuned, kept: Kept | None = None) -> Plan:
        """The plan's frozen weights, behind the gate."""
        return dataclasses.replace(super().frozen(tuned, kept), gate=self.gate)
