"""`taskbone predict` against a made-up server: what it sends, shows, and says of every failure."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from model_store.store import Store
from serving.client import INPUTS_PER_REQUEST
from tests.cli.fake_server import FakeServer, fake_server
from tests.cli.running import fail, run, succeed


def prediction(label: str, score: float = 0.75) -> dict[str, Any]:
    other = {"good": "bad", "bad": "good"}[label]
    return {"label": label, "score": score, "scores": {label: score, other: 1 - score}}


def predictions(inputs: list[Any]) -> dict[str, Any]:
    """The answer of a server to which every other text is good."""
    given = [prediction("good" if number % 2 == 0 else "bad") for number in range(len(inputs))]
    times = {"tokenize_ms": 0.5, "queue_ms": 0.25, "forward_ms": 1.0, "total_ms": 2.0}
    return {"task": "mood", "version": 3, "predictions": given, "timings_ms": times}


@pytest.fixture
def server(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with fake_server(
        lambda _, body: (200, json.dumps(predictions(body["inputs"])).encode())
    ) as fake:
        monkeypatch.setenv("TASKBONE_URL", fake.url)
        yield fake


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
        output = succeed("predict", "mood", "-", "--json", text="one\r\nt\u2028wo\nthree\n")
        assert server.asked[0][1] == {"inputs": ["one", "t\u2028wo", "three"]}
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
        assert "wants a key: give --token or set TASKBONE_TOKEN" in fail("predict", "mood", "x")

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
