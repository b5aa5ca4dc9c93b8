"""Taskbone with all its tasks against Infinity with one classifier on the same network.

Infinity runs in an environment of its own; its checkpoint is the demo backbone with a random head
of two classes, as its work does not depend on what the head says. All servers are up, and only the
one that is measured is asked. Infinity's best setting counts, for each figure its own.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.server_load import Load, measure, median
from benchmarks.server_running import Taskbone, free_port, running
from examples.ready_made import checkpoint_folder
from serving.load import Question, Server
from serving.questions import questions

CONNECTIONS = (1, 64)
SETTINGS: Mapping[str, Sequence[str]] = {
    "Infinity, compiled": (),
    "Infinity": ("--no-compile",),
    "Infinity, bf16": ("--no-compile", "--dtype", "bfloat16"),
}
"""Its default first. None has BetterTransformer, which this Infinity's own `optimum` lacks."""
REQUESTS_TARGET = 5.0
"""Least ratio of our requests per second to Infinity's at 64 connections."""
P50_TARGET = 0.2
"""Largest ratio of our p50 to Infinity's at one connection."""
_NAME = "classifier"
_OURS = "Taskbone"


def missing(python: Path | None) -> str:
    """Why there is no comparison, or an empty string."""
    if python is None:
        return "no --infinity-python was given"
    if not _command(python).exists():
        return f"{_command(python)} is missing: infinity-emb is not installed beside {python}"
    return ""


def compare(
    console: Console, server: Taskbone, texts: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """All servers in turn, several rounds; shows the table."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with console.status("Making a classifier ..."):
            write_classifier(folder)
        asked = {_OURS: (server.server, questions(texts, server.takes_pairs, 1))}
        for name, options in SETTINGS.items():
            with console.status(f"Starting {name} ..."):
                other = stack.enter_context(infinity(arguments.python, folder, options))
            asked[name] = other, classify(texts)
            measure(*asked[name], max(CONNECTIONS), 2.0)
        loads: dict[tuple[str, int], list[Load]] = {}
        for number in range(arguments.rounds):
            for name, (other, requests) in asked.items():
                for connections in CONNECTIONS:
                    with console.status(f"round {number + 1}: {name}, {connections} ..."):
                        found = measure(other, requests, connections, arguments.seconds)
                    loads.setdefault((name, connections), []).append(found)
    return report({key: median(found) for key, found in loads.items()}, len(server.takes_pairs))


def report(rows: Mapping[tuple[str, int], Load], tasks: int) -> dict[str, Any]:
    """The table for people, and its figures."""
    table = Table(title=f"Taskbone with {tasks} tasks, Infinity with one classifier")
    for head in ("server", "connections", "requests/s", "p50 ms", "p99 ms"):
        table.add_column(head, justify="left" if head == "server" else "right")
    for (name, connections), row in rows.items():
        figures = (f"{x:,.1f}" for x in (row.requests_per_s, row.p50_ms, row.p99_ms))
        table.add_row(name, str(connections), *figures)
    ours_many, ours_one = rows[_OURS, CONNECTIONS[1]], rows[_OURS, CONNECTIONS[0]]
    throughput = ours_many.requests_per_s / max(
        rows[name, CONNECTIONS[1]].requests_per_s for name in SETTINGS
    )
    latency = ours_one.p50_ms / min(rows[name, CONNECTIONS[0]].p50_ms for name in SETTINGS)
    out = Console(width=100)
    out.print(table)
    out.print(f"{CONNECTIONS[1]} connections: {throughput:.1f} times the requests/s", end="; ")
    out.print(f"one connection: {latency:.2f} of the p50")
    return {
        "loads": {f"{name}, {number}": row.rounded() for (name, number), row in rows.items()},
        "requests_ratio": round(throughput, 2),
        "requests_target": REQUESTS_TARGET,
        "p50_ratio": round(latency, 3),
        "p50_target": P50_TARGET,
    }


def classify(texts: Sequence[str]) -> list[Question]:
    """Infinity's requests, one text each."""
    bodies = ({"model": _NAME, "input": [text]} for text in texts)
    return [Question("/classify", json.dumps(body)) for body in bodies]


def write_classifier(folder: Path) -> None:
    """A checkpoint for Infinity: the demo backbone with a random head of two classes."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    backbone = str(checkpoint_folder())
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    # Infinity takes a model without names of labels for a reranker.
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"id2label": {"0": "negative", "1": "positive"}}))


@contextmanager
def infinity(python: Path, model: Path, options: Sequence[str]) -> Iterator[Server]:
    """A running Infinity with one model."""
    port = free_port()
    command = [str(_command(python)), "v2", "--model-id", str(model), "--port", str(port)]
    command += ["--served-model-name", _NAME, "--host", "127.0.0.1", "--device", "cpu"]
    command += ["--engine", "torch", "--no-bettertransformer", *options]
    environment = {
        "HF_HUB_OFFLINE": "1",
        # It would report its use to its makers.
        "DO_NOT_TRACK": "1",
        "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        # Ours; nothing of it is for another environment.
        "PYTHONPATH": "",
    }
    path = os.pathsep.join((str(python.parent), os.environ.get("PATH", "")))
    with running(command, port, environment | {"PATH": path}, "/health"):
        yield Server(port)


def _command(python: Path) -> Path:
    return python.parent / "infinity_emb"
