"""One thread that answers: takes what waits, packs one batch over all tasks, runs the forward.

As soon as it is free it takes whatever waits, up to a token budget; nothing is delayed to make a
batch larger. Knows no HTTP, no Ray, no texts and no store: encoded inputs in, probabilities out.
"""

import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol

import numpy as np
from numpy.typing import NDArray

from model_store.artifact import Overlay
from model_store.backend import Backend, P
from model_store.packing import Item
from model_store.tokenization import Encoding
from serving.admission import Admission, Limits, Refused
from serving.batching import Part, Request
from serving.errors import EngineError, OverloadedError
from serving.plans import PlanCache
from serving.types import Batch

STUCK_S = 60.0
"""A thread that is silent for longer will stay so: the largest batch takes seconds."""

logger = logging.getLogger("taskbone.engine")


class BatchObserver(Protocol):
    """What the engine tells of its batches; `serving.metrics.Metrics` is one."""

    def batch(
        self, sequences: Mapping[str, int], requests: int, tokens: int, forward_s: float
    ) -> None:
        """One forward: sequences by task, requests and packed tokens in all, seconds."""
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
    batches: tuple[Batch, ...] = ()
    """These forwards."""


@dataclass(eq=False, slots=True)
class _Question:
    """The inputs to one servable; touched by the engine's thread alone once it is queued."""

    servable: Servable
    encodings: Sequence[Encoding]
    observed: bool
    answer: "Future[EngineAnswer]"
    missing: int
    rows: list[NDArray[Any] | None]
    queue_s: float = 0.0
    batches: tuple[Batch, ...] = ()


_Part = Part[_Question]
_Sequence = tuple[_Part, int]
"""A part of a request, and the number of the sequence in it."""


@dataclass
class _State:
    """What threads share; `lock` guards all of it."""

    admission: Admission[_Question]
    lock: threading.Condition = field(default_factory=threading.Condition)
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
        max_queue_s: float,
        clock: Callable[[], float] = time.perf_counter,
        stuck_s: float = STUCK_S,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_death` is called when the thread has ended by anything but `close`.

        All that waited has got its error by then.
        """
        self._backend = backend
        self._plans = plans
        self._observer = observer
        self._clock = clock
        self._stuck_s = stuck_s
        self._on_death = on_death
        self._state = _State(Admission(Limits(max_batch_tokens, max_queued_tokens, max_queue_s)))
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

        `key` and `weight` say whose share of the queue and of the turns they take; after
        `deadline` (by the clock) they are not worth a forward any more. The observer hears nothing
        of what is not `observed`: the server's own trials.

        Raises `RateLimitedError`, `OverloadedError` or `DeadlineError` where they cannot wait, and
        their futures may get these later; `TooLargeError` where they could never fit;
        `EngineError` where the engine is closed or dead.
        """
        if not questions:
            return []
        assert weight > 0, "a key without weight would wait for ever"
        now = self._clock()
        request = Request(key, weight, now, deadline)
        parts = [_part(request, *question, observed) for question in questions]
        with self._state.lock:
            if self._state.closing:
                raise EngineError("the engine has stopped; this server is shutting down")
            refused = self._state.admission.admit(parts, now)
            self._state.lock.notify()
        for part in parts:
            part.work.answer.add_done_callback(partial(self._leave, weakref.ref(part)))
        _refuse(refused)
        return [part.work.answer for part in parts]

    def saturated(self, key: str, weight: float) -> OverloadedError | None:
        """What even the smallest request of this key would be refused with now; None: it may come.

        Costs next to nothing: a server that has too much to do may ask before it reads a request.
        """
        with self._state.lock:
            return self._state.admission.saturated(key, weight)

    def check(self) -> None:
        """Raise `EngineError` where the thread is dead, or has not answered an earlier check.

        Asks the thread, which answers between two forwards, and does not wait for it.
        """
        with self._state.lock:
            if not self._thread.is_alive():
                raise EngineError("the engine thread is dead")
            now = self._clock()
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

    def _leave(self, reference: "weakref.ref[_Part]", _: object) -> None:
        """Free the place of a request that has its answer, or whose caller has hung up.

        The future knows the part by a weak reference: while it waits, the queue holds it.
        """
        part = reference()
        if part is not None and part.waits:
            with self._state.lock:
                self._state.admission.remove(part)

    def _run(self) -> None:
        try:
            while (sequences := self._take()) is not None:
                self._answer(sequences)
                # What was answered is not kept until something else comes.
                self._in_flight = sequences = []
        except BaseException:
            logger.exception("the engine thread dies")
            self._die()

    def _die(self) -> None:
        """Leave nobody waiting for an answer that will not come."""
        with self._state.lock:
            self._state.closing = True
            waiting = self._state.admission.clear()
        for part in [*(part for part, _ in self._in_flight), *waiting]:
            _resolve(part.work.answer, EngineError("the engine has died"))
        self._on_death()

    def _take(self) -> list[_Sequence] | None:
        """Wait for work; None once the engine is closing and nothing is left."""
        admission = self._state.admission
        with self._state.lock:
            admission.answered(self._clock())
            self._state.pinged = None
            while not admission.tokens:
                if self._state.closing:
                    return None
                self._state.lock.wait()
                self._state.pinged = None
            taken, refused = admission.take(self._clock())
            self._in_flight = taken
            waiting_tokens = admission.tokens
        _refuse(refused)
        try:
            self._observer.queued(waiting_tokens)
        except Exception:
            logger.exception("the observer failed; requests are answered all the same")
        # Callers may have hung up meanwhile.
        return [(part, index) for part, index in taken if not part.work.answer.done()]

    def _answer(self, sequences: list[_Sequence]) -> None:
        if not sequences:
            return
        started = self._clock()
        parts = dict.fromkeys(part for part, _ in sequences)
        try:
            rows = self._forward(sequences)
        except Exception as error:
            logger.exception("a batch of %d sequences failed", len(sequences))
            failure = EngineError(f"the forward failed: {type(error).__name__}")
            failure.__cause__ = error
            for part in parts:
                _resolve(part.work.answer, failure)
            return
        forward_s = self._clock() - started
        batch = _batch(sequences, parts, started, forward_s)
        for part in parts:
            part.work.batches += (batch,)
            part.work.queue_s = started - part.request.submitted - part.forward_s
            part.forward_s += forward_s
        for (part, index), row in zip(sequences, rows, strict=True):
            part.work.rows[index] = row
            part.work.missing -= 1
            if not part.work.missing:
                _resolve(part.work.answer, _result(part))

    def _forward(self, sequences: Sequence[_Sequence]) -> Sequence[NDArray[Any]]:
        """One batch over all tasks; probabilities `[C]` per sequence, in the order given."""
        started = self._clock()
        servables = {part.work.servable.digest: part.work.servable for part, _ in sequences}
        number = {digest: segment for segment, digest in enumerate(servables)}
        plans = [self._plans.get(digest, one.overlay) for digest, one in servables.items()]
        items = [
            Item(part.work.encodings[index], number[part.work.servable.digest])
            for part, index in sequences
        ]
        rows = self._backend.answer(items, plans)
        forward_s = self._clock() - started
        observed = [(part, index) for part, index in sequences if part.work.observed]
        if observed:
            self._tell(observed, sum(part.lengths[index] for part, index in sequences), forward_s)
        return rows

    def _tell(self, observed: Sequence[_Sequence], tokens: int, forward_s: float) -> None:
        requests = {part.request for part, _ in observed}
        try:
            counts = Counter(part.task for part, _ in observed)
            self._observer.batch(counts, len(requests), tokens, forward_s)
        except Exception:
            logger.exception("the observer failed; requests are answered all the same")


def _part(
    request: Request, servable: Servable, encodings: Sequence[Encoding], observed: bool
) -> _Part:
    assert encodings, "a request without inputs would never be answered"
    count = len(encodings)
    prompt = servable.overlay.manifest.prompt.tokens
    lengths = [len(encoding.token_ids) + prompt for encoding in encodings]
    question = _Question(servable, encodings, observed, Future(), count, [None] * count)
    return Part(request, servable.task, lengths, question)


def _batch(
    sequences: Sequence[_Sequence], parts: Collection[_Part], started: float, forward_s: float
) -> Batch:
    return Batch(
        started=started,
        forward_s=forward_s,
        requests=len({part.request for part in parts}),
        sequences=len(sequences),
        tokens=sum(part.lengths[index] for part, index in sequences),
        tasks=len({part.task for part in parts}),
    )


def _result(part: _Part) -> EngineAnswer | EngineError:
    question = part.work
    probabilities = np.stack([row for row in question.rows if row is not None])
    if not np.isfinite(probabilities).all():
        return EngineError(
            f"task {question.servable.task!r} gives no finite answer to these inputs: "
            "its overlay's numbers are too large"
        )
    return EngineAnswer(probabilities, question.queue_s, part.forward_s, question.batches)


def _refuse(refused: Sequence[Refused[_Question]]) -> None:
    for one in refused:
        for part in one.parts:
            _resolve(part.work.answer, one.error)


def _resolve(answer: "Future[EngineAnswer]", result: EngineAnswer | Exception) -> None:
    """Give the future its one answer; a caller that has hung up meanwhile has cancelled it."""
    try:
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)
    except InvalidStateError:
        pass
