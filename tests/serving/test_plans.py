"""Which plans are warm and which are let go; what the cache tells, and that no memory is lost."""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.artifact import Overlay
from serving.plans import PlanCache
from tests.serving.fake_plans import FakeBackend, FakePlan, Heard, Parts


class Cache:
    """A cache over a fake backend; a task's name is its digest."""

    def __init__(self, ready: dict[str, Parts], more: dict[str, Parts], budget: int) -> None:
        self.backend = FakeBackend(ready, more)
        self.heard = Heard()
        self.plans = PlanCache[FakePlan](self.backend, budget, self.heard)

    def get(self, task: str) -> FakePlan:
        # The cache hands overlays to the backend and never looks inside.
        overlay = SimpleNamespace(manifest=SimpleNamespace(task=task))
        return self.plans.get(task, cast(Overlay, overlay))

    def settle(self, *tasks: str) -> int:
        """Ask these in turn, each when the one before is warm."""
        for task in tasks:
            self.get(task)
            self.plans.settle()
        return self.plans.settle()

    def warm(self, tasks: Sequence[str]) -> list[str]:
        """Those that are warm, found without asking for them."""
        return [task for task in tasks if task in self.plans._warm]

    def close(self) -> None:
        self.backend.door.set()
        self.plans.close()


Make = Callable[..., Cache]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes caches of tasks `a` to `e` of 10 bytes, 100 when warm; closes them afterwards."""
    caches: list[Cache] = []

    def make_one(budget: int = 1000, **sizes: Any) -> Cache:
        ready: dict[str, Parts] = {task: {task: 10} for task in "abcde"}
        more: dict[str, Parts] = {task: {f"{task} warm": 90} for task in "abcde"} | sizes
        caches.append(Cache(ready, more, budget))
        return caches[-1]

    yield make_one
    for cache in caches:
        cache.close()


def test_a_plan_is_ready_at_once_and_warm_later(make: Make) -> None:
    cache = make()
    cache.backend.door.clear()
    first = cache.get("a")
    assert cache.backend.entered.wait(30)
    assert not first.is_warm
    assert cache.get("a") is first, "while the builder is at it"
    assert not cache.get("b").is_warm, "others do not wait for it either"
    cache.backend.door.set()
    assert cache.plans.settle() == 2
    warm = cache.get("a")
    assert warm.is_warm
    assert cache.get("a") is warm
    assert cache.backend.planned == ["a", "b"], "each was made ready once"
    assert cache.backend.warmed == ["a", "b"], "and warm once, however often it was asked"


@pytest.mark.parametrize("what", ["plan_lookup", "plan_built", "plan_bytes", "plan_evicted"])
def test_a_failing_observer_stops_no_plan(
    make: Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*figures: object) -> None:
        raise OSError(28, "no space left")

    cache = make(budget=250)
    monkeypatch.setattr(cache.heard, what, fail)
    for task in "abcabcbcc":  # c more often than what it takes the place of
        cache.get(task)
        cache.plans.settle()
    assert cache.get("c").is_warm
    assert cache.backend.warmed == ["a", "b", "c"]


def test_the_observer_hears_everything(make: Make) -> None:
    cache = make(budget=250)
    cache.backend.door.clear()
    cache.get("a")
    assert cache.backend.entered.wait(30)
    cache.get("a")
    assert cache.heard.lookups == ["miss", "miss"]
    assert cache.heard.built == []
    assert cache.heard.sizes[-1] == 10
    cache.backend.door.set()
    cache.settle("b")
    assert len(cache.heard.built) == 2
    assert all(seconds > 0 for seconds in cache.heard.built)
    assert cache.heard.sizes[-1] == 200
    cache.get("a")
    assert cache.heard.lookups == ["miss", "miss", "miss", "hit"]
    assert cache.heard.evicted == 0
    cache.settle("c", "c")  # `b` was asked once, and there is room for two
    assert cache.heard.evicted == 1
    assert cache.heard.sizes[-1] == cache.plans.bytes == 210


def test_the_least_recently_used_plan_is_cooled_first(make: Make) -> None:
    cache = make(budget=330)  # three warm and others ready
    cache.settle(*"abc")
    cache.get("a")  # `b` is now the one that was not used for longest
    cache.settle("d", "d")
    assert cache.warm("abcd") == ["a", "c", "d"]
    assert not cache.get("b").is_warm
    assert cache.backend.planned == list("abcd"), "it stayed ready"


def test_a_task_asked_once_pushes_out_none_that_is_asked_often(make: Make) -> None:
    cache = make(budget=250)
    cache.settle(*"ab" * 10)
    assert cache.warm("ab") == ["a", "b"]
    for task in "cde" * 3:
        assert not cache.get(task).is_warm
        assert cache.settle() == 2
    assert cache.warm("abcde") == ["a", "b"]
    assert cache.heard.evicted == 0
    # Asked more often than the least recently used of them, it takes its place.
    cache.settle(*"c" * 10)
    assert cache.warm("abcde") == ["b", "c"]
    assert cache.heard.evicted == 1


def test_what_is_ready_leaves_its_room_to_what_is_warm(make: Make) -> None:
    cache = make(budget=550, **{task: {task: 10, f"{task} warm": 10} for task in "abcde"})
    ready: dict[str, Parts] = {task: {f"{task} ready": 90} for task in "abcde"}
    cache.backend.ready = ready
    assert cache.settle(*"abcde") == 5, "20 bytes more for each, of 100 that are left"


def test_old_fame_fades(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.plans.HALVE_EVERY", 8)
    cache = make(budget=120)
    cache.settle(*"a" * 15)
    cache.settle(*"b" * 10)  # `a` was asked 15 times, of which after two halvings few are left
    assert cache.warm("ab") == ["b"]


def test_plans_that_share_parts_count_them_once_and_keep_them_for_one_another(make: Make) -> None:
    shared: Parts = {"layer 0": 50, "layer 1": 40}
    cache = make(a=shared, b=shared, c={"layer 0": 50, "c more": 20})
    cache.settle(*"abc")
    assert cache.plans.bytes == 3 * 10 + 50 + 40 + 20
    small = make(budget=150, a=shared, b=shared)
    small.settle(*"ab")
    assert small.plans.bytes == 110
    small.settle(*"ccc")  # 90 more: both must go before the shared parts do
    assert small.warm("abc") == ["c"]
    assert small.plans.bytes == 3 * 10 + 90


def test_a_plan_that_fails_to_get_warm_goes_on_answering(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    cache = make()
    cache.backend.broken = {"a"}
    cache.settle("a", "a", "b", "a")
    assert "could not be made warm" in caplog.text
    assert not cache.get("a").is_warm
    assert cache.get("b").is_warm, "the thread lives on"
    assert cache.backend.warmed == ["a", "b"], "it is not tried at every request"
    assert cache.plans.bytes == 10 + 100


def test_a_plan_too_large_for_the_budget_stays_ready(make: Make) -> None:
    cache = make(budget=250, a={"huge": 300})
    cache.settle("b", "a", "a", "a")
    assert cache.warm("ab") == ["b"], "it pushed out nothing"
    assert cache.backend.warmed == ["b", "a"], "it is not tried at every request"
    assert cache.plans.bytes == 110


def test_ready_plans_alone_may_fill_the_budget_and_the_last_one_stays(make: Make) -> None:
    cache = make(budget=25, **{task: {f"{task} warm": 100} for task in "abcde"})
    assert [cache.get(task).task for task in "abcab"] == list("abcab")
    cache.plans.settle()
    assert cache.plans.bytes == 20
    assert cache.backend.planned == list("abcab"), "the least recently used was made anew"
    tiny = make(budget=5)
    assert [tiny.get(task).task for task in "aab"] == list("aab")
    assert tiny.plans.bytes == 10, "one plan is kept however large"


def test_where_ready_plans_fill_the_budget_one_can_become_warm(make: Make) -> None:
    cache = make(budget=130, e={"e warm": 110})
    cache.backend.broken = set("abcd")  # so that none of these is warm
    cache.settle("e", *"abcd")
    assert cache.warm("abcde") == []
    assert cache.plans.bytes == 40
    cache.settle("e")
    assert cache.warm("abcde") == ["e"]
    assert cache.plans.bytes == 130, "two of the others are left"


def test_a_plan_let_go_while_it_is_made_warm_is_forgotten(make: Make) -> None:
    cache = make(budget=25, a={"a warm": 10})
    cache.backend.door.clear()
    cache.get("a")
    assert cache.backend.entered.wait(30)
    cache.get("b")
    cache.get("c")  # there is room for two
    cache.backend.door.set()
    cache.plans.settle()
    assert cache.warm("abc") == []
    assert cache.plans.bytes == 20


def test_a_forgotten_plan_leaves_nothing_behind(make: Make) -> None:
    cache = make()
    cache.settle(*"aab")
    cache.plans.forget("a")
    assert cache.warm("ab") == ["b"]
    assert cache.plans.bytes == cache.heard.sizes[-1] == 100
    assert set(cache.plans._ready) == {"b"}
    assert cache.plans._asked["a"] == 0
    cache.plans.forget("a")
    cache.plans.forget("never asked")
    assert cache.plans.bytes == 100
    assert not cache.get("a").is_warm, "asked again, it is made again"
    assert cache.settle() == 2


def test_a_plan_forgotten_while_it_is_made_warm_is_dropped(make: Make) -> None:
    cache = make()
    cache.backend.door.clear()
    cache.get("a")
    assert cache.backend.entered.wait(30)
    cache.get("b")
    cache.plans.forget("a")
    cache.plans.forget("b")  # it waits for its turn
    cache.backend.door.set()
    assert cache.settle() == 0
    assert cache.backend.warmed == ["a"]
    assert cache.plans.bytes == 0


def test_a_plan_forgotten_and_asked_again_is_not_given_up_for_the_first(make: Make) -> None:
    cache = make()
    cache.backend.door.clear()
    cache.backend.broken = {"a"}
    cache.get("a")
    assert cache.backend.entered.wait(30)
    cache.plans.forget("a")
    cache.get("a")
    cache.backend.door.set()
    cache.plans.settle()
    cache.backend.broken = set()
    cache.settle("a")
    assert cache.warm("a") == ["a"]


def test_close_ends_the_thread_and_whoever_waits_for_it(make: Make) -> None:
    cache = make()
    thread = cache.plans._thread
    cache.backend.door.clear()
    cache.get("a")
    assert cache.backend.entered.wait(30)
    cache.get("b")
    waiting = threading.Thread(target=cache.plans.settle, daemon=True)
    waiting.start()
    closing = threading.Thread(target=cache.plans.close, daemon=True)
    closing.start()
    waiting.join(30)
    assert not waiting.is_alive()
    cache.backend.door.set()
    closing.join(30)
    assert not thread.is_alive()
    assert not cache.get("b").is_warm, "what is ready answers still"


TASKS = "abcdef"
ready_sizes = st.fixed_dictionaries({task: st.integers(1, 60) for task in TASKS})
parts = st.fixed_dictionaries(
    {
        # What tasks have in common has one size; what is a task's own is named after it.
        task: st.tuples(st.sets(st.sampled_from(["s10", "s25", "s70"])), st.integers(0, 80))
        for task in TASKS
    }
)


asks = st.lists(st.tuples(st.sampled_from(TASKS), st.booleans()), max_size=50)
"""Tasks, and whether their plans are forgotten first."""


@settings(deadline=None, max_examples=150)
@given(ready_sizes, parts, st.integers(20, 400), asks)
def test_the_budget_holds_and_every_byte_is_accounted_for(
    ready: dict[str, int],
    more: dict[str, tuple[set[str], int]],
    budget: int,
    asked: list[tuple[str, bool]],
) -> None:
    first: dict[str, Parts] = {task: {task: size} for task, size in ready.items()}
    besides: dict[str, Parts] = {}
    for task, (shared, own) in more.items():
        sizes: dict[Hashable, int] = {name: int(name[1:]) for name in shared}
        besides[task] = {**sizes, f"{task} warm": own}
    cache = Cache(first, besides, budget)
    try:
        forgotten = 0
        for number, (task, forget) in enumerate(asked):
            if forget:
                forgotten += len(cache.warm([task]))
                cache.plans.forget(task)
            was_warm = bool(cache.warm([task]))
            plan = cache.get(task)
            assert (plan.task, plan.is_warm) == (task, was_warm)
            assert cache.heard.lookups[number] == ("hit" if was_warm else "miss")
            warm = cache.plans.settle()
            held = [*cache.plans._ready.values(), *cache.plans._warm.values()]
            memory: dict[Hashable, int] = {}
            for one in held:
                memory |= one.parts
            assert cache.plans.bytes == sum(memory.values()) == cache.heard.sizes[-1]
            assert cache.plans.bytes <= max(budget, ready[task])
            assert set(cache.plans._warm) <= set(cache.plans._ready)
            assert len(cache.heard.built) - cache.heard.evicted - forgotten == warm
    finally:
        cache.close()
