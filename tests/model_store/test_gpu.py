"""What serves on a GPU and how its paths are chosen, without one."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_store import gpu
from model_store.encoder import Encoder
from model_store.gpu import FfnCosts, gpu_ops, measure_ffn
from model_store.ops import TorchOps
from tests.overlays import small_backbone


@pytest.mark.parametrize(
    ("gathered", "sliced", "pay"), [(1.0, 0.5, True), (1.0, 0.99, False), (1.0, 2.0, False)]
)
def test_slices_pay_only_where_they_are_clearly_faster(
    gathered: float, sliced: float, pay: bool
) -> None:
    assert FfnCosts(gathered, sliced).slices_pay is pay


def test_both_paths_are_measured_in_turn_on_the_same_work(tmp_path: Path) -> None:
    _, backbone = small_backbone(tmp_path)
    ops = TorchOps(shares_layers=True)
    encoder = Encoder(backbone.config, backbone.tensors, ops)
    results = []
    seconds = itertools.cycle([3.0, 1.0])

    def timer(call: Callable[[], object]) -> float:
        results.append(call())
        return next(seconds)

    costs = measure_ffn(encoder, timer, rows=37, tasks=3)
    assert costs == FfnCosts(3.0, 1.0)
    gathered, sliced = results[0], results[1]
    assert isinstance(gathered, torch.Tensor)
    assert gathered.shape == (37, backbone.config.hidden)
    torch.testing.assert_close(gathered, sliced)


def test_without_triton_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    ops = gpu_ops(torch.float16, "cpu")
    assert type(ops) is TorchOps
    assert ops.shares_layers
