"""What a load test measured: a tally of the outcomes, and the figures that are made of it. Pure.

Of each outcome only its latency, its status and the server's own timings are kept, so that minutes
at thousands of requests a second fit into memory.
"""

import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from serving.load import LOST, Outcome

PERCENTILES = (50, 95, 99)
TIMINGS = ("tokenize", "queue", "forward", "total")
REFUSALS = (429, 503)
_TIMING = re.compile(rb'"(tokenize|queue|forward|total)_ms": ?([-+.0-9eE]+)')
_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""Of one power of ten to the next, where the buckets of the drawn histogram begin."""


class Tally:
    """Takes outcomes one by one. `until`: answers that come later count for no throughput."""

    def __init__(self, until: float = math.inf) -> None:
        self._until = until
        self.in_time = 0
        self.latencies_ms = array("d")
        """Of all that was answered with a 200."""
        self.statuses: Counter[int] = Counter()
        self.server_ms = dict.fromkeys(TIMINGS, 0.0)
        """Sums of the server's own timings."""

    def add(self, outcome: Outcome) -> None:
        """Count one request that has ended."""
        self.statuses[outcome.status] += 1
        if outcome.status != 200:
            return
        self.in_time += outcome.ended <= self._until
        self.latencies_ms.append(1000 * outcome.latency_s)
        # The timings stand behind the predictions, whose texts are the task's, not the client's.
        for name, value in _TIMING.findall(outcome.body, outcome.body.rfind(b'"timings_ms"')):
            self.server_ms[name.decode()] += float(value)


@dataclass(frozen=True)
class Bucket:
    """How many answers took from `from_ms` on, but less than `to_ms`."""

    from_ms: float
    to_ms: float
    count: int


@dataclass(frozen=True)
class Figures:
    """One load and what became of it. Exactly one of `connections` and `rate` is set.

    `latency_ms` and `server_ms` are of what was answered with a 200, and None where nothing was.
    `lost`: requests whose connection failed.
    """

    connections: int | None
    rate: float | None
    seconds: float
    inputs: int
    requests_per_s: float
    sentences_per_s: float
    statuses: Mapping[str, int]
    lost: int
    latency_ms: Mapping[str, float] | None
    server_ms: Mapping[str, float] | None
    histogram: tuple[Bucket, ...]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def answered(self) -> int:
        """How many requests got a 200."""
        return self.statuses.get("200", 0)


def figures(
    tally: Tally,
    *,
    connections: int | None,
    rate: float | None,
    seconds: float,
    inputs: int,
) -> Figures:
    """What a load of so many seconds gave."""
    found = sorted(tally.latencies_ms)
    per_s = tally.in_time / seconds
    latency = None
    if found:
        latency = {"mean": math.fsum(found) / len(found)}
        latency |= {f"p{share}": percentile(found, share) for share in PERCENTILES}
        latency["max"] = found[-1]
    return Figures(
        connections=connections,
        rate=rate,
        seconds=seconds,
        inputs=inputs,
        requests_per_s=per_s,
        sentences_per_s=per_s * inputs,
        statuses={
            str(status): count for status, count in sorted(tally.statuses.items()) if status != LOST
        },
        lost=tally.statuses[LOST],
        latency_ms=latency,
        server_ms={name: spent / len(found) for name, spent in tally.server_ms.items()}
        if found
        else None,
        histogram=histogram(found),
    )


def percentile(ordered: Sequence[float], share: int) -> float:
    """The smallest value that `share` percent do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def histogram(ordered: Sequence[float]) -> tuple[Bucket, ...]:
    """Buckets at round numbers, from the first to the last that holds something."""
    if not ordered:
        return ()
    first, last = (math.floor(math.log10(max(value, 1e-3))) for value in (ordered[0], ordered[-1]))
    edges = [step * 10.0**power for power in range(first, last + 1) for step in _STEPS]
    # Rounded because 3 * 10 ** -1 is not quite 0.3.
    edges = [0.0, *(round(edge, 6) for edge in edges), 10.0 ** (last + 1)]
    buckets, at = [], 0
    for low, high in pairwise(edges):
        begin = at
        while at < len(ordered) and ordered[at] < high:
            at += 1
        buckets.append(Bucket(low, high, at - begin))
    filled = [number for number, bucket in enumerate(buckets) if bucket.count]
    return tuple(buckets[filled[0] : filled[-1] + 1])
