"""What the metrics cost.

    python -m benchmarks.metrics [--data DIR] [--rounds 25] [--seconds 3]

One server with the ready-made tasks is asked as fast as it answers, in turns with its metrics on
and off. Then the time of everything that is counted for a request is measured by itself, for
batches as the server has just had them, and with what is written each second; that, over the time
that a request takes the whole server at capacity, is the share that metrics take (target: at most
0.01). The difference between on and off, in requests per second and in the replica's processor time
for each, shows that nothing was forgotten, and is only as exact as the machine is quiet. At last,
how long it takes to tell what three replicas have counted. The last line of output is one JSON
object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.metrics_server import OFF, ON
from benchmarks.server_load import Load, measure, median
from benchmarks.server_running import TOKEN, free_port, running
from benchmarks.server_works import sentences
from examples.ready_made import prepare
from model_store.manifest import read_header
from model_store.store import Store
from serving.load import Server
from serving.metrics import Metrics
from serving.processes import memory_bytes
from serving.questions import questions
from serving.stats import StatsReader
from serving.tasks import describe
from serving.types import TaskInfo, Timings

TARGET = 0.01
REPLICAS = 3
TIMES = Timings(0.4, 30.0, 45.0, 76.0)
"""Of a request at capacity, in buckets far up."""


@dataclass(frozen=True)
class Turn:
    """One measurement, and the replica's processor time for each request."""

    load: Load
    cpu_s: float


@dataclass(frozen=True)
class Batches:
    """What the server's batches had in them on the average."""

    requests: float
    tasks: float


def main() -> int:
    """The command."""
    arguments = parse()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = Store(Path(folder))
        prepare(store)
        infos = served(store)
        server = start(stack, store)
        turns = in_turns(console, server, infos, arguments)
        batches = batches_of(server)
    medians = {name: median([turn.load for turn in found]) for name, found in turns.items()}
    found = shares(infos, batches, medians["on"].requests_per_s)
    report: dict[str, Any] = {
        **{name: load.rounded() for name, load in medians.items()},
        "on_over_off": {
            "requests_per_s": compared(turns, lambda turn: turn.load.requests_per_s),
            "cpu": compared(turns, lambda turn: turn.cpu_s),
        },
        "batch": {"requests": round(batches.requests, 2), "tasks": round(batches.tasks, 2)},
        **found,
        **telling_ms(infos),
    }
    show(report)
    print(json.dumps(report | {"machine": machine.facts()}))
    return 0


def parse() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--connections", type=int, default=64)
    return parser.parse_args()


def served(store: Store) -> list[TaskInfo]:
    """The store's tasks, as a server describes them."""
    return [
        describe(read_header(data)[0], info)
        for task in sorted(store.tasks())
        for info, data in [store.read(task)]
    ]


def start(stack: ExitStack, store: Store) -> Server:
    """A server with the switch."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.metrics_server", str(store.root), str(port)]
    stack.enter_context(running(command, port, {"TASKBONE_TOKEN": TOKEN}))
    return Server(port, TOKEN)


def in_turns(
    console: Console,
    server: Server,
    infos: Sequence[TaskInfo],
    arguments: argparse.Namespace,
) -> dict[str, list[Turn]]:
    """The server's turns, by round; what comes first changes from round to round."""
    asked = questions(sentences(arguments.data), {info.task: info.takes_pairs for info in infos}, 1)
    turns: dict[str, list[Turn]] = {"on": [], "off": []}
    (replica,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "ServeReplica" in process.name()
    )
    single = next(info.task for info in infos if not info.takes_pairs)
    for number in range(-1, arguments.rounds):
        for name in sorted(turns, reverse=bool(number % 2)):
            switch(server, single, ON if name == "on" else OFF)
            with console.status(f"round {number + 1}, {name} ..."):
                before = cpu_s(replica)
                load = measure(server, asked, arguments.connections, arguments.seconds)
                spent = cpu_s(replica) - before
            if number >= 0:  # the first warms up
                requests = load.requests_per_s * arguments.seconds
                turns[name].append(Turn(load, spent / requests))
    switch(server, single, ON)
    return turns


def cpu_s(process: psutil.Process) -> float:
    """The processor time that a process has taken."""
    times = process.cpu_times()
    return float(times.user + times.system)


def switch(server: Server, task: str, text: str) -> None:
    """Turn the server's metrics on or off."""
    address = f"http://127.0.0.1:{server.port}/v1/tasks/{task}/predict"
    answer = httpx.post(
        address, headers=server.headers, json={"inputs": text}, trust_env=False, timeout=60
    )
    answer.raise_for_status()


def batches_of(server: Server) -> Batches:
    """What a server's metrics say of its batches."""
    address = f"http://127.0.0.1:{server.port}/metrics"
    text = httpx.get(address, headers=server.headers, trust_env=False).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    count = float(figures["taskbone_batch_tasks_count"])
    return Batches(
        float(figures["taskbone_batch_requests_sum"]) / count,
        float(figures["taskbone_batch_tasks_sum"]) / count,
    )


def compared(
    turns: Mapping[str, Sequence[Turn]], figure: Callable[[Turn], float]
) -> dict[str, Any]:
    """On over off, round by round."""
    ratios = [figure(on) / figure(off) for on, off in zip(turns["on"], turns["off"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def shares(infos: Sequence[TaskInfo], batches: Batches, requests_per_s: float) -> dict[str, Any]:
    """What a request's counting takes, and its share of a request's time at capacity."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = counting(infos, Path(folder))
        tasks = {info.task: 1 for info in infos[: max(1, round(batches.tasks))]}
        requests = max(1, round(batches.requests))

        def one_request() -> None:
            metrics.request(infos[0].task, infos[0].version, 200, 0.076)
            metrics.timings(infos[0].task, infos[0].version, TIMES)

        def one_batch() -> None:
            for _ in tasks:
                metrics.plan_lookup("hit")
            metrics.batch(tasks, requests, 35 * requests, 0.015)
            metrics.queued(2000)

        request_us = 1e6 * seconds_of(one_request, 20_000)
        batch_us = 1e6 * seconds_of(one_batch, 5_000)
        write_us = 1e6 * seconds_of(metrics._reporter._write, 100)
    each_us = request_us + batch_us / batches.requests + write_us / requests_per_s
    return {
        "request_us": round(request_us, 2),
        "batch_us": round(batch_us, 2),
        "write_us": round(write_us, 1),
        "write_interval_s": 1,
        "counting_us_per_request": round(each_us, 2),
        "request_at_capacity_us": round(1e6 / requests_per_s, 1),
        "share": round(each_us * requests_per_s / 1e6, 5),
        "target": TARGET,
    }


def telling_ms(infos: Sequence[TaskInfo]) -> dict[str, float]:
    """How long an answer about three replicas takes, and to measure a process's memory."""
    with tempfile.TemporaryDirectory() as folder:
        replicas = [counting(infos, Path(folder)) for _ in range(REPLICAS)]
        for metrics in replicas:
            for info in infos:
                metrics.request(info.task, info.version, 200, 0.076)
                metrics.timings(info.task, info.version, TIMES)
            metrics.total()
        asked = replicas[0]
        return {
            "metrics_ms": round(1e3 * seconds_of(asked.render, 20), 2),
            "stats_ms": round(1e3 * seconds_of(lambda: StatsReader(asked).read(), 20), 2),
            "memory_ms": round(1e3 * seconds_of(memory_bytes, 20), 2),
        }


def counting(infos: Sequence[TaskInfo], folder: Path) -> Metrics:
    """The metrics of a replica that serves these tasks."""
    metrics = Metrics(folder)
    metrics.serve(infos)
    return metrics


def seconds_of(what: Callable[[], object], times: int) -> float:
    """Of one call: the least of several rounds, which others have disturbed least."""
    return min(timeit.repeat(what, number=times, repeat=5)) / times


def show(report: dict[str, Any]) -> None:
    """The table for people."""
    table = Table(title="What the metrics cost")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for key, value in report.items():
        table.add_row(key.replace("_", " "), str(value))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
