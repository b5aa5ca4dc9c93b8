"""`taskbone status`: looks at a running server again and again, and what came of two looks.

How it is drawn is in `status_view.py`, what two samples mean in `serving/statistics.py`.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click

from model_store.options import json_option
from model_store.store import Store
from model_store.tables import show_json
from serving.commands.options import server_options, shown_token

if TYPE_CHECKING:
    import httpx

    from serving.statistics import Rates, Sample

WINDOW_S = 10.0
"""Figures are over the samples of so many seconds, so that quantiles are of enough requests."""


@dataclass(frozen=True)
class Look:
    """What is known at one moment. `failure`: why the last look failed; the rest is then older."""

    url: str
    sample: "Sample"
    rates: "Rates"
    tasks: dict[str, dict[str, Any]]
    """As the server describes them; empty where the key does not open the list."""
    failure: str = ""

    def facts(self) -> dict[str, Any]:
        """For JSON. Tasks by name; durations in seconds."""
        sample, rates = self.sample, self.rates
        names = sorted({task.task for task in rates.tasks} | self.tasks.keys())
        measured = {task.task: asdict(task) for task in rates.tasks}
        return {
            "url": self.url,
            "node": sample.node or None,
            "failure": self.failure or None,
            "at": sample.at,
            "seconds": rates.seconds,
            "replicas": sample.replicas,
            "replicas_ready": sample.replicas_ready,
            "queued_tokens": sample.queued_tokens,
            "memory_bytes": sample.memory_bytes,
            "backbone": sample.backbone.model_dump(),
            "plan_cache": {"bytes": sample.plan_cache.bytes, "hit_share": rates.plan_hit_share},
            "requests_per_s": rates.requests_per_s,
            "rejected_per_s": dict(rates.rejected_per_s),
            "tasks": [self._task(name, measured.get(name, {})) for name in names],
        }

    def _task(self, name: str, measured: dict[str, Any]) -> dict[str, Any]:
        described = self.tasks.get(name, {})
        p50, p95, p99 = measured.get("quantiles_s") or (None, None, None)
        return {
            "task": name,
            "version": measured.get("version") or described.get("version"),
            "canary": described.get("canary"),
            "shadow": described.get("shadow"),
            "kept_share": described.get("kept_share"),
            "requests_per_s": measured.get("requests_per_s", 0.0),
            "statuses_per_s": measured.get("statuses_per_s", {}),
            "error_share": measured.get("error_share", 0.0),
            "latency_s": {"mean": measured.get("mean_s"), "p50": p50, "p95": p95, "p99": p99},
            "time_shares": measured.get("shares"),
        }


@dataclass
class Window:
    """The samples of the last seconds, the oldest first; begun anew where counters have fallen."""

    samples: "list[Sample]" = field(default_factory=list)

    def add(self, sample: "Sample") -> "Rates | None":
        """What was counted over the window; None as long as it holds one sample."""
        from serving.statistics import between, follows

        last = self.samples[-1] if self.samples else None
        if last is not None and last.node != sample.node and sample.at - last.at < WINDOW_S:
            # A load balancer brings the answers of several machines: one of them is watched.
            sample = self.samples.pop()
        elif last is not None and 0 <= last.at - sample.at < WINDOW_S:
            # Replicas work their figures out at most once a second, each for itself.
            sample = self.samples.pop()
        elif last is not None and not follows(last, sample):
            self.samples = []
        self.samples.append(sample)
        while len(self.samples) > 2 and sample.at - self.samples[1].at >= WINDOW_S:
            self.samples.pop(0)
        return between(self.samples[0], sample) if len(self.samples) > 1 else None


@click.command("status")
@server_options
@click.option(
    "--watch/--once",
    default=None,
    help="Whether to go on until Ctrl-C.  [default: on a terminal, but for --json]",
)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time from one look to the next.",
)
@json_option
def status_command(
    url: str, token: str | None, store: Store, watch: bool | None, interval: float, as_json: bool
) -> None:
    """Show what a running server does, and how each task fares.

    Of the server: its replicas, memory and queue. For each task: its version, beside it a canary
    (c) or shadow (s), the share of the neurons that it keeps, requests a second, quantiles of the
    time in the server, the share of requests that got another status than 2xx, and where the time
    went. Figures are over the last ten seconds of looking; of the first machine that answers,
    where there are several. The key needs the scope metrics, and predict for what tasks keep.

    On a terminal it goes on until Ctrl-C. Elsewhere, with --once or --json, it looks twice and
    ends; --watch --json prints a line of JSON for each look.

    \b
    Examples:
        taskbone status
        taskbone status --url http://10.0.0.1:8000 --token KEY --interval 5
        taskbone status --json
    """
    on_terminal = sys.stdout.isatty() and not as_json
    goes_on = on_terminal if watch is None else watch
    looks = look_again(url, shown_token(url, token, store), interval)
    if on_terminal and goes_on:
        watch_on_terminal(looks)
        return
    for look in looks:
        if as_json and goes_on:
            click.echo(json.dumps(look.facts()))
        elif as_json:
            show_json(look.facts())
        else:
            show(look)
        if not goes_on:
            return


def look_again(url: str, token: str | None, interval_s: float) -> Iterator[Look]:
    """Look at the server endlessly, first after two samples.

    Raises `ClientError` where it refuses, and where nobody answers before the first look; later a
    server that does not answer is asked again, and what was last known is given with the reason.
    """
    from serving import client

    window = Window()
    last: Look | None = None
    with client.connected(url, token) as connection:
        tasks = TaskList(connection)
        due = time.monotonic()
        while True:
            try:
                with client.explained(url):
                    sample = client.sample(connection)
                    described = tasks.get()
            except client.UnreachableError as error:
                if last is None:
                    raise
                last = Look(url, last.sample, last.rates, last.tasks, str(error))
                yield last
            else:
                rates = window.add(sample)
                if rates is not None:
                    last = Look(url, window.samples[-1], rates, described)
                    yield last
            due = max(due + interval_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))


class TaskList:
    """The tasks as the server describes them: much to ask for every second where they are many."""

    def __init__(self, connection: "httpx.Client") -> None:
        self._connection = connection
        self._tasks: dict[str, dict[str, Any]] = {}
        self._ask_at = 0.0

    def get(self) -> dict[str, dict[str, Any]]:
        """Those of the last seconds; none where the key does not open the list."""
        from serving import client

        if time.monotonic() >= self._ask_at:
            self._tasks = client.tasks_if_allowed(self._connection)
            self._ask_at = time.monotonic() + WINDOW_S
        return self._tasks


def watch_on_terminal(looks: Iterator[Look]) -> None:
    """Draw every look in the place of the last, until Ctrl-C, which is no failure."""
    from rich.console import Console
    from rich.live import Live

    from serving.commands.status_view import view

    console = Console(highlight=False)
    look = next(looks)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view(look, console.width, console.height), refresh=True)
                look = next(looks)
    except KeyboardInterrupt:
        pass
    finally:
        # The last one stays on the screen that the shell comes back to.
        console.print(view(look, console.width, console.height))


def show(look: Look) -> None:
    """Print one look."""
    from rich.console import Console

    from serving.commands.status_view import view

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(view(look, console.width))
