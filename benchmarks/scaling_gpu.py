"""Scenarios on GPUs, computed and not measured: what the model of `scaling_costs` gives for assumed
hardware. What is assumed stands in this file, and in every report beside the figures.
"""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.scaling_costs import BatchCost, Replica, RequestCost, Work, capacity

KEEP = 0.5
PROMPT_TOKENS = 10
TOKENS = 35.0
EFFICIENCY = 0.35
"""Of the peak, that the products of a forward reach."""
LAUNCH_S = 5e-6
KERNELS_A_LAYER = 12
"""Whose launches no batch is quicker than."""
BATCH_TOKENS = 16_384
BYTES = 2
"""Of a weight."""
GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """As its maker's data sheet has it."""

    name: str
    peak: float
    """Operations a second in bf16, dense."""
    bandwidth: float
    """Bytes a second."""
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Shape:
    """An encoder's."""

    name: str
    layers: int
    hidden: int
    ffn: int
    vocabulary: int

    @property
    def backbone_bytes(self) -> int:
        """Of all weights."""
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.ffn
        return BYTES * (self.layers * layer + self.vocabulary * self.hidden)

    @property
    def token_operations(self) -> float:
        """Of one token through the layers with the kept neurons; attention's scores are left out,
        which are few for short texts."""
        layer = 4 * self.hidden**2 + 2 * self.hidden * KEEP * self.ffn
        return 2.0 * self.layers * layer

    @property
    def task_bytes(self) -> int:
        """Of the kept neurons' weights in all layers, that a batch reads for each of its tasks."""
        return round(BYTES * self.layers * 2 * self.hidden * KEEP * self.ffn)

    @property
    def overlay_bytes(self) -> int:
        """Of a task that is loaded: numbers of its neurons, prompt, head of two classes."""
        return round(2 * self.layers * KEEP * self.ffn + 4 * (PROMPT_TOKENS + 2) * self.hidden)


GPUS = (
    Gpu("L4", 121e12, 0.30e12, 24 * GIB),
    Gpu("A100 80 GB", 312e12, 2.04e12, 80 * GIB),
    Gpu("H100 SXM", 989e12, 3.35e12, 80 * GIB),
)
SHAPES = (
    Shape("MiniLM-L6", 6, 384, 1536, 30_522),
    Shape("BERT-base", 12, 768, 3072, 30_522),
    Shape("XLM-R-large", 24, 1024, 4096, 250_002),
)


def batch_cost(gpu: Gpu, shape: Shape) -> BatchCost:
    """From peak, bandwidth and launches: neurons are gathered for every task of every batch, so no
    task is colder than another."""
    task_s = shape.task_bytes / gpu.bandwidth
    return BatchCost(
        fixed_s=LAUNCH_S * KERNELS_A_LAYER * shape.layers,
        token_s=shape.token_operations / (EFFICIENCY * gpu.peak),
        warm_task_s=task_s,
        cold_task_s=task_s,
    )


def scenarios(around: RequestCost, tasks: int, skew: float, gpus: int) -> list[dict[str, Any]]:
    """Every shape on every GPU, one replica each: what the GPU could do, what its replica's event
    loop lets through with one input a request and with 64, and what so many GPUs answer."""
    found = []
    for shape in SHAPES:
        for gpu in GPUS:
            cost = batch_cost(gpu, shape)
            replica = Replica(BATCH_TOKENS, warm=tasks, threads=1)
            # 64 inputs of one request are of one task, which makes batches cheaper.
            alone, alone_64, single, many = (
                capacity(cost, given, Work(tasks, skew, TOKENS, inputs), replica)
                for given, inputs in (
                    (RequestCost(0.0), 1), (RequestCost(0.0), 64), (around, 1), (around, 64),
                )
            )  # fmt: skip
            found.append(
                {
                    "backbone": shape.name,
                    "gpu": gpu.name,
                    "gpu_us_a_sequence": round(1e6 / alone.requests_per_s, 2),
                    "sequences_per_s": round(alone.requests_per_s),
                    "through_loop_per_s": round(single.requests_per_s),
                    "through_loop_64_per_s": round(64 * many.requests_per_s),
                    "gpu_used": round(many.requests_per_s / alone_64.requests_per_s, 4),
                    "all_gpus_per_s": round(64 * many.requests_per_s * gpus),
                    "memory_share": round(
                        (shape.backbone_bytes + tasks * shape.overlay_bytes) / gpu.memory, 4
                    ),
                    "batch": {key: value for key, value in asdict(cost).items() if value},
                }
            )
    return found


def assumptions() -> dict[str, Any]:
    """All that no measurement stands behind."""
    return {
        "gpus": [asdict(gpu) for gpu in GPUS],
        "shapes": [asdict(shape) for shape in SHAPES],
        "efficiency": EFFICIENCY,
        "launch_us": 1e6 * LAUNCH_S,
        "kernels_a_layer": KERNELS_A_LAYER,
        "batch_tokens": BATCH_TOKENS,
        "tokens": TOKENS,
        "keep": KEEP,
    }
