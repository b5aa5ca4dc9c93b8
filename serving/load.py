"""A load for a server: requests over kept connections in a closed or an open loop, and what came.

Closed: a number of connections, each of which waits for its answer before it asks again. Open:
requests are sent when they are due, whatever became of earlier ones, and count from that moment, so
that no waiting is hidden. Written against asyncio's transports, because every microsecond of the
client is taken from a server beside it. Knows no route and no task.
"""

import asyncio
import re
import resource
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

LOST = 0
"""Status of a request whose connection could not be opened, or ended without an answer."""
_OTHER_FILES = 124
"""So many files of those that a process may have open are left for other things."""
_PORTS = 20_000
"""Fewer than a machine has for connections to one address."""
_PAUSE_S = 0.05
_STATUS = slice(9, 12)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_LAST = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One POST request."""

    path: str
    body: str


@dataclass(frozen=True)
class Server:
    """Where requests go, and the token that they show, if any."""

    port: int
    token: str = ""
    host: str = "127.0.0.1"
    tls: bool = False
    prefix: str = ""
    """What comes before every path."""

    @classmethod
    def of(cls, url: str, token: str) -> "Server":
        """The server at a URL that httpx has taken."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return cls(port, token, parts.hostname or "", tls, parts.path.rstrip("/"))

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        given = {"content-type": "application/json"}
        return given | ({"authorization": f"Bearer {self.token}"} if self.token else {})


@dataclass(slots=True)
class Outcome:
    """What came of one request. Seconds by `time.perf_counter`."""

    due: float
    ended: float
    status: int
    retry_after: int | None
    body: bytes
    """Of a 200 alone."""

    @property
    def latency_s(self) -> float:
        """From when it was due: a client that is late makes no answer look faster."""
        return self.ended - self.due


Seen = Callable[[Outcome], None]
"""Is told of every request that has ended."""


def as_bytes(server: Server, question: Question) -> bytes:
    """A request as it goes over the wire."""
    body = question.body.encode()
    host = f"[{server.host}]" if ":" in server.host else server.host
    headers = server.headers | {
        "host": f"{host}:{server.port}",
        "content-length": str(len(body)),
    }
    lines = [
        f"POST {server.prefix}{question.path} HTTP/1.1",
        *(f"{key}: {text}" for key, text in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def most_connections() -> int:
    """How many connections this process can have at once."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _PORTS if files == resource.RLIM_INFINITY else min(_PORTS, max(1, files - _OTHER_FILES))


class Client:
    """Connections to one server, as many as it takes and can be. For one event loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._tls = ssl.create_default_context() if server.tls else None
        self._free = asyncio.Semaphore(most_connections())
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def send(self, request: bytes, due: float) -> Outcome:
        """One request, as soon as a connection is free."""
        async with self._free:
            while self._idle and self._idle[-1].is_closed:
                self._all.discard(self._idle.pop())
            try:
                connection = self._idle.pop() if self._idle else await self._connect()
            except OSError:
                return Outcome(due, time.perf_counter(), LOST, None, b"")
            outcome = await connection.ask(request, due)
            self._idle.append(connection)
            return outcome

    def close(self) -> None:
        """Close every connection."""
        for connection in self._all:
            connection.close()

    async def _connect(self) -> "_Connection":
        loop, server = asyncio.get_running_loop(), self._server
        _, connection = await loop.create_connection(
            _Connection, server.host, server.port, ssl=self._tls
        )
        self._all.add(connection)
        return connection


async def at_rate(
    client: Client, requests: Iterator[bytes], per_second: float, seconds: float, seen: Seen
) -> None:
    """Send at equal intervals, and wait for all that was sent."""

    async def one(due: float) -> None:
        seen(await client.send(next(requests), due))

    started = time.perf_counter()
    under_way = set()
    for number in range(round(per_second * seconds)):
        due = started + number / per_second
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)


async def closed(
    client: Client, requests: Iterator[bytes], at_once: int, seconds: float, seen: Seen
) -> None:
    """`at_once` requests are always under way, until the time is over; then wait for those."""
    end = time.perf_counter() + seconds

    async def one() -> None:
        while (now := time.perf_counter()) < end:
            outcome = await client.send(next(requests), now)
            seen(outcome)
            if outcome.status == LOST:  # nobody is there: asking without a pause helps nobody
                await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(*(one() for _ in range(at_once)))


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Outcome] | None = None
        self._due = 0.0
        self._received = bytearray()
        self._length = -1  # of the whole answer; -1 as long as its head is not there

    @property
    def is_closed(self) -> bool:
        """Whether it has been ended, by whomever."""
        return self._transport is None or self._transport.is_closing()

    def ask(self, request: bytes, due: float) -> "asyncio.Future[Outcome]":
        """Send; the answer comes in the future, whatever it is."""
        self._due = due
        self._received.clear()
        self._length = -1
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is None:  # ended since it was opened
            self.connection_lost(None)
        else:
            self._transport.write(request)
        return self._answer

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._length < 0:
            head_end = self._received.find(b"\r\n\r\n")
            if head_end < 0:
                return
            length = _LENGTH.search(self._received, 0, head_end)
            if length is None:
                self.close()  # what cannot be told apart from the next answer is none
                return
            self._length = head_end + 4 + int(length[1])
        if len(self._received) >= self._length:
            self._resolve()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Outcome(self._due, time.perf_counter(), LOST, None, b""))

    def _resolve(self) -> None:
        if self._answer is None or self._answer.done():
            return
        now, head_end = time.perf_counter(), self._received.find(b"\r\n\r\n")
        status = int(self._received[_STATUS])
        retry = _RETRY.search(self._received, 0, head_end + 2)
        if _LAST.search(self._received, 0, head_end + 2):
            self.close()
        body = bytes(self._received[head_end + 4 :]) if status == 200 else b""
        self._answer.set_result(
            Outcome(self._due, now, status, int(retry[1]) if retry else None, body)
        )
