"""Makes one change to copies of a store, each time killed one file operation later than before.

Run as `python -m tests.model_store.kill_at_every_step CHANGE STORE FOLDER`: copies STORE to
FOLDER/1, FOLDER/2, ... and changes each in a child process that gets SIGKILL just before its n-th
operation on files; stops after the first child that comes to its end. Prints, one line each, the
operation that every child was killed at, and `end` for the last.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from model_store.store import Store
from tests.model_store.example_artifacts import example_artifact

NEW_FINGERPRINT = "cd" * 32
AUDITED = (
    *("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "os.listdir"),
    *("os.scandir", "fcntl.flock", "shutil.rmtree"),
)


def add_backbone(store: Store) -> None:
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"weights")
        (staging / "tokenizer.json").write_bytes(b"{}")
        store.add_backbone(NEW_FINGERPRINT, "new", staging)


CHANGES: dict[str, Callable[[Store], object]] = {
    "publish": lambda store: store.publish(example_artifact(data=b"published")),
    "publish inactive": lambda store: store.publish(
        example_artifact("other", b"published"), activate=False
    ),
    "activate": lambda store: store.activate("mood", 1),
    "roll back": lambda store: store.roll_back("mood"),
    "delete version": lambda store: store.delete("mood", 1),
    "delete task": lambda store: store.delete("mood"),
    "add backbone": add_backbone,
}


def change_and_die(change: str, store: Store, last: int) -> None:
    """Make a change in this process, which dies before its `last`-th operation on files."""
    steps = 0

    def step(name: str, before_death: Callable[[], None] = lambda: None) -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            before_death()
            write_line(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in AUDITED:
            step(event)

    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        def cut() -> None:
            if os.path.isfile(f"/proc/self/fd/{descriptor}"):  # noqa: PTH113 - Path would resolve it
                os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)

        step("write", cut)
        step("fsync")
        plain_fsync(descriptor)

    # The store passes descriptors alone, never objects that have one.
    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    CHANGES[change](store)


def main(change: str, prepared: Path, folder: Path) -> None:
    number, ended = 0, False
    while not ended:
        number += 1
        assert number < 1000, "the change never comes to its end"
        copy = folder / str(number)
        if prepared.exists():
            shutil.copytree(prepared, copy)
        child = os.fork()
        if child == 0:
            change_and_die(change, Store(copy), number)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        ended = status == 0
        assert ended or os.WTERMSIG(status) == signal.SIGKILL, status
    write_line("end")


def write_line(line: str) -> None:
    """Print past Python's buffer, which dies with the process."""
    os.write(1, f"{line}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
