"""Numbers by name and labels: what one process counts, and how those of several are put together.

A series is a list of numbers: one for a counter or a gauge; for a histogram the count of each
bucket, not cumulative, then what lies above all bounds, then the sum. No Prometheus and no files.
"""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

Labels = tuple[str, ...]
Values = dict[str, dict[Labels, list[float]]]
"""Series by the name of their family and by their labels' values."""

UNKNOWN_TASK: Final = "unknown"
NO_TASK: Final = "none"
NO_VERSION: Final = "none"
OTHER: Final = "other"
_FIXED = (NO_TASK, UNKNOWN_TASK)


@dataclass(frozen=True)
class Family:
    """All series of one name."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """A histogram's buckets: the largest value that each takes."""
    together: Literal["sum", "max"] = "sum"
    """What several replicas have of it: `max` for a gauge of which each knows the same."""

    def new(self) -> list[float]:
        """A series that has counted nothing yet."""
        return [0] * (len(self.bounds) + 2) if self.kind == "histogram" else [0]


def observe(series: list[float], bounds: tuple[float, ...], value: float) -> None:
    """Add one value to a histogram."""
    series[bisect_left(bounds, value)] += 1
    series[-1] += value


def copy(values: Values) -> Values:
    """What stays as it is while the original goes on counting."""
    return {
        name: {labels: series.copy() for labels, series in family.items()}
        for name, family in values.items()
    }


def combine(parts: Iterable[Values], families: Mapping[str, Family]) -> Values:
    """What several processes have together. Changes none of them."""
    total: Values = {}
    for part in parts:
        for name, family in part.items():
            into = total.setdefault(name, {})
            how: Callable[[float, float], float]
            how = max if families[name].together == "max" else operator.add
            for labels, series in family.items():
                known = into.get(labels)
                into[labels] = series if known is None else list(map(how, known, series))
    return total


@dataclass(slots=True)
class VersionSeries:
    """Everything that is counted for one version of a task."""

    labels: Labels
    """Task and version."""
    histograms: tuple[list[float], ...]
    codes: dict[int, list[float]]
    """Answered requests, by HTTP status."""


class ByVersion:
    """The series of tasks' versions, of which there are at most so many.

    A version that is served has its own as long as there is room, else its task's version `other`
    takes them; a task without any has those of the task `other`. Who needs room takes it from the
    version that has been out of service for longest. Not safe against several threads.
    """

    def __init__(
        self,
        values: Values,
        families: Mapping[str, Family],
        requests: str,
        histograms: tuple[str, ...],
        *,
        max_tasks: int,
        max_versions: int,
    ) -> None:
        """Series come into `values`: those of the counter `requests`, with a third label for the
        status, and of the `histograms`."""
        self._values = values
        self._families = families
        self._requests = requests
        self._histograms = histograms
        self._max_tasks = max_tasks
        self._max_versions = max_versions
        self._found: dict[tuple[str, int | None], VersionSeries] = {}
        # Versions with series of their own, by task; and of those the ones out of service, the one
        # that has been so for longest first.
        self._own: dict[str, set[int]] = {}
        self._idle: dict[tuple[str, int], None] = {}
        # What is not any version's: of a task, or of none.
        self._shared: dict[Labels, VersionSeries] = {}
        for task in _FIXED:
            self._found[task, None] = self._make((task, NO_VERSION))

    @property
    def tasks(self) -> Iterator[str]:
        """The tasks with series of their own."""
        return iter(self._own)

    def task_label(self, task: str) -> str:
        """What stands for a task: its name, or `other`."""
        return task if task in self._own else OTHER

    def serve(self, served: Iterable[tuple[str, int]]) -> set[str]:
        """Make the series of the versions that are served now; gives the tasks that have lost
        theirs."""
        wanted = dict.fromkeys(served)
        before = set(self._own)
        self._idle = {key: None for key in self._idle if key not in wanted}
        for task, versions in self._own.items():
            for version in versions:
                if (task, version) not in wanted:
                    self._idle.setdefault((task, version))
        full = False
        for task, version in wanted:
            # Where one task finds no room, no other does that has none yet; there may be thousands.
            own = self._own.get(task)
            if (own is None and full) or (own and version in own):
                continue
            if self._has_room(task, idle=True):
                self._add(task, version)
            else:
                full = True
        return before - set(self._own)

    def find(self, task: str, version: int | None) -> VersionSeries:
        """The series under which a version is counted; None: no version of the task answers."""
        found = self._found.get((task, version))
        if found is not None:
            return found
        if task not in self._own:
            return self._share((OTHER, OTHER))
        if version is None:
            return self._share((task, NO_VERSION))
        if not self._has_room(task, idle=False):
            return self._share((task, OTHER))
        self._idle[task, version] = None
        return self._add(task, version)

    def count(self, series: VersionSeries, code: int) -> list[float]:
        """The counter of a version's requests that were answered with this status."""
        found = series.codes.get(code)
        if found is None:
            family = self._values.setdefault(self._requests, {})
            found = family.setdefault((*series.labels, str(code)), [0])
            series.codes[code] = found
        return found

    def _has_room(self, task: str, *, idle: bool) -> bool:
        """Whether the task may have series of one more version; `idle` ones may make room."""
        if task not in self._own and len(self._own) >= self._max_tasks:
            unused = (one for one, _ in self._idle if self._is_idle(one))
            if not idle or (oldest := next(unused, None)) is None:
                return False
            for version in list(self._own[oldest]):
                self._forget(oldest, version)
        if len(self._found) - len(_FIXED) >= self._max_versions:
            if not idle or not self._idle:
                return False
            self._forget(*next(iter(self._idle)))
        return True

    def _is_idle(self, task: str) -> bool:
        return all((task, version) in self._idle for version in self._own[task])

    def _add(self, task: str, version: int) -> VersionSeries:
        self._own.setdefault(task, set()).add(version)
        made = self._make((task, str(version)))
        self.count(made, 200)
        self._found[task, version] = made
        return made

    def _share(self, labels: Labels) -> VersionSeries:
        if labels not in self._shared:
            self._shared[labels] = self._make(labels)
        return self._shared[labels]

    def _make(self, labels: Labels) -> VersionSeries:
        # No engine has seen what no version has answered.
        names = self._histograms[:1] if labels[1] == NO_VERSION else self._histograms
        made = [
            self._values.setdefault(name, {}).setdefault(labels, self._families[name].new())
            for name in names
        ]
        return VersionSeries(labels, tuple(made), {})

    def _forget(self, task: str, version: int) -> None:
        self._own[task].remove(version)
        self._idle.pop((task, version), None)
        self._drop(self._found.pop((task, version)))
        if not self._own[task]:
            del self._own[task]
            for labels in ((task, NO_VERSION), (task, OTHER)):
                # A task may be called `other`, too.
                if labels in self._shared and labels != (OTHER, OTHER):
                    self._drop(self._shared.pop(labels))

    def _drop(self, series: VersionSeries) -> None:
        for name in self._histograms:
            self._values[name].pop(series.labels, None)
        for code in series.codes:
            del self._values[self._requests][*series.labels, str(code)]
