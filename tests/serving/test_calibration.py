"""The batch size that is found: near the best throughput, no larger than it needs to be."""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.backend import TorchBackend
from model_store.packing import Item
from model_store.store import Store
from serving.calibration import efficient_tokens
from tests.overlays import fp32_encoder
from tests.serving.fake_plans import FakeBackend, FakePlan


class Timed(FakeBackend):
    """Says that a batch took as long as a function of its sequences gives."""

    def __init__(self, seconds: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__({}, {})
        self.counts: list[int] = []
        self._seconds = seconds
        self._now = 0.0
        monkeypatch.setattr(
            "serving.calibration.time", SimpleNamespace(perf_counter=lambda: self._now)
        )

    def plan(self, overlay: Overlay) -> FakePlan:
        return FakePlan("whole", False, {})

    def warm(self, plan: FakePlan) -> FakePlan:
        return plan

    def answer(self, items: Sequence[Item], plans: Sequence[FakePlan]) -> list[NDArray[Any]]:
        if len(items) not in self.counts:
            self.counts.append(len(items))
        self._now += self._seconds(len(items))
        return [np.ones(2) / 2] * len(items)


@pytest.mark.parametrize(
    ("seconds", "expected", "tried"),
    [
        # Each forward costs as much as 32 sequences more: twice as many are always worth it.
        (lambda count: 1e-4 * (32 + count), 128, 128),
        # From 16 on it is no faster.
        (lambda count: 1e-3 * max(16, count), 16, 32),
        # Nothing is gained from the start.
        (lambda count: 1e-3 * count, 4, 8),
        # 16 sequences take longer than anyone should wait for.
        (lambda count: 0.3 * (count / 16) ** 0.5, 16, 16),
        # Within three hundredths of the best, the smaller is taken.
        (lambda count: 1e-3 * max(16, count) * (0.98 if count > 16 else 1), 16, 32),
    ],
)
def test_the_smallest_batch_near_the_best_throughput(
    tiny: tuple[Store, Backbone],
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    expected: int,
    tried: int,
) -> None:
    backend = Timed(seconds, monkeypatch)
    assert efficient_tokens(backend, tiny[1]) == max(32 * expected, tiny[1].config.max_tokens)
    assert max(backend.counts) == tried


def test_a_sequence_of_the_most_tokens_fits(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny[1].config.model_copy(update={"positions": 5000})
    backend = Timed(lambda count: 1e-3 * count, monkeypatch)
    assert efficient_tokens(backend, dataclasses.replace(tiny[1], config=config)) == 5000


def test_a_real_backend_is_measured(tiny: tuple[Store, Backbone]) -> None:
    backend = TorchBackend(fp32_encoder(tiny[1]), threads=1)
    assert 66 <= efficient_tokens(backend, tiny[1]) <= 32 * 128
