"""Writers and readers of one object store, in any order of their single requests, some killed.

Each actor is a thread that stops before every request until its turn comes; Hypothesis draws whose
turn it is. The numbers that bound what is kept are so small that writers are overtaken by them.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, repeat
from math import inf
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from model_store import generations, objects, uploads
from model_store.errors import ConflictError, NotFoundError, StoreError
from model_store.garbage import Rule, collect
from model_store.store import Store
from tests.model_store.example_artifacts import example_artifact

Actor = Callable[[Store], None]


class Killed(BaseException):
    """Raised in an actor at its next request when it is to end there, as a killed process does."""


class Turns:
    """Lets one of several actors go on by one request at a time."""

    def __init__(self, schedule: Iterable[tuple[int, int]]) -> None:
        """`schedule` says which of the actors goes on, and by how many requests."""
        self._schedule = chain.from_iterable(repeat(name, times) for name, times in schedule)
        self._go: dict[int, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._killed: set[int] = set()
        self._names: dict[int, int] = {}
        self._failures: list[BaseException] = []

    def step(self) -> None:
        """Wait until it is this actor's turn."""
        name = self._names.get(threading.get_ident())
        if name is None:
            return  # no actor: whoever looks before or afterwards
        self._back.release()
        self._go[name].acquire()
        if name in self._killed:
            raise Killed

    def run(self, actors: Sequence[Callable[[], None]], kill: int | None, kill_at: int) -> None:
        """Run all to their ends; one is killed when so many turns have been taken."""
        self._go = {name: threading.Semaphore(0) for name in range(len(actors))}
        threads = [
            threading.Thread(target=self._act, args=(name, actor), daemon=True)
            for name, actor in enumerate(actors)
        ]
        for thread in threads:
            thread.start()
            self._back.acquire()
        turns = 0
        while alive := [name for name, thread in enumerate(threads) if name in self._go]:
            turns += 1
            assert turns < 5000, "the actors never come to their ends"
            name = alive[next(self._schedule, turns) % len(alive)]
            if kill in alive and turns >= kill_at:
                name = kill
                self._killed.add(kill)
            self._go[name].release()
            self._back.acquire()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _act(self, name: int, actor: Callable[[], None]) -> None:
        self._names[threading.get_ident()] = name
        try:
            self.step()
            actor()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._failures.append(error)
        finally:
            del self._go[name]
            self._back.release()


class SteppedBucket:
    """The methods of `bucket.Bucket` over a dictionary, each a turn."""

    def __init__(self, there: dict[str, bytes], turns: Turns, lose_every: int) -> None:
        """Of creations, the answer of each `lose_every`-th is lost, and the request repeated."""
        self.location = "there://"
        self._there = there
        self._turns = turns
        self._lose_every = lose_every
        self._created = 0

    def names(self, folder: str) -> list[str]:
        self._turns.step()
        return sorted(name for name in self._there if name.startswith(f"{folder}/"))

    def get(self, name: str) -> bytes | None:
        self._turns.step()
        return self._there.get(name)

    def facts(self, name: str) -> tuple[int, float] | None:
        self._turns.step()
        return (len(self._there[name]), 0.0) if name in self._there else None

    def put(self, name: str, data: bytes) -> None:
        self._turns.step()
        assert name not in self._there, "a name was used twice"
        self._there[name] = data

    def create(self, name: str, data: bytes) -> bool:
        self._turns.step()
        if name in self._there:
            return False
        self._there[name] = data
        self._created += 1
        if self._created % self._lose_every:
            return True
        self._turns.step()
        return self.create(name, data)

    def upload(self, name: str, file: Path) -> None:
        self.put(name, file.read_bytes())

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._turns.step()
            self._there.pop(name, None)

    def check(self) -> None:
        self._turns.step()


def expect_unknown(error: StoreError) -> None:
    """Raise an error again, unless it says that nobody can tell what became of the change."""
    if "whether it was made cannot be told" not in str(error):
        raise error


def append(word: str, old: bytes | None) -> bytes:
    return (old or b"") + word.encode()


class World:
    """What the actors say that they have done."""

    def __init__(self) -> None:
        self.published: dict[bytes, int] = {}
        self.written: list[str] = []

    def publisher(self, name: str) -> Actor:
        def act(store: Store) -> None:
            for number in range(2):
                data = f"{name}{number}".encode()
                try:
                    info = store.publish(example_artifact(data=data), activate=number == 0)
                    self.published[data] = info.version
                except StoreError as error:
                    expect_unknown(error)

        return act

    def churner(self, store: Store) -> None:
        """Publishes the same bytes as its like, and deletes them."""
        for _ in range(2):
            try:
                info = store.publish(example_artifact("churned", b"same"), activate=False)
                assert info.digest == example_artifact(data=b"same").digest
                store.delete("churned", info.version)
            except (NotFoundError, ConflictError):
                pass
            except StoreError as error:
                expect_unknown(error)

    def writer(self, name: str) -> Actor:
        def act(store: Store) -> None:
            for number in range(2):
                word = f"{name}{number} "
                try:
                    store.change_document("words", partial(append, word))
                    self.written.append(word.strip())
                except StoreError as error:
                    expect_unknown(error)

        return act

    def collector(self, store: Store) -> None:
        """Collects all that no registry names, whether it is under way or left."""
        for _ in range(2):
            try:
                collect(store, Rule(keep=99, before=inf))
            except StoreError as error:
                expect_unknown(error)

    def reader(self, store: Store) -> None:
        for _ in range(2):
            for task in ("mood", "churned"):
                try:
                    info, data = store.read(task)
                    assert info.active
                    assert data
                except NotFoundError:
                    pass


def open_there(bucket: SteppedBucket) -> Store:
    storage = objects.ObjectStorage("there://x", Path("/nowhere"))
    storage._bucket = storage._registry._bucket = bucket  # type: ignore[assignment]
    return Store(storage)


@settings(max_examples=150, deadline=None)
@given(
    schedule=st.lists(st.tuples(st.integers(0, 99), st.integers(1, 25)), max_size=60),
    kill=st.none() | st.sampled_from((0, 1, 2, 3, 4, 5, 7)),
    kill_at=st.integers(1, 100),
    kept=st.integers(1, 4),
    grace=st.integers(1, 4),
    lose_every=st.integers(2, 9),
)
def test_nothing_is_lost_or_half_in_any_order(
    schedule: list[tuple[int, int]],
    kill: int | None,
    kill_at: int,
    kept: int,
    grace: int,
    lose_every: int,
) -> None:
    world, there, turns = World(), dict[str, bytes](), Turns(schedule)
    actors: list[Actor] = [
        *(world.publisher("a"), world.publisher("b")),
        *(world.churner, world.churner),
        *(world.writer("x"), world.writer("y")),
        *(world.reader, world.collector),
    ]
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(uploads, "GRACE", grace))
        patched.enter_context(mock.patch.object(objects, "SWEEP_EVERY", 1))
        patched.enter_context(mock.patch.object(generations, "KEPT", kept))
        for module in (generations, objects):
            patched.enter_context(mock.patch.object(module, "pause"))

        def bound(actor: Actor) -> Callable[[], None]:
            return lambda: actor(open_there(SteppedBucket(there, turns, lose_every)))

        turns.run([bound(actor) for actor in actors], kill, kill_at)
        check(world, there, open_there(SteppedBucket(there, turns, lose_every)), grace)


def check(world: World, there: dict[str, bytes], store: Store, grace: int) -> None:
    """All that was said to be done is there, once; all that is there can be read."""
    contents = {}
    for task in store.task_names():
        for info in store.versions(task):
            contents[task, info.version] = store.read(task, info.version)[1]
    for data, version in world.published.items():
        assert contents["mood", version] == data
    moods = [data for (task, _), data in contents.items() if task == "mood"]
    assert len(set(moods)) == len(moods)
    words = (store.document("words") or b"").decode().split()
    assert len(set(words)) == len(words)
    assert set(world.written) <= set(words)

    # A few changes later nothing is left of who was killed or overtaken.
    for number in range(grace + 3):
        store.publish(example_artifact("later", str(number).encode()))
    registry = store.registry()
    named = {
        f"tasks/{task}/{version.file}.safetensors"
        for task, record in registry.tasks.items()
        for version in record.versions.values()
    }
    assert {name for name in there if name.startswith("tasks/")} == named
