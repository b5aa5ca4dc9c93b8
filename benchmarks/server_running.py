"""Servers in processes of their own: Taskbone with the ready-made tasks; any other by its command.

Knows how they are started, when they are ready and how they are stopped.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from examples.ready_made import prepare
from model_store.manifest import read_header
from model_store.store import Store
from serving.load import Server

TOKEN = "a-token-for-benchmarks"  # noqa: S105 - the server lives as long as the measurement


@dataclass(frozen=True)
class Taskbone:
    """A running server of ours."""

    server: Server
    store: Path
    takes_pairs: Mapping[str, bool]
    """Of every task that it serves."""


@contextmanager
def taskbone(tasks: Sequence[str] | None = None, options: Sequence[str] = ()) -> Iterator[Taskbone]:
    """Taskbone with the ready-made tasks; `takes_pairs` names `tasks` alone, or all."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        names = prepare(store)
        if unknown := set(tasks or ()) - set(names):
            raise SystemExit(f"there is no task {sorted(unknown)}; the ready-made are {names}")
        chosen = list(tasks or names)
        pairs = {name: read_header(store.read(name)[1])[0].takes_pairs for name in chosen}
        port = free_port()
        command = [sys.executable, "-m", "taskbone", "serve", "--store", folder]
        environment = {"TASKBONE_TOKEN": TOKEN}
        with running([*command, "--port", str(port), *options], port, environment):
            yield Taskbone(Server(port, TOKEN), Path(folder), pairs)


@contextmanager
def running(
    command: Sequence[str], port: int, environment: Mapping[str, str], ready: str = "/health/ready"
) -> Iterator[None]:
    """A server that answers 200 at the path `ready` once it can be asked."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            if not _becomes_ready(process, f"http://127.0.0.1:{port}{ready}"):
                log.seek(0)
                said = log.read().decode(errors="replace")[-2000:]
                raise SystemExit(f"{command[0]} ended with status {process.returncode}:\n{said}")
            yield
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _becomes_ready(process: "subprocess.Popen[bytes]", address: str) -> bool:
    """Wait until it answers; False if it ends before."""
    while process.poll() is None:
        try:
            if httpx.get(address, trust_env=False).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False
