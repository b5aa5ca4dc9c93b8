"""The policy of the next batch: budget, turns, weights, order; laws over any queue."""

import itertools
import random
import statistics
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from serving.batching import TASK_SLACK_TOKENS, TURN_TOKENS, FairQueue, Part, Request

LONGEST = 600
MOST = TURN_TOKENS - 1 + LONGEST
"""Tokens of the longest turn: it was not over before its last sequence."""
WEIGHTS = {"k": 1.0, "l": 0.5, "m": 3.0}
TASKS = "abc"

Arrival = tuple[str, str, list[int]]
"""Key, task, and the tokens of each sequence."""
arrival = st.tuples(
    st.sampled_from("klm"),
    st.sampled_from(TASKS),
    st.lists(st.integers(1, LONGEST), min_size=1, max_size=4),
)
arrivals = st.lists(arrival, max_size=40)


def _part(key: str, task: str, lengths: list[int], number: int) -> Part[int]:
    return Part(Request(key, WEIGHTS[key], 0.0), task, lengths, number)


def _filled(items: list[Arrival]) -> FairQueue[int]:
    queue: FairQueue[int] = FairQueue()
    for number, (key, task, lengths) in enumerate(items):
        queue.push(_part(key, task, lengths, number))
    return queue


def _batches(queue: FairQueue[int], budget: int) -> list[list[tuple[Part[int], int]]]:
    batches = []
    while batch := queue.take(budget):
        batches.append(batch)
    return batches


@given(arrivals, st.integers(1, 2000))
def test_everything_is_taken_once_and_within_the_budget(items: list[Arrival], budget: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for batch in _batches(_filled(items), budget):
        assert len(batch) == 1 or sum(part.lengths[at] for part, at in batch) <= budget
        seen.update((part.work, at) for part, at in batch)
    assert seen == Counter(
        (number, at) for number, item in enumerate(items) for at in range(len(item[2]))
    )


@given(arrivals, st.integers(1, 2000))
def test_a_task_of_a_key_is_answered_in_order_of_arrival(items: list[Arrival], budget: int) -> None:
    order: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for batch in _batches(_filled(items), budget):
        for part, at in batch:
            order.setdefault((part.request.key, part.task), []).append((part.work, at))
    for one in order.values():
        assert one == sorted(one)


@given(st.integers(1, 300), st.integers(1, 64))
def test_a_flood_delays_another_key_by_at_most_one_batch(flood: int, tokens: int) -> None:
    queue = _filled([("k", "a", [tokens])] * flood)
    budget = 2 * TURN_TOKENS
    queue.take(budget)
    queue.push(_part("m", "a", [tokens], -1))
    following = queue.take(budget) + queue.take(budget)
    assert -1 in [part.work for part, _ in following]


@given(st.integers(1, 300), st.integers(1, 64))
def test_a_flood_delays_another_task_by_the_slack_and_a_batch(flood: int, tokens: int) -> None:
    queue = _filled([("k", "a", [tokens])] * flood)
    budget = 2 * TURN_TOKENS
    queue.take(budget)
    queue.push(_part("k", "b", [tokens], -1))
    taken, batch = 0, queue.take(budget)
    while -1 not in [part.work for part, _ in batch]:
        taken += sum(part.lengths[at] for part, at in batch)
        assert taken <= TASK_SLACK_TOKENS + budget
        batch = queue.take(budget)


def test_tasks_that_are_asked_alike_wait_alike() -> None:
    """A closed loop of 64 over eleven tasks: nobody waits for two rounds of what there is."""
    dice = random.Random(0)
    queue: FairQueue[float] = FairQueue()
    taken, numbers = 0.0, itertools.count()
    waits = []

    def push() -> None:
        tokens = max(8, round(dice.gauss(35, 14)))
        task = f"task-{next(numbers) % 11}"
        queue.push(Part(Request("k", 1.0, 0.0), task, [tokens], taken))

    for _ in range(64):
        push()
    for _ in range(1500):
        batch = queue.take(512)
        taken += sum(part.lengths[at] for part, at in batch)
        waits += [taken - part.work for part, _ in batch]
        for _ in batch:
            push()
    cuts = statistics.quantiles(waits, n=100)
    assert cuts[98] <= 2 * cuts[49]


takes = st.integers(1, 2000)
leaves = st.tuples(st.just("leave"), st.integers(2, 5))


@dataclass
class Bounded:
    """A queue, and for all that waits in it the tokens after which it must have been taken."""

    queue: FairQueue[int] = field(default_factory=FairQueue)
    total: int = 0  # taken until now
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)  # tokens that wait
    parts: dict[int, Part[int]] = field(default_factory=dict)
    bounds: dict[int, float] = field(default_factory=dict)

    def push(self, number: int, key: str, task: str, lengths: list[int]) -> None:
        part = _part(key, task, lengths, number)
        ahead = self.lines[key, task] + sum(lengths[:-1])
        of_key = ahead + (len(TASKS) - 1) * (ahead + 2 * MOST + TASK_SLACK_TOKENS)
        others = sum(
            weight / WEIGHTS[key] * (of_key + MOST) + MOST
            for other, weight in WEIGHTS.items()
            if other != key
        )
        self.bounds[number] = self.total + of_key + others
        self.queue.push(part)
        self.parts[number] = part
        self.lines[key, task] += sum(lengths)

    def leave(self, divisor: int) -> None:
        for number in [number for number in self.parts if number % divisor == 0]:
            part = self.parts.pop(number)
            self.lines[part.request.key, part.task] -= sum(part.lengths[part.taken :])
            self.queue.remove(part)

    def take(self, budget: int) -> None:
        for part, at in self.queue.take(budget):
            if at == len(part.lengths) - 1:
                assert self.total <= self.bounds[part.work]
                del self.parts[part.work]
            self.total += part.lengths[at]
            self.lines[part.request.key, part.task] -= part.lengths[at]


@given(st.lists(arrival | takes | leaves, max_size=100))
def test_nothing_starves_whatever_arrives(events: list[Arrival | int | tuple[str, int]]) -> None:
    """What is taken before the last sequence of a part that has just come, whoever else comes.

    Of its own task: what waited. Of each other task of its key: as much, the slack, one turn that
    this task is behind by, and one more that began before. Of each other key: as much as of its own
    key in the proportion of the weights, and again the two turns, the first in proportion too.
    """
    bounded = Bounded()
    for number, event in enumerate([*events, *[512] * 400]):
        if isinstance(event, int):
            bounded.take(event)
        elif len(event) == 2:
            bounded.leave(event[1])
        else:
            bounded.push(number, *event)
    assert not bounded.parts, "everything was taken in the end"
    assert not bounded.queue._keys._seats, "and leaves nothing behind"


@given(
    st.dictionaries(st.sampled_from("klm"), st.integers(20, LONGEST), min_size=2),
    st.integers(1, 3 * TURN_TOKENS),
    st.integers(1, 60),
)
def test_busy_keys_are_served_in_proportion_to_their_weights(
    lengths: dict[str, int], budget: int, batches: int
) -> None:
    """Two keys that always have something waiting are never further apart than a turn of each."""
    queue: FairQueue[int] = FairQueue()
    served = dict.fromkeys(lengths, 0)
    for key, tokens in lengths.items():
        for number in range(2 + (budget + MOST) // tokens):
            queue.push(_part(key, TASKS[number % 2], [tokens], number))
    for _ in range(batches):
        for part, _ in queue.take(budget):
            key = part.request.key
            served[key] += part.lengths[0]
            queue.push(_part(key, part.task, part.lengths, part.work))
        for one in lengths:
            for other in lengths:
                apart = served[one] / WEIGHTS[one] - served[other] / WEIGHTS[other]
                assert apart <= MOST / WEIGHTS[one] + MOST / WEIGHTS[other] + 1e-6


@given(st.integers(20, LONGEST), st.integers(1, LONGEST), st.integers(1, 3 * TURN_TOKENS))
def test_nobody_gains_by_coming_and_going(steady: int, coming: int, budget: int) -> None:
    """A key that never has more than one sequence waiting gets no more than its weight says."""
    queue: FairQueue[int] = FairQueue()
    for number in range(2 + (budget + MOST) // steady):
        queue.push(_part("k", "a", [steady], number))
    served = {"k": 0, "l": 0}
    for _ in range(60):
        if queue._keys._seats.get("l") is None or not queue._keys.find("l").peek():
            queue.push(_part("l", "a", [coming], -1))
        for part, _ in queue.take(budget):
            key = part.request.key
            served[key] += part.lengths[0]
            if key == "k":
                queue.push(_part(key, part.task, part.lengths, part.work))
        apart = served["l"] / WEIGHTS["l"] - served["k"] / WEIGHTS["k"]
        assert apart <= MOST / WEIGHTS["l"] + MOST / WEIGHTS["k"]


@given(st.integers(1, LONGEST), st.integers(1, 3 * TURN_TOKENS))
def test_a_task_that_never_runs_dry_leaves_others_their_turns(tokens: int, budget: int) -> None:
    """Also where a batch is smaller than a turn, which then lasts for several batches."""
    queue = _filled([("k", "a", [tokens])] * 3)
    queue.push(_part("k", "b", [1], -1))
    taken = 0
    while taken <= TASK_SLACK_TOKENS + TURN_TOKENS + LONGEST:
        batch = queue.take(budget)
        if -1 in [part.work for part, _ in batch]:
            break
        taken += sum(part.lengths[at] for part, at in batch)
        for part, _ in batch:
            queue.push(_part("k", "a", part.lengths, part.work))
    else:
        raise AssertionError(f"{taken} tokens of one task, and not one of the other")


@given(arrivals, st.integers(0, 2000))
def test_what_is_removed_is_gone_and_the_rest_stays(items: list[Arrival], first: int) -> None:
    queue: FairQueue[int] = FairQueue()
    parts = [_part(*item, number) for number, item in enumerate(items)]
    for part in parts:
        queue.push(part)
    seen = {(part.work, at) for part, at in queue.take(first)} if first else set()
    for part in parts[::2]:
        queue.remove(part)
        queue.remove(part)
        assert not part.waits
    rest = [(part.work, at) for part, at in queue.take(10**9)]
    assert not any(number % 2 == 0 for number, _ in rest)
    assert {*rest, *seen} >= {
        (part.work, at) for part in parts[1::2] for at in range(len(part.lengths))
    }
    assert len(rest) == len({*rest} - seen)


@given(arrivals, st.integers(1, 2000), st.integers(2, 4))
def test_what_is_found_gone_takes_no_place_in_the_batch(
    items: list[Arrival], budget: int, divisor: int
) -> None:
    queue = _filled(items)
    gone: set[int] = set()

    def is_gone(part: Part[int]) -> bool:
        if part.work % divisor:
            return False
        queue.remove(part)
        gone.add(part.work)
        return True

    seen: set[int] = set()
    while batch := queue.take(budget, is_gone):
        assert len(batch) == 1 or sum(part.lengths[at] for part, at in batch) <= budget
        seen |= {part.work for part, _ in batch}
    assert gone == set(range(0, len(items), divisor))
    assert seen == set(range(len(items))) - gone


def test_nothing_waiting_gives_an_empty_batch() -> None:
    assert FairQueue[int]().take(100) == []
