"""Measures the engine's forward on a GPU: what pruning, mixing tasks and cold tasks cost there.

    python -m benchmarks.gpu                      # all, on random weights of BERT-base's shape
    python -m benchmarks.gpu --only mixed,memory  # some
    python -m benchmarks.gpu --precision bf16 --out docs/results/gpu.json

The parts, each with its target:

    pruned    32 x 128 tokens at keep 0.5 over keep 1.0: the time against the arithmetic, within 5 %
    gather    the gathered feed-forward network against cuBLAS on slices of the same width: >= 0.8
    mixed     throughput of a batch of 64 tasks over a batch of one: >= 0.95
    memory    10,000 registered tasks beyond the backbone: <= 1 GB
    peer      against transformers with sdpa and torch.compile, padded, same sentences: >= 3 x
    hot       gathered against sliced neurons, which decides what hot tasks get: no target

Times are medians over interleaved rounds; those of whole forwards run from token numbers on the CPU
to probabilities on the CPU, packing and padding included. Sentences have the lengths of SST-2's.
Without a CUDA device it says so and ends well. The last line of output is one JSON object.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import machine
from model_store.backbone import EncoderConfig
from model_store.encoder import Encoder
from model_store.gpu import Timer, gpu_ops, gpu_seconds, measure_ffn
from model_store.ops import one_ffn
from model_store.packing import Item, pack
from model_store.plan import LinearHead, Plan
from model_store.tokenization import Encoding
from serving.questions import LENGTHS

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
BERT_BASE = EncoderConfig(
    family="bert",
    vocabulary=30522,
    hidden=768,
    embedding=768,
    layers=12,
    heads=12,
    ffn=3072,
    positions=512,
    position_offset=0,
    token_types=2,
    norm_eps=1e-12,
    activation="gelu",
    mlm_activation="gelu",
    has_mlm=False,
    tied_decoder=False,
    mask_token_id=None,
)
ROUNDS = 9
PROMPT = 10
REGISTERED = 10_000

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` is what the target is about."""

    work: str
    precision: str
    keep: float
    ours_ms: float | None
    peer: str
    peer_ms: float | None
    ratio: float
    target: str
    met: bool | None


@dataclass(frozen=True)
class Bench:
    """What is measured, and how."""

    encoder: Encoder
    precision: str
    timer: Timer  # of work on the device
    memory: Callable[[], int]  # bytes that the device holds
    rounds: int = ROUNDS


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--precision", default="fp16", choices=PRECISIONS)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        console.print("There is no CUDA device here, so nothing was measured.", style="yellow")
        print(json.dumps({"skipped": "no CUDA device"}))
        return 0
    with torch.inference_mode():
        bench = Bench(
            random_encoder(BERT_BASE, PRECISIONS[arguments.precision]),
            arguments.precision,
            gpu_seconds,
            torch.cuda.memory_allocated,
        )
        rows: list[Row] = []
        for name in chosen:
            with console.status(f"Measuring: {name} ..."):
                rows += PARTS[name](bench)
    console.print(table(rows))
    result = json.dumps({"machine": facts(), "rows": [asdict(row) for row in rows]})
    if arguments.out:
        arguments.out.write_text(result + "\n", encoding="utf-8")
    print(result)
    return 0


def pruned(bench: Bench) -> list[Row]:
    """Pruned over dense, against the ratio of their arithmetic."""
    sentences = texts([128] * 32, bench.encoder.config)
    dense, half = (make_plan(bench.encoder, 0, keep) for keep in (1.0, 0.5))
    slow, fast = times(
        bench, [lambda: answer(bench, sentences, [dense]), lambda: answer(bench, sentences, [half])]
    )
    config = bench.encoder.config
    arithmetic = flops(config, [128] * 32, 0.5) / flops(config, [128] * 32, 1.0)
    off = fast / slow / arithmetic
    return [
        _row(
            bench,
            "32 x 128 tokens, time over FLOP ratio",
            fast,
            "dense",
            slow,
            off,
            "<= 1.05",
            off <= 1.05,
        )
    ]


def gather(bench: Bench) -> list[Row]:
    """The gathered network over two dense products of the same width."""
    encoder, ops = bench.encoder, bench.encoder.ops
    rows = 4096
    x = torch.randn(rows, encoder.config.hidden).to(ops.device, ops.dtype)
    plan = make_plan(encoder, 0, 0.5)
    neurons = plan.ffn[0].neurons
    assert neurons is not None, "a plan without a list of neurons"
    group = ops.group([slice(0, rows)], [plan])
    sliced = encoder.ffn(0, neurons)
    ours, dense = (
        median(seconds)
        for seconds in interleaved(
            bench, [lambda: ops.ffn(0, x, group), lambda: one_ffn(ops, x, sliced)], bench.timer
        )
    )
    speed = dense / ours
    return [
        _row(
            bench,
            "one layer's FFN, 4,096 rows, speed",
            ours,
            "cuBLAS on slices",
            dense,
            speed,
            ">= 0.8",
            speed >= 0.8,
        )
    ]


def mixed(bench: Bench) -> list[Row]:
    """64 tasks in one batch over one task."""
    sentences = texts([128] * 64, bench.encoder.config)
    plans = [make_plan(bench.encoder, seed, 0.5) for seed in range(64)]
    many, one = times(
        bench,
        [lambda: answer(bench, sentences, plans), lambda: answer(bench, sentences, plans[:1])],
    )
    share = one / many
    return [
        _row(
            bench,
            "64 sentences of 64 tasks, throughput",
            many,
            "one task",
            one,
            share,
            ">= 0.95",
            share >= 0.95,
        )
    ]


def memory(bench: Bench, tasks: int = REGISTERED) -> list[Row]:
    """What registered tasks take on the device, with a prompt and half of the neurons each."""
    before = bench.memory()
    plans = [make_plan(bench.encoder, seed, 0.5, PROMPT) for seed in range(tasks)]
    taken = (bench.memory() - before) / 1e9
    work = f"GB for {len(plans):,} registered tasks"
    return [_row(bench, work, None, "", None, taken, "<= 1", taken <= 1)]


def peer(bench: Bench) -> list[Row]:
    """Against `transformers`, compiled, on padded batches of the same sentences."""
    from transformers import BertConfig, BertForSequenceClassification

    ops = bench.encoder.ops
    make_config: Any = BertConfig
    settings = make_config(num_labels=2, attn_implementation="sdpa")
    model: Any = BertForSequenceClassification(settings)
    model = model.eval().to(ops.device, ops.dtype)
    compiled: Any = torch.compile(model)
    plan = make_plan(bench.encoder, 0, 0.5)
    rows = []
    for count in (32, 512):
        sentences = texts(drawn_lengths(count), bench.encoder.config)

        def theirs(sentences: Sequence[Encoding] = sentences) -> Tensor:
            longest = max(len(one.token_ids) for one in sentences)
            ids = torch.zeros(len(sentences), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, one in enumerate(sentences):
                ids[row, : len(one.token_ids)] = torch.tensor(one.token_ids)
                mask[row, : len(one.token_ids)] = 1
            logits = compiled(input_ids=ids.to(ops.device), attention_mask=mask.to(ops.device))
            scores: Tensor = logits.logits.float().softmax(dim=1).cpu()
            return scores

        ours, other = times(
            bench,
            [lambda given=sentences: answer(bench, given, [plan]), theirs],  # type: ignore[misc]
        )
        gain = other / ours
        name = "transformers, sdpa, compiled"
        work = f"{count} sentences like SST-2's, throughput"
        rows.append(_row(bench, work, ours, name, other, gain, ">= 3", gain >= 3))
    return rows


def hot(bench: Bench) -> list[Row]:
    """What decides whether hot tasks get slices of their own."""
    rows = []
    for tasks in (1, 8, 64):
        costs = measure_ffn(bench.encoder, bench.timer, rows=4096, tasks=tasks)
        work = f"one layer's FFN, 4,096 rows, {tasks} tasks, time"
        share = costs.sliced_s / costs.gathered_s
        row = _row(bench, work, costs.sliced_s, "gathered", costs.gathered_s, share, "", None)
        rows.append(row)
    return rows


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "pruned": pruned,
    "gather": gather,
    "mixed": mixed,
    "memory": memory,
    "peer": peer,
    "hot": hot,
}


def _row(
    bench: Bench,
    work: str,
    ours: float | None,
    name: str,
    other: float | None,
    ratio: float,
    target: str,
    met: bool | None,
) -> Row:
    times = [None if seconds is None else round(seconds * 1e3, 3) for seconds in (ours, other)]
    return Row(work, bench.precision, 0.5, times[0], name, times[1], round(ratio, 4), target, met)


# -- What is measured -----------------------------------------------------------------------------


def random_encoder(config: EncoderConfig, dtype: torch.dtype) -> Encoder:
    """Random weights of a size at which activations stay ordinary numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.02 + float(name.endswith("norm.weight"))
        for name, shape in config.shapes().items()
    }
    return Encoder(config, tensors, gpu_ops(dtype))


def make_plan(encoder: Encoder, seed: int, keep: float, prompt: int = 0) -> Plan:
    """A cold task: random neurons by number, a prompt, a head of two classes."""
    config, ops = encoder.config, encoder.ops
    generator = torch.Generator().manual_seed(seed)
    kept = round(keep * config.ffn)
    ffn = tuple(
        encoder.ffn_beside(
            layer, torch.randperm(config.ffn, generator=generator)[:kept].sort().values
        )
        for layer in range(config.layers)
    )
    head = LinearHead(
        torch.randn(2, config.hidden, generator=generator).to(ops.device),
        torch.zeros(2, device=ops.device),
    )
    vectors = None
    if prompt:
        drawn = torch.randn(prompt, config.embedding, generator=generator) * 0.02
        vectors = drawn.to(ops.device, ops.dtype)
    return Plan("cls", head, ffn, vectors, table=ops.tabulate(ffn, None))


def texts(lengths: Sequence[int], config: EncoderConfig) -> list[Encoding]:
    """Random token numbers of these lengths."""
    source = random.Random(0)
    return [
        Encoding([source.randrange(config.vocabulary) for _ in range(length)], [0] * length, 0)
        for length in lengths
    ]


def drawn_lengths(count: int) -> list[int]:
    """Tokens a sentence, as in SST-2's test set: five for four words, and two at the ends."""
    source = random.Random(0)
    lengths = []
    for _ in range(count):
        tenth = source.randrange(len(LENGTHS) - 1)
        lengths.append(2 + round(1.25 * source.randint(LENGTHS[tenth], LENGTHS[tenth + 1])))
    return lengths


def answer(bench: Bench, sentences: Sequence[Encoding], plans: Sequence[Plan]) -> list[Tensor]:
    """Probabilities on the CPU; the sentences go to the tasks in turn."""
    items = [Item(one, number % len(plans)) for number, one in enumerate(sentences)]
    batch = pack(items, [plan.layout for plan in plans])
    logits = bench.encoder.forward(batch, plans)
    scores = torch.cat([part.softmax(dim=1) for part in logits]).cpu()
    return list(scores.split([len(part) for part in logits]))  # type: ignore[no-untyped-call]


def flops(config: EncoderConfig, lengths: Sequence[int], keep: float) -> float:
    """Arithmetic of a forward that reads the first token, the last layer trimmed to it."""
    rows, pairs, reads = sum(lengths), sum(length**2 for length in lengths), len(lengths)
    hidden, kept = config.hidden, round(keep * config.ffn)
    a_row = 2 * hidden * hidden * 2 + 4 * hidden * kept  # queries, output projection, FFN
    keys = 2 * hidden * 2 * hidden  # keys and values
    layer = rows * (a_row + keys) + 4 * pairs * hidden
    last = reads * a_row + rows * keys + 4 * rows * hidden
    return float((config.layers - 1) * layer + last)


# -- How it is measured ---------------------------------------------------------------------------


def times(bench: Bench, calls: Sequence[Call]) -> list[float]:
    """Median seconds of each call until its answer is on the CPU, in turn."""
    return [median(seconds) for seconds in interleaved(bench, calls, wall_seconds)]


def interleaved(bench: Bench, calls: Sequence[Call], timer: Timer) -> list[list[float]]:
    """Every call in every round; before them each alone until it is compiled and recorded."""
    for call in calls:
        for _ in range(3):
            call()
    rounds = [[timer(call) for call in calls] for _ in range(bench.rounds)]
    return [list(one) for one in zip(*rounds, strict=True)]


def wall_seconds(call: Call) -> float:
    """Seconds of a call that waits for its own result."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def facts() -> dict[str, str]:
    """The machine and the GPU."""
    names = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return machine.facts() | names | {"triton": version("triton")}


def table(rows: Sequence[Row]) -> Table:
    """The rows for people."""
    result = Table(title=f"BERT-base on {torch.cuda.get_device_name()}, keep 0.5")
    for heading in ("work", "precision", "ours ms", "against", "ms", "ratio", "target", "met"):
        result.add_column(heading)
    for row in rows:
        cells = [row.work, row.precision, row.ours_ms, row.peer, row.peer_ms, row.ratio, row.target]
        met = "" if row.met is None else ("yes" if row.met else "NO")
        result.add_row(*("" if cell is None else str(cell) for cell in cells), met)
    return result


if __name__ == "__main__":
    sys.exit(main())
