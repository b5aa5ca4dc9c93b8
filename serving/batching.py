"""Decides which waiting sequences go into the next batch. Policy alone: no torch, no threads.

Tasks take turns, and a turn is measured in tokens, so that a task with thousands of waiting
sequences delays another task's single one by at most one batch.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

TURN_TOKENS = 256
"""What a task may take before it is the next task's turn (one sequence at least)."""

Work = TypeVar("Work")


@dataclass(frozen=True)
class Waiting(Generic[Work]):
    """One sequence that waits: its length with the soft prompt, and whatever it belongs to."""

    tokens: int
    work: Work


@dataclass
class FairQueue(Generic[Work]):
    """Waiting sequences by task; the caller sees to it that one thread at a time uses it."""

    tokens: int = 0
    """Of all that wait."""
    _waiting: OrderedDict[str, deque[Waiting[Work]]] = field(default_factory=OrderedDict)
    _turn: int = 0
    """Tokens that the first task has taken in its turn, which a small batch may have cut short."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, task: str, waiting: Waiting[Work]) -> None:
        """Add a sequence behind those of its task."""
        self._waiting.setdefault(task, deque()).append(waiting)
        self.tokens += waiting.tokens

    def drop(self, unwanted: Callable[[Work], bool]) -> None:
        """Remove every sequence whose work is unwanted."""
        first = next(iter(self._waiting), None)
        for task, queue in list(self._waiting.items()):
            kept = deque(waiting for waiting in queue if not unwanted(waiting.work))
            self.tokens -= sum(w.tokens for w in queue) - sum(w.tokens for w in kept)
            if kept:
                self._waiting[task] = kept
            else:
                del self._waiting[task]
        if first not in self._waiting:
            self._turn = 0

    def take(self, budget: int) -> list[Waiting[Work]]:
        """Remove and return the next batch: at most `budget` tokens, but one sequence at least.

        Each task in turn, longest-waiting turn first; within a task in order of arrival.
        """
        taken: list[Waiting[Work]] = []
        used = 0
        while self._waiting:
            task, queue = next(iter(self._waiting.items()))
            while queue and self._turn < TURN_TOKENS:
                if taken and used + queue[0].tokens > budget:
                    self.tokens -= used
                    return taken
                waiting = queue.popleft()
                taken.append(waiting)
                self._turn += waiting.tokens
                used += waiting.tokens
            self._turn = 0
            del self._waiting[task]
            if queue:
                self._waiting[task] = queue
        self.tokens -= used
        return taken
