"""What a shell completes: by the script in a real bash, and by the words that a script sends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model_store.store import Store
from tests.cli.running import run, succeed
from tests.model_store.example_artifacts import example_artifact

ROOT = Path(__file__).parents[2]
BASH = """
eval "$(taskbone completion bash)"
COMP_WORDS=({words}) COMP_CWORD=$(({count} - 1)) COMPREPLY=()
_taskbone_completion taskbone
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def filled(store: Store) -> Store:
    """Two tasks and two keys."""
    for task in ("mood", "money"):
        store.publish(example_artifact(task))
    for name in ("shop", "deploy"):
        succeed("keys", "add", name, "--scope", "predict")
    succeed("keys", "rotate", "shop", "--keep-old", "1h")
    return store


def completed(*words: str, shell: str = "bash") -> list[str]:
    """What fits the last word, as the command answers a shell's script."""
    environment = {
        **os.environ,
        "_TASKBONE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(("taskbone", *words)),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    command = [sys.executable, "-m", "taskbone"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    if shell == "zsh":  # three lines each: kind, value, help
        return lines[1::3]
    return [line.split(",", 1)[1].split("\t")[0] for line in lines if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
class TestByTheProtocol:
    def test_commands_and_options(self, filled: Store, shell: str) -> None:
        assert completed("sta", shell=shell) == ["status"]
        assert completed("store", "g", shell=shell) == ["gc"]
        assert "--interval" in completed("status", "--in", shell=shell)

    def test_tasks(self, filled: Store, shell: str) -> None:
        assert completed("predict", "mo", shell=shell) == ["money", "mood"]
        assert completed("store", "show", "moo", shell=shell) == ["mood"]
        for command in (["evaluate"], ["bench"], ["store", "activate"], ["store", "delete"]):
            assert completed(*command, "mon", shell=shell) == ["money"]

    def test_keys_once_each(self, filled: Store, shell: str) -> None:
        assert completed("keys", "revoke", "s", shell=shell) == ["shop"]
        assert completed("keys", "rotate", "d", shell=shell) == ["deploy"]


def test_the_store_that_is_named_counts(filled: Store, tmp_path: Path) -> None:
    Store(tmp_path / "other").publish(example_artifact("moment"))
    assert completed("predict", "--store", str(tmp_path / "other"), "mo") == ["moment"]


def test_where_nothing_can_be_read_nothing_is_completed(filled: Store) -> None:
    (filled.root / "registry.json").write_text("{")
    (filled.root / "documents" / "keys.json").write_text("{")
    assert completed("predict", "mo") == []
    assert completed("keys", "revoke", "s") == []
    assert completed("predict", "--store", "s3://bucket/prefix", "mo") == []


def test_completing_imports_nothing_heavy(filled: Store) -> None:
    code = (
        "import sys, taskbone\n"
        "try: taskbone.main()\n"
        "finally: print(*(name for name in ('torch', 'ray', 'rich', 'numpy', 'httpx', 'fsspec')"
        " if name in sys.modules))"
    )
    environment = {
        **os.environ,
        "_TASKBONE_COMPLETE": "bash_complete",
        "COMP_WORDS": "taskbone predict mo",
        "COMP_CWORD": "2",
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == ["plain,money", "plain,mood", ""]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
class TestInBash:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["taskbone", "store", "act"], ["activate"]),
            (["taskbone", "predict", "mo"], ["money", "mood"]),
            (["taskbone", "keys", "revoke", ""], ["shop", "deploy"]),
            (["taskbone", "completion", "f"], ["fish"]),
        ],
    )
    def test_the_script_completes(
        self, filled: Store, tmp_path: Path, words: list[str], expected: list[str]
    ) -> None:
        program = tmp_path / "taskbone"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m taskbone "$@"\n')
        program.chmod(0o755)
        given = " ".join(f'"{word}"' for word in words)
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        result = subprocess.run(
            ["bash", "--norc", "-c", BASH.format(words=given, count=len(words))],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.splitlines() == expected

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_each_shell_has_its_script(self, shell: str) -> None:
        script = succeed("completion", shell)
        assert "_TASKBONE_COMPLETE" in script
        if (program := shutil.which(shell)) is not None:
            subprocess.run([program, "-n"], input=script, text=True, check=True)

    def test_another_shell(self) -> None:
        assert run("completion", "tcsh").exit_code == 2
