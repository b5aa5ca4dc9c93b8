"""Lines on their way out of a process: gathered, written by a thread of their own, never torn.

Knows bytes, a descriptor and a socket; nothing of what a line says. The replicas of a machine send
their lines to the process that started them, which writes each as it came: there is no file that
could grow. Whoever is too slow to read loses lines, which are counted, and holds up nobody.
"""

import logging
import os
import socket
import socketserver
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "TASKBONE_LOG_SOCKET"
"""Where processes below `taskbone serve` and `taskbone node` find whoever writes their lines."""

MOST_WAITING = 20_000
"""Lines that wait to be written; beyond them, new ones are lost."""
MOST_AT_ONCE = 500
GATHER_S = 0.05
"""Lines of so long a moment are written together."""
LAST_S = 4 * GATHER_S
"""After so long, what a process has logged has left it, unless the machine is very busy."""
_FLUSH_S = 2.0
"""How long a process that ends waits for its last lines to go out."""
_STDERR = 2

Write = Callable[[bytes], None]
"""Takes whole lines. May wait; raises `OSError` where nobody takes them any more."""


class LineWriter:
    """Lines that wait, and the thread that writes them."""

    def __init__(self, write: Write, lost: Callable[[int], str]) -> None:
        """`lost` gives the line that says how many lines were lost."""
        self._write = write
        self._lost_line = lost
        self._lost = 0
        self._waiting: deque[tuple[Callable[..., str], tuple[Any, ...]]] = deque()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._woken = False
        threading.Thread(target=self._run, name="taskbone-log", daemon=True).start()

    def put(self, render: Callable[..., str], *arguments: Any) -> None:
        """Have a line written soon, rendered then. Costs next to nothing and never waits."""
        if len(self._waiting) >= MOST_WAITING:
            self._lost += 1
            return
        self._waiting.append((render, arguments))
        if not self._woken:
            self._woken = True
            self._wake.set()

    def flush(self) -> None:
        """Write what waits now; gives up where the thread waits for a slow reader."""
        if self._writing.acquire(timeout=_FLUSH_S):
            try:
                self._drain()
            finally:
                self._writing.release()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(GATHER_S)
            self._wake.clear()
            # Whoever puts a line from here on wakes this thread again.
            self._woken = False
            with self._writing:
                self._drain()

    def _drain(self) -> None:
        while self._waiting or self._lost:
            lines = []
            if self._lost:
                lost, self._lost = self._lost, 0
                lines.append(self._lost_line(lost))
            while self._waiting and len(lines) < MOST_AT_ONCE:
                render, arguments = self._waiting.popleft()
                lines.append(_rendered(render, arguments))
            with suppress(OSError):  # nobody reads any more
                self._write("".join(f"{line}\n" for line in lines).encode(errors="replace"))


def _rendered(render: Callable[..., str], arguments: tuple[Any, ...]) -> str:
    try:
        return render(*arguments)
    except Exception as error:  # noqa: BLE001 - one bad line must not end the thread
        return f"a line of the log could not be made: {type(error).__name__}"


class LineHandler(logging.Handler):
    """Passes what is logged to a `LineWriter`, formatted where the request is still known."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Format a record and have it written."""
        try:
            self.writer.put(str, self.format(record))
        except Exception:  # noqa: BLE001 - as every handler: the line is lost, and no more
            self.handleError(record)

    def flush(self) -> None:
        """Write what waits."""
        self.writer.flush()


_stderr_lock = threading.Lock()


def write_to_stderr(data: bytes) -> None:
    """Whole lines to the standard error, past what others have made of `sys.stderr`."""
    left = memoryview(data)
    with _stderr_lock:
        while left:
            left = left[os.write(_STDERR, left) :]


def connect(path: str) -> Write:
    """A way to the process that takes lines at this socket; else to the standard error."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(path)
    except OSError:
        line.close()
        return write_to_stderr
    return line.sendall


class LineServer:
    """Takes lines of other processes of this user, and writes each whole. A context manager."""

    def __init__(self, path: Path, write: Write = write_to_stderr) -> None:
        """`path`: where the socket will be; others are let in or not by the folder's rights."""
        self._server = _Server(str(path), _Connection)
        self._server.write = write

    def __enter__(self) -> "LineServer":
        threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.2},
            name="taskbone-log-server",
            daemon=True,
        ).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Returns when all who send have ended and their last lines are written, or, where nobody
        reads what is written, soon."""
        self._server.shutdown()
        # Those who came while that was noticed.
        self._server.timeout = 0
        for _ in range(self._server.request_queue_size):
            self._server.handle_request()
        self._server.server_close()
        deadline = time.monotonic() + _FLUSH_S
        for thread in self._server.threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 64
    write: Write

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.threads: list[threading.Thread] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Read from whoever has come in a thread that keeps no process from ending."""
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        self.threads.append(thread)
        thread.start()


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        rest = b""
        with suppress(OSError):
            while part := self.request.recv(65536):
                lines, newline, rest = (rest + part).rpartition(b"\n")
                if newline:
                    self.server.write(lines + newline)
            if rest:
                self.server.write(rest + b"\n")
