"""Clients that ask all the time and remember every answer, and a judge who knows what was right.

Who changes what is served tells the `Timeline` before and after; in between, the old and the new
are right. An answer is right if its version was so at some moment of its request, and its scores
are those of that version's artifact.
"""

import http.client
import itertools
import json
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.abuse.variants import TEXTS, Variant, which
from tests.running import TOKEN

CUT = 0
"""Instead of a status: the connection ended before the answer did."""
NO_DOOR = -1
"""Instead of a status: no server takes connections."""

Door = tuple[str, int]
"""Host and port of a front door."""

Allowed = frozenset[int | None]
"""Versions that may answer; None: the task may be unknown."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: when, of which task, and who has answered it, by number and by scores."""

    began: float
    ended: float
    task: str
    status: int
    version: int | None
    variant: int | None


class Timeline:
    """Which versions of a task were right, when. Told by one thread; read at the end."""

    def __init__(self, allowed: Allowed) -> None:
        self._times = [0.0]
        self._allowed = [allowed]

    def changing(self, new: Allowed) -> None:
        """What was right still is, and the new is right, too."""
        self._put(self._allowed[-1] | new)

    def changed(self, new: Allowed) -> None:
        """The new alone is right."""
        self._put(new)

    def between(self, began: float, ended: float) -> Allowed:
        """All that was right at some moment of this time."""
        first, last = bisect_right(self._times, began) - 1, bisect_right(self._times, ended)
        return frozenset(itertools.chain.from_iterable(self._allowed[first:last]))

    def _put(self, allowed: Allowed) -> None:
        self._times.append(time.monotonic())
        self._allowed.append(allowed)


@dataclass
class Traffic:
    """What the clients have seen."""

    answers: list[Answer] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def failed(self) -> list[Answer]:
        """What was not answered well."""
        return [one for one in self.answers if one.status != 200]

    def wait_for(self, count: int) -> None:
        """Wait until so many more requests have begun and been answered well."""
        since, seen = time.monotonic(), len(self.answers)
        while sum(one.began > since and one.status == 200 for one in self.answers[seen:]) < count:
            assert not self.ending.wait(0.01)

    def wrong(
        self, timelines: Mapping[str, Timeline], made_of: Mapping[tuple[str, int], int]
    ) -> list[Answer]:
        """Every answer that no version that was right then can have given; `made_of`: the variant
        that each version of each task is."""
        return [one for one in self.answers if not _is_right(one, timelines[one.task], made_of)]


def _is_right(one: Answer, timeline: Timeline, made_of: Mapping[tuple[str, int], int]) -> bool:
    right = timeline.between(one.began, one.ended)
    if one.status == 404:
        return None in right
    return (
        one.status == 200
        and one.version in right
        and one.version is not None
        and made_of[one.task, one.version] == one.variant
    )


class _Client:
    def __init__(
        self,
        doors: Sequence[Door],
        number: int,
        variants: Mapping[str, Sequence[Variant]],
        seen: Traffic,
    ) -> None:
        self._doors = [http.client.HTTPConnection(*door, timeout=120) for door in doors]
        self._variants = variants
        self._seen = seen
        self._number = number

    def run(self) -> None:
        """Each task in turn, each text in turn, until told to end."""
        turns = itertools.cycle(itertools.product(sorted(self._variants), TEXTS))
        for count, (task, text) in enumerate(turns):
            if self._seen.ending.is_set():
                break
            self._seen.answers.append(self._ask(task, text, f"client-{self._number}.{count}"))
        for connection in self._doors:
            connection.close()

    def _ask(self, task: str, text: str, request_id: str) -> Answer:
        headers = {"authorization": f"Bearer {TOKEN}", "x-request-id": request_id}
        began = time.monotonic()
        if not self._connect():
            return Answer(began, time.monotonic(), task, NO_DOOR, None, None)
        connection = self._doors[0]
        try:
            connection.request(
                "POST", f"/v1/tasks/{task}/predict", json.dumps({"inputs": text}), headers
            )
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return Answer(began, time.monotonic(), task, CUT, None, None)
        ended = time.monotonic()
        if answer.status != 200:
            return Answer(began, ended, task, answer.status, None, None)
        found = json.loads(body)
        variant = which(self._variants[task], text, found["predictions"][0]["scores"])
        return Answer(began, ended, task, 200, found["version"], variant)

    def _connect(self) -> bool:
        """Be connected to the first door that is open; what is closed now comes last."""
        for _ in self._doors:
            if self._doors[0].sock is not None:
                return True
            try:
                self._doors[0].connect()
            except OSError:
                self._doors.append(self._doors.pop(0))
        return self._doors[0].sock is not None


@contextmanager
def traffic(
    port: int,
    clients: int,
    variants: Mapping[str, Sequence[Variant]],
    host: str = "127.0.0.1",
    others: Sequence[Door] = (),
) -> Iterator[Traffic]:
    """Have so many clients ask for all these tasks while the block runs.

    `others`: where a client goes when this door takes no connection, as a load balancer would.
    """
    seen = Traffic()
    doors = [(host, port), *others]
    threads = [
        threading.Thread(target=_Client(doors, number, variants, seen).run)
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        seen.ending.set()
        for thread in threads:
            thread.join()
