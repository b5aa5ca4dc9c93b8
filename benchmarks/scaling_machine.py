"""A machine in made-up time: a clock, shared cores, and threads that do one thing after the other.
Knows nothing of servers.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

Call = Callable[[], None]


class Clock:
    """Calls what is due, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Call]] = []
        self._number = itertools.count()

    def at(self, when: float, call: Call) -> None:
        """Call it then."""
        heappush(self._events, (when, next(self._number), call))

    def run(self, until: float) -> None:
        """Let the time pass."""
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, call = heappop(events)
            call()
        self.now = until


class _Together:
    """Jobs of equally many threads, which all are equally fast."""

    def __init__(self) -> None:
        self.done = 0.0  # what one that computed all the time would have done, in seconds
        self.speed = 1.0
        self.jobs: list[tuple[float, int, Call]] = []


class Cores:
    """A machine's cores, shared by all threads that compute.

    What computes alone has its part of the cores. What computes with several threads meets at
    barriers, and gets on only while all of them run: with more threads than cores, of those that
    could run at any moment, in which they all do.
    """

    def __init__(self, clock: Clock, count: int) -> None:
        self._clock = clock
        self._count = count
        self._since = 0.0
        self._threads = 0
        self._turn = 0
        self._groups: dict[int, _Together] = {}
        self._number = itertools.count()

    def run(self, work_s: float, threads: int, then: Call) -> None:
        """`work_s`: what it takes on `threads` cores of its own."""
        assert threads <= self._count, "an engine's threads need a core each"
        self._advance()
        group = self._groups.setdefault(threads, _Together())
        heappush(group.jobs, (group.done + work_s, next(self._number), then))
        self._threads += threads
        self._plan()

    def _advance(self) -> None:
        passed = self._clock.now - self._since
        self._since = self._clock.now
        for group in self._groups.values():
            if group.jobs:
                group.done += passed * group.speed

    def _plan(self) -> None:
        """Say which job ends first, as long as no other begins."""
        self._turn += 1
        turn, first = self._turn, (math.inf, 0)
        for threads, group in self._groups.items():
            if group.jobs:
                group.speed = self._speed(threads)
                left_s = max(0.0, group.jobs[0][0] - group.done) / group.speed
                first = min(first, (left_s, threads))
        if first[1]:
            left_s, threads = first
            self._clock.at(self._clock.now + left_s, lambda: self._finish(turn, threads))

    def _speed(self, threads: int) -> float:
        all_threads, cores = self._threads, self._count
        if all_threads <= cores:
            return 1.0
        return math.comb(all_threads - threads, cores - threads) / math.comb(all_threads, cores)

    def _finish(self, turn: int, threads: int) -> None:
        if turn != self._turn:
            return  # others have begun or ended meanwhile
        self._advance()
        group = self._groups[threads]
        group.done, _, then = heappop(group.jobs)
        self._threads -= threads
        self._plan()
        then()


class Thread:
    """Does one thing after the other."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._waiting: deque[tuple[float, Call]] = deque()
        self._busy = False

    def do(self, work_s: float, then: Call) -> None:
        """Compute for so long, after all that was asked before; then call."""
        if not work_s:
            then()
        elif self._busy:
            self._waiting.append((work_s, then))
        else:
            self._busy = True
            self._cores.run(work_s, 1, lambda: self._done(then))

    def _done(self, then: Call) -> None:
        if self._waiting:
            work_s, after = self._waiting.popleft()
            self._cores.run(work_s, 1, lambda: self._done(after))
        else:
            self._busy = False
        then()
