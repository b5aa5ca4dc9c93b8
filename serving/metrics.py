"""The server's metrics: names, labels and buckets. The only file that knows `prometheus_client`.

Counting is adding to numbers of this process under a lock, a microsecond a request. Once a second
they are written into a file, and `render` adds up the files of all replicas: any of them answers
for the whole machine. Series are made before the first request, so that they start at 0; how many
there can be is bounded (`serving/series.py`).
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from model_store.manifest import BackboneReference
from serving.reporter import Reporter
from serving.series import (
    NO_TASK,
    OTHER,
    UNKNOWN_TASK,
    ByVersion,
    Family,
    Labels,
    Values,
    copy,
    observe,
)
from serving.statuses import REJECTIONS, STATUSES
from serving.types import TaskInfo, Timings

__all__ = ["FAMILIES", "NO_TASK", "OTHER", "SECONDS", "UNKNOWN_TASK", "Metrics"]

MAX_TASKS: Final = 200
"""Tasks with series of their own at one time."""
MAX_VERSIONS: Final = 400
"""Versions with series of their own, about eighty each."""
MILLISECONDS: Final = (0.5, 1, 2.5, 5, 7.5, 10, 15, 25, 50, 75, 100, 250, 500, 1000, 2500, 10000)
SECONDS: Final = tuple(upper / 1000 for upper in MILLISECONDS)
REQUESTS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
TOKENS: Final = tuple(float(2**power) for power in range(4, 15))
TASKS: Final = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)

_VERSION = ("task", "version")

FAMILIES: Final[dict[str, Family]] = {
    "taskbone_requests_total": Family(
        "counter",
        "Requests to the API, by task, by the version that answered, and by HTTP status.",
        (*_VERSION, "code"),
    ),
    "taskbone_request_duration_seconds": Family(
        "histogram", "A request, from its head in to its answer out.", _VERSION, SECONDS
    ),
    "taskbone_tokenize_duration_seconds": Family(
        "histogram", "Turning a request's texts into tokens.", _VERSION, SECONDS
    ),
    "taskbone_queue_duration_seconds": Family(
        "histogram", "A request's wait for the engine.", _VERSION, SECONDS
    ),
    "taskbone_forward_duration_seconds": Family(
        "histogram", "The forwards that answered a request.", _VERSION, SECONDS
    ),
    "taskbone_batch_duration_seconds": Family(
        "histogram", "One forward of the engine over one batch.", bounds=SECONDS
    ),
    "taskbone_batch_requests": Family("histogram", "Requests in one batch.", bounds=REQUESTS),
    "taskbone_batch_sequences": Family("histogram", "Sequences in one batch.", bounds=REQUESTS),
    "taskbone_batch_tokens": Family("histogram", "Tokens in one batch.", bounds=TOKENS),
    "taskbone_batch_tasks": Family("histogram", "Different tasks in one batch.", bounds=TASKS),
    "taskbone_queued_tokens": Family("gauge", "Tokens that wait for the engine."),
    "taskbone_rejected_total": Family(
        "counter",
        "Requests that were turned away, or given up for want of time, by reason.",
        ("reason",),
    ),
    "taskbone_plan_cache_bytes": Family("gauge", "Memory of all plans."),
    "taskbone_plan_cache_events_total": Family(
        "counter",
        "Plans: hit, it was warm; miss, it answered as it was; build, it was made warm; evict, it "
        "made room for another.",
        ("event",),
    ),
    "taskbone_plan_build_duration_seconds": Family(
        "histogram", "Making a plan warm, beside the engine.", bounds=SECONDS
    ),
    "taskbone_overlay_bytes": Family(
        "gauge", "Size of the active version's artifact.", ("task",), together="max"
    ),
    "taskbone_backbone_bytes": Family(
        "gauge", "Size of the backbone's tensors as they are stored.", together="max"
    ),
    "taskbone_tasks": Family(
        "gauge",
        "Tasks: active, with a canary, with a shadow, and those whose active version failed.",
        ("state",),
        together="max",
    ),
    "taskbone_registrations_total": Family(
        "counter", "Uploads of a task's version, by result.", ("result",)
    ),
    "taskbone_operations_total": Family(
        "counter", "Changes of what is served, by kind and how they ended.", ("kind", "result")
    ),
    "taskbone_shadow_inputs_total": Family(
        "counter",
        "Inputs that a task's shadow version was asked, too, by what came of it.",
        ("task", "result"),
    ),
    "taskbone_replicas": Family("gauge", "Replicas of this machine."),
    "taskbone_replicas_ready": Family("gauge", "Replicas of this machine that answer."),
    "taskbone_process_memory_bytes": Family(
        "gauge", "Memory of this machine's replicas; what they share counts once."
    ),
    "taskbone_overlay_info": Family(
        "gauge",
        "1 for the active version of each task.",
        ("task", "version", "digest", "kept_share"),
        together="max",
    ),
    "taskbone_backbone_info": Family(
        "gauge", "1 for the backbone that is served.", ("name", "fingerprint"), together="max"
    ),
    "taskbone_build_info": Family(
        "gauge",
        "1 for what serves: Taskbone's version, the device and the number format.",
        ("version", "device", "precision"),
        together="max",
    ),
}
"""Every metric, by name."""

KNOWN: Final[dict[str, tuple[Labels, ...]]] = {
    "taskbone_rejected_total": tuple(
        (reason,)
        for reason in sorted({one.type for one in STATUSES.values() if one.code in REJECTIONS})
    ),
    "taskbone_plan_cache_events_total": (("hit",), ("miss",), ("build",), ("evict",)),
    "taskbone_tasks": (("active",), ("canary",), ("shadow",), ("failed",)),
    "taskbone_registrations_total": (("created",), ("unchanged",), ("refused",)),
    "taskbone_operations_total": tuple(
        (kind, result)
        for kind in "register activate rollback canary shadow deactivate delete".split()
        for result in ("done", "failed")
    ),
}
"""Labels that are known beforehand."""

_PARTS = ("request", "tokenize", "queue", "forward")
SHADOW_RESULTS: Final = ("same", "different", "failed", "skipped")


class Metrics(Collector):
    """All that one process counts. Safe to call from several threads."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: where the replicas of this machine write; None for a process alone."""
        self._lock = threading.Lock()
        self._values: Values = {
            name: {
                labels: family.new() for labels in KNOWN.get(name, () if family.labels else ((),))
            }
            for name, family in FAMILIES.items()
        }
        self._versions = ByVersion(
            self._values,
            FAMILIES,
            "taskbone_requests_total",
            tuple(f"taskbone_{what}_duration_seconds" for what in _PARTS),
            max_tasks=MAX_TASKS,
            max_versions=MAX_VERSIONS,
        )
        self._batch = [
            (self._values[f"taskbone_batch_{what}"][()], FAMILIES[f"taskbone_batch_{what}"].bounds)
            for what in ("requests", "sequences", "tokens", "tasks", "duration_seconds")
        ]
        self._reporter = Reporter(self._copy, self._set, FAMILIES, folder)
        self.registry = CollectorRegistry()
        """With all replicas' metrics."""
        self.registry.register(self)

    # --- requests -------------------------------------------------------------------------------

    def request(self, task: str, version: int | None, code: int, duration_s: float) -> None:
        """Count one answered request. `task`: a loaded task, `UNKNOWN_TASK` or `NO_TASK`;
        `version`: the one that answered or would have, if the request was for one."""
        with self._lock:
            series = self._versions.find(task, version)
            self._versions.count(series, code)[0] += 1
            observe(series.histograms[0], SECONDS, duration_s)

    def timings(self, task: str, version: int, timings: Timings) -> None:
        """Note where the time of one request to a loaded task went."""
        with self._lock:
            _, tokenize, queue, forward = self._versions.find(task, version).histograms
            observe(tokenize, SECONDS, timings.tokenize_ms / 1000)
            observe(queue, SECONDS, timings.queue_ms / 1000)
            observe(forward, SECONDS, timings.forward_ms / 1000)

    def batch(
        self, sequences: Mapping[str, int], requests: int, tokens: int, forward_s: float
    ) -> None:
        """Note one forward of the engine: sequences by task, requests, tokens, seconds."""
        figures = (requests, sum(sequences.values()), tokens, len(sequences), forward_s)
        with self._lock:
            for (series, bounds), figure in zip(self._batch, figures, strict=True):
                observe(series, bounds, figure)

    def queued(self, tokens: int) -> None:
        """Set how many tokens wait for this process's engine."""
        self._set("taskbone_queued_tokens", tokens)

    def rejected(self, reason: str) -> None:
        """Count a request turned away; `reason`: an error type of the API, such as `overloaded`."""
        self._count("taskbone_rejected_total", reason)

    # --- what is served -------------------------------------------------------------------------

    def serve(self, served: Sequence[TaskInfo], failed: int = 0) -> None:
        """Note what is served from now on, and how many tasks are not as they should be."""
        with self._lock:
            gone = self._versions.serve(_answering(served))
            shadows = self._values["taskbone_shadow_inputs_total"]
            for labels in [labels for labels in shadows if labels[0] in gone]:
                del shadows[labels]
            sizes: dict[Labels, list[float]] = {}
            infos: dict[Labels, list[float]] = {}
            for info in served:
                label = self._versions.task_label(info.task)
                sizes.setdefault((label,), [0])[0] += info.bytes
                if label == info.task:
                    about = (str(info.version), info.digest, str(info.kept_share))
                    infos[label, *about] = [1]
                if info.shadow is not None:
                    for result in SHADOW_RESULTS:
                        shadows.setdefault((label, result), [0])
            self._values["taskbone_overlay_bytes"] = sizes
            self._values["taskbone_overlay_info"] = infos
            self._values["taskbone_tasks"] = {
                ("active",): [len(served)],
                ("canary",): [sum(info.canary is not None for info in served)],
                ("shadow",): [sum(info.shadow is not None for info in served)],
                ("failed",): [failed],
            }

    def backbone(self, backbone: BackboneReference, size: int) -> None:
        """Note which backbone is served, and the bytes of its tensors."""
        self._set("taskbone_backbone_info", 1, backbone.name, backbone.fingerprint)
        self._set("taskbone_backbone_bytes", size)

    def build(self, version: str, device: str, precision: str) -> None:
        """Note what serves."""
        self._set("taskbone_build_info", 1, version, device, precision)

    def registrations(self, result: str) -> None:
        """Count an upload: `result` is `created`, `unchanged` or `refused`."""
        self._count("taskbone_registrations_total", result)

    def operation(self, kind: str, result: str) -> None:
        """Count a change of what is served: `result` is `done` or `failed`."""
        self._count("taskbone_operations_total", kind, result)

    def shadow(self, task: str, result: str, inputs: int) -> None:
        """Count inputs that a shadow was asked: `same`, `different`, `failed` or `skipped`."""
        with self._lock:
            series = self._values["taskbone_shadow_inputs_total"]
            series.setdefault((self._versions.task_label(task), result), [0])[0] += inputs

    # --- plans ----------------------------------------------------------------------------------

    def plan_lookup(self, result: str) -> None:
        """Count a plan looked up: `hit` or `miss`."""
        self._count("taskbone_plan_cache_events_total", result)

    def plan_built(self, seconds: float) -> None:
        """Count a plan made warm, and the time it took."""
        self._count("taskbone_plan_cache_events_total", "build")
        with self._lock:
            observe(self._values["taskbone_plan_build_duration_seconds"][()], SECONDS, seconds)

    def plan_evicted(self) -> None:
        """Count a warm plan that made room for another."""
        self._count("taskbone_plan_cache_events_total", "evict")

    def plan_bytes(self, size: int) -> None:
        """Set the memory of this process's plans."""
        self._set("taskbone_plan_cache_bytes", size)

    # --- all replicas ---------------------------------------------------------------------------

    def start(self, check: Callable[[], None]) -> None:
        """Tell the others once a second. `check` raises where predictions are not answered."""
        self._reporter.start(check)

    def close(self) -> None:
        """Tell the others what was counted last; this replica answers no more."""
        self._reporter.close()

    def render(self) -> tuple[bytes, str]:
        """The metrics of this machine's replicas, and their content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4

    def total(self) -> Values:
        """What this machine's replicas have together."""
        return self._reporter.total()

    def collect(self) -> Iterable[Metric]:
        """The same for `prometheus_client`."""
        return [_metric(name, series) for name, series in self.total().items()]

    def _copy(self) -> Values:
        with self._lock:
            return copy(self._values)

    def _set(self, name: str, value: float, *labels: str) -> None:
        with self._lock:
            self._values[name][labels] = [value]

    def _count(self, name: str, *labels: str) -> None:
        with self._lock:
            self._values[name].setdefault(labels, [0])[0] += 1


def _answering(served: Iterable[TaskInfo]) -> Iterable[tuple[str, int]]:
    """The versions that answer requests: of every task the active one, then the canaries."""
    yield from ((info.task, info.version) for info in served)
    yield from ((info.task, info.canary.version) for info in served if info.canary)


def _metric(name: str, series: dict[Labels, list[float]]) -> Metric:
    family = FAMILIES[name]
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
        bounds = [*map(str, family.bounds), "+Inf"]
        for labels, values in series.items():
            counted, buckets = 0.0, []
            for bound, count in zip(bounds, values, strict=False):
                counted += count
                buckets.append((bound, counted))
            histogram.add_metric(labels, buckets, values[-1])
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    numbers = kind(name, family.help, labels=family.labels)
    for labels, values in series.items():
        numbers.add_metric(labels, values[0])
    return numbers
