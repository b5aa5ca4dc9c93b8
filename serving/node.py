"""`taskbone node`: one machine of a cluster: Ray as a child of this process, and its front door.

Starts no server: `taskbone serve --ray-address`, `serve run` or a RayService puts it onto the
cluster. Whatever ends the node, nothing that it started stays behind.
"""

import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from serving import (
    cluster_environment,
    deployment,
    haproxy,
    log_lines,
    processes,
    ray_token,
    startup,
)
from serving.config import MIB
from serving.errors import ConfigError, ServingError
from serving.replica import LOG
from serving.spread import PORT_LABEL

RAY_PORT = 6379
_RAY_LOG = "ray.log"
_STARTED = "Ray runtime started."
_START_S = 120
_REPLICA = "ray::ServeReplica"
"""How Ray names a replica's process."""
REPLICA_END_S = deployment.GRACE_S + 5
"""How long a node that stops waits for its replicas: their own time, and some to hear of it."""
_REPLICAS = 100
"""For so many replicas of one node there are ports."""
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_worker_prestart": "0",
    "OMP_NUM_THREADS": "1",
    # A node that died is given up after 5 s without an answer.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


def run(host: str, port: int, token: str, ray_port: int, join: str | None) -> None:
    """Be a node until SIGINT or SIGTERM: the head, unless `join` says where the head is.

    Blocks; must be called in the main thread. Raises `ConfigError` before anything is started
    where an address cannot be used, `ServingError` where Ray does not come up or ends.
    """
    console = Console(highlight=False)
    address = processes.check_address(host, port)
    if address in ("0.0.0.0", "::", "127.0.0.1", "::1"):  # noqa: S104 - compared
        raise ConfigError(
            f"--host {host}: the other nodes cannot reach this node there; give the address that "
            "this machine has in their network"
        )
    head = join or f"{address}:{ray_port}"
    if join:
        _check_head(join)
    else:
        processes.check_address(host, ray_port)
    processes.adopt_orphans()
    ray = None
    with (
        processes.Signals() as signals,
        processes.private_folder() as folder,
        log_lines.LineServer(folder / LOG),
    ):
        try:
            with startup.progress(console) as step:
                step("starting Ray")
                os.environ.update(_environment(folder, address, port, token))
                ray = _start_ray(folder, address, port, ray_port, join)
                if not join:
                    step("starting the front door")
                    _start_front_doors(head, port)
                    signals.install()
            _show(console, address, port, head, join is None)
            _watch("raylet", *(() if join else ("gcs_server",)))
        except KeyboardInterrupt as received:
            console.print(f"{received}: finishing the requests under way; Ctrl-C stops at once.")
        finally:
            with suppress(KeyboardInterrupt), signals.interruptible():
                # First the front door: Ray ends it without waiting for what is under way.
                haproxy.drain(folder, deployment.GRACE_S)
                if ray is not None:
                    _end_replicas(ray)
            processes.end_descendants(grace_s=2)


def _environment(folder: Path, address: str, port: int, token: str) -> dict[str, str]:
    block = processes.free_ports(_REPLICAS + 2)
    return {
        **cluster_environment.needed(),
        **haproxy.environment(folder, (address, port)),
        log_lines.VARIABLE: str(folder / LOG),
        **ray_token.variables(token),
        **_SETTINGS,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block + _REPLICAS + 1),
    }


def _start_front_doors(head: str, port: int) -> None:
    """Start Ray Serve on the head's Ray, which then gives every node its HAProxy."""
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation

    ray.init(address=head, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        # Where the replicas listen: the other nodes' HAProxies must reach them. Each HAProxy
        # listens where its own node says.
        http_options={"host": "0.0.0.0", "port": port},  # noqa: S104 - keys are asked for
        logging_config=deployment.QUIET,
    )
    ray.shutdown()


def _end_replicas(ray: "subprocess.Popen[bytes]") -> None:
    """Have Ray drain this node, and wait until its replicas have answered what the other nodes'
    front doors have given them, and are gone."""
    ray.terminate()
    deadline = time.monotonic() + REPLICA_END_S
    while processes.has_child(_REPLICA) and ray.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def _watch(*needed: str) -> None:
    """Return never. Raises `ServingError` when one of these processes is gone."""
    while all(processes.has_child(name) for name in needed):
        time.sleep(1)
    raise ServingError("Ray's processes have ended; start the node again")


def _start_ray(
    folder: Path, address: str, port: int, ray_port: int, join: str | None
) -> "subprocess.Popen[bytes]":
    """Start Ray below this process. Returns once it runs; raises `ServingError` if it ends."""
    place = (
        [f"--address={join}"]
        if join
        else ["--head", f"--port={ray_port}", "--include-dashboard=false"]
    )
    log = folder / _RAY_LOG
    with log.open("wb") as output:
        ray = subprocess.Popen(  # noqa: S603 - our own arguments
            [
                *processes.with_parent("TERM"),
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *place),
                f"--node-ip-address={address}",
                f"--labels={PORT_LABEL}={port}",
                f"--temp-dir={folder / 'r'}",
                # Any free ports. Ray's clients, whom nobody needs, get the replicas' last one.
                *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
                f"--ray-client-server-port={os.environ['RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT']}",
                # Nothing reserves a core, and nothing is put into the object store.
                "--num-cpus=1",
                f"--object-store-memory={80 * MIB}",
                "--disable-usage-stats",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal is for this process alone, which stops Ray in its turn.
            process_group=0,
        )
    deadline = time.monotonic() + _START_S
    while _STARTED not in (said := log.read_text(encoding="utf-8", errors="replace")):
        if ray.poll() is not None or time.monotonic() > deadline:
            raise ServingError(f"Ray does not start: {_reason(said)}")
        time.sleep(0.1)
    return ray


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _check_head(head: str) -> None:
    host, colon, port = head.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise ConfigError(f"--join {head}: expected HOST:PORT, as the head has printed it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"--join {head}: nothing answers there ({error}); start the head first, with "
            "`taskbone node --head`, and give the address that it prints"
        ) from error


def _show(console: Console, address: str, port: int, head: str, is_head: bool) -> None:
    lines = [f"Node of the cluster at {head}; its front door is http://{address}:{port}", ""]
    if is_head:
        lines += [
            f"join   taskbone node --join {head} --host ADDRESS, on other machines",
            f"serve  taskbone serve --ray-address {head}, on any of them",
        ]
    lines.append("stop   Ctrl-C")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
