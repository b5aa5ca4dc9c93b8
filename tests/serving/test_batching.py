"""The policy of the next batch: budget, turns, order; laws over any queue."""

from hypothesis import given
from hypothesis import strategies as st

from serving.batching import TURN_TOKENS, FairQueue, Waiting

Arrivals = list[tuple[str, int]]
arrivals = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 600)), max_size=60)


def _filled(items: Arrivals) -> FairQueue[int]:
    queue: FairQueue[int] = FairQueue()
    for number, (task, tokens) in enumerate(items):
        queue.push(task, Waiting(tokens, number))
    return queue


@given(arrivals, st.integers(1, 2000))
def test_everything_is_taken_once_and_within_the_budget(items: Arrivals, budget: int) -> None:
    queue = _filled(items)
    seen: list[int] = []
    while len(queue):
        batch = queue.take(budget)
        assert batch
        assert len(batch) == 1 or sum(waiting.tokens for waiting in batch) <= budget
        seen += [waiting.work for waiting in batch]
        assert queue.tokens == sum(items[i][1] for i in range(len(items)) if i not in set(seen))
    assert sorted(seen) == list(range(len(items)))


@given(arrivals, st.integers(1, 2000))
def test_a_task_is_answered_in_order_of_arrival(items: Arrivals, budget: int) -> None:
    queue = _filled(items)
    order: list[int] = []
    while len(queue):
        order += [waiting.work for waiting in queue.take(budget)]
    for task in "abcd":
        mine = [number for number in order if items[number][0] == task]
        assert mine == sorted(mine)


@given(st.integers(1, 300), st.integers(1, 64))
def test_a_flood_of_one_task_delays_another_by_at_most_one_batch(flood: int, tokens: int) -> None:
    queue = _filled([("flood", tokens)] * flood)
    budget = 2 * TURN_TOKENS
    queue.take(budget)
    queue.push("other", Waiting(tokens, -1))
    following = queue.take(budget) + queue.take(budget)
    assert -1 in [waiting.work for waiting in following]


@given(arrivals)
def test_what_is_dropped_is_gone_and_the_rest_stays(items: Arrivals) -> None:
    queue = _filled(items)
    queue.drop(lambda number: number % 2 == 0)
    kept = [number for number in range(len(items)) if number % 2]
    assert queue.tokens == sum(items[number][1] for number in kept)
    assert sorted(waiting.work for waiting in queue.take(10**9)) == kept
    assert queue.tokens == 0


def test_nothing_waiting_gives_an_empty_batch() -> None:
    assert FairQueue[int]().take(100) == []
