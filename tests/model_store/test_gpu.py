"""What serves on a GPU and how its paths are chosen, without one."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import BERT_BASE, make_plan
from model_store import gpu
from model_store.encoder import Encoder
from model_store.gpu import FfnCosts, gpu_ops, measure_ffn, warm_up
from model_store.ops import Groups, TorchOps
from model_store.plan import own_bytes
from tests.overlays import random_overlay, small_backbone


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


def test_warming_up_runs_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, backbone = small_backbone(tmp_path)
    ops = TorchOps(shares_layers=True)
    sizes = set()
    ffn = ops.ffn

    def noted(layer: int, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        sizes.add((len(x), len(groups.ranges)))
        return ffn(layer, x, groups)

    monkeypatch.setattr(ops, "ffn", noted)
    warm_up(Encoder(backbone.config, backbone.tensors, ops))
    assert {(16, 1), (64, 64), (4096, 8)} <= sizes


def test_a_cold_task_takes_little_memory_and_no_weights() -> None:
    """BERT-base, half of the neurons, a prompt of ten tokens: 10,000 such tasks are under 1 GB."""
    tensors = {name: torch.zeros(shape) for name, shape in BERT_BASE.shapes().items()}
    ops = TorchOps(torch.float32, shares_layers=True)
    plan = make_plan(Encoder(BERT_BASE, tensors, ops), 0, 0.5, prompt=10)
    lists, prompt, head = 12 * 1536 * 2, 10 * 768 * 4, 2 * (768 + 1) * 4
    assert own_bytes(plan) == lists + prompt + head < 100_000


def test_slices_and_adapters_are_counted(tmp_path: Path) -> None:
    _, backbone = small_backbone(tmp_path)
    encoder = Encoder(backbone.config, backbone.tensors, TorchOps(shares_layers=True))
    plain = random_overlay(backbone, prompt_tokens=0)
    cold, hot = (plain.plan(encoder, sliced=sliced) for sliced in (False, True))
    kept = sum(map(len, plain.neurons))
    hidden, layers = backbone.config.hidden, backbone.config.layers
    slices = kept * (2 * hidden + 1) * 4 + layers * hidden * 4
    assert own_bytes(hot) - own_bytes(cold) == slices - kept * 2
    scaled = random_overlay(backbone, prompt_tokens=0, scales=True).plan(encoder, sliced=False)
    assert own_bytes(scaled) - own_bytes(cold) == (kept + layers * hidden) * 4
    norms = random_overlay(backbone, prompt_tokens=0, norms=True).plan(encoder, sliced=False)
    assert own_bytes(norms) - own_bytes(cold) == layers * 4 * hidden * 4


def test_without_triton_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    ops = gpu_ops(torch.float16, "cpu")
    assert type(ops) is TorchOps
    assert ops.shares_layers
