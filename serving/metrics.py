"""The server's metrics: names, labels and buckets. The only file that knows `prometheus_client`.

Every replica writes its own memory-mapped files into one folder and `render` sums over them: any
replica answers for the whole node. The series of a task are made when it is loaded, so that they
start at 0. A task that was never loaded has no label of its own, and neither has one beyond the
first `MAX_TASKS`: those share the label `other`, so that series and memory stay bounded.

`prometheus_client` looks for the variable PROMETHEUS_MULTIPROC_DIR when it is first imported: who
wants the sum over several processes sets it before importing this module.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from serving.config import METRICS_FOLDER_VARIABLE
from serving.types import Timings

UNKNOWN_TASK: Final = "unknown"
NO_TASK: Final = "none"
OTHER_TASKS: Final = "other"
MAX_TASKS: Final = 200
"""Tasks with series of their own, about a hundred each."""

MILLISECONDS: Final = (0.5, 1, 2.5, 5, 7.5, 10, 15, 25, 50, 75, 100, 250, 500, 1000, 2500, 10000)
SECONDS: Final = tuple(upper / 1000 for upper in MILLISECONDS)
SEQUENCES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TASKS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)

_LIVE_GAUGE = re.compile(r"gauge_live[a-z]*_(\d+)\.db")


class Metrics:
    """All series of one process. Safe to call from several threads."""

    def __init__(self) -> None:
        folder = os.environ.get(METRICS_FOLDER_VARIABLE)
        self._folder = Path(folder) if folder else None
        self._names = {UNKNOWN_TASK, NO_TASK}
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "taskbone_requests_total",
            "Requests under /v1, by task and HTTP status.",
            ["task", "code"],
            registry=registry,
        )
        self._request_seconds = _seconds(
            "request", "A request, from first byte in to last out", self
        )
        self._tokenize_seconds = _seconds("tokenize", "Turning a request's texts into tokens", self)
        self._queue_seconds = _seconds("queue", "A request's wait for the engine", self)
        self._forward_seconds = _seconds("forward", "The forwards that answered a request", self)
        self._batch_seconds = Histogram(
            "taskbone_batch_duration_seconds",
            "One forward of the engine over one batch.",
            buckets=SECONDS,
            registry=registry,
        )
        self._batch_sequences = Histogram(
            "taskbone_batch_sequences",
            "Sequences of a task in one batch.",
            ["task"],
            buckets=SEQUENCES,
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "taskbone_batch_tokens", "Tokens in one batch.", buckets=TOKENS, registry=registry
        )
        self._batch_tasks = Histogram(
            "taskbone_batch_tasks",
            "Different tasks in one batch.",
            buckets=TASKS,
            registry=registry,
        )
        self._queued_tokens = Gauge(
            "taskbone_queued_tokens",
            "Tokens that wait for the engine.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._rejected = Counter(
            "taskbone_rejected_total",
            "Requests that were turned away before any work was done, by reason.",
            ["reason"],
            registry=registry,
        )
        self._registrations = Counter(
            "taskbone_registrations_total",
            "Uploads of a task's version, by result.",
            ["result"],
            registry=registry,
        )
        self._operations = Counter(
            "taskbone_operations_total",
            "Changes of what is served, by kind and how they ended.",
            ["kind", "result"],
            registry=registry,
        )
        self._shadow = Counter(
            "taskbone_shadow_inputs_total",
            "Inputs that a task's shadow version was asked, too: `same` label, `different`, "
            "`failed`, or `skipped` for want of time.",
            ["task", "result"],
            registry=registry,
        )
        self._plan_lookups = Counter(
            "taskbone_plan_lookups_total",
            "Plans looked up: `hit`, it was warm; `miss`, it answered as it was.",
            ["result"],
            registry=registry,
        )
        self._plan_build_seconds = Histogram(
            "taskbone_plan_build_duration_seconds",
            "Making a plan warm, beside the engine.",
            buckets=SECONDS,
            registry=registry,
        )
        self._plan_evictions = Counter(
            "taskbone_plan_evictions_total",
            "Warm plans that made room for others.",
            registry=registry,
        )
        self._plan_bytes = Gauge(
            "taskbone_plan_bytes",
            "Memory of all plans.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        for result in ("hit", "miss"):
            self._plan_lookups.labels(result)
        self._tasks = Gauge(
            "taskbone_tasks", "Tasks loaded.", registry=registry, multiprocess_mode="livemax"
        )

    def prepare(self, task: str) -> None:
        """Make the series of a loaded task, so that they are there, at 0, before it is asked."""
        if task in self._names or len(self._names) >= MAX_TASKS + 2:
            return
        self._names.add(task)
        self._requests.labels(task, "200")
        for histogram in self._by_task():
            histogram.labels(task)

    def tasks(self, count: int) -> None:
        """Note how many tasks are loaded."""
        self._tasks.set(count)

    def request(self, task: str, code: int, duration_s: float) -> None:
        """Count one answered request. `task`: a loaded task, `UNKNOWN_TASK` or `NO_TASK`."""
        label = self._label(task)
        self._requests.labels(label, str(code)).inc()
        self._request_seconds.labels(label).observe(duration_s)

    def timings(self, task: str, timings: Timings) -> None:
        """Note where the time of one request to a loaded task went."""
        label = self._label(task)
        self._tokenize_seconds.labels(label).observe(timings.tokenize_ms / 1000)
        self._queue_seconds.labels(label).observe(timings.queue_ms / 1000)
        self._forward_seconds.labels(label).observe(timings.forward_ms / 1000)

    def batch(self, sequences: Mapping[str, int], tokens: int, forward_s: float) -> None:
        """Note one forward of the engine: sequences by task, tokens in all, seconds taken."""
        for task, count in sequences.items():
            self._batch_sequences.labels(self._label(task)).observe(count)
        self._batch_tokens.observe(tokens)
        self._batch_tasks.observe(len(sequences))
        self._batch_seconds.observe(forward_s)

    def queued(self, tokens: int) -> None:
        """Set how many tokens wait for this process's engine."""
        self._queued_tokens.set(tokens)

    def rejected(self, reason: str) -> None:
        """Count a request turned away; `reason`: an error type of the API, such as `overloaded`."""
        self._rejected.labels(reason).inc()

    def registrations(self, result: str) -> None:
        """Count an upload: `result` is `created`, `unchanged` or `refused`."""
        self._registrations.labels(result).inc()

    def operation(self, kind: str, result: str) -> None:
        """Count a change of what is served: `result` is `done` or `failed`."""
        self._operations.labels(kind, result).inc()

    def shadow(self, task: str, result: str, inputs: int) -> None:
        """Count inputs that a shadow was asked: `same`, `different`, `failed` or `skipped`."""
        self._shadow.labels(self._label(task), result).inc(inputs)

    def plan_lookup(self, result: str) -> None:
        """Count a plan looked up: `hit` or `miss`."""
        self._plan_lookups.labels(result).inc()

    def plan_built(self, seconds: float) -> None:
        """Count a plan made warm, and the time it took."""
        self._plan_build_seconds.observe(seconds)

    def plan_evicted(self) -> None:
        """Count a warm plan that made room for another."""
        self._plan_evictions.inc()

    def plan_bytes(self, size: int) -> None:
        """Set the memory of this process's plans."""
        self._plan_bytes.set(size)

    def render(self) -> tuple[bytes, str]:
        """The metrics of all processes that share the folder, and their content type."""
        if self._folder is None:
            return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
        _forget_dead_processes(self._folder)
        summed = CollectorRegistry()
        MultiProcessCollector(summed, path=str(self._folder))  # type: ignore[no-untyped-call]
        return generate_latest(summed), CONTENT_TYPE_PLAIN_0_0_4

    def _label(self, task: str) -> str:
        return task if task in self._names else OTHER_TASKS

    def _by_task(self) -> tuple[Histogram, ...]:
        return (
            self._request_seconds,
            self._tokenize_seconds,
            self._queue_seconds,
            self._forward_seconds,
            self._batch_sequences,
        )

    @property
    def registry(self) -> CollectorRegistry:
        """Where this process's own series are registered."""
        return self._registry


def _seconds(name: str, what: str, metrics: Metrics) -> Histogram:
    return Histogram(
        f"taskbone_{name}_duration_seconds",
        f"{what}, in seconds.",
        ["task"],
        buckets=SECONDS,
        registry=metrics.registry,
    )


def _forget_dead_processes(folder: Path) -> None:
    """Drop the gauges of ended processes; what they counted stays in the sums."""
    for path in folder.glob("gauge_live*.db"):
        match = _LIVE_GAUGE.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            # Another replica may be doing the same.
            with suppress(FileNotFoundError):
                mark_process_dead(int(match[1]), str(folder))  # type: ignore[no-untyped-call]


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
