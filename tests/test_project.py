"""The project as a whole: its names, version and rules, and that what it says of itself is so."""

import ast
import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from serving.commands.serve import SERVE_HELP
from serving.config import ServeConfig
from taskbone import __version__, cli
from tests.cli.command_page import commands

ROOT = Path(__file__).parents[1]
PACKAGES = ("serving", "localization", "model_store")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "examples")
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"torch.load", "torch.save"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_files() -> list[Path]:
    return [
        ROOT / "taskbone.py",
        *(path for name in FOLDERS for path in ROOT.glob(f"{name}/**/*.py")),
    ]


COMMANDS = dict(commands())


def parse(line: str) -> None:
    """Have click take a command line apart; a wrong option or argument raises `UsageError`."""
    words = shlex.split(line.partition(" | ")[0], comments=True)
    assert words.pop(0) == "taskbone"
    command: click.Command = cli
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands, f"no command {name!r} in: {line}"
        command = command.commands[name]
    command.make_context(line, words)


class TestDistribution:
    def test_import_names_belong_to_it_alone(self) -> None:
        owners = importlib.metadata.packages_distributions()
        assert {name: set(owners[name]) for name in (*PACKAGES, "taskbone")} == {
            name: {"taskbone"} for name in (*PACKAGES, "taskbone")
        }

    def test_version_stands_in_one_place(self) -> None:
        assert importlib.metadata.version("taskbone") == __version__
        assert "version" not in pyproject()["project"]
        assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)

    def test_every_package_is_installed(self) -> None:
        """An editable install hides a package that is not named; a wheel would lack it."""
        found = {
            ".".join(file.parent.relative_to(ROOT).parts)
            for package in PACKAGES
            for file in ROOT.glob(f"{package}/**/__init__.py")
        }
        assert set(pyproject()["tool"]["setuptools"]["packages"]) == found

    def test_packages_say_that_they_are_typed(self) -> None:
        assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []

    def test_every_dependency_has_a_tested_version(self) -> None:
        project = pyproject()["project"]
        extras = [name for names in project["optional-dependencies"].values() for name in names]
        wanted = {
            normal(re.split(r"[\[<>=!~ ]", name)[0]) for name in project["dependencies"] + extras
        }
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        tested = {normal(name): version for name, version in pins.items()}
        assert wanted - tested.keys() == set()
        assert tested["torch"] == "2.13.0"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class TestCode:
    @pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
    def test_nothing_reads_or_writes_files_that_run_code(self, path: Path) -> None:
        found = []
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    found += [name.name for name in names]
                case ast.ImportFrom(module=str(module), names=names):
                    found += [module, *(f"{module}.{name.name}" for name in names)]
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    found.append(f"{owner}.{name}")
                case ast.keyword(arg="trust_remote_code"):
                    found.append("trust_remote_code")
        forbidden = FORBIDDEN_CALLS | FORBIDDEN_MODULES | {"trust_remote_code"}
        assert [
            name for name in found if name in forbidden or name.split(".")[0] in FORBIDDEN_MODULES
        ] == []

    def test_every_file_begins_with_what_it_is(self) -> None:
        bare = [
            str(path.relative_to(ROOT))
            for path in python_files()
            if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
        ]
        assert bare == []


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_explains_and_gives_an_example(self, name: str) -> None:
        text = COMMANDS[name].help or ""
        explanation, _, examples = text.partition("Example")
        assert len(explanation.split()) >= 8
        assert "taskbone " + name in examples

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_option_is_explained(self, name: str) -> None:
        options = [item for item in COMMANDS[name].params if isinstance(item, click.Option)]
        assert [option.name for option in options if not option.help] == []

    def test_examples_are_right(self) -> None:
        texts = [cli.help or "", *(command.help or "" for command in COMMANDS.values())]
        lines = [
            line[line.index("taskbone ") :]
            for text in texts
            for line in text.partition("Example")[2].splitlines()
            if "taskbone " in line
        ]
        assert len(lines) > len(COMMANDS)
        for line in lines:
            parse(line)

    def test_every_setting_of_the_server_is_explained(self) -> None:
        assert SERVE_HELP.keys() | {"store"} == ServeConfig.model_fields.keys()


class TestReadme:
    def test_names_every_command(self) -> None:
        text = (ROOT / "README.md").read_text()
        leaves = [name for name, item in COMMANDS.items() if not isinstance(item, click.Group)]
        assert [name for name in leaves if f"taskbone {name}" not in text] == []

    def test_its_command_lines_are_right(self) -> None:
        lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
        found = [line for line in lines if line.startswith("taskbone ")]
        assert found
        for line in found:
            parse(line)

    def test_its_make_commands_exist(self) -> None:
        named = set(re.findall(r"^ *make ([a-z]+)", (ROOT / "README.md").read_text(), re.M))
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {"run", "test"} <= named <= targets

    def test_ci_runs_its_test_command_after_the_checks(self) -> None:
        lines = (ROOT / ".ci" / "run").read_text().splitlines()
        assert [line for line in lines if line.startswith("make ")] == ["make check", "make test"]
