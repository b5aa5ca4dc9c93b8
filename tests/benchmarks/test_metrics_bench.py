"""The benchmark of the metrics: what it leaves out is really left out, and its sums are right."""

import json
from pathlib import Path

import pytest

from benchmarks.metrics import Batches, Turn, compared, shares, telling_ms
from benchmarks.metrics_server import COUNTING, OFF, ON, switch
from benchmarks.server_load import Load
from serving.metrics import Metrics
from serving.types import Timings
from tests.serving.test_metrics import info

BESIDE_REQUESTS = {
    *("serve", "backbone", "build", "registrations", "operation"),
    *("start", "close", "render", "total", "collect"),
}
"""What the metrics do when nobody asks for predictions."""


def count(metrics: Metrics) -> None:
    metrics.request("none", None, 200, 0.1)
    metrics.timings("sentiment", 1, Timings(1, 1, 1, 3))
    metrics.batch({"sentiment": 1}, 1, 10, 0.1)
    metrics.rejected("overloaded")
    metrics.plan_built(0.1)


def test_what_is_switched_off_counts_and_writes_nothing_until_it_is_on(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.total()
    before, (file,) = metrics._copy(), tmp_path.glob("*-*.json")
    written = file.read_bytes()
    switch(metrics, OFF)
    switch(metrics, OFF)
    count(metrics)
    metrics._reporter._write()
    assert metrics._copy() == before
    assert file.read_bytes() == written
    switch(metrics, ON)
    count(metrics)
    assert metrics._copy()["taskbone_rejected_total"]["overloaded",] == [1]
    assert metrics.total() == metrics._copy()
    public = {name for name in vars(Metrics) if not name.startswith("_")}
    assert public == BESIDE_REQUESTS | set(COUNTING)


def test_a_requests_share_is_of_its_time_at_capacity() -> None:
    found = shares([info("a"), info("b")], Batches(requests=20.0, tasks=2.0), 500.0)
    each_us = found["request_us"] + found["batch_us"] / 20 + found["write_us"] / 500
    assert found["counting_us_per_request"] == pytest.approx(each_us, abs=0.05)
    assert found["request_at_capacity_us"] == 2000
    assert found["share"] == pytest.approx(each_us / 2000, abs=1e-4)
    assert 0 < found["share"] < 1
    json.dumps(found)


def test_on_and_off_are_compared_round_by_round() -> None:
    turns = {
        "on": [Turn(Load(rate, 1.0, 2.0), 0.003) for rate in (99.0, 198.0, 396.0)],
        "off": [Turn(Load(rate, 1.0, 2.0), 0.003) for rate in (100.0, 200.0, 400.0)],
    }
    rates = compared(turns, lambda turn: turn.load.requests_per_s)
    assert rates == {"median": 0.99, "quartiles": [0.99, 0.99]}
    assert compared(turns, lambda turn: turn.cpu_s)["median"] == 1


def test_what_it_takes_to_tell_is_measured_for_three_replicas() -> None:
    found = telling_ms([info("a")])
    assert found.keys() == {"metrics_ms", "stats_ms", "memory_ms"}
    assert min(found.values()) > 0
