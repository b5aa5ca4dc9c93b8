"""Who may wait and who gives way: laws over any arrivals, in a made-up time that tests control."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.admission import Admission, Limits
from serving.batching import Part, Request
from serving.errors import (
    DeadlineError,
    OverloadedError,
    RateLimitedError,
    ServingError,
    TooLargeError,
)

LIMITS = Limits(batch_tokens=1000, queued_tokens=50_000, queued_s=2.0)
RATE = 10_000.0


@dataclass
class Server:
    """An engine without threads: a batch at a time, in made-up time, at a speed that may change."""

    limits: Limits = LIMITS
    rate: float = RATE
    now: float = 0.0
    busy_until: float = 0.0
    slowest: float = RATE
    batch: list[tuple[Part[int], int]] = field(default_factory=list)
    waited: dict[int, float] = field(default_factory=dict)
    """Queue time of what was answered."""
    began: dict[int, float] = field(default_factory=dict)
    """Queue time until the first forward."""
    late: dict[int, ServingError] = field(default_factory=dict)
    """What was admitted and refused after all."""
    served: Counter[str] = field(default_factory=Counter)
    """Tokens by key."""

    def __post_init__(self) -> None:
        self.admission: Admission[int] = Admission(self.limits)

    def ask(
        self,
        number: int,
        *lengths: int,
        key: str = "",
        weight: float = 1.0,
        task: str = "a",
        deadline: float | None = None,
    ) -> Part[int]:
        """One request; raises what it is refused with."""
        part = Part(Request(key, weight, self.now, deadline), task, list(lengths), number)
        for refused in self.admission.admit([part], self.now):
            for other in refused.parts:
                assert not other.waits
                self.late[other.work] = refused.error
        return part

    def run_until(self, time: float) -> None:
        """Take and answer batches until then."""
        while True:
            if self.busy_until <= self.now:
                self._finish()
                self._begin()
            if not self.batch or self.busy_until > time:
                self.now = max(self.now, time)
                return
            self.now = self.busy_until

    @property
    def longest_s(self) -> float:
        """What a wait is at most: what is allowed, and a full batch at the lowest speed."""
        return self.limits.queued_s + self.limits.batch_tokens / self.slowest + 1e-9

    def _begin(self) -> None:
        self.batch, refused = self.admission.take(self.now)
        for one in refused:
            for part in one.parts:
                assert not part.waits
                self.late[part.work] = one.error
        for part, _ in self.batch:
            self.waited[part.work] = self.now - part.request.submitted - part.forward_s
            self.began.setdefault(part.work, self.waited[part.work])
        tokens = sum(part.lengths[index] for part, index in self.batch)
        self.busy_until = self.now + tokens / self.rate
        self.slowest = min(self.slowest, self.rate)

    def _finish(self) -> None:
        self.admission.answered(self.now)
        for part in dict.fromkeys(part for part, _ in self.batch):
            part.forward_s += self.now - (self.busy_until - self._duration())
        for part, index in self.batch:
            self.served[part.request.key] += part.lengths[index]
        self.batch = []

    def _duration(self) -> float:
        return sum(part.lengths[index] for part, index in self.batch) / self.rate


def _warm(limits: Limits = LIMITS, rate: float = RATE) -> Server:
    """A server whose rate is known, with nothing to do."""
    server = Server(limits, rate)
    server.ask(-1, *[limits.batch_tokens // 10] * 10)
    server.run_until(100.0)
    assert server.admission.capacity == min(limits.queued_tokens, rate * limits.queued_s)
    return server


def _flood(
    server: Server, key: str, *, weight: float = 1.0, first: int = 0
) -> tuple[int, OverloadedError]:
    """Ask for 50 tokens until the server refuses; how often it did not, and with what it did."""
    for count in range(10_000):
        try:
            server.ask(first + count, 50, key=key, weight=weight)
        except OverloadedError as refused:
            return count, refused
    raise AssertionError("nothing was refused")


# --- one key --------------------------------------------------------------------------------------


def test_one_key_may_use_everything_and_is_then_told_that_the_server_is_full() -> None:
    server = _warm()
    count, refused = _flood(server, "k")
    assert count * 50 == 2.0 * RATE
    assert type(refused) is OverloadedError
    assert "20000 tokens are waiting" in str(refused)
    assert refused.retry_after_s == 1


def test_before_a_rate_is_known_nothing_is_refused_for_time() -> None:
    server = Server()
    assert _flood(server, "k")[0] * 50 == LIMITS.queued_tokens


def test_few_tokens_tell_no_rate() -> None:
    server = Server()
    for second in range(100):
        server.ask(second, 30)
        server.run_until(second + 1.0)
    assert server.admission.capacity == LIMITS.queued_tokens


def test_one_slow_batch_moves_the_rate_a_little() -> None:
    server = _warm()
    server.rate = RATE / 100
    server.ask(0, *[100] * 10)
    server.run_until(server.now + 100)
    assert server.admission.capacity == pytest.approx(2.0 * RATE * (1 - 0.99 / 16))


def test_a_slow_spell_leaves_room_for_a_batch_and_so_is_forgotten() -> None:
    server = Server(rate=10.0)
    server.ask(-1, *[100] * 10)
    server.run_until(200.0)
    assert server.admission.capacity == LIMITS.batch_tokens
    server.rate = RATE
    for batch in range(100):
        server.ask(batch, *[100] * 10)
        server.run_until(201.0 + batch)
    assert server.admission.capacity == pytest.approx(2.0 * RATE, rel=0.01)


def test_a_request_larger_than_what_may_wait_for_time_is_answered_on_a_quiet_server() -> None:
    server = _warm()
    server.ask(0, *[400] * 100)
    server.run_until(110.0)
    assert server.waited[0] == pytest.approx(0.0)
    with pytest.raises(TooLargeError, match="50001 tokens; one request may have 50000"):
        server.ask(1, 50_001)


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(0, 100))
def test_who_comes_again_when_told_is_admitted(tokens: int, others: int, elapsed: int) -> None:
    server = _warm()
    with suppress(OverloadedError):
        for number in range(10_000):
            server.ask(number, *[others] * 2)
    server.run_until(server.now + elapsed / 100)
    try:
        server.ask(-2, tokens)
    except OverloadedError as refused:
        server.run_until(server.now + refused.retry_after_s)
        assert server.ask(-3, tokens).waits


def test_the_time_told_counts_the_batch_under_way() -> None:
    server = _warm()
    server.ask(0, *[100] * 10)
    server.run_until(server.now)
    for number in range(1, 35):
        server.ask(number, 600)
    with pytest.raises(OverloadedError) as refused:
        server.ask(-2, *[400] * 99)  # 10,000 too many: a second, and what is left of the batch
    assert refused.value.retry_after_s == 2
    server.run_until(server.now + 2)
    assert server.ask(-3, *[400] * 99).waits


@given(
    st.lists(
        st.tuples(st.floats(0, 0.2), st.lists(st.integers(1, 600), min_size=1, max_size=5)),
        max_size=150,
    )
)
def test_at_a_steady_rate_whoever_is_admitted_is_answered_in_time(
    arrivals: list[tuple[float, list[int]]],
) -> None:
    """One task of one key: the estimate holds, and nothing that was admitted is refused later."""
    server = _warm(Limits(1000, 50_000, 0.3))
    admitted = 0
    for number, (gap, lengths) in enumerate(arrivals):
        server.run_until(server.now + gap / 4)
        try:
            server.ask(number, *lengths)
            admitted += 1
        except OverloadedError:
            assert server.admission.tokens >= server.admission.capacity
    server.run_until(server.now + 1000)
    assert server.late == {}
    assert len(server.waited) == 1 + admitted
    assert max(server.waited.values()) <= server.longest_s


# --- several keys ---------------------------------------------------------------------------------


def test_a_key_within_its_share_is_admitted_and_the_newest_of_who_has_most_give_way() -> None:
    server = _warm()
    admitted, _ = _flood(server, "k")
    server.ask(1000, 50, key="l")
    assert list(server.late) == [admitted - 1]
    assert _flood(server, "l", first=1001)[0] == 199
    assert sorted(server.late) == list(range(admitted - 200, admitted)), "one for one, newest first"
    assert all(isinstance(error, RateLimitedError) for error in server.late.values())
    for number, key in enumerate("kl"):
        with pytest.raises(RateLimitedError, match="share of 10000"):
            server.ask(-2 - number, 50, key=key)
    # The third gets a third, and both others give.
    assert _flood(server, "m", first=2000)[0] == 20_000 // 3 // 50
    gave = Counter("l" if number >= 1000 else "k" for number in server.late)
    assert abs(gave["k"] - 200 - gave["l"]) <= 1


def test_who_is_furthest_over_its_share_gives_way_first() -> None:
    server = Server()
    for number in range(330):
        server.ask(number, 100, key="k")
    for number in range(1000, 1170):
        server.ask(number, 100, key="l")
    for number in range(2000, 2010):
        server.ask(number, 100, key="m")
    assert sorted(server.late) == list(range(320, 330)), "all of k's, though l is over, too"
    heavy = Server()
    for number in range(330):
        heavy.ask(number, 100, key="k", weight=4.0)
    for number in range(1000, 1170):
        heavy.ask(number, 100, key="l")
    heavy.ask(2000, 100, key="m", weight=2.0)
    assert list(heavy.late) == [1169], "it has less than k, but more for its weight"


def test_shares_go_by_weight() -> None:
    server = _warm()
    _flood(server, "k")
    count, refused = _flood(server, "m", weight=3.0, first=2000)
    assert count == 15_000 // 50
    assert isinstance(refused, RateLimitedError)


def test_no_key_loses_what_lies_within_its_share() -> None:
    server = _warm()
    server.ask(0, *[400] * 100, key="k")
    server.ask(1, 50, key="l")
    assert server.late == {}, "the one request of k is more than it may lose"
    with pytest.raises(RateLimitedError):
        server.ask(2, 50, key="k")


def test_the_bound_on_tokens_is_kept_also_where_nobody_can_give_way() -> None:
    server = _warm()
    server.ask(0, *[500] * 100, key="k")
    with pytest.raises(OverloadedError, match="no room for 50 more") as refused:
        server.ask(1, 50, key="l")
    assert type(refused.value) is OverloadedError, "it is within its share"
    server.run_until(server.now + 0.001)
    server.ask(2, 50, key="l")


def test_a_refused_request_of_several_parts_leaves_nothing_behind() -> None:
    server = _warm()
    _flood(server, "k")
    before = server.admission.tokens
    with pytest.raises(RateLimitedError):
        server.admission.admit(_parts(Request("l", 1.0, server.now), 9000), server.now)
    assert server.admission.tokens == before
    assert server.late == {}


def test_a_part_may_leave_alone() -> None:
    server = _warm()
    one, other = parts = _parts(Request("l", 1.0, server.now), 900)
    server.admission.admit(parts, server.now)
    server.admission.remove(one)
    assert (one.waits, other.waits) == (False, True)
    assert server.admission.tokens == 900


def _parts(request: Request, tokens: int) -> list[Part[int]]:
    return [Part(request, task, [tokens], ord(task)) for task in "ab"]


def _busy(server: Server, keys: dict[str, tuple[float, float]], seconds: float) -> Iterator[float]:
    """Every 10 ms each key asks what (weight, tokens a second) says, however it is refused."""
    number = 0
    for _ in range(round(seconds * 100)):
        for key, (weight, rate) in keys.items():
            for _ in range(round(rate / 100 / 40)):
                number += 1
                with suppress(OverloadedError):
                    server.ask(number, 40, key=key, weight=weight, task="ab"[number % 2])
        yield server.now
        server.run_until(server.now + 0.01)


def test_under_ten_times_the_load_keys_get_what_their_weights_say() -> None:
    server = _warm()
    for _ in _busy(server, {"k": (1.0, 5 * RATE), "l": (3.0, 5 * RATE)}, 20.0):
        pass
    assert server.served["l"] / server.served["k"] == pytest.approx(3.0, rel=0.03)
    assert sum(server.served.values()) == pytest.approx(20.0 * RATE, rel=0.02), "never idle"


def test_a_flood_of_one_key_is_not_felt_by_another() -> None:
    server = _warm()
    asked = 0
    for now in _busy(server, {"k": (1.0, 10 * RATE)}, 20.0):
        if round(now * 100) % 20 == 0:
            asked += 1
            server.ask(-10 - asked, 30, key="l")
    server.run_until(1000.0)
    light = [number for number in server.waited if number <= -11]
    assert len(light) == asked
    assert max(server.waited[number] for number in light) <= 0.2, "two batches"


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "tasks", "longest"), [(1, 11, 1.0), (128, 11, 1.5), (128, 50, 2.0), (64, 200, 4.0)]
)
def test_ten_times_the_load_is_answered_as_the_load_itself(
    inputs: int, tasks: int, longest: float
) -> None:
    """No forward is for nothing, however many large requests have their turns side by side."""
    limits, rate = Limits(500, 65_536, 2.0), 28_000.0
    server = _warm(limits, rate)
    began, seconds, tokens = server.now, 30.0, 35
    capacity = rate / (inputs * tokens)
    for number in range(round(seconds * capacity * 10)):
        with suppress(OverloadedError):
            server.ask(number, *[tokens] * inputs, task=f"task-{number % tasks}")
        server.run_until(began + (number + 1) / (capacity * 10))
    server.run_until(server.now + 100)
    answered = server.waited.keys() - server.late.keys() - {-1}
    assert len(answered) >= 0.99 * seconds * capacity
    assert max(server.began.values()) <= server.longest_s
    assert max(server.waited[number] for number in answered) <= longest * server.longest_s


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    server = _warm()
    for number in range(200):
        server.ask(number, 50, key="k")
    with pytest.raises(DeadlineError):
        server.ask(-2, 50, key="k", deadline=server.now + 0.9)
    server.ask(-3, 50, key="k", deadline=server.now + 1.1)
    server.ask(-4, 50, key="l", deadline=server.now + 0.1)  # another key's turn comes sooner
    with pytest.raises(DeadlineError):
        server.ask(-5, 50, key="l", deadline=server.now - 0.1)


def test_a_deadline_counts_the_batch_under_way() -> None:
    server = _warm()
    server.ask(0, *[100] * 10)
    server.run_until(server.now + 0.01)
    with pytest.raises(DeadlineError):
        server.ask(1, 50, deadline=server.now + 0.09)
    server.ask(2, 50, deadline=server.now + 0.1)
    server.run_until(server.now + 1.0)
    assert 2 in server.waited


def test_a_deadline_that_has_passed_costs_no_forward() -> None:
    server = Server()
    server.ask(0, *[100] * 10)
    server.run_until(0.0)
    server.ask(1, 50, deadline=0.05)
    server.ask(2, 50, deadline=1.0)
    server.run_until(10.0)
    assert isinstance(server.late[1], DeadlineError)
    assert set(server.waited) == {0, 2}


def test_a_server_that_gets_slower_refuses_what_has_waited_too_long() -> None:
    server = _warm()
    admitted, _ = _flood(server, "k")
    server.rate = RATE / 2
    server.run_until(1000.0)
    assert server.late
    assert all(
        type(error) is OverloadedError and "waited for" in str(error)
        for error in server.late.values()
    )
    assert len(server.late) + len(server.waited) == admitted + 1
    assert max(server.waited.values()) <= server.longest_s


def test_with_one_part_all_of_a_request_is_refused() -> None:
    server = Server()
    server.ask(0, *[100] * 10)
    server.run_until(0.0)
    server.admission.admit(_parts(Request("", 1.0, 0.0, deadline=0.05), 10), 0.0)
    server.run_until(1.0)
    assert set(server.late) == {ord("a"), ord("b")}


# --- laws -----------------------------------------------------------------------------------------

WEIGHTS = {"k": 1.0, "l": 0.5, "m": 3.0}

ask = st.tuples(
    st.sampled_from("klm"),
    st.sampled_from("abc"),
    st.lists(st.integers(1, 600), min_size=1, max_size=6),
    st.none() | st.floats(-0.1, 3.0),
)
wait = st.floats(0.0, 1.0)
leave = st.integers(0, 60)
speed = st.sampled_from([300.0, 3_000.0, 30_000.0]).map(lambda rate: ("speed", rate))
events = st.lists(ask | wait | leave | speed, max_size=120)


class Law:
    """A server at which anything happens, and what must be true of it after every step."""

    def __init__(self) -> None:
        self.server = Server(Limits(1000, 6000, 0.5), rate=3000.0)
        self.parts: dict[int, Part[int]] = {}
        self.left: set[int] = set()

    def waiting(self, key: str) -> int:
        """Tokens of a key that wait, counted anew."""
        return sum(
            sum(part.lengths[part.taken :])
            for part in self.parts.values()
            if part.request.key == key
        )

    def step(self, number: int, event: object) -> None:
        if isinstance(event, float):
            self.server.run_until(self.server.now + event)
        elif isinstance(event, int):
            if event in self.parts and self.parts[event].waits:
                self.server.admission.remove(self.parts[event])
                self.left.add(event)
        elif isinstance(event, tuple) and len(event) == 2:
            self.server.run_until(max(self.server.now, self.server.busy_until))
            self.server.rate = event[1]
        elif isinstance(event, tuple):
            self._ask(number, *event)
        admission = self.server.admission
        assert admission.tokens == sum(self.waiting(key) for key in WEIGHTS)
        assert admission.tokens <= 6000
        active = {key for key in WEIGHTS if self.waiting(key)}
        assert set(admission._accounts) == active
        assert admission._weights == pytest.approx(sum(WEIGHTS[key] for key in active))

    def _ask(
        self, number: int, key: str, task: str, lengths: list[int], within: float | None
    ) -> None:
        admission = self.server.admission
        before = {one: self.waiting(one) for one in WEIGHTS}
        was_late = set(self.server.late)
        tokens = sum(lengths)
        active = {one for one in WEIGHTS if before[one]} | {key}
        of_one = admission.capacity / sum(WEIGHTS[one] for one in active)
        too_many = admission.tokens + tokens > 6000
        full = too_many or admission.tokens >= admission.capacity
        within_share = before[key] + tokens <= of_one * WEIGHTS[key]
        early = admission.saturated(key, WEIGHTS[key])
        deadline = None if within is None else self.server.now + within
        error: ServingError | None = None
        try:
            self.parts[number] = self.server.ask(
                number, *lengths, key=key, weight=WEIGHTS[key], task=task, deadline=deadline
            )
        except (OverloadedError, DeadlineError) as refused:
            error = refused
        if isinstance(error, OverloadedError):
            assert full
            assert too_many or not within_share
            over_share = not within_share and active != {key}
            assert isinstance(error, RateLimitedError) is over_share
            assert error.retry_after_s >= 1
        elif error is None:
            assert early is None, "what is refused unread would have been refused when read"
            assert within_share or not full
        given_way = set(self.server.late) - was_late
        assert not given_way or (full and within_share and number in self.parts)
        for one in WEIGHTS:
            mine = [n for n in given_way if self.parts[n].request.key == one]
            if mine:
                assert before[one] > of_one * WEIGHTS[one]
                assert self.waiting(one) >= of_one * WEIGHTS[one] * (1 - 1e-9)
                kept = [
                    n
                    for n, p in self.parts.items()
                    if p.request.key == one and p.waits and not p.request.begun
                ]
                assert max(kept, default=-1) < min(mine), "the newest give way"
                assert not any(self.parts[n].request.begun for n in mine)


@given(events)
def test_whatever_happens_the_rules_hold_and_nothing_is_lost(happens: list[object]) -> None:
    law = Law()
    for number, event in enumerate(happens):
        law.step(number, event)
    law.server.run_until(law.server.now + 10_000)
    server = law.server
    assert server.admission.tokens == 0
    assert not server.admission._accounts
    for number, part in law.parts.items():
        ends = [number in server.late, number in law.left]
        answered = part.taken == len(part.lengths) and number in server.waited
        assert any([*ends, answered])
        assert sum(ends) <= 1
        if number in server.began:
            assert server.began[number] <= server.longest_s
        if number in server.late and part.request.begun:
            assert isinstance(server.late[number], DeadlineError), "what has begun is finished"


@given(events)
def test_what_is_cleared_is_everything_that_waits(happens: list[object]) -> None:
    law = Law()
    for number, event in enumerate(happens):
        law.step(number, event)
    waiting = {number for number, part in law.parts.items() if part.waits}
    assert {part.work for part in law.server.admission.clear()} == waiting
    assert law.server.admission.tokens == 0
    assert law.server.admission.take(0.0) == ([], [])
