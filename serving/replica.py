"""One process that answers requests: what Ray makes, asks for its application and for its health.

Knows how the parts are put together; nothing of how many replicas there are, or where.
"""

import gc
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from model_store.durable import own_folder
from model_store.store import open_store
from serving import log_lines, logs, processes
from serving.config import ServeConfig
from serving.keys import Key, KeyRing
from serving.protocols.grpc_methods import GrpcMethods

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from serving.api import Service
    from serving.board import Board
    from serving.metrics import Metrics
    from serving.telemetry import Telemetry

OpenService = Callable[[ServeConfig, "Metrics", "Board", str, Path | None], "Service"]
"""Makes a replica's service: settings, metrics, the board of all replicas, this replica's name, and
the folder in which those of one machine share the backbone's memory; None for one alone."""

NAME = "taskbone"
LOG = "log"
"""The socket of a server by itself, in the folder that its replicas share."""
METRICS = "metrics"
_WEIGHTS = "weights"


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


class Replica(GrpcMethods):
    """Ray makes it in a process of its own."""

    def __init__(
        self,
        config: ServeConfig,
        folder: Path,
        open_service: OpenService,
        keys: tuple[Key, ...],
        environment: Mapping[str, str],
    ) -> None:
        """In `folder` the replicas of one machine have what they share; `environment`: variables
        of whoever put the application together, for where this process has none."""
        if not (folder / LOG).exists():  # there is nobody who would remove it
            processes.hold_folder(folder)
        # One front door answers for each node, and there may be several on a machine.
        metrics_folder = folder / METRICS / node_id()
        own_folder(metrics_folder)
        from serving.app import build_app
        from serving.guard import Guard
        from serving.metrics import Metrics
        from serving.protocols.grpc_calls import GrpcCalls
        from serving.shared_board import RayBoard, connect

        name = replica_id()
        telemetry = self._open_telemetry(config, name, environment)
        self._metrics = metrics = Metrics(metrics_folder)
        board = RayBoard(connect(NAME))
        # One process alone has its weights in huge pages, which a shared file has not everywhere.
        weights_folder = folder / _WEIGHTS if config.most_replicas > 1 else None
        self._service = open_service(config, metrics, board, name, weights_folder)
        self._keys = KeyRing(open_store(config.store), keys).watch()
        self._app = build_app(self._service, metrics, config, self._keys, telemetry)
        guard = Guard(self._keys, auth=config.auth)
        self._grpc = GrpcCalls(self._service, metrics, config, guard, telemetry)
        metrics.start(self._service.check)
        processes.free_memory()
        # What is there now stays. A large body of many small things would otherwise have the
        # collector look at all of it again and again, and every other request wait for seconds.
        gc.freeze()

    def _open_telemetry(
        self, config: ServeConfig, name: str, environment: Mapping[str, str]
    ) -> "Telemetry":
        from serving.telemetry import Telemetry
        from serving.tracing import open_tracing

        for variable, value in environment.items():
            os.environ.setdefault(variable, value)
        # To who has started Ray here, if that was ours; else to Ray's log of this process.
        write = log_lines.connect(os.environ.get(log_lines.VARIABLE, ""))
        writer = logs.start(config, write)
        self._tracing = open_tracing(config, name)
        access_log = logs.AccessLog(writer, config.log_format) if config.access_log else None
        return Telemetry(access_log, self._tracing)

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
        if hasattr(self, "_metrics"):
            self._metrics.close()
        if tracing := getattr(self, "_tracing", None):
            tracing.close()


def replica_id() -> str:
    """Who this replica is: Ray's name for it, its node and its process."""
    from ray import serve

    replica = serve.get_replica_context().replica_id.unique_id
    return f"{replica}-{node_id()}-{os.getpid()}"


def node_id() -> str:
    """Ray's name for this replica's node, short."""
    import ray

    return str(ray.get_runtime_context().get_node_id())[:12]
