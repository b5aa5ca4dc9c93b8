"""A well-behaved client that asks all the time: whatever others do, it gets its right answers."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.running import TOKEN, Server

ANSWERS = 5
"""How many it must get after whatever was done."""


@dataclass
class Witness:
    """What it has seen: how many right answers, and everything else."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def watch(self, port: int) -> None:
        """Ask until told to end, over one connection as long as that stays open."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"authorization": f"Bearer {TOKEN}"}
        while not self.ending.is_set():
            text = "a" * (self.right % 7)
            body = json.dumps({"inputs": text})
            try:
                connection.request("POST", "/v1/tasks/parity/predict", body, headers)
                answer = connection.getresponse()
                found = answer.read()
            except OSError as error:
                self.wrong.append(repr(error))
                connection.close()
                continue
            label = b'"label":"odd"' if len(text) % 2 else b'"label":"even"'
            if answer.status == 200 and label in found:
                self.right += 1
            else:
                self.wrong.append(f"{answer.status} {found[:200]!r}")
        connection.close()


@contextmanager
def witness(server: Server) -> Iterator[Witness]:
    """Have it watch a server around the fake service; fails where it was disturbed."""
    seen = Witness()
    watching = threading.Thread(target=seen.watch, args=[server.port])
    watching.start()
    try:
        yield seen
        enough = seen.right + ANSWERS
        while seen.right < enough and not seen.wrong:
            assert not seen.ending.wait(0.01)
    finally:
        seen.ending.set()
        watching.join()
    assert seen.wrong == []
