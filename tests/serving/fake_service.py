"""A service without models: the label is the parity of the text's length."""

import asyncio
import hashlib
from collections.abc import Sequence

from serving.board import Board, ReplicaStatus
from serving.config import ServeConfig
from serving.errors import EngineError, InvalidInputError, OverloadedError, UnknownTaskError
from serving.metrics import Metrics
from serving.types import PLAIN, Ask, Prediction, TaskAnswer, TaskInfo, TextInput, Timings


class FakeService:
    """Two tasks, `parity` on texts and `pairs` on pairs; some texts make it fail or wait."""

    def __init__(self, metrics: Metrics | None = None, board: Board | None = None) -> None:
        self.metrics = metrics
        self.board = board
        self.healthy = True
        self.closed = False
        self.cancelled = 0
        self.waiting = asyncio.Event()
        self._tasks = {
            name: _describe(name, takes_pairs, b"") for name, takes_pairs in _FIRST_TASKS.items()
        }

    async def predict(self, task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        info = self.task(task)
        for number, text in enumerate(inputs):
            if isinstance(text, str) == info.takes_pairs:
                raise InvalidInputError(f"inputs.{number} is of the wrong kind for task {task!r}")
        match inputs[0]:
            case "overload":
                raise OverloadedError("the queue is full", retry_after_s=7)
            case "engine":
                raise EngineError("secret detail of the engine")
            case "crash":
                raise ZeroDivisionError("secret detail of the crash")
            case "members" if self.board:
                members = await asyncio.to_thread(self.board.members)
                raise InvalidInputError(" ".join(members))
            case "wait":
                await self._wait()
        timings = Timings(0.1, 0.2, 0.3, 0.6)
        if self.metrics:
            self.metrics.timings(task, timings)
        predictions = tuple(_predict(text) for text in inputs)
        return TaskAnswer(task, info.version, predictions, timings)

    def tasks(self) -> list[TaskInfo]:
        return list(self._tasks.values())

    def task(self, name: str) -> TaskInfo:
        if name not in self._tasks:
            raise UnknownTaskError(f"no task {name!r}; tasks: {', '.join(self._tasks)}")
        return self._tasks[name]

    async def register(self, task: str, data: bytes) -> tuple[TaskInfo, bool]:
        found = _describe(task, False, data)
        created = self._tasks.get(task) != found
        self._tasks[task] = found
        return found, created

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


_FIRST_TASKS = {"parity": False, "pairs": True}


def open_fake_service(
    config: ServeConfig, metrics: Metrics, board: Board | None = None, replica_id: str = "alone"
) -> FakeService:
    """What a replica opens instead of the real service."""
    service = FakeService(metrics, board)
    if board:
        board.report(replica_id, ReplicaStatus())
    for info in service.tasks():
        metrics.prepare(info.task)
    return service


def _describe(name: str, takes_pairs: bool, data: bytes) -> TaskInfo:
    return TaskInfo(
        task=name,
        version=1,
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
    length = len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
    odd = float(length % 2)
    return Prediction("odd" if odd else "even", 1.0, {"even": 1.0 - odd, "odd": odd})
