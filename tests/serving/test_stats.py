"""`GET /v1/stats`: the metrics by task, as plain numbers."""

from typing import Any

import pytest

from serving import stats
from serving.metrics import SECONDS, Metrics
from serving.stats import StatsReader, example
from serving.types import Timings
from tests.serving.conftest import PREDICT_TOKEN, Served
from tests.serving.test_api import error_of
from tests.serving.test_metrics import info


def shape(value: Any) -> Any:
    """What a value is made of."""
    match value:
        case dict():
            return {key: shape(one) for key, one in value.items()}
        case list():
            return [shape(value[0]), len(value)] if value else []
        case int() | float():
            return "number"
        case _:
            return type(value)


def test_the_answer_is_what_its_example_shows(served: Served) -> None:
    served.predict("abc")
    served.predict("overload")
    found = served.ask("GET", "/v1/stats", token=PREDICT_TOKEN).json()
    shown = example()
    assert found.keys() == shown.keys()
    for key in found.keys() - {"tasks", "rejected"}:
        assert shape(found[key]) == shape(shown[key]), key
    task, shown_task = found["tasks"]["parity"], shown["tasks"]["sentiment"]
    assert shape(task) == shape(shown_task)
    assert task["requests"] == {"200": 1, "503": 1}
    assert sum(task["latency"]["counts"]) == 2
    assert sum(task["forward"]["counts"]) == 1
    assert found["rejected"]["overloaded"] == 1
    assert found["bounds_s"] == list(SECONDS)
    assert found["backbone"] == {"name": "nothing", "fingerprint": "0" * 64, "bytes": 4096}
    assert found["tasks"].keys() == {"parity", "pairs"}
    error_of(served.ask("GET", "/v1/stats?all=true"), 422)


def test_a_tasks_versions_are_added_up_and_the_active_one_is_named() -> None:
    metrics = Metrics()
    metrics.serve([info("a", 1)])
    metrics.request("a", 1, 200, 0.002)
    metrics.serve([info("a", 2, bytes=5)])
    metrics.request("a", 2, 200, 0.004)
    metrics.request("a", 2, 503, 99.0)
    metrics.timings("a", 2, Timings(1.0, 2.0, 3.0, 6.0))
    metrics.request("unknown", None, 404, 0.001)
    found = stats.stats_of(metrics.total(), 12.5, "here")
    assert (found.at, found.node) == (12.5, "here")
    assert found.tasks.keys() == {"a"}
    task = found.tasks["a"]
    assert (task.version, task.overlay_bytes) == (2, 5)
    assert task.requests == {"200": 2, "503": 1}
    assert task.latency.sum_s == pytest.approx(99.006)
    assert len(task.latency.counts) == len(SECONDS) + 1
    assert task.latency.counts[-1] == 1, "above all bounds"
    assert task.latency.counts[SECONDS.index(0.0025)] == 1
    assert task.latency.counts[SECONDS.index(0.005)] == 1
    assert sum(task.queue.counts) == 1


def test_what_is_not_served_any_more_has_no_version_and_keeps_its_counts() -> None:
    metrics = Metrics()
    metrics.serve([info("a")])
    metrics.request("a", 1, 200, 0.002)
    metrics.serve([])
    metrics.request("nameless", 1, 200, 0.002)
    found = stats.stats_of(metrics.total(), 0.0, "here").tasks
    assert {name: task.version for name, task in found.items()} == {"a": None, "other": None}
    assert found["a"].requests == {"200": 1}
    assert found["other"].requests == {"200": 1}


def test_the_figures_are_worked_out_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    reader = StatsReader(metrics)
    first = reader.read()
    metrics.rejected("overloaded")
    assert reader.read() is first
    monkeypatch.setattr(stats, "KEPT_S", 0.0)
    assert b'"overloaded":1' in reader.read()
