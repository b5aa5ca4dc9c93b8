"""What two samples of a server's counters mean."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.statistics import Sample, between, follows, quantile

BOUNDS = (0.1, 0.2, 0.4)


def histogram(*counts: int, sum_s: float = 0.0) -> dict[str, Any]:
    return {"counts": list(counts) or [0, 0, 0, 0], "sum_s": sum_s}


def task(**changes: Any) -> dict[str, Any]:
    empty = {name: histogram() for name in ("latency", "tokenize", "queue", "forward")}
    return {"version": 1, "overlay_bytes": 10, "requests": {}, **empty, **changes}


def sample(at: float = 100.0, **changes: Any) -> Sample:
    facts: dict[str, Any] = {
        "at": at,
        **{"replicas": 2, "replicas_ready": 2, "queued_tokens": 5, "memory_bytes": 100},
        "backbone": {"name": "tiny", "fingerprint": "ab", "bytes": 7},
        "plan_cache": {"bytes": 3, "hit": 0, "miss": 0, "build": 0, "evict": 0},
        "rejected": {},
        "bounds_s": BOUNDS,
        "tasks": {},
    }
    return Sample.model_validate(facts | changes)


class TestQuantile:
    @pytest.mark.parametrize(
        ("share", "counts", "expected"),
        [
            (0.5, (4, 0, 0, 0), 0.05),  # the first bucket begins at 0
            (0.5, (2, 2, 0, 0), 0.1),
            (0.75, (2, 2, 0, 0), 0.15),
            (0.9, (0, 0, 10, 0), 0.38),
            (0.99, (1, 0, 0, 99), 0.4),  # above all bounds: the highest is what is known
            (0.0, (0, 4, 0, 0), 0.1),
            (1.0, (0, 4, 0, 0), 0.2),
        ],
    )
    def test_is_interpolated_in_its_bucket(
        self, share: float, counts: tuple[int, ...], expected: float
    ) -> None:
        assert quantile(share, counts, BOUNDS) == pytest.approx(expected)

    def test_there_is_none_of_nothing(self) -> None:
        assert quantile(0.5, (0, 0, 0, 0), BOUNDS) is None

    @given(
        values=st.lists(st.floats(0, 0.39), min_size=1),
        share=st.floats(0.01, 1),
    )
    def test_lies_in_the_bucket_of_the_value(self, values: list[float], share: float) -> None:
        edges = (0.0, *BOUNDS, math.inf)
        counts = [
            sum(low < value <= high or (value == low == 0) for value in values)
            for low, high in itertools.pairwise(edges)
        ]
        found = quantile(share, counts, BOUNDS)
        assert found is not None
        exact = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
        low = max((edge for edge in edges if edge < exact), default=0.0)
        high = min(edge for edge in edges[1:] if edge >= exact)
        assert low - 1e-9 <= found <= high + 1e-9


class TestBetween:
    def test_what_was_counted_meanwhile(self) -> None:
        before = sample(
            100.0,
            tasks={
                "mood": task(
                    requests={"200": 10, "503": 1},
                    latency=histogram(10, 0, 0, 0, sum_s=0.5),
                    forward=histogram(10, 0, 0, 0, sum_s=0.3),
                )
            },
            rejected={"overloaded": 4},
            plan_cache={"bytes": 3, "hit": 10, "miss": 2, "build": 0, "evict": 0},
        )
        after = sample(
            102.0,
            tasks={
                "mood": task(
                    version=2,
                    requests={"200": 16, "503": 3},
                    latency=histogram(12, 6, 0, 0, sum_s=1.5),
                    tokenize=histogram(sum_s=0.1),
                    queue=histogram(sum_s=0.2),
                    forward=histogram(18, 0, 0, 0, sum_s=0.7),
                ),
                "new": task(requests={"201": 2}),
            },
            rejected={"overloaded": 6, "forbidden": 1},
            plan_cache={"bytes": 3, "hit": 13, "miss": 3, "build": 0, "evict": 0},
        )
        assert follows(before, after)
        rates = between(before, after)
        mood, new = rates.tasks
        assert (mood.task, mood.version, mood.requests_per_s) == ("mood", 2, 4.0)
        assert mood.statuses_per_s == {"200": 3.0, "503": 1.0}
        assert mood.error_share == 0.25
        assert mood.quantiles_s == pytest.approx(
            (2 / 15, 0.1 + 0.1 * 5.6 / 6, 0.1 + 0.1 * 5.92 / 6)
        )
        assert mood.mean_s == pytest.approx(1 / 8)
        assert mood.shares == pytest.approx(
            {"tokenize": 0.1, "queue": 0.2, "forward": 0.4, "other": 0.3}
        )
        assert (new.requests_per_s, new.error_share, new.quantiles_s) == (1.0, 0.0, None)
        assert new.shares is None
        assert rates.requests_per_s == 5.0
        assert rates.rejected_per_s == {"forbidden": 0.5, "overloaded": 1.0}
        assert rates.plan_hit_share == 0.75

    def test_nothing_happened(self) -> None:
        still = {"mood": task(requests={"200": 3}, latency=histogram(3, 0, 0, 0, sum_s=1.0))}
        rates = between(sample(1.0, tasks=still), sample(2.0, tasks=still))
        (mood,) = rates.tasks
        assert (mood.requests_per_s, mood.error_share, mood.mean_s) == (0.0, 0.0, None)
        assert mood.statuses_per_s == {}
        assert rates.plan_hit_share is None

    @pytest.mark.parametrize(
        "after",
        [
            sample(100.0),  # the same moment
            sample(101.0, tasks={"mood": task(requests={"200": 4})}, node="another"),
            sample(101.0, bounds_s=(0.1, 0.2, 0.5)),
            sample(101.0, tasks={"mood": task(requests={"200": 2})}),
            sample(101.0, tasks={"other": task(requests={"200": 9})}),
            sample(101.0, tasks={"mood": task(requests={"200": 3})}, rejected={"overloaded": 0}),
        ],
    )
    def test_counters_that_fall_do_not_follow(self, after: Sample) -> None:
        """A replica that has ended takes with it what it had counted."""
        before = sample(
            100.0, tasks={"mood": task(requests={"200": 3})}, rejected={"overloaded": 1}
        )
        assert not follows(before, after)

    def test_every_histogram_needs_a_count_for_each_bound(self) -> None:
        with pytest.raises(ValidationError, match=r"tasks\.mood\.queue"):
            sample(tasks={"mood": task(queue=histogram(1, 2))})

    def test_what_a_newer_server_says_besides_is_left_out(self) -> None:
        assert sample(nodes=3).replicas == 2
