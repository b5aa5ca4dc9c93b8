"""Many task files: what is to be done, how each ended, and doing one after another.

Knows which file fails and why; a failed one never stops the others. How one task is localized is in
`runs.py`, how many are at once in `parallel.py`. Imports torch only where a task is localized.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from localization.config import read_task_file
from localization.errors import ConfigError, LocalizationError
from model_store.durable import sha256
from model_store.errors import ModelStoreError
from model_store.manifest import Manifest
from model_store.store import Store
from model_store.tables import shortened

if TYPE_CHECKING:
    from localization.job import Reporter

TABLE_TITLE = "Accuracy of the whole network / of the localized one"
TABLE_HEADS = ("task", "FFN kept %", "validation %", "test %", "KB", "minutes", "result")


@dataclass(frozen=True)
class Assignment:
    """One task file to localize; all paths but `file` are absolute, and hold in any process."""

    file: Path
    """As the user wrote it, for messages."""
    path: Path
    task: str
    store: Store
    data: Path | None
    """None: the folder of the task file."""
    work_dir: Path
    output: Path
    publish: bool
    device: str


@dataclass(frozen=True)
class Figures:
    """What the table says of a finished task. Accuracies are 0 to 1; None: there are no rows."""

    kept: float
    """Share of the feed-forward neurons."""
    validation: tuple[float | None, float | None]
    """Dense, final."""
    test: tuple[float | None, float | None]
    bytes: int
    seconds: float
    artifact: Path
    """Where the artifact was written; the page about it lies beside it."""
    version: int | None
    """Its number in the store; None where it was not published."""


@dataclass(frozen=True)
class Outcome:
    """How one task file ended: with figures, or with a failure of one line."""

    file: Path
    task: str
    """The file's name where the task's is not known."""
    figures: Figures | None = None
    failure: str = ""

    def facts(self) -> dict[str, Any]:
        """How it ended, for JSON."""
        found: dict[str, Any] = {"file": str(self.file), "task": self.task}
        if self.figures is None:
            return found | {"failure": self.failure}
        return found | {
            "failure": None,
            "version": self.figures.version,
            "artifact": str(self.figures.artifact),
            "report": str(self.figures.artifact.with_suffix(".html")),
            "bytes": self.figures.bytes,
            "seconds": round(self.figures.seconds, 1),
            "kept_share": self.figures.kept,
            "accuracy": {
                split: dict(zip(("dense", "localized"), pair, strict=True))
                for split, pair in (
                    ("validation", self.figures.validation),
                    ("test", self.figures.test),
                )
            },
        }


def read_assignments(
    files: Sequence[Path],
    *,
    store: Store,
    data: Path | None,
    work_dir: Path | None,
    output: Path | None,
    publish: bool,
    device: str,
) -> tuple[list[Assignment], list[Outcome]]:
    """Check all task files: the assignments to do, and the files that have failed already.

    Raises `ConfigError` where several files have the same task.
    """
    here = store.absolute()
    folder = None if data is None else data.absolute()
    work = (work_dir or Path("runs")).absolute()
    assignments: list[Assignment] = []
    failed: list[Outcome] = []
    for file in files:
        try:
            config = read_task_file(file)
            here.backbone(config.backbone)
        except (LocalizationError, ModelStoreError) as error:
            failed.append(Outcome(file, file.name, failure=_reason(error, file)))
            continue
        task = config.task
        target = (output or Path("runs") / task / f"{task}.safetensors").absolute()
        path = file.absolute()
        assignments.append(
            Assignment(file, path, task, here, folder, work, target, publish, device)
        )
    for task, count in Counter(assignment.task for assignment in assignments).items():
        if count > 1:
            names = ", ".join(
                str(assignment.file) for assignment in assignments if assignment.task == task
            )
            raise ConfigError(
                f"task {task!r} stands in {count} task files ({names}); give each its own name"
            )
    return assignments, failed


def read_assignment(file: Path, **options: Any) -> Assignment:
    """One task file, checked in the same way. Raises `ConfigError`."""
    assignments, failed = read_assignments([file], **options)
    if failed:
        raise ConfigError(f"{file}: {failed[0].failure}")
    return assignments[0]


def localize_in_turn(assignments: Sequence[Assignment], console: Console) -> list[Outcome]:
    """Localize one task after another in this process; the outcomes in the same order."""
    outcomes = []
    for assignment in assignments:
        outcome = localize_assignment(assignment, console)
        if outcome.failure:
            console.print(failure_line(outcome), markup=False, highlight=False, soft_wrap=True)
        outcomes.append(outcome)
    return outcomes


def localize_assignment(
    assignment: Assignment, console: Console, report: "Reporter | None" = None
) -> Outcome:
    """Localize one task; whatever goes wrong, but not Ctrl-C, is its outcome."""
    try:
        return localize_one(assignment, console, report)
    except (LocalizationError, ModelStoreError) as error:
        return Outcome(assignment.file, assignment.task, failure=_reason(error, assignment.path))
    except Exception as error:  # noqa: BLE001 - whatever it was, the other tasks go on
        reason = f"{type(error).__name__}: {_reason(error, assignment.path)}"
        return Outcome(
            assignment.file, assignment.task, failure=f"{reason}; run this file alone to see where"
        )


def localize_one(
    assignment: Assignment, console: Console, report: "Reporter | None" = None
) -> Outcome:
    """Localize one task. Raises whatever goes wrong."""
    from localization.runs import localize_file

    begun = time.monotonic()
    result = localize_file(
        assignment.path,
        store=assignment.store,
        data=assignment.data,
        work_dir=assignment.work_dir,
        output=assignment.output,
        publish=assignment.publish,
        device=assignment.device,
        console=console,
        report=report,
    )
    figures = _figures(assignment, result.overlay.manifest, time.monotonic() - begun)
    return Outcome(assignment.file, assignment.task, figures)


def failure_line(outcome: Outcome) -> str:
    """One line that names the task file and the reason."""
    return f"{outcome.file}: failed: {outcome.failure}"


def table_rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """The rows of the table at the end, under `TABLE_HEADS`."""
    for outcome in outcomes:
        found = outcome.figures
        if found is None:
            # The whole reason has been printed when it failed.
            yield (outcome.task, *("",) * 5, f"failed: {shortened(outcome.failure)}")
            continue
        yield (
            outcome.task,
            f"{100 * found.kept:.0f}",
            _percents(found.validation),
            _percents(found.test),
            f"{found.bytes / 1000:.0f}",
            f"{found.seconds / 60:.1f}",
            "done",
        )


def _percents(accuracies: tuple[float | None, float | None]) -> str:
    return " / ".join("-" if share is None else f"{100 * share:.1f}" for share in accuracies)


def _figures(assignment: Assignment, manifest: Manifest, seconds: float) -> Figures:
    data = assignment.output.read_bytes()
    # The network that is not the dense one is named after how it was found.
    found = {
        (item.network == "dense", item.split): item.value
        for item in manifest.metrics
        if item.metric == "accuracy"
    }
    return Figures(
        manifest.kept_share,
        (found.get((True, "validation")), found.get((False, "validation"))),
        (found.get((True, "test")), found.get((False, "test"))),
        len(data),
        seconds,
        assignment.output,
        assignment.store.registry().number_of(assignment.task, sha256(data))
        if assignment.publish
        else None,
    )


def _reason(error: Exception, file: Path) -> str:
    """What an error says, on one line, without the task file that it begins with."""
    return " ".join(str(error).removeprefix(f"{file}: ").split()) or type(error).__name__
