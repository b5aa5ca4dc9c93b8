"""Our engine as the benchmark sees it: overlays in once, then batches in and probabilities out.

The one file of the benchmark that knows how our forward is built.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.backend import choose
from model_store.native_weights import Precision
from model_store.packing import Item
from model_store.tokenization import Encoding
from serving.plans import PlanCache


class Silent:
    """Hears of plans and keeps nothing."""

    def plan_lookup(self, result: str) -> None:
        """A plan was looked up."""

    def plan_built(self, seconds: float) -> None:
        """A plan became warm."""

    def plan_evicted(self) -> None:
        """A plan made room."""

    def plan_bytes(self, size: int) -> None:
        """Memory of all plans."""


class Ours:
    """A backbone in one precision and the tasks registered with it."""

    def __init__(
        self,
        backbone: Backbone,
        precision: Precision,
        overlays: Sequence[Overlay],
        budget_bytes: int = 1 << 30,
    ) -> None:
        """Nothing is built for a task before it is asked for; plans stay within the budget."""
        self._overlays = overlays
        self._backend = choose(
            backbone.config,
            backbone.tensors,
            device="cpu",
            precision=precision,
            threads=torch.get_num_threads(),
        )
        self._plans = PlanCache(self._backend, budget_bytes, Silent())

    def answer(self, sentences: Sequence[Encoding], tasks: Sequence[int]) -> Tensor:
        """Probabilities `[B, C]` in the order given; `tasks[i]` is the overlay of sentence i."""
        asked = list(dict.fromkeys(tasks))
        segment = {task: number for number, task in enumerate(asked)}
        plans = [self._plans.get(str(task), self._overlays[task]) for task in asked]
        items = [
            Item(sentence, segment[task]) for sentence, task in zip(sentences, tasks, strict=True)
        ]
        return torch.from_numpy(np.stack(self._backend.answer(items, plans)))

    def settle(self) -> None:
        """Wait until plans that were asked for are warm."""
        self._plans.settle()

    def close(self) -> None:
        """Stop the thread that makes plans warm."""
        self._plans.close()
