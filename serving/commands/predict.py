"""`taskbone predict`: what is asked, and how the answer is shown."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from model_store.manifest import TextInput
from model_store.options import complete_tasks, json_option
from model_store.store import Store
from model_store.tables import shortened, show_json, show_table
from serving.commands.options import server_options, shown_token

BAR_WIDTH = 20
STANDARD_INPUT = Path("-")


@click.command("predict", short_help="Ask a running server for a task's label of a text.")
@click.argument("task", shell_complete=complete_tasks)
@click.argument("text")
@click.argument("text2", required=False)
@server_options
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
    from serving import client

    inputs = read_inputs(text, text2)
    answer = client.predict(url, task, inputs, shown_token(url, token, store))
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
    return read_lines(STANDARD_INPUT)


def read_lines(file: Path) -> list[TextInput]:
    """The inputs of a file or, for `-`, of the standard input: one on each line of UTF-8; a tab
    separates the two texts of a pair."""
    place = "the standard input" if file == STANDARD_INPUT else str(file)
    try:
        data = sys.stdin.buffer.read() if file == STANDARD_INPUT else file.read_bytes()
        lines = data.decode().split("\n")
    except OSError as error:
        raise click.ClickException(f"{place}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{place} is not UTF-8: {error}") from None
    if lines[-1] == "":  # the end of the last line
        lines.pop()
    inputs: list[TextInput] = []
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        if not line.strip():
            raise click.ClickException(
                f"line {number} of {place} holds no text; give one text on each line"
            )
        inputs.append(as_input(line))
    if not inputs:
        raise click.ClickException(f"{place} holds no text; give one text on each line")
    return inputs


def as_input(line: str) -> TextInput:
    """One text, or with a tab in it a pair."""
    first, tab, second = line.partition("\t")
    return (first, second) if tab else line


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
