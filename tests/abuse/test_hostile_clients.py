"""Clients that are slow, broken or hostile: each gets a clear answer, and nobody else notices.

The real Ray Serve and HAProxy around the fake service; a well-behaved client asks all the time.
Long form: 3,000 idle connections instead of 500, and more of everything that is repeated.
"""

import http.client
import json
import resource
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.abuse.witness import Witness, witness
from tests.running import ADMIN_TOKEN, TOKEN, Server, running
from tests.serving.test_deployment import fake_server
from tests.soak import report, soak

CLOSED = 0
"""Instead of a status: the connection was closed without an answer."""

IDLE = 3_000 if soak() else 500
TIMES = 500 if soak() else 50

GOOD = b'{"inputs": "abc"}'
HEAD = b"Host: here\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
PREDICT = b"POST /v1/tasks/parity/predict HTTP/1.1\r\n" + HEAD
CHUNKED = PREDICT + b"Transfer-Encoding: chunked\r\n"
CHUNK = b"11\r\n" + GOOD + b"\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas that wait 2 s for a body; at the end they are still the same, and sound."""
    folder = tmp_path_factory.mktemp("server")
    command = [str(part) for part in fake_server(folder, "impatient")]
    with running(command, int(command[3]), folder / "log") as started:
        before = {one.pid for one in started.replicas()}
        yield started
        assert {one.pid for one in started.replicas()} == before
        assert "Traceback" not in started.output


@pytest.fixture(autouse=True)
def undisturbed(server: Server) -> Iterator[Witness]:
    """Somebody else's requests go on all the time, and fail the test where one goes wrong."""
    with witness(server) as seen:
        yield seen


def connect(server: Server) -> socket.socket:
    """A bare connection."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer, or `CLOSED`."""
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
        return answer.status, answer.read()
    except (http.client.HTTPException, OSError):
        return CLOSED, b""


def ask(server: Server, raw: bytes, *, half_close: bool = False) -> tuple[int, bytes]:
    """Send bytes, and perhaps that no more will come; what is answered."""
    with connect(server) as connection:
        try:
            connection.sendall(raw)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # answered and closed before everything was sent
        return read_answer(connection)


def with_length(length: bytes, body: bytes = GOOD) -> bytes:
    """A predict request that says this of its length."""
    return PREDICT + b"Content-Length: " + length + b"\r\n\r\n" + body


def with_body(body: bytes) -> bytes:
    """A predict request with the right length."""
    return with_length(str(len(body)).encode(), body)


# --- what is no request ---------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, set[int]]] = {
    "noise": (b"\x00\x01\x02\x03\xff\r\n\r\n", {400}),
    "a TLS handshake": (bytes.fromhex("16030100a5010000a10303") + bytes(160), {400}),
    "HTTP/0.9": (b"GET /health/live\r\n", {400}),
    "no end of a line": (b"A" * 100_000, {400}),
    "a lower-case method": (b"post" + with_body(GOOD)[4:], {400}),
    "an unknown method": (b"EVIL / HTTP/1.1\r\n" + HEAD + b"\r\n", {400, 404, 405}),
    "CONNECT": (b"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\n", {400}),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\n" + HEAD + b"\r\n", {400}),
    "another host's address": (b"GET http://other/ HTTP/1.1\r\n" + HEAD + b"\r\n", {400}),
    "bytes in a path": (b"GET /v1/tasks/\xff\xfe HTTP/1.1\r\n" + HEAD + b"\r\n", {400}),
    "a path upwards": (b"GET /v1/tasks/%2e%2e/%2e%2e/token HTTP/1.1\r\n" + HEAD + b"\r\n", {404}),
    "a path of 100 kB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HEAD + b"\r\n", {400}),
    "a header of 100 kB": (PREDICT + b"X: " + b"a" * 100_000 + b"\r\n\r\n", {400}),
    "1,000 headers": (PREDICT + b"X: a\r\n" * 1_000 + b"\r\n", {400}),
    "a zero byte in a header": (PREDICT + b"X: a\0b\r\n\r\n", {400}),
    "a space before a colon": (PREDICT + b"X : a\r\n\r\n", {400}),
    "two lengths": (with_length(b"17\r\nContent-Length: 3"), {400}),
    "two lengths in one": (with_length(b"17, 3"), {400}),
    "a negative length": (with_length(b"-1"), {400}),
    "a signed length": (with_length(b"+17"), {400}),
    "a word for a length": (with_length(b"many"), {400}),
    "no digits for a length": (with_length(b""), {400}),
    "a length of 10^23": (with_length(b"1" + b"0" * 23), {400}),
    "a length of 10 GB": (with_length(b"10000000000"), {413}),
    "a length that is short": (with_length(b"5"), {422}),
    "no length": (PREDICT + b"\r\n", {422}),
    "an unknown coding": (PREDICT + b"Transfer-Encoding: gzip\r\n\r\n" + CHUNK, {400, 422}),
    "a coding that is none": (PREDICT + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNK, {400}),
    "a chunk without a size": (CHUNKED + b"\r\nzz\r\nabc\r\n0\r\n\r\n", {400, CLOSED}),
    "a chunk of 2^72 bytes": (CHUNKED + b"\r\nffffffffffffffffff\r\nabc\r\n", {400, CLOSED}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_request_is_refused(server: Server, name: str) -> None:
    raw, expected = BROKEN[name]
    status, _ = ask(server, raw)
    assert status in expected


def test_a_length_and_chunks_together_smuggle_nothing(server: Server) -> None:
    """One answer, to what the chunks say; whatever comes behind it is not taken for a request."""
    hidden = b"GET /v1/tasks HTTP/1.1\r\n" + HEAD + b"\r\n"
    length = str(len(CHUNK + hidden)).encode()
    for lying in (b"3", length, b"17"):
        with connect(server) as connection:
            connection.sendall(CHUNKED + b"Content-Length: " + lying + b"\r\n\r\n" + CHUNK + hidden)
            found = b""
            while part := connection.recv(65536):
                found += part
        assert found.count(b"HTTP/1.1") == 1
        assert found.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


def test_refused_requests_one_after_another_mark_no_replica_as_down(server: Server) -> None:
    for _ in range(TIMES):
        assert ask(server, BROKEN["a lower-case method"][0])[0] == 400
        assert ask(server, b"POST /v1/tasks/parity/predict HTTP/1.0\r\n\r\n")[0] == 401


# --- bodies ---------------------------------------------------------------------------------------

MB = 1_000_000
BODIES: dict[str, tuple[bytes, int, str]] = {
    "bad UTF-8": (b'{"inputs": "\xff\xfe"}', 422, "UTF-8"),
    "half a letter": (b'{"inputs": "\xc3"}', 422, "UTF-8"),
    "half a pair of surrogates": (b'{"inputs": "\\ud800"}', 422, "UTF-8"),
    "UTF-16": ('{"inputs": "a"}'.encode("utf-16"), 422, "UTF-8"),
    "a zero byte": (b'{"inputs": "a"}\0', 422, "JSON"),
    "nothing": (b"", 422, "JSON"),
    "half": (GOOD[:8], 422, "JSON"),
    "two documents": (GOOD * 2, 422, "JSON"),
    "a text of 2.2 MB": (b'{"inputs": "' + b"a" * 2_200_000 + b'"}', 413, "at most 2097152"),
    "10^6 empty inputs": (b'{"inputs": [' + b'"",' * MB + b'""]}', 413, "at most 2097152"),
    "600,000 empty inputs": (b'{"inputs": [' + b'"",' * 600_000 + b'""]}', 413, "inputs: 600001"),
    "600,000 empty lists": (b'{"inputs": [' + b"[]," * 600_000 + b"[]]}", 422, "inputs.0 is an"),
    "no inputs": (b'{"inputs": []}', 422, "inputs is an empty list"),
    "a deep list": (b'{"inputs": ' + b"[" * MB + b"]" * MB + b"}", 422, "recursion limit"),
    "a deep object": (b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000, 422, "recursion limit"),
    "brackets that never close": (b"[" * 2 * MB, 422, "recursion limit"),
    "150,000 keys": (
        b"{" + b",".join(b'"%x":0' % number for number in range(150_000)) + b"}",
        422,
        "expected {",
    ),
    "a key that stands twice": (b'{"inputs": 1, "inputs": 2}', 422, "inputs is a number"),
    "a key of 2 MB": (b'{"' + b"k" * (2 * MB) + b'": 0}', 422, "expected {"),
    "a number of a million digits": (b'{"inputs": ' + b"9" * MB + b"}", 422, "number"),
    "NaN": (b'{"inputs": NaN}', 422, "JSON"),
    "comments": (b'{/* */"inputs": "a"}', 422, "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_answered_with_what_is_wrong(server: Server, name: str) -> None:
    body, expected, word = BODIES[name]
    status, answer = ask(server, with_body(body))
    assert status == expected
    error = json.loads(answer)["error"]
    assert word in error["message"]
    assert len(error["message"]) < 500
    assert error["request_id"]


@pytest.mark.parametrize("size", [0, 1, 8, 1000, 17 * MB])
def test_an_upload_that_is_no_artifact_is_refused(server: Server, size: int) -> None:
    """Without a key that may upload, and with one."""
    path = "/v1/tasks/new/versions"
    assert server.ask("POST", path, content=bytes(size)).status_code == 403
    if size > 16 * MB:
        headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
        assert server.ask("POST", path, content=bytes(size), headers=headers).status_code == 413


# --- clients that are slow or leave ---------------------------------------------------------------


def drip(server: Server, first: bytes, piece: bytes, every_s: float) -> tuple[int, bytes]:
    """Send a first part, then pieces from time to time, until something comes back."""
    with connect(server) as connection:
        connection.sendall(first)
        while True:
            connection.settimeout(every_s)
            try:
                connection.recv(1, socket.MSG_PEEK)
            except TimeoutError:
                try:
                    connection.sendall(piece)
                except OSError:
                    return CLOSED, b""
                continue
            except OSError:
                return CLOSED, b""
            connection.settimeout(60)
            return read_answer(connection)


SLOW: dict[str, tuple[bytes, bytes, int]] = {
    "nothing": (b"", b"", CLOSED),
    "one letter": (b"P", b"", 408),
    "a head that stops": (PREDICT, b"", 408),
    "a head by letters": (PREDICT + b"X: ", b"x", 408),
    "a head by headers": (PREDICT, b"X: x\r\n", 408),
    "a body that stops": (with_length(b"5000", b"abc"), b"", 408),
    "a body by letters": (with_length(b"5000", b"abc"), b"a", 408),
    "a body by chunks": (CHUNKED + b"\r\n", b"1\r\na\r\n", 408),
    "a chunk that stops": (CHUNKED + b"\r\n11\r\nabc", b"", 408),
    "a size by letters": (CHUNKED + b"\r\n", b"0", 408),
}


def test_who_is_too_slow_is_told_so_and_holds_nobody_up(
    server: Server, undisturbed: Witness
) -> None:
    """All at once, each many times."""
    before = undisturbed.right
    with ThreadPoolExecutor(len(SLOW) * 5) as threads:
        found = {
            name: [threads.submit(drip, server, first, piece, 0.2) for _ in range(5)]
            for name, (first, piece, _) in SLOW.items()
        }
        came = {name: {one.result()[0] for one in asked} for name, asked in found.items()}
    assert came == {name: {expected} for name, (_, _, expected) in SLOW.items()}
    assert undisturbed.right > before + 50


def test_idle_connections_take_nobodys_place(server: Server, undisturbed: Witness) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    replicas = server.replicas()
    with ExitStack() as opened:
        half = [opened.enter_context(connect(server)) for _ in range(IDLE)]
        for number, connection in enumerate(half):
            connection.sendall([b"", b"POST", PREDICT, with_length(b"99", b"{")][number % 4])
        before = undisturbed.right
        assert ask(server, with_body(GOOD))[0] == 200
        while undisturbed.right < before + 20:
            assert not undisturbed.ending.wait(0.01)
        assert undisturbed.wrong == []
    assert server.replicas() == replicas
    report(f"{IDLE:,} idle connections", f"{undisturbed.right - before} others answered meanwhile")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", {CLOSED, 400}),
        (b"POST", {400}),
        (PREDICT, {400}),
        (with_length(b"99", b"{"), {CLOSED, 400}),
        (CHUNKED + b"\r\n11\r\nabc", {CLOSED, 400}),
        # HAProxy cannot tell a client that has said everything from one that has gone.
        (with_body(GOOD), {200, 400}),
        (with_body(b'{"inputs": "wait"}'), {400, CLOSED}),
    ],
)  # fmt: skip
def test_a_client_that_closes_its_side(server: Server, raw: bytes, expected: set[int]) -> None:
    assert ask(server, raw, half_close=True)[0] in expected


@pytest.mark.parametrize("raw", [b"", b"POST", PREDICT, with_length(b"99"), with_body(GOOD)])
def test_clients_that_vanish_leave_nothing_open(server: Server, raw: bytes) -> None:
    for _ in range(TIMES):
        connection = connect(server)
        connection.sendall(raw)
        # Closing then sends a reset, as of a machine that was switched off.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    (proxy,) = (one for one in server.descendants() if one.name() == "haproxy")
    while _open_to(proxy, server.port) > 5:
        assert proxy.is_running()


def _open_to(proxy: psutil.Process, port: int) -> int:
    return sum(
        one.laddr.port == port and one.status == psutil.CONN_ESTABLISHED
        for one in proxy.net_connections("tcp")
    )


def test_answers_that_nobody_reads_hold_nobody_up(server: Server) -> None:
    """Many requests on one connection, whose answers are left lying."""
    with connect(server) as connection:
        connection.settimeout(1)
        try:
            for _ in range(20_000 if soak() else 2_000):
                connection.sendall(with_body(GOOD))
        except TimeoutError:
            pass  # the server does not read on, which is all that it can do
        assert ask(server, with_body(GOOD))[0] == 200


def test_many_connections_one_after_another(server: Server) -> None:
    """Each with one request, as from clients that keep none."""
    folder = Path(f"/proc/{next(one.pid for one in server.replicas())}/fd")
    before = len(list(folder.iterdir()))
    for _ in range(TIMES * 4):
        assert ask(server, with_body(GOOD))[0] == 200
    assert len(list(folder.iterdir())) <= before + 20
