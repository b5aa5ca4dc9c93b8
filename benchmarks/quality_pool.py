"""Runs commands, several at once, each with one thread; what fails is told at the end.

Knows processes and clocks; nothing of what the commands compute. Each is a fresh interpreter, so
that one that dies takes nothing with it. Whatever ends `run`, Ctrl-C too, ends the commands.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAUSE_S = 0.1
GRACE_S = 3.0
"""How long a command may take to end when asked, before it is killed."""

SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""One thread; and what a command says is in its log in the order in which it was said."""


@dataclass(frozen=True)
class Work:
    """One command: arguments for the Python interpreter."""

    name: str
    arguments: tuple[str, ...]
    after: str | None = None
    """Work that must have ended before, well or badly, where it is among those to run."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: the last line of its log as the error, empty where it did well."""

    name: str
    seconds: float
    error: str = ""


@dataclass
class _Running:
    work: Work
    process: "subprocess.Popen[bytes]"
    log: Path
    started: float


Tell = Callable[[Sequence[str], Ended | None], None]
"""Called with the names of what runs, and what has just ended; often."""


def run(works: Sequence[Work], jobs: int, logs: Path, tell: Tell) -> list[Ended]:
    """Run all, `jobs` at once, in order as far as `Work.after` lets them; gives how each ended.

    What a command says goes into `logs`; the logs of those that did well are removed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, ended = list(works), list[_Running](), list[Ended]()
    try:
        while waiting or running:
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                ended.append(_ended(one))
                tell([other.work.name for other in running], ended[-1])
            open_names = {work.name for work in waiting} | {one.work.name for one in running}
            ready = [work for work in waiting if work.after not in open_names]
            assert ready or running or not waiting, "work waits for itself"
            for work in ready[: max(0, jobs - len(running))]:
                waiting.remove(work)
                running.append(_start(work, logs))
            tell([one.work.name for one in running], None)
            time.sleep(PAUSE_S)
    finally:
        _stop(running)
    return ended


def _start(work: Work, logs: Path) -> _Running:
    log = logs / f"{work.name}.log"
    environment: Mapping[str, str] = os.environ | SETTINGS
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *work.arguments],
            cwd=ROOT,
            env=environment,
            # It stays open as long as this process lives; see `quality_worker`.
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return _Running(work, process, log, time.monotonic())


def _ended(one: _Running) -> Ended:
    status, seconds = one.process.returncode, time.monotonic() - one.started
    assert one.process.stdin is not None, "it was opened"
    one.process.stdin.close()
    if status == 0:
        one.log.unlink(missing_ok=True)
        return Ended(one.work.name, seconds)
    lines = [line for line in one.log.read_text(errors="replace").splitlines() if line.strip()]
    reason = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
    return Ended(one.work.name, seconds, lines[-1].strip() if lines and status > 0 else reason)


def _stop(running: Sequence[_Running]) -> None:
    """End what runs; whoever asks twice does not wait."""
    try:
        for one in running:
            one.process.terminate()
        deadline = time.monotonic() + GRACE_S
        for one in running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
            if one.process.stdin is not None:
                one.process.stdin.close()
