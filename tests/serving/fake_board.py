"""A board that counts its changes and forgets nobody."""

import os
from typing import Any


class FakeBoard:
    """Counts its changes; a report of "again" changes nothing."""

    def __init__(self) -> None:
        self._changes = 0
        self._members: dict[str, Any] = {}
        self._operations: dict[str, Any] = {}

    def report(self, replica_id: str, status: Any) -> int:
        if status != "again":
            self._members[replica_id] = status
            self._changes += 1
        return self._changes

    def members(self) -> dict[str, Any]:
        return self._members

    def put_operation(self, operation: Any) -> None:
        self._operations[operation[0]] = operation
        self._changes += 1

    def operation(self, operation_id: str) -> Any:
        return self._operations.get(operation_id)

    def operations(self) -> list[Any]:
        return list(self._operations.values())

    def changed(self, since: int, timeout: float) -> int:
        return self._changes

    def process(self) -> int:
        return os.getpid()
