"""The `taskbone` command: what it prints and returns, and what it does not import."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from localization.errors import LocalizationError
from model_store.errors import ModelStoreError
from model_store.store import Store
from serving.client import INPUTS_PER_REQUEST
from serving.config import ServeConfig
from serving.errors import ServingError
from taskbone import __version__, cli
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact, example_file

ROOT = Path(__file__).parents[1]
HEAVY = "{'torch', 'ray', 'transformers', 'fastapi', 'safetensors', 'tokenizers', 'numpy'}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that every command of a test uses: made by none yet."""
    monkeypatch.setenv("TASKBONE_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("TASKBONE_TOKEN", raising=False)
    monkeypatch.delenv("TASKBONE_URL", raising=False)
    return Store(tmp_path / "store")


def run(*arguments: str | Path, text: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=text)


def succeed(*arguments: str | Path, text: str | None = None) -> str:
    result = run(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments: str | Path, text: str | None = None) -> str:
    """The message of a command that must end with exit status 1 and one error on stderr."""
    result = run(*arguments, text=text)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("Error: ").strip()


class TestWholeCommand:
    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["--version"], ["store", "list"], ["store", "show", "mood"]]
        + [[name, "--help"] for name in ("serve", "localize", "evaluate", "predict", "store")],
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
                connection.recv(1)  # the child waits for an answer from here on
                child.send_signal(signal.SIGINT)
                output, errors = child.communicate()
        assert (child.returncode, output, errors.strip()) == (130, "", "Interrupted.")


class TestStoreCommands:
    def test_empty_store(self, store: Store) -> None:
        assert "is empty. Begin with: taskbone store add-backbone" in succeed("store", "list")
        assert json.loads(succeed("store", "list", "--json")) == {"backbones": [], "tasks": []}
        assert not store.root.exists()

    def test_list(self, store: Store) -> None:
        with store.staging() as staging:
            (staging / "model.safetensors").write_bytes(b"x" * 1500)
            store.add_backbone(FINGERPRINT, "tiny", staging)
        store.publish(example_artifact("mood"))
        store.publish(example_artifact("mood", b"second"))
        store.publish(example_artifact("quiet"), activate=False)
        output = succeed("store", "list")
        lines = [line.split() for line in output.splitlines()]
        assert ["tiny", FINGERPRINT[:12], "1.5", "kB"] in lines
        assert [line[:3] for line in lines if line[:1] == ["mood"]] == [["mood", "2", "2"]]
        assert ["quiet", "1", "none"] in lines
        found = json.loads(succeed("store", "list", "--json"))
        assert [info["name"] for info in found["backbones"]] == ["tiny"]
        assert [(info["task"], info["version"], info["active"]) for info in found["tasks"]] == [
            ("mood", 1, False),
            ("mood", 2, True),
            ("quiet", 1, False),
        ]

    def test_store_option_comes_before_the_environment(self, store: Store, tmp_path: Path) -> None:
        Store(tmp_path / "other").publish(example_artifact("elsewhere"))
        assert "elsewhere" in succeed("store", "list", "--store", tmp_path / "other")

    def test_home_folder_is_the_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("TASKBONE_STORE", raising=False)
        Store(tmp_path / ".taskbone").publish(example_artifact("homely"))
        assert "homely" in succeed("store", "list")

    def test_show(self, store: Store) -> None:
        store.publish(example_file(note="old"))
        store.publish(example_file(note="a task about moods"))
        output = succeed("store", "show", "mood")
        for part in ("a task about moods", "bad, good", "{text}", "tiny (abababababab)", "37.5%"):
            assert part in output
        assert "old" in succeed("store", "show", "mood", "--version", "1")
        found = json.loads(succeed("store", "show", "mood", "--json"))
        assert found["version"] == 2
        assert found["manifest"]["labels"] == ["bad", "good"]
        assert [info["version"] for info in found["versions"]] == [1, 2]

    def test_show_prints_no_control_characters(self, store: Store) -> None:
        store.publish(example_file(note="red \x1b[31malert\x07"))
        assert not {"\x1b", "\x07"} & set(succeed("store", "show", "mood"))

    def test_activate_and_roll_back(self, store: Store) -> None:
        for data in (b"1", b"2", b"3"):
            store.publish(example_artifact(data=data))
        assert succeed("store", "activate", "mood", "1") == "mood: version 1 is active\n"
        assert json.loads(succeed("store", "roll-back", "mood", "--json"))["version"] == 3
        assert store.tasks()["mood"].version == 3

    def test_delete(self, store: Store) -> None:
        store.publish(example_artifact(data=b"1"))
        store.publish(example_artifact(data=b"2"))
        output = succeed("store", "delete", "mood", "--version", "1", "--yes")
        assert output == "Deleted 'mood' version 1.\n"
        assert [info.version for info in store.versions("mood")] == [2]
        assert run("store", "delete", "mood", text="n\n").exit_code == 130
        assert store.task_names() == ["mood"]
        succeed("store", "delete", "mood", text="y\n")
        assert store.task_names() == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["show", "mod"], "no task 'mod' in the store; it has: mood"),
            (["show", "mood", "--version", "9"], "task 'mood' has no version 9; it has: 1"),
            (["activate", "mood", "9"], "task 'mood' has no version 9; it has: 1"),
            (["roll-back", "mood"], "none to roll back to; activate one of: 1"),
            (["delete", "mood", "--version", "1", "--yes"], "version 1 is active"),
            (["publish", "/nowhere.safetensors"], "/nowhere.safetensors: cannot be read: No such"),
            (["add-backbone", "/nowhere"], "/nowhere"),
        ],
    )
    def test_errors_say_what_there_is(
        self, store: Store, arguments: list[str], message: str
    ) -> None:
        store.publish(example_artifact())
        assert message in fail("store", *arguments)

    def test_damaged_registry(self, store: Store) -> None:
        store.publish(example_artifact())
        (store.root / "registry.json").write_text("{")
        assert "registry.json: the registry is damaged" in fail("store", "list")


class TestServe:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
        """The configs that servers were started with, instead of starting them."""
        configs: list[ServeConfig] = []
        monkeypatch.setattr("serving.deployment.run", configs.append)
        return configs

    def test_defaults_are_those_of_the_config(
        self, store: Store, served: list[ServeConfig]
    ) -> None:
        succeed("serve")
        assert served == [ServeConfig(store=store.root)]

    def test_every_setting_has_its_option(self, store: Store, served: list[ServeConfig]) -> None:
        changed: dict[str, Any] = {}
        for name, setting in ServeConfig.model_fields.items():
            if name in ("device", "precision"):
                changed[name] = {"device": "cpu", "precision": "fp32"}[name]
            elif isinstance(setting.default, int) and not isinstance(setting.default, bool):
                changed[name] = setting.default + 1
            elif name in ("backbone", "host"):
                changed[name] = "other"
        options = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
        succeed("serve", *options, "--no-auth")
        assert served == [ServeConfig(store=store.root, auth=False, **changed)]
        assert changed.keys() | {"store", "auth"} == ServeConfig.model_fields.keys()

    def test_a_wrong_setting_is_named(self, store: Store, served: list[ServeConfig]) -> None:
        assert "replicas" in fail("serve", "--replicas", "0")
        assert served == []


class TestLocalization:
    def test_localize_passes_its_options_on(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[Path, dict[str, Any]]] = []
        monkeypatch.setattr(
            "localization.commands.localize_file",
            lambda file, *, console, **options: calls.append((file, options)),
        )
        succeed("localize", "task.yaml")
        folders = ["--data", tmp_path, "--work-dir", tmp_path, "--output", tmp_path / "a"]
        succeed("localize", "task.yaml", *folders, "--no-publish", "--device", "cpu")
        (_, plain), (file, full) = calls
        assert file == Path("task.yaml")
        assert plain.pop("store").root == full.pop("store").root == store.root
        assert plain == {
            **dict.fromkeys(("data", "work_dir", "output")),
            **{"publish": True, "device": "auto"},
        }
        assert full == {
            **{"data": tmp_path, "work_dir": tmp_path, "output": tmp_path / "a"},
            **{"publish": False, "device": "cpu"},
        }

    def test_localize_names_a_missing_file(self, store: Store) -> None:
        assert "nowhere.yaml" in fail("localize", "nowhere.yaml")

    def test_evaluate_prints_the_figures(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        from localization.evaluation import evaluate

        found = evaluate(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]), 2)
        calls: list[dict[str, Any]] = []

        def evaluate_file(file: Path, **options: Any) -> tuple[int, tuple[str, ...], Any]:
            calls.append({"file": file, **options})
            return 7, ("bad", "good"), found

        monkeypatch.setattr("localization.commands.evaluate_file", evaluate_file)
        output = succeed(
            "evaluate", "mood", "rows.csv", "--text", "a", "--text", "b", "--label", "c"
        )
        for part in ("mood, version 7, on 4 rows of rows.csv", "75.00%", "F1 of good", "80.00%"):
            assert part in output
        assert calls[0].pop("store").root == store.root
        assert calls[0] == {
            **{"file": Path("rows.csv"), "task": "mood", "version": None, "device": "auto"},
            **{"text": ("a", "b"), "label": "c"},
        }
        answer = json.loads(succeed("evaluate", "mood", "rows.csv", "--json"))
        assert (answer["version"], answer["rows"], answer["accuracy"]) == (7, 4, 0.75)
        assert answer["f1"]["good"] == pytest.approx(0.8)


def prediction(label: str, score: float = 0.75) -> dict[str, Any]:
    other = {"good": "bad", "bad": "good"}[label]
    return {"label": label, "score": score, "scores": {label: score, other: 1 - score}}


def predictions(inputs: list[Any]) -> dict[str, Any]:
    """The answer of a server to which every other text is good."""
    given = [prediction("good" if number % 2 == 0 else "bad") for number in range(len(inputs))]
    times = {"tokenize_ms": 0.5, "queue_ms": 0.25, "forward_ms": 1.0, "total_ms": 2.0}
    return {"task": "mood", "version": 3, "predictions": given, "timings_ms": times}


class FakeServer:
    """Answers on a free port what `answer(path, body)` gives; keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any, str | None]] = []
        self.answer: Callable[[str, Any], tuple[int, bytes]] = lambda _, body: (
            200,
            json.dumps(predictions(body["inputs"])).encode(),
        )
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                body = json.loads(data) if data else None
                fake.asked.append((self.path, body, self.headers.get("authorization")))
                status, answer = fake.answer(self.path, body)
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = reply

            def log_message(self, *_: object) -> None:
                """Keep the tests' output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fails(self, status: int, kind: str, message: str) -> None:
        body = {"error": {"type": kind, "message": message, "request_id": "1"}}
        tasks = {"tasks": [{"task": "mood"}, {"task": "topic"}]}
        self.answer = lambda path, _: (
            (200, json.dumps(tasks).encode())
            if path == "/v1/tasks"
            else (status, json.dumps(body).encode())
        )


@pytest.fixture
def server(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer()
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("TASKBONE_URL", fake.url)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


class TestPredict:
    def test_one_text(self, server: FakeServer) -> None:
        output = succeed("predict", "mood", "A [fine] day.")
        assert server.asked == [("/v1/tasks/mood/predict", {"inputs": ["A [fine] day."]}, None)]
        assert "mood, version 3, 2.0 ms in the server" in output
        assert "A [fine] day." in output
        assert "75.0%" in output
        assert "\u2588" * 15 in output

    def test_a_pair(self, server: FakeServer) -> None:
        succeed("predict", "mood", "He left.", "He went.")
        assert server.asked[0][1] == {"inputs": [["He left.", "He went."]]}

    def test_json_is_what_the_server_said(self, server: FakeServer) -> None:
        assert json.loads(succeed("predict", "mood", "x", "--json")) == predictions(["x"])

    def test_lines_of_the_standard_input(self, server: FakeServer) -> None:
        output = succeed("predict", "mood", "-", "--json", text="one\n\ntwo\nthree\n")
        assert server.asked[0][1] == {"inputs": ["one", "two", "three"]}
        assert [item["label"] for item in json.loads(output)["predictions"]] == [
            *("good", "bad", "good")
        ]

    def test_tabs_make_pairs(self, server: FakeServer) -> None:
        succeed("predict", "mood", "-", text="one\ttwo\nthree\tfour\tfive\n")
        assert server.asked[0][1] == {"inputs": [["one", "two"], ["three", "four\tfive"]]}

    def test_many_lines_are_asked_in_turn(self, server: FakeServer) -> None:
        count = 2 * INPUTS_PER_REQUEST + 1
        texts = [f"text {number}" for number in range(count)]
        answer = json.loads(succeed("predict", "mood", "-", "--json", text="\n".join(texts)))
        assert [text for _, body, _ in server.asked for text in body["inputs"]] == texts
        assert len(server.asked) == 3
        assert len(answer["predictions"]) == count
        assert answer["timings_ms"]["total_ms"] == 6.0

    def test_no_lines(self, server: FakeServer) -> None:
        assert "holds no text" in fail("predict", "mood", "-", text="\n \n")
        assert run("predict", "mood", "-", "second").exit_code == 2

    def test_the_token_comes_from_the_store_the_environment_or_the_option(
        self, server: FakeServer, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.root.mkdir()
        (store.root / "token").write_text("from-the-store-1234\n")
        succeed("predict", "mood", "x")
        monkeypatch.setenv("TASKBONE_TOKEN", "from-the-environment")
        succeed("predict", "mood", "x")
        succeed("predict", "mood", "x", "--token", "from-the-option")
        assert [token for _, _, token in server.asked] == [
            "Bearer from-the-store-1234",
            "Bearer from-the-environment",
            "Bearer from-the-option",
        ]

    @pytest.mark.parametrize("url", ["http://example.invalid", "http://127.0.0.1.example.invalid"])
    def test_the_stores_token_is_not_shown_to_other_machines(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        store.root.mkdir()
        (store.root / "token").write_text("from-the-store-1234\n")
        tokens: list[str | None] = []

        def predict(url: str, task: str, inputs: list[Any], token: str | None) -> dict[str, Any]:
            tokens.append(token)
            return predictions(inputs)

        monkeypatch.setattr("serving.client.predict", predict)
        succeed("predict", "mood", "x", "--url", url)
        succeed("predict", "mood", "x", "--url", "http://localhost:1")
        assert tokens == [None, "from-the-store-1234"]

    def test_no_server(self, store: Store) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        message = fail("predict", "mood", "x", "--url", f"http://127.0.0.1:{port}")
        assert message == (
            f"no server answers at http://127.0.0.1:{port}; start one with: taskbone serve, or "
            f"name it with --url"
        )

    @pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", "http://127.0.0.1:x"])
    def test_wrong_url(self, store: Store, url: str) -> None:
        assert fail("predict", "mood", "x", "--url", url).startswith(f"{url} cannot be asked: ")

    def test_wrong_token(self, server: FakeServer) -> None:
        server.fails(401, "unauthorized", "no token")
        assert "wants its token: give --token or set TASKBONE_TOKEN" in fail("predict", "mood", "x")

    def test_unknown_task(self, server: FakeServer) -> None:
        server.fails(404, "unknown_task", "no such task")
        message = fail("predict", "mod/../x", "x")
        assert message == "the server has no task 'mod/../x'; it has: mood, topic"
        assert server.asked[0][0] == "/v1/tasks/mod%2F..%2Fx/predict"

    def test_other_errors_say_what_the_server_says(self, server: FakeServer) -> None:
        server.fails(503, "overloaded", "the queue is full")
        assert fail("predict", "mood", "x") == "the queue is full (HTTP status 503)"

    @pytest.mark.parametrize(
        ("status", "body"),
        [(200, b"<html>"), (200, b"{}"), (200, b"[]"), (502, b"gateway"), (500, b'{"error": "x"}')],
    )
    def test_not_a_taskbone_server(self, server: FakeServer, status: int, body: bytes) -> None:
        server.answer = lambda *_: (status, body)
        assert f"is no Taskbone server (HTTP status {status})" in fail("predict", "mood", "x")

    def test_a_server_that_hangs_up(self, server: FakeServer) -> None:
        def hang_up(*_: object) -> tuple[int, bytes]:
            raise ConnectionAbortedError

        server.answer = hang_up
        server.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        assert "cannot be asked: Server disconnected" in fail("predict", "mood", "x")


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
