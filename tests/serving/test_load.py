"""The client of load tests: what it sends, and what it makes of any answer; its figures."""

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import load
from serving.load import LOST, Client, Outcome, Question, Server, as_bytes, at_rate, closed
from serving.load_results import Tally, figures, histogram, percentile
from serving.questions import as_input, made_up_sentences, questions

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\ncontent-length: 4\r\n\r\nbusy"


@contextmanager
def answering(answer: Callable[[int], bytes]) -> Iterator[tuple[Server, list[int]]]:
    """A server that gives to its n-th request what `answer` makes of n; empty: it hangs up.

    The list has the number of the connection of each request.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    connections: list[int] = []
    lock = threading.Lock()

    def serve(number: int, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as received:
            while head := received.readline():
                length = 0
                while (line := received.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                received.read(length)
                assert head.startswith(b"POST ")
                with lock:
                    connections.append(number)
                    reply = answer(len(connections) - 1)
                if not reply:
                    return
                connection.sendall(reply)
                if b"connection: close" in reply.lower():
                    return

    def accept() -> None:
        for number in itertools.count():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(number, connection), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield Server(listener.getsockname()[1]), connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def sent(server: Server, count: int) -> list[Outcome]:
    """So many requests, one after another."""

    async def send() -> list[Outcome]:
        client = Client(server)
        request = as_bytes(server, Question("/p", "{}"))
        found = [await client.send(request, time.perf_counter()) for _ in range(count)]
        client.close()
        await asyncio.sleep(0.01)
        return found

    return asyncio.run(send())


def run_load(server: Server, loop: str, number: float, seconds: float) -> list[Outcome]:
    async def run() -> list[Outcome]:
        client, seen = Client(server), list[Outcome]()
        requests = itertools.cycle([as_bytes(server, Question("/p", "{}"))])
        if loop == "open":
            await at_rate(client, requests, number, seconds, seen.append)
        else:
            await closed(client, requests, int(number), seconds, seen.append)
        client.close()
        await asyncio.sleep(0.01)
        return seen

    return asyncio.run(run())


class TestServer:
    def test_of_a_url(self) -> None:
        assert Server.of("http://127.0.0.1:8000", "t") == Server(8000, "t")
        there = Server.of("https://models.example.org/prefix/", "")
        assert there == Server(443, "", "models.example.org", True, "/prefix")
        assert Server.of("http://[::1]", "").host == "::1"

    def test_a_request_as_bytes(self) -> None:
        server = Server(80, "t", "::1", prefix="/here")
        head, body = as_bytes(server, Question("/p", '{"inputs": "ü"}')).decode().split("\r\n\r\n")
        assert head.startswith("POST /here/p HTTP/1.1\r\n")
        assert "host: [::1]:80" in head
        assert "authorization: Bearer t" in head
        assert f"content-length: {len(body.encode())}" in head


class TestClient:
    def test_a_connection_is_kept_and_every_answer_told_apart(self) -> None:
        with answering(lambda number: BUSY if number % 2 else GOOD) as (server, connections):
            found = sent(server, 4)
        assert [one.status for one in found] == [200, 503, 200, 503]
        assert [one.retry_after for one in found] == [None, 7, None, 7]
        assert [one.body for one in found] == [b"{}", b"", b"{}", b""]
        assert connections == [0, 0, 0, 0]

    @pytest.mark.parametrize(
        "answer",
        [b"", b"HTTP/1.1 200 OK\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"],
    )
    def test_a_connection_that_gives_no_whole_answer_is_lost(self, answer: bytes) -> None:
        """It hangs up, does not say how much comes, or says more than comes and hangs up."""

        def replies(number: int) -> bytes:
            closing = answer.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            return closing if number == 0 else GOOD

        with answering(replies) as (server, connections):
            found = sent(server, 2)
        assert [one.status for one in found] == [LOST, 200]
        assert connections == [0, 1]

    def test_a_connection_that_the_server_ends_is_not_used_again(self) -> None:
        last = GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        with answering(lambda _: last) as (server, connections):
            assert [one.status for one in sent(server, 3)] == [200] * 3
        assert connections == [0, 1, 2]

    def test_nobody_is_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        assert [one.status for one in sent(Server(port), 2)] == [LOST, LOST]
        lost = run_load(Server(port), "closed", 1, 0.2)
        assert 1 <= len(lost) <= 5  # and not as fast as it can


class TestLoops:
    def test_a_closed_loop_has_so_many_under_way(self) -> None:
        with answering(lambda _: GOOD) as (server, connections):
            found = run_load(server, "closed", 3, 0.2)
        assert set(connections) == {0, 1, 2}
        assert {one.status for one in found} == {200}
        assert len(found) == len(connections)

    def test_an_open_loop_sends_what_is_due(self) -> None:
        with answering(lambda number: BUSY if number % 2 else GOOD) as (server, connections):
            found = run_load(server, "open", 50, 0.4)
        assert len(found) == len(connections) == 20
        assert sorted(one.status for one in found) == [200] * 10 + [503] * 10
        due = sorted(one.due for one in found)
        gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
        assert gaps == pytest.approx([0.02] * 19)

    def test_waiting_for_a_slow_server_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One connection, and an answer every 40 ms, at 50 requests a second: they queue up."""
        monkeypatch.setattr(load, "most_connections", lambda: 1)

        def slowly(_: int) -> bytes:
            time.sleep(0.04)
            return GOOD

        with answering(slowly) as (server, connections):
            found = run_load(server, "open", 50, 0.4)
        assert set(connections) == {0}
        latencies = sorted(one.latency_s for one in found)
        assert latencies[0] >= 0.04
        assert latencies[-1] >= 20 * 0.04 - 0.4


class TestQuestions:
    def test_every_task_is_asked_even_with_one_text(self) -> None:
        asked = questions(["one text"], {"a": False, "b": True, "c/d": False}, 1)
        assert [one.path for one in asked] == [
            *("/v1/tasks/a/predict", "/v1/tasks/b/predict", "/v1/tasks/c%2Fd/predict")
        ]
        assert [one.body for one in asked][:2] == [
            *('{"inputs": ["one text"]}', '{"inputs": [["one", "text"]]}')
        ]

    def test_a_text_is_made_fit_for_its_task(self) -> None:
        assert as_input("one two", False) == "one two"
        assert as_input(("one", "two"), True) == ("one", "two")
        assert as_input(("one", "two"), False) == "one two"

    def test_made_up_sentences_are_always_the_same(self) -> None:
        assert made_up_sentences() == made_up_sentences()


def outcome(due: float, ended: float, status: int = 200, body: bytes = b"{}") -> Outcome:
    return Outcome(due, ended, status, None, body)


class TestFigures:
    def test_what_was_answered_and_what_was_not(self) -> None:
        tally = Tally(until=10.0)
        timings = (
            b'"timings_ms": {"tokenize_ms": 0.5, "queue_ms": 1e1, "forward_ms":2, "total_ms": 13}'
        )
        body = b'{"task": "x", "predictions": [{"label": "\\"queue_ms\\": 9"}], ' + timings + b"}"
        for number in range(4):
            tally.add(outcome(number, number + 0.001 * (number + 1), body=body))
        tally.add(outcome(9.0, 11.0, body=body))  # came too late to count for the throughput
        tally.add(outcome(1.0, 1.1, 503))
        tally.add(outcome(1.0, 1.1, LOST))
        found = figures(tally, connections=4, rate=None, seconds=10.0, inputs=8)
        assert (found.requests_per_s, found.sentences_per_s) == (0.4, 3.2)
        assert (found.statuses, found.lost, found.answered) == ({"200": 5, "503": 1}, 1, 5)
        assert found.latency_ms == pytest.approx(
            {"mean": 402, "p50": 3, "p95": 2000, "p99": 2000, "max": 2000}
        )
        assert found.server_ms == {"tokenize": 0.5, "queue": 10.0, "forward": 2.0, "total": 13.0}
        assert sum(bucket.count for bucket in found.histogram) == 5

    def test_nothing_was_answered(self) -> None:
        found = figures(Tally(), connections=None, rate=5.0, seconds=1.0, inputs=1)
        assert (found.latency_ms, found.server_ms, found.histogram) == (None, None, ())

    def test_a_percentile_is_a_value_that_was_measured(self) -> None:
        ordered = [float(number) for number in range(1, 101)]
        assert [percentile(ordered, share) for share in (50, 95, 99)] == [50, 95, 99]
        assert percentile([7.0], 99) == 7.0

    @given(st.lists(st.floats(0, 1e6), min_size=1))
    def test_every_latency_is_in_one_bucket(self, values: list[float]) -> None:
        ordered = sorted(values)
        buckets = histogram(ordered)
        assert sum(bucket.count for bucket in buckets) == len(values)
        assert buckets[0].count
        assert buckets[-1].count
        assert buckets[0].from_ms <= ordered[0]
        assert ordered[-1] < buckets[-1].to_ms
        for bucket, later in itertools.pairwise(buckets):
            assert bucket.to_ms == later.from_ms
