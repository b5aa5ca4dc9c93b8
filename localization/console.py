"""What a person at a terminal sees of a localization: progress bars and summary tables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from localization import network
from localization.results import Localized, NetworkName
from localization.statistics import repeated


class ConsoleReporter:
    """Progress bars on a terminal; a line per finished step where there is none."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @classmethod
    @contextmanager
    def on(cls, console: Console) -> Iterator[Self]:
        """One whose bars are shown while the block runs."""
        with Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]:<10}"),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            yield cls(progress)

    def step(self, name: str) -> network.Progress:
        """A bar for a step."""
        bar: TaskID = self._progress.add_task(name, total=None, detail="")

        def update(done: int, total: int, detail: str) -> None:
            self._progress.update(bar, completed=done, total=total, detail=detail)

        return update

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text)


def summary_table(result: Localized) -> Table:
    """Dense beside the result, with every size that was tried."""
    manifest = result.overlay.manifest
    table = Table(title=f"Task {manifest.task} on {manifest.backbone.name}")
    table.add_column("network")
    for column in ("FFN kept", "heads kept", "validation %", "test %", "test macro F1 %"):
        table.add_column(column, justify="right")
    table.add_row(
        "dense", "100 %", "100 %", _percent(result.dense.validation), *_test(result, "dense")
    )
    for trial in sorted(result.trials, key=lambda item: (-item.share, item is result.chosen)):
        chosen = trial is result.chosen
        table.add_row(
            f"{result.network} (chosen)" if chosen else f"tried {trial.share:.2f}",
            _kept([len(rows) for rows in trial.kept.neurons], manifest.ffn_width),
            "100 %"
            if trial.kept.heads is None
            else _kept([len(rows) for rows in trial.kept.heads], result.job.backbone.config.heads),
            _percent(trial.tuned.validation),
            *(_test(result, result.network) if chosen else ("", "")),
            style="bold" if chosen else "dim",
        )
    table.caption = f"{result.trainings:.1f} trainings of the whole network after the first"
    return table


def repeats_table(results: Sequence[Localized]) -> Table:
    """Mean and spread over runs with different seeds."""
    table = Table(title=f"{len(results)} runs with different seeds")
    for column in ("network", "rows", "mean %", "standard deviation", "lowest %", "highest %"):
        table.add_column(column, justify="left" if column in ("network", "rows") else "right")
    for name in ("dense", results[0].network):
        for rows in ("validation", "test"):
            found = [getattr(result, rows).get(name) for result in results]
            values = [answers.evaluation.accuracy for answers in found if answers is not None]
            if len(values) < len(results):
                continue
            spread = repeated(values)
            table.add_row(
                name,
                rows,
                _percent(spread.mean),
                _percent(spread.deviation or 0.0),
                _percent(min(values)),
                _percent(max(values)),
            )
    return table


def _kept(counts: list[int], width: int) -> str:
    return f"{100 * sum(counts) / (width * len(counts)):.0f} %"


def _test(result: Localized, network: NetworkName) -> tuple[str, str]:
    if network not in result.test:
        return "-", "-"
    figures = result.test[network].evaluation
    return _percent(figures.accuracy), _percent(figures.macro_f1)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
