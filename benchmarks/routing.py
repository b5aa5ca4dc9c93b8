"""Measures whether requests of a task should prefer the replicas whose plans for it are warm.

    python -m benchmarks.routing [--tasks 1000] [--rounds 5] [--seconds 20] [--cache-mib 300]

Three replicas on MiniLM-L6 with tasks drawn by chance, asked by Zipf's law, with room for the plans
of some of them. HAProxy sends a request to the replica with the fewest under way, or to the one
that its path's hash names, unless that has more than 1.5 times its share. Both servers run all the
time and are asked in turns; medians over the rounds. The last line of output is one JSON object.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.random_tasks import random_store
from benchmarks.server_load import Load, measure, median
from benchmarks.server_running import TOKEN, free_port, running
from benchmarks.server_works import sentences
from serving.config import MIB
from serving.load import Question, Server

REPLICAS = 3
QUESTIONS = 20_000
ALGORITHM = "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"
ROUTINGS: Mapping[str, str] = {
    "fewest under way": "leastconn",
    "path's hash, bounded": "uri path-only\n    hash-type consistent\n    hash-balance-factor 150",
}


def main() -> None:
    """The command."""
    arguments = parse()
    loads: dict[str, list[Load]] = {name: [] for name in ROUTINGS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = random_store(Path(folder), "minilm-l6", arguments.tasks)
        asked = questions(arguments.tasks)
        servers = {}
        for name, algorithm in ROUTINGS.items():
            port = free_port()
            command = [sys.executable, "-m", "taskbone", "serve", "--store", str(store.root)]
            options = [
                *("--port", str(port), "--replicas", str(REPLICAS)),
                *("--plan-cache-bytes", str(arguments.cache_mib * MIB)),
            ]
            environment = {"TASKBONE_TOKEN": TOKEN, ALGORITHM: algorithm}
            stack.enter_context(running([*command, *options], port, environment))
            servers[name] = Server(port, TOKEN)
        for number in range(-1, arguments.rounds):
            for name, server in servers.items():
                load = measure(server, asked, arguments.connections, arguments.seconds)
                if number >= 0:  # the first warms up
                    loads[name].append(load)
    report: dict[str, Any] = {name: median(found).rounded() for name, found in loads.items()}
    print(json.dumps(report | {"settings": vars(arguments), "machine": machine.facts()}))


def parse() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--cache-mib", type=int, default=300)
    return parser.parse_args()


def questions(tasks: int) -> list[Question]:
    """One sentence each, to tasks by Zipf's law."""
    generator = random.Random(0)
    texts = sentences(None)
    weights = [1 / (rank + 1) for rank in range(tasks)]
    drawn = generator.choices(range(tasks), weights, k=QUESTIONS)
    return [
        Question(
            f"/v1/tasks/task-{task}/predict", json.dumps({"inputs": texts[number % len(texts)]})
        )
        for number, task in enumerate(drawn)
    ]


if __name__ == "__main__":
    main()
