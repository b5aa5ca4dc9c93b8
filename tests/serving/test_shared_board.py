"""The board as an actor in a real Ray."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from serving.board import ReplicaStatus
from serving.errors import BoardError
from serving.processes import private_folder
from serving.shared_board import BoardHost, Call, RayBoard, connect
from serving.types import Operation

ONE, TWO = ReplicaStatus(generation=1), ReplicaStatus(generation=2)


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[None]:
    """A Ray of these tests alone."""
    with pytest.MonkeyPatch.context() as patch, private_folder() as folder:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_metrics_collection", "0")
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=80 * 1024 * 1024,
            log_to_driver=False,
            _temp_dir=str(folder / "r"),
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def call() -> Call:
    """How one replica calls the board that the tests share."""
    return connect("shared")


def process_of(namespace: str) -> int:
    """The actor's process."""
    host: Any = ray.get_actor("board", namespace=namespace)
    process: int = ray.get(host.process.remote())
    return process


def operation(state: Any) -> Operation:
    return Operation("a", "register", "mood", 1, None, "me", "2026-01-02T03:04:05Z", state)


def test_replicas_see_what_others_say(call: Call) -> None:
    one, other = RayBoard(call), RayBoard(connect("shared"))
    one.report("one", ONE)
    one.put_operation(operation("running"), "one")
    assert other.report("other", TWO)[1] == [operation("running")]
    assert other.members() == {"one": ONE, "other": TWO}
    one.put_operation(operation("done"), "one")
    assert other.operation("a") == operation("done")
    assert other.operation("b") is None
    assert other.operations() == [operation("done")]
    other.leave("other")
    assert one.members() == {"one": ONE}


def test_waiting_for_a_change_holds_up_nobody(call: Call) -> None:
    board = RayBoard(call)
    before, _ = board.report("one", ONE)
    seen: list[int] = []
    waiting = threading.Thread(target=lambda: seen.append(board.changed(before, 60.0)))
    waiting.start()
    assert board.report("one", ONE)[0] == before
    time.sleep(0.2)
    assert seen == []
    board.announce()
    waiting.join()
    assert seen == [before + 1]


def test_waiting_ends_without_a_change(call: Call) -> None:
    board = RayBoard(call)
    before, _ = board.report("one", ONE)
    assert board.changed(before, 0.05) == before
    assert board.changed(before - 1, 60.0) == before


def test_a_board_out_of_reach_is_said_in_time(call: Call) -> None:
    process = process_of("shared")
    os.kill(process, signal.SIGSTOP)
    try:
        with pytest.raises(BoardError, match=r"did not answer within 0\.5 s"):
            call("members", timeout_s=0.5)
    finally:
        os.kill(process, signal.SIGCONT)
    assert isinstance(call("members"), dict)


def test_a_dead_board_comes_back_empty_and_is_filled_again(call: Call) -> None:
    RayBoard(call).report("one", ONE)
    process = process_of("shared")
    os.kill(process, signal.SIGKILL)
    call("report", "two", TWO, timeout_s=60.0)
    assert process_of("shared") != process
    assert RayBoard(call).members() == {"two": TWO}


def test_a_board_that_nobody_calls_ends_itself_and_is_made_again() -> None:
    host: Any = ray.remote(BoardHost).options(
        name="board", namespace="idle", lifetime="detached", max_restarts=-1
    )
    made = host.remote(0.2)
    process = ray.get(made.process.remote())
    while Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    connect("idle")
    assert process_of("idle") != process
