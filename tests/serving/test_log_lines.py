"""Lines on their way out: whole, in order, bounded, and never waited for."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serving import log_lines
from serving.log_lines import LineServer, LineWriter
from tests.waiting import wait_until


def lost(count: int) -> str:
    return f"lost {count}"


class Slow:
    """Somebody who does not read yet."""

    def __init__(self) -> None:
        self.may_read = threading.Event()
        self.reading = threading.Event()
        self.got = b""

    def write(self, data: bytes) -> None:
        self.reading.set()
        self.may_read.wait()
        self.got += data

    def lines(self) -> list[str]:
        return self.got.decode().splitlines()


def test_lines_go_out_in_order_and_together() -> None:
    writes: list[bytes] = []
    writer = LineWriter(writes.append, lost)
    for number in range(1200):
        writer.put(str, number)
    wait_until(lambda: sum(data.count(b"\n") for data in writes) == 1200)
    assert b"".join(writes).decode().split() == [str(number) for number in range(1200)]
    assert len(writes) < 100
    assert all(data.endswith(b"\n") for data in writes)


def test_who_does_not_read_loses_lines_and_holds_up_nobody() -> None:
    slow = Slow()
    writer = LineWriter(slow.write, lost)
    writer.put(str, "first")
    slow.reading.wait()
    for number in range(log_lines.MOST_WAITING + 17):
        writer.put(str, number)
    slow.may_read.set()
    wait_until(lambda: f"{log_lines.MOST_WAITING - 1}" in slow.lines())
    assert slow.lines()[:2] == ["first", "lost 17"]
    assert len(slow.lines()) == log_lines.MOST_WAITING + 2
    writer.put(str, "later")
    wait_until(lambda: slow.lines()[-1] == "later")


def test_a_line_that_cannot_be_made_and_a_reader_that_is_gone_do_no_harm() -> None:
    writes: list[bytes] = []

    def write(data: bytes) -> None:
        if not writes:
            writes.append(b"")
            raise BrokenPipeError
        writes.append(data)

    writer = LineWriter(write, lost)
    writer.put(str, "nobody hears this")
    writer.flush()
    writer.put(lambda: str(1 // 0))
    writer.put(str, "still there")
    writer.flush()
    said = b"".join(writes).decode().splitlines()
    assert said == ["a line of the log could not be made: ZeroDivisionError", "still there"]


SENDER = """
import os, sys, threading
from serving import log_lines
name = sys.argv[1]
writer = log_lines.LineWriter(log_lines.connect(os.environ[log_lines.VARIABLE]), str)
def send(number):
    for line in range(400):
        writer.put(str, f"{name}{number}:{line}:" + name * (37 * line % 9000))
threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
writer.flush()
"""


def test_lines_of_several_processes_are_never_torn(tmp_path: Path) -> None:
    """Long lines from several threads of several processes, each whole and none lost."""
    got: list[bytes] = []
    path = tmp_path / "log"
    with LineServer(path, got.append):
        senders = [
            subprocess.Popen(
                [sys.executable, "-c", SENDER, name],
                env={**os.environ, log_lines.VARIABLE: str(path)},
                cwd=Path(__file__).parents[2],
            )
            for name in "abc"
        ]
        assert [sender.wait() for sender in senders] == [0, 0, 0]
    lines = b"".join(got).decode().splitlines()
    expected = {
        f"{name}{number}:{line}:" + name * (37 * line % 9000)
        for name in "abc"
        for number in range(3)
        for line in range(400)
    }
    assert len(lines) == len(expected)
    assert set(lines) == expected


def test_the_last_line_of_who_dies_is_kept(tmp_path: Path) -> None:
    got: list[bytes] = []
    with LineServer(tmp_path / "log", got.append), socket.socket(socket.AF_UNIX) as one:
        one.connect(str(tmp_path / "log"))
        one.sendall(b"whole\nhalf of a li")
        one.close()
    assert b"".join(got) == b"whole\nhalf of a li\n"


def test_who_does_not_read_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "_FLUSH_S", 0.05)
    slow = Slow()
    with LineServer(tmp_path / "log", slow.write), socket.socket(socket.AF_UNIX) as one:
        one.connect(str(tmp_path / "log"))
        one.sendall(b"a line\n")
        slow.reading.wait()
    assert slow.got == b""
    slow.may_read.set()
    wait_until(lambda: slow.got == b"a line\n")


def test_where_nobody_takes_lines_they_go_to_the_standard_error(tmp_path: Path) -> None:
    assert log_lines.connect("") is log_lines.write_to_stderr
    assert log_lines.connect(str(tmp_path / "nobody")) is log_lines.write_to_stderr
