"""What is counted, under which names, and summed over processes."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_store.manifest import BackboneReference
from serving.errors import EngineError
from serving.metrics import FAMILIES, KNOWN, MAX_TASKS, MAX_VERSIONS, SECONDS, Metrics
from serving.types import CanaryInfo, TaskInfo, Timings
from tests.serving.conftest import Served


@lru_cache(maxsize=1)
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


def told(metrics: Metrics) -> str:
    """What Prometheus is told."""
    return metrics.render()[0].decode()


def info(task: str, version: int = 1, **more: object) -> TaskInfo:
    """A task that is served."""
    plain = TaskInfo(
        *(task, version, f"digest-{task}-{version}", "", ("a", "b"), False, 0.5, 10, 128, 1000),
        *("2026-01-02T03:04:05Z", ()),
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def serving(*tasks: str) -> Metrics:
    """Metrics of a process that serves these tasks' first versions."""
    metrics = Metrics()
    metrics.serve([info(task) for task in tasks])
    return metrics


def test_everything_that_is_named_is_told_before_the_first_request() -> None:
    metrics = serving("sentiment")
    metrics.serve([info("sentiment", shadow=2)])
    metrics.backbone(BackboneReference(name="tiny", fingerprint="0" * 64), 10)
    metrics.build("1.2.3", "cpu", "fp32")
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert families.keys() == {name.removesuffix("_total") for name in FAMILIES}
    assert [name for name, family in families.items() if not family.samples] == []
    for name, family in FAMILIES.items():
        given = families[name.removesuffix("_total")]
        assert given.type == family.kind, name
        assert given.documentation == family.help, name
        labels = set(given.samples[0].labels) - {"le"}
        assert labels == set(family.labels), name


def test_a_served_task_stands_at_zero() -> None:
    text = told(serving("sentiment"))
    labels = {"task": "sentiment", "version": "1"}
    assert value(text, "taskbone_requests_total", **labels, code="200") == 0
    assert value(text, "taskbone_queue_duration_seconds_count", **labels) == 0
    assert value(text, "taskbone_rejected_total", reason="overloaded") == 0
    assert value(text, "taskbone_registrations_total", result="created") == 0
    assert value(text, "taskbone_operations_total", kind="rollback", result="failed") == 0


def test_milliseconds_become_seconds() -> None:
    metrics = serving("sentiment", "spam")
    metrics.timings("sentiment", 1, Timings(1.0, 20.0, 300.0, 321.0))
    text = told(metrics)
    for name, seconds, bound in (
        ("tokenize", 0.001, "0.001"),
        ("queue", 0.02, "0.025"),
        ("forward", 0.3, "0.5"),
    ):
        histogram = f"taskbone_{name}_duration_seconds"
        labels = {"task": "sentiment", "version": "1"}
        assert value(text, f"{histogram}_sum", **labels) == pytest.approx(seconds)
        assert value(text, f"{histogram}_bucket", **labels, le=bound) == 1
        assert value(text, f"{histogram}_count", task="spam", version="1") == 0


def test_plans_are_noted() -> None:
    metrics = Metrics()

    def events() -> list[float]:
        text, name = told(metrics), "taskbone_plan_cache_events_total"
        return [value(text, name, event=event) for event in ("hit", "miss", "build", "evict")]

    assert events() == [0, 0, 0, 0]
    for result in ("miss", "hit", "hit"):
        metrics.plan_lookup(result)
    metrics.plan_built(0.25)
    metrics.plan_evicted()
    for size in (300, 200):
        metrics.plan_bytes(size)
    text = told(metrics)
    assert events() == [2, 1, 1, 1]
    assert value(text, "taskbone_plan_build_duration_seconds_sum") == 0.25
    assert value(text, "taskbone_plan_build_duration_seconds_count") == 1
    assert value(text, "taskbone_plan_cache_bytes") == 200, "what it is now"


def test_a_batch_is_noted_with_all_that_is_in_it() -> None:
    metrics = Metrics()
    metrics.batch({"sentiment": 3, "spam": 1}, requests=2, tokens=120, forward_s=0.01)
    text = told(metrics)
    for what, figure in {"requests": 2, "sequences": 4, "tokens": 120, "tasks": 2}.items():
        assert value(text, f"taskbone_batch_{what}_sum") == figure
        assert value(text, f"taskbone_batch_{what}_count") == 1
    assert value(text, "taskbone_batch_duration_seconds_sum") == 0.01


def test_what_is_served_is_told_as_it_is_now() -> None:
    metrics = Metrics()
    metrics.serve([info("a"), info("b", canary=CanaryInfo(2, 10.0), shadow=3)], failed=1)
    text = told(metrics)
    states = {"active": 2, "canary": 1, "shadow": 1, "failed": 1}
    for state, count in states.items():
        assert value(text, "taskbone_tasks", state=state) == count
    assert value(text, "taskbone_overlay_bytes", task="a") == 1000
    about = {"task": "a", "version": "1", "digest": "digest-a-1", "kept_share": "0.5"}
    assert value(text, "taskbone_overlay_info", **about) == 1
    canary = {"task": "b", "version": "2", "code": "200"}
    assert value(text, "taskbone_requests_total", **canary) == 0, "before it is asked"
    assert value(text, "taskbone_shadow_inputs_total", task="b", result="same") == 0

    metrics.serve([info("a", 2, bytes=7)])
    text = told(metrics)
    assert value(text, "taskbone_tasks", state="active") == 1
    assert value(text, "taskbone_overlay_bytes", task="a") == 7
    found = [dict(labels) for name, labels in samples(text) if name == "taskbone_overlay_info"]
    assert [(one["task"], one["version"]) for one in found] == [("a", "2")]
    assert value(text, "taskbone_requests_total", task="a", version="1", code="200") == 0


def test_a_process_alone_is_one_replica_that_answers_while_its_check_passes() -> None:
    metrics = Metrics()
    assert value(told(metrics), "taskbone_replicas_ready") == 0
    wrong: list[Exception] = []

    def check() -> None:
        for error in wrong:
            raise error

    metrics.start(check)
    text = told(metrics)
    assert value(text, "taskbone_replicas") == value(text, "taskbone_replicas_ready") == 1
    assert value(text, "taskbone_process_memory_bytes") > 10_000_000
    wrong.append(EngineError("the engine thread is dead"))
    assert value(told(metrics), "taskbone_replicas_ready") == 0
    wrong.clear()
    metrics.close()
    assert value(told(metrics), "taskbone_replicas_ready") == 0


def test_the_document_says_what_the_code_does() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(taskbone_\w+)` \| (\w+) \|([^|]*)\| ([^|]+) \| (.+) \|$", text, re.M)
    documented = {
        name: (kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels, *_ in rows
    }
    assert documented == {name: (one.kind, one.labels) for name, one in FAMILIES.items()}
    units = {name: unit for name, _, _, unit, _ in rows}
    for name, unit in units.items():
        for word in ("seconds", "bytes", "tokens", "requests", "sequences", "tasks", "replicas"):
            if re.search(rf"_{word}(_total)?$", name):
                assert unit == word, name
    meanings = {name: meaning for name, *_, meaning in rows}
    for name, known in KNOWN.items():
        for value_of_label in {one for labels in known for one in labels}:
            assert f"`{value_of_label}`" in meanings[name], f"{name}: {value_of_label}"
    # Whatever else is named in the text is there, too.
    assert set(re.findall(r"taskbone_\w+", text)) <= FAMILIES.keys()
    bounds = re.search(r"have the buckets (.*)\.$", text, re.M)
    assert bounds
    told = [float(one) for one in re.findall(r"[\d.]+", bounds[1])]
    assert [*(one / 1000 for one in told[:-3]), *told[-3:]] == list(SECONDS)


def test_every_kind_of_change_is_known_beforehand() -> None:
    source = (Path(__file__).parents[2] / "serving" / "lifecycle.py").read_text()
    kinds = set(re.findall(r'_Change\("(\w+)"', source))
    assert {(kind, "done") for kind in kinds} <= set(KNOWN["taskbone_operations_total"])


# --- what the application counts ------------------------------------------------------------------


def test_requests_are_counted_by_task_version_and_status(served: Served) -> None:
    served.predict("abc")
    served.predict("abc")
    served.predict("overload")
    served.predict(["a"], "pairs")
    served.ask("GET", "/v1/tasks")
    served.ask("GET", "/v1/tasks/pairs")
    text = served.ask("GET", "/metrics").text
    counts = {
        (dict(labels)["task"], dict(labels)["version"], dict(labels)["code"]): count
        for (name, labels), count in samples(text).items()
        if name == "taskbone_requests_total"
    }
    assert counts == {
        ("parity", "1", "200"): 2,
        ("parity", "1", "503"): 1,
        ("pairs", "1", "200"): 0,
        ("pairs", "1", "422"): 1,
        ("pairs", "none", "200"): 1,
        ("none", "none", "200"): 1,
    }
    assert value(text, "taskbone_rejected_total", reason="overloaded") == 1
    latencies = "taskbone_request_duration_seconds_count"
    assert value(text, latencies, task="parity", version="1") == 3


def test_the_version_that_answers_is_counted_and_not_the_active_one(served: Served) -> None:
    served.ask("POST", "/v1/tasks/parity/versions?activate=false", content=b"another")
    served.service.metrics.serve(served.service.tasks())  # type: ignore[union-attr]
    pinned = "/v1/tasks/parity/versions/2/predict"
    served.ask("POST", pinned, json={"inputs": "a"})
    served.ask("POST", pinned, json={"inputs": "overload"})
    served.ask("POST", "/v1/tasks/parity/versions/3/predict", json={"inputs": "a"})
    infer = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
    served.ask("POST", "/v2/models/parity/versions/2/infer", json=infer)
    served.predict("a")

    def count(version: str, code: str) -> float:
        labels = {"task": "parity", "version": version, "code": code}
        return served.count("taskbone_requests_total", **labels)

    assert (count("2", "200"), count("2", "503"), count("1", "200")) == (2, 1, 1)
    assert count("none", "404") == 1, "a number that there is not makes no series"
    assert served.count("taskbone_queue_duration_seconds_count", task="parity", version="2") == 2


def test_names_that_clients_make_up_become_no_series(served: Served) -> None:
    for number in range(50):
        served.predict("a", f"made-up-{number}")
        served.ask("GET", f"/v1/tasks/made-up-{number}")
        served.ask("GET", f"/made-up-{number}")
    text = served.ask("GET", "/metrics").text
    assert "made-up" not in text
    labels = {"task": "unknown", "version": "none", "code": "404"}
    assert value(text, "taskbone_requests_total", **labels) == 100


def test_health_and_metrics_are_not_counted_as_work(served: Served) -> None:
    before = served.ask("GET", "/metrics").text
    for path in ("/health/ready", "/metrics/targets", "/v1/stats"):
        assert served.ask("GET", path).status_code == 200
    after = served.ask("GET", "/metrics").text
    assert re.findall("taskbone_requests_total.*", before) == re.findall(
        "taskbone_requests_total.*", after
    )


def test_a_body_over_the_limit_is_a_rejection(serve: Callable[..., Served]) -> None:
    served = serve(max_body_bytes=10)
    served.predict("a" * 100)
    assert served.count("taskbone_rejected_total", reason="too_large") == 1
    assert served.count("taskbone_requests_total", task="parity", code="413") == 1


def test_nothing_that_threads_count_at_once_is_lost(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.serve([info("a"), info("b")])

    def count(task: str) -> None:
        for _ in range(3000):
            metrics.request(task, 1, 200, 0.001)
            metrics.batch({task: 2}, 1, 10, 0.001)
            metrics.plan_lookup("hit")

    threads = [threading.Thread(target=count, args=[task]) for task in "aabb"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.total()
    text = told(metrics)
    for task in "ab":
        labels = {"task": task, "version": "1"}
        assert value(text, "taskbone_requests_total", **labels, code="200") == 6000
        assert value(text, "taskbone_request_duration_seconds_count", **labels) == 6000
    assert value(text, "taskbone_batch_sequences_sum") == 24_000
    assert value(text, "taskbone_plan_cache_events_total", event="hit") == 12_000


# --- several processes ----------------------------------------------------------------------------

COUNT = """
import sys
from pathlib import Path
from tests.serving.test_metrics import Metrics, info
metrics = Metrics(Path(sys.argv[1]))
metrics.serve([info("sentiment")])
metrics.request("sentiment", 1, 200, 0.01)
metrics.batch({"sentiment": 4}, 1, 100, 0.01)
metrics.queued(1000)
metrics.start(lambda: None)
"""


def run_process(folder: Path, script: str) -> str:
    """Run a script in a process that shares the folder; give what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_any_process_tells_what_all_have_counted(tmp_path: Path) -> None:
    for _ in range(2):
        run_process(tmp_path, COUNT + "metrics.close()")
    text = run_process(tmp_path, COUNT + "print(metrics.render()[0].decode())")
    labels = {"task": "sentiment", "version": "1"}
    assert value(text, "taskbone_requests_total", **labels, code="200") == 3
    assert value(text, "taskbone_batch_sequences_sum") == 12
    assert value(text, "taskbone_batch_tokens_bucket", le="+Inf") == 3
    # What an ended process had is gone with it; what each knows of the same is told once.
    assert value(text, "taskbone_queued_tokens") == 1000
    assert value(text, "taskbone_replicas") == 1
    assert value(text, "taskbone_overlay_bytes", task="sentiment") == 1000
    assert [path.name for path in tmp_path.glob("*-*.json")] != []


def test_a_killed_process_leaves_what_it_had_written(tmp_path: Path) -> None:
    run_process(tmp_path, COUNT + "metrics.render()\nimport os\nos._exit(0)")
    metrics = Metrics(tmp_path)
    text = told(metrics)
    labels = {"task": "sentiment", "version": "1", "code": "200"}
    assert value(text, "taskbone_requests_total", **labels) == 1
    assert value(text, "taskbone_queued_tokens") == 0
    assert value(text, "taskbone_replicas") == 1


# --- bounds ---------------------------------------------------------------------------------------


def test_the_number_of_tasks_with_series_of_their_own_is_bounded() -> None:
    metrics = Metrics()
    names = [f"task-{number}" for number in range(MAX_TASKS + 50)]
    metrics.serve([info(name) for name in names])
    for name in names:
        metrics.request(name, 1, 200, 0.001)
        metrics.timings(name, 1, Timings(1, 1, 1, 3))
        metrics.shadow(name, "same", 1)
    text = told(metrics)
    tasks = {dict(labels).get("task") for _, labels in samples(text)} - {None}
    assert len(tasks - {"none", "unknown", "other"}) == MAX_TASKS
    one = {"task": "task-0", "version": "1", "code": "200"}
    assert value(text, "taskbone_requests_total", **one) == 1
    rest = {"task": "other", "version": "other"}
    assert value(text, "taskbone_requests_total", **rest, code="200") == 50
    assert value(text, "taskbone_forward_duration_seconds_count", **rest) == 50
    assert value(text, "taskbone_shadow_inputs_total", task="other", result="same") == 50
    assert value(text, "taskbone_overlay_bytes", task="other") == 50 * 1000


def test_tasks_that_come_and_go_leave_no_more_series_than_there_may_be() -> None:
    metrics = Metrics()
    lines: list[int] = []
    for number in range(1000):
        metrics.serve([info("stays"), info(f"task-{number}", number + 1)])
        metrics.request(f"task-{number}", number + 1, 200, 0.001)
        metrics.request("stays", 1, 200, 0.001)
        if number % 250 == 249:
            lines.append(len(told(metrics).splitlines()))
    assert lines[1:] == [lines[1]] * 3
    text = told(metrics)
    labels = {"task": "stays", "version": "1", "code": "200"}
    assert value(text, "taskbone_requests_total", **labels) == 1000
    last = {"task": "task-999", "version": "1000", "code": "200"}
    assert value(text, "taskbone_requests_total", **last) == 1


def test_a_task_with_too_many_versions_keeps_its_name() -> None:
    metrics = Metrics()
    metrics.serve([info("a", version) for version in range(1, MAX_VERSIONS + 11)])
    metrics.request("a", MAX_VERSIONS + 5, 200, 0.001)
    metrics.request("a", None, 404, 0.001)
    text = told(metrics)
    assert value(text, "taskbone_requests_total", task="a", version="other", code="200") == 1
    assert value(text, "taskbone_requests_total", task="a", version="none", code="404") == 1
