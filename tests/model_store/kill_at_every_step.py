"""Makes changes to copies of a store, each time killed one file operation later than before.

Run as `python -m tests.model_store.kill_at_every_step STORE FOLDER`. For each change of `CHANGES`
it copies STORE to FOLDER/<change>/1, FOLDER/<change>/2, ... and changes each in a child process
that gets SIGKILL just before its n-th operation on files, until the first child that comes to its
end; then the same for `FROM_NOTHING` in FOLDER/<change> from nothing/1, ... Prints a line of JSON
for each: its name, and the operation that every child was killed at, `end` for the last.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path

from model_store.audit import AuditEntry
from model_store.garbage import Rule, collect
from model_store.store import Store
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact

NEW_FINGERPRINT = "cd" * 32
AUDITED = (
    *("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime", "os.listdir"),
    *("os.scandir", "fcntl.flock", "shutil.rmtree", "os.link", "os.truncate", "os.chmod"),
)


def add_backbone(store: Store) -> None:
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"weights")
        (staging / "tokenizer.json").write_bytes(b"{}")
        store.add_backbone(NEW_FINGERPRINT, "new", staging)


def entry(message: str) -> AuditEntry:
    return AuditEntry(at="then", by="someone", action="activate", task="mood", message=message)


CHANGES: dict[str, Callable[[Store], object]] = {
    "publish": lambda store: store.publish(example_artifact(data=b"published")),
    "publish inactive": lambda store: store.publish(
        example_artifact("other", b"published"), activate=False
    ),
    "publish again": lambda store: store.publish(example_artifact(data=b"first")),
    "activate": lambda store: store.activate("mood", 1),
    "roll back": lambda store: store.roll_back("mood"),
    "set canary": lambda store: store.set_canary("mood", 1, 10),
    "set shadow": lambda store: store.set_shadow("mood", 3),
    "clear canary": lambda store: store.clear_canary("mood"),
    "clear shadow": lambda store: store.clear_shadow("mood"),
    "delete version": lambda store: store.delete("mood", 1),
    "delete task": lambda store: store.delete("mood"),
    "collect versions": lambda store: collect(store, Rule(keep=0, before=inf)),
    "collect backbone": lambda store: store.collect(
        lambda registry: registry.without({}, [FINGERPRINT]), inf
    ),
    "add backbone": add_backbone,
    "put document": lambda store: store.put_document("keys.json", b"new keys"),
    "append audit": lambda store: store.append_audit(entry("a new entry" * 20)),
}
FROM_NOTHING = ("publish", "publish inactive", "add backbone", "put document", "append audit")


def change_and_die(change: Callable[[Store], object], store: Store, last: int) -> None:
    """Make a change in this process, which dies before its `last`-th operation on files."""
    steps = 0
    sizes: dict[str, int] = {}

    def step(name: str, before_death: Callable[[], None] = lambda: None) -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            before_death()
            write_line(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | Path):
            path = Path(arguments[0])
            sizes[str(path)] = path.stat().st_size if path.is_file() else 0
        if event in AUDITED:
            step(event)

    def fsync(descriptor: int) -> None:
        # SIGKILL takes nothing from the disk's cache, so syncing would change nothing here but the
        # time. What a power cut does to a file is worse: half of what is new in it is not there.
        path = Path(f"/proc/self/fd/{descriptor}").readlink()

        def cut() -> None:
            if path.is_file():
                old = sizes[str(path)]
                os.truncate(path, old + (path.stat().st_size - old) // 2)

        step("write", cut)
        step("fsync")

    # The store passes descriptors alone, never objects that have one.
    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    change(store)


def kill_at_every_step(change: Callable[[Store], object], prepared: Path, folder: Path) -> None:
    """Make the change in copies of a store in `folder` until one comes through."""
    number, ended = 0, False
    folder.mkdir()
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


def main(prepared: Path, folder: Path) -> None:
    for name, change in CHANGES.items():
        write_line(f"# {name}")
        kill_at_every_step(change, prepared, folder / name)
    for name in FROM_NOTHING:
        write_line(f"# {name} from nothing")
        kill_at_every_step(CHANGES[name], Path("/nowhere"), folder / f"{name} from nothing")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
