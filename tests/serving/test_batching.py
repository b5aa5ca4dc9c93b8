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


LONGEST = 600
pushes = st.tuples(st.sampled_from("abcd"), st.integers(1, LONGEST))
takes = st.integers(1, 2000)
drops = st.tuples(st.just("drop"), st.integers(2, 5))


@given(st.lists(pushes | takes | drops, max_size=120))
def test_no_task_starves_whatever_arrives(events: list[tuple[str, int] | int]) -> None:
    """A sequence waits for what its task had waiting, and for a turn of each other task per turn.

    Its task takes TURN_TOKENS at least in a turn, and so comes to it in one of the next
    `waiting // TURN_TOKENS + 1` turns. Before each of them, every other task has one turn at most,
    in which it takes less than TURN_TOKENS and then one sequence more.
    """
    queue: FairQueue[int] = FairQueue()
    total = 0  # tokens taken until now
    own: dict[str, int] = dict.fromkeys("abcd", 0)
    waiting: dict[int, tuple[str, int]] = {}
    bounds: dict[int, int] = {}
    others = len(own) - 1
    for number, event in enumerate([*events, *[512] * 200]):
        if isinstance(event, tuple) and event[0] == "drop":
            gone = {work for work in waiting if work % event[1] == 0}
            queue.drop(gone.__contains__)
            for work in gone:
                task, tokens = waiting.pop(work)
                own[task] -= tokens
        elif isinstance(event, tuple):
            task, tokens = event
            turns = own[task] // TURN_TOKENS + 1
            most_of_others = turns * others * (TURN_TOKENS - 1 + LONGEST)
            bounds[number] = total + own[task] + most_of_others
            queue.push(task, Waiting(tokens, number))
            waiting[number] = event
            own[task] += tokens
        else:
            for one in queue.take(event):
                assert total <= bounds[one.work]
                task, tokens = waiting.pop(one.work)
                total += tokens
                own[task] -= tokens
    assert not waiting, "everything was taken in the end"


@given(st.integers(1, LONGEST), st.integers(1, 3 * TURN_TOKENS))
def test_a_task_that_never_runs_dry_leaves_others_their_turns(tokens: int, budget: int) -> None:
    """Also where a batch is smaller than a turn, which then lasts for several batches."""
    queue = _filled([("flood", tokens)] * 3)
    queue.push("other", Waiting(1, -1))
    taken = 0
    while taken <= TURN_TOKENS + LONGEST:
        batch = queue.take(budget)
        if -1 in [waiting.work for waiting in batch]:
            break
        taken += sum(waiting.tokens for waiting in batch)
        for waiting in batch:
            queue.push("flood", waiting)
    else:
        raise AssertionError(f"{taken} tokens of one task, and not one of the other")


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
