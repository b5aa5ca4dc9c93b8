"""Replicas are killed, and engines die, while clients ask: only what was under way there fails.

Long form: 60 seconds with three replicas, one killed and one engine dead in turn, and the time
until all answer again is held against its promise.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import pytest

from tests.abuse.place import Place
from tests.abuse.tiny_server import DIE
from tests.abuse.traffic import CUT, Timeline, Traffic, traffic
from tests.abuse.variants import make_variants
from tests.soak import report, soak
from tests.waiting import wait_until

CLIENTS = 12
TIMES = 4 if soak() else 1
BACK_WITHIN_S = 15.0


def kill(place: Place, task: str) -> None:
    """SIGKILL, as from a system that needs memory."""
    place.server.replicas()[0].kill()


def end_engine(place: Place, task: str) -> None:
    """The engine's thread dies; its own caller is among those who notice."""
    with suppress(httpx.HTTPError):
        assert place.server.predict(task, DIE).status_code in (500, 503)


WORDS: dict[Callable[[Place, str], None], str] = {
    kill: "a replica killed",
    end_engine: "an engine's thread dead",
}


@pytest.mark.parametrize("end", WORDS)
def test_only_what_was_under_way_fails(place: Place, end: Callable[[Place, str], None]) -> None:
    task = f"lasting-{end.__name__.replace('_', '-')}"
    variants = {task: make_variants(place.backbone, task, 1, seed=9)}
    place.register(task, variants[task][0].data)
    timelines, made_of = {task: Timeline(frozenset([1]))}, {(task, 1): 0}
    count = len(place.server.replicas())
    back_s, lost = [], []
    for _ in range(TIMES):
        with traffic(place.server.port, CLIENTS, variants) as seen:
            seen.wait_for(200)
            began = time.monotonic()
            end(place, task)
            ended = time.monotonic()
            wait_for_all(place, count, seen)
            back_s.append(time.monotonic() - began)
            seen.wait_for(200)
        failed = seen.failed()
        lost.append(len(failed))
        assert {one.status for one in failed} <= {CUT, 500, 503}
        assert [one for one in seen.wrong(timelines, made_of) if one not in failed] == []
        # While a process ends, its port still takes connections that nobody will read from: for
        # a moment, who asks again at once may meet them.
        assert [one for one in failed if one.ended < began or one.began > ended + 1] == []
        assert len(failed) <= 2 * CLIENTS
    report(
        f"{WORDS[end]}, {TIMES} times, {CLIENTS} clients",
        f"failed {lost} of {CLIENTS} under way; all {count} replicas back after "
        f"{', '.join(f'{one:.1f}' for one in back_s)} s; no wrong answer",
    )
    if soak():
        assert max(back_s) <= BACK_WITHIN_S


def wait_for_all(place: Place, count: int, seen: Traffic) -> None:
    """Until so many replicas answer by themselves."""

    def back() -> bool:
        return len(place.server.replicas()) == count and len(place.ports()) == count

    wait_until(back)
