"""What a replica tells the others of itself, and what is made of one that says nothing any more."""

import time
from pathlib import Path

import pytest

from serving import reporter
from serving.metrics import Metrics
from serving.snapshots import Snapshots
from tests.waiting import wait_until


def number(metrics: Metrics, name: str) -> float:
    """A metric without labels."""
    found = metrics.registry.get_sample_value(name)
    assert found is not None
    return found


def test_replicas_of_one_folder_are_counted_and_added_up(tmp_path: Path) -> None:
    one, other = Metrics(tmp_path), Metrics(tmp_path)
    one.start(lambda: None)
    other.start(lambda: None)
    one.queued(10)
    other.queued(5)
    assert number(one, "taskbone_queued_tokens") >= 10
    assert number(other, "taskbone_queued_tokens") == 15, "what was told once is known"
    assert number(one, "taskbone_replicas") == number(one, "taskbone_replicas_ready") == 2
    alone = Metrics()
    alone.start(lambda: None)
    assert number(one, "taskbone_process_memory_bytes") > number(
        alone, "taskbone_process_memory_bytes"
    )
    other.close()
    assert number(one, "taskbone_replicas_ready") == 1
    one.close()


def test_a_replica_writes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.01)
    one, other = Metrics(tmp_path), Metrics(tmp_path)
    one.start(lambda: None)
    one.rejected("overloaded")
    labels = {"reason": "overloaded"}
    wait_until(lambda: other.registry.get_sample_value("taskbone_rejected_total", labels) == 1)
    one.close()


def test_a_replica_that_is_silent_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, asked = Metrics(tmp_path), Metrics(tmp_path)
    silent._reporter._check = lambda: None  # ready, with no thread that would say so again
    silent.total()
    assert number(asked, "taskbone_replicas_ready") == 1
    late = time.monotonic() + reporter.STALE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    assert number(asked, "taskbone_replicas_ready") == 0
    assert number(asked, "taskbone_replicas") == 2


def test_what_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reporter, "WRITE_S", 0.001)
    tries = 0

    def write(self: Snapshots, values: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(28, "no space left")

    metrics = Metrics(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(Snapshots, "write", write)
        metrics.start(lambda: None)
        wait_until(lambda: tries > 5)
    metrics.rejected("overloaded")
    wait_until(lambda: list(tmp_path.glob("*-*.json")) != [])
    metrics.close()
    assert [record.message for record in caplog.records] == ["the metrics cannot be written"]
