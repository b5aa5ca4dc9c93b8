"""What replicas tell each other."""

import dataclasses
import threading

import pytest

from serving import board as board_module
from serving.board import MOST_OPERATIONS, Board, ReplicaStatus
from serving.types import Operation


def operation(number: int = 1, state: str = "running") -> Operation:
    made = Operation(f"op-{number}", "activate", "mood", 2, None, "ops", "2026-01-02T03:04:05")
    return dataclasses.replace(made, state=state)  # type: ignore[arg-type]


def test_members_are_those_that_have_reported_and_not_left() -> None:
    board = Board()
    board.report("a", ReplicaStatus(1))
    board.report("b", ReplicaStatus(2))
    assert {name: status.generation for name, status in board.members().items()} == {"a": 1, "b": 2}
    board.leave("a")
    board.leave("a")
    assert set(board.members()) == {"b"}


def test_a_replica_that_falls_silent_is_gone_and_what_it_did_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = Board()
    board.report("a", ReplicaStatus(1))
    board.put_operation(operation(1), "a")
    board.put_operation(operation(2, "done"), "a")
    _, running = board.report("b", ReplicaStatus(1))
    assert [one.id for one in running] == ["op-1"]
    monkeypatch.setattr(board_module, "LIVE_S", -1.0)
    assert board.members() == {}
    found = board.operation("op-1")
    assert found is not None
    assert (found.state, found.error_type) == ("failed", "interrupted")
    assert [one.state for one in board.operations()] == ["failed", "done"]


def test_waiting_ends_with_a_change() -> None:
    board = Board()
    count, _ = board.report("a", ReplicaStatus(1))
    assert board.changed(count, 0.01) == count, "nothing has changed"
    assert board.report("a", ReplicaStatus(1))[0] == count, "the same again is no change"
    seen: list[int] = []
    waiting = threading.Thread(target=lambda: seen.append(board.changed(count, 60)))
    waiting.start()
    board.announce()
    waiting.join(60)
    assert seen == [count + 1]
    assert board.report("a", ReplicaStatus(2))[0] > count + 1


def test_old_operations_are_forgotten_and_running_ones_never() -> None:
    board = Board()
    board.report("a", ReplicaStatus())
    board.put_operation(operation(0), "a")
    for number in range(1, MOST_OPERATIONS + 11):
        board.put_operation(operation(number, "done"), "a")
    known = [one.id for one in board.operations()]
    assert len(known) == MOST_OPERATIONS + 1
    assert known[:2] == ["op-0", "op-11"]
    assert board.operation("op-3") is None
