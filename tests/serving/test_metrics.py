"""What is counted, under which names, and summed over processes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import MAX_TASKS, Metrics
from serving.types import Timings
from tests.serving.conftest import Served


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a rendering, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    """One sample's value."""
    return samples(text)[name, frozenset(labels.items())]


def test_the_names_that_dashboards_rely_on() -> None:
    metrics = Metrics()
    metrics.prepare("sentiment")
    metrics.rejected("overloaded")
    metrics.registrations("created")
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    families = text_string_to_metric_families(text.decode())
    names = {family.name for family in families if not family.name.endswith("_created")}
    assert names == {
        "taskbone_requests",
        "taskbone_request_duration_seconds",
        "taskbone_tokenize_duration_seconds",
        "taskbone_queue_duration_seconds",
        "taskbone_forward_duration_seconds",
        "taskbone_batch_duration_seconds",
        "taskbone_batch_sequences",
        "taskbone_batch_tokens",
        "taskbone_batch_tasks",
        "taskbone_queued_tokens",
        "taskbone_rejected",
        "taskbone_operations",
        "taskbone_registrations",
        "taskbone_shadow_inputs",
        "taskbone_plan_lookups",
        "taskbone_plan_build_duration_seconds",
        "taskbone_plan_evictions",
        "taskbone_plan_bytes",
        "taskbone_tasks",
    }


def test_a_prepared_task_stands_at_zero() -> None:
    metrics = Metrics()
    metrics.prepare("sentiment")
    text = metrics.render()[0].decode()
    assert value(text, "taskbone_requests_total", task="sentiment", code="200") == 0
    assert value(text, "taskbone_queue_duration_seconds_count", task="sentiment") == 0


def test_milliseconds_become_seconds() -> None:
    metrics = Metrics()
    metrics.prepare("sentiment")
    metrics.prepare("spam")
    metrics.timings("sentiment", Timings(1.0, 20.0, 300.0, 321.0))
    text = metrics.render()[0].decode()
    for name, seconds in (("tokenize", 0.001), ("queue", 0.02), ("forward", 0.3)):
        found = value(text, f"taskbone_{name}_duration_seconds_sum", task="sentiment")
        assert found == pytest.approx(seconds)


def test_plans_are_noted() -> None:
    metrics = Metrics()
    text = metrics.render()[0].decode()
    assert [
        value(text, "taskbone_plan_lookups_total", result=result) for result in ("hit", "miss")
    ] == [0, 0], "the series are there before the first request"
    for result in ("miss", "hit", "hit"):
        metrics.plan_lookup(result)
    metrics.plan_built(0.25)
    metrics.plan_evicted()
    for size in (300, 200):
        metrics.plan_bytes(size)
    text = metrics.render()[0].decode()
    assert value(text, "taskbone_plan_lookups_total", result="hit") == 2
    assert value(text, "taskbone_plan_lookups_total", result="miss") == 1
    assert value(text, "taskbone_plan_build_duration_seconds_sum") == 0.25
    assert value(text, "taskbone_plan_build_duration_seconds_count") == 1
    assert value(text, "taskbone_plan_evictions_total") == 1
    assert value(text, "taskbone_plan_bytes") == 200, "what it is now"


def test_a_batch_is_noted_once_and_for_each_of_its_tasks() -> None:
    metrics = Metrics()
    metrics.prepare("sentiment")
    metrics.prepare("spam")
    metrics.batch({"sentiment": 3, "spam": 1}, tokens=120, forward_s=0.01)
    text = metrics.render()[0].decode()
    assert value(text, "taskbone_batch_sequences_sum", task="sentiment") == 3
    assert value(text, "taskbone_batch_sequences_sum", task="spam") == 1
    assert value(text, "taskbone_batch_tokens_sum") == 120
    assert value(text, "taskbone_batch_tasks_sum") == 2
    assert value(text, "taskbone_batch_duration_seconds_count") == 1


# --- what the application counts ------------------------------------------------------------------


def test_requests_are_counted_by_task_and_status(served: Served) -> None:
    served.predict("abc")
    served.predict("abc")
    served.predict("overload")
    served.predict(["a"], "pairs")
    served.ask("GET", "/v1/tasks")
    served.ask("GET", "/v1/tasks/pairs")
    text = served.ask("GET", "/metrics").text
    counts = {
        (dict(labels)["task"], dict(labels)["code"]): count
        for (name, labels), count in samples(text).items()
        if name == "taskbone_requests_total"
    }
    assert counts == {
        ("parity", "200"): 2,
        ("parity", "503"): 1,
        ("pairs", "422"): 1,
        ("pairs", "200"): 1,
        ("none", "200"): 1,
    }
    assert value(text, "taskbone_rejected_total", reason="overloaded") == 1
    assert value(text, "taskbone_request_duration_seconds_count", task="parity") == 3


def test_names_that_clients_make_up_become_no_series(served: Served) -> None:
    for number in range(50):
        served.predict("a", f"made-up-{number}")
        served.ask("GET", f"/v1/tasks/made-up-{number}")
        served.ask("GET", f"/made-up-{number}")
    text = served.ask("GET", "/metrics").text
    assert "made-up" not in text
    assert value(text, "taskbone_requests_total", task="unknown", code="404") == 100


def test_health_and_metrics_are_not_counted_as_work(served: Served) -> None:
    before = served.ask("GET", "/metrics").text
    served.ask("GET", "/health/ready")
    after = served.ask("GET", "/metrics").text
    assert re.findall("taskbone_requests_total.*", before) == re.findall(
        "taskbone_requests_total.*", after
    )


def test_a_body_over_the_limit_is_a_rejection(serve: Callable[..., Served]) -> None:
    served = serve(max_body_bytes=10)
    served.predict("a" * 100)
    assert served.count("taskbone_rejected_total", reason="too_large") == 1
    assert served.count("taskbone_requests_total", task="parity", code="413") == 1


# --- several processes ----------------------------------------------------------------------------


def run_process(folder: Path, script: str) -> str:
    """Run a script in a process that shares the folder; give what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"from serving.metrics import Metrics\n{script}"],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


COUNT = """
metrics = Metrics()
metrics.prepare("sentiment")
metrics.request("sentiment", 200, 0.01)
metrics.batch({"sentiment": 4}, 100, 0.01)
metrics.queued(1000)
"""
RENDER = "print(Metrics().render()[0].decode())"


def test_any_process_renders_the_sum_over_all(tmp_path: Path) -> None:
    for _ in range(2):
        run_process(tmp_path, COUNT)
    text = run_process(tmp_path, COUNT + RENDER.replace("Metrics()", "metrics"))
    assert value(text, "taskbone_requests_total", task="sentiment", code="200") == 3
    assert value(text, "taskbone_batch_sequences_sum", task="sentiment") == 12
    buckets = [
        count
        for (name, labels), count in samples(text).items()
        if name == "taskbone_batch_tokens_bucket" and ("le", "+Inf") in labels
    ]
    assert buckets == [3]


def test_what_an_ended_process_counted_stays_and_its_queue_does_not(tmp_path: Path) -> None:
    run_process(tmp_path, COUNT)
    text = run_process(tmp_path, RENDER)
    assert value(text, "taskbone_requests_total", task="sentiment", code="200") == 1
    assert value(text, "taskbone_queued_tokens") == 0


def test_the_number_of_series_is_bounded() -> None:
    metrics = Metrics()
    for number in range(MAX_TASKS + 50):
        metrics.prepare(f"task-{number}")
        metrics.request(f"task-{number}", 200, 0.001)
    text = metrics.render()[0].decode()
    tasks = {dict(labels).get("task") for name, labels in samples(text)} - {None}
    assert len(tasks) == MAX_TASKS + 1
    assert value(text, "taskbone_requests_total", task="task-0", code="200") == 1
    assert value(text, "taskbone_requests_total", task="other", code="200") == 50
