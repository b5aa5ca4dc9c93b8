"""What holds for every command: its imports, errors, interruption and output."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from localization.errors import LocalizationError
from model_store.errors import ModelStoreError
from model_store.store import Store
from serving.errors import ServingError
from taskbone import __version__
from tests.cli.running import fail, run, succeed
from tests.model_store.example_artifacts import example_artifact, example_file
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
HEAVY = "{'torch', 'ray', 'transformers', 'fastapi', 'safetensors', 'tokenizers', 'numpy'}"


class TestWholeCommand:
    @pytest.mark.parametrize(
        "arguments",
        [
            *(["--help"], ["--version"], ["completion", "bash"]),
            *(["store", "list"], ["store", "show", "mood"], ["store", "gc", "--yes"]),
            *([name, "--help"] for name in ("serve", "localize", "evaluate", "predict", "store")),
            *([name, "--help"] for name in ("status", "bench", "keys", "node")),
        ],
        ids=" ".join,
    )
    def test_light_commands_import_nothing_heavy(self, store: Store, arguments: list[str]) -> None:
        store.publish(example_file())
        code = (
            f"import sys; sys.argv[1:] = {arguments}; import taskbone\n"
            f"try: taskbone.main()\n"
            f"finally: print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
        )
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr.strip() == "[]"

    def test_version(self) -> None:
        assert succeed("--version") == f"taskbone, version {__version__}\n"

    def test_without_arguments_it_shows_its_help(self) -> None:
        result = run()
        assert result.exit_code == 2
        assert "Example, from nothing to an answer:" in result.output

    @pytest.mark.parametrize("kind", [ModelStoreError, LocalizationError, ServingError])
    def test_errors_of_our_packages_are_one_line(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        def backbones(_: Store) -> None:
            raise kind("what was given, what was expected")

        monkeypatch.setattr(Store, "backbones", backbones)
        assert fail("store", "list") == "what was given, what was expected"

    def test_other_errors_are_bugs_and_keep_their_traceback(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def backbones(_: Store) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Store, "backbones", backbones)
        assert isinstance(run("store", "list").exception, ZeroDivisionError)

    def test_ctrl_c_ends_it_with_130(self, store: Store) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            command = [sys.executable, "-m", "taskbone", "predict", "mood", "fine", "--url", url]
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            connection, _ = server.accept()
            with connection:
                connection.recv(1)
                running = psutil.Process(child.pid)
                wait_until(lambda: running.status() == psutil.STATUS_SLEEPING)  # for the answer
                child.send_signal(signal.SIGINT)
                output, errors = child.communicate()
        assert (child.returncode, output, errors.strip()) == (130, "", "Interrupted.")


def test_output_into_a_closed_pipe_is_no_error(store: Store) -> None:
    store.publish(example_artifact())
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "taskbone", "store", "list"]
    result = subprocess.run(
        command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in result.stderr
