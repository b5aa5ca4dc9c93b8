"""The figures of `GET /v1/stats`: what a machine's replicas have counted, by task, for whoever
draws it. Knows the metrics' names; no HTTP.
"""

import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from serving.metrics import FAMILIES, NO_TASK, SECONDS, UNKNOWN_TASK, Metrics
from serving.series import Labels, Values

KEPT_S = 1.0
"""For so long the same figures are told again."""


@dataclass(frozen=True, slots=True)
class BackboneStats:
    """The backbone, and the size of its tensors as they are stored."""

    name: str
    fingerprint: str
    bytes: int


@dataclass(frozen=True, slots=True)
class PlanCacheStats:
    """Memory of the plans, and what happened to them."""

    bytes: int
    hit: int
    miss: int
    build: int
    evict: int


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took: how often for each bound, and at last above them all."""

    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True, slots=True)
class TaskStats:
    """One task, over its versions."""

    version: int | None
    """The active one; null for a task that is not served any more, and for `other`."""
    overlay_bytes: int
    requests: dict[str, int]
    """By HTTP status."""
    latency: Times
    tokenize: Times
    queue: Times
    forward: Times


@dataclass(frozen=True, slots=True)
class Stats:
    """What this machine's replicas have counted since they started. Take two of the same node, and
    subtract."""

    node: str
    """The machine's name. In a cluster every front door tells of its own machine."""
    at: float
    """Seconds since 1970."""
    replicas: int
    replicas_ready: int
    queued_tokens: int
    memory_bytes: int
    backbone: BackboneStats
    plan_cache: PlanCacheStats
    rejected: dict[str, int]
    bounds_s: tuple[float, ...]
    """The largest duration that each count takes."""
    tasks: dict[str, TaskStats]


_JSON = TypeAdapter(Stats)


class StatsReader:
    """Works the figures out at most once a second. May be used from several threads."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._told = b""

    def read(self) -> bytes:
        """The figures as JSON. Takes milliseconds: not for the event loop's thread."""
        with self._lock:
            if time.monotonic() - self._at > KEPT_S:
                self._told = _JSON.dump_json(
                    stats_of(self._metrics.total(), time.time(), socket.gethostname())
                )
                self._at = time.monotonic()
            return self._told


def stats_of(values: Values, at: float, node: str) -> Stats:
    """The figures that stand in the metrics."""
    name, fingerprint = next(iter(values["taskbone_backbone_info"]), ("", ""))
    events = _by_label(values, "taskbone_plan_cache_events_total")
    return Stats(
        node=node,
        at=at,
        replicas=_number(values, "taskbone_replicas"),
        replicas_ready=_number(values, "taskbone_replicas_ready"),
        queued_tokens=_number(values, "taskbone_queued_tokens"),
        memory_bytes=_number(values, "taskbone_process_memory_bytes"),
        backbone=BackboneStats(name, fingerprint, _number(values, "taskbone_backbone_bytes")),
        plan_cache=PlanCacheStats(_number(values, "taskbone_plan_cache_bytes"), **events),
        rejected=_by_label(values, "taskbone_rejected_total"),
        bounds_s=SECONDS,
        tasks=_tasks(values),
    )


def _tasks(values: Values) -> dict[str, TaskStats]:
    # While another version takes over, replicas may have one each.
    active = dict(
        sorted((task, int(number)) for task, number, *_ in values["taskbone_overlay_info"])
    )
    sizes = _by_label(values, "taskbone_overlay_bytes")
    requests: dict[str, dict[str, int]] = {}
    for (task, _, code), (count,) in values["taskbone_requests_total"].items():
        by_code = requests.setdefault(task, {})
        by_code[code] = by_code.get(code, 0) + int(count)
    times = {
        what: _times(values[f"taskbone_{what}_duration_seconds"])
        for what in ("request", "tokenize", "queue", "forward")
    }
    # What is not of any task has no place here, unless a task is really called so.
    names = {*active, *sizes, *(requests.keys() - {NO_TASK, UNKNOWN_TASK})}
    none = Times((0,) * (len(SECONDS) + 1), 0.0)
    return {
        name: TaskStats(
            version=active.get(name),
            overlay_bytes=sizes.get(name, 0),
            requests=requests.get(name, {}),
            latency=times["request"].get(name, none),
            tokenize=times["tokenize"].get(name, none),
            queue=times["queue"].get(name, none),
            forward=times["forward"].get(name, none),
        )
        for name in sorted(names)
    }


def _times(series: dict[Labels, list[float]]) -> dict[str, Times]:
    """Histograms by task, over its versions."""
    found: dict[str, list[float]] = {}
    for (task, _), counts in series.items():
        known = found.get(task)
        found[task] = (
            counts if known is None else [a + b for a, b in zip(known, counts, strict=True)]
        )
    return {
        task: Times(tuple(int(count) for count in counts[:-1]), counts[-1])
        for task, counts in found.items()
    }


def _number(values: Values, name: str) -> int:
    return int(values[name].get((), [0])[0])


def _by_label(values: Values, name: str) -> dict[str, int]:
    """A metric with one label."""
    assert len(FAMILIES[name].labels) == 1
    return {labels[0]: int(series[0]) for labels, series in values[name].items()}


def example() -> dict[str, Any]:
    """For the documentation."""
    counts = [0] * (len(SECONDS) + 1)
    counts[3] = 12
    times = {"counts": counts, "sum_s": 0.045}
    return {
        "node": "worker-1",
        "at": 1764492000.1,
        "replicas": 3,
        "replicas_ready": 3,
        "queued_tokens": 0,
        "memory_bytes": 612_000_000,
        "backbone": {"name": "minilm-l6", "fingerprint": "9f" * 32, "bytes": 90_000_000},
        "plan_cache": {"bytes": 40_000_000, "hit": 900, "miss": 11, "build": 11, "evict": 0},
        "rejected": {"overloaded": 3},
        "bounds_s": list(SECONDS),
        "tasks": {
            "sentiment": {
                "version": 1,
                "overlay_bytes": 74_000,
                "requests": {"200": 12, "503": 1},
                "latency": times,
                "tokenize": times,
                "queue": times,
                "forward": times,
            }
        },
    }
