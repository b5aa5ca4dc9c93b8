"""`taskbone serve`: a private Ray on this machine, one Ray Serve deployment whose replicas each
hold HTTP, queue and engine in one process, and HAProxy in front of them.

Knows Ray; nothing of models. Whatever ends the server, nothing that it started stays behind: no
process, and no file outside the store.
"""

import gc
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from model_store.store import open_store
from serving import haproxy, processes, startup
from serving.config import METRICS_FOLDER_VARIABLE, MIB, ServeConfig
from serving.errors import ServingError
from serving.keys import Key, KeyRing
from serving.local_key import environment_keys, prepare

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from serving.api import Service
    from serving.board import Board
    from serving.metrics import Metrics

OpenService = Callable[[ServeConfig, "Metrics", "Board", str, Path | None], "Service"]
"""Makes a replica's service: settings, metrics, the board of all replicas, this replica's name, and
the folder in which those of one machine share the backbone's memory; None for one alone."""

NAME = "taskbone"
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_RAY = "r"
_LOG = "replicas.log"
_SPARE_PORTS = 16
GRACE_S = 20
"""How long requests under way may take to finish when the server stops."""
LOOK_BACK_S = 10.0
"""The load is the mean over so many seconds."""
UPSCALE_S = 5.0
"""How long the load must have been too high before a replica is started."""
DOWNSCALE_S = 300.0
"""How long the load must have been low before one is ended."""


def open_service(
    config: ServeConfig,
    metrics: "Metrics",
    board: "Board",
    replica_id: str,
    weights_folder: Path | None,
) -> "Service":
    """The real service. Imports torch, so only replicas call it."""
    from serving.service import Service

    return Service.open(config, metrics, board, replica_id, end_process, weights_folder)


def end_process() -> None:
    """End this replica now: requests that it cannot answer any more go to others at once.

    Ray would notice at its next look, and wait for answers that will never come.
    """
    logging.getLogger("taskbone").error("the engine has died; this replica ends")
    logging.shutdown()
    os._exit(1)


class Replica:
    """One process that answers requests. Ray makes it, asks for its application and its health."""

    def __init__(
        self, config: ServeConfig, log: Path, open_service: OpenService, keys: tuple[Key, ...]
    ) -> None:
        from serving.app import build_app
        from serving.metrics import Metrics
        from serving.shared_board import RayBoard, connect

        logging.basicConfig(
            filename=log,
            level=logging.WARNING,
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        metrics = Metrics()
        board = RayBoard(connect(NAME))
        # One process alone has its weights in huge pages, which a shared file has not everywhere.
        weights_folder = log.parent / "weights" if config.most_replicas > 1 else None
        self._service = open_service(config, metrics, board, replica_id(), weights_folder)
        self._keys = KeyRing(open_store(config.store), keys).watch()
        self._app = build_app(self._service, metrics, config, self._keys)
        # What is there now stays. A large body of many small things would otherwise have the
        # collector look at all of it again and again, and every other request wait for seconds.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        return self._app

    def check_health(self) -> None:
        """Raise when the engine is dead or stuck; Ray then replaces this process."""
        self._service.check()

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()
        if hasattr(self, "_keys"):
            self._keys.close()


def replica_id() -> str:
    """Who this replica is: Ray's name for it, its node and its process."""
    import ray
    from ray import serve

    replica = serve.get_replica_context().replica_id.unique_id
    node = ray.get_runtime_context().get_node_id()
    return f"{replica}-{node[:12]}-{os.getpid()}"


def run(config: ServeConfig, open_service: OpenService = open_service) -> None:
    """Serve until SIGINT or SIGTERM. Blocks; must be called in the main thread.

    Raises `ConfigError` before anything is started where the keys or the address cannot be used,
    `ServingError` where the server does not come up or its processes end. A signal ends it well.
    """
    console = Console(highlight=False)
    keys = environment_keys()
    token = prepare(config, open_store(config.store))
    address = processes.check_address(config.host, config.port)
    processes.adopt_orphans()
    with processes.Signals() as signals, processes.private_folder() as folder:
        try:
            with startup.progress(console) as step:
                step("starting Ray")
                os.environ.update(environment(config, folder, address))
                _start(config, folder, signals)
                step(f"loading the backbone and the tasks in {config.replicas} replica(s)")
                _deploy(config, folder, open_service, keys)
                tasks = startup.wait_until_ready(config, token)
            startup.show(console, config, token, tasks)
            _watch(folder / _LOG)
        except KeyboardInterrupt as received:
            console.print(f"{received}: finishing the requests under way; Ctrl-C stops at once.")
        finally:
            _stop(signals, folder)


def environment(config: ServeConfig, folder: Path, address: str) -> dict[str, str]:
    """The variables that Ray reads when it is imported or started."""
    ports = config.most_replicas + _SPARE_PORTS
    block = processes.free_ports(ports)
    return haproxy.environment(folder, address, config.port) | {
        # Requests are parsed and answered on the replica's own event loop, and not through a queue.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Everything that Ray opens is for this machine alone, and for who knows the token.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block + ports - 1),
        # A replica that goes stays open until HAProxy has heard of it: no request meets its end.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        # One whose engine is stuck has no answers to wait for.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # On a busy machine the front door takes longer than Ray's 5 s to start.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_worker_prestart": "0",
        # Ray would let every other process of the machine go first.
        "RAY_worker_niceness": "0",
        # The engine's thread sets its own number. If other threads made teams of their own, OpenMP
        # would count more threads than cores, and each of ours would sleep between operations.
        "OMP_NUM_THREADS": "1",
    }


def _start(config: ServeConfig, folder: Path, signals: processes.Signals) -> None:
    """A Ray of our own, with nothing in it but its front door."""
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation

    ray.init(
        # Never a Ray that happens to run already.
        address="local",
        # Nothing reserves a core; one is the least that Ray takes.
        num_cpus=1,
        include_dashboard=False,
        # Nothing is put into the object store; this is near the least that Ray takes.
        object_store_memory=80 * MIB,
        logging_level=logging.ERROR,
        log_to_driver=False,
        # Ray opens this folder to everybody; the one around it stays ours alone.
        _temp_dir=str(folder / _RAY),
    )
    signals.install()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        # The front door alone listens to the address that was asked for.
        http_options={"host": "127.0.0.1", "port": config.port},
        logging_config=_QUIET,
    )


def _deploy(
    config: ServeConfig, folder: Path, open_service: OpenService, keys: tuple[Key, ...]
) -> None:
    """Start the replicas; return when all have loaded what they need."""
    from ray import serve

    metrics_folder = folder / "metrics"
    metrics_folder.mkdir()
    (folder / _LOG).touch()
    deployment = serve.deployment(
        name=NAME,
        **_scaling(config),
        # The engine's queue decides what is too much.
        max_ongoing_requests=1_000_000,
        max_queued_requests=-1,
        ray_actor_options={
            # Replicas share the cores: the engine says how many threads it takes.
            "num_cpus": 0,
            # For the replicas alone: Ray's own processes would write their metrics there too.
            "runtime_env": {"env_vars": {METRICS_FOLDER_VARIABLE: str(metrics_folder)}},
        },
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.1,
        # A dead process is seen at the next look; a silent one after three of them.
        health_check_period_s=1,
        health_check_timeout_s=10,
        logging_config=_QUIET,
    )(serve.ingress()(Replica))
    # The environment's keys go along, as hashes: other machines have another environment.
    application = deployment.bind(config, folder / _LOG, open_service, keys)
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        reason = _reason(serve.status(), error)
        raise ServingError(f"the replicas did not start: {reason}") from error


def _scaling(config: ServeConfig) -> dict[str, Any]:
    """How many replicas there are, as Ray Serve is told."""
    if not config.max_replicas:
        return {"num_replicas": config.replicas}
    return {
        "autoscaling_config": {
            "initial_replicas": config.replicas,
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "metrics_interval_s": 1.0,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UPSCALE_S,
            "downscale_delay_s": DOWNSCALE_S,
        }
    }


def _reason(status: Any, error: Exception) -> str:
    """The last line of what the first failed replica said."""
    for application in status.applications.values():
        for deployment in application.deployments.values():
            if lines := [line for line in deployment.message.splitlines() if line.strip()]:
                return str(lines[-1]).strip()
    return str(error)


def _watch(log: Path) -> None:
    """Pass on what the replicas log. Raises `ServingError` when Ray's processes have ended."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        while processes.has_child("raylet") and processes.has_child("gcs_server"):
            sys.stderr.write(lines.read())
            sys.stderr.flush()
            time.sleep(1)
    raise ServingError("Ray's processes have ended; start the server again")


def _stop(signals: processes.Signals, folder: Path) -> None:
    """End everything that was started: gently, until a further signal comes, then at once."""
    if ray := sys.modules.get("ray"):
        with suppress(KeyboardInterrupt), signals.interruptible():
            haproxy.drain(folder, GRACE_S)
        with suppress(Exception):
            ray.shutdown()
    processes.end_descendants(grace_s=2)
