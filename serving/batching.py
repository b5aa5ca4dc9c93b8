"""Decides which waiting sequences go into the next batch. Policy alone: no torch, no threads.

Keys take turns, and within its turns a key's tasks do. A turn is measured in tokens, so that one
with thousands of sequences waiting delays another's single one by about a batch. A key of twice
the weight has its turns twice as often; and after a turn that a long sequence made longer than
others, the next comes later. Between the tasks of a key, whatever waits longest has its turn first,
as long as none is far behind: else, of tasks that are asked alike, those with a few sequences more
would wait several times as long.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, Protocol, TypeVar

TURN_TOKENS = 256
"""What is taken in one turn; the sequence that reaches it is the turn's last."""

TASK_SLACK_TOKENS = 8 * TURN_TOKENS
"""What a task may be ahead of another of its key, as long as it has what waits longest."""

Work = TypeVar("Work")
Queue = TypeVar("Queue", bound="_Queue")


@dataclass(eq=False, slots=True)
class Request:
    """What a key asks at once, in one or several parts. Times in seconds."""

    key: str
    weight: float
    submitted: float
    deadline: float | None = None
    tokens: int = 0
    """Of all its parts that wait."""
    begun: bool = False
    """Whether some of its sequences have been taken."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Part(Generic[Work]):
    """A request's sequences for one task, which are taken in order, and what they belong to."""

    request: Request
    task: str
    lengths: list[int]
    """Tokens of each sequence, with the soft prompt."""
    work: Work
    taken: int = 0
    """How many of the sequences wait no longer."""
    forward_s: float = 0.0
    """Of all forwards that answered some of them until now."""
    number: int = 0
    """In the order of arrival."""

    @property
    def waits(self) -> bool:
        """Whether some of its sequences wait."""
        return self.taken < len(self.lengths)


class _Queue(Protocol):
    """What can have turns: a line, or a number of queues that have turns themselves."""

    def peek(self) -> Part[Any] | None:
        """Whose first waiting sequence is next."""
        ...

    def pop(self) -> int:
        """Take that sequence, right after `peek`; gives its tokens."""
        ...


class _Line(Generic[Work]):
    """Parts in order of arrival; any of them can leave."""

    def __init__(self) -> None:
        self._parts: OrderedDict[Part[Work], None] = OrderedDict()

    def push(self, part: Part[Work]) -> None:
        self._parts[part] = None

    def remove(self, part: Part[Work]) -> None:
        del self._parts[part]

    def peek(self) -> Part[Work] | None:
        return next(iter(self._parts), None)

    def pop(self) -> int:
        part = next(iter(self._parts))
        tokens = part.lengths[part.taken]
        part.taken += 1
        if part.taken == len(part.lengths):
            del self._parts[part]
        return tokens


@dataclass(slots=True)
class _Seat(Generic[Queue]):
    queue: Queue
    weight: float
    place: float


class _Turns(Generic[Queue]):
    """Queues that take turns, in proportion to their weights.

    Each has a place in time, counted in tokens for a weight of 1, and moves on by what it takes.
    The turn is that of what waits longest, among those whose place is at most `slack` after the
    first one's. One that comes new begins now. One that was passed while it was empty is let go;
    until then it keeps its place, so that nobody gains by coming and going.
    """

    def __init__(self, slack: float) -> None:
        self._slack = slack
        self._seats: dict[str, _Seat[Queue]] = {}
        self._now = 0.0
        self._turn: _Seat[Queue] | None = None
        self._used = 0  # tokens taken in this turn, which may last for several batches

    def queue(self, name: str, weight: float, make: Callable[[], Queue]) -> Queue:
        """The queue of this name, new where there is none."""
        seat = self._seats.get(name)
        if seat is None:
            seat = self._seats[name] = _Seat(make(), weight, self._now)
        seat.weight = weight
        return seat.queue

    def find(self, name: str) -> Queue:
        """The queue of this name."""
        return self._seats[name].queue

    def __len__(self) -> int:
        """How many take turns, with those that have not been passed since they are empty."""
        return len(self._seats)

    def peek(self) -> Part[Any] | None:
        if self._turn is not None:
            if self._used < TURN_TOKENS and (part := self._turn.queue.peek()) is not None:
                return part
            self._turn.place += self._used / self._turn.weight
            self._turn, self._used = None, 0
        waiting = [
            (part.number, seat, part)
            for seat in self._seats.values()
            if (part := seat.queue.peek()) is not None
        ]
        first = min((seat.place for _, seat, _ in waiting), default=math.inf)
        for name in [name for name, seat in self._seats.items() if seat.place <= first]:
            if self._seats[name].queue.peek() is None:
                del self._seats[name]
        if not waiting:
            return None
        self._now = first
        _, self._turn, part = min(
            (one for one in waiting if one[1].place <= first + self._slack), key=itemgetter(0)
        )
        return part

    def pop(self) -> int:
        assert self._turn is not None, "after `peek`"
        tokens = self._turn.queue.pop()
        self._used += tokens
        return tokens


class FairQueue(Generic[Work]):
    """All that waits; the caller sees to it that one thread at a time uses it."""

    def __init__(self) -> None:
        self._keys: _Turns[_Turns[_Line[Work]]] = _Turns(0.0)
        self._number = 0

    def push(self, part: Part[Work]) -> None:
        """Add a part with its sequences behind those of its key and task."""
        request = part.request
        self._number += 1
        part.number = self._number
        tasks = self._keys.queue(request.key, request.weight, lambda: _Turns(TASK_SLACK_TOKENS))
        tasks.queue(part.task, 1.0, _Line).push(part)

    def remove(self, part: Part[Work]) -> None:
        """Take out what waits of a part; nothing where it has left."""
        if part.waits:
            self._keys.find(part.request.key).find(part.task).remove(part)
            part.taken = len(part.lengths)

    def lines(self, key: str) -> int:
        """How many tasks of a key that has something waiting take turns."""
        return len(self._keys.find(key))

    def take(
        self, budget: int, gone: Callable[[Part[Work]], bool] = lambda part: False
    ) -> list[tuple[Part[Work], int]]:
        """Take the next batch: parts, and which of their sequences.

        At most `budget` tokens, but one sequence at least. Every part is shown to `gone` first,
        which may have it removed; then it says so.
        """
        taken: list[tuple[Part[Work], int]] = []
        used = 0
        while (part := self._keys.peek()) is not None:
            if gone(part):
                continue
            tokens = part.lengths[part.taken]
            if taken and used + tokens > budget:
                break
            taken.append((part, part.taken))
            used += self._keys.pop()
        return taken
