"""The server benchmarks: their requests, their clients against a small server, their reports."""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import overload, server_infinity, server_load
from benchmarks.overload import Run
from benchmarks.server_engine import Loop
from benchmarks.server_load import Load, measure, median
from benchmarks.server_ratio import report
from benchmarks.server_works import Shape, sentences
from model_store.tokenization import Encoding
from serving.engine import EngineAnswer, Servable
from serving.load import Outcome, Question, Server
from serving.questions import questions

TOKEN = "a-token-for-the-tests"
PAIRS = {"one": False, "two": True}


class SmallServer(ThreadingHTTPServer):
    """Answers every POST, with 503 where the body says so; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, Message, Any]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has seen enough hangs up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SmallServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, self.headers, body))
        self.send_response(503 if "busy" in str(body) else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        pass


@pytest.fixture
def small() -> Iterator[SmallServer]:
    with SmallServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["wrk", "python"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "wrk" and not shutil.which("wrk"):
        pytest.skip("wrk is not installed")
    monkeypatch.setattr(server_load, "client", lambda: name)
    return name


def test_a_shape_is_read_and_shown() -> None:
    assert Shape.parse("64") == Shape(inputs=1, connections=64)
    assert Shape.parse("8x32") == Shape(inputs=32, connections=8)
    assert str(Shape.parse("8x32")) == "8x32"


def test_every_sentence_is_asked_tasks_in_turn() -> None:
    texts = [f"w{number} x" for number in range(7)]
    asked = questions(texts, PAIRS, 2)
    inputs = [json.loads(one.body)["inputs"] for one in asked]
    assert [one.path.split("/")[3] for one in asked] == ["one", "two", "one", "two"]
    assert inputs[0] == ["w0 x", "w1 x"]
    assert inputs[1] == [["w2", "x"], ["w3", "x"]]
    assert inputs[3] == [["w6", "x"], ["w0", "x"]]


def test_sentences_without_data_have_the_lengths_of_the_data() -> None:
    counts = [len(text.split()) for text in sentences(None)]
    assert 17 < np.mean(counts) < 23
    assert sentences(None) == sentences(None)


def test_sentences_are_those_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "test.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n')
    assert sentences(tmp_path) == ["good", "bad"]


def test_a_closed_loop_asks_as_it_is_told(small: SmallServer, client: str) -> None:
    asked = questions(["a “quoted” text", "ünd 100 %d\\n"], PAIRS, 1)
    load = measure(Server(small.server_port, TOKEN), asked, 2, 1.0)
    assert load.requests_per_s > 10
    assert 0 < load.p50_ms <= load.p99_ms
    path, headers, _ = small.asked[0]
    assert path in {one.path for one in asked}
    assert headers["authorization"] == f"Bearer {TOKEN}"
    assert headers["content-type"] == "application/json"
    expected = [json.loads(one.body) for one in asked]
    assert all(body in expected for _, _, body in small.asked)
    assert {str(body) for _, _, body in small.asked} == {str(body) for body in expected}


def test_a_refused_request_ends_the_measurement(small: SmallServer, client: str) -> None:
    with pytest.raises(SystemExit, match="failed"):
        measure(Server(small.server_port), [Question("/", '{"inputs": "busy"}')], 2, 1.0)


def test_the_median_is_taken_of_each_figure() -> None:
    found = median([Load(1, 30, 5), Load(3, 10, 6), Load(2, 20, 7)])
    assert found == Load(2, 20, 6)


class InstantEngine:
    """Answers at once, from a thread of its own as an engine does, and counts."""

    def __init__(self) -> None:
        self.waiting: list[Future[EngineAnswer]] = []
        self.most = self.submitted = 0
        self._more = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, servable: Servable, encodings: Sequence[Encoding]) -> "Future[EngineAnswer]":
        answer: Future[EngineAnswer] = Future()
        with self._more:
            self.submitted += 1
            self.waiting.append(answer)
            self.most = max(self.most, len(self.waiting))
            self._more.notify()
        return answer

    def _run(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self.waiting)
                answer = self.waiting.pop()
            answer.set_result(EngineAnswer(np.zeros((1, 2)), 0.0, 0.0))


def test_the_engine_alone_is_kept_busy_and_drained() -> None:
    engine = InstantEngine()
    request: Any = (None, [])
    rate = Loop(engine, [request]).run(at_once=3, seconds=0.2)  # type: ignore[arg-type]
    assert engine.most <= 3
    assert not engine.waiting
    assert 0 < rate <= engine.submitted / 0.2


def test_why_there_is_no_comparison_with_infinity(tmp_path: Path) -> None:
    assert "--infinity-python" in server_infinity.missing(None)
    assert "infinity_emb is missing" in server_infinity.missing(tmp_path / "python")
    (tmp_path / "infinity_emb").touch()
    assert server_infinity.missing(tmp_path / "python") == ""


def test_infinity_is_compared_at_its_best(capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow, bf16 = server_infinity.SETTINGS
    rows = {
        ("Taskbone", 1): Load(200, 4, 9),
        ("Taskbone", 64): Load(600, 90, 140),
        (fast, 1): Load(50, 20, 30),
        (slow, 1): Load(40, 25, 30),
        (bf16, 1): Load(25, 40, 50),
        (fast, 64): Load(100, 600, 700),
        (slow, 64): Load(90, 700, 900),
        (bf16, 64): Load(120, 500, 700),
    }
    found = server_infinity.report(rows, 11)
    assert (found["requests_ratio"], found["p50_ratio"]) == (5.0, 0.2)
    assert "5.0 times" in capsys.readouterr().out


def test_the_server_is_compared_with_its_engine_at_its_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {Shape(1, 64): Load(600, 90, 140), Shape(32, 8): Load(30, 250, 300)}
    found = report({(1, 64): 700.0, (2, 256): 1000.0}, rows)
    shares = {shape: row["share_of_engine"] for shape, row in found["server"].items()}
    assert shares == {"64x1": 0.6, "8x32": 0.96}
    assert "1,000 sentences/s (2 threads, 256 in flight)" in capsys.readouterr().out


def _outcome(due: float, took: float, status: int, forward_ms: float = 50.0) -> Outcome:
    body = json.dumps({"timings_ms": {"forward_ms": forward_ms}}).encode() if status == 200 else b""
    return Outcome(due, due + took, status, None if status == 200 else 1, body)


def test_what_is_said_of_an_overload() -> None:
    closed = [_outcome(second / 10, 0.1, 200) for second in range(100)]  # 10 a second
    during = [_outcome(20 + second / 10, 0.05, 200) for second in range(90)]
    during += [_outcome(20 + second / 10, 0.001, 503) for second in range(100)]
    run = Run(closed, during, closed, seconds=10.2, overload_s=10.0, client_s=0.5)
    found = overload.figures(run)
    # Of 8 s: while the queue fills, answers are not counted.
    assert found["goodput_share"] == pytest.approx(70 / 8 / (100 / 10.2), abs=0.001)
    assert found["statuses"] == {"200": 90, "503": 100}
    assert (found["lost"], found["refused_without_retry_after"]) == (0, 0)
    assert found["after_share"] == 1.0
    assert found["bound_ms"] == 2050.0


def test_a_closed_loop_that_is_refused_has_no_capacity() -> None:
    with pytest.raises(SystemExit, match="503"):
        overload.capacity_of([_outcome(0, 1, 200), _outcome(0, 1, 503)], 1.0)
