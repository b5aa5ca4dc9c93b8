"""One view of many tasks that are localized at once: a line for each.

Knows what the workers say (`News`), nothing of where they run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from localization.batch import Outcome, failure_line

if TYPE_CHECKING:
    from localization.network import Progress as Update

PAUSE_S = 0.25
"""Least time between two words on the same step."""


@dataclass(frozen=True)
class News:
    """Where a task is now, or a `note` for the reader. `total` 0: not known."""

    task: str
    step: str
    done: int = 0
    total: int = 0
    detail: str = ""
    note: str = ""


class Sender:
    """A `Reporter` that passes on every step and note, and a few times a second how a step goes."""

    def __init__(self, task: str, send: Callable[[News], object]) -> None:
        self._task = task
        self._send = send
        self._step = "reading"
        send(News(task, self._step))

    def step(self, name: str) -> "Update":
        """A new step begins; the result is called as it goes on."""
        self._step = name
        self._send(News(self._task, name))
        last = time.monotonic()

        def update(done: int, total: int, detail: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PAUSE_S:
                last = now
                self._send(News(self._task, name, done, total, detail))

        return update

    def note(self, text: str) -> None:
        """A line for the reader."""
        self._send(News(self._task, self._step, note=text))


class Board:
    """A bar for each task on a terminal; elsewhere a line for each step, note and end."""

    def __init__(self, console: Console, tasks: Sequence[str]) -> None:
        self._console = console
        self._steps = dict.fromkeys(tasks, "waiting")
        # Where not all have room, only those that run are shown.
        self._crowded = len(tasks) + 1 >= console.height
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[state]}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}", markup=False),
            _Elapsed(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars = {
            task: self._progress.add_task(
                task, start=False, total=1, visible=not self._crowded, state="waiting", detail=""
            )
            for task in tasks
        }

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

    def show(self, news: News) -> None:
        """Take up what a worker says."""
        begins = news.step != self._steps[news.task]
        if not self._console.is_terminal and (begins or news.note):
            self._print(f"{news.task}: {news.note or news.step}")
        bar = self._bars[news.task]
        if self._steps[news.task] == "waiting":
            self._progress.start_task(bar)
        self._steps[news.task] = news.step
        self._progress.update(
            bar,
            completed=news.done,
            total=news.total or 1,
            state=news.step,
            detail=news.note or news.detail,
            visible=True,
        )

    def end(self, outcome: Outcome) -> None:
        """A task has ended; a failure is printed."""
        state = "failed" if outcome.failure else "done"
        bar = self._bars[outcome.task]
        self._progress.update(bar, state=state, detail="", visible=not self._crowded)
        if not outcome.failure:
            self._progress.update(bar, completed=1, total=1)
        self._progress.stop_task(bar)
        if outcome.failure:
            self._print(failure_line(outcome))
        elif self._crowded or not self._console.is_terminal:
            self._print(f"{outcome.task}: done")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Elapsed(ProgressColumn):
    """Time since the task left the queue; Rich's own column stops when a step is complete."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds."""
        minutes, seconds = divmod(int(task.elapsed or 0), 60)
        return Text(f"{minutes}:{seconds:02d}")
