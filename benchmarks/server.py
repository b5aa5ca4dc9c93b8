"""Measures a whole server over HTTP: requests per second and latency; alone, or against others.

    python -m benchmarks.server --connections 1,64,8x32 [--data DIR] [--seconds 10] [--rounds 3]
    python -m benchmarks.server --against engine --data DIR
    python -m benchmarks.server --against infinity --infinity-python ENV/bin/python --data DIR

Starts `taskbone serve` with the ready-made tasks on a free port and asks all of them in turn, one
sentence a request (8x32: 8 connections, 32 sentences a request), over kept-alive connections that
each wait for their answer. Sentences have the lengths of SST-2's test sentences: with --data they
are those sentences, without it they are made of common words. The client is `wrk` where it is
installed, else Python in this process; it runs on the same cores as the server, and its work is in
the figures. Whatever is compared takes turns in one run: medians over the rounds. The last line of
output is one JSON object.

`--against engine`: the share of its own engine's throughput that the server reaches, the engine
alone being asked with texts that were encoded before (see `benchmarks.server_engine`).
`--against infinity`: Infinity's server with one classifier on the same network, in an environment
of its own: pip install torch "infinity-emb[server,torch]==0.0.77" "transformers<5" "click<8.2"
"typer<0.13".
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine, server_infinity, server_ratio
from benchmarks.server_load import Load, client, measure, median
from benchmarks.server_running import Taskbone, taskbone
from benchmarks.server_works import Shape, sentences
from serving.questions import questions

WARM_UP_S = 5.0


def main() -> int:
    """The command."""
    arguments = parse()
    console = Console(stderr=True)
    console.print(f"client: {client()}")
    if arguments.against == "infinity" and (missing := server_infinity.missing(arguments.python)):
        console.print(f"skipped: {missing}", markup=False)
        print(json.dumps({"skipped": missing}))
        return 0
    texts = sentences(arguments.data)
    options = arguments.serve.split()
    report: dict[str, Any]
    with taskbone(arguments.tasks, options) as server:
        shapes = arguments.connections or server_ratio.SHAPES
        warm_up(server, texts)
        if arguments.against == "engine":
            report = server_ratio.compare(console, server, shapes, texts, arguments)
        elif arguments.against == "infinity":
            report = server_infinity.compare(console, server, texts, arguments)
        else:
            report = alone(console, server, arguments.connections or DEFAULT, texts, arguments)
        report |= {"tasks": list(server.takes_pairs)}
    print(json.dumps(report | {"client": client(), "machine": machine.facts()}))
    return 0


DEFAULT = (Shape(1, 1), Shape(1, 64))


def parse() -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", choices=("engine", "infinity"))
    parser.add_argument(
        "--connections",
        type=lambda text: tuple(map(Shape.parse, text.split(","))),
        help="numbers, or connections times inputs as in 8x32, separated by commas",
    )
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), help="names, separated by commas; else all"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--serve", default="", help="further options of taskbone serve")
    parser.add_argument(
        "--infinity-python",
        dest="python",
        type=Path,
        help="interpreter of the environment that Infinity is installed in",
    )
    return parser.parse_args()


def warm_up(server: Taskbone, texts: Sequence[str]) -> None:
    """Until every task's plan has been asked for, and made warm."""
    measure(server.server, questions(texts, server.takes_pairs, 1), 16, WARM_UP_S)


def alone(
    console: Console,
    server: Taskbone,
    shapes: Sequence[Shape],
    texts: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Every shape in turn, several rounds."""
    loads: dict[Shape, list[Load]] = {shape: [] for shape in shapes}
    for number in range(arguments.rounds):
        for shape, found in loads.items():
            asked = questions(texts, server.takes_pairs, shape.inputs)
            with console.status(f"round {number + 1}: {shape}, {arguments.seconds:.0f} s ..."):
                found.append(measure(server.server, asked, shape.connections, arguments.seconds))
    rows = {shape: median(found) for shape, found in loads.items()}
    table = Table(title=f"One server, {os.cpu_count()} cores, client on the same machine")
    for head in ("connections x inputs", "requests/s", "sentences/s", "p50 ms", "p99 ms"):
        table.add_column(head, justify="right")
    for shape, row in rows.items():
        sentences_per_s = row.requests_per_s * shape.inputs
        figures = (row.requests_per_s, sentences_per_s, row.p50_ms, row.p99_ms)
        table.add_row(str(shape), *(f"{figure:,.1f}" for figure in figures))
    Console(width=100).print(table)
    return {str(shape): row.rounded() for shape, row in rows.items()}


if __name__ == "__main__":
    sys.exit(main())
