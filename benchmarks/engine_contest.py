"""Ours against the peers on one work: every precision by itself, everyone in turn.

Also what the benchmark was asked for (`Settings`). Knows no command line and no tables.
"""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from benchmarks import engine_peers
from benchmarks.engine_exports import steps_to_make
from benchmarks.engine_models import Model, random_overlay, useful_operations
from benchmarks.engine_ours import Ours
from benchmarks.engine_peers import Peer
from benchmarks.engine_report import Row, row
from benchmarks.engine_timing import Call, interleaved
from benchmarks.engine_works import (
    KEEPS,
    PRECISIONS,
    WORKS,
    Sentences,
    Work,
    batches,
    sentence_sets,
    sentences_of,
)
from model_store.native_weights import Precision

ALONE = ("tasks16", "zipf", "sst2", "memory")
"""Parts without peers."""
BATCHES = 4
CALIBRATION = 128


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    data: Path
    work: Path
    rounds: int = 16
    seed: int = 0
    threads: int = 1
    parts: tuple[str, ...] = (*(work.name for work in WORKS), *ALONE)
    precisions: tuple[Precision, ...] = PRECISIONS
    peers: tuple[str, ...] = tuple(dict.fromkeys(name for name, _ in engine_peers.PEERS))


@dataclass
class Report:
    """What has been measured so far."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""


def measure(
    work: Work,
    model: Model,
    lengths: dict[str, list[int]],
    settings: Settings,
    report: Report,
    progress: Progress,
) -> None:
    """One work in every precision: rows, and what was left out."""
    config = model.config
    limits = config.vocabulary, config.max_tokens
    asked = batches(work, lengths, BATCHES, *limits, settings.seed)
    calibration = calibration_sentences(lengths, *limits, settings.seed)
    folder = settings.work / model.name / model.backbone.fingerprint[:12]
    make_files(model, folder, calibration, settings, progress)
    padding = statistics.mean(float(batch.mask.size / batch.mask.sum()) for batch in asked)
    gflop = {
        keep: statistics.mean(useful_operations(config, batch.lengths, keep) for batch in asked)
        / 1e9
        for keep in KEEPS
    }
    for precision in settings.precisions:
        ours: dict[float, Ours] = {}
        for keep in KEEPS:
            ours[keep] = Ours(model.backbone, precision, [random_overlay(model, 0, keep)])
            _answer_one_task(ours[keep], asked, 0)
            ours[keep].settle()

        def start(name: str, precision: str = precision) -> Peer:
            progress.console.print(f"{work.name} {precision}: starting {name}", style="dim")
            return engine_peers.start(
                name, precision, model, folder, settings.threads, calibration, asked
            )

        peers = start_peers(work, precision, settings, report, start)
        seconds = contest(
            f"turns of {work.name} {precision}", ours, peers, asked, settings, progress
        )
        for keep in KEEPS:
            for name, peer in peers.items():
                mine = seconds.get(f"ours {keep}")
                entry = row(work.name, precision, keep, mine, name, seconds[name])
                entry |= {"mode": peer.mode, "padding": round(padding, 3)}
                entry["useful_gflop"] = round(gflop[keep], 6)
                if keep == 1.0 and keep in ours:
                    entry["difference"] = round(difference(ours[keep], peer, asked[0]), 5)
                report.rows.append(entry)
        for engine in ours.values():
            engine.close()


def start_peers(
    work: Work,
    precision: str,
    settings: Settings,
    report: Report,
    start: Callable[[str], Peer],
) -> dict[str, Peer]:
    """The peers of this precision that there are; the others are told of in the report."""
    peers = {}
    for name, its_precision in engine_peers.PEERS:
        if its_precision != precision or name not in settings.peers:
            continue
        if missing := engine_peers.missing_packages(name, precision):
            report.left_out[f"{name} {precision}"] = f"not installed: {', '.join(missing)}"
            continue
        try:
            peers[name] = start(name)
        except Exception as error:  # noqa: BLE001 # whatever fails in there, the others go on
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            report.left_out[f"{name} {precision}, {work.name}"] = f"it failed: {reason}"
    return peers


def contest(
    title: str,
    ours: Mapping[float, Ours],
    peers: Mapping[str, Peer],
    asked: Sequence[Sentences],
    settings: Settings,
    progress: Progress,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round: peers by name, ours as `ours KEEP`."""
    contestants: dict[str, Call] = {
        f"ours {keep}": partial(_answer_one_task, engine, asked) for keep, engine in ours.items()
    }
    for name, peer in peers.items():
        contestants[name] = partial(_answer_padded, peer, asked)
    if not contestants:
        return {}
    bar = progress.add_task(title, total=settings.rounds * len(contestants))
    return interleaved(contestants, len(asked), settings.rounds, lambda: progress.advance(bar))


def _answer_one_task(ours: Ours, asked: Sequence[Sentences], number: int) -> Tensor:
    return ours.answer(asked[number].encodings, [0] * len(asked[number].encodings))


def _answer_padded(peer: Peer, asked: Sequence[Sentences], number: int) -> NDArray[np.float32]:
    return peer.answer(asked[number])


def difference(ours: Ours, peer: Peer, batch: Sentences) -> float:
    """The largest difference between our probabilities and the peer's: it runs the same network."""
    theirs = torch.from_numpy(peer.answer(batch)).float().softmax(dim=1)
    mine = ours.answer(batch.encodings, [0] * len(batch.encodings))
    return float((mine.float() - theirs).abs().max())


def calibration_sentences(
    lengths: dict[str, list[int]], vocabulary: int, longest: int, seed: int
) -> list[Sentences]:
    """Single sentences of all lengths that there are, for a quantization that looks at them."""
    generator = random.Random(seed)
    every = [length for counts in sentence_sets(lengths).values() for length in counts]
    return [
        sentences_of([min(length, longest)], vocabulary, generator)
        for length in generator.sample(every, min(CALIBRATION, len(every)))
    ]


def make_files(
    model: Model,
    folder: Path,
    calibration: Sequence[Sentences],
    settings: Settings,
    progress: Progress,
) -> None:
    """Have the peers' files made that are not in `folder` yet."""
    wanted = {"onnxruntime": {"onnx", "onnxruntime"}, "openvino": {"openvino", "nncf"}}
    packages = engine_peers.installed() & {
        package for name in settings.peers for package in wanted.get(name, ())
    }
    steps = steps_to_make(model, folder, packages, calibration)
    bar = progress.add_task(f"files of {model.name}", total=len(steps))
    for what, make in steps:
        progress.update(bar, description=f"files of {model.name}: {what}")
        make()
        progress.advance(bar)
