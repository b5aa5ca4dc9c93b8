"""The share of its own engine's throughput that a server reaches, by the shape of its requests.

The engine alone is measured at several settings in a process of its own, beside the server that
waits; its best setting counts. Both take turns.
"""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.server_engine import in_own_process
from benchmarks.server_load import Load, measure, median
from benchmarks.server_running import Taskbone
from benchmarks.server_works import Shape
from serving.questions import questions

SHAPES = (Shape(1, 64), Shape(16, 16), Shape(32, 8), Shape(64, 4), Shape(128, 4))
TARGET = 0.85
IN_FLIGHT = (64, 256)
Setting = tuple[int, int]
"""Threads of the engine, and inputs in flight."""


def compare(
    console: Console,
    server: Taskbone,
    shapes: Sequence[Shape],
    texts: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The engine alone and every shape in turn, several rounds; shows the table."""
    threads = sorted({1, len(os.sched_getaffinity(0))})
    engine: dict[Setting, list[float]] = {key: [] for key in product(threads, IN_FLIGHT)}
    loads: dict[Shape, list[Load]] = {shape: [] for shape in shapes}
    common = ["--store", str(server.store), "--seconds", str(arguments.seconds)]
    common += ["--tasks", ",".join(server.takes_pairs)]
    common += ["--data", str(arguments.data)] if arguments.data else []
    for number in range(arguments.rounds):
        for (count, in_flight), rates in engine.items():
            with console.status(f"round {number + 1}: engine, {count} threads, {in_flight} ..."):
                more = ["--threads", str(count), "--in-flight", str(in_flight)]
                rates.append(in_own_process(common + more))
        for shape, found in loads.items():
            asked = questions(texts, server.takes_pairs, shape.inputs)
            with console.status(f"round {number + 1}: server, {shape} ..."):
                found.append(measure(server.server, asked, shape.connections, arguments.seconds))
    return report(
        {key: statistics.median(rates) for key, rates in engine.items()},
        {shape: median(found) for shape, found in loads.items()},
    )


def report(engine: Mapping[Setting, float], rows: Mapping[Shape, Load]) -> dict[str, Any]:
    """The table for people, and its figures; `engine` in sentences per second."""
    (count, in_flight), best = max(engine.items(), key=lambda item: item[1])
    title = f"Engine alone: {best:,.0f} sentences/s ({count} threads, {in_flight} in flight)"
    table = Table(title=title)
    for head in ("connections x inputs", "sentences/s", "of the engine", "p50 ms", "p99 ms"):
        table.add_column(head, justify="right")
    server: dict[str, Any] = {}
    for shape, row in rows.items():
        rate = row.requests_per_s * shape.inputs
        figures = (f"{rate:,.0f}", f"{rate / best:.2f}", f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}")
        table.add_row(str(shape), *figures)
        server[str(shape)] = row.rounded() | {"share_of_engine": round(rate / best, 3)}
    Console(width=100).print(table)
    alone = {f"{threads} threads, {many} in flight": x for (threads, many), x in engine.items()}
    return {"engine_sentences_per_s": alone, "server": server, "target": TARGET}
