"""Localizes many tasks at once, as Ray tasks: on the cluster that `RAY_ADDRESS` names, else here.

Knows Ray; what a task is and how it ended is in `batch.py`. Of a Ray that is started here nothing
stays behind: no process, and no file but results and finished steps.
"""

import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from rich.console import Console

from localization.batch import Assignment, Outcome, localize_assignment
from localization.board import PAUSE_S, Board, News, Sender
from localization.errors import ConfigError
from model_store.tables import working

ADDRESS_VARIABLE = "RAY_ADDRESS"
GRACE_S = 2
"""How long Ray's processes may take to end by themselves, before they are killed."""
CONNECT_S = 10
"""How long a cluster may take to answer."""
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Near the least that Ray takes: only small records are passed around."""
_LONGEST_ROOT = 20
"""Ray's Unix sockets lie deep below its folder, and their paths may have 107 characters in all."""
_SHORT_ROOT = "/tmp"  # noqa: S108 - mkdtemp makes a folder below it that is ours alone


class Mailbox:
    """An actor: keeps what the workers say until it is taken."""

    def __init__(self) -> None:
        self._news: list[News] = []

    def put(self, news: News) -> None:
        """Leave a word."""
        self._news.append(news)

    def take(self) -> list[News]:
        """All words since the last time."""
        news, self._news = self._news, []
        return news


def localize_at_once(
    assignments: Sequence[Assignment], cpus: int, console: Console
) -> list[Outcome]:
    """Localize as Ray tasks of `cpus` CPUs each, as many at once as there is room for.

    A task takes a GPU too where its device is not `cpu` and the cluster has any. The outcomes come
    in the same order. Raises `ConfigError` where Ray cannot be used; then nothing has begun.
    Whatever ends this call, Ctrl-C too, ends the workers. Must be called in the main thread.
    """
    if not assignments:
        return []
    with _ray(cpus) as ray:
        gpus = int(assignments[0].device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)
        if not any(
            node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
            for node in ray.nodes()
            if node["Alive"]
        ):
            console.print(f"No machine of the cluster has {cpus} CPUs and {gpus} GPUs: waiting.")
        with Board(console, [assignment.task for assignment in assignments]) as board:
            return _run(ray, assignments, cpus, gpus, board)


def _run(
    ray: Any, assignments: Sequence[Assignment], cpus: int, gpus: int, board: Board
) -> list[Outcome]:
    mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
    # A task that Ray tried again would only be killed again.
    work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_work)
    pending = {
        work.options(name=f"localize {assignment.task}").remote(
            assignment, cpus, mailbox
        ): assignment
        for assignment in assignments
    }
    outcomes: dict[str, Outcome] = {}
    try:
        while pending:
            ended, _ = ray.wait(list(pending), timeout=PAUSE_S)
            with suppress(ray.exceptions.RayError):  # tasks go on where only their words are lost
                for news in ray.get(mailbox.take.remote()):
                    if news.task not in outcomes:
                        board.show(news)
            for reference in ended:
                assignment = pending.pop(reference)
                outcomes[assignment.task] = _outcome(ray, reference, assignment)
                board.end(outcomes[assignment.task])
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
    return [outcomes[assignment.task] for assignment in assignments]


def _work(assignment: Assignment, cpus: int, mailbox: Any) -> Outcome:
    """In a worker: localize with as many threads as Ray has set aside CPUs."""
    sender = Sender(assignment.task, mailbox.put.remote)
    import torch

    torch.set_num_threads(cpus)
    return localize_assignment(assignment, Console(file=StringIO()), sender)


def _outcome(ray: Any, reference: Any, assignment: Assignment) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.OutOfMemoryError:
        reason = "memory ran out, and Ray ended it; with more CPUs per task fewer run at once"
    except ray.exceptions.WorkerCrashedError:
        reason = "its process was killed or crashed; perhaps memory ran out"
    except ray.exceptions.RayError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    else:
        return outcome
    return Outcome(assignment.file, assignment.task, failure=reason)


# --- Ray ------------------------------------------------------------------------------------------


@contextmanager
def _ray(cpus: int) -> Iterator[Any]:
    """The module `ray`, ready to use; what it needs is gone at the end."""
    address = os.environ.get(ADDRESS_VARIABLE, "local")
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        with _own_ray(cpus) if address in ("", "local") else _cluster(address) as ray:
            # Ray's own handler prints a stack.
            signal.signal(signal.SIGTERM, _interrupt)
            yield ray
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(kind: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(kind).name)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """The module `ray`, joined to a cluster."""
    import ray

    host, _, port = address.rpartition(":")
    try:
        with working(f"Joining the Ray cluster {address}"):
            if port.isdecimal() and "://" not in address:
                # Ray itself would try for minutes.
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, OverflowError, ImportError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            f"{ADDRESS_VARIABLE} {address}: cannot be joined: {reason} "
            "(for a cluster with a token set RAY_AUTH_MODE=token)"
        ) from None
    try:
        yield ray
    finally:
        with _undisturbed():
            ray.shutdown()


@contextmanager
def _own_ray(cpus: int) -> Iterator[Any]:
    """The module `ray`, with a Ray of our own that ends with the block."""
    cores = len(os.sched_getaffinity(0))
    if cpus > cores:
        raise ConfigError(f"a task is to take {cpus} CPUs, and this machine has {cores}")
    os.environ.update(_environment())
    import ray

    before = set(psutil.Process().children(recursive=True))
    with _private_folder() as folder:
        try:
            with working("Starting Ray"):
                ray.init(
                    # Never a Ray that happens to run already.
                    address="local",
                    num_cpus=cores,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    # Ray opens this folder to everybody; the one around it stays ours alone.
                    _temp_dir=str(folder / "r"),
                )
            yield ray
        finally:
            with _undisturbed():
                started = set(psutil.Process().children(recursive=True)) - before
                ray.shutdown()
                _end(started)


def _environment() -> dict[str, str]:
    """What Ray reads when it is imported or started: all that it opens is for this run alone."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on loopback only
        "RAY_AUTH_MODE": "token",
        # Ray keeps the first one that it reads in a process.
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_worker_prestart": "0",
        # Ray would let every other process of the machine go first.
        "RAY_worker_niceness": "0",
    }


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder that only this user can enter, with a short path; removed at the end."""
    root = tempfile.gettempdir()
    if len(root) > _LONGEST_ROOT:
        root = _SHORT_ROOT
    with tempfile.TemporaryDirectory(
        prefix="taskbone-", dir=root, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def _end(processes: set[psutil.Process]) -> None:
    """Wait until the processes have ended; kill those that do not."""
    _, left = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM: what is cleaned away half would stay."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
