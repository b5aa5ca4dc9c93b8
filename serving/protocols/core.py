"""What every protocol calls: the one service behind all routes. Knows no HTTP and no models."""

from collections.abc import Sequence
from typing import Protocol

from model_store.audit import AuditEntry
from model_store.errors import ModelStoreError
from model_store.manifest import BackboneReference
from model_store.store import VersionInfo
from serving.errors import ServingError
from serving.types import (
    PLAIN,
    Ask,
    Caller,
    NeuronMap,
    Operation,
    TaskAnswer,
    TaskInfo,
    TextInput,
)


class Lifecycle(Protocol):
    """Changes of what is served, as operations: `serving.lifecycle.Lifecycle` is the real one.

    Each gives its operation as it ended, on every live replica, or with `wait=False` as it begins.
    """

    async def register(
        self,
        task: str,
        data: bytes,
        caller: Caller,
        *,
        activate: bool = True,
        signature: bytes | None = None,
        wait: bool = True,
    ) -> Operation: ...
    async def activate(
        self, task: str, version: int, caller: Caller, *, wait: bool = True
    ) -> Operation: ...
    async def roll_back(self, task: str, caller: Caller, *, wait: bool = True) -> Operation: ...
    async def set_canary(
        self, task: str, version: int, percent: float, caller: Caller, *, wait: bool = True
    ) -> Operation: ...
    async def clear_canary(self, task: str, caller: Caller, *, wait: bool = True) -> Operation: ...
    async def set_shadow(
        self, task: str, version: int, caller: Caller, *, wait: bool = True
    ) -> Operation: ...
    async def clear_shadow(self, task: str, caller: Caller, *, wait: bool = True) -> Operation: ...
    async def delete(
        self, task: str, version: int | None, caller: Caller, *, wait: bool = True
    ) -> Operation: ...
    async def deactivate(self, task: str, caller: Caller, *, wait: bool = True) -> Operation: ...
    async def operation(self, operation_id: str, /) -> Operation: ...
    async def operations(self) -> list[Operation]: ...
    async def audit(self, limit: int) -> list[AuditEntry]: ...


class Service(Protocol):
    """What the server needs of `serving.service.Service`."""

    @property
    def lifecycle(self) -> Lifecycle: ...
    @property
    def backbone(self) -> BackboneReference: ...

    async def predict(
        self, task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN
    ) -> TaskAnswer: ...
    async def predict_many(
        self, tasks: Sequence[str], inputs: Sequence[TextInput], ask: Ask = PLAIN
    ) -> list[TaskAnswer | ServingError]:
        """The same inputs for many tasks, as one batch; one answer, or what is wrong, for each.

        Raises what concerns the call as a whole: an unknown task, too much, no room in the queue.
        """
        ...

    def tasks(self) -> list[TaskInfo]: ...
    def task(self, name: str) -> TaskInfo: ...
    def chosen(self, task: str, ask: Ask) -> int | None:
        """The version that answers such a request now; None where there is none of that number.

        Raises `UnknownTaskError`.
        """
        ...

    async def version(self, task: str, number: int) -> TaskInfo: ...
    async def neurons(self, task: str, caller: Caller) -> NeuronMap:
        """What the active version keeps, beside the other tasks that the caller's key is for."""
        ...

    async def versions(self, task: str) -> list[VersionInfo]: ...
    async def all_versions(self) -> list[VersionInfo]: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


def is_loaded(service: Service, task: str) -> bool:
    """Whether a task of this name is served, so that metrics may name it."""
    try:
        service.task(task)
    except (ServingError, ModelStoreError):
        return False
    return True
