"""`docs/command-line.md`: its blocks of help, and the JSON that it promises.

`python -m tests.cli.command_page` writes the commands' help into its blocks again.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from taskbone import cli

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
WIDTH = 100
NAMED_BY_DATA = ("scores", "f1", "statuses", "statuses_per_s", "rejected_per_s", "manifest")
"""Objects whose names are statuses, labels and the like, or described elsewhere."""
_SECTION = re.compile(r"^### taskbone ([a-z -]+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_JSON = re.compile(r"^```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(
    group: click.Group = cli, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """Every command with its name as typed, groups included."""
    for name, command in group.commands.items():
        yield " ".join((*names, name)), command
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))


def help_of(name: str, width: int = WIDTH) -> str:
    """What `taskbone NAME --help` prints."""
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(
        cli, [*name.split(), "--help"], prog_name="taskbone", terminal_width=width
    )
    assert result.exit_code == 0, result.output
    return result.output


def sections() -> dict[str, str]:
    """The text below each command's heading."""
    return dict(_SECTION.findall(PAGE.read_text(encoding="utf-8")))


def help_on_page(section: str) -> str | None:
    """The block of help in a section."""
    found = _HELP.search(section)
    return found[1] if found else None


def promised(name: str) -> Any:
    """The JSON that the page shows for a command; None where it shows none."""
    found = _JSON.search(sections()[name])
    return json.loads(found[1]) if found else None


def as_promised(name: str, output: str) -> Any:
    """What a command has printed, once it has the shape that the page shows."""
    given = json.loads(output)
    wrong = list(_differences(promised(name), given, "$"))
    assert wrong == [], f"taskbone {name}: {wrong}"
    return given


def _differences(shown: Any, given: Any, place: str) -> Iterator[str]:
    if shown is None or given is None or place.rpartition(".")[2] in NAMED_BY_DATA:
        return
    if isinstance(shown, dict) and isinstance(given, dict):
        if shown.keys() != given.keys():
            yield f"{place}: {sorted(shown)} is promised, and {sorted(given)} came"
        for name in shown.keys() & given.keys():
            yield from _differences(shown[name], given[name], f"{place}.{name}")
    elif isinstance(shown, list) and isinstance(given, list):
        for number, item in enumerate(given if shown else ()):
            yield from _differences(shown[0], item, f"{place}[{number}]")
    elif _kind(shown) != _kind(given):
        yield f"{place}: {shown!r} is promised, and {given!r} came"


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def write() -> None:
    """Put every command's help into its block."""

    def with_help(found: re.Match[str]) -> str:
        name, text = found[1], found[2]
        block = f"```text\n{help_of(name)}```"
        return f"### taskbone {name}\n" + _HELP.sub(lambda _: block, text, count=1)

    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_SECTION.sub(with_help, text), encoding="utf-8")


if __name__ == "__main__":
    write()
