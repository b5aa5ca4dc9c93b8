"""The image: its Dockerfile, and as far as that goes without an engine, what it does."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from serving.config import ServeConfig
from tests.deploy.image import (
    DOCKERFILE,
    ROOT,
    build_wheel,
    environment,
    instructions,
    last_stage,
    sources,
)
from tests.test_project import parse


def test_the_linter_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def test_what_is_copied_is_there_and_nothing_else_is_sent() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:].rstrip("/") for rule in rules if rule.startswith("!")}
    assert let_in == set(sources())
    assert [name for name in let_in if not (ROOT / name).exists()] == []
    # What was compiled or cached here is not for another machine.
    assert rules[-2:] == ["**/__pycache__", "**/*.so"]


def test_every_base_has_a_tag_and_the_last_one_no_compiler_for_processors() -> None:
    (base,) = [one.value for one in instructions() if one.value.startswith("BASE=")]
    assert base.partition("=")[2].split(":")[1] == "3.11-slim-bookworm"
    froms = [one.value.split(" AS ") for one in instructions() if one.name == "FROM"]
    assert froms == [["${BASE}", "build"], ["${BASE}"]]
    (installing,) = [one for one in last_stage("RUN") if "apt-get" in one]
    assert re.match(r'if \[ "\$\{DEVICE\}" = cuda \]; then\s+apt-get .*; +fi$', installing)


def test_it_runs_as_a_user_by_number_and_says_where_it_writes() -> None:
    assert last_stage("USER") == ["10001:10001"]
    made = " ".join(last_stage("RUN"))
    assert "--uid 10001" in made
    assert environment()["TASKBONE_STORE"] == "/store"
    assert environment()["TASKBONE_CACHE"] == environment()["HOME"] == "/cache"
    assert "--owner taskbone --group taskbone --mode 0700 /store /cache" in made


def test_what_it_starts_is_a_command_of_ours_at_the_port_that_it_exposes() -> None:
    (entrypoint,), (arguments,) = last_stage("ENTRYPOINT"), last_stage("CMD")
    parse(shlex.join([*json.loads(entrypoint), *json.loads(arguments)]))
    assert last_stage("EXPOSE") == [str(ServeConfig.model_fields["port"].default)]
    assert last_stage("STOPSIGNAL") == ["SIGTERM"]


@pytest.mark.parametrize("command", ["taskbone", "ray", "serve"])
def test_a_login_shell_finds_the_commands(command: str) -> None:
    links = next(line for line in last_stage("RUN") if "ln -s" in line).partition("ln -s ")[2]
    *found, folder = links.split()
    assert f"/opt/taskbone/bin/{command}" in found
    assert folder == "/usr/local/bin/"
    # It is among what the packages that are installed there bring.
    assert (Path(sys.executable).parent / command).exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("build") / "source")


def test_the_wheel_has_all_modules_and_the_native_forward(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "serving/*.py", "localization/*.py", "model_store/*.py", "taskbone.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(tracked.stdout.split()) <= names
    libraries = {file.name for file in (ROOT / "model_store").glob("_native_*.so")}
    assert {Path(name).name for name in names if name.endswith(".so")} == libraries
    if shutil.which("g++"):
        assert len(libraries) == 3
    assert [name for name in names if name.startswith("tests/")] == []
