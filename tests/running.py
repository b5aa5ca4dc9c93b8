"""A server in a process of its own: start it, ask it, stop it, and see what it leaves behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

TOKEN = "a-token-for-the-tests"
ADMIN_TOKEN = "an-admin-token-for-the-tests"
KEYS = {"TASKBONE_TOKEN": TOKEN, "TASKBONE_ADMIN_TOKEN": ADMIN_TOKEN}
PATIENCE_S = 300
"""After which a server that does not come up, or does not end, fails the test."""


@dataclass(frozen=True)
class Server:
    """A running server, and where its output goes."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    host: str = "127.0.0.1"

    @property
    def address(self) -> str:
        """The URL's beginning."""
        return f"http://{self.host}:{self.port}"

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(encoding="utf-8")

    @property
    def folder(self) -> Path:
        """Its private folder."""
        line = " ".join(" ".join(process.cmdline()) for process in self.descendants())
        found = re.search(r"(/\S+?/taskbone-[^/\s]+)/", line)
        assert found, f"no private folder in {line}"
        return Path(found[1])

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request over a connection of its own, with the token unless headers are given."""
        headers = request.pop("headers", {"authorization": f"Bearer {TOKEN}"})
        return httpx.request(
            method,
            self.address + path,
            headers=headers,
            timeout=60,
            trust_env=False,
            **request,
        )

    def admin(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request with the key that may change what is served."""
        headers = {"authorization": f"Bearer {ADMIN_TOKEN}"} | request.pop("headers", {})
        return self.ask(method, path, headers=headers, **request)

    def predict(self, task: str, inputs: object) -> httpx.Response:
        """One predict request."""
        return self.ask("POST", f"/v1/tasks/{task}/predict", json={"inputs": inputs})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of `/metrics` that have these labels, whatever others they have.

        What other replicas than the one that is asked have counted may be missing for a second.
        """
        text = self.ask("GET", "/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def descendants(self) -> list[psutil.Process]:
        """Every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        """The processes that answer requests."""
        return [one for one in self.descendants() if "ServeReplica" in _name_if_running(one)]

    def stop(self, *signals: int) -> list[str]:
        """Send the signals, wait for the end, and give the names of processes that are left."""
        before = self.descendants()
        assert before, "the server has no processes"
        for kind in signals:
            self.process.send_signal(kind)
            time.sleep(0.3)
        self.process.wait(PATIENCE_S)
        return [name for process in before if (name := _name_if_running(process))]


def _name_if_running(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return process.name()
    return ""


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    ready: str = "Taskbone answers at",
    host: str = "127.0.0.1",
    program: Sequence[str] = (sys.executable,),
) -> Iterator[Server]:
    """Start a server that is told its port by the command; wait until it prints `ready`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*program, *command],
            env={**os.environ, **KEYS, **(environment or {})},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, port, log, host)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while ready not in server.output:
            assert process.poll() is None, f"the server ended:\n{server.output}"
            assert time.monotonic() < deadline, f"the server does not answer:\n{server.output}"
            time.sleep(0.1)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE_S)
