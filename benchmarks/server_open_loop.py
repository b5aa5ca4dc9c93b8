"""An open loop: requests are sent when they are due, whatever the server does with earlier ones.

A connection carries one request at a time; where none is free, another is opened. Written against
asyncio's transports, because every microsecond of the client is taken from the server beside it.
"""

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_STATUS = slice(9, 12)
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
LOST = 0
"""Status of a request whose connection ended without an answer."""


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


class Client:
    """Connections to one port. For one event loop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[_Connection] = []
        self._all: list[_Connection] = []

    async def send(self, request: bytes, due: float) -> Outcome:
        """One request, as soon as it is called."""
        while self._idle and self._idle[-1].is_closed:
            self._idle.pop()
        if self._idle:
            connection = self._idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
            self._all.append(connection)
        outcome = await connection.ask(request, due)
        self._idle.append(connection)
        return outcome

    def close(self) -> None:
        """Close every connection."""
        for connection in self._all:
            connection.close()


async def at_rate(
    client: Client, requests: Iterator[bytes], per_second: float, seconds: float
) -> list[Outcome]:
    """Send at equal intervals, and wait for all that was sent."""
    started = time.perf_counter()
    under_way = []
    for number in range(round(per_second * seconds)):
        due = started + number / per_second
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        under_way.append(asyncio.create_task(client.send(next(requests), due)))
    return await asyncio.gather(*under_way)


async def closed(
    client: Client, requests: Iterator[bytes], at_once: int, seconds: float
) -> list[Outcome]:
    """The same client as a closed loop, for comparison: `at_once` requests are always under way."""
    end = time.perf_counter() + seconds

    async def one() -> list[Outcome]:
        found = []
        while (now := time.perf_counter()) < end:
            found.append(await client.send(next(requests), now))
        return found

    found = await asyncio.gather(*(one() for _ in range(at_once)))
    return [outcome for part in found for outcome in part]


def answered_per_s(outcomes: Sequence[Outcome], start: float, end: float) -> float:
    """Answers of status 200 that came between two moments, per second."""
    count = sum(one.status == 200 and start <= one.ended < end for one in outcomes)
    return count / (end - start)


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Outcome] | None = None
        self._due = 0.0
        self._received = bytearray()
        self._length = -1  # of the whole answer; -1 as long as its head is not there

    @property
    def is_closed(self) -> bool:
        """Whether the server has ended it."""
        return self._transport is None or self._transport.is_closing()

    def ask(self, request: bytes, due: float) -> "asyncio.Future[Outcome]":
        """Send; the answer comes in the future, whatever it is."""
        self._due = due
        self._received.clear()
        self._length = -1
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport is not None:
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
            self._length = head_end + 4 + (int(length[1]) if length else 0)
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
        body = bytes(self._received[head_end + 4 :]) if status == 200 else b""
        self._answer.set_result(
            Outcome(self._due, now, status, int(retry[1]) if retry else None, body)
        )
