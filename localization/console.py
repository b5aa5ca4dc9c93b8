"""What a person at a terminal sees of a localization: progress bars and summary tables."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from localization import tuning
from localization.pipeline import Localized


class ConsoleReporter:
    """Progress bars on a terminal; a line per finished step where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]:<10}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, name: str) -> tuning.Progress:
        """A bar for a step."""
        bar: TaskID = self._progress.add_task(name, total=None, detail="")

        def update(done: int, total: int, detail: str) -> None:
            self._progress.update(bar, completed=done, total=total, detail=detail)

        return update

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text)


def summary_table(result: Localized) -> Table:
    """Dense beside localized, with every ratio that was tried."""
    manifest = result.overlay.manifest
    table = Table(title=f"Task {manifest.task} on {manifest.backbone.name}")
    table.add_column("network")
    for column in ("FFN neurons kept", "validation %", "test %", "test macro F1 %"):
        table.add_column(column, justify="right")
    table.add_row(
        "dense", "100 %", _percent(result.dense.validation_accuracy), *_test(result, "dense")
    )
    for trial in sorted(result.trials, key=lambda item: -item.keep):
        kept = sum(map(len, trial.neurons)) / (manifest.ffn_width * len(trial.neurons))
        chosen = trial.neurons is result.overlay.neurons
        table.add_row(
            "localized (chosen)" if chosen else f"tried {trial.keep:.2f}",
            f"{100 * kept:.0f} %",
            _percent(trial.tuned.validation_accuracy),
            *(_test(result, "localized") if chosen else ("", "")),
            style="bold" if chosen else "dim",
        )
    return table


def _test(result: Localized, network: str) -> tuple[str, str]:
    for name, figures in result.test.items():
        if name == network:
            return _percent(figures.accuracy), _percent(figures.macro_f1)
    return "-", "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
