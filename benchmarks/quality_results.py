"""From part files to the quality benchmark's results: means over seeds and sets, and the targets.

Knows the figures' names and units; nothing of trainings, of tables or of plots. The results are one
JSON object (`Results`), from which every table and plot is made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from benchmarks.quality_parts import all_parts, part_file
from benchmarks.recipes import SEEDS
from localization.statistics import repeated

OVERLAYS = ("recovered", "fast", "localized", "training_free")
"""The parts that make an overlay."""

SOURCES = {
    "dense": ("localized", "dense"),
    "localized": ("localized", "result"),
    "fine_tuned": ("fine_tuned", "result"),
    "recovered": ("recovered", "result"),
    "fast": ("fast", "result"),
    "training_free_dense": ("training_free", "dense"),
    "training_free": ("training_free", "result"),
    "attribution": ("chance", "attribution"),
    "random": ("chance", "random"),
    "search_time": ("search", "search_time"),
    "search_trials": ("search", "trials"),
    "search_ffn_removed": ("search", "ffn_removed"),
    "search_dense": ("search", "dense"),
    "search_result": ("search", "result"),
} | {
    f"{part}_{figure}": (part, figure)
    for part in OVERLAYS
    for figure in ("ffn_removed", "heads_removed", "kilobytes", "trainings")
}
"""Measure -> the part and the figure in it. Accuracies are in points (per cent)."""

DIFFERENCES = {
    "localized_minus_dense": ("localized", "dense"),
    "recovered_minus_fine_tuned": ("recovered", "fine_tuned"),
    "fast_minus_fine_tuned": ("fast", "fine_tuned"),
    "attribution_minus_random": ("attribution", "random"),
    "training_free_loss": ("training_free_dense", "training_free"),
}
"""Measure -> what is subtracted from what, seed by seed."""

MEASURED = (
    *(f"{part}_{figure}" for part in OVERLAYS for figure in ("speedup", "speedup_over_prompt")),
    "server_labels_equal",
)
"""Of the overlays of seed 0, measured after the trainings."""

NETWORKS = ("dense", "localized", "fine_tuned", "recovered", "fast")
OTHER_METRICS = {"cb": "macro_f1", "cola": "matthews", "mrpc": "macro_f1", "sms_spam": "macro_f1"}
"""Sets that are usually judged by another metric than accuracy; in points, too."""

MOST_BELOW = 2.0
"""Points that a single set may be on the wrong side of a target for the mean."""


@dataclass(frozen=True)
class Target:
    """What a measure's mean over the sets must reach."""

    measure: str
    text: str
    value: float
    at_least: bool = True
    each: bool = False
    """Whether no single set may be more than `MOST_BELOW` worse."""

    def behind(self, reached: float) -> float:
        """By how much a value falls short; 0 or less where it does not."""
        return self.value - reached if self.at_least else reached - self.value


TARGETS = (
    Target("localized_minus_dense", "localized against prompt tuning, points", 0.0, each=True),
    Target("localized_ffn_removed", "FFN neurons that localized removes, %", 60.0),
    Target("recovered_minus_fine_tuned", "recovered against fine-tuning, points", -0.5, each=True),
    Target("recovered_ffn_removed", "FFN neurons that recovered removes, %", 50.0),
    Target("fast_minus_fine_tuned", "fast against fine-tuning, points", -1.0, each=True),
    Target("fast_speedup_over_prompt", "times as fast as prompt tuning: fast", 2.0),
    Target("attribution_minus_random", "attribution against chance, points", 5.0),
    Target("training_free_loss", "points that training-free loses", 1.0, at_least=False, each=True),
    Target("training_free_speedup", "times as fast as the whole network: training-free", 1.5),
    Target("server_labels_equal", "labels that the server gives as evaluate does, %", 100.0),
    Target(
        "search_time", "time of a search, in trainings of the whole network", 1.5, at_least=False
    ),
)


class Results(TypedDict):
    """`quality.json`. What was not computed is null."""

    tasks: dict[str, dict[str, float | None]]
    """Set -> measure -> mean over the seeds."""
    deviations: dict[str, dict[str, float]]
    """Set -> measure -> sample standard deviation, where there are several seeds."""
    means: dict[str, float | None]
    """Measure -> mean over the sets that have it."""
    targets: dict[str, tuple[float, float | None, bool]]
    """Measure -> target, reached mean, and whether it is met on all sets that were asked for."""
    below: dict[str, dict[str, float]]
    """Measure -> sets more than `MOST_BELOW` worse than the target, with their values."""
    incomplete: dict[str, list[str]]
    """Measure of a target -> sets that lack it."""
    command: str
    date: str
    machine: dict[str, str]


class PartError(Exception):
    """A part's file is not what a part's file should be."""


def collect(
    work: Path,
    sets: Sequence[str],
    measured: Mapping[str, Mapping[str, float]],
    command: str,
    date: str,
    machine: dict[str, str],
) -> Results:
    """Put together what there is in `work`, and `measured`: set -> measure of `MEASURED` -> value.

    Raises `PartError` that names a damaged file.
    """
    runs = {name: _runs(work, name) for name in sets}
    tasks: dict[str, dict[str, float | None]] = {}
    deviations: dict[str, dict[str, float]] = {}
    for name, by_measure in runs.items():
        tasks[name], deviations[name] = {}, {}
        for measure, by_seed in by_measure.items():
            if not by_seed:
                tasks[name][measure] = None
                continue
            found = repeated(list(by_seed.values()))
            tasks[name][measure] = round(found.mean, 3)
            if found.deviation is not None:
                deviations[name][measure] = round(found.deviation, 3)
        tasks[name] |= {measure: measured.get(name, {}).get(measure) for measure in MEASURED}
    means = {
        measure: _mean([row[measure] for row in tasks.values()])
        for measure in (*SOURCES, *DIFFERENCES, *MEASURED)
    }
    return Results(
        tasks=tasks,
        deviations=deviations,
        means=means,
        targets={target.measure: _judged(target, tasks, means) for target in TARGETS},
        below={target.measure: _below(target, tasks) for target in TARGETS if target.each},
        incomplete={target.measure: _lacking(target, tasks) for target in TARGETS},
        command=command,
        date=date,
        machine=machine,
    )


def _runs(work: Path, name: str) -> dict[str, dict[int, float]]:
    """Measure -> seed -> value, of one set."""
    found = {
        (part, seed): _read(part_file(work, name, part, seed))
        for part in {part for part, _ in SOURCES.values()}
        for seed in range(SEEDS.get(name, 1))
    }
    sources = dict(SOURCES)
    if name in OTHER_METRICS:
        for network in NETWORKS:
            part, figure = SOURCES[network]
            sources[f"{network}_{OTHER_METRICS[name]}"] = part, f"{figure}_{OTHER_METRICS[name]}"
    sources["rows"] = "localized", "result_rows"
    runs = {
        measure: _by_seed(work, name, found, part, figure)
        for measure, (part, figure) in sources.items()
    }
    for measure, (first, second) in DIFFERENCES.items():
        runs[measure] = {
            seed: value - runs[second][seed]
            for seed, value in runs[first].items()
            if seed in runs[second]
        }
    return runs


def _read(file: Path) -> dict[str, float] | None:
    if not file.is_file():
        return None
    try:
        figures = json.loads(file.read_text())
    except ValueError as error:
        raise PartError(f"{file}: not JSON: {error}; remove it to have it computed again") from None
    if not isinstance(figures, dict):
        raise PartError(f"{file}: no JSON object; remove it to have it computed again")
    return figures


def _by_seed(
    work: Path,
    name: str,
    found: Mapping[tuple[str, int], Mapping[str, float] | None],
    part: str,
    figure: str,
) -> dict[int, float]:
    values = {}
    for (kind, seed), figures in found.items():
        if kind != part or figures is None:
            continue
        value = figures.get(figure)
        if not isinstance(value, int | float):
            file = part_file(work, name, part, seed)
            raise PartError(f"{file}: no number {figure!r}; remove it to have it computed again")
        values[seed] = float(value)
    return dict(sorted(values.items()))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return round(repeated(there).mean, 3) if there else None


def _judged(
    target: Target,
    tasks: Mapping[str, Mapping[str, float | None]],
    means: Mapping[str, float | None],
) -> tuple[float, float | None, bool]:
    reached = means[target.measure]
    met = reached is not None and target.behind(reached) <= 0 and not _lacking(target, tasks)
    return target.value, reached, met


def _below(target: Target, tasks: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    values = {name: row[target.measure] for name, row in tasks.items()}
    return {
        name: value
        for name, value in values.items()
        if value is not None and target.behind(value) > MOST_BELOW
    }


def _lacking(target: Target, tasks: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Sets without the measure, but for those that no part of it is planned for."""
    planned = {(name, part) for name, part, _ in all_parts()}
    sides = DIFFERENCES.get(target.measure, (target.measure,))
    parts = [SOURCES[side][0] for side in sides if side in SOURCES]
    return [
        name
        for name, row in tasks.items()
        if row[target.measure] is None and all((name, part) in planned for part in parts)
    ]
