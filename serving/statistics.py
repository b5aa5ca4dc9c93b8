"""What a server counted between two looks at `GET /v1/stats`: rates, quantiles, shares. Pure.

Counters and histograms only grow while the server's replicas live; a client takes two samples and
subtracts. Quantiles are interpolated in the histogram's buckets as Prometheus does it, so that a
terminal and a dashboard show the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from pydantic import BaseModel, ConfigDict, model_validator

PHASES = ("tokenize", "queue", "forward")
"""Where a request's time goes that the server measures; the rest is reading and writing HTTP."""
QUANTILES = (0.5, 0.95, 0.99)


class _Sampled(BaseModel):
    """What a newer server says besides is not needed here."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Histogram(_Sampled):
    """How many durations fell into each bucket, and their sum. The last bucket has no bound."""

    counts: tuple[int, ...]
    sum_s: float


class BackboneFacts(_Sampled):
    """The one backbone of a server."""

    name: str
    fingerprint: str
    bytes: int


class PlanCacheFacts(_Sampled):
    """What became of the plans that were asked for, counted since the start."""

    bytes: int
    hit: int
    miss: int
    build: int
    evict: int


class TaskCounts(_Sampled):
    """One task over all its versions, counted since the start; `version` is the active one."""

    version: int | None = None
    overlay_bytes: int = 0
    requests: dict[str, int]
    """By status."""
    latency: Histogram
    tokenize: Histogram
    queue: Histogram
    forward: Histogram


class Sample(_Sampled):
    """The answer of `GET /v1/stats`: one machine's replicas, summed. `at` is a Unix time.

    `node` is its name; an older server does not tell.
    """

    node: str = ""
    at: float
    replicas: int
    replicas_ready: int
    queued_tokens: int
    memory_bytes: int
    backbone: BackboneFacts
    plan_cache: PlanCacheFacts
    rejected: dict[str, int]
    """By reason."""
    bounds_s: tuple[float, ...]
    """The upper bounds of all histograms' buckets."""
    tasks: dict[str, TaskCounts]

    @model_validator(mode="after")
    def _buckets_have_bounds(self) -> "Sample":
        for name, task in self.tasks.items():
            for phase in ("latency", *PHASES):
                if len(getattr(task, phase).counts) != len(self.bounds_s) + 1:
                    raise ValueError(f"tasks.{name}.{phase}: one count per bound and one more")
        return self


@dataclass(frozen=True)
class TaskRates:
    """One task between two samples. `error_share`: of its requests, not answered with a 2xx."""

    task: str
    version: int | None
    requests_per_s: float
    statuses_per_s: Mapping[str, float]
    error_share: float
    quantiles_s: tuple[float, ...] | None
    """At `QUANTILES`; None where nothing was answered."""
    mean_s: float | None
    shares: Mapping[str, float] | None
    """Of the time of all its requests, for each of `PHASES` and `other`."""


@dataclass(frozen=True)
class Rates:
    """A server between two samples, `seconds` apart."""

    seconds: float
    tasks: tuple[TaskRates, ...]
    rejected_per_s: Mapping[str, float]
    plan_hit_share: float | None
    """Of the plans that were asked for; None where none was."""

    @property
    def requests_per_s(self) -> float:
        """Of all tasks."""
        return sum(task.requests_per_s for task in self.tasks)


def quantile(share: float, counts: Sequence[int], bounds: Sequence[float]) -> float | None:
    """The value that `share` of what was counted does not exceed; None where nothing was.

    Linear inside the bucket, the first of which begins at 0; where it falls into the last one,
    which has no bound, the highest bound.
    """
    total = sum(counts)
    if total == 0:
        return None
    rank = share * total
    below = 0
    for at, cumulative in enumerate(accumulate(counts)):
        if cumulative >= rank and counts[at]:
            break
        below = cumulative
    if at == len(bounds):
        return bounds[-1]
    low = bounds[at - 1] if at else 0.0
    return low + (bounds[at] - low) * (rank - below) / counts[at]


def follows(before: Sample, after: Sample) -> bool:
    """Whether the second sample can be subtracted from: it is of the same machine, later, has the
    same bounds, and no counter has fallen. They fall where a replica has ended that had counted."""
    if after.node != before.node or after.at <= before.at or after.bounds_s != before.bounds_s:
        return False
    counted = dict(_counters(after))
    return all(counted.get(name, 0) >= count for name, count in _counters(before))


def between(before: Sample, after: Sample) -> Rates:
    """What was counted from one sample to one that follows it."""
    seconds = after.at - before.at
    hits = after.plan_cache.hit - before.plan_cache.hit
    asked = hits + after.plan_cache.miss - before.plan_cache.miss
    return Rates(
        seconds=seconds,
        tasks=tuple(
            _task(name, before.tasks.get(name), task, after.bounds_s, seconds)
            for name, task in sorted(after.tasks.items())
        ),
        rejected_per_s={
            reason: (count - before.rejected.get(reason, 0)) / seconds
            for reason, count in sorted(after.rejected.items())
        },
        plan_hit_share=hits / asked if asked else None,
    )


def _task(
    name: str,
    before: TaskCounts | None,
    after: TaskCounts,
    bounds: Sequence[float],
    seconds: float,
) -> TaskRates:
    old = before.requests if before else {}
    statuses = {status: count - old.get(status, 0) for status, count in after.requests.items()}
    requests = sum(statuses.values())
    errors = sum(count for status, count in statuses.items() if not status.startswith("2"))
    counts, sums = _since(before, after, "latency")
    parts = {phase: _since(before, after, phase)[1] for phase in PHASES}
    found = [quantile(share, counts, bounds) for share in QUANTILES]
    answered = [value for value in found if value is not None]
    return TaskRates(
        task=name,
        version=after.version,
        requests_per_s=requests / seconds,
        statuses_per_s={
            status: count / seconds for status, count in sorted(statuses.items()) if count
        },
        error_share=errors / requests if requests else 0.0,
        quantiles_s=tuple(answered) if answered else None,
        mean_s=sums / sum(counts) if answered else None,
        shares=_shares(parts, sums) if sums > 0 else None,
    )


def _shares(parts: Mapping[str, float], whole_s: float) -> dict[str, float]:
    # The phases of one request are measured inside its latency; but for rounding they fit.
    whole_s = max(whole_s, sum(parts.values()))
    shares = {phase: spent / whole_s for phase, spent in parts.items()}
    return shares | {"other": max(0.0, 1.0 - sum(shares.values()))}


def _since(
    before: TaskCounts | None, after: TaskCounts, phase: str
) -> tuple[tuple[int, ...], float]:
    new: Histogram = getattr(after, phase)
    if before is None:
        return new.counts, new.sum_s
    old: Histogram = getattr(before, phase)
    counts = tuple(new - old for old, new in zip(old.counts, new.counts, strict=True))
    return counts, max(0.0, new.sum_s - old.sum_s)


def _counters(sample: Sample) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every counter by its name; one that is not there has counted nothing."""
    for reason, count in sample.rejected.items():
        yield ("rejected", reason), count
    for event in ("hit", "miss"):
        yield ("plan_cache", event), getattr(sample.plan_cache, event)
    for name, task in sample.tasks.items():
        statuses = ((status, count) for status, count in task.requests.items())
        phases = (
            (f"{phase} {at}", count)
            for phase in ("latency", *PHASES)
            for at, count in enumerate(getattr(task, phase).counts)
        )
        for part, count in chain(statuses, phases):
            yield ("task", name, part), count
