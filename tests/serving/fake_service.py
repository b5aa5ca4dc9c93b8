"""A service without models: the label is the parity of the text's length. Its versions, canaries
and operations are kept in memory, and one replica serves them at once."""

import asyncio
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from model_store.audit import AuditEntry
from model_store.errors import ConflictError, NotFoundError
from model_store.manifest import BackboneReference
from model_store.store import VersionInfo
from serving.board import Board, ReplicaStatus
from serving.config import ServeConfig
from serving.errors import (
    DeadlineError,
    EngineError,
    InvalidInputError,
    OverloadedError,
    RateLimitedError,
    ServingError,
    TooLargeError,
    UnknownTaskError,
)
from serving.metrics import Metrics
from serving.replica import end_process
from serving.types import (
    PLAIN,
    Ask,
    Caller,
    LayerNeurons,
    NeuronMap,
    NeuronOverlap,
    Operation,
    Prediction,
    TaskAnswer,
    TaskInfo,
    TextInput,
    Timings,
)

MAX_CHARACTERS = 1000
"""Longer texts are refused where they shall not be cut."""


@dataclass
class FakeTask:
    """A task's versions and which of them answer."""

    versions: dict[int, TaskInfo] = field(default_factory=dict)
    next_version: int = 1
    active: int | None = None
    history: list[int] = field(default_factory=list)
    canary: tuple[int, float] | None = None
    shadow: int | None = None

    def activate(self, number: int) -> None:
        if self.active not in (None, number):
            assert self.active is not None
            self.history = [old for old in self.history if old != number] + [self.active]
        self.active = number


class FakeService:
    """Two tasks, `parity` on texts and `pairs` on pairs; some texts make it fail or wait."""

    def __init__(
        self,
        metrics: Metrics | None = None,
        board: Board | None = None,
        replica_id: str = "alone",
        max_inputs: int = 128,
    ) -> None:
        self.metrics = metrics
        self.backbone = BackboneReference(name="nothing", fingerprint="0" * 64)
        self.board = board
        self.replica_id = replica_id
        self.max_inputs = max_inputs
        self.healthy = True
        self.closed = False
        self.cancelled = 0
        self.waiting = asyncio.Event()
        self.asks: list[Ask] = []
        self.signatures: list[bytes | None] = []
        self._tasks: dict[str, FakeTask] = {}
        self._operations: dict[str, Operation] = {}
        self._audit: list[AuditEntry] = []
        for name, takes_pairs in {"parity": False, "pairs": True}.items():
            self._publish(name, b"", takes_pairs, activate=True)

    @property
    def lifecycle(self) -> "FakeService":
        """It changes itself."""
        return self

    # --- asking -----------------------------------------------------------------------------

    async def predict(self, task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        self.asks.append(ask)
        ask.caller.check(task)
        info = self._version(task, ask.version)
        self._check_inputs(info, inputs, ask)
        match inputs[0]:
            case "overload":
                raise OverloadedError("the queue is full", retry_after_s=7)
            case "greedy":
                raise RateLimitedError("the key has too much waiting", retry_after_s=3)
            case "late":
                raise DeadlineError("the deadline has passed")
            case "engine":
                raise EngineError("secret detail of the engine")
            case "crash":
                raise ZeroDivisionError("secret detail of the crash")
            case "members" if self.board:
                await asyncio.to_thread(self.board.report, self.replica_id, ReplicaStatus())
                members = await asyncio.to_thread(self.board.members)
                raise InvalidInputError(" ".join(members))
            case "die":
                end_process()
            case "nap":
                await asyncio.sleep(0.02)
            case "stuck":
                self.healthy = False
            case "wait":
                await self._wait()
        timings = Timings(0.1, 0.2, 0.3, 0.6)
        if self.metrics:
            self.metrics.timings(task, info.version, timings)
        predictions = tuple(_predict(text) for text in inputs)
        return TaskAnswer(task, info.version, predictions, timings, 7 * len(inputs))

    async def predict_many(
        self, tasks: Sequence[str], inputs: Sequence[TextInput], ask: Ask = PLAIN
    ) -> list[TaskAnswer | ServingError]:
        for task in tasks:
            ask.caller.check(task)
            self.task(task)
        return [await self._predict_or_error(task, inputs, ask) for task in tasks]

    async def _predict_or_error(
        self, task: str, inputs: Sequence[TextInput], ask: Ask
    ) -> TaskAnswer | ServingError:
        try:
            return await self.predict(task, inputs, ask)
        except InvalidInputError as error:
            return error

    def _check_inputs(self, info: TaskInfo, inputs: Sequence[TextInput], ask: Ask) -> None:
        if not inputs:
            raise InvalidInputError("inputs: at least one input is needed")
        if len(inputs) > self.max_inputs:
            raise TooLargeError(f"inputs: {len(inputs)} given, at most {self.max_inputs}")
        for number, text in enumerate(inputs):
            if isinstance(text, str) == info.takes_pairs:
                raise InvalidInputError(
                    f"inputs[{number}]: of the wrong kind for task {info.task!r}"
                )
            if not ask.truncate and sum(map(len, text)) > MAX_CHARACTERS:
                raise InvalidInputError(f"inputs[{number}]: too long for task {info.task!r}")

    # --- what there is ----------------------------------------------------------------------

    def tasks(self) -> list[TaskInfo]:
        return [self.task(name) for name, task in self._tasks.items() if task.active is not None]

    def task(self, name: str) -> TaskInfo:
        return self._version(name, None)

    def chosen(self, task: str, ask: Ask) -> int | None:
        self.task(task)
        versions = self._tasks[task].versions
        if ask.version is None:
            return self._tasks[task].active
        return ask.version if ask.version in versions else None

    async def version(self, task: str, number: int) -> TaskInfo:
        return self._version(task, number)

    async def neurons(self, task: str, caller: Caller) -> NeuronMap:
        info = self.task(task)
        others = [one for one in self.tasks() if one.task != task and caller.may(one.task)]
        return NeuronMap(
            info.task,
            info.version,
            info.digest,
            ffn_width=12,
            heads=2,
            layers=(LayerNeurons(3, b"\x05\x08", (0, 1)),),
            overlaps=tuple(NeuronOverlap(one.task, one.version, 3, 3, 0.8, 1.0) for one in others),
        )

    def _version(self, name: str, version: int | None) -> TaskInfo:
        task = self._tasks.get(name)
        if task is None or task.active is None:
            raise UnknownTaskError(f"no task {name[:80]!r}; tasks: {', '.join(self._tasks)}")
        number = version or task.active
        if number not in task.versions:
            raise NotFoundError(f"task {name!r} has no version {number}")
        return task.versions[number]

    async def versions(self, task: str) -> list[VersionInfo]:
        known = self._known(task)
        return [
            VersionInfo(
                task, number, info.digest, info.published_at, info.bytes, number == known.active
            )
            for number, info in sorted(known.versions.items())
        ]

    async def all_versions(self) -> list[VersionInfo]:
        known = [name for name, task in sorted(self._tasks.items()) if task.versions]
        return [info for name in known for info in await self.versions(name)]

    # --- changing it ------------------------------------------------------------------------

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
        self.signatures.append(signature)
        if not data:
            raise InvalidInputError("an empty artifact")
        info, created = self._publish(task, data, takes_pairs=False, activate=activate)
        return self._operate("register", task, caller, info, wait, created)

    async def activate(
        self, task: str, version: int, caller: Caller, *, wait: bool = True
    ) -> Operation:
        known = self._known(task, version)
        known.activate(version)
        return self._operate("activate", task, caller, known.versions[version], wait)

    async def roll_back(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        known = self._known(task)
        if not known.history:
            raise ConflictError(f"task {task!r}: no version was active before")
        known.active = known.history.pop()
        return self._operate("rollback", task, caller, known.versions[known.active], wait)

    async def set_canary(
        self, task: str, version: int, percent: float, caller: Caller, *, wait: bool = True
    ) -> Operation:
        known = self._known(task, version)
        known.canary = (version, percent)
        return self._operate("canary", task, caller, known.versions[version], wait)

    async def clear_canary(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        self._known(task).canary = None
        return self._operate("canary", task, caller, wait=wait)

    async def set_shadow(
        self, task: str, version: int, caller: Caller, *, wait: bool = True
    ) -> Operation:
        known = self._known(task, version)
        known.shadow = version
        return self._operate("shadow", task, caller, known.versions[version], wait)

    async def clear_shadow(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        self._known(task).shadow = None
        return self._operate("shadow", task, caller, wait=wait)

    async def delete(
        self, task: str, version: int | None, caller: Caller, *, wait: bool = True
    ) -> Operation:
        known = self._known(task, version)
        if version is None:
            self._tasks[task] = FakeTask(next_version=known.next_version)
            return self._operate("delete", task, caller, None, wait)
        if version == known.active:
            raise ConflictError(f"version {version} is active and is not deleted")
        info = known.versions.pop(version)
        known.history = [old for old in known.history if old != version]
        return self._operate("delete", task, caller, info, wait)

    async def deactivate(self, task: str, caller: Caller, *, wait: bool = True) -> Operation:
        known = self._known(task)
        if known.active is None:
            raise NotFoundError(f"task {task!r} has no active version")
        known.history.append(known.active)
        known.active = None
        return self._operate("deactivate", task, caller, None, wait)

    async def operation(self, operation_id: str, /) -> Operation:
        if operation_id not in self._operations:
            raise NotFoundError(f"no operation {operation_id[:80]!r}")
        # Whoever waits for it finds it done when he asks.
        return replace(self._operations[operation_id], state="done", step="serve", ready=1)

    async def operations(self) -> list[Operation]:
        return list(self._operations.values())

    async def audit(self, limit: int) -> list[AuditEntry]:
        return self._audit[-limit:]

    # --- the process ------------------------------------------------------------------------

    def check(self) -> None:
        if not self.healthy:
            raise EngineError("the engine thread is dead")

    def close(self) -> None:
        self.closed = True

    async def _wait(self) -> None:
        self.waiting.set()
        try:
            await asyncio.sleep(2)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _known(self, task: str, version: int | None = None) -> FakeTask:
        known = self._tasks.get(task)
        if known is None or not known.versions:
            raise NotFoundError(f"no task {task[:80]!r} in the store")
        if version is not None and version not in known.versions:
            raise NotFoundError(f"task {task!r} has no version {version}")
        return known

    def _publish(
        self, task: str, data: bytes, takes_pairs: bool, *, activate: bool
    ) -> tuple[TaskInfo, bool]:
        known = self._tasks.setdefault(task, FakeTask())
        digest = hashlib.sha256(data).hexdigest()
        same = [number for number, info in known.versions.items() if info.digest == digest]
        number = same[0] if same else known.next_version
        if not same:
            known.versions[number] = _describe(task, number, takes_pairs, data)
            known.next_version += 1
        if activate:
            known.activate(number)
        return known.versions[number], not same

    def _operate(
        self,
        kind: str,
        task: str,
        caller: Caller,
        info: TaskInfo | None = None,
        wait: bool = True,
        created: bool = False,
    ) -> Operation:
        operation = Operation(
            id=f"operation-{len(self._operations)}",
            kind=kind,
            task=task,
            version=info.version if info else None,
            digest=info.digest if info else None,
            by=caller.name,
            started_at="2026-01-02T03:04:05Z",
            state="done" if wait else "running",
            step="serve" if wait else "verify",
            replicas=1,
            ready=int(wait),
            created=created,
        )
        self._operations[operation.id] = operation
        self._audit.append(AuditEntry(by=caller.name, action=kind, task=task))
        return operation


def open_fake_service(
    config: ServeConfig,
    metrics: Metrics,
    board: Board | None = None,
    replica_id: str = "alone",
    weights_folder: Path | None = None,
) -> FakeService:
    """What a replica opens instead of the real service."""
    service = FakeService(metrics, board, replica_id, config.max_inputs)
    metrics.serve(service.tasks())
    metrics.backbone(service.backbone, 4096)
    metrics.build("0.0.0", "cpu", "fp32")
    return service


def _describe(name: str, version: int, takes_pairs: bool, data: bytes) -> TaskInfo:
    return TaskInfo(
        task=name,
        version=version,
        digest=hashlib.sha256(data).hexdigest(),
        description="whether the text's length is odd",
        labels=("even", "odd"),
        takes_pairs=takes_pairs,
        kept_share=0.5,
        prompt_tokens=10,
        max_tokens=128,
        bytes=len(data),
        published_at="2026-01-02T03:04:05Z",
        metrics=(),
    )


def _predict(text: TextInput) -> Prediction:
    if text == "who":
        return Prediction(str(os.getpid()), 1.0, {})
    length = len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
    odd = float(length % 2)
    return Prediction("odd" if odd else "even", 1.0, {"even": 1.0 - odd, "odd": odd})
