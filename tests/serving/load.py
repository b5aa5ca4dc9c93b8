"""Clients that ask a server all the time over connections that they keep, and what came of it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.running import TOKEN

REFUSED = "refused"
"""A new connection was not accepted: the request has not begun."""
CUT = "cut"
"""The connection ended before the answer was complete."""


@dataclass(frozen=True)
class Outcome:
    """One request: when it began and ended, and its status, `REFUSED` or `CUT`."""

    began: float
    ended: float
    came: int | str
    retry_after: str | None = None


@dataclass
class Load:
    """What the clients have seen so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def seen(self, *came: int | str) -> list[Outcome]:
        """The requests that ended so."""
        return [one for one in self.outcomes if one.came in came]

    def wait_for(self, count: int) -> None:
        """Wait until so many more requests were answered well."""
        target = len(self.seen(200)) + count
        while len(self.seen(200)) < target:
            assert not self.ending.wait(0.01)


class _Client:
    def __init__(self, host: str, port: int, text: str, load: Load) -> None:
        self._load = load
        self._connection = http.client.HTTPConnection(host, port, timeout=60)
        self._body = json.dumps({"inputs": text})
        self._headers = {"authorization": f"Bearer {TOKEN}"}

    def run(self) -> None:
        while not self._load.ending.is_set():
            began = time.monotonic()
            came, retry_after = self._ask()
            outcome = Outcome(began, time.monotonic(), came, retry_after)
            self._load.outcomes.append(outcome)
            if came == REFUSED:
                time.sleep(0.05)
        self._connection.close()

    def _ask(self) -> tuple[int | str, str | None]:
        new = self._connection.sock is None
        try:
            if new:
                self._connection.connect()
            self._connection.request("POST", "/v1/tasks/parity/predict", self._body, self._headers)
            answer = self._connection.getresponse()
            answer.read()
        except OSError as error:
            self._connection.close()
            # What a socket that closes had not yet accepted is reset: nobody has read it.
            refused = isinstance(error, ConnectionRefusedError)
            unread = new and type(error) is ConnectionResetError
            return (REFUSED if refused or unread else CUT), None
        except http.client.HTTPException:
            self._connection.close()
            return CUT, None
        return answer.status, answer.getheader("retry-after")


@contextmanager
def load(port: int, clients: int, text: str = "nap", host: str = "127.0.0.1") -> Iterator[Load]:
    """Keep so many clients asking while the block runs."""
    made = Load()
    threads = [threading.Thread(target=_Client(host, port, text, made).run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.ending.set()
        for thread in threads:
            thread.join()
