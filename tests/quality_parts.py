"""Made-up parts of the quality benchmark: what its tests collect, without any training."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality_parts import part_file
from benchmarks.quality_results import OVERLAYS, Results, collect
from benchmarks.quality_run import parts_of

MACHINE = {"commit": "abc1234", "processor": "A Processor", "cores": "2", "torch": "2.0"}

ACCURACIES = {"localized": 80.5, "recovered": 84.75, "fast": 84.0, "training_free": 78.0}
DENSE = {"localized": 80.0, "recovered": 85.0, "fast": 85.0, "training_free": 78.5}
OTHERS: dict[str, dict[str, float]] = {
    "fine_tuned": {"result": 85.0, "result_macro_f1": 84.0, "result_matthews": 50.0, "rate": 1e-4},
    "chance": {"attribution": 75.0, "random": 68.0},
    "search": {
        "search_time": 1.25,
        "trials": 5,
        "ffn_removed": 70.0,
        "dense": 80.0,
        "result": 79.5,
    },
}
SPEEDS = {"speedup": 1.9, "speedup_over_prompt": 2.4}


def figures(part: str) -> dict[str, float]:
    """A part's made-up figures, at the targets or better."""
    if part not in ACCURACIES:
        return {**OTHERS[part], "seconds": 10.0}
    both = {"dense": DENSE[part], "result": ACCURACIES[part]}
    more = {
        f"{name}_{figure}": value - below
        for name, value in both.items()
        for figure, below in (("macro_f1", 1.0), ("matthews", 30.0))
    }
    sizes = {"ffn_removed": 60.5, "heads_removed": 25.0, "kilobytes": 300.4, "trainings": 0.3}
    return both | more | sizes | {"result_rows": 400, "dense_rows": 400, "seconds": 20.0}


def write_part(work: Path, name: str, part: str, seed: int = 0, **changes: float) -> None:
    file = part_file(work, name, part, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures(part) | changes))


def write_all(work: Path, sets: Sequence[str]) -> None:
    for part in parts_of(sets):
        write_part(work, *part)


def measured_of(sets: Sequence[str]) -> dict[str, dict[str, float]]:
    speeds = {f"{part}_{key}": value for part in OVERLAYS for key, value in SPEEDS.items()}
    return {name: speeds | {"server_labels_equal": 100.0} for name in sets}


def collected(work: Path, sets: Sequence[str], **measured: dict[str, float]) -> Results:
    given = measured_of(sets) | measured
    return collect(work, list(sets), given, "the command", "2026-01-02", MACHINE)
