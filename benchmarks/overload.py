"""What a server does with ten times as much as it can do.

    python -m benchmarks.overload --data DIR [--inputs 128] [--seconds 30] [--times 10]

Measures the capacity with a closed loop, then sends at a constant rate of ten times that, whatever
is answered, then measures the closed loop again at once. Same client, same requests, one run: the
share of the capacity that is still answered once the queue is full (goodput, target at least 0.95),
whether everything else is 429 or 503 with Retry-After, how long accepted requests took at most, and
whether the server is at once what it was before.

The client has the same cores as the server, and a request that is turned away costs both of them
something. With many inputs a request (`--inputs`) ten times the capacity is few requests, and that
cost is small; with one it is most of what the machine does. The last line of output is one JSON
object.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.server import warm_up
from benchmarks.server_running import Taskbone, taskbone
from benchmarks.server_works import sentences
from serving.config import ServeConfig
from serving.load import LOST, Client, Outcome, as_bytes, at_rate, closed
from serving.questions import questions

GOODPUT_TARGET = 0.95
REFUSALS = (429, 503)
IN_FLIGHT = 256
"""Inputs under way in the closed loop."""


@dataclass(frozen=True)
class Run:
    """The three phases: outcomes, and when each began and ended."""

    before: Sequence[Outcome]
    during: Sequence[Outcome]
    after: Sequence[Outcome]
    seconds: float
    """Of each of the closed loops."""
    overload_s: float
    client_s: float
    """Processor time that the client took from the server during the overload."""


def main() -> int:
    """The command."""
    arguments = parse()
    console = Console(stderr=True)
    texts = sentences(arguments.data)
    with taskbone(arguments.tasks, arguments.serve.split()) as server:
        warm_up(server, texts)
        with console.status(f"{arguments.times:g} times the capacity ..."):
            run = asyncio.run(measure(server, texts, arguments))
    found = figures(run)
    show(found, arguments)
    print(json.dumps(found | {"inputs": arguments.inputs, "machine": machine.facts()}))
    return 0


def parse() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), help="names, separated by commas; else all"
    )
    parser.add_argument("--inputs", type=int, default=128, help="of one request")
    parser.add_argument("--times", type=float, default=10.0, help="the capacity")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the overload")
    parser.add_argument("--capacity-seconds", type=float, default=15.0, help="of each closed loop")
    parser.add_argument("--serve", default="", help="further options of taskbone serve")
    return parser.parse_args()


async def measure(server: Taskbone, texts: Sequence[str], arguments: argparse.Namespace) -> Run:
    """The three phases, one right after the other."""
    asked = questions(texts, server.takes_pairs, arguments.inputs)
    requests = itertools.cycle([as_bytes(server.server, question) for question in asked])
    at_once = max(2, IN_FLIGHT // arguments.inputs)
    client = Client(server.server)
    seconds = arguments.capacity_seconds
    before: list[Outcome] = []
    during: list[Outcome] = []
    after: list[Outcome] = []
    await closed(client, requests, at_once, seconds, before.append)
    rate = arguments.times * capacity_of(before, seconds)
    took = time.process_time()
    await at_rate(client, requests, rate, arguments.seconds, during.append)
    took = time.process_time() - took
    await closed(client, requests, at_once, seconds, after.append)
    client.close()
    return Run(before, during, after, seconds, arguments.seconds, took)


def capacity_of(outcomes: Sequence[Outcome], seconds: float) -> float:
    """Requests answered per second of a closed loop. Raises `SystemExit` where one was not."""
    if wrong := {one.status for one in outcomes} - {200}:
        raise SystemExit(f"the closed loop got {sorted(wrong)}: it should not overload the server")
    start = min(one.due for one in outcomes)
    return answered_per_s(outcomes, start, start + seconds)


def answered_per_s(outcomes: Sequence[Outcome], start: float, end: float) -> float:
    """Answers of status 200 that came between two moments, per second."""
    count = sum(one.status == 200 and start <= one.ended < end for one in outcomes)
    return count / (end - start)


def figures(run: Run) -> dict[str, Any]:
    """What a report says of a run."""
    capacity = capacity_of(run.before, run.seconds)
    start = min(one.due for one in run.during)
    bound_ms = ServeConfig.model_fields["max_queue_ms"].default
    # As long as the queue fills, work is begun of which no answer comes yet.
    filled = start + bound_ms / 1000
    goodput = answered_per_s(run.during, filled, start + run.overload_s)
    recovered_from = min(one.due for one in run.after)
    recovered = answered_per_s(run.after, recovered_from, recovered_from + run.seconds)
    accepted = [one for one in run.during if one.status == 200]
    refused = [one for one in run.during if one.status in REFUSALS]
    forward_ms = max(json.loads(one.body)["timings_ms"]["forward_ms"] for one in accepted)
    latencies = statistics.quantiles((1000 * one.latency_s for one in accepted), n=100)
    return {
        "capacity_per_s": round(capacity, 2),
        "offered_per_s": round(len(run.during) / run.overload_s, 2),
        "goodput_per_s": round(goodput, 2),
        "goodput_share": round(goodput / capacity, 3),
        "goodput_target": GOODPUT_TARGET,
        "client_share_of_cores": round(run.client_s / (run.overload_s * (os.cpu_count() or 1)), 3),
        "statuses": {str(key): n for key, n in Counter(x.status for x in run.during).items()},
        "lost": sum(one.status == LOST for one in run.during),
        "refused_without_retry_after": sum(one.retry_after is None for one in refused),
        "refused_p99_ms": round(percentile([x.latency_s for x in refused], 99), 1),
        "accepted_p50_ms": round(latencies[49], 1),
        "accepted_p99_ms": round(latencies[98], 1),
        "bound_ms": round(bound_ms + forward_ms, 1),
        "after_share": round(recovered / capacity, 3),
        "after_refused": sum(one.status != 200 for one in run.after),
        "first_answer_after_ms": round(1000 * first_answer_s(run), 1),
    }


def first_answer_s(run: Run) -> float:
    """From the end of the overload to the first answer to a request that was sent after it."""
    start = min(one.due for one in run.after)
    return min(one.ended for one in run.after if one.status == 200) - start


def percentile(seconds: Sequence[float], percent: int) -> float:
    """In milliseconds; 0 of nothing."""
    if len(seconds) < 2:
        return 0.0
    return 1000 * statistics.quantiles(seconds, n=100)[percent - 1]


def show(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table for people."""
    table = Table(title=f"{arguments.times:g} times the capacity, {arguments.inputs} inputs each")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for key, value in found.items():
        table.add_row(key.replace("_", " "), str(value))
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
