"""Changes of what is served, each as one operation: checked, made ready on every replica, written
to the store in one step, and finished when every live replica answers accordingly.

    register   verify -> stage -> publish -> serve
    activate, roll back, canary, shadow        stage -> publish -> serve
    deactivate, delete                         publish -> drain

Nothing is active before `publish`, and `publish` is one write of the registry: whoever is killed
when, the old state or the new one stands. No HTTP, no Ray.
"""

import asyncio
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from model_store import signatures
from model_store.audit import AuditEntry
from model_store.errors import ArtifactError, ModelStoreError, NotFoundError
from model_store.store import Store, VersionInfo
from serving.board import Board, ReplicaStatus
from serving.errors import NotReadyError, ServingError
from serving.loader import Loader
from serving.metrics import Metrics
from serving.statuses import status_of
from serving.types import Caller, Operation

WITHIN_S = 60.0
"""How long all replicas together may take for one step."""

AT_ONCE = 4
"""Operations of one replica that run at once; others wait."""

logger = logging.getLogger("taskbone.lifecycle")


class Lifecycle:
    """Carries out operations, in threads of its own. Public methods are for the event loop.

    Each gives its operation as it ended, or with `wait=False` as it begins. A failed one raises
    what went wrong where it was waited for; nothing has changed then but what the error says.
    """

    def __init__(
        self,
        store: Store,
        loader: Loader,
        board: Board,
        replica_id: str,
        metrics: Metrics,
        signature_key: Path | None = None,
    ) -> None:
        self._store = store
        self._loader = loader
        self._board = board
        self._replica_id = replica_id
        self._metrics = metrics
        self._signature_key = signature_key
        self._threads = ThreadPoolExecutor(AT_ONCE, "taskbone-lifecycle")
        self._closing = threading.Event()
        # Operations under way, as far as they have come: one that fails says where.
        self._reached: dict[str, Operation] = {}

    async def register(
        self,
        task: str,
        data: bytes,
        caller: Caller,
        *,
        activate: bool = True,
        signature: bytes | None = None,
        wait: bool = True,
    ) -> Operation:
        """Take in an artifact as its task's next version, and have it answer unless told not to.

        The same bytes again make no new version. Raises `ModelStoreError`s that name what is wrong.
        """
        return await self._begin(
            _Change("register", task, caller),
            lambda operation: self._register(operation, data, signature, activate),
            wait,
        )

    async def activate(
        self, task: str, version: int, caller: Caller, *, wait: bool = True
    ) -> Operation:
        """Have a published version answer. Raises `NotFoundError` that lists what there is."""
        return await self._begin(
            _Change("activate", task, caller, version),
            lambda operation: self._switch(operation, lambda: self._store.activate(task, version)),
            wait,
        )

    async def roll_back(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        """Have the version answer that did so before. Raises `ConflictError` where none did."""

        def work(operation: Operation) -> Operation:
            record = self._store.registry().rolled_back(task).task(task)
            assert record.active is not None
            operation = dataclasses.replace(operation, version=record.active)
            return self._switch(operation, lambda: self._store.roll_back(task))

        return await self._begin(_Change("rollback", task, caller), work, wait)

    async def set_canary(
        self, task: str, version: int, percent: float, caller: Caller, *, wait: bool = True
    ) -> Operation:
        """Have a version answer `percent` of the task's requests, chosen by request id."""
        return await self._begin(
            _Change("canary", task, caller, version),
            lambda operation: self._switch(
                operation, lambda: self._store.set_canary(task, version, percent)
            ),
            wait,
        )

    async def clear_canary(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        """Have the active version answer all requests again."""
        return await self._begin(
            _Change("canary", task, caller),
            lambda operation: self._switch(operation, lambda: self._store.clear_canary(task)),
            wait,
        )

    async def set_shadow(
        self, task: str, version: int, caller: Caller, *, wait: bool = True
    ) -> Operation:
        """Have a version answer the task's requests, too, for comparison alone."""
        return await self._begin(
            _Change("shadow", task, caller, version),
            lambda operation: self._switch(
                operation, lambda: self._store.set_shadow(task, version)
            ),
            wait,
        )

    async def clear_shadow(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        """Compare no more."""
        return await self._begin(
            _Change("shadow", task, caller),
            lambda operation: self._switch(operation, lambda: self._store.clear_shadow(task)),
            wait,
        )

    async def delete(
        self, task: str, version: int | None, caller: Caller, *, wait: bool = True
    ) -> Operation:
        """Delete a version, or with None the task; ends when its last request has been answered.

        Raises `ConflictError` for the active version.
        """

        return await self._begin(
            _Change("delete", task, caller, version),
            lambda operation: self._remove(operation, lambda: self._store.delete(task, version)),
            wait,
        )

    async def deactivate(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        """Have a task answer no more, and keep its versions; ends with its last answer.

        Raises `NotFoundError` where no version is active.
        """
        return await self._begin(
            _Change("deactivate", task, caller),
            lambda operation: self._remove(operation, lambda: self._store.deactivate(task)),
            wait,
        )

    async def operation(self, operation_id: str) -> Operation:
        """An operation as it stands. Raises `NotFoundError`."""
        found = await asyncio.to_thread(self._board.operation, operation_id)
        if found is None:
            raise NotFoundError(f"no operation {operation_id[:80]!r}; old ones are forgotten")
        return found

    async def operations(self) -> list[Operation]:
        """Every known operation, oldest first."""
        return await asyncio.to_thread(self._board.operations)

    async def audit(self, limit: int) -> list[AuditEntry]:
        """The latest entries of the audit log, newest last."""
        return await asyncio.to_thread(self._store.audit, limit)

    def close(self) -> None:
        """Begin no further operation; those under way fail."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)

    # --- one operation --------------------------------------------------------------------------

    async def _begin(
        self, change: "_Change", work: Callable[[Operation], Operation], wait: bool
    ) -> Operation:
        change.caller.check(change.task)
        operation = Operation(
            id=uuid.uuid4().hex,
            kind=change.kind,
            task=change.task,
            version=change.version,
            digest=None,
            by=change.caller.name,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        loop = asyncio.get_running_loop()

        async def begin() -> None:
            # Noted before it is begun: afterwards, this would take back what it has reached.
            await asyncio.to_thread(self._put, operation)
            running = loop.run_in_executor(self._threads, self._carry_out, operation, work)
            running.add_done_callback(_swallow)

        # Whoever hangs up does not stop a change half-way.
        if wait:
            return await asyncio.shield(
                loop.run_in_executor(self._threads, self._carry_out, operation, work)
            )
        await asyncio.shield(asyncio.create_task(begin()))
        return operation

    def _carry_out(self, operation: Operation, work: Callable[[Operation], Operation]) -> Operation:
        try:
            operation = dataclasses.replace(work(operation), state="done", step="")
        except Exception as error:
            self._finish(_failed(self._reached.get(operation.id, operation), error))
            if not isinstance(error, ModelStoreError | ServingError):
                logger.exception("operation %s failed", operation.id)
            raise
        finally:
            self._reached.pop(operation.id, None)
        self._finish(operation)
        return operation

    def _finish(self, operation: Operation) -> None:
        """Let everybody know how it ended; what was done stands even if that fails."""
        try:
            self._put(operation)
            self._store.append_audit(_audit_entry(operation))
        except Exception:
            logger.exception("the end of operation %s could not be noted", operation.id)
        self._metrics.operation(operation.kind, operation.state)

    def _register(
        self, operation: Operation, data: bytes, signature: bytes | None, activate: bool
    ) -> Operation:
        operation = self._put(dataclasses.replace(operation, step="verify"))
        if self._signature_key is not None:
            signatures.verify(data, signature, self._signature_key)
        verified = self._loader.check(operation.task, data)
        operation = dataclasses.replace(operation, digest=verified.digest)
        self._loader.candidate(verified)
        number = self._store.registry().number_of(operation.task, verified.digest)
        info = self._store.publish(verified, activate=False)
        operation = dataclasses.replace(operation, version=info.version, created=number is None)
        try:
            if not activate:
                return self._stage(operation)
            return self._switch(operation, lambda: self._store.activate(info.task, info.version))
        except Exception:
            if operation.created and not self._is_active(info):
                self._store.delete(info.task, info.version)
                self._announce()
            raise

    def _is_active(self, info: VersionInfo) -> bool:
        record = self._store.registry().tasks.get(info.task)
        return record is not None and record.active == info.version

    def _switch(self, operation: Operation, publish: Callable[[], VersionInfo | None]) -> Operation:
        """Make the version ready everywhere, write the change, and see every replica follow."""
        if operation.version is not None:
            operation = self._stage(operation)
        operation = self._put(dataclasses.replace(operation, step="publish"))
        publish()
        generation = self._announce()
        return self._everywhere(
            dataclasses.replace(operation, step="serve"),
            lambda status: status.generation >= generation,
        )

    def _remove(self, operation: Operation, publish: Callable[[], None]) -> Operation:
        """Write the change, and wait for the requests that an earlier state has let in."""
        publish()
        generation = self._announce()
        return self._everywhere(
            dataclasses.replace(operation, step="drain"),
            lambda status: status.drained >= generation,
        )

    def _stage(self, operation: Operation) -> Operation:
        """Have every replica load the version and try its golden inputs."""
        assert operation.version is not None
        record = self._store.registry().version(operation.task, operation.version)
        operation = dataclasses.replace(operation, step="stage", digest=record.digest)
        return self._everywhere(operation, lambda status: operation.id in status.staged)

    def _everywhere(
        self, operation: Operation, is_done: Callable[[ReplicaStatus], bool]
    ) -> Operation:
        """Wait until every live replica has done the step; raises what one of them has found."""
        give_up_at = time.monotonic() + WITHIN_S
        seen = -1
        while True:
            members = self._board.members()
            ready = sum(map(is_done, members.values()))
            now = dataclasses.replace(operation, replicas=len(members), ready=ready)
            operation = self._put(now) if now != operation or seen == -1 else operation
            for name, status in members.items():
                if wrong := status.staged.get(operation.id):
                    raise ArtifactError(f"replica {name}: {wrong}; nothing was activated")
            if members and ready == len(members):
                return operation
            if time.monotonic() > give_up_at or self._closing.is_set():
                slow = [name for name, status in members.items() if not is_done(status)]
                raise NotReadyError(
                    f"step {operation.step!r}: ready on {ready} of {len(members)} replicas after "
                    f"{WITHIN_S:.0f} s; not on {', '.join(slow)}"
                )
            seen = self._board.changed(seen, 0.5)

    def _announce(self) -> int:
        """Have every replica look at the store now; gives the state that it must reach."""
        generation = self._store.registry().generation
        self._board.announce()
        return generation

    def _put(self, operation: Operation) -> Operation:
        if operation.state == "running":
            self._reached[operation.id] = operation
        self._board.put_operation(operation, self._replica_id)
        return operation


@dataclasses.dataclass(frozen=True)
class _Change:
    kind: str
    task: str
    caller: Caller
    version: int | None = None


def _failed(operation: Operation, error: Exception) -> Operation:
    status = status_of(error)
    message = "the server failed; its log says more" if status.hidden else str(error)
    return dataclasses.replace(operation, state="failed", error_type=status.type, error=message)


def _audit_entry(operation: Operation) -> AuditEntry:
    return AuditEntry(
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        by=operation.by,
        action=operation.kind,
        task=operation.task,
        version=operation.version,
        digest=operation.digest,
        result=operation.error_type or operation.state,
        message=operation.error,
    )


def _swallow(running: "asyncio.Future[Operation]") -> None:
    """Nobody waits: how it ended stands on the board."""
    if not running.cancelled():
        running.exception()
