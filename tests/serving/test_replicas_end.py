"""What clients see of replicas that end: killed, dead inside, stuck, or with the whole server."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.running import Server, running
from tests.serving.load import CUT, REFUSED, Load, Outcome, load
from tests.serving.test_deployment import fake_server

CLIENTS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with three replicas; each test leaves three again."""
    folder = tmp_path_factory.mktemp("server")
    command = fake_server(folder, "three")
    with running([str(part) for part in command], int(command[3]), folder / "log") as started:
        yield started


def wait_for_new(server: Server, before: list[psutil.Process], seen: Load) -> None:
    """Wait until a process that was not there before has answered."""
    known = {str(process.pid) for process in before}
    while True:
        answer = server.predict("parity", "who")
        if answer.status_code == 200 and answer.json()["predictions"][0]["label"] not in known:
            return
        assert not seen.ending.wait(0.02)


def failed(seen: Load) -> list[Outcome]:
    return [one for one in seen.outcomes if one.came != 200]


@pytest.mark.parametrize("how", ["killed", "dies inside"])
def test_only_what_a_replica_had_under_way_fails_when_it_ends(server: Server, how: str) -> None:
    before = server.replicas()
    assert len(before) == 3
    with load(server.port, CLIENTS) as seen:
        seen.wait_for(100)
        if how == "killed":
            before[0].kill()
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                server.predict("parity", "die")
        over = time.monotonic()
        wait_for_new(server, before, seen)
        seen.wait_for(100)
    assert len(server.replicas()) == 3
    lost = failed(seen)
    # A client whose connection was kept sees it close, another the page for a server that is busy.
    assert {one.came for one in lost} <= {CUT, 503}
    assert len(lost) <= CLIENTS
    # A process that was told to end takes a moment.
    assert [one for one in lost if one.began > over + 0.5] == []


def test_a_stuck_replica_is_replaced_and_nothing_fails(server: Server) -> None:
    before = server.replicas()
    with load(server.port, CLIENTS) as seen:
        seen.wait_for(50)
        server.predict("parity", "stuck")
        wait_for_new(server, before, seen)
    lost = failed(seen)
    assert {one.came for one in lost} <= {CUT, 503}
    assert len(lost) <= CLIENTS


def test_a_server_that_stops_cuts_no_request(server: Server) -> None:
    with load(server.port, CLIENTS) as seen:
        seen.wait_for(100)
        stopping = time.monotonic()
        assert server.stop(signal.SIGTERM) == []
        seen.ending.wait(0.2)
    assert {one.came for one in seen.outcomes} <= {200, 503, REFUSED}
    assert all(one.retry_after for one in seen.seen(503))
    assert seen.seen(REFUSED)
    assert max(one.ended for one in seen.seen(200)) > stopping


def test_load_brings_a_replica_and_quiet_takes_it_away_and_no_request_fails(
    tmp_path: Path,
) -> None:
    command = [str(part) for part in fake_server(tmp_path, "scaled")]
    with running(command, int(command[3]), tmp_path / "log") as server:
        (first,) = server.replicas()
        with load(server.port, 2) as light:
            with load(server.port, CLIENTS) as heavy:
                wait_for_new(server, [first], heavy)
                heavy.wait_for(100)
            while len(server.replicas()) > 1:
                assert not light.ending.wait(0.1)
            light.wait_for(50)
        assert failed(heavy) == failed(light) == []
