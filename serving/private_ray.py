"""`taskbone serve` by itself: a Ray on this machine that is ours alone, with the replicas in it and
HAProxy in front of them.

Knows Ray; nothing of models. Whatever ends the server, nothing that it started stays behind: no
process, and no file outside the store.
"""

import logging
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from model_store.store import open_store
from serving import deployment, haproxy, log_lines, logs, processes, startup
from serving.cluster_environment import COMMON
from serving.config import MIB, ServeConfig
from serving.errors import ServingError
from serving.local_key import environment_keys, prepare
from serving.replica import LOG, OpenService, open_service
from serving.tracing import SENT_S

_RAY = "r"
_SPARE_PORTS = 16
_LEAST_MESSAGE = 4 * MIB
"""Room for any answer over gRPC."""


def run(
    config: ServeConfig, open_service: OpenService = open_service, *, as_json: bool = False
) -> None:
    """Serve until SIGINT or SIGTERM. Blocks; must be called in the main thread.

    `as_json`: say on the standard output nothing but one line of JSON, when it is ready. Raises
    `ConfigError` before anything is started where the keys or the address cannot be used,
    `ServingError` where the server does not come up or its processes end. A signal ends it well.
    """
    with logs.of_main_process(config, as_json) as console:
        _run(config, open_service, console, as_json)


def _run(config: ServeConfig, open_service: OpenService, console: Console, as_json: bool) -> None:
    keys = environment_keys()
    token = prepare(config, open_store(config.store))
    address = processes.check_address(config.host, config.port)
    if config.grpc_port:
        processes.check_address(config.host, config.grpc_port)
    processes.adopt_orphans()
    with (
        processes.Signals() as signals,
        processes.private_folder() as folder,
        log_lines.LineServer(folder / LOG),
    ):
        try:
            with startup.progress(console) as step:
                step("starting Ray")
                os.environ.update(environment(config, folder, address))
                _start(config, folder, signals)
                step(f"loading the backbone and the tasks in {config.replicas} replica(s)")
                deployment.start(deployment.bind(config, folder, keys, open_service))
                tasks = startup.wait_until_ready(config, token)
            startup.announce(console, config, token, tasks, as_json)
            _watch()
        except KeyboardInterrupt as received:
            console.print(f"{received}: finishing the requests under way; Ctrl-C stops at once.")
        finally:
            _stop(signals, folder, SENT_S if config.otlp_endpoint else log_lines.LAST_S)


def environment(config: ServeConfig, folder: Path, address: str) -> dict[str, str]:
    """The variables that Ray reads when it is imported or started."""
    ports = config.most_replicas + _SPARE_PORTS
    block = processes.free_ports(2 * ports)
    return {
        **COMMON,
        **haproxy.environment(folder, (address, config.port)),
        log_lines.VARIABLE: str(folder / LOG),
        # Everything that Ray opens is for this machine alone, and for who knows the token.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block + ports - 1),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(block + ports),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(block + ports + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(block + 2 * ports - 1),
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(config.max_body_bytes, _LEAST_MESSAGE)),
        "RAY_enable_metrics_collection": "0",
        "RAY_enable_worker_prestart": "0",
        # This process lays out no tensors, and neither does Ray.
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
        grpc_options=_grpc_options(config),
        logging_config=deployment.QUIET,
    )


def _grpc_options(config: ServeConfig) -> dict[str, Any] | None:
    """What is spoken over gRPC. Ray would answer who asks for the list of it without a key."""
    if not config.grpc_port:
        return None
    return {
        "port": config.grpc_port,
        "grpc_servicer_functions": ["serving.protocols.grpc_messages.add_to_server"],
        "enable_reflection": False,
    }


def _watch() -> None:
    """Return never. Raises `ServingError` when Ray's processes have ended."""
    while processes.has_child("raylet") and processes.has_child("gcs_server"):
        time.sleep(1)
    raise ServingError("Ray's processes have ended; start the server again")


def _stop(signals: processes.Signals, folder: Path, last_s: float) -> None:
    """End everything that was started: gently, until a further signal comes, then at once."""
    if ray := sys.modules.get("ray"):
        with suppress(KeyboardInterrupt), signals.interruptible():
            haproxy.drain(folder, deployment.GRACE_S)
            # What the replicas tell of their last requests is on its way.
            time.sleep(last_s)
        with suppress(Exception):
            ray.shutdown()
    processes.end_descendants(grace_s=2)
