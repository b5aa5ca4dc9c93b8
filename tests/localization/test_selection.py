"""From scores to sets: laws over any scores; and the search over every possible answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localization.selection import MULTIPLE, STEP, select, smallest_acceptable


@given(
    layers=st.integers(1, 5),
    blocks=st.integers(1, 8),
    keep=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_best_are_kept(layers: int, blocks: int, keep: float, seed: int) -> None:
    width = blocks * MULTIPLE
    scores = torch.rand(layers, width, generator=torch.Generator().manual_seed(seed))
    neurons = select(scores, keep, "global")
    for row, kept in zip(scores, neurons, strict=True):
        assert kept.dtype == torch.int32
        assert len(kept) % MULTIPLE == 0
        assert bool((kept[1:] > kept[:-1]).all())
        gone = torch.ones(width, dtype=torch.bool)
        gone[kept.long()] = False
        if len(kept) and bool(gone.any()):
            assert row[kept.long()].min() >= row[gone].max()
    total = sum(map(len, neurons))
    wanted = keep * layers * width
    assert total <= wanted + 1, "more than the share is kept"
    assert wanted - total <= layers * MULTIPLE / 2 + MULTIPLE + 1


def test_per_layer_keeps_the_same_count_everywhere() -> None:
    scores = torch.rand(3, 64) + torch.arange(3)[:, None]
    assert [len(kept) for kept in select(scores, 0.5, "layer")] == [32, 32, 32]
    assert [len(kept) for kept in select(scores, 0.5, "global")] == [0, 32, 64]


@pytest.mark.parametrize("answer", range(1, 21))
def test_the_search_finds_the_smallest_ratio_in_five_trials(answer: int) -> None:
    asked: list[float] = []

    def acceptable(keep: float) -> bool:
        asked.append(keep)
        return keep >= answer * STEP - 1e-9

    assert smallest_acceptable(acceptable) == pytest.approx(answer * STEP)
    assert len(asked) <= 5
    assert 1.0 not in asked
