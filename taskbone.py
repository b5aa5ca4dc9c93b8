"""The `taskbone` command, and the version. Every command is read and explained here; the work is in
the packages, imported inside the commands so that asking for help loads neither torch nor Ray.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from localization.errors import LocalizationError
from model_store.commands import json_option, store_commands, store_option
from model_store.errors import ModelStoreError
from model_store.manifest import TextInput
from model_store.store import CACHE_VARIABLE, Store
from model_store.tables import shortened, show_json, show_table, working
from serving.commands import key_commands, node_command
from serving.config import ServeConfig
from serving.errors import ServingError

if TYPE_CHECKING:
    from rich.console import Console

__version__ = "0.1.0"

BAR_WIDTH = 20
INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells count it."""


class Commands(click.Group):
    """The top of the command line: here errors become one line, and Ctrl-C its exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (ModelStoreError, LocalizationError, ServingError) as error:
            raise click.ClickException(str(error)) from error
        except (KeyboardInterrupt, click.Abort):
            click.echo("Interrupted.", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None


device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="taskbone")
def cli() -> None:
    """Many text tasks from one frozen encoder.

    A store holds backbones (encoders) and, for each task, the published versions of its overlay:
    the few parts of the network that the task needs. Add a backbone, find overlays for your own
    tasks or publish ready-made ones, and serve them all from one copy of the encoder.

    \b
    Example, from nothing to an answer:
        taskbone store add-backbone sentence-transformers/all-MiniLM-L6-v2
        taskbone localize task.yaml
        taskbone serve
        taskbone predict sst2 "A film to remember."
    """


# --- serve ----------------------------------------------------------------------------------------

SERVE_HELP = {
    "cache": "This machine's folder for the backbones of an object store.",
    "backbone": "Name or start of the fingerprint of the backbone; needed where there are several.",
    "host": "Address to listen on; 0.0.0.0 for all of this machine's.",
    "port": "Port to listen on.",
    "grpc_port": "Port for the Open Inference Protocol over gRPC; 0 for none.",
    "ray_address": "Serve on this running Ray, HOST:PORT or auto; see taskbone ray-environment.",
    "replicas": "Processes that answer requests; with --max-replicas, those at the start.",
    "min_replicas": "Fewest replicas, where their number follows the load.",
    "max_replicas": "Most replicas; 0: their number does not follow the load.",
    "replicas_per_node": "With --ray-address: replicas of every node, also of later ones.",
    "target_ongoing_requests": "Requests under way for each replica above which more are started.",
    "device": "Where to compute; auto takes CUDA where there is one.",
    "precision": "Number format; auto takes bf16 where the processor has it, int8 is faster.",
    "engine_threads": "Threads of one replica's forward; 0 for all cores.",
    "max_batch_tokens": "Most tokens in one forward; 0: as many as are efficient here, measured.",
    "max_queued_tokens": "Most tokens waiting; more are answered with 503.",
    "max_queue_ms": "Longest wait; what would wait longer is answered with 503 or 429 at once.",
    "max_inputs": "Most inputs in one request.",
    "max_body_bytes": "Largest body of a question.",
    "max_artifact_bytes": "Largest artifact that may be uploaded.",
    "body_timeout_s": "Seconds that a request's body may take to come.",
    "plan_cache_bytes": "Memory for overlays made ready to run.",
    "signature_key": "Public key (PEM) with which every uploaded artifact must be signed.",
    "auth": "Whether every route but health needs a key; without, only changes do.",
}


def serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each setting of the server but the store, with the setting's own default."""
    for name, setting in reversed(ServeConfig.model_fields.items()):
        if name == "store":
            continue
        flag = f"--{name.replace('_', '-')}"
        choices = get_args(setting.annotation) if get_origin(setting.annotation) is Literal else ()
        kind = click.Choice(choices) if choices else type(setting.default)
        add = click.option(
            f"{flag}/--no-{name}" if setting.annotation is bool else flag,
            type=str if setting.default is None else kind,
            default=setting.default,
            show_default=setting.default is not None,
            envvar=CACHE_VARIABLE if name == "cache" else None,
            show_envvar=name == "cache",
            help=SERVE_HELP.get(name),
        )
        command = add(command)
    return command


@cli.command()
@store_option
@serve_options
def serve(store: Store, **settings: Any) -> None:
    """Answer requests for all tasks of the store over HTTP, until Ctrl-C.

    The first start makes a key for this machine, in the file token of the store; it is printed with
    a curl line that can be pasted as it is. TASKBONE_TOKEN sets another, TASKBONE_ADMIN_TOKEN one
    that may change what is served, and `taskbone keys` makes more. The routes are described at
    /docs.

    \b
    Example:
        taskbone serve --port 8080 --max-batch-tokens 8192
    """
    config = ServeConfig.of(store=store.location, **settings)
    # What would stop every replica is said before the seconds that starting Ray takes.
    store.backbone(config.backbone)
    if config.signature_key is not None:
        from model_store.signatures import check_key

        check_key(config.signature_key)
    if config.ray_address:
        from serving import cluster

        cluster.run(config)
    else:
        from serving import private_ray

        private_ray.run(config)


@cli.command("ray-environment")
def ray_environment() -> None:
    """Print the variables that the nodes of a Ray need to be started with.

    For `taskbone serve --ray-address` and for `serve deploy`. On every node, before `ray start`:
    eval "$(taskbone ray-environment)". It writes what HAProxy needs into a folder of this user's
    below /tmp.

    \b
    Example:
        taskbone ray-environment
    """
    from serving.cluster_environment import exports

    click.echo(exports(), nl=False)


# --- localize and evaluate ------------------------------------------------------------------------


@cli.command()
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
    help="With --parallel: CPUs, and so threads, of each task.  [default: 1]",
)
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
    Example:
        taskbone localize examples/tasks/sst2.yaml --data data --output sst2.safetensors
        taskbone localize examples/tasks/*.yaml --data data --parallel
    """
    if output is not None and len(task_files) > 1:
        raise click.UsageError(f"--output names one file; {len(task_files)} tasks were given")
    if cpus_per_task is not None and not parallel:
        raise click.UsageError("--cpus-per-task goes with --parallel")
    from rich.console import Console

    console = Console()
    options: dict[str, Any] = {
        **{"store": store, "data": data, "work_dir": work_dir, "output": output},
        **{"publish": publish, "device": device},
    }
    if len(task_files) > 1 or parallel:
        localize_many(task_files, options, console, (cpus_per_task or 1) if parallel else None)
        return
    from localization.commands import localize_file

    localize_file(task_files[0], **options, console=console)


def localize_many(
    task_files: Sequence[Path], options: dict[str, Any], console: "Console", cpus: int | None
) -> None:
    """Localize several tasks, at once where each has `cpus`; print a table, fail if one failed."""
    from localization import batch

    assignments, outcomes = batch.read_assignments(task_files, **options)
    for outcome in outcomes:
        click.echo(batch.failure_line(outcome))
    if cpus is None:
        outcomes += batch.localize_in_turn(assignments, console)
    else:
        from localization.parallel import localize_at_once

        outcomes += localize_at_once(assignments, cpus, console)
    outcomes.sort(key=lambda outcome: task_files.index(outcome.file))
    show_table(batch.TABLE_TITLE, batch.TABLE_HEADS, batch.table_rows(outcomes))
    failed = [str(outcome.file) for outcome in outcomes if outcome.failure]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(outcomes)} tasks failed: {', '.join(failed)}"
        )


@cli.command()
@click.argument("task")
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
    from localization.commands import evaluate_file

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


# --- predict --------------------------------------------------------------------------------------


@cli.command()
@click.argument("task")
@click.argument("text")
@click.argument("text2", required=False)
@click.option(
    "--url",
    default="http://127.0.0.1:8000",
    envvar="TASKBONE_URL",
    show_default=True,
    show_envvar=True,
    help="Where the server is.",
)
@click.option(
    "--token",
    envvar="TASKBONE_TOKEN",
    show_envvar=True,
    help="A key of the server. [default: for a server on this machine, its store's file token]",
)
@store_option
@json_option
def predict(
    task: str,
    text: str,
    text2: str | None,
    url: str,
    token: str | None,
    store: Store,
    as_json: bool,
) -> None:
    """Ask a running server for TASK's label of TEXT, or of the pair TEXT and TEXT2.

    With - as TEXT, every line of the standard input is one text; a tab separates the two texts of
    a pair.

    \b
    Examples:
        taskbone predict sst2 "A film to remember."
        taskbone predict mrpc "He left." "He went away."
        cut -f 2 reviews.tsv | taskbone predict sst2 - --json
    """
    from serving import client, local_key

    inputs = read_inputs(text, text2)
    # The store's token is for the server on this machine, and shown to no other.
    if token is None and client.is_local(url):
        token = local_key.local_token(store.folder)
    answer = client.predict(url, task, inputs, token)
    if as_json:
        show_json(answer)
    else:
        show_answer(answer, inputs)


def read_inputs(text: str, text2: str | None) -> list[TextInput]:
    """The inputs that the arguments, or the lines of the standard input, stand for."""
    if text != "-":
        return [text] if text2 is None else [(text, text2)]
    if text2 is not None:
        raise click.UsageError("with - the texts come from the standard input; leave TEXT2 out")
    try:
        lines = sys.stdin.buffer.read().decode().split("\n")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"the standard input is not UTF-8: {error}") from None
    if lines[-1] == "":  # the end of the last line
        lines.pop()
    inputs: list[TextInput] = []
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        if not line.strip():
            raise click.ClickException(
                f"line {number} of the standard input holds no text; give one text on each line"
            )
        first, tab, second = line.partition("\t")
        inputs.append((first, second) if tab else line)
    if not inputs:
        raise click.ClickException("the standard input holds no text; give one text on each line")
    return inputs


def show_answer(answer: dict[str, Any], inputs: Sequence[TextInput]) -> None:
    """Print predictions with a bar for each score."""
    rows = []
    for given, prediction in zip(inputs, answer["predictions"], strict=True):
        text = given if isinstance(given, str) else " | ".join(given)
        score = prediction["score"]
        bar = "\u2588" * round(score * BAR_WIDTH)
        rows.append((shortened(text), prediction["label"], f"{score:.1%}", bar))
    total_ms = answer["timings_ms"]["total_ms"]
    title = f"{answer['task']}, version {answer['version']}, {total_ms:.1f} ms in the server"
    show_table(title, ("text", "label", "score", ""), rows)


cli.add_command(store_commands)
cli.add_command(key_commands)
cli.add_command(node_command)


def main() -> None:
    """Run the command line of this process."""
    cli.main(prog_name="taskbone")


if __name__ == "__main__":
    main()
