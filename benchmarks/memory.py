"""Measures the memory of two replicas that share the backbone's weights, and of two that do not.

    python -m benchmarks.memory

MiniLM-L6 with the ready-made tasks, and BERT-base's shape with two tasks drawn by chance. The
replicas answer some requests for each task first. USS is what a process has for itself, PSS adds
its part of what it shares. The last line of output is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import machine
from benchmarks.random_tasks import random_store
from benchmarks.server_running import TOKEN, free_port, running
from examples.ready_made import prepare
from model_store.manifest import read_header
from model_store.store import Store
from serving import private_ray, replica
from serving.config import MIB, ServeConfig

REPLICAS = 2
REQUESTS = 40
"""Of each task, so that every replica answers for it."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", nargs=3, metavar=("STORE", "PORT", "KIND"))
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "ready-made")
        prepare(store)
        report["minilm-l6"] = compare(store)
        report["bert-base"] = compare(random_store(Path(folder), "bert-base", 2))
    print(json.dumps(report | {"machine": machine.facts()}))


def compare(store: Store) -> dict[str, Any]:
    """MiB of each kind, each kind in a server of its own."""
    found = {kind: measure(store, kind) for kind in ("private", "shared")}
    for kind, figures in found.items():
        print(kind, figures, file=sys.stderr)
    return found


def serve(store: str, port: str, kind: str) -> None:
    """The server that is measured."""

    def open_private(config: Any, metrics: Any, board: Any, replica_id: str, _: Any) -> Any:
        return replica.open_service(config, metrics, board, replica_id, None)

    chosen = replica.open_service if kind == "shared" else open_private
    private_ray.run(ServeConfig.of(store=Path(store), port=int(port), replicas=REPLICAS), chosen)


def measure(store: Store, kind: str) -> dict[str, list[int]]:
    """MiB of each replica, after it has answered for every task."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.memory", "--serve", str(store.root)]
    with running([*command, str(port), kind], port, {"TASKBONE_TOKEN": TOKEN}):
        ask(store, port)
        # Plans become warm behind the answers.
        time.sleep(5)
        ask(store, port)
        children = psutil.Process(os.getpid()).children(recursive=True)
        replicas = [one for one in children if one.name().startswith("ray::ServeRep")]
        assert len(replicas) == REPLICAS, children
        found = [one.memory_full_info() for one in replicas]
    return {name: [getattr(info, name) // MIB for info in found] for name in ("rss", "pss", "uss")}


def ask(store: Store, port: int) -> None:
    """Some requests of each task."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(headers=headers, trust_env=False, timeout=60) as client:
        for task in store.task_names():
            manifest, _ = read_header(store.read(task)[1])
            text = ["a text", "another"] if manifest.takes_pairs else "a text"
            path = f"http://127.0.0.1:{port}/v1/tasks/{task}/predict"
            for _ in range(REQUESTS):
                client.post(path, json={"inputs": [text]}).raise_for_status()


if __name__ == "__main__":
    main()
