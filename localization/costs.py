"""What neurons and heads cost: a linear model of the forward's time, measured on this machine.

The forward of a batch of the task's own rows is timed on the operations that serve, with the whole
network, with half of its neurons, and with half of its heads. Knows nothing of scores.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from localization.selection import Costs, Kept
from model_store.encoder import Encoder
from model_store.packing import Item, pack
from model_store.plan import LinearHead, Plan
from model_store.tokenization import Encoding

ROWS = 32
"""Sequences of the batch that is timed: what a busy server has waiting."""

ROUNDS = 15


def measure_costs(encoder: Encoder, encodings: Sequence[Encoding]) -> Costs:
    """Seconds for `ROWS` rows without a prompt; the networks take turns, medians count."""
    config = encoder.config
    neurons = torch.arange(config.ffn, dtype=torch.int32)
    heads = torch.arange(config.heads, dtype=torch.int32)
    half_neurons, half_heads = neurons[: config.ffn // 2], heads[: config.heads // 2]
    layers = config.layers
    networks = {
        "whole": Kept((neurons,) * layers, (heads,) * layers),
        "neurons": Kept((half_neurons,) * layers, (heads,) * layers),
        "heads": Kept((neurons,) * layers, (half_heads,) * layers),
    }
    rows = [encodings[index % len(encodings)] for index in range(ROWS)]
    seconds = time_forwards(
        encoder, {name: plan_of(encoder, kept) for name, kept in networks.items()}, rows
    )
    neuron = (seconds["whole"] - seconds["neurons"]) / (layers * (config.ffn - len(half_neurons)))
    head = (seconds["whole"] - seconds["heads"]) / (layers * (config.heads - len(half_heads)))
    # Noise must not make a unit free; a thousandth of the whole is below anything real.
    least = seconds["whole"] / 1000 / layers
    neuron, head = max(neuron, least / config.ffn), max(head, least / config.heads)
    fixed = seconds["whole"] - layers * (config.ffn * neuron + config.heads * head)
    return Costs(max(0.0, fixed), neuron, head)


def speedup(encoder: Encoder, kept: Kept, encodings: Sequence[Encoding]) -> float:
    """How many times as fast as the whole network what is kept answers `ROWS` rows."""
    config = encoder.config
    whole = Kept((torch.arange(config.ffn, dtype=torch.int32),) * config.layers)
    rows = [encodings[index % len(encodings)] for index in range(ROWS)]
    plans = {"whole": plan_of(encoder, whole), "kept": plan_of(encoder, kept)}
    seconds = time_forwards(encoder, plans, rows)
    return seconds["whole"] / seconds["kept"]


def plan_of(encoder: Encoder, kept: Kept) -> Plan:
    """A plan of what is kept with an empty head, for timing."""
    hidden = encoder.config.hidden
    head = LinearHead(torch.zeros(2, hidden), torch.zeros(2))
    device = encoder.ops.device
    head = LinearHead(head.weight.to(device), head.bias.to(device))
    layers = None
    if kept.heads is not None:
        layers = tuple(encoder.layer(number, rows) for number, rows in enumerate(kept.heads))
    ffn = tuple(encoder.ffn(number, rows) for number, rows in enumerate(kept.neurons))
    return Plan("mean", head, ffn, layers=layers)


def time_forwards(
    encoder: Encoder, plans: dict[str, Plan], encodings: Sequence[Encoding], rounds: int = ROUNDS
) -> dict[str, float]:
    """Median seconds of one forward of `encodings` through each plan, in turns."""
    batches = {
        name: pack([Item(encoding, 0) for encoding in encodings], [plan.layout])
        for name, plan in plans.items()
    }

    def forward(name: str) -> Callable[[], object]:
        return lambda: encoder.forward(batches[name], [plans[name]])

    return time_in_turns({name: forward(name) for name in plans}, encoder.ops.device, rounds)


def time_in_turns(
    works: dict[str, Callable[[], object]], device: str, rounds: int
) -> dict[str, float]:
    """Median seconds of each work; they take turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    # In a single thread the processor's time is what counts, whatever else the machine does.
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    with torch.inference_mode():
        for number in range(rounds + 2):
            for name, work in works.items():
                started = clock()
                work()
                if device == "cuda":
                    torch.cuda.synchronize()
                if number >= 2:  # the first ones compile kernels
                    times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}
