"""Keys over a real server that nobody restarts, and what it leaves open to other machines."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import httpx
import psutil
import pytest

from serving.local_key import ADMIN_TOKEN_VARIABLE, TOKEN_FILE, TOKEN_VARIABLE
from tests.cli.running import succeed
from tests.running import Server, free_port, running
from tests.serving.test_api import error_of
from tests.waiting import wait_until

NONE_GIVEN = {TOKEN_VARIABLE: "", ADMIN_TOKEN_VARIABLE: ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that was started for the first time with its store, and the store."""
    folder = tmp_path_factory.mktemp("live")
    store, port = folder / "store", free_port()
    command = ["-m", "tests.serving.fake_server", str(store), str(port)]
    with running(command, port, folder / "log", NONE_GIVEN) as server:
        yield server, store


def status(server: Server, secret: str, method: str = "GET", path: str = "/v1/tasks") -> int:
    headers = {"authorization": f"Bearer {secret}"}
    content = b"artifact" if method == "POST" else None
    return server.ask(method, path, headers=headers, content=content).status_code


def test_the_first_start_shows_the_key_that_it_has_made(place: tuple[Server, Path]) -> None:
    server, store = place
    secret = (store / TOKEN_FILE).read_text().strip()
    assert f"/docs?token={secret}" in server.output
    assert status(server, secret) == 200
    written = [path for path in store.parent.rglob("*") if path.is_file()]
    written += [path for path in server.folder.rglob("*") if path.is_file()]
    having = {path.name for path in written if secret.encode() in path.read_bytes()}
    assert having == {TOKEN_FILE, "log"}, "the file of this machine's user, and what was printed"


def test_changes_of_the_keys_need_no_restart(place: tuple[Server, Path]) -> None:
    server, store = place
    local = (store / TOKEN_FILE).read_text().strip()
    change = ("POST", "/v1/tasks/new/versions")
    headers = {"authorization": f"Bearer {local}"}
    answer = server.ask(*change, headers=headers, content=b"artifact")
    assert "taskbone keys add NAME --scope admin" in error_of(answer, 403)["message"]

    def keys(*arguments: str) -> str:
        """A `taskbone keys` command that shows a key; the key."""
        found: str = json.loads(succeed("keys", *arguments, "--json", "--store", store))["key"]
        return found

    first = keys("add", "ops", "--scope", "admin")
    wait_until(lambda: status(server, first, *change) == 201)
    assert status(server, first) == 403
    second = keys("rotate", "ops", "--keep-old", "1h")
    wait_until(lambda: status(server, second, *change) == 200)
    assert status(server, first, *change) == 200
    third = keys("rotate", "ops")
    wait_until(lambda: status(server, third, *change) == 200)
    assert (status(server, first, *change), status(server, second, *change)) == (401, 401)
    succeed("keys", "revoke", "ops", "--store", store)
    wait_until(lambda: status(server, third, *change) == 401)
    assert status(server, local) == 200, "the other key is as it was"


def test_nothing_but_rays_guarded_port_is_open_to_other_machines(
    place: tuple[Server, Path],
) -> None:
    """`test_deployment` shows that the guarded one refuses who does not know Ray's own token."""
    server, _ = place
    found = set()
    for process in (psutil.Process(server.process.pid), *server.descendants()):
        for connection in process.net_connections("inet"):
            listens = connection.status == psutil.CONN_LISTEN
            takes_datagrams = connection.type == socket.SOCK_DGRAM and not connection.raddr
            if not (listens or takes_datagrams):
                continue
            if connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
                found.add((process.name().partition(":")[0], connection.type.name))
    assert found <= {("ray", "SOCK_STREAM")}


def test_rays_own_services_refuse_who_does_not_know_rays_token(
    place: tuple[Server, Path],
) -> None:
    """The neighbours on this machine, whom loopback does not keep out."""
    server, _ = place

    def ports() -> dict[str, set[int]]:
        return {
            process.name(): {
                one.laddr.port
                for one in process.net_connections("inet")
                if one.status == psutil.CONN_LISTEN
            }
            for process in server.descendants()
            # As far as the kernel keeps a name: the one runs commands, the other submits jobs.
            if process.name().startswith(("ray::RuntimeEnv", "ray::DashboardA"))
        }

    wait_until(lambda: len(found := ports()) == 2 and all(found.values()), lambda: str(ports()))
    refused = 0
    for agent, opened in ports().items():
        for port, path in product(opened, ("/api/job_agent/jobs/", "/get_or_create_runtime_env")):
            # Some have a port that speaks gRPC. Beside another Ray of this machine, whose agent has
            # the usual port already, one of them has no other.
            with suppress(httpx.TransportError):
                answer = httpx.post(f"http://127.0.0.1:{port}{path}", timeout=60, trust_env=False)
                assert answer.status_code == 401, f"{agent}, {port}{path}"
                refused += 1
    assert refused >= 2


@pytest.mark.parametrize("path", ["/-/routes", "/-/healthz", "/%2d/routes", "/-/nothing"])
def test_rays_own_routes_are_not_there_for_clients(place: tuple[Server, Path], path: str) -> None:
    server, _ = place
    answer = server.ask("GET", path, headers={})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "no_such_route")
