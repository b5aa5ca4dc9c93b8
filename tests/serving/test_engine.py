"""The engine: right answers from mixed batches, one answer per request, and life after a fault."""

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from model_store.artifact import Overlay, probabilities
from model_store.backbone import Backbone
from model_store.backend import TorchBackend, TorchPlan
from model_store.encoder import Encoder
from model_store.native import NativeBackend, NativePlan, builds
from model_store.ops import TorchOps
from model_store.plan import LinearHead
from model_store.store import Store
from model_store.tokenization import Encoding, InputEncoder
from serving.engine import Engine, EngineAnswer, Servable
from serving.errors import (
    DeadlineError,
    EngineError,
    OverloadedError,
    RateLimitedError,
    TooLargeError,
)
from serving.plans import PlanCache
from tests.overlays import fp32_encoder, random_overlay
from tests.serving.fake_plans import Heard

TEXTS = ["the film was good", "a", "what is my new bank card ?", "bad news", "the cat and the dog"]


LIMITS: dict[str, Any] = {
    "max_batch_tokens": 200,
    "max_queued_tokens": 400,
    "max_queue_s": 1000.0,
}


class Observed:
    """Collects what the engine tells."""

    def __init__(self) -> None:
        self.batches: list[tuple[dict[str, int], int]] = []
        self.requests: list[int] = []

    def batch(
        self, sequences: Mapping[str, int], requests: int, tokens: int, forward_s: float
    ) -> None:
        assert forward_s > 0
        self.batches.append((dict(sequences), tokens))
        self.requests.append(requests)

    def queued(self, tokens: int) -> None:
        assert tokens >= 0


class GatedOps(TorchOps):
    """Plain torch that waits at the door, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.door = threading.Event()
        self.door.set()
        self.entered = threading.Event()
        self.fail = False

    def attention(self, q: Tensor, *args: object) -> Tensor:
        self.entered.set()
        assert self.door.wait(30), "nobody opened the door"
        if self.fail:
            raise RuntimeError("broken on purpose")
        return super().attention(q, *args)  # type: ignore[arg-type]


class Setup:
    """An engine over a tiny backbone with three tasks."""

    def __init__(self, backbone: Backbone, **limits: Any) -> None:
        self.backbone = backbone
        self.ops = GatedOps()
        self.observed = Observed()
        self.backend = TorchBackend(Encoder(backbone.config, backbone.tensors, self.ops), threads=1)
        self.plans = PlanCache[TorchPlan](self.backend, 1 << 20, Heard())
        settings: dict[str, Any] = {**LIMITS, **limits}
        self.engine = Engine(self.backend, self.plans, self.observed, **settings)
        self.tasks = [
            Servable(name, name, random_overlay(backbone, name, seed=seed, labels=labels))
            for seed, (name, labels) in enumerate(
                [("one", ("a", "b")), ("two", ("a", "b", "c")), ("three", ("a", "b", "c", "d"))]
            )
        ]

    def encode(self, texts: list[str]) -> list[Encoding]:
        return InputEncoder(self.backbone.tokenizer, self.backbone.config, ["{text}"], 32).encode(
            texts
        )

    def expected(self, overlay: Overlay, texts: list[str]) -> NDArray[Any]:
        return probabilities(fp32_encoder(self.backbone), self.backbone, overlay, texts).numpy()

    def close(self) -> None:
        self.ops.door.set()
        self.engine.close()
        self.plans.close()


@pytest.fixture
def setup(tiny: tuple[Store, Backbone]) -> Iterator[Setup]:
    setup = Setup(tiny[1])
    yield setup
    setup.close()


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 s")


def test_mixed_tasks_in_one_batch_get_their_own_answers(setup: Setup) -> None:
    setup.ops.door.clear()
    first = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    waiting = [
        (servable, [text], setup.engine.submit(servable, setup.encode([text])))
        for text in TEXTS
        for servable in setup.tasks
    ]
    setup.ops.door.set()
    assert first.result(30).probabilities.shape == (1, 2)
    for servable, texts, answer in waiting:
        np.testing.assert_allclose(
            answer.result(30).probabilities,
            setup.expected(servable.overlay, texts),
            atol=1e-5,
            rtol=1e-5,
        )
    assert setup.observed.batches[1][0] == {"one": 5, "two": 5, "three": 5}, "one batch for all"
    assert setup.observed.requests == [1, 15]


def _own(setup: Setup) -> list[Servable]:
    """Two tasks that share their layers, and two with layers of their own."""
    backbone = setup.backbone
    inside: dict[str, Any] = {
        "heads": (2, 0, 3),
        "scales": True,
        "norms": True,
        "delta_rank": 2,
    }
    recovered = random_overlay(backbone, "recovered", labels=("a", "b"), seed=2, **inside)
    normed = random_overlay(backbone, "normed", seed=2, norms=True, prompt_tokens=0, read="cls")
    scaled = random_overlay(backbone, "scaled", seed=2, scales=True)
    overlays = [recovered, normed, scaled]
    own = [Servable(one.manifest.task, one.manifest.task, one) for one in overlays]
    return [own[0], setup.tasks[2], own[1], own[2]]


def test_tasks_with_layers_of_their_own_share_a_batch(setup: Setup) -> None:
    setup.ops.door.clear()
    first = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    waiting = [
        (servable, [text], setup.engine.submit(servable, setup.encode([text])))
        for text in TEXTS[:4]
        for servable in _own(setup)
    ]
    setup.ops.door.set()
    assert first.result(30)
    for servable, texts, answer in waiting:
        np.testing.assert_allclose(
            answer.result(30).probabilities,
            setup.expected(servable.overlay, texts),
            atol=1e-5,
            rtol=1e-5,
        )
    counts, tokens = setup.observed.batches[1]
    assert counts == dict.fromkeys(("recovered", "three", "normed", "scaled"), 4)
    text_tokens = sum(len(item.token_ids) for item in setup.encode(TEXTS[:4]))
    assert tokens == 4 * text_tokens + 3 * 4 * 3, "three of the four have 3 prompt tokens"


def test_two_requests_of_one_task_with_its_own_layers_share_a_batch(setup: Setup) -> None:
    recovered = _own(setup)[0]
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    parts = [TEXTS[:2], TEXTS[2:]]
    answers = [setup.engine.submit(recovered, setup.encode(part)) for part in parts]
    setup.ops.door.set()
    given = np.concatenate([answer.result(30).probabilities for answer in answers])
    np.testing.assert_allclose(
        given, setup.expected(recovered.overlay, TEXTS), atol=1e-5, rtol=1e-5
    )
    assert setup.observed.batches[1][0] == {"recovered": 5}


def test_a_large_request_with_layers_of_its_own_is_answered_in_order(
    tiny: tuple[Store, Backbone],
) -> None:
    setup = Setup(tiny[1], max_batch_tokens=40, max_queued_tokens=4000)
    texts = TEXTS * 3
    tasks = _own(setup)
    answers = [setup.engine.submit(servable, setup.encode(texts)) for servable in tasks]
    for servable, answer in zip(tasks, answers, strict=True):
        np.testing.assert_allclose(
            answer.result(30).probabilities,
            setup.expected(servable.overlay, texts),
            atol=1e-5,
            rtol=1e-5,
        )
    setup.close()
    totals: dict[str, int] = {}
    for counts, tokens in setup.observed.batches:
        assert tokens <= 40
        for task, count in counts.items():
            totals[task] = totals.get(task, 0) + count
    assert totals == dict.fromkeys(("recovered", "three", "normed", "scaled"), 15)


def test_a_request_larger_than_a_batch_is_answered_in_order(tiny: tuple[Store, Backbone]) -> None:
    setup = Setup(tiny[1], max_batch_tokens=20, max_queued_tokens=4000)
    texts = TEXTS * 6
    answer = setup.engine.submit(setup.tasks[1], setup.encode(texts)).result(30)
    setup.close()
    np.testing.assert_allclose(
        answer.probabilities, setup.expected(setup.tasks[1].overlay, texts), atol=1e-5, rtol=1e-5
    )
    assert len(setup.observed.batches) > 3
    assert all(tokens <= 20 for _, tokens in setup.observed.batches)
    assert answer.forward_s > 0
    assert answer.queue_s >= 0


def test_a_full_queue_refuses_and_recovers(setup: Setup) -> None:
    setup.ops.door.clear()
    running = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    accepted = []
    texts = setup.encode(TEXTS)
    room = 400 // sum(len(item.token_ids) + 3 for item in texts)
    for _ in range(room):
        accepted.append(setup.engine.submit(setup.tasks[0], texts))
    with pytest.raises(OverloadedError, match="tokens are waiting"):
        setup.engine.submit(setup.tasks[0], texts)
    setup.ops.door.set()
    assert [answer.result(30).probabilities.shape for answer in accepted] == [(5, 2)] * len(
        accepted
    )
    assert running.result(30)
    assert setup.engine.submit(setup.tasks[0], setup.encode(TEXTS)).result(30)


def test_the_servers_own_trials_are_not_observed(setup: Setup) -> None:
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS), observed=False).result(30)
    setup.engine.submit(setup.tasks[1], setup.encode(TEXTS)).result(30)
    assert [counts for counts, _ in setup.observed.batches] == [{"two": 5}]


def test_a_request_that_never_fits_is_too_large(setup: Setup) -> None:
    with pytest.raises(TooLargeError, match="400"):
        setup.engine.submit(setup.tasks[0], setup.encode(TEXTS * 20))


def test_a_failed_batch_answers_all_its_requests_and_the_engine_goes_on(setup: Setup) -> None:
    setup.ops.fail = True
    for servable in setup.tasks:
        with pytest.raises(EngineError, match="RuntimeError"):
            setup.engine.submit(servable, setup.encode(TEXTS)).result(30)
    setup.ops.fail = False
    answer = setup.engine.submit(setup.tasks[2], setup.encode(TEXTS)).result(30)
    assert answer.probabilities.shape == (5, 4)
    setup.engine.check()


def test_a_cancelled_request_costs_no_forward(setup: Setup) -> None:
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    cancelled = setup.engine.submit(setup.tasks[1], setup.encode(TEXTS))
    kept = setup.engine.submit(setup.tasks[2], setup.encode(TEXTS))
    assert cancelled.cancel()
    setup.ops.door.set()
    assert kept.result(30).probabilities.shape == (5, 4)
    assert [counts for counts, _ in setup.observed.batches] == [{"one": 1}, {"three": 5}]
    with pytest.raises(CancelledError):
        cancelled.result(1)


def test_requests_that_left_have_left_at_once(setup: Setup) -> None:
    admission = setup.engine._state.admission
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    texts = setup.encode(TEXTS)
    room = 400 // sum(len(item.token_ids) + 3 for item in texts)
    answers = [setup.engine.submit(setup.tasks[0], texts) for _ in range(room)]
    left = admission.tokens
    for answer in answers[::2]:
        answer.cancel()
    assert admission.tokens == left // room * (room // 2)
    for answer in answers:
        answer.cancel()
    assert admission.tokens == 0
    kept = setup.engine.submit(setup.tasks[1], texts)
    setup.ops.door.set()
    assert kept.result(30).probabilities.shape == (5, 3)


def test_a_request_whose_first_batch_failed_frees_the_rest_of_its_place(
    tiny: tuple[Store, Backbone],
) -> None:
    setup = Setup(tiny[1], max_batch_tokens=20, max_queued_tokens=4000)
    setup.ops.fail = True
    setup.ops.door.clear()
    failing = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS * 10))
    assert setup.ops.entered.wait(30)
    setup.ops.door.set()
    with pytest.raises(EngineError, match="RuntimeError"):
        failing.result(30)
    _wait_until(lambda: setup.engine._state.admission.tokens == 0)
    assert setup.observed.batches == []
    setup.close()


def test_nothing_of_an_answered_request_is_kept(setup: Setup) -> None:
    gc.collect()
    gc.disable()  # what is freed, is freed without it
    try:
        answer = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS))
        answer.result(30)
        setup.engine.submit(setup.tasks[1], setup.encode(TEXTS)).result(30)  # the batch after it
        reference = weakref.ref(answer)
        del answer
        _wait_until(lambda: reference() is None)
    finally:
        gc.enable()


def test_keys_share_a_full_queue(setup: Setup) -> None:
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    texts = setup.encode(TEXTS)
    tokens = sum(len(item.token_ids) + 3 for item in texts)
    room = 400 // tokens
    many = [setup.engine.submit(setup.tasks[0], texts, key="many") for _ in range(room)]
    assert setup.engine.saturated("few", 1.0) is None
    few = setup.engine.submit(setup.tasks[1], texts, key="few")
    with pytest.raises(RateLimitedError) as gave_way:
        many[-1].result(0)
    assert gave_way.value.retry_after_s >= 1
    with pytest.raises(RateLimitedError):
        setup.engine.submit(setup.tasks[0], texts, key="many")
    setup.ops.door.set()
    assert few.result(30).probabilities.shape == (5, 3)
    for answer in many[:-1]:
        assert answer.result(30).probabilities.shape == (5, 2)


@pytest.mark.parametrize("what", ["queued", "batch"])
def test_a_failing_observer_stops_no_answer(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*figures: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(setup.observed, what, fail)
    answer = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS)).result(30)
    assert answer.probabilities.shape == (5, 2)


def test_an_answer_that_is_no_number_is_an_error(setup: Setup) -> None:
    overlay = setup.tasks[0].overlay
    assert overlay.head is not None
    huge = dataclasses.replace(
        overlay, head=LinearHead(overlay.head.weight * 3e38, overlay.head.bias)
    )
    with pytest.raises(EngineError, match="no finite answer"):
        setup.engine.submit(Servable("huge", "huge", huge), setup.encode(TEXTS)).result(30)


def test_close_answers_what_is_queued_and_then_refuses(tiny: tuple[Store, Backbone]) -> None:
    setup = Setup(tiny[1])
    answers = [setup.engine.submit(servable, setup.encode(TEXTS)) for servable in setup.tasks]
    setup.close()
    assert all(
        answer.done() and np.isfinite(answer.result().probabilities).all() for answer in answers
    )
    with pytest.raises(EngineError, match="stopped"):
        setup.engine.submit(setup.tasks[0], setup.encode(TEXTS))
    with pytest.raises(EngineError, match="dead"):
        setup.engine.check()


def test_several_tasks_asked_at_once_share_a_batch(setup: Setup) -> None:
    questions = [(servable, setup.encode(TEXTS[:2])) for servable in setup.tasks]
    answers = setup.engine.submit_all(questions)
    for servable, answer in zip(setup.tasks, answers, strict=True):
        np.testing.assert_allclose(
            answer.result(30).probabilities,
            setup.expected(servable.overlay, TEXTS[:2]),
            atol=1e-5,
            rtol=1e-5,
        )
    assert [counts for counts, _ in setup.observed.batches] == [{"one": 2, "two": 2, "three": 2}]
    assert setup.observed.requests == [1], "it was asked at once"
    assert setup.engine.submit_all([]) == []


def test_of_several_tasks_asked_at_once_all_or_none_is_queued(setup: Setup) -> None:
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    texts = setup.encode(TEXTS)
    room = 400 // sum(len(item.token_ids) + 3 for item in texts)
    accepted = [setup.engine.submit(setup.tasks[0], texts) for _ in range(room - 1)]
    with pytest.raises(OverloadedError):
        setup.engine.submit_all([(servable, texts) for servable in setup.tasks])
    with pytest.raises(TooLargeError):
        setup.engine.submit_all([(servable, texts * 2) for servable in setup.tasks * 3])
    setup.ops.door.set()
    for answer in accepted:
        answer.result(30)
    totals = [sum(counts.values()) for counts, _ in setup.observed.batches]
    assert sum(totals) == 1 + 5 * (room - 1), "nothing of what was refused"


def test_a_busy_key_leaves_others_their_turns(tiny: tuple[Store, Backbone]) -> None:
    setup = Setup(tiny[1], max_batch_tokens=300, max_queued_tokens=40000)
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    busy = [setup.engine.submit(setup.tasks[0], setup.encode(TEXTS), key="busy") for _ in range(50)]
    single = setup.engine.submit(setup.tasks[1], setup.encode(TEXTS[:1]), key="single")
    setup.ops.door.set()
    single.result(30)
    for answer in busy:
        answer.result(30)
    setup.close()
    assert [
        number for number, (counts, _) in enumerate(setup.observed.batches) if "two" in counts
    ] == [1]


def test_what_is_too_late_costs_no_forward(setup: Setup) -> None:
    with pytest.raises(DeadlineError):
        setup.engine.submit(setup.tasks[0], setup.encode(TEXTS), deadline=time.perf_counter() - 1)
    setup.ops.door.clear()
    setup.engine.submit(setup.tasks[0], setup.encode(TEXTS[:1]))
    assert setup.ops.entered.wait(30)
    late = setup.engine.submit(
        setup.tasks[1], setup.encode(TEXTS), deadline=time.perf_counter() + 0.01
    )
    kept = setup.engine.submit(
        setup.tasks[2], setup.encode(TEXTS), deadline=time.perf_counter() + 1000
    )
    time.sleep(0.02)
    setup.ops.door.set()
    assert kept.result(30).probabilities.shape == (5, 4)
    with pytest.raises(DeadlineError):
        late.result(30)
    assert [counts for counts, _ in setup.observed.batches] == [{"one": 1}, {"three": 5}]


def test_what_has_waited_longer_than_allowed_costs_no_forward(
    tiny: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Setup(tiny[1])
    other.close()
    texts = other.encode(TEXTS)
    at_once = sum(len(item.token_ids) + 3 for item in texts)
    now = [100.0]
    setup = Setup(tiny[1], max_batch_tokens=at_once, max_queue_s=3.0, clock=lambda: now[0])
    durations = iter([1.0, 1.0, 1.5, 0.25, 0.25])
    answer = setup.backend.answer

    def take_time(*arguments: Any) -> Any:
        rows = answer(*arguments)
        now[0] += next(durations)
        return rows

    monkeypatch.setattr(setup.backend, "answer", take_time)
    setup.ops.door.clear()
    answers = [setup.engine.submit(setup.tasks[0], texts)]
    assert setup.ops.entered.wait(30)
    answers += [setup.engine.submit(setup.tasks[0], texts) for _ in range(5)]
    setup.ops.door.set()
    waited = [answer.result(30).queue_s for answer in answers[:5]]
    assert waited == [0.0, 1.0, 2.0, 3.5, 3.75], "the last is within one batch of what is allowed"
    with pytest.raises(OverloadedError, match=r"waited for 4\.0 s"):
        answers[5].result(30)
    assert len(setup.observed.batches) == 5
    setup.close()


class Killed(BaseException):
    """Ends a thread, as a fault outside of our own code may."""


def test_a_thread_that_dies_answers_everybody_and_says_so(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die(*arguments: object) -> None:
        setup.ops.entered.set()
        assert setup.ops.door.wait(30)
        raise Killed

    told: list[list[bool]] = []
    answers: list[Future[EngineAnswer]] = []
    engine = Engine(
        setup.backend,
        setup.plans,
        setup.observed,
        **LIMITS,
        on_death=lambda: told.append([answer.done() for answer in answers]),
    )
    monkeypatch.setattr(setup.backend, "answer", die)
    setup.ops.door.clear()
    answers.append(engine.submit(setup.tasks[0], setup.encode(TEXTS)))
    assert setup.ops.entered.wait(30)
    answers.append(engine.submit(setup.tasks[1], setup.encode(TEXTS)))
    setup.ops.door.set()
    for answer in answers:
        with pytest.raises(EngineError, match="died"):
            answer.result(30)
    _wait_until(lambda: bool(told))
    assert told == [[True, True]], "once, and after everybody had an answer"
    assert "the engine thread dies" in caplog.text
    with pytest.raises(EngineError):
        engine.submit(setup.tasks[0], setup.encode(TEXTS))
    _wait_until(lambda: not engine._thread.is_alive())
    with pytest.raises(EngineError, match="dead"):
        engine.check()
    engine.close()


def test_an_engine_that_is_closed_is_not_called_dead(setup: Setup) -> None:
    told: list[str] = []
    engine = Engine(
        setup.backend,
        setup.plans,
        setup.observed,
        **LIMITS,
        on_death=lambda: told.append("dead"),
    )
    engine.submit(setup.tasks[0], setup.encode(TEXTS)).result(30)
    engine.close()
    assert not engine._thread.is_alive()
    assert told == []


def test_a_check_asks_the_thread_itself(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.engine, "_stuck_s", 0.0)
    for _ in range(3):
        setup.engine.check()
        _wait_until(lambda: setup.engine._state.pinged is None)
    setup.ops.door.clear()
    running = setup.engine.submit(setup.tasks[0], setup.encode(TEXTS))
    assert setup.ops.entered.wait(30)
    setup.engine.check()
    with pytest.raises(EngineError, match="no sign of life"):
        setup.engine.check()
    setup.ops.door.set()
    assert running.result(30)
    _wait_until(lambda: setup.engine._state.pinged is None)
    setup.engine.check()


@pytest.mark.skipif(not builds(), reason="no native forward was built for this processor")
@pytest.mark.parametrize("max_batch_tokens", [20, 400])
def test_the_native_forward_answers_for_all_tasks_at_once(
    setup: Setup, max_batch_tokens: int
) -> None:
    observed = Observed()
    backend = NativeBackend(setup.backbone.config, setup.backbone.tensors, "fp32", threads=1)
    plans = PlanCache[NativePlan](backend, 1 << 30, Heard())
    limits = {**LIMITS, "max_batch_tokens": max_batch_tokens, "max_queued_tokens": 9000}
    engine = Engine(backend, plans, observed, **limits)
    overlay = setup.tasks[0].overlay
    assert overlay.head is not None
    head = LinearHead(overlay.head.weight * 3e38, overlay.head.bias)
    huge = Servable("huge", "huge", dataclasses.replace(overlay, head=head))
    for _ in range(2):
        refused = engine.submit(huge, setup.encode(TEXTS))
        answers = [
            (servable, engine.submit(servable, setup.encode(TEXTS))) for servable in _own(setup)
        ]
        for servable, answer in answers:
            np.testing.assert_allclose(
                answer.result(30).probabilities,
                setup.expected(servable.overlay, TEXTS),
                atol=1e-5,
                rtol=1e-5,
            )
        with pytest.raises(EngineError, match="no finite answer"):
            refused.result(30)
        assert plans.settle() == 5
    engine.close()
    plans.close()
    assert sum(sum(counts.values()) for counts, _ in observed.batches) == 2 * 5 * len(TEXTS)
    longest = max(len(item.token_ids) for item in setup.encode(TEXTS)) + 3
    assert all(tokens <= max(max_batch_tokens, longest) for _, tokens in observed.batches)
