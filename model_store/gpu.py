"""What serves on a GPU, and whether a hot task is worth slices of its own there.

A task's neurons can be read from the backbone by their numbers, or from slices cut out for it. Cut
slices are read in one piece, but each task's are other memory; the backbone's rows stay in the
GPU's cache for all tasks. Which wins depends on the GPU, so it is measured once at the start. Knows
nothing of requests; imports Triton only when asked for operations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model_store.encoder import Encoder
from model_store.ops import Ops, TorchOps
from model_store.plan import LinearHead, Plan

WORTH = 0.95
"""Slices must take at most this share of the gathered time: they cost memory and a build."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


@dataclass(frozen=True)
class FfnCosts:
    """Seconds of one layer's feed-forward network, measured both ways."""

    gathered_s: float
    sliced_s: float

    @property
    def slices_pay(self) -> bool:
        """Whether a hot task should get slices: `Overlay.plan(encoder, sliced=...)`."""
        return self.sliced_s <= WORTH * self.gathered_s


def gpu_ops(dtype: torch.dtype, device: str = "cuda") -> Ops:
    """The fastest operations on a GPU: Triton's kernels, or plain torch where it is missing."""
    if find_spec("triton") is None:
        return TorchOps(dtype, device, shares_layers=True)
    from model_store.ops_cuda import CudaOps

    return CudaOps(dtype, device)


def measure_ffn(
    encoder: Encoder, timer: Timer, *, rows: int = 2048, tasks: int = 8, keep: float = 0.5
) -> FfnCosts:
    """Time one layer for `rows` tokens of `tasks` random tasks, gathered and sliced in turn."""
    with torch.inference_mode():
        calls = [_one_layer(encoder, rows, tasks, keep, sliced=sliced) for sliced in (False, True)]
        rounds = [[timer(call) for call in calls] for _ in range(5)]
    gathered, sliced = zip(*rounds, strict=True)
    return FfnCosts(median(gathered), median(sliced))


def warm_up(encoder: Encoder) -> None:
    """Have the kernels compiled and tuned for batches of all sizes, so that no request waits."""
    with torch.inference_mode():
        for rows in (16, 64, 256, 1024, 4096, 16384):
            for tasks in (1, 8, 64):
                if tasks <= rows:
                    _one_layer(encoder, rows, tasks, 0.5, sliced=False)()


def _one_layer(
    encoder: Encoder, rows: int, tasks: int, keep: float, *, sliced: bool
) -> Callable[[], Tensor]:
    """The first layer's network on random rows of so many random tasks."""
    config, ops = encoder.config, encoder.ops
    generator = torch.Generator().manual_seed(0)
    kept = max(1, round(keep * config.ffn))
    x = torch.randn(rows, config.hidden, generator=generator).to(ops.device, ops.dtype)
    each = rows // tasks
    ranges = [slice(task * each, (task + 1) * each) for task in range(tasks)]
    ranges[-1] = slice(ranges[-1].start, rows)
    make = encoder.ffn if sliced else encoder.ffn_beside
    lists = (torch.randperm(config.ffn, generator=generator)[:kept] for _ in range(tasks))
    head = LinearHead(torch.zeros(1, config.hidden), torch.zeros(1))
    plans = [Plan("cls", head, (make(0, neurons.sort().values),)) for neurons in lists]
    groups = ops.group(ranges, plans)
    return lambda: ops.ffn(0, x, groups)


def gpu_seconds(call: Callable[[], object]) -> float:
    """Seconds that a call keeps the current GPU busy, compiled and tuned before; a `Timer`."""
    call()
    make: Any = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    start.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 10_000
