"""The board as an actor in a real Ray, around a fake board."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from serving.errors import BoardError
from serving.processes import private_folder
from serving.shared_board import BoardHost, RayBoard, connect
from tests.serving.fake_board import FakeBoard


@pytest.fixture(scope="module")
def started() -> Iterator[None]:
    """A Ray of this test alone."""
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


def board(namespace: str) -> RayBoard:
    """What one replica holds."""
    return RayBoard(connect(FakeBoard, namespace), "replica")


@pytest.mark.usefixtures("started")
class TestBoard:
    def test_replicas_see_what_others_say(self) -> None:
        one, other = board("talk"), board("talk")
        one.report("one", "ready")
        one.put_operation(("a", "running"))
        one.put_operation(("a", "done"))
        assert other.members() == {"one": "ready"}
        assert other.operation("a") == ("a", "done")
        assert other.operation("b") is None
        assert other.operations() == [("a", "done")]

    def test_applications_have_boards_of_their_own(self) -> None:
        board("mine").report("one", "ready")
        assert board("theirs").members() == {}

    def test_waiting_for_a_change_holds_up_nobody(self) -> None:
        one, other = board("wait"), board("wait")
        before = one.report("one", "ready")
        seen: list[int] = []
        waiting = threading.Thread(target=lambda: seen.append(one.changed(before, 60.0)))
        waiting.start()
        assert other.report("other", "again") == before
        time.sleep(0.2)
        assert seen == []
        after = other.report("other", "ready")
        waiting.join()
        assert seen == [after]

    def test_waiting_ends_without_a_change(self) -> None:
        one = board("quiet")
        before = one.report("one", "ready")
        assert one.changed(before, 0.05) == before
        assert one.changed(before - 1, 60.0) == before

    def test_a_dead_board_comes_back_empty_and_is_filled_again(self) -> None:
        call = connect(FakeBoard, "dead")
        one = RayBoard(call, "one")
        one.report("one", "ready")
        process = call("process")
        os.kill(process, 9)
        assert call("report", "two", "ready", timeout_s=60.0) == 1
        assert call("process") != process
        assert one.members() == {"two": "ready"}

    def test_a_board_that_nobody_calls_ends_itself_and_is_made_again(self) -> None:
        host: Any = ray.remote(BoardHost).options(
            name="board", namespace="idle", lifetime="detached", max_restarts=-1
        )
        made = host.remote(FakeBoard, 0.2)
        process = ray.get(made.call.remote("process", ()))
        while Path(f"/proc/{process}").exists():
            time.sleep(0.05)
        call = connect(FakeBoard, "idle")
        assert call("process", timeout_s=60.0) != process

    def test_a_board_out_of_reach_is_said_in_time(self) -> None:
        call = connect(FakeBoard, "stopped")
        process = call("process")
        os.kill(process, 19)
        try:
            with pytest.raises(BoardError, match=r"did not answer within 0\.5 s"):
                call("members", timeout_s=0.5)
        finally:
            os.kill(process, 18)
        assert call("members") == {}
