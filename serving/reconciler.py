"""A thread that makes the table of tasks what the store says, and tells the board how far it is.

The store is the only truth: whatever any replica or command changes there is taken up here, in the
background, and served only once it is loaded, warm and has given its golden answers. Requests never
wait for it.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator

from model_store.errors import BackboneMismatchError, StoreError
from model_store.registry import Registry, TaskRecord
from model_store.store import Store
from serving.board import Board, ReplicaStatus
from serving.loader import Loader
from serving.metrics import Metrics
from serving.tasks import LoadedVersion, ServedTask, TaskTable
from serving.types import Operation

READ_AGAIN_S = 1.0
"""How long after a version could not be read it is tried again."""

logger = logging.getLogger("taskbone.tasks")

Key = tuple[str, int]


class Reconciler:
    """Follows the store from `start` to `close`."""

    def __init__(
        self,
        store: Store,
        loader: Loader,
        table: TaskTable,
        board: Board,
        replica_id: str,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._loader = loader
        self._table = table
        self._board = board
        self._replica_id = replica_id
        self._metrics = metrics
        self._token: object = None
        self._registry = Registry()
        self._loaded: dict[Key, LoadedVersion] = {}
        self._refused: dict[Key, Exception] = {}
        self._reported: set[Key] = set()
        self._read_again_at = 0.0
        self._complaint = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskbone-tasks", daemon=True)

    def start(self) -> None:
        """Serve what the store has, then follow it. Raises `StoreError` if it cannot be read."""
        self._look()
        self._serve([])
        self._loader.settle()
        self._thread.start()

    def close(self) -> None:
        """Stop; the board knows this replica no more."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        status = ReplicaStatus()
        while not self._closing.is_set():
            try:
                count, operations = self._board.report(self._replica_id, status)
            except Exception:
                logger.exception("the board does not answer; the store is followed all the same")
                self._round([])
                self._closing.wait(READ_AGAIN_S)
                continue
            before, status = status, self._round(operations)
            if status == before:
                self._wait(count)
        try:
            self._board.leave(self._replica_id)
        except Exception:
            logger.exception("the board did not hear that this replica ends")

    def _wait(self, count: int) -> None:
        try:
            # The store itself is looked at that often where nobody has said that it changed.
            self._board.changed(count, self._store.poll_s)
        except Exception:
            logger.exception("the board does not answer")
            self._closing.wait(self._store.poll_s)

    def _round(self, operations: list[Operation]) -> ReplicaStatus:
        """Make everything as the store and the operations want it; gives how far this went."""
        staging = {
            operation.id: (operation.task, operation.version)
            for operation in operations
            if operation.step == "stage" and operation.version is not None
        }
        try:
            self._look()
            self._serve(staging.values())
            self._complaint = ""
        except Exception as error:  # noqa: BLE001 - it is reported, and the next round tries again
            # What was loaded goes on being served while someone repairs the store.
            if str(error) != self._complaint:
                self._complaint = str(error)
                log = logger.error if isinstance(error, StoreError) else logger.exception
                log("the store cannot be followed; serving what was loaded: %s", error)
        staged = {number: "" for number, key in staging.items() if key in self._loaded}
        for number, key in staging.items():
            refusal = self._refused.get(key)
            if refusal is not None and not _may_pass(refusal):
                staged[number] = str(refusal)
        self._free()
        return ReplicaStatus(self._table.generation, self._table.drained, staged)

    def _look(self) -> None:
        """Read the registry again if it has changed."""
        # The token of before the read: a change in between is then seen in the next round.
        token = self._store.state_token()
        if token != self._token:
            self._registry = self._store.registry()
            self._token = token

    def _serve(self, staging: Iterable[Key]) -> None:
        """Load what is missing, and let the table be what the registry says."""
        registry = self._registry
        parts = {key for task, record in registry.tasks.items() for key in _parts(task, record)}
        wanted = parts | {key for key in staging if _exists(registry, key)}
        read_again = bool(self._refused) and time.monotonic() >= self._read_again_at
        if read_again:
            self._refused = {
                key: error
                for key, error in self._refused.items()
                if _exists(registry, key) and not _may_pass(error)
            }
        missing = wanted - self._loaded.keys() - self._refused.keys()
        self._load(missing)
        if missing or registry.generation != self._table.generation:
            self._replace(registry)
        serving = {one.key for served in self._table.all() for one in served.versions}
        for key in self._loaded.keys() - wanted - serving:
            self._drop(self._loaded.pop(key))

    def _load(self, missing: set[Key]) -> None:
        for key, found in self._loader.load(sorted(missing)):
            if isinstance(found, LoadedVersion):
                self._loaded[key] = found
                continue
            self._refused[key] = found
            self._read_again_at = time.monotonic() + READ_AGAIN_S
            # A store may hold several backbones: others' tasks are no fault.
            if not isinstance(found, BackboneMismatchError) and key not in self._reported:
                self._reported.add(key)
                logger.error("task %s, version %d cannot be served: %s", *key, found)

    def _replace(self, registry: Registry) -> None:
        tasks: dict[str, ServedTask] = {}
        for task, record in registry.tasks.items():
            served = self._served(task, record)
            if served is not None:
                tasks[task] = served
        # Before the first request that they answer.
        self._metrics.serve([served.info for served in tasks.values()], self._failed(registry))
        self._table.replace(tasks, registry.generation)
        self._table.drop_others(lambda task, number: _exists(registry, (task, number)))

    def _failed(self, registry: Registry) -> int:
        """Tasks whose active version cannot be served here, though it is of this backbone."""
        active = [(task, record.active) for task, record in registry.tasks.items() if record.active]
        found = [self._refused[key] for key in active if key in self._refused]
        return sum(not isinstance(error, BackboneMismatchError) for error in found)

    def _served(self, task: str, record: TaskRecord) -> ServedTask | None:
        """What serves a task; where its active version cannot, the one that did before."""
        if record.active is None:
            return None
        active = self._loaded.get((task, record.active))
        if active is None:
            before = self._table.find(task)
            if before is None or not _exists(self._registry, before.active.key):
                return None
            active = before.active
        canary = record.canary and self._loaded.get((task, record.canary.version))
        shadow = None if record.shadow is None else self._loaded.get((task, record.shadow))
        percent = record.canary.percent if record.canary else 0.0
        return ServedTask(active, canary or None, percent, shadow)

    def _free(self) -> None:
        for version in self._table.take_left():
            if version.key not in self._loaded:
                self._drop(version)

    def _drop(self, version: LoadedVersion) -> None:
        digests = self._table.digests() | {one.info.digest for one in self._loaded.values()}
        if version.info.digest not in digests:
            self._loader.unload(version)


def _parts(task: str, record: TaskRecord) -> Iterator[Key]:
    """The versions that take part in answering for a task."""
    if record.active is not None:
        yield task, record.active
        if record.canary is not None:
            yield task, record.canary.version
        if record.shadow is not None:
            yield task, record.shadow


def _exists(registry: Registry, key: Key) -> bool:
    task, number = key
    record = registry.tasks.get(task)
    return record is not None and number in record.versions


def _may_pass(error: Exception) -> bool:
    """Whether the next try may go better: the disk, the network or the engine failed."""
    return isinstance(error, StoreError) or not isinstance(error, ValueError)
