"""`taskbone bench` against a made-up server: what it asks, and how it shows what came."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from model_store.store import Store
from serving.commands.bench_view import BAR, bars
from serving.load_results import Bucket
from tests.cli.fake_server import FakeServer, error, fake_server
from tests.cli.running import fail, run, succeed
from tests.cli.terminal import in_terminal
from tests.waiting import wait_until

TIMES = {"tokenize_ms": 0.25, "queue_ms": 0.5, "forward_ms": 1.0, "total_ms": 2.0}
TASKS = {"tasks": [{"task": "mood", "takes_pairs": False}, {"task": "same", "takes_pairs": True}]}


class Answering:
    """Two tasks; of each `refuse_every` requests one is refused."""

    def __init__(self) -> None:
        self.refuse_every = 0
        self._count = 0
        self._lock = threading.Lock()

    def __call__(self, path: str, body: Any) -> tuple[int, bytes]:
        if path == "/v1/tasks":
            return 200, json.dumps(TASKS).encode()
        with self._lock:
            self._count += 1
            refused = self.refuse_every and self._count % self.refuse_every == 0
        if refused:
            return error(503, "overloaded", "the queue is full")
        return 200, json.dumps({"predictions": [], "timings_ms": TIMES}).encode()


@pytest.fixture
def answering() -> Answering:
    return Answering()


@pytest.fixture
def server(
    store: Store, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeServer]:
    with fake_server(answering) as fake:
        monkeypatch.setenv("TASKBONE_URL", fake.url)
        yield fake


def asked(server: FakeServer) -> list[tuple[str, Any]]:
    return [(path, body["inputs"]) for path, body, _ in server.asked if body is not None]


class TestWhatIsAsked:
    def test_texts_in_turn(self, server: FakeServer) -> None:
        succeed("bench", "mood", "one", "two words", "--connections", "1", "--seconds", "0.1")
        found = asked(server)
        # The first one is asked before, and not counted.
        assert [inputs for _, inputs in found[:4]] == [["one"], ["one"], ["two words"], ["one"]]
        assert {path for path, _ in found} == {"/v1/tasks/mood/predict"}

    def test_lines_of_a_file_as_pairs(self, server: FakeServer, tmp_path: Path) -> None:
        file = tmp_path / "texts"
        file.write_text("he left\the went\none two\n")
        options = ("--inputs", "2", "--connections", "1", "--seconds", "0.1")
        succeed("bench", "same", "--file", file, *options)
        assert asked(server)[1][1] == [["he left", "he went"], ["one", "two"]]

    def test_the_standard_input(self, server: FakeServer) -> None:
        options = ("--connections", "1", "--seconds", "0.1")
        succeed("bench", "mood", "--file", "-", *options, text="from there\n")
        assert asked(server)[0][1] == ["from there"]

    def test_all_tasks_in_turn_with_made_up_sentences(self, server: FakeServer) -> None:
        output = succeed("bench", "--all", "--connections", "2", "--seconds", "0.1", "--json")
        assert json.loads(output)["tasks"] == ["mood", "same"]
        found = Counter(path for path, _ in asked(server))
        assert abs(found["/v1/tasks/mood/predict"] - found["/v1/tasks/same/predict"]) <= 2

    def test_the_stores_token_is_shown(self, server: FakeServer, store: Store) -> None:
        store.root.mkdir()
        (store.root / "token").write_text("from-the-store-1234\n")
        succeed("bench", "mood", "--connections", "1", "--seconds", "0.1")
        assert {token for _, _, token in server.asked} == {"Bearer from-the-store-1234"}


class TestWhatIsShown:
    def test_json(self, server: FakeServer, answering: Answering) -> None:
        answering.refuse_every = 4
        options = ("--connections", "1,3", "--seconds", "0.3", "--inputs", "2")
        found = json.loads(succeed("bench", "mood", *options, "--json"))
        one, three = found["loads"]
        assert (found["url"], found["tasks"]) == (server.url, ["mood"])
        assert (one["connections"], three["connections"], one["rate"]) == (1, 3, None)
        for load in (one, three):
            statuses = load["statuses"]
            assert statuses.keys() == {"200", "503"}
            assert statuses["200"] / (statuses["200"] + statuses["503"]) == pytest.approx(
                0.75, abs=0.1
            )
            assert load["sentences_per_s"] == pytest.approx(2 * load["requests_per_s"])
            assert load["requests_per_s"] <= statuses["200"] / 0.3 + 1e-6
            latency = load["latency_ms"]
            assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] <= latency["max"]
            assert load["server_ms"] == {"tokenize": 0.25, "queue": 0.5, "forward": 1, "total": 2}
            assert sum(bucket["count"] for bucket in load["histogram"]) == statuses["200"]

    def test_for_people(self, server: FakeServer, answering: Answering) -> None:
        answering.refuse_every = 4
        output = succeed("bench", "mood", "--connections", "1,2", "--seconds", "0.2")
        for part in (
            "1 connection, 0.2 s",
            "2 connections, 0.2 s",
            "refused (503)",
            "= 0.25 tokenize + 0.50 queue + 1.0 forward + ",
            "\u2588" * BAR,
            "All loads",
        ):
            assert part in output

    def test_a_rate(self, server: FakeServer) -> None:
        (load,) = json.loads(
            succeed("bench", "mood", "--rate", "50", "--seconds", "0.4", "--json")
        )["loads"]
        assert (load["rate"], load["connections"]) == (50.0, None)
        assert load["statuses"] == {"200": 20}

    def test_nothing_is_answered(self, server: FakeServer, answering: Answering) -> None:
        answering.refuse_every = 1
        output = succeed("bench", "mood", "--connections", "1", "--seconds", "0.1")
        assert "0.0 requests/s" in output
        assert "0 answered" in output

    def test_a_progress_bar_on_a_terminal(self, server: FakeServer) -> None:
        command = ["bench", "mood", "--connections", "3", "--seconds", "0.5", "--url", server.url]
        with in_terminal(command) as terminal:
            terminal.wait_for("\u2501")
            terminal.wait_for("answered")
            terminal.wait_for("\u2588 ")
        # The bar is gone, and what is shown begins on a line of its own.
        lines = terminal.text.rpartition("\u2501")[2].splitlines()[1:]
        assert lines[0] == "3 connections, 0.5 s"
        assert max(map(len, lines)) <= 80

    def test_ctrl_c_ends_it(self, server: FakeServer) -> None:
        with in_terminal(["bench", "mood", "--seconds", "60", "--url", server.url]) as terminal:
            terminal.wait_for("1 connection")
            wait_until(lambda: len(asked(server)) > 2)  # the load has begun
            assert terminal.interrupt() == 130
        assert "Interrupted." in terminal.text
        assert "Traceback" not in terminal.text


class TestBars:
    def test_the_longest_fills_the_width_and_the_least_is_seen(self) -> None:
        lines = bars([Bucket(0.7, 1.0, 1000), Bucket(1.0, 1.5, 1), Bucket(1.5, 2000.0, 0)])
        assert lines[0] == f"0.7 -     1 ms  {BAR * chr(0x2588)}  1,000   99.9%"
        assert lines[1] == f"  1 -   1.5 ms  {chr(0x258F):<{BAR}}      1    0.1%"
        assert lines[2].endswith("      0    0.0%")
        assert len({len(line) for line in lines}) == 1

    def test_empty_ones_in_a_row_take_two_lines(self) -> None:
        edges = [1.0, 2.0, 3.0, 5.0, 7.0, 10.0]
        counts = (4, 0, 0, 0, 1)
        lines = bars(
            [Bucket(*bounds, count) for bounds, count in zip(pairwise(edges), counts, strict=True)]
        )
        assert [line.split()[0] for line in lines] == ["1", "2", "...", "7"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "name the TASK"),
            (["mood", "--all"], "leave TASK and TEXT out"),
            (["mood", "text", "--file", "x"], "leave TEXT out"),
            (["mood", "--rate", "5", "--connections", "1"], "leave out one of both"),
            (["mood", "--connections", "0"], "expected numbers from 1 to"),
            (["mood", "--connections", "1,x"], "expected numbers from 1 to"),
            (["mood", "--rate", "0"], "0"),
        ],
    )
    def test_what_does_not_go_together(
        self, server: FakeServer, arguments: list[str], message: str
    ) -> None:
        result = run("bench", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
        assert server.asked == []

    def test_a_server_elsewhere_only_with_yes(self, store: Store) -> None:
        there = ("bench", "mood", "--url", "http://models.example.invalid")
        result = run(*there)
        assert result.exit_code == 2
        assert "is not on this machine" in result.stderr
        assert "models.example.invalid" in fail(*there, "--yes")  # there is no such machine

    def test_an_unknown_task(self, server: FakeServer) -> None:
        assert fail("bench", "mod") == "the server has no task 'mod'; it has: mood, same"

    def test_what_would_never_be_answered_is_said_before(
        self, server: FakeServer, answering: Answering
    ) -> None:
        server.answer = lambda path, body: (
            answering(path, body)
            if path == "/v1/tasks"
            else error(413, "too_large", "at most 64 inputs")
        )
        message = fail("bench", "mood", "--inputs", "65")
        assert message == "at most 64 inputs (HTTP status 413)"
        assert len(asked(server)) == 1

    def test_nobody(self, store: Store) -> None:
        assert "no server answers at" in fail("bench", "mood", "--url", "http://127.0.0.1:1")

    def test_an_unreadable_file(self, server: FakeServer) -> None:
        assert fail("bench", "mood", "--file", "/nowhere").startswith("/nowhere: cannot be read")
