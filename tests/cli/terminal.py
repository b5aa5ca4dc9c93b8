"""The `taskbone` command in a terminal of its own, and the screen that a person would see."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A running command, and all that it has written to its terminal."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int) -> None:
        self.process = process
        self._master = master
        self._written = b""

    @property
    def raw(self) -> str:
        """With the sequences that move the cursor."""
        return self._written.decode(errors="replace")

    @property
    def text(self) -> str:
        """Without them."""
        return _CONTROL.sub("", self.raw)

    def wait_for(self, text: str, times: int = 1) -> None:
        """Read until it has been written so often."""
        deadline = time.monotonic() + PATIENCE_S
        while self.text.count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} does not come:\n{self.text}"
            assert self._read(), f"ended without {text!r}:\n{self.text}"

    def interrupt(self) -> int:
        """Press Ctrl-C, and give the exit status."""
        self.process.send_signal(signal.SIGINT)
        while self._read():
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 0.2)[0]:
            return self.process.poll() is None
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self._written += data
        return bool(data)


@contextmanager
def in_terminal(arguments: Sequence[str], columns: int = 80, lines: int = 24) -> Iterator[Terminal]:
    """Run the command in a terminal of this size; it is ended with the block."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "taskbone", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)
