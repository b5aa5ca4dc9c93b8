"""One thread that answers: takes what waits, packs one batch over all tasks, runs the forward.

As soon as it is free it takes whatever waits, up to a token budget; nothing is delayed to make a
batch larger. Knows no HTTP, no Ray, no texts and no store: encoded inputs in, probabilities out.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.artifact import Overlay
from model_store.backend import Backend, P
from model_store.packing import Item
from model_store.tokenization import Encoding
from serving.batching import FairQueue, Waiting
from serving.errors import DeadlineError, EngineError, OverloadedError, TooLargeError
from serving.plans import PlanCache

STUCK_S = 60.0
"""A thread that is silent for longer will stay so: the largest batch takes seconds."""

logger = logging.getLogger("taskbone.engine")


class BatchObserver(Protocol):
    """What the engine tells of its batches; `serving.metrics.Metrics` is one."""

    def batch(self, sequences: dict[str, int], tokens: int, forward_s: float) -> None:
        """One forward: sequences by task, packed tokens in all, seconds."""
        ...

    def queued(self, tokens: int) -> None:
        """Tokens that wait now."""
        ...


@dataclass(frozen=True)
class Servable:
    """A version of a task as the engine sees it; `digest` identifies its plan."""

    task: str
    digest: str
    overlay: Overlay


@dataclass(frozen=True)
class EngineAnswer:
    """Probabilities `[B, C]` in fp32, in the request's order, and where time went."""

    probabilities: NDArray[Any]
    queue_s: float
    """From submission to the start of the last forward that it needed, less earlier forwards."""
    forward_s: float
    """Of all forwards that it took part in."""


@dataclass(eq=False)
class _Request:
    """A submitted request; touched by the engine thread alone once it is queued."""

    servable: Servable
    observed: bool
    deadline: float | None
    answer: "Future[EngineAnswer]"
    submitted: float
    missing: int
    rows: list[NDArray[Any] | None]
    forward_s: float = 0.0
    queue_s: float = 0.0


@dataclass(frozen=True)
class _Sequence:
    request: _Request
    index: int
    encoding: Encoding


@dataclass
class _State:
    """What threads share; `lock` guards all of it."""

    lock: threading.Condition = field(default_factory=threading.Condition)
    queue: FairQueue[_Sequence] = field(default_factory=FairQueue)
    closing: bool = False
    pinged: float | None = None
    """When the thread was asked for a sign of life that it has not given yet."""


class Engine(Generic[P]):
    """Runs until `close`. `submit` may be called from any thread."""

    def __init__(
        self,
        backend: Backend[P],
        plans: PlanCache[P],
        observer: BatchObserver,
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        stuck_s: float = STUCK_S,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_death` is called when the thread has ended by anything but `close`.

        All that waited has got its error by then.
        """
        self._backend = backend
        self._plans = plans
        self._observer = observer
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._stuck_s = stuck_s
        self._on_death = on_death
        self._state = _State()
        self._in_flight: list[_Sequence] = []
        self._thread = threading.Thread(target=self._run, name="taskbone-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        servable: Servable,
        encodings: Sequence[Encoding],
        *,
        key: str = "",
        weight: float = 1.0,
        deadline: float | None = None,
        observed: bool = True,
    ) -> "Future[EngineAnswer]":
        """Queue a request; its future gets exactly one answer, and cancelling it frees its place.

        As `submit_all` with one servable.
        """
        (answer,) = self.submit_all(
            [(servable, encodings)], key=key, weight=weight, deadline=deadline, observed=observed
        )
        return answer

    def submit_all(
        self,
        questions: Sequence[tuple[Servable, Sequence[Encoding]]],
        *,
        key: str = "",
        weight: float = 1.0,
        deadline: float | None = None,
        observed: bool = True,
    ) -> "list[Future[EngineAnswer]]":
        """Queue inputs for several servables at once, all or none: they share batches.

        `key` and `weight` say whose share of the queue they take; after `deadline` (by
        `time.perf_counter`) they are not worth a forward any more. The observer hears nothing of
        what is not `observed`: the server's own trials.

        Raises `OverloadedError` where the queue is full, `TooLargeError` where they could never
        fit, `DeadlineError` where it is too late, `EngineError` where the engine is closed or dead.
        """
        now = time.perf_counter()
        waiting: list[tuple[str, Waiting[_Sequence]]] = []
        answers: list[Future[EngineAnswer]] = []
        for servable, encodings in questions:
            assert encodings, "a request without inputs would never be answered"
            answer: Future[EngineAnswer] = Future()
            count = len(encodings)
            rows: list[NDArray[Any] | None] = [None] * count
            request = _Request(servable, observed, deadline, answer, now, count, rows)
            prompt = servable.overlay.manifest.prompt.tokens
            for index, encoding in enumerate(encodings):
                sequence = _Sequence(request, index, encoding)
                tokens = len(encoding.token_ids) + prompt
                waiting.append((servable.task, Waiting(tokens, sequence)))
            answers.append(answer)
        total = sum(one.tokens for _, one in waiting)
        if total > self._max_queued_tokens:
            raise TooLargeError(
                f"the inputs have {total} tokens; one request may have {self._max_queued_tokens}: "
                "send them in several requests"
            )
        if deadline is not None and now > deadline:
            raise DeadlineError("the deadline had passed before the request could be queued")
        with self._state.lock:
            if self._state.closing:
                raise EngineError("the engine has stopped; this server is shutting down")
            self._admit(total)
            for task, one in waiting:
                self._state.queue.push(task, one)
            self._state.lock.notify()
        return answers

    def check(self) -> None:
        """Raise `EngineError` where the thread is dead, or has not answered an earlier check.

        Asks the thread, which answers between two forwards, and does not wait for it.
        """
        with self._state.lock:
            if not self._thread.is_alive():
                raise EngineError("the engine thread is dead")
            now = time.perf_counter()
            if self._state.pinged is None:
                self._state.pinged = now
                self._state.lock.notify()
            elif now - self._state.pinged > self._stuck_s:
                raise EngineError(
                    f"the engine has given no sign of life for more than {self._stuck_s:.0f} s"
                )

    def close(self) -> None:
        """Answer what is queued, then stop the thread."""
        with self._state.lock:
            self._state.closing = True
            self._state.lock.notify()
        self._thread.join(self._stuck_s)

    def _admit(self, tokens: int) -> None:
        queue = self._state.queue
        if queue.tokens + tokens > self._max_queued_tokens:
            # Callers that have hung up make room first.
            queue.drop(lambda sequence: sequence.request.answer.done())
        if queue.tokens + tokens > self._max_queued_tokens:
            raise OverloadedError(
                f"{queue.tokens} of {self._max_queued_tokens} tokens are waiting; "
                "send the request again later"
            )

    def _run(self) -> None:
        try:
            while (sequences := self._take()) is not None:
                self._in_flight = sequences
                self._answer(sequences)
                self._in_flight = []
        except BaseException:
            logger.exception("the engine thread dies")
            self._die()

    def _die(self) -> None:
        """Leave nobody waiting for an answer that will not come."""
        with self._state.lock:
            self._state.closing = True
            waiting = self._state.queue.take(sys.maxsize)
        for sequence in [*self._in_flight, *(one.work for one in waiting)]:
            _resolve(sequence.request.answer, EngineError("the engine has died"))
        self._on_death()

    def _take(self) -> list[_Sequence] | None:
        """Wait for work; None once the engine is closing and nothing is left."""
        with self._state.lock:
            self._state.pinged = None
            while not len(self._state.queue):
                if self._state.closing:
                    return None
                self._state.lock.wait()
                self._state.pinged = None
            taken = self._state.queue.take(self._max_batch_tokens)
            waiting_tokens = self._state.queue.tokens
        try:
            self._observer.queued(waiting_tokens)
        except Exception:
            logger.exception("the observer failed; requests are answered all the same")
        return [waiting.work for waiting in taken if self._is_wanted(waiting.work.request)]

    def _is_wanted(self, request: _Request) -> bool:
        """Cancelled, failed and late requests are not worth a forward."""
        if request.deadline is not None and time.perf_counter() > request.deadline:
            _resolve(request.answer, DeadlineError("the deadline passed before the forward"))
        return not request.answer.done()

    def _answer(self, sequences: list[_Sequence]) -> None:
        if not sequences:
            return
        started = time.perf_counter()
        requests = {id(item.request): item.request for item in sequences}.values()
        try:
            rows = self._forward(sequences)
        except Exception as error:
            logger.exception("a batch of %d sequences failed", len(sequences))
            failure = EngineError(f"the forward failed: {type(error).__name__}")
            failure.__cause__ = error
            for request in requests:
                _resolve(request.answer, failure)
            return
        forward_s = time.perf_counter() - started
        for request in requests:
            request.queue_s = started - request.submitted - request.forward_s
            request.forward_s += forward_s
        for sequence, row in zip(sequences, rows, strict=True):
            request = sequence.request
            request.rows[sequence.index] = row
            request.missing -= 1
            if not request.missing:
                _resolve(request.answer, _result(request))

    def _forward(self, sequences: Sequence[_Sequence]) -> Sequence[NDArray[Any]]:
        """One batch over all tasks; probabilities `[C]` per sequence, in the order given."""
        started = time.perf_counter()
        servables = {item.request.servable.digest: item.request.servable for item in sequences}
        number = {digest: segment for segment, digest in enumerate(servables)}
        plans = [self._plans.get(digest, one.overlay) for digest, one in servables.items()]
        items = [Item(item.encoding, number[item.request.servable.digest]) for item in sequences]
        rows = self._backend.answer(items, plans)
        counts: dict[str, int] = {}
        tokens = 0
        for sequence in sequences:
            servable = sequence.request.servable
            prompt = servable.overlay.manifest.prompt.tokens
            tokens += len(sequence.encoding.token_ids) + prompt
            if sequence.request.observed:
                counts[servable.task] = counts.get(servable.task, 0) + 1
        if counts:
            try:
                self._observer.batch(counts, tokens, time.perf_counter() - started)
            except Exception:
                logger.exception("the observer failed; requests are answered all the same")
        return rows


def _result(request: _Request) -> EngineAnswer | EngineError:
    probabilities = np.stack([row for row in request.rows if row is not None])
    if not np.isfinite(probabilities).all():
        return EngineError(
            f"task {request.servable.task!r} gives no finite answer to these inputs: "
            "its overlay's numbers are too large"
        )
    return EngineAnswer(probabilities, request.queue_s, request.forward_s)


def _resolve(answer: "Future[EngineAnswer]", result: EngineAnswer | Exception) -> None:
    """Give the future its one answer; a caller that has hung up meanwhile has cancelled it."""
    try:
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
    except InvalidStateError:
        pass
