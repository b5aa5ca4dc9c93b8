"""The variables with which the nodes of a Ray must be started so that this server runs on them.

Ray reads them once, when a node starts; they cannot be given later. Knows no Ray.
"""

import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

from model_store.durable import own_folder
from serving import haproxy
from serving.errors import ConfigError

COMMON = {
    # Requests are parsed and answered on the replica's own event loop, and not through a queue.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A replica that goes stays open until HAProxy has heard of it: no request meets its end.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # One whose engine is stuck has no answers to wait for.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # On a busy machine the front door takes longer than Ray's 5 s to start.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # A node that is told to stop is drained first. With more than a replica's own time to finish,
    # Ray Serve would wait for a substitute before it stops one, and on no other node is room.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "20",
    # Ray would let every other process of the machine go first.
    "RAY_worker_niceness": "0",
}
"""What is the same on every node, and on a machine alone."""

_MARK = "TASKBONE_RAY_ENVIRONMENT"
"""Says that a node's HAProxy is ours, and which; Ray's own would do without."""

_LOGS = {"RAY_ROTATION_MAX_BYTES": str(100 << 20), "RAY_ROTATION_BACKUP_COUNT": "3"}
"""Replicas' lines go into files of Ray there, which would grow with every request."""

HOW = 'eval "$(taskbone ray-environment)"'


def environment() -> dict[str, str]:
    """All of a node's variables; what they point to is written."""
    own_folder(folder())
    return {**needed(), **haproxy.environment(folder(), None), **_LOGS}


def folder() -> Path:
    """Where what HAProxy needs lies; the same for all nodes that this user has on a machine."""
    return Path(tempfile.gettempdir()) / f"taskbone-{os.getuid()}-haproxy"


def exports() -> str:
    """The variables as lines for a shell."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment().items())
    )


def missing(given: Mapping[str, str | None]) -> list[str]:
    """What is absent from a node's environment or other than it should be, as `NAME=value`."""
    return [f"{name}={value}" for name, value in needed().items() if given.get(name) != value]


def needed() -> dict[str, str]:
    """The variables that `missing` looks at."""
    return {_MARK: "1", **COMMON, **haproxy.FIXED}


def check(given: Mapping[str, str | None], node: str) -> None:
    """Raise `ConfigError` where a node was started without what it needs."""
    if absent := missing(given):
        raise ConfigError(
            f"{node} was started without {' '.join(absent)}: stop it, and before 'ray start' run "
            f"there: {HOW}"
        )


def check_process() -> None:
    """Raise `ConfigError` where this process' own environment lacks something."""
    check(os.environ, "the Ray node of this process")
