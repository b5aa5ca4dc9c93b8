"""Several machines: real Ray nodes on this one, each at a loopback address of its own."""

import os
import re
import shutil
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

from model_store.backbone import Backbone
from model_store.store import Store
from serving import spread
from serving.errors import ConfigError
from serving.ray_token import VARIABLE, ray_token
from tests.abuse.traffic import CUT, Timeline, traffic
from tests.abuse.variants import Variant, make_variants
from tests.running import Server, free_port, running
from tests.waiting import wait_until

SECRET = "0123456789abcdef" * 4
CLIENTS = 3
TASK = "shared"
ROOT = Path(__file__).parents[2]


@dataclass
class Cluster:
    """Nodes that run, the head first."""

    folder: Path
    stack: ExitStack
    address: str
    nodes: list[Server] = field(default_factory=list)

    def add(self, again: Server | None = None) -> Server:
        """One more node, or one at the place of one that is no more."""
        number = self.nodes.index(again) + 1 if again else len(self.nodes) + 1
        # Every process has loopback addresses of its own, so that two runs of tests do not meet.
        host, port = f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}.{number + 1}", 8000
        place = ["--join", self.address] if self.nodes else ["--head"]
        if not self.nodes:
            self.address = f"{host}:{free_port()}"
            place += ["--ray-port", self.address.rpartition(":")[2]]
        command = ["-m", "taskbone", "node", *place, "--host", host, "--port", str(port)]
        log = self.folder / f"node-{number}-{len(self.nodes)}.log"
        node = self.stack.enter_context(
            running(command, port, log, {VARIABLE: SECRET}, "stop ", host)
        )
        self.nodes[number - 1 :] = [node, *self.nodes[number:]]
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
    leads: dict[str, object] = {"Labels": {spread.LABEL: spread.NONE}}
    alive: list[dict[str, object]] = [leads, {"Labels": {}}, {"Labels": {}}]
    monkeypatch.setattr(spread, "living_nodes", lambda: alive)
    policy = spread.SameOnEveryNode(replicas=3)

    class Context:
        policy_state: dict[str, object] = {}

    assert policy(Context())[0] == 6
    alive.append({"Labels": {}})
    time.sleep(0.001)
    assert policy(Context())[0] == 9


# --- while they run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]
) -> Iterator[Cluster]:
    """Three nodes with a replica each, which serve a copy of the tiny store."""
    folder = tmp_path_factory.mktemp("nodes")
    shutil.copytree(tiny[0].root, folder / "store")
    with nodes(folder, 3) as made:
        printed = made.serve(
            *("taskbone", "serve", "--store", str(folder / "store")),
            *("--ray-address", made.address, "--replicas-per-node", "1"),
            # The answers are compared with fp32, and on a busy machine nothing shall be refused.
            *("--precision", "fp32", "--engine-threads", "1", "--max-queue-ms", "60000"),
        )
        assert made.nodes[0].address in printed
        yield made


@pytest.fixture(scope="module")
def variants(tiny: tuple[Store, Backbone]) -> list[Variant]:
    return make_variants(tiny[1], TASK, 4, seed=41)


def register(node: Server, variant: Variant) -> str:
    """Publish a version through this node; on how many replicas it then was."""
    answer = node.admin("POST", f"/v1/tasks/{TASK}/versions", content=variant.data)
    assert answer.status_code == 201, answer.text
    assert answer.json()["version"] == variant.number + 1
    return str(answer.json()["status"])


def test_what_is_registered_through_one_node_is_served_through_all(
    cluster: Cluster, variants: list[Variant]
) -> None:
    assert [len(node.replicas()) for node in cluster.nodes] == [1, 1, 1]
    processes = [one.pid for node in cluster.nodes for one in node.replicas()]
    for node, variant in zip(cluster.nodes, variants, strict=False):
        assert register(node, variant) == "ready 3/3"
        for door in cluster.nodes:
            assert door.predict(TASK, "a cat").json()["version"] == variant.number + 1
    # Prometheus is told of all front doors, and each tells of its own machine's replica alone.
    assert targets(cluster.nodes[0]) == {node.address for node in cluster.nodes}
    assert [node.metric("taskbone_replicas") for node in cluster.nodes] == [1.0, 1.0, 1.0]
    # What each replica logs comes out of its own node.
    for node in cluster.nodes:
        wait_until(lambda node=node: "taskbone.access" in node.output)  # type: ignore[misc]
    # Nothing was deployed for it.
    assert [one.pid for node in cluster.nodes for one in node.replicas()] == processes


def test_a_node_is_killed_and_the_others_go_on_and_it_comes_back(
    cluster: Cluster, variants: list[Variant]
) -> None:
    head, victim, other = cluster.nodes
    timeline, made_of = Timeline(frozenset([3])), {(TASK, 3): 2, (TASK, 4): 3}
    with ExitStack() as asking:
        all_seen = [
            asking.enter_context(traffic(node.port, CLIENTS, {TASK: variants}, node.host))
            for node in (head, other)
        ]
        for seen in all_seen:
            seen.wait_for(50)
        kill(victim)
        over = time.monotonic()
        # On a busy machine, a front door may have lost sight of all replicas for a moment.
        wait_until(lambda: answers(other))
        # Who registers waits for a node that died no longer than for a replica that is silent.
        timeline.changing(frozenset([4]))
        register(other, variants[3])
        timeline.changed(frozenset([4]))
        for seen in all_seen:
            seen.wait_for(50)
    lost = [one for seen in all_seen for one in seen.failed()]
    wrong = [one for seen in all_seen for one in seen.wrong({TASK: timeline}, made_of)]
    assert [one for one in wrong if one not in lost] == []
    # What the node had under way, or what met it before its ports were gone.
    assert {one.status for one in lost} <= {CUT, 503}
    assert len(lost) <= 2 * CLIENTS
    assert [one for one in lost if one.began > over + 0.5] == []
    # It comes back, and gets its replica again.
    wait_until(lambda: victim.address not in targets(head))
    back = cluster.add(again=victim)
    wait_until(lambda: answers(back) and len(back.replicas()) == 1)
    assert back.predict(TASK, "a cat").json()["version"] == 4
    assert [len(node.replicas()) for node in (head, other, back)] == [1, 1, 1]
