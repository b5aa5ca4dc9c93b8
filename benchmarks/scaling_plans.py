"""The server's plan cache in made-up time: its own code and policy, with plans that are sizes alone
and a thread that builds when it is told to.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from benchmarks.engine_ours import Silent
from benchmarks.scaling_costs import Numbers
from model_store.artifact import Overlay
from model_store.native_weights import Precision
from model_store.packing import Item
from serving.plans import PlanCache


@dataclass(frozen=True)
class PlanSizes:
    """Bytes of a task's plan, as it is and what warmth adds; the budget; and how long it takes."""

    ready_bytes: int
    warm_bytes: int
    budget_bytes: int
    build_s: float = 0.0

    @property
    def room(self) -> int:
        """Warm plans that fit in."""
        return self.budget_bytes // (self.ready_bytes + self.warm_bytes)


@dataclass(frozen=True, eq=False)
class SizedPlan:
    parts: Mapping[Hashable, int]


class Sizes:
    """A backend whose plans are their sizes."""

    precision: Precision = "fp32"
    name = "sizes"
    warm_up_lengths: Sequence[int] = ()

    def __init__(self, sizes: PlanSizes) -> None:
        self._sizes = sizes

    def plan(self, overlay: Overlay) -> SizedPlan:
        return SizedPlan({object(): self._sizes.ready_bytes})

    def warm(self, plan: SizedPlan) -> SizedPlan:
        # A warm plan has the ready one's parts as well.
        return SizedPlan({**plan.parts, object(): self._sizes.warm_bytes})

    def answer(self, items: Sequence[Item], plans: Sequence[SizedPlan]) -> list[NDArray[Any]]:
        raise NotImplementedError("these plans answer nothing")


class VirtualPlans(PlanCache[SizedPlan]):
    """The plan cache, whose thread does nothing: `begin` and `finish` do its work in their time."""

    def __init__(self, sizes: PlanSizes) -> None:
        self.sizes = sizes
        super().__init__(Sizes(sizes), sizes.budget_bytes, Silent())
        self._begun: tuple[str, SizedPlan] | None = None

    def _run(self) -> None:
        """Not by itself."""

    def is_warm(self, task: int) -> bool:
        """Look a task's plan up; whether it was warm."""
        none: Any = None  # no overlay: the plan is a size
        return len(self.get(str(task), none).parts) > 1

    def begin(self) -> bool:
        """Take up the next plan to be made warm, as the thread does; whether there is one."""
        while self._wanted:
            digest = self._wanted.popleft()
            ready = self._ready.get(digest)
            if ready is not None:
                self._making = digest
                self._begun = digest, ready
                return True
        return False

    def finish(self) -> None:
        """The plan begun last is warm."""
        assert self._begun is not None, "nothing was begun"
        self._make_warm(*self._begun)
        self._making = ""

    def prefill(self, tasks: int, shares: Numbers) -> None:
        """As after a long time: the most asked tasks are warm, and all counts are known."""
        for task in reversed(range(min(tasks, self.sizes.room))):
            self.is_warm(task)
            while self.begin():
                self.finish()
        for task in range(tasks):
            self._asked[str(task)] = 1 + round(5_000 * float(shares[task]))
