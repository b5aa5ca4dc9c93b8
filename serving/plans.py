"""Keeps plans: every task that is asked is answered at once, and those asked often become faster.

A plan is *ready* as soon as it is made; *warm*, it gives the same answers sooner for more memory. A
thread of its own makes plans warm, the least recently used lose that first when the byte budget
is used up, and a task takes another's place only when it has been asked more often of late: with
more tasks than memory, plans would otherwise come and go with every request.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, Protocol

from model_store.artifact import Overlay
from model_store.backend import Backend, P

HALVE_EVERY = 10_000
"""Lookups after which all counts are halved, so that they tell of recent times."""

logger = logging.getLogger("taskbone.plans")


class PlanObserver(Protocol):
    """What the cache tells; `serving.metrics.Metrics` is one."""

    def plan_lookup(self, result: str) -> None:
        """`hit`: the plan was warm. `miss`: it answers as it is."""
        ...

    def plan_built(self, seconds: float) -> None:
        """A plan became warm."""
        ...

    def plan_evicted(self) -> None:
        """A plan lost what made it warm."""
        ...

    def plan_bytes(self, size: int) -> None:
        """Memory of all plans now."""
        ...


class PlanCache(Generic[P]):
    """Plans by artifact digest. `get` is for the engine's thread."""

    def __init__(self, backend: Backend[P], budget_bytes: int, observer: PlanObserver) -> None:
        self._backend = backend
        self._budget = budget_bytes
        self._observer = observer
        self._lock = threading.Condition()
        # The rest is guarded by the lock.
        self._ready: OrderedDict[str, P] = OrderedDict()
        self._warm: OrderedDict[str, P] = OrderedDict()  # of those, least recently used first
        self._asked: Counter[str] = Counter()
        self._lookups = 0
        self._wanted: deque[str] = deque()
        self._given_up: set[str] = set()  # too large, or failed; while they are ready
        self._more = 0  # bytes that the last warm plan has beyond the ready one
        self._parts: dict[Hashable, tuple[int, int]] = {}  # bytes, and how many plans have it
        self._making = ""  # digest of what the thread makes warm now
        self._closing = False
        self.bytes = 0
        self._thread = threading.Thread(target=self._run, name="taskbone-plans", daemon=True)
        self._thread.start()

    def get(self, digest: str, overlay: Overlay) -> P:
        """The plan of an overlay, warm or as it is."""
        with self._lock:
            self._count(digest)
            plan = self._warm.get(digest)
            if plan is not None:
                self._ready.move_to_end(digest)
                self._warm.move_to_end(digest)
                self._tell(self._observer.plan_lookup, "hit")
                return plan
            self._tell(self._observer.plan_lookup, "miss")
            plan = self._ready.get(digest)
            if plan is not None:
                self._ready.move_to_end(digest)
                self._want(digest)
                return plan
        plan = self._backend.plan(overlay)
        with self._lock:
            self._ready[digest] = plan
            self._add(plan)
            self._make_room()
            self._want(digest)
        return plan

    def forget(self, digest: str) -> None:
        """Let go of a plan that nobody asks for any more, and of all that is known about it."""
        with self._lock:
            del self._asked[digest]  # a Counter: also where it is absent
            self._given_up.discard(digest)
            if digest in self._wanted:
                self._wanted.remove(digest)
            for plans in (self._warm, self._ready):
                if plan := plans.pop(digest, None):
                    self._remove(plan)
            self._tell(self._observer.plan_bytes, self.bytes)
            self._lock.notify_all()

    def settle(self) -> int:
        """Wait until every plan that is to be warm is; gives how many are."""
        with self._lock:
            self._lock.wait_for(lambda: self._closing or not (self._wanted or self._making))
            return len(self._warm)

    def close(self) -> None:
        """Stop the thread."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join()

    def _count(self, digest: str) -> None:
        self._asked[digest] += 1
        self._lookups += 1
        if self._lookups % HALVE_EVERY == 0:
            self._asked = Counter({key: n // 2 for key, n in self._asked.items() if n > 1})

    def _want(self, digest: str) -> None:
        """Have the plan warmed where there is room, or others are asked less."""
        if digest in self._wanted or digest in self._given_up or digest == self._making:
            return
        room = self.bytes + self._more <= self._budget
        if room or self._asked[digest] > self._asked[next(iter(self._warm), "")]:
            self._wanted.append(digest)
            self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._making = ""
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._wanted or self._closing)
                if self._closing:
                    return
                digest = self._wanted.popleft()
                ready = self._ready.get(digest)
                self._making = digest
            if ready is None:
                continue
            try:
                self._make_warm(digest, ready)
            except Exception:
                self._give_up(digest, ready)
                logger.exception("a plan could not be made warm; it answers as it is")

    def _make_warm(self, digest: str, ready: P) -> None:
        started = time.perf_counter()
        plan = self._backend.warm(ready)
        size = sum(plan.parts.values())
        if size > self._budget:
            self._give_up(digest, ready)
            return
        self._more = size - sum(ready.parts.values())
        with self._lock:
            if self._ready.get(digest) is not ready:
                return
            self._warm[digest] = plan
            self._add(plan)
            self._make_room()
        self._tell(self._observer.plan_built, time.perf_counter() - started)

    def _give_up(self, digest: str, ready: P) -> None:
        """Do not try again at every request."""
        with self._lock:
            if self._ready.get(digest) is ready:
                self._given_up.add(digest)

    def _make_room(self) -> None:
        """Let go of what was not used for longest: what makes plans warm first, then plans."""
        while self.bytes > self._budget and len(self._warm) > 1:
            _, warm = self._warm.popitem(last=False)
            self._remove(warm)
            self._tell(self._observer.plan_evicted)
        while self.bytes > self._budget and len(self._ready) > 1:
            digest, ready = self._ready.popitem(last=False)
            self._remove(ready)
            self._given_up.discard(digest)
            if warm_too := self._warm.pop(digest, None):
                self._remove(warm_too)
                self._tell(self._observer.plan_evicted)
        self._tell(self._observer.plan_bytes, self.bytes)

    def _tell(self, what: Callable[..., None], *figures: object) -> None:
        """Counting must cost no answer."""
        try:
            what(*figures)
        except Exception:
            logger.exception("the observer failed; requests are answered all the same")

    def _add(self, plan: P) -> None:
        for key, size in plan.parts.items():
            _, users = self._parts.get(key, (size, 0))
            self._parts[key] = size, users + 1
            self.bytes += 0 if users else size

    def _remove(self, plan: P) -> None:
        for key in plan.parts:
            size, users = self._parts.pop(key)
            if users > 1:
                self._parts[key] = size, users - 1
            else:
                self.bytes -= size
