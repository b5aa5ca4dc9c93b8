"""`taskbone localize` and `taskbone evaluate`: options, and how results are shown.

The work is in `runs.py` and `batch.py`, imported inside the commands: asking for help loads no
torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model_store.options import complete_tasks, json_option, store_option
from model_store.store import Store
from model_store.tables import show_json, show_table, working

if TYPE_CHECKING:
    from rich.console import Console

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)


@click.command("localize", short_help="Find the overlay of a task from labelled rows.")
@click.argument(
    "task_files",
    metavar="TASK.yaml...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
)
@store_option
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that the data paths of TASK.yaml are relative to.  [default: its own]",
)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for finished stages, from which an interrupted run goes on.  [default: runs]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write the artifact to, for one TASK.yaml.  [default: in runs, under its name]",
)
@click.option(
    "--publish/--no-publish",
    default=True,
    show_default=True,
    help="Whether to publish the result in the store and make it the active version.",
)
@device_option
@click.option("--parallel", is_flag=True, help="Localize the tasks at once, with Ray.")
@click.option(
    "--cpus-per-task",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --parallel: CPUs, and so threads, of each task.  [default: 1]",
)
@json_option
def localize(
    task_files: tuple[Path, ...],
    store: Store,
    data: Path | None,
    work_dir: Path | None,
    output: Path | None,
    publish: bool,
    device: str,
    parallel: bool,
    cpus_per_task: int | None,
    as_json: bool,
) -> None:
    """Find the overlay of a task: the neurons it needs, a soft prompt, and a head.

    TASK.yaml names the labelled data, the labels and the template. The result is measured against
    the whole network on the same rows, and published. A run that was interrupted goes on where it
    stopped when it is started again.

    Several tasks run one after another, or with --parallel at once: as many as there are cores, and
    on CUDA as many as there are GPUs. One that fails does not stop the others. With RAY_ADDRESS set
    they run on that Ray cluster, whose machines must all have taskbone installed and reach the
    store, the data, the work folder and the folder runs under the same paths as this one.

    \b
    Examples:
        taskbone localize examples/tasks/sst2.yaml --data data
        taskbone localize examples/tasks/*.yaml --data data --parallel
    """
    if output is not None and len(task_files) > 1:
        raise click.UsageError(f"--output names one file; {len(task_files)} tasks were given")
    if cpus_per_task is not None and not parallel:
        raise click.UsageError("--cpus-per-task goes with --parallel")
    from rich.console import Console

    # The standard output is for the JSON alone.
    console = Console(stderr=as_json)
    options: dict[str, Any] = {
        **{"store": store, "data": data, "work_dir": work_dir, "output": output},
        **{"publish": publish, "device": device},
    }
    if len(task_files) > 1 or parallel:
        cpus = (cpus_per_task or 1) if parallel else None
        localize_many(task_files, options, console, cpus, as_json)
    elif as_json:
        from localization import batch

        outcome = batch.localize_one(batch.read_assignment(task_files[0], **options), console)
        show_json([outcome.facts()])
    else:
        from localization.runs import localize_file

        localize_file(task_files[0], **options, console=console)


def localize_many(
    task_files: Sequence[Path],
    options: dict[str, Any],
    console: "Console",
    cpus: int | None,
    as_json: bool,
) -> None:
    """Localize several tasks, at once where each has `cpus`; print how each ended, and fail if one
    failed."""
    from localization import batch

    assignments, outcomes = batch.read_assignments(task_files, **options)
    for outcome in outcomes:
        click.echo(batch.failure_line(outcome), err=as_json)
    if cpus is None:
        outcomes += batch.localize_in_turn(assignments, console)
    else:
        from localization.parallel import localize_at_once

        outcomes += localize_at_once(assignments, cpus, console)
    outcomes.sort(key=lambda outcome: task_files.index(outcome.file))
    if as_json:
        show_json([outcome.facts() for outcome in outcomes])
    else:
        show_table(batch.TABLE_TITLE, batch.TABLE_HEADS, batch.table_rows(outcomes))
    failed = [str(outcome.file) for outcome in outcomes if outcome.failure]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(outcomes)} tasks failed: {', '.join(failed)}"
        )


@click.command("evaluate", short_help="Measure a published version on labelled rows.")
@click.argument("task", shell_complete=complete_tasks)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@store_option
@click.option("--version", type=int, help="The version to measure. [default: the active one]")
@click.option("--text", multiple=True, help="Column of the text; twice for pairs.")
@click.option("--label", help="Column of the label.")
@device_option
@json_option
def evaluate(
    task: str,
    file: Path,
    store: Store,
    version: int | None,
    text: tuple[str, ...],
    label: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure a published version of TASK on the labelled rows of FILE.

    FILE is JSON lines, CSV or Parquet. Prints accuracy, macro F1 and the F1 of each label.

    \b
    Example:
        taskbone evaluate sst2 test.jsonl --text sentence --label label
    """
    from localization.runs import evaluate_file

    with working(f"Asking {task} about the rows of {file.name}"):
        number, labels, found = evaluate_file(
            file, store=store, task=task, version=version, text=text, label=label, device=device
        )
    if as_json:
        figures = {"rows": found.rows, "accuracy": found.accuracy, "macro_f1": found.macro_f1}
        f1 = dict(zip(labels, found.f1, strict=True))
        show_json({"task": task, "version": number, **figures, "f1": f1})
        return
    title = f"{task}, version {number}, on {found.rows} rows of {file.name}"
    rows = [("accuracy", f"{found.accuracy:.2%}"), ("macro F1", f"{found.macro_f1:.2%}")]
    rows += [
        (f"F1 of {name}", f"{value:.2%}") for name, value in zip(labels, found.f1, strict=True)
    ]
    show_table(title, ("metric", "value"), rows)
