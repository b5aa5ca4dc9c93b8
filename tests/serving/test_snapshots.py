"""What processes have written down: nothing is lost or counted twice, whoever dies when."""

import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import snapshots
from serving.series import Family, Values, combine
from serving.snapshots import Snapshots
from tests.waiting import wait_until

FAMILIES = {
    "requests": Family("counter", "", ("task",)),
    "queued": Family("gauge", ""),
}
NOBODY = 2**22 + 1
"""More than a process's number can be."""


class Process:
    """One that counts, and ends when it is told to."""

    def __init__(self, folder: Path) -> None:
        self._snapshots = Snapshots(folder, FAMILIES)
        self.values: Values = {"requests": {}, "queued": {(): [1]}}

    def count(self, task: str, amount: int = 1) -> None:
        series = self.values["requests"].setdefault((task,), [0])
        series[0] += amount
        self._snapshots.write(self.values)

    def end(self) -> None:
        """As if another process of no living number had written the file."""
        self._snapshots._process = NOBODY
        self._snapshots.write(self.values)

    def total(self) -> Values:
        live, ended = self._snapshots.read()
        return combine([ended, *(one.values for one in live)], FAMILIES)


@given(
    st.lists(st.tuples(st.sampled_from(("count", "end", "read")), st.integers(0, 2)), max_size=25)
)
def test_the_sum_is_what_was_counted_whoever_ends_and_whoever_reads(
    actions: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [Process(folder) for _ in range(3)]
        counted = dict.fromkeys("012", 0)
        for kind, number in actions:
            if kind == "count":
                processes[number].count(str(number))
                counted[str(number)] += 1
            elif kind == "end":
                processes[number].end()
                processes[number] = Process(folder)  # another in its place
            else:
                total = processes[number].total().get("requests", {})
                assert {task: count for (task,), (count,) in total.items()} == {
                    task: count for task, count in counted.items() if count
                }


def test_an_ended_processs_gauges_are_gone_and_its_file_is_taken_in(tmp_path: Path) -> None:
    gone, reader = Process(tmp_path), Process(tmp_path)
    gone.count("a", 3)
    reader.count("a", 2)
    assert reader.total() == {"requests": {("a",): [5]}, "queued": {(): [2]}}
    gone.end()
    for _ in range(2):
        assert reader.total() == {"requests": {("a",): [5]}, "queued": {(): [1]}}
    assert len(list(tmp_path.glob("*-*.json"))) == 1


def test_a_file_that_was_taken_in_and_not_removed_is_not_counted_twice(tmp_path: Path) -> None:
    gone, reader = Process(tmp_path), Process(tmp_path)
    gone.count("a")
    gone.end()
    (path,) = tmp_path.glob("*-*.json")
    data = path.read_bytes()
    reader.total()
    path.write_bytes(data)  # as if the reader had been killed before it was removed
    assert reader.total()["requests"] == {("a",): [1]}
    assert not path.exists()


def test_a_process_that_has_got_an_ended_ones_number_is_another(tmp_path: Path) -> None:
    process = Process(tmp_path)
    process._snapshots._born = psutil.Process().create_time() - 1
    process.count("a")
    live, ended = process._snapshots.read()
    assert (live, ended) == ([], {"requests": {("a",): [1]}})


def test_a_process_of_whose_end_nobody_has_heard_has_ended(tmp_path: Path) -> None:
    process = Process(tmp_path)
    child = subprocess.Popen(["true"])
    dead = psutil.Process(child.pid)
    wait_until(lambda: dead.status() == psutil.STATUS_ZOMBIE)
    process._snapshots._process, process._snapshots._born = child.pid, dead.create_time()
    process.count("a")
    assert process._snapshots.read()[0] == []
    child.wait()


def test_of_ended_processes_so_much_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "MOST_ENDED", 5)
    reader = Process(tmp_path)
    reader.count("stays")
    for number in range(20):
        gone = Process(tmp_path)
        gone.count("stays")
        gone.count(f"task-{number}")
        gone.end()
        total = reader.total()["requests"]
        assert total["stays",] == [number + 2], "less would look as if it had begun anew"
        assert len(total) <= 6
    assert ("task-19",) in total
