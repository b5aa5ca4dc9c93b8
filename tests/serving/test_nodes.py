"""Several machines: real Ray nodes on this one, each at a loopback address of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from serving import spread
from serving.errors import ConfigError
from serving.ray_token import VARIABLE, ray_token
from tests.overlays import random_artifact, small_backbone
from tests.running import Server, free_port, running
from tests.serving.load import CUT, load
from tests.soak import soak
from tests.waiting import wait_until

SECRET = "0123456789abcdef" * 4
CLIENTS = 8
ROOT = Path(__file__).parents[2]


@dataclass
class Cluster:
    """Nodes that run, the head first."""

    folder: Path
    stack: ExitStack
    address: str
    nodes: list[Server] = field(default_factory=list)

    def add(self) -> Server:
        """One more node."""
        number = len(self.nodes) + 1
        # Every process has loopback addresses of its own, so that two runs of tests do not meet.
        host, port = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}.{number + 1}", 8000
        place = ["--join", self.address] if self.nodes else ["--head"]
        if not self.nodes:
            self.address = f"{host}:{free_port()}"
            place += ["--ray-port", self.address.rpartition(":")[2]]
        command = ["-m", "taskbone", "node", *place, "--host", host, "--port", str(port)]
        log = self.folder / f"node-{number}.log"
        node = self.stack.enter_context(
            running(command, port, log, {VARIABLE: SECRET}, "stop ", host)
        )
        self.nodes.append(node)
        return node

    def serve(self, *command: str) -> str:
        """Put a server onto the cluster; what that prints."""
        log, head = self.folder / "serve.log", self.nodes[0]
        started = running(["-m", *command], head.port, log, {VARIABLE: SECRET}, host=head.host)
        return self.stack.enter_context(started).output


@contextmanager
def nodes(folder: Path, count: int) -> Iterator[Cluster]:
    """A cluster of so many nodes; at the end nothing of any is left."""
    with ExitStack() as stack:
        made = Cluster(folder, stack, "")
        for _ in range(count):
            made.add()
        try:
            yield made
        finally:
            live = [node for node in made.nodes if node.process.poll() is None]
            below = [one for node in live for one in node.descendants()]
    assert [one.name() for one in below if is_running(one)] == []


def is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def members(node: Server) -> set[str]:
    """Who stands on the board, as one replica sees it."""
    error = node.predict("parity", "members").json()["error"]
    return set(error["message"].split())


def answers(node: Server) -> bool:
    """Whether the front door has replicas."""
    with suppress(httpx.TransportError):
        return node.ask("GET", "/health/ready", headers={}).status_code == 200
    return False


def targets(node: Server) -> set[str]:
    """What Prometheus is told to scrape."""
    found = node.ask("GET", "/metrics/targets").json()
    return {f"http://{address}" for one in found for address in one["targets"]}


def kill(node: Server) -> None:
    """End a node and all below it, without a word."""
    for process in [*node.descendants(), psutil.Process(node.process.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.process.wait()


# --- before anything is started -------------------------------------------------------------------


def test_the_secret_comes_from_the_environment_or_a_file_and_is_never_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"set RAY_AUTH_TOKEN, or give --ray-token-file"):
        ray_token(None)
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot be read"):
        ray_token(file)
    file.write_text(SECRET + "\n")
    assert ray_token(file) == SECRET
    monkeypatch.setenv(VARIABLE, SECRET)
    assert ray_token(None) == ray_token(file) == SECRET
    monkeypatch.setenv(VARIABLE, SECRET + "1")
    with pytest.raises(ConfigError, match="two different secrets"):
        ray_token(file)
    file.write_text("short")
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match="5 characters"):
        ray_token(file)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "127.0.0.9"], "either --head"),
        (["--host", "127.0.0.1", "--head"], "the other nodes cannot reach"),
        (["--host", "127.0.0.9", "--join", "nowhere"], "expected HOST:PORT"),
        (["--host", "127.0.0.9", "--join", "127.0.0.9:9"], "start the head first"),
    ],
)
def test_a_node_that_cannot_be_says_why(options: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "taskbone", "node", "--port", str(free_port()), *options],
        cwd=ROOT,
        env={**os.environ, VARIABLE: SECRET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert said in re.sub(r"\s+", " ", done.stderr)


def test_there_are_so_many_replicas_for_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_LOOK_S", 0.0)
    alive: list[dict[str, object]] = [{}, {}]
    monkeypatch.setattr(spread, "living_nodes", lambda: alive)
    policy = spread.SameOnEveryNode(replicas=3)

    class Context:
        policy_state: dict[str, object] = {}

    assert policy(Context())[0] == 6
    alive.append({})
    time.sleep(0.001)
    assert policy(Context())[0] == 9


# --- while they run -------------------------------------------------------------------------------


def test_nodes_come_and_die_and_the_others_go_on(tmp_path: Path) -> None:
    with nodes(tmp_path, 3 if soak() else 2) as made:
        made.serve("tests.serving.fake_cluster", str(tmp_path / "store"), made.address)
        head, *others = made.nodes
        # Each node has a replica, and each front door answers for every task.
        for node in made.nodes:
            assert len(node.replicas()) == 1
            assert {"parity", "pairs"} == {
                task["task"] for task in node.ask("GET", "/v1/tasks").json()["tasks"]
            }
            assert node.predict("pairs", [["a", "b"]]).status_code == 200
        # What each replica logs comes out of its own node.
        for node in made.nodes:
            wait_until(lambda node=node: "taskbone.access" in node.output)  # type: ignore[misc]
        # They are on one board.
        for node in made.nodes:
            wait_until(lambda node=node: len(members(node)) == len(made.nodes))  # type: ignore[misc]
        # One that joins later serves everything.
        late = made.add()
        wait_until(lambda: answers(late))
        assert late.predict("parity", "a").status_code == 200
        wait_until(lambda: len(late.replicas()) == 1)
        wait_until(lambda: targets(head) == {node.address for node in made.nodes})
        # Each front door tells of its own machine's replica alone.
        assert [node.metric("taskbone_replicas") for node in made.nodes] == [1.0] * len(made.nodes)
        # One is killed: only what it had under way fails, and the others' doors go on.
        victim = others[0]
        with load(head.port, CLIENTS, host=head.host) as seen:
            seen.wait_for(100)
            kill(victim)
            over = time.monotonic()
            seen.wait_for(200)
        lost = [one for one in seen.outcomes if one.came != 200]
        assert {one.came for one in lost} <= {CUT, 503}
        assert len(lost) <= CLIENTS
        assert [one for one in lost if one.began > over + 0.5] == []
        assert answers(late)
        wait_until(lambda: victim.address not in targets(head))


def test_a_version_registered_through_one_node_is_served_through_the_other(
    tmp_path: Path,
) -> None:
    store, backbone = small_backbone(tmp_path / "tiny")
    with nodes(tmp_path, 2) as made:
        printed = made.serve(
            *("taskbone", "serve", "--store", str(store.root), "--ray-address", made.address),
            *("--replicas-per-node", "1"),
            *("--precision", "fp32", "--device", "cpu", "--engine-threads", "1"),
        )
        one, other = made.nodes
        assert one.address in printed
        for version, node in enumerate((one, other), 1):
            answer = node.admin(
                "POST",
                "/v1/tasks/mood/versions",
                content=random_artifact(backbone, "mood", seed=version),
            )
            assert answer.status_code == 201, answer.text
            assert answer.json()["status"] == "ready 2/2"
            for door in made.nodes:
                assert door.predict("mood", "a film").json()["version"] == version
        # A node that died is not waited for longer than a replica that says nothing.
        kill(other)
        answer = one.admin(
            "POST",
            "/v1/tasks/mood/versions",
            content=random_artifact(backbone, "mood", seed=9),
        )
        assert answer.status_code == 201, answer.text
        assert one.predict("mood", "a film").json()["version"] == 3
