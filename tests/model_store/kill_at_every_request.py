"""Makes changes to copies of a store in an object store, each killed one request later than before.

Run as `python -m tests.model_store.kill_at_every_request TARGET CACHE`, where copies of
one store are at TARGET-<change>-1, TARGET-<change>-2, ... For each change of `CHANGES` it
changes one copy after another in a child process that gets SIGKILL just before its n-th request,
until the first child that comes to its end. Prints as `kill_at_every_step` does.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path

from model_store.bucket import Bucket
from model_store.store import Store, open_store
from tests.model_store.kill_at_every_step import CHANGES as ALL
from tests.model_store.kill_at_every_step import write_line

CHANGES = {
    name: ALL[name]
    for name in (
        *("publish", "roll back", "delete task", "add backbone"),
        *("put document", "append audit", "collect backbone"),
    )
}


def collect_uploads(store: Store) -> None:
    """Collect a version, and what somebody has left who was killed earlier."""
    Bucket(store.location).put(f"tasks/mood/{1:010}-{'0' * 32}.safetensors", b"left")
    store.collect(lambda registry: registry.without({"mood": [1]}), inf)


CHANGES["collect uploads"] = collect_uploads
MOST = 20
"""Requests that a change may take."""
REQUESTS = (
    *("names", "folders", "get", "get_all", "put", "create", "upload", "download"),
    "facts",
)


def change_and_die(change: Callable[[Store], object], store: Store, last: int) -> None:
    """Make a change in this process, which dies before its `last`-th request."""
    steps = 0

    def step(name: str) -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            write_line(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name: str) -> Callable[..., object]:
        plain: Callable[..., object] = getattr(Bucket, name)

        def call(*arguments: object) -> object:
            step(name)
            return plain(*arguments)

        return call

    for name in REQUESTS:
        setattr(Bucket, name, counted(name))
    remove = Bucket.remove

    def remove_each(bucket: Bucket, names: Iterable[str]) -> None:
        for each in names:
            step("remove")
            remove(bucket, [each])

    Bucket.remove = remove_each  # type: ignore[method-assign, assignment]
    change(store)


def main(target: str, cache: Path) -> None:
    import s3fs  # noqa: F401 - once for all children

    for name, change in CHANGES.items():
        write_line(f"# {name}")
        for number in range(1, MOST + 1):
            # No connection is opened in this process, because a child could not use it.
            child = os.fork()
            if child == 0:
                location = f"{target}-{name.replace(' ', '-')}-{number}"
                change_and_die(change, open_store(location, cache), number)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, status
        else:
            raise AssertionError(f"{name}: {MOST} requests were not enough")
        write_line("end")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
