"""The real Ray Serve, HAProxy, processes and signals, around a fake service."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from serving import processes
from serving.config import ServeConfig
from serving.errors import ConfigError
from serving.private_ray import environment, run
from tests.running import TOKEN, Server, free_port, running
from tests.serving.test_api import error_of
from tests.waiting import wait_until


def fake_server(folder: Path, kind: str = "good") -> list[str | int]:
    """The arguments that start the server around the fake service, and its port."""
    port = free_port()
    return ["-m", "tests.serving.fake_server", str(folder / "store"), str(port), kind]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two replicas, for the tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("server")
    command = fake_server(folder, "two")
    with running([str(part) for part in command], int(command[3]), folder / "log") as started:
        yield started


# --- before anything is started -------------------------------------------------------------------


def test_a_taken_port_is_said_before_ray_is_started(tmp_path: Path) -> None:
    before = psutil.Process().children()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}"):
            run(ServeConfig(store=tmp_path, port=port))
    assert psutil.Process().children() == before


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_address_of_ours_is_taken_as_it_is(host: str) -> None:
    assert processes.check_address(host, free_port()) == host


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7"):
        processes.check_address("203.0.113.7", free_port())


def test_everything_that_ray_is_told_is_private(tmp_path: Path) -> None:
    found = environment(ServeConfig(store=tmp_path), tmp_path, "127.0.0.1")
    again = environment(ServeConfig(store=tmp_path), tmp_path, "127.0.0.1")
    assert found["RAY_AUTH_MODE"] == "token"
    assert len(found["RAY_AUTH_TOKEN"]) == 64
    assert found["RAY_AUTH_TOKEN"] != again["RAY_AUTH_TOKEN"]
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"
    # A program of ours, which only hands over to the launcher.
    starter = Path(found.pop("RAY_SERVE_HAPROXY_BINARY_PATH"))
    assert starter.parent == Path(processes.__file__).parent
    named = [
        name for name in found if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE", "_LAUNCHER"))
    ]
    assert "TASKBONE_HAPROXY_LAUNCHER" in named
    for name in named:
        assert Path(found[name]).is_relative_to(tmp_path), name


def test_only_the_engines_thread_computes_with_several_cores(tmp_path: Path) -> None:
    """OpenMP slows down when threads have more teams than there are cores."""
    config = ServeConfig(store=tmp_path, engine_threads=3)
    assert environment(config, tmp_path, "127.0.0.1")["OMP_NUM_THREADS"] == "1"
    assert config.threads == 3
    assert ServeConfig(store=tmp_path).threads == len(os.sched_getaffinity(0))


def test_the_private_folder_is_ours_alone_and_goes() -> None:
    with processes.private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(str(folder)) <= 24
        (folder / "file").touch()
    assert not folder.exists()


def test_ports_for_replicas_are_free() -> None:
    first = processes.free_ports(20)
    for port in range(first, first + 20):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


# --- while it runs --------------------------------------------------------------------------------


def test_the_printed_line_can_be_pasted(server: Server) -> None:
    line = next(line for line in server.output.splitlines() if line.startswith("curl "))
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert '"predictions":[{"label":' in done.stdout


def test_the_token_is_printed_and_written_nowhere_else(server: Server) -> None:
    assert f"/docs?token={TOKEN}" in server.output
    assert f"page   {server.address}/#token={TOKEN}" in server.output
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_every_answer_has_one_request_id(server: Server) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "x-request-id": "my-id.1"}
    answer = server.ask("GET", "/v1/tasks", headers=headers)
    assert answer.headers.get_list("x-request-id") == ["my-id.1"]
    headers["x-request-id"] = "not mine; at all"
    answer = server.ask("GET", "/v1/tasks", headers=headers)
    [made] = answer.headers.get_list("x-request-id")
    assert made.isalnum()


def test_errors_keep_their_shape_through_the_front_door(server: Server) -> None:
    path = "/v1/tasks/parity/predict"
    large = b" " * (3 * 1024 * 1024)
    chunks = (large[start : start + 65536] for start in range(0, len(large), 65536))
    error_of(server.ask("POST", path, headers={}, json={"inputs": "a"}), 401)
    error_of(server.predict("nothing", "a"), 404)
    error_of(server.ask("GET", path), 405)
    error_of(server.ask("POST", path, content=large), 413)
    error_of(server.ask("POST", path, content=chunks), 413)
    error_of(server.ask("POST", path, content=b"{"), 422)
    error_of(server.predict("parity", "crash"), 500)
    assert error_of(server.predict("parity", "overload"), 503)["type"] == "overloaded"


def test_what_went_wrong_is_in_the_output_under_the_request_id(server: Server) -> None:
    error = error_of(server.predict("parity", "crash"), 500)
    while error["request_id"] not in server.output:
        assert server.process.poll() is None
        time.sleep(0.1)
    assert "secret detail of the crash" in server.output


def test_nothing_listens_to_other_machines_but_rays_guarded_port(server: Server) -> None:
    open_ports = [
        (process.name(), connection.laddr.port)
        for process in server.descendants()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
    # Ray lets no one choose the address of the replicas' internal port.
    assert len(open_ports) <= 2
    for name, port in open_ports:
        assert name.startswith("ray::Serve")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_replicas_share_one_board(server: Server) -> None:
    replicas = {process.pid for process in server.replicas()}
    known: set[int] = set()
    while known != replicas:
        error = error_of(server.predict("parity", "members"), 422)
        known = {int(member.rpartition("-")[2]) for member in error["message"].split()}
        assert known <= replicas
    assert len(known) == 2


def test_metrics_are_summed_over_the_replicas(server: Server) -> None:
    labels = {"task": "pairs", "code": "200"}
    for _ in range(40):
        assert server.predict("pairs", [["a", "b"]]).status_code == 200
    wait_until(lambda: server.metric("taskbone_requests_total", **labels) == 40)
    counts = {server.metric("taskbone_requests_total", **labels) for _ in range(10)}
    assert counts == {40.0}
    assert server.metric("taskbone_queue_duration_seconds_count", task="pairs") == 40
    assert server.metric("taskbone_replicas") == server.metric("taskbone_replicas_ready") == 2
    stats = server.ask("GET", "/v1/stats").json()
    assert (stats["replicas"], stats["tasks"]["pairs"]["requests"]["200"]) == (2, 40)
    (target,) = server.ask("GET", "/metrics/targets").json()
    assert target["targets"] == [f"127.0.0.1:{server.port}"]


def test_a_machines_own_replicas_are_asked_for_metrics(server: Server) -> None:
    (configuration,) = server.folder.glob("*/haproxy.cfg")
    lines = [line.split() for line in configuration.read_text().splitlines()]
    replicas = {line[1] for line in lines if line[:1] == ["server"]}
    assert len(replicas) == 2
    assert {
        line[1] for line in lines if line[2:] == "if { path /metrics /v1/stats }".split()
    } == replicas


def test_the_front_door_takes_commands_from_its_owner_alone(server: Server) -> None:
    sockets = list(server.folder.rglob("*.sock"))
    assert {path.name for path in sockets} >= {"admin.sock", "console.sock"}
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_client_that_hangs_up_cancels_its_prediction(server: Server) -> None:
    def answered() -> float:
        return server.metric("taskbone_requests_total", task="parity", code="200")

    before = answered()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.address}/v1/tasks/parity/predict",
            json={"inputs": "wait"},
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=0.5,
            trust_env=False,
        )
    while server.metric("taskbone_requests_total", task="parity", code="499") != 1:
        # A prediction that is not cancelled is answered after 2 s.
        assert answered() == before
        time.sleep(0.05)


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_requests_finish_and_leaves_nothing(tmp_path: Path, kind: int) -> None:
    command = [str(part) for part in fake_server(tmp_path)]
    answers: list[httpx.Response] = []
    with running(command, int(command[3]), tmp_path / "log") as server:
        folder = server.folder
        slow = threading.Thread(target=lambda: answers.append(server.predict("parity", "wait")))
        slow.start()
        time.sleep(0.5)
        assert server.stop(kind) == []
        slow.join()
    assert [answer.status_code for answer in answers] == [200]
    assert server.process.returncode == 0
    assert not folder.exists()
    said = server.output.partition(signal.Signals(kind).name)[2].splitlines()[1:]
    # After it, only what requests under way became.
    assert [line for line in said if "POST /v1/tasks/{task}/predict 200" not in line] == []
    processes.check_address("127.0.0.1", server.port)


def test_a_second_signal_stops_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    command = [str(part) for part in fake_server(tmp_path)]
    failures: list[Exception] = []

    def ask(server: Server) -> None:
        try:
            server.predict("parity", "wait")
        except httpx.HTTPError as error:
            failures.append(error)

    with running(command, int(command[3]), tmp_path / "log") as server:
        folder = server.folder
        slow = threading.Thread(target=ask, args=[server])
        slow.start()
        time.sleep(0.5)
        assert server.stop(signal.SIGINT, signal.SIGINT, signal.SIGINT) == []
        slow.join()
    assert len(failures) == 1
    assert not folder.exists()


def processes_with(name: str, value: str) -> list[str]:
    """The processes of this machine in whose environment this variable stands."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value:
                found.append(process.name())
    return found


def test_a_replica_that_cannot_start_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    command = [str(part) for part in fake_server(tmp_path, "broken")]
    mark = str(tmp_path)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TASKBONE_TEST": mark},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the replicas did not start" in done.stderr
    assert "the store holds no backbone" in done.stderr
    assert "Traceback" not in done.stderr
    assert processes_with("TASKBONE_TEST", mark) == []
