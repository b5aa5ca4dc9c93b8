"""Has every missing part of the quality benchmark computed, and shows how far that is.

Knows which parts there are and which must wait for others; what a part is, is in `quality_parts`.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.quality_parts import all_parts, part_file
from benchmarks.quality_pool import Ended, Work, run

Part = tuple[str, str, int]
"""Set, part and seed."""


def parts_of(sets: Sequence[str]) -> list[Part]:
    """All parts of these sets, what takes longest first."""
    return [part for part in all_parts() if part[0] in sets]


def name_of(part: Part) -> str:
    """What a part is called in messages and files."""
    return "-".join(map(str, part))


def waits_for(part: Part) -> Part | None:
    """The part whose trainings a part goes on from: side by side, both would train the same."""
    name, kind, seed = part
    if kind in ("chance", "search"):
        return name, "localized", seed
    if kind == "fine_tuned" and seed:
        return name, "fine_tuned", 0
    return None


def run_parts(
    console: Console, data: Path, work: Path, sets: Sequence[str], jobs: int
) -> list[Ended]:
    """Compute the parts that have no file in `work`, `jobs` at once; gives those that failed."""
    parts = parts_of(sets)
    missing = [part for part in parts if not part_file(work, *part).is_file()]
    works = []
    for part in missing:
        before = waits_for(part)
        arguments = (str(data.resolve()), str(work.resolve()), *map(str, part))
        command = ("-m", "benchmarks.quality_worker", *arguments)
        works.append(Work(name_of(part), command, name_of(before) if before else None))
    failed: list[Ended] = []
    left = {name_of(part): part for part in missing}
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("parts,"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}  [dim]{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(parts), completed=len(parts) - len(missing), left="")

        def tell(running: Sequence[str], ended: Ended | None) -> None:
            if ended is not None:
                part = left.pop(ended.name)
                progress.advance(bar)
                progress.console.print(_line(work, part, ended))
                if ended.error:
                    failed.append(ended)
                remaining = seconds_left(work, parts, list(left.values()), jobs)
                progress.update(bar, left=_duration(remaining))
            progress.update(bar, description=escape(", ".join(running)))

        run(works, jobs, work / "logs", tell)
    return failed


def seconds_left(
    work: Path, parts: Sequence[Part], left: Sequence[Part], jobs: int
) -> float | None:
    """What the parts that are left will take, by those of their kind that are done; None: unknown.

    What runs already counts as not begun: the estimate is a little too long.
    """
    known: dict[str, list[float]] = {}
    for part in parts:
        file = part_file(work, *part)
        if part not in left and file.is_file():
            known.setdefault(part[1], []).append(json.loads(file.read_text())["seconds"])
    if not known:
        return None
    any_kind = statistics.fmean(second for kind in known.values() for second in kind)
    means = {kind: statistics.fmean(seconds) for kind, seconds in known.items()}
    return sum(means.get(kind, any_kind) for _, kind, _ in left) / jobs


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60:02} min left" if minutes else "almost done"


def _line(work: Path, part: Part, ended: Ended) -> str:
    """A line on what has ended."""
    if ended.error:
        return f"[red]{escape(name_of(part))} failed:[/] {escape(ended.error)}"
    figures = json.loads(part_file(work, *part).read_text())
    for name in ("result", "attribution"):
        if name in figures:
            return f"{name_of(part)}: {figures[name]:.1f} % in {ended.seconds:.0f} s"
    return f"{name_of(part)}: {ended.seconds:.0f} s"
