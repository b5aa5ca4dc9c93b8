"""A server's private folder, its processes, its ports and signals: what must be gone at the end.

Knows nothing of Ray or HTTP. Linux only: a process whose parent died is handed to the server's main
process (it is their "subreaper"), so that at the end everything that it ever started is below it.
"""

import ctypes
import fcntl
import gc
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from model_store.durable import is_locked, locked, own_folder
from serving.errors import ConfigError

_PR_SET_CHILD_SUBREAPER = 36
_SHORT_ROOT = Path("/tmp")  # noqa: S108 - mkdtemp makes a folder below it that is ours alone
_LOCK = "lock"
_LONGEST_FOLDER = 24
"""Unix sockets lie deep below the folder, and their paths may have 97 characters in all."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can enter, with a short path; removed at the end."""
    root = Path(tempfile.gettempdir())
    if len(str(root / "taskbone-12345678" / "r")) > _LONGEST_FOLDER:
        root = _SHORT_ROOT
    folder = Path(tempfile.mkdtemp(prefix="taskbone-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hold_folder(folder: Path) -> None:
    """Make `folder` for this user alone, and keep it while one of the processes that called lives.

    Folders beside it that no process holds any more are removed.
    """
    own_folder(folder.parent)
    with locked(folder.parent / _LOCK):
        own_folder(folder)
        # The descriptor stays open, and with it the lock, until the process ends.
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)
        for other in folder.parent.iterdir():
            if other.is_dir() and not is_locked(other):
                shutil.rmtree(other, ignore_errors=True)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies."""
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"the server runs on Linux only; this is {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise ConfigError(f"prctl(PR_SET_CHILD_SUBREAPER) failed: errno {ctypes.get_errno()}")


def free_memory() -> None:
    """Give the system back what was freed: after loading, that is more than what is in use."""
    gc.collect()
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def memory_bytes() -> int:
    """The memory of this process; of pages that several processes have, its part of each."""
    with suppress(OSError):  # a kernel that does not say
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return int(psutil.Process().memory_info().rss)


def with_parent(kind: str) -> list[str]:
    """What to put before a command, so that it gets this signal when its parent dies without a
    word; nothing where the system cannot do that."""
    return ["setpriv", "--pdeathsig", kind, "--"] if shutil.which("setpriv") else []


def has_child(name: str) -> bool:
    """Whether a program whose name begins so runs below this process."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_descendants(grace_s: float) -> None:
    """End every process below this one: ask, wait `grace_s` seconds, kill until none is left."""
    descendants = psutil.Process().children(recursive=True)
    for process in descendants:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(descendants, timeout=grace_s)
    while remaining := psutil.Process().children(recursive=True):
        for process in remaining:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(remaining, timeout=1)


def check_address(host: str, port: int) -> str:
    """The host's numeric address; `ConfigError` unless it is ours and the port is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server itself does: a port in TIME_WAIT after the last server is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return str(address[0])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, or choose "
            "another with --host and --port"
        ) from error


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports on loopback that are free now.

    Below the range from which the system takes ports for outgoing connections, and starting at a
    place that differs by process, so that two servers that start at once do not meet.
    """
    blocks = [range(first, first + count) for first in range(20000, 32000 - count, count)]
    shift = os.getpid() % len(blocks)
    for block in blocks[shift:] + blocks[:shift]:
        if all(_is_free(port) for port in block):
            return block.start
    raise ConfigError(f"no {count} consecutive free ports between 20000 and 32000 on loopback")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Signals:
    """SIGINT and SIGTERM: the first raises `KeyboardInterrupt`, later ones only where allowed."""

    def __init__(self) -> None:
        self._allowed = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def install(self) -> None:
        """Take the signals; again after Ray has taken them."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._receive)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let one more signal raise inside."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def _receive(self, kind: int, frame: FrameType | None) -> None:
        if self._allowed:
            self._allowed = False
            raise KeyboardInterrupt(signal.Signals(kind).name)
