"""How commands print: JSON for programs, tables for people. Knows nothing of what is printed."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click


def show_json(value: Any) -> None:
    """Print JSON, for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def show_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a title and a table; nothing is cut where it goes to a file or a program."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(Text(printable(title)))
    console.print(table)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show on the error stream that something is being done that takes seconds."""
    from rich.console import Console

    with Console(stderr=True).status(f"{printable(text)} ..."):
        yield


def shortened(text: str, most: int = 60) -> str:
    """A text cut to what a table cell can take."""
    return text if len(text) <= most else text[: most - 3] + "..."


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def printable(text: str) -> str:
    """A text that cannot move the cursor or change colours, whoever wrote it."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
