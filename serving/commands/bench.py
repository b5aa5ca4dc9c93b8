"""`taskbone bench`: loads a running server, and shows what it answered how fast.

How requests are sent is in `serving/load.py`, what is asked in `serving/questions.py`, what the
figures are in `serving/load_results.py`.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from model_store.manifest import TextInput
from model_store.options import complete_tasks, json_option
from model_store.store import Store
from model_store.tables import show_json
from serving.commands.options import server_options, shown_token
from serving.commands.predict import as_input, read_lines

if TYPE_CHECKING:
    from serving.load import Question, Server
    from serving.load_results import Figures

DEFAULT_CONNECTIONS = (1, 16, 64)
WARMED = 50
"""So many requests at most are sent before, one to each task, and not counted."""
_TICK_S = 0.2


@dataclass(frozen=True)
class Step:
    """One load: so many connections in a closed loop, or so many requests a second."""

    connections: int | None
    rate: float | None

    def __str__(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests a second"
        return "1 connection" if self.connections == 1 else f"{self.connections} connections"


def _as_numbers(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    if value is None:
        return None
    from serving.load import most_connections

    most = most_connections()
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        raise click.BadParameter(
            f"{value!r}: expected numbers from 1 to {most}, separated by commas, as in 1,16,64"
        )
    return tuple(map(int, parts))


@click.command("bench")
@click.argument("task", required=False, shell_complete=complete_tasks)
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Ask every task in turn, instead of TASK.")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with a text on each line; - for the standard input.",
)
@click.option(
    "--connections",
    callback=_as_numbers,
    metavar="N,...",
    help="How many ask at once, each waiting for its answer; one load each.  [default: 1,16,64]",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Instead: send R requests a second, whether or not earlier ones are answered.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Duration of each load.",
)
@click.option(
    "--inputs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Texts in one request.",
)
@click.option("--yes", is_flag=True, help="Load a server that is not on this machine, too.")
@server_options
@json_option
def bench_command(
    task: str | None,
    texts: tuple[str, ...],
    every: bool,
    file: Path | None,
    connections: tuple[int, ...] | None,
    rate: float | None,
    seconds: float,
    inputs: int,
    yes: bool,
    url: str,
    token: str | None,
    store: Store,
    as_json: bool,
) -> None:
    """Load a running server: how much it answers, how fast.

    The requests ask for TASK and hold the TEXTs in turn, or the lines of a file, or sentences that
    are made up. A tab separates the two texts of a pair; where the task takes pairs and a text is
    none, its halves are. Each task is asked once before, which is not counted.

    With --connections as many requests as that are under way all the time. With --rate requests are
    sent when they are due, over as many connections as it takes, and the latency of each counts
    from that moment: what waits for a slow server is not hidden. Latencies are of what was answered
    with status 200; other statuses are counted. The client's own work is in the figures, and takes
    from the server where both are on the same cores.

    \b
    Examples:
        taskbone bench sst2
        taskbone bench sst2 "A film to remember." --connections 64 --seconds 20
        taskbone bench --all --file reviews.txt --inputs 8 --json
        taskbone bench sst2 --rate 200
    """
    steps = _steps(task, texts, every, file, connections, rate)
    from serving import client

    if not client.is_local(url) and not yes:
        raise click.UsageError(
            f"{url} is not on this machine, and a load takes from everyone who uses the server; to "
            "load it nevertheless, add --yes"
        )
    shown = shown_token(url, token, store)
    tasks, asked = _prepare(url, shown, task, _texts(texts, file), inputs)
    from serving.load import Server

    found = _measure(Server.of(url, shown or ""), asked, steps, seconds, inputs, as_json)
    if as_json:
        show_json({"url": url, "tasks": tasks, "loads": [one.facts() for one in found]})
    elif len(found) > 1:
        from serving.commands.bench_view import summary

        summary(found)


def _steps(
    task: str | None,
    texts: tuple[str, ...],
    every: bool,
    file: Path | None,
    connections: tuple[int, ...] | None,
    rate: float | None,
) -> list[Step]:
    """The loads, where the arguments go together."""
    if every and task is not None:
        raise click.UsageError("--all asks every task: leave TASK and TEXT out; texts: --file")
    if not every and task is None:
        raise click.UsageError("name the TASK to ask, or ask all with --all")
    if texts and file is not None:
        raise click.UsageError("the texts come from --file: leave TEXT out")
    if rate is not None and connections is not None:
        raise click.UsageError(
            "--rate takes as many connections as it needs: leave out one of both"
        )
    if rate is not None:
        return [Step(None, rate)]
    return [Step(number, None) for number in connections or DEFAULT_CONNECTIONS]


def _texts(texts: tuple[str, ...], file: Path | None) -> Sequence[TextInput]:
    from serving.questions import made_up_sentences

    if file is not None:
        return read_lines(file)
    return [as_input(text) for text in texts] or made_up_sentences()


def _prepare(
    url: str, token: str | None, task: str | None, texts: Sequence[TextInput], inputs: int
) -> "tuple[list[str], list[Question]]":
    """The tasks and the requests, one for each task having been answered. Raises `ClientError`."""
    from serving import client
    from serving.questions import questions

    with client.connected(url, token) as connection:
        there = client.tasks(connection)
        if task is not None and task not in there:
            raise client.unknown_task(task, list(there))
        if not there:
            raise client.ClientError("the server has no task yet; publish one")
        chosen = [task] if task is not None else list(there)
        asked = questions(texts, {name: there[name]["takes_pairs"] for name in chosen}, inputs)
        for question in asked[: min(len(chosen), WARMED)]:
            client.check(connection, question.path, question.body)
    return chosen, asked


def _measure(
    server: "Server",
    asked: "Sequence[Question]",
    steps: Sequence[Step],
    seconds: float,
    inputs: int,
    as_json: bool,
) -> "list[Figures]":
    """Every load in turn; unless `as_json`, each is shown as soon as it is over."""
    import asyncio

    from serving.commands.bench_view import show
    from serving.load import as_bytes

    requests = itertools.cycle([as_bytes(server, question) for question in asked])
    found = []
    for step in steps:
        with _bar(str(step), seconds) as tick:
            one = asyncio.run(_load(server, requests, step, seconds, inputs, tick))
        found.append(one)
        if not as_json:
            show(str(step), one)
    return found


@contextmanager
def _bar(title: str, seconds: float) -> Iterator[Callable[[float], None]]:
    """A progress bar on the error stream, gone at the end; gives what tells it the time."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        shown = progress.add_task(title, total=seconds)
        yield lambda past_s: progress.update(shown, completed=min(past_s, seconds))


async def _load(
    server: "Server",
    requests: "itertools.cycle[bytes]",
    step: Step,
    seconds: float,
    inputs: int,
    tick: Callable[[float], None],
) -> "Figures":
    import asyncio

    from serving.load import Client, at_rate, closed
    from serving.load_results import Tally, figures

    client, started = Client(server), time.perf_counter()
    tally = Tally(until=started + seconds)

    async def show_time() -> None:
        while True:
            tick(time.perf_counter() - started)
            await asyncio.sleep(_TICK_S)

    clock = asyncio.create_task(show_time())
    try:
        if step.connections is not None:
            await closed(client, requests, step.connections, seconds, tally.add)
        elif step.rate is not None:
            await at_rate(client, requests, step.rate, seconds, tally.add)
    finally:
        clock.cancel()
        client.close()
        await asyncio.sleep(0)  # in which the connections end
    return figures(
        tally, connections=step.connections, rate=step.rate, seconds=seconds, inputs=inputs
    )
