"""The RayService without Kubernetes: the commands of its pods and its serve configuration, on this
machine. What the operator gives a pod in its environment is given as it would give it."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from model_store.backbone import Backbone
from model_store.store import Store
from serving import cluster_environment, haproxy, processes
from serving.ray_token import VARIABLE
from tests.abuse.traffic import Timeline, traffic
from tests.abuse.variants import Variant, make_variants
from tests.deploy.image import ROOT
from tests.deploy.manifests import of_kind
from tests.running import Server, free_port, running
from tests.waiting import wait_until

SECRET = "0123456789abcdef" * 4
CLIENTS = 2
TASK = "lasting"
(SERVICE,) = of_kind("ray-cpu", "RayService")
CLUSTER: dict[str, Any] = SERVICE["spec"]["rayClusterConfig"]


@dataclass
class Pods:
    """The head and the workers that run."""

    folder: Path
    store: Path
    stack: ExitStack
    gcs_port: int
    dashboard_port: int
    workers: list[Server] = field(default_factory=list)
    started: int = 0

    def start_head(self, folder: Path) -> Server:
        """The head, at ports that are free here; its files in `folder`."""
        group = CLUSTER["headGroupSpec"]
        parameters = {
            **group["rayStartParams"],
            "dashboard-host": address(0),
            "dashboard-port": self.dashboard_port,
            "dashboard-agent-listen-port": free_port(),
            "node-ip-address": address(0),
            "port": self.gcs_port,
            "ray-client-server-port": free_port(),
            "temp-dir": folder,
        }
        told = " ".join(f"--{name}={value}" for name, value in parameters.items())
        # A pod has all addresses to itself, and its front door takes them all; here it would take
        # the workers' too.
        door = self.folder / "haproxy"
        own = haproxy.launcher(cluster_environment.folder())
        door.write_text(
            f"#!/bin/sh\nsed -i 's#^ *bind [^ ]*:8000$#    bind {address(0)}:8000#' \"$3\"\n"
            f'exec sh {own} "$@"\n'
        )
        door.chmod(0o700)
        start = f"env RAY_SERVE_HAPROXY_BINARY_PATH={door} ray start --head --block {told}"
        given = {"KUBERAY_GEN_RAY_START_CMD": start}
        return self.stack.enter_context(
            self._pod(group["template"], "head", given, "will now block forever", address(0))
        )

    def add_worker(self) -> Server:
        """One more worker."""
        (group,) = CLUSTER["workerGroupSpecs"]
        self.started += 1
        number = self.started
        host = address(number)
        given = {"POD_IP": host, "FQ_RAY_IP": address(0), "RAY_PORT": str(self.gcs_port)}
        worker = self.stack.enter_context(
            self._pod(group["template"], f"worker-{number}", given, "stop ", host)
        )
        self.workers.append(worker)
        return worker

    def deploy(self, **arguments: object) -> None:
        """Give Ray Serve the service's configuration, as the operator does."""
        text = SERVICE["spec"]["serveConfigV2"]
        # The answers are compared with fp32, and on a busy machine nothing shall be refused.
        arguments = {"precision": "fp32", "max_queue_ms": 60_000, **arguments}
        told = "".join(f"\n      {name}: {value}" for name, value in arguments.items())
        config = self.folder / "serve.yaml"
        config.write_text(text.replace("    args:", f"    args:{told}"))
        place = f"http://{address(0)}:{self.dashboard_port}"
        done = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", "deploy", "--address", place, str(config)],
            env={**os.environ, "RAY_AUTH_MODE": "token", VARIABLE: SECRET},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _pod(
        self, template: dict[str, Any], name: str, given: dict[str, str], ready: str, host: str
    ) -> AbstractContextManager[Server]:
        """A template's container as a process."""
        (container,) = template["spec"]["containers"]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TASKBONE_STORE": str(self.store),
            "RAY_AUTH_MODE": "token",
            VARIABLE: SECRET,
            **given,
        }
        command = [*container["command"], *container["args"]]
        log = self.folder / f"{name}.log"
        return running(command, 8000, log, environment, ready, host, program=[])


def address(number: int) -> str:
    """The loopback address of a pod: every process that runs tests has its own."""
    return f"127.{os.getpid() % 250 + 1}.{os.getpid() // 250 % 250}.{number + 100}"


def answers(worker: Server) -> bool:
    """What the pod's readiness probe asks."""
    with suppress(httpx.TransportError):
        return worker.ask("GET", "/health/ready", headers={}).status_code == 200
    return False


def serves(worker: Server) -> bool:
    """Whether the pod answers, and has a replica of its own that does: only such a one is asked for
    metrics."""
    if not answers(worker) or worker.ask("GET", "/metrics").status_code != 200:
        return False
    return worker.metric("taskbone_replicas_ready") == 1


def pids(*workers: Server) -> list[int]:
    return [one.pid for worker in workers for one in worker.replicas()]


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]) -> Iterator[Pods]:
    """A head and two workers, which serve a copy of the tiny store."""
    folder = tmp_path_factory.mktemp("pods")
    shutil.copytree(tiny[0].root, folder / "store")
    with processes.private_folder() as short, ExitStack() as stack:
        made = Pods(folder, folder / "store", stack, free_port(), free_port())
        head = made.start_head(short / "r")
        below = head.descendants()
        workers = [made.add_worker() for _ in range(2)]
        made.deploy()
        for worker in workers:
            wait_until(lambda worker=worker: serves(worker))  # type: ignore[misc]
        below += head.descendants()
        assert head.replicas() == []
        yield made
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def variants(tiny: tuple[Store, Backbone]) -> list[Variant]:
    return make_variants(tiny[1], TASK, 2, seed=31)


def test_a_task_is_added_and_changed_and_no_process_ends(
    pods: Pods, variants: list[Variant]
) -> None:
    before = pids(*pods.workers)
    assert [len(pids(worker)) for worker in pods.workers] == [1, 1]
    for version, (worker, variant) in enumerate(zip(pods.workers, variants, strict=True), 1):
        answer = worker.admin("POST", f"/v1/tasks/{TASK}/versions", content=variant.data)
        assert answer.status_code == 201, answer.text
        assert answer.json()["status"] == "ready 2/2"
        for door in pods.workers:
            given = door.predict(TASK, "a cat")
            assert given.json()["version"] == version
    assert pids(*pods.workers) == before


def test_a_worker_that_stops_is_drained_and_another_takes_its_place(
    pods: Pods, variants: list[Variant]
) -> None:
    """Its front door and its replica answer what they have: no request is lost."""
    going, staying = pods.workers
    asked, made_of = {TASK: variants}, {(TASK, 2): 1}
    with (
        # Those who ask the pod that stays reach the other's replica, too.
        traffic(staying.port, CLIENTS, asked, staying.host) as there,
        traffic(
            going.port, CLIENTS, asked, going.host, others=[(staying.host, staying.port)]
        ) as here,
    ):
        for seen in (there, here):
            seen.wait_for(50)
        assert going.stop(signal.SIGTERM) == []
        pods.workers.remove(going)
        for seen in (there, here):
            seen.wait_for(50)
    assert there.failed() + here.failed() == []
    right = {TASK: Timeline(frozenset([2]))}
    assert there.wrong(right, made_of) + here.wrong(right, made_of) == []
    late = pods.add_worker()
    wait_until(lambda: serves(late))
    assert late.predict(TASK, "a cat").json()["version"] == 2


def test_a_change_of_settings_replaces_one_replica_after_the_other(
    pods: Pods, variants: list[Variant]
) -> None:
    """A pod's replica ends before its next one begins: meanwhile the other pod's answers all."""
    before = pids(*pods.workers)
    assert len(before) == 2
    with ExitStack() as stack:
        doors = [
            stack.enter_context(traffic(pod.port, CLIENTS, {TASK: variants}, pod.host))
            for pod in pods.workers
        ]
        for seen in doors:
            seen.wait_for(20)
        pods.deploy(max_inputs=64)
        wait_until(lambda: len(now := pids(*pods.workers)) == 2 and not set(now) & set(before))
        for seen in doors:
            seen.wait_for(20)
    assert [one for seen in doors for one in seen.failed()] == []
