"""Times contestants against one another, and the machine's own ceiling of matrix products.

Contestants take turns, so that whatever slows the machine down meets all of them.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import psutil
import torch

from benchmarks.engine_isa import has_int8

QUICK_S = 0.05
"""A turn repeats calls that are quicker than this, for about as long, and takes their median."""
PAUSE_S = 0.01
"""Before each turn: threads of the turn before may still be spinning."""
WARM_UPS = 2
GEMM_SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048), (4096, 1024, 4096))
"""Rows, inputs and outputs of the matrix products whose best is the ceiling."""

Call = Callable[[int], object]
"""Answers batch number i."""


class Others:
    """How much of the processor other programs take: beside them no figure is worth much."""

    def __init__(self) -> None:
        self._began = self._used()

    def share(self) -> float:
        """Of all cores' time since the start, what neither we nor idling took."""
        busy, own, every = (now - then for now, then in zip(self._used(), self._began, strict=True))
        return max(0.0, busy - own) / every if every else 0.0

    @staticmethod
    def _used() -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        return every - idle, own.user + own.system, every


def interleaved(
    contestants: Mapping[str, Call],
    batches: int,
    rounds: int,
    turn_done: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; round r asks everyone for batch r % `batches`."""
    for call in contestants.values():
        for number in range(WARM_UPS * batches):
            call(number % batches)
    names = list(contestants)
    result: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)  # nobody always runs after the same other
            for name in names[first:] + names[:first]:
                time.sleep(PAUSE_S)
                result[name].append(turn(contestants[name], number % batches))
                turn_done()
    finally:
        gc.enable()
    return result


def turn(call: Call, batch: int) -> float:
    """Seconds of one call, or the median of several quick ones after the first."""
    seconds = _seconds(call, batch)
    if seconds >= QUICK_S:
        return seconds
    return statistics.median(
        _seconds(call, batch) for _ in range(min(50, 1 + round(QUICK_S / seconds)))
    )


def _seconds(call: Call, batch: int) -> float:
    begun = time.perf_counter()
    call(batch)
    return time.perf_counter() - begun


def gemm_ceilings(repeats: int = 10) -> dict[str, float]:
    """Billions of operations per second of the best matrix product of torch, by precision."""
    makers = {"fp32": _fp32_product, "bf16": _bf16_product}
    if has_int8():
        makers["int8"] = _int8_product
    result = {}
    for precision, maker in makers.items():
        best = 0.0
        for rows, inputs, outputs in GEMM_SHAPES:
            product = maker(rows, inputs, outputs)
            product()
            times = []
            for _ in range(repeats):
                begun = time.perf_counter()
                product()
                times.append(time.perf_counter() - begun)
            best = max(best, 2 * rows * inputs * outputs / statistics.median(times) / 1e9)
        result[precision] = best
    return result


def _fp32_product(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return lambda: torch.nn.functional.linear(x, weight)


def _bf16_product(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _int8_product(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    # Signed activations would take a reference path, a thousand times slower.
    x = torch.randint(0, 255, (rows, inputs), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, inputs])
    scales, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)
    return lambda: torch.ops.onednn.qlinear_pointwise(
        x, 0.02, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
