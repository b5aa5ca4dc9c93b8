"""The server on a Ray that runs already, with two nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from model_store import artifact
from model_store.store import Store
from serving import processes
from serving.cluster_environment import check, check_process, environment, exports, needed
from serving.errors import ConfigError
from tests.overlays import random_artifact, small_backbone
from tests.running import TOKEN, Server, free_port, running
from tests.waiting import wait_until

ADMIN = "an-admin-token-for-the-tests"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Nodes:
    """A Ray of two nodes: its address, the port of each node's HAProxy, and where its files are."""

    process: "subprocess.Popen[str]"
    address: str
    ports: tuple[int, int]
    folder: Path

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == line

    def replicas(self) -> list[psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if one.name().startswith("ray::ServeRep")]

    def logs(self, words: str) -> bool:
        """Whether the replicas have said this, where Ray keeps what processes say."""
        files = self.folder.glob("r/session_2*/logs/worker-*.err")
        return any(words in file.read_text(errors="replace") for file in files)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head that has what the server needs, and no other node yet."""
    ports = free_port(), free_port()
    with (
        processes.private_folder() as folder,
        subprocess.Popen(
            [sys.executable, "-m", "tests.serving.ray_nodes", str(folder), *map(str, ports)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the head did not start"
        yield Nodes(process, address, ports, folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, bytes]:
    """A store with one task, and a second version of it that is not there yet."""
    store, backbone = small_backbone(tmp_path_factory.mktemp("store"))
    store.publish(artifact.verify(random_artifact(backbone), backbone.config, backbone.fingerprint))
    return store, random_artifact(backbone, seed=1)


def command(store: Store, nodes: Nodes, *options: str) -> list[str]:
    return [
        *("-m", "taskbone", "serve", "--store", str(store.root), "--replicas-per-node", "1"),
        *("--ray-address", nodes.address, "--port", str(nodes.ports[0]), *options),
    ]


def ask(port: int, text: str = "the film was very good") -> httpx.Response:
    return httpx.post(
        f"http://127.0.0.1:{port}/v1/tasks/mood/predict",
        json={"inputs": text},
        headers={"authorization": f"Bearer {TOKEN}"},
        timeout=60,
        trust_env=False,
    )


def test_a_node_without_what_it_needs_is_named(
    nodes: Nodes, store: tuple[Store, bytes], tmp_path: Path
) -> None:
    nodes.tell("add plain")
    done = subprocess.run(
        [sys.executable, *command(store[0], nodes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    nodes.tell("remove")
    assert done.returncode == 1
    assert "the Ray node " in done.stderr
    assert "was started without TASKBONE_RAY_ENVIRONMENT=1 RAY_SERVE_" in done.stderr
    assert 'eval "$(taskbone ray-environment)"' in done.stderr
    assert "Traceback" not in done.stderr


def test_every_node_answers_for_every_task_and_every_new_version(
    nodes: Nodes, store: tuple[Store, bytes], tmp_path: Path
) -> None:
    nodes.tell("add good")
    started = command(store[0], nodes)
    keys = {"TASKBONE_ADMIN_TOKEN": ADMIN}
    with running(started, nodes.ports[0], tmp_path / "log", keys) as server:
        replicas = nodes.replicas()
        assert len(replicas) == 2
        assert len({process.ppid() for process in replicas}) == 2
        for port in nodes.ports:
            assert {ask(port).json()["version"] for _ in range(20)} == {1}
        answer = httpx.post(
            f"http://127.0.0.1:{nodes.ports[1]}/v1/tasks/mood/versions",
            content=store[1],
            headers={"authorization": f"Bearer {ADMIN}"},
            timeout=60,
            trust_env=False,
        )
        assert answer.status_code == 201, answer.text
        assert answer.json()["status"] == "ready 2/2"
        for port in nodes.ports:
            assert {ask(port).json()["version"] for _ in range(20)} == {2}
        wait_until(lambda: nodes.logs("POST /v1/tasks/{task}/predict 200"))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert nodes.replicas() == []
    # The Ray goes on without us.
    nodes.tell("")


def test_serve_run_takes_the_application(nodes: Nodes, store: tuple[Store, bytes]) -> None:
    settings = [f"store={store[0].root}", "replicas=1", "precision=fp32"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.serve.scripts", "run", "--address", nodes.address),
            *("--name", "taskbone", "serving.deployment:application", *settings),
        ],
        cwd=ROOT,
        env=os.environ | needed() | {"TASKBONE_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = Server(process, nodes.ports[0], Path())
    try:
        while process.poll() is None:
            try:
                if ask(server.port).status_code == 200:
                    break
            except httpx.TransportError:
                pass
        assert ask(server.port).json()["predictions"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


# --- without a Ray --------------------------------------------------------------------------------


def test_what_is_missing_is_said_with_its_value() -> None:
    given: dict[str, str | None] = {**environment()}
    check(given, "the node")
    name = "RAY_SERVE_ENABLE_HA_PROXY"
    for wrong in (None, "0"):
        with pytest.raises(ConfigError, match=f"the node was started without {name}=1: stop it"):
            check(given | {name: wrong}, "the node")


def test_a_process_that_ray_started_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in needed().items():
        monkeypatch.setenv(name, value)
    check_process()
    monkeypatch.delenv("RAY_SERVE_THROUGHPUT_OPTIMIZED")
    with pytest.raises(ConfigError, match="RAY_SERVE_THROUGHPUT_OPTIMIZED=1"):
        check_process()


def test_the_printed_lines_set_the_variables() -> None:
    script = exports() + "env"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    given: dict[str, str] = dict(
        line.split("=", 1) for line in done.stdout.splitlines() if "=" in line
    )
    check(given, "the shell")
    assert os.access(given["RAY_SERVE_HAPROXY_BINARY_PATH"], os.X_OK)
