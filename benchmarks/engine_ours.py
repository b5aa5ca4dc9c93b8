"""Our engine as the benchmark sees it: overlays in once, then batches in and probabilities out.

The one file of the benchmark that knows how our forward is built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.ops import Ops, TorchOps
from model_store.ops_onednn import OneDnnOps
from model_store.packing import Item, pack
from model_store.tokenization import Encoding
from serving.plans import PlanCache

PRECISIONS = ("bf16", "fp32")
"""What `Ours` can compute in."""


class Ours:
    """A backbone in one precision and the tasks registered with it."""

    def __init__(
        self,
        backbone: Backbone,
        precision: str,
        overlays: Sequence[Overlay],
        budget_bytes: int = 1 << 30,
    ) -> None:
        """Nothing is built for a task before it is asked for; plans stay within the budget."""
        self._overlays = overlays
        self._encoder = Encoder(backbone.config, backbone.tensors, _ops(precision))
        self._plans = PlanCache(self._encoder, budget_bytes)

    def answer(self, sentences: Sequence[Encoding], tasks: Sequence[int]) -> Tensor:
        """Probabilities `[B, C]` in the order given; `tasks[i]` is the overlay of sentence i."""
        asked = list(dict.fromkeys(tasks))
        segment = {task: number for number, task in enumerate(asked)}
        plans = [self._plans.get(str(task), self._overlays[task]) for task in asked]
        items = [
            Item(sentence, segment[task]) for sentence, task in zip(sentences, tasks, strict=True)
        ]
        with torch.inference_mode():
            batch = pack(items, [plan.layout for plan in plans])
            packed = torch.cat(self._encoder.forward(batch, plans)).softmax(dim=1)
            result = torch.empty_like(packed)
            result[list(batch.order)] = packed
        return result


def _ops(precision: str) -> Ops:
    if precision == "bf16":
        return OneDnnOps()
    if precision == "fp32":
        return TorchOps()
    raise ValueError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
