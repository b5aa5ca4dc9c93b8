"""Numbers by name and labels: histograms against Prometheus' own, bounds, sums over processes."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from serving.series import ByVersion, Family, Values, combine, copy, observe

BOUNDS = (0.5, 1.0, 2.5, 10.0)
FAMILIES = {
    "requests": Family("counter", "", ("task", "version", "code")),
    "request_s": Family("histogram", "", ("task", "version"), BOUNDS),
    "queue_s": Family("histogram", "", ("task", "version"), BOUNDS),
    "queued": Family("gauge", ""),
    "bytes": Family("gauge", "", ("task",), together="max"),
}
MAX_TASKS, MAX_VERSIONS = 3, 5
DURATIONS = st.floats(-1, 20) | st.sampled_from(BOUNDS)


def by_version(values: Values) -> ByVersion:
    histograms = ("request_s", "queue_s")
    limits = {"max_tasks": MAX_TASKS, "max_versions": MAX_VERSIONS}
    return ByVersion(values, FAMILIES, "requests", histograms, **limits)


@given(st.lists(DURATIONS))
def test_a_histogram_counts_as_prometheus_own_does(durations: list[float]) -> None:
    registry = CollectorRegistry()
    theirs = Histogram("h", "h", buckets=BOUNDS, registry=registry)
    ours = FAMILIES["request_s"].new()
    for duration in durations:
        theirs.observe(duration)
        observe(ours, BOUNDS, duration)
    counted = 0.0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), ours, strict=False):
        counted += count
        assert registry.get_sample_value("h_bucket", {"le": bound}) == counted
    assert registry.get_sample_value("h_count") == counted == len(durations)
    assert registry.get_sample_value("h_sum") == ours[-1]


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), DURATIONS)))
def test_processes_together_have_what_one_would_have_counted(
    observed: list[tuple[int, str, float]],
) -> None:
    def count(process: int | None) -> Values:
        series: dict[tuple[str, ...], list[float]] = {}
        for where, task, duration in observed:
            if process in (None, where):
                one = series.setdefault((task, "1"), FAMILIES["request_s"].new())
                # Whole numbers, whose sum is the same in any order.
                observe(one, BOUNDS, round(duration))
        return {"request_s": series}

    parts = [count(0), count(1), count(2)]
    before = [copy(part) for part in parts]
    assert combine(parts, FAMILIES) == count(None)
    assert parts == before


def test_gauges_are_added_up_unless_all_know_the_same() -> None:
    one: Values = {"queued": {(): [3]}, "bytes": {("a",): [10], ("b",): [1]}}
    other: Values = {"queued": {(): [4]}, "bytes": {("a",): [10]}}
    together = combine([one, other], FAMILIES)
    assert together == {"queued": {(): [7]}, "bytes": {("a",): [10], ("b",): [1]}}


# --- bounds ---------------------------------------------------------------------------------------

VERSIONS = st.tuples(st.sampled_from("abcdef"), st.integers(1, 4))
ACTIONS = st.lists(
    st.tuples(st.just("serve"), st.lists(VERSIONS, max_size=8, unique=True))
    | st.tuples(st.sampled_from(("count", "none")), st.lists(VERSIONS, min_size=1, max_size=1)),
    max_size=30,
)


def labels_of(values: Values) -> set[tuple[str, ...]]:
    return {labels[:2] for family in values.values() for labels in family}


@given(ACTIONS)
def test_whatever_comes_and_goes_there_are_never_more_series_than_there_may_be(
    actions: list[tuple[str, list[tuple[str, int]]]],
) -> None:
    values: Values = {}
    versions = by_version(values)
    served: list[tuple[str, int]] = []
    for kind, named in actions:
        if kind == "serve":
            served = named
            before = set(versions.tasks)
            gone = versions.serve(served)
            assert gone == before - set(versions.tasks)
        else:
            ((task, version),) = named
            series = versions.find(task, version if kind == "count" else None)
            counter = versions.count(series, 200)
            counter[0] += 1
            # What was counted is told.
            assert values["requests"][*series.labels, "200"] is counter
            assert values["request_s"][series.labels] is series.histograms[0]
            own = (task, str(version) if kind == "count" else "none")
            assert series.labels in (own, (task, "other"), ("other", "other"))
        labels = labels_of(values)
        numbered = {one for one in labels if one[1].isdecimal()}
        assert len(numbered) <= MAX_VERSIONS
        assert len({task for task, _ in labels} - {"none", "unknown", "other"}) <= MAX_TASKS
        # Those without a number belong to a task that has others, or to no task.
        assert {task for task, _ in labels - numbered} <= (
            {task for task, _ in numbered} | {"none", "unknown", "other"}
        )
        if len({task for task, _ in served}) <= MAX_TASKS and len(served) <= MAX_VERSIONS:
            assert kind != "serve" or {(task, str(one)) for task, one in served} <= numbered


def test_who_needs_room_takes_it_from_what_was_out_of_service_for_longest() -> None:
    values: Values = {}
    versions = by_version(values)
    for number in range(1, 6):
        versions.serve([("a", number)])
    versions.serve([("a", 1)])  # it comes back: now 2 is the oldest
    versions.serve([("a", 6)])
    assert labels_of(values) - {("none", "none"), ("unknown", "none")} == {
        ("a", str(number)) for number in (1, 3, 4, 5, 6)
    }


def test_a_version_that_was_asked_by_its_number_pushes_out_none() -> None:
    versions = by_version({})
    versions.serve([("a", number) for number in range(1, 5)])
    assert versions.find("a", 8).labels == ("a", "8")
    assert versions.find("a", 9).labels == ("a", "other")
    versions.serve([("a", number) for number in range(1, 6)])
    assert versions.find("a", 5).labels == ("a", "5"), "which made room"
    assert versions.find("a", 8).labels == ("a", "other")


def test_tasks_may_be_called_as_what_stands_for_others() -> None:
    values: Values = {}
    versions = by_version(values)
    versions.serve([("other", 1), ("none", 1), ("unknown", 1)])
    versions.count(versions.find("tail", 7), 200)[0] += 1
    versions.count(versions.find("other", 1), 200)[0] += 1
    versions.count(versions.find("none", None), 404)[0] += 1
    versions.serve([("a", 1), ("b", 1), ("c", 1)])
    assert values["requests"]["other", "other", "200"] == [1]
    assert values["requests"]["none", "none", "404"] == [1]
    assert ("other", "1", "200") not in values["requests"]
