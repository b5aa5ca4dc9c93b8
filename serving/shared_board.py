"""One board for all replicas of a server: the Ray actor that holds it, and how a replica asks it.

Knows Ray; nothing of what stands on the board, which is an object of `serving/board.py`. The actor
is found by its name, and made by whichever replica comes first. One that died comes back empty and
is filled by the next reports; one that nobody calls any more ends itself.
"""

import asyncio
import os
import time
from contextlib import suppress
from typing import Any, Protocol

from serving.board import Board, ReplicaStatus
from serving.errors import BoardError
from serving.types import Operation

NAME = "board"
PATIENCE_S = 10.0
"""How long one call may take before the board counts as out of reach."""
_START_S = 60.0
_IDLE_S = 120.0
_PAUSE_S = 0.1
_MOST_CALLS = 10_000


class Call(Protocol):
    """Calls a method of the board, wherever it is. Raises `BoardError` after `timeout_s`."""

    def __call__(self, method: str, *given: Any, timeout_s: float = PATIENCE_S) -> Any: ...


class RayBoard(Board):
    """The board as a replica sees it, for any thread but the event loop's.

    Each method raises `BoardError` where the board cannot be reached in time. What was sent may
    then have arrived or not: all of it may be sent again.
    """

    def __init__(self, call: Call) -> None:
        # Not the parent's: this one holds nothing itself.
        self._call = call

    def report(self, replica_id: str, status: ReplicaStatus) -> tuple[int, list[Operation]]:
        answer: tuple[int, list[Operation]] = self._call("report", replica_id, status)
        return answer

    def leave(self, replica_id: str) -> None:
        self._call("leave", replica_id)

    def members(self) -> dict[str, ReplicaStatus]:
        answer: dict[str, ReplicaStatus] = self._call("members")
        return answer

    def put_operation(self, operation: Operation, owner: str) -> None:
        self._call("put_operation", operation, owner)

    def operation(self, operation_id: str) -> Operation | None:
        answer: Operation | None = self._call("operation", operation_id)
        return answer

    def operations(self) -> list[Operation]:
        answer: list[Operation] = self._call("operations")
        return answer

    def changed(self, since: int, timeout_s: float) -> int:
        answer: int = self._call("changed", since, timeout_s, timeout_s=timeout_s + PATIENCE_S)
        return answer

    def announce(self) -> None:
        self._call("announce")


class BoardHost:
    """The actor. All calls run on one event loop, one after the other, but those that wait."""

    def __init__(self, idle_s: float = _IDLE_S) -> None:
        self._board = Board()
        self._idle_s = idle_s
        self._called_at = time.monotonic()
        self._called = asyncio.Condition()
        self._ending = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def call(self, method: str, given: tuple[Any, ...]) -> Any:
        """Call a method of the board."""
        self._called_at = time.monotonic()
        if method == "changed":
            return await self._changed(*given)
        answer = getattr(self._board, method)(*given)
        async with self._called:
            self._called.notify_all()
        return answer

    async def process(self) -> int:
        """The actor's process."""
        return os.getpid()

    async def _changed(self, since: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        async with self._called:
            while True:
                number: int = self._board.changed(since, 0.0)
                left = deadline - time.monotonic()
                if number != since or left <= 0:
                    return number
                try:
                    await asyncio.wait_for(self._called.wait(), left)
                except TimeoutError:
                    return number

    async def _end_when_idle(self) -> None:
        import ray

        while (left := self._called_at + self._idle_s - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        # Without this it would outlive an application that was taken out of a shared Ray.
        ray.kill(ray.get_runtime_context().current_actor)


def connect(namespace: str) -> Call:
    """How this process calls the board of the application `namespace`, once it is there."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    host: Any = ray.remote(BoardHost).options(
        name=NAME,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        # On the head, so that it does not go with any other machine.
        resources={"node:__internal_head__": 0.0001},
        max_restarts=-1,
        max_concurrency=_MOST_CALLS,
    )
    found = host.remote()
    ray.get(found.__ray_ready__.remote(), timeout=_START_S)

    def call(method: str, *given: Any, timeout_s: float = PATIENCE_S) -> Any:
        nonlocal found
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = found.call.remote(method, given)
                return ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except (RayActorError, GetTimeoutError) as error:
                if time.monotonic() + _PAUSE_S > deadline:
                    raise BoardError(
                        f"the replicas' board did not answer within {timeout_s:g} s: {error}"
                    ) from error
            time.sleep(_PAUSE_S)
            # One that ended itself is made again; one that Ray restarts is found again.
            found = host.remote()

    return call


def remove(namespace: str) -> None:
    """End the board of an application that is no more."""
    import ray

    with suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(NAME, namespace=namespace))
