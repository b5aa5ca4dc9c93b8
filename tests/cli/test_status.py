"""`taskbone status` against a made-up server: what it reads, draws and says of every failure."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from model_store.store import Store
from tests.cli.fake_server import FakeServer, error, fake_server
from tests.cli.running import fail, run, succeed
from tests.cli.terminal import in_terminal

BOUNDS = [0.001, 0.01, 0.1]


class Counting:
    """The routes that the command asks, of a server that answers ten requests between two looks."""

    def __init__(self) -> None:
        self.looks = 0
        self.tasks: list[dict[str, Any]] = [
            {"task": "mood", "version": 4, "kept_share": 0.42, "takes_pairs": False}
            | {"canary": {"version": 5, "percent": 10.0}, "shadow": 6},
            {"task": "quiet", "version": 1, "kept_share": 1.0, "takes_pairs": False}
            | {"canary": None, "shadow": None},
        ]
        self.stats: dict[str, Any] = {}

    def __call__(self, path: str, body: Any) -> tuple[int, bytes]:
        if path == "/v1/tasks":
            return 200, json.dumps({"tasks": self.tasks}).encode()
        assert path == "/v1/stats"
        self.looks += 1
        return 200, json.dumps(self.counted() | self.stats).encode()

    def counted(self) -> dict[str, Any]:
        """Of each ten requests eight are good ones of 1 to 10 ms, two are refused."""
        good, refused = 8 * self.looks, 2 * self.looks

        def histogram(sum_s: float) -> dict[str, Any]:
            return {"counts": [0, good, 0, 0], "sum_s": sum_s * self.looks}

        mood = {
            "version": 4,
            "overlay_bytes": 70_000,
            "requests": {"200": good, "503": refused},
            "latency": histogram(0.04),
            "tokenize": histogram(0.004),
            "queue": histogram(0.008),
            "forward": histogram(0.024),
        }
        return {
            # Two looks in a thousandth of a second are a second apart here.
            "at": 1_764_492_000.0 + self.looks,
            **{"replicas": 3, "replicas_ready": 2, "queued_tokens": 1234},
            "memory_bytes": 412_000_000,
            "backbone": {"name": "minilm", "fingerprint": "ab" * 32, "bytes": 91_000_000},
            "plan_cache": {"bytes": 1000, "hit": 9 * self.looks, "miss": self.looks}
            | {"build": 0, "evict": 0},
            "rejected": {"overloaded": refused},
            "bounds_s": BOUNDS,
            "tasks": {"mood": mood},
        }


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def server(
    store: Store, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeServer]:
    with fake_server(counting) as fake:
        monkeypatch.setenv("TASKBONE_URL", fake.url)
        yield fake


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second between two looks of a command that runs in this process."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


class TestOnce:
    def test_json_says_all_of_two_looks(self, server: FakeServer) -> None:
        found = json.loads(succeed("status", "--json"))
        assert [path for path, _, _ in server.asked].count("/v1/stats") == 2
        assert (found["replicas"], found["replicas_ready"]) == (3, 2)
        assert (found["queued_tokens"], found["memory_bytes"]) == (1234, 412_000_000)
        assert (found["requests_per_s"], found["seconds"]) == (10.0, 1.0)
        assert found["rejected_per_s"] == {"overloaded": 2.0}
        assert found["plan_cache"] == {"bytes": 1000, "hit_share": 0.9}
        mood, quiet = found["tasks"]
        assert (mood["task"], mood["version"], mood["kept_share"]) == ("mood", 4, 0.42)
        assert (mood["canary"], mood["shadow"]) == ({"version": 5, "percent": 10.0}, 6)
        assert (mood["requests_per_s"], mood["error_share"]) == (10.0, 0.2)
        assert mood["statuses_per_s"] == {"200": 8.0, "503": 2.0}
        assert mood["latency_s"] == pytest.approx(
            {"mean": 0.005, "p50": 0.0055, "p95": 0.00955, "p99": 0.00991}
        )
        assert mood["time_shares"] == pytest.approx(
            {"tokenize": 0.1, "queue": 0.2, "forward": 0.6, "other": 0.1}
        )
        # A task that nobody has asked is there all the same.
        assert (quiet["task"], quiet["version"], quiet["requests_per_s"]) == ("quiet", 1, 0.0)
        assert quiet["latency_s"] == {"mean": None, "p50": None, "p95": None, "p99": None}

    def test_a_table_for_people(self, server: FakeServer) -> None:
        output = succeed("status")
        words = [line.split() for line in output.splitlines()]
        assert "2 of 3 replicas ready" in output
        assert "1,234 tokens waiting" in output
        assert "rejected: overloaded 2.0/s" in output
        mood = "mood 4 c5:10% s6 42% 10.0 5.5 9.5 9.9 20.0% tqqffffff\u00b7"
        assert mood.split() in words
        assert ["quiet", "1", "100%", "0.0", "-", "-", "-", "0"] in words

    def test_watching_json_is_a_line_for_each_look(
        self, server: FakeServer, counting: Counting
    ) -> None:
        def answer(path: str, body: Any) -> tuple[int, bytes]:
            if path == "/v1/stats" and counting.looks == 3:
                counting.looks += 1
                return 503, b"<html>the front door stands alone"
            if path == "/v1/stats" and counting.looks == 5:
                return error(401, "unauthorized", "revoked")
            return counting(path, body)

        server.answer = answer
        result = run("status", "--watch", "--json")
        assert result.exit_code == 1
        looks = [json.loads(line) for line in result.stdout.splitlines()]
        assert [look["seconds"] for look in looks] == [1.0, 2.0, 2.0, 4.0]
        failures = [look["failure"] for look in looks]
        assert [bool(failure) for failure in failures] == [False, False, True, False]
        assert "HTTP status 503" in failures[2]
        assert "wants a key" in result.stderr

    def test_a_replica_that_ends_takes_its_counts_along(
        self, server: FakeServer, counting: Counting
    ) -> None:
        """Then two looks say nothing, and another is needed."""

        def answer(path: str, body: Any) -> tuple[int, bytes]:
            if path == "/v1/stats" and counting.looks == 0:
                counting.looks = 50
                found = {**counting.counted(), "at": 1.0}  # long before the next
                counting.looks = 1
                return 200, json.dumps(found).encode()
            return counting(path, body)

        server.answer = answer
        found = json.loads(succeed("status", "--json"))
        assert (counting.looks, found["requests_per_s"]) == (3, 10.0)

    def test_figures_that_are_told_again_are_no_new_ones(
        self, server: FakeServer, counting: Counting
    ) -> None:
        """A replica works them out once a second, and another may have done so before."""
        moments = iter((1, 1, 0.5, 2.0))

        def answer(path: str, body: Any) -> tuple[int, bytes]:
            if path == "/v1/stats":
                counting.looks = 9
                counting.stats = {"at": next(moments)}
                if counting.stats["at"] == 2:
                    counting.looks = 10
                return 200, json.dumps(counting.counted() | counting.stats).encode()
            return counting(path, body)

        server.answer = answer
        found = json.loads(succeed("status", "--json"))
        assert (found["seconds"], found["requests_per_s"]) == (1.0, 10.0)

    def test_of_several_machines_the_first_is_watched(
        self, server: FakeServer, counting: Counting
    ) -> None:
        """A load balancer brings the answers of two in turn; their counts differ."""
        moments = iter(range(1, 9))

        def answer(path: str, body: Any) -> tuple[int, bytes]:
            if path == "/v1/stats":
                moment = next(moments)
                counting.looks = moment if moment % 2 else 1000 + moment
                counting.stats = {"at": moment, "node": "one" if moment % 2 else "two"}
                return 200, json.dumps(counting.counted() | counting.stats).encode()
            return counting(path, body)

        server.answer = answer
        found = json.loads(succeed("status", "--json"))
        assert (found["node"], found["seconds"], found["requests_per_s"]) == ("one", 2.0, 10.0)

    def test_a_machine_that_answers_no_longer_gives_way(
        self, server: FakeServer, counting: Counting
    ) -> None:
        moments = iter((1, 20, 21))

        def answer(path: str, body: Any) -> tuple[int, bytes]:
            if path == "/v1/stats":
                moment = next(moments)
                counting.looks = moment
                counting.stats = {"at": moment, "node": "one" if moment == 1 else "two"}
                return 200, json.dumps(counting.counted() | counting.stats).encode()
            return counting(path, body)

        server.answer = answer
        found = json.loads(succeed("status", "--json"))
        assert (found["node"], found["seconds"], found["requests_per_s"]) == ("two", 1.0, 10.0)

    def test_a_key_for_metrics_alone(self, server: FakeServer, counting: Counting) -> None:
        server.answer = lambda path, body: (
            error(403, "forbidden", "this route needs 'predict'")
            if path == "/v1/tasks"
            else counting(path, body)
        )
        (mood,) = json.loads(succeed("status", "--json"))["tasks"]
        assert (mood["version"], mood["kept_share"], mood["canary"]) == (4, None, None)

    def test_a_task_name_cannot_move_the_cursor(
        self, server: FakeServer, counting: Counting
    ) -> None:
        counting.tasks[1]["task"] = "red\x1b[31m"
        assert "\x1b" not in succeed("status")


class TestFailures:
    def test_a_key_without_the_scope(self, server: FakeServer) -> None:
        server.fails(403, "forbidden", "the key 'shop' has the scopes predict; needs 'metrics'")
        message = fail("status")
        assert "taskbone keys add NAME --scope metrics, and give it with --token" in message

    def test_no_key(self, server: FakeServer) -> None:
        server.fails(401, "unauthorized", "no token")
        assert "wants a key: give --token or set TASKBONE_TOKEN" in fail("status")

    def test_an_older_server(self, server: FakeServer) -> None:
        server.fails(404, "not_found", "no such route")
        assert "is an older Taskbone than this command" in fail("status", "--json")

    def test_a_server_that_counts_otherwise(self, server: FakeServer, counting: Counting) -> None:
        counting.stats = {"bounds_s": [1.0]}
        assert "counts in another way" in fail("status")

    def test_what_is_no_server(self, server: FakeServer) -> None:
        server.answer = lambda *_: (200, b"<html>")
        assert "is no Taskbone server" in fail("status")

    def test_nobody(self, server: FakeServer) -> None:
        assert "no server answers at" in fail("status", "--url", "http://127.0.0.1:1")


class TestOnATerminal:
    def test_it_goes_on_until_ctrl_c(self, server: FakeServer, counting: Counting) -> None:
        with in_terminal(["status", "--interval", "0.1"]) as terminal:
            terminal.wait_for("2 of 3 replicas ready", times=3)
            assert terminal.interrupt() == 0
        assert counting.looks >= 4
        before, _, after = terminal.raw.partition("\x1b[?1049l")  # back from its own screen
        assert "\x1b[?1049h" in before
        assert "mood" in after
        assert "Traceback" not in terminal.text
        assert "Interrupted" not in terminal.text

    def test_every_line_fits_eighty_columns(self, server: FakeServer, counting: Counting) -> None:
        counting.tasks[1]["task"] = "a" * 60
        with in_terminal(["status", "--once"]) as terminal:
            terminal.wait_for("where the time goes")
        lines = terminal.text.splitlines()
        assert max(map(len, lines)) <= 80
        assert any("aa\u2026" in line for line in lines)
        assert any(line.startswith("mood") and "tqqffffff" in line for line in lines)

    def test_what_does_not_fit_is_counted(self, server: FakeServer, counting: Counting) -> None:
        counting.tasks += [
            {**counting.tasks[1], "task": f"task{number:02}"} for number in range(40)
        ]
        with in_terminal(["status", "--interval", "0.1"], lines=20) as terminal:
            terminal.wait_for("more tasks with fewer requests", times=2)
            terminal.interrupt()
        screen = terminal.text.split("over 1 s")[0].splitlines()
        assert len(screen) <= 20

    def test_a_server_that_goes_away_is_asked_again(
        self, server: FakeServer, counting: Counting
    ) -> None:
        def answer(path: str, body: Any) -> tuple[int, bytes]:
            if counting.looks in (3, 4):
                counting.looks += 1
                raise ConnectionAbortedError
            return counting(path, body)

        server.answer = answer
        server.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        with in_terminal(["status", "--interval", "0.1"]) as terminal:
            terminal.wait_for("asking again")
            shown = terminal.text.count("2 of 3 replicas ready")
            terminal.wait_for("2 of 3 replicas ready", times=shown + 3)
            terminal.interrupt()
        assert "asking again" not in terminal.text.rpartition("2 of 3 replicas ready")[2]
