"""What replicas tell each other: how far each is, and which changes are under way.

Soft state alone: what is served stands in the store, and a board that is lost is filled again by
the replicas' next reports. One per server, in a process of its own or in this one. No Ray.
"""

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.types import Operation

LIVE_S = 10.0
"""A replica that has not reported for so long is gone; it reports several times a second."""

MOST_OPERATIONS = 1000
"""Of the finished ones, those that can still be looked up."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """How far one replica is."""

    generation: int = -1
    """The state of the store that every new request is answered by."""
    drained: int = -1
    """No request is under way any more that an earlier state than this one has let in."""
    staged: Mapping[str, str] = field(default_factory=dict)
    """Operations whose version is ready here, with an empty text, or what was wrong with it."""


@dataclass(frozen=True, slots=True)
class _Member:
    status: ReplicaStatus
    heard: float


@dataclass(frozen=True, slots=True)
class _Entry:
    operation: Operation
    owner: str


class Board:
    """May be used from many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._members: dict[str, _Member] = {}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def report(self, replica_id: str, status: ReplicaStatus) -> tuple[int, list[Operation]]:
        """Say how far a replica is, and that it lives; gives the count of changes, and the
        operations that are under way."""
        with self._changed:
            before = self._members.get(replica_id)
            self._members[replica_id] = _Member(status, time.monotonic())
            if before is None or before.status != status:
                self._note()
            standing = (self._as_it_stands(entry) for entry in self._entries.values())
            return self._count, [one for one in standing if not _is_finished(one)]

    def leave(self, replica_id: str) -> None:
        """A replica ends."""
        with self._changed:
            if self._members.pop(replica_id, None):
                self._note()

    def members(self) -> dict[str, ReplicaStatus]:
        """Every live replica."""
        with self._changed:
            return {name: member.status for name, member in self._live().items()}

    def put_operation(self, operation: Operation, owner: str) -> None:
        """Make an operation known, or its next state; the replica `owner` carries it out."""
        with self._changed:
            self._entries[operation.id] = _Entry(operation, owner)
            finished = [key for key, one in self._entries.items() if _is_finished(one.operation)]
            for key in finished[: max(0, len(finished) - MOST_OPERATIONS)]:
                del self._entries[key]
            self._note()

    def operation(self, operation_id: str) -> Operation | None:
        """An operation as it stands; None for one that is unknown, or long forgotten."""
        with self._changed:
            entry = self._entries.get(operation_id)
            return None if entry is None else self._as_it_stands(entry)

    def operations(self) -> list[Operation]:
        """Every known operation, oldest first."""
        with self._changed:
            return [self._as_it_stands(entry) for entry in self._entries.values()]

    def changed(self, since: int, timeout_s: float) -> int:
        """Wait until the count of changes is another than `since`, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._count != since, timeout_s)
            return self._count

    def announce(self) -> None:
        """The store has changed: have every replica look now."""
        with self._changed:
            self._note()

    def _note(self) -> None:
        self._count += 1
        self._changed.notify_all()

    def _live(self) -> dict[str, _Member]:
        oldest = time.monotonic() - LIVE_S
        self._members = {key: one for key, one in self._members.items() if one.heard > oldest}
        return self._members

    def _as_it_stands(self, entry: _Entry) -> Operation:
        """An operation whose replica is gone has failed, and nobody is left to say so."""
        if _is_finished(entry.operation) or entry.owner in self._live():
            return entry.operation
        return dataclasses.replace(
            entry.operation,
            state="failed",
            error_type="interrupted",
            error="the replica that carried this out has ended; send the request again",
        )


def _is_finished(operation: Operation) -> bool:
    return operation.state != "running"
