"""A backend without numbers, whose plans are as large as a test says, and one that listens."""

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from model_store.artifact import Overlay
from model_store.native_weights import Precision
from model_store.packing import Item

Parts = Mapping[Hashable, int]


class Heard:
    """Collects what a `PlanCache` tells."""

    def __init__(self) -> None:
        self.lookups: list[str] = []
        self.built: list[float] = []
        self.evicted = 0
        self.sizes: list[int] = []

    def plan_lookup(self, result: str) -> None:
        self.lookups.append(result)

    def plan_built(self, seconds: float) -> None:
        self.built.append(seconds)

    def plan_evicted(self) -> None:
        self.evicted += 1

    def plan_bytes(self, size: int) -> None:
        self.sizes.append(size)


@dataclass(frozen=True, eq=False)
class FakePlan:
    """Knows what it is of, and its parts."""

    task: str
    is_warm: bool
    parts: Parts


class FakeBackend:
    """Plans of tasks by name: an overlay stands for its task alone.

    `warm` waits while `door` is shut, and fails for tasks in `broken`.
    """

    precision: Precision = "fp32"
    name = "fake"
    warm_up_lengths: Sequence[int] = ()

    def __init__(self, ready: Mapping[str, Parts], more: Mapping[str, Parts]) -> None:
        """Parts of a task's ready plan, and those that its warm plan has besides."""
        self.ready = ready
        self.more = more
        self.door = threading.Event()
        self.door.set()
        self.entered = threading.Event()
        self.broken: set[str] = set()
        self.planned: list[str] = []
        self.warmed: list[str] = []

    def plan(self, overlay: Overlay) -> FakePlan:
        task = overlay.manifest.task
        self.planned.append(task)
        return FakePlan(task, False, dict(self.ready[task]))

    def warm(self, plan: FakePlan) -> FakePlan:
        self.entered.set()
        assert self.door.wait(30), "nobody opened the door"
        self.warmed.append(plan.task)
        if plan.task in self.broken:
            raise RuntimeError("broken on purpose")
        return FakePlan(plan.task, True, {**plan.parts, **self.more[plan.task]})

    def answer(self, items: Sequence[Item], plans: Sequence[FakePlan]) -> list[NDArray[Any]]:
        raise NotImplementedError
