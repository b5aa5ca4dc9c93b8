"""Where Prometheus finds the metrics: the front door of each node. Each answers for its machine.

Knows Ray's nodes where the server is on a cluster. A server alone is where its settings say: what a
request calls it may be the name of a proxy before it.
"""

import socket
from dataclasses import dataclass

from serving.config import ServeConfig
from serving.spread import PORT_LABEL, front_doors

_ANY = ("0.0.0.0", "::", "")  # noqa: S104 - compared
_ELSEWHERE = ("203.0.113.1", 9)


@dataclass(frozen=True, slots=True)
class Target:
    """One node, as Prometheus' HTTP service discovery describes it."""

    targets: tuple[str, ...]
    """Its one address, HOST:PORT."""
    labels: dict[str, str]


def targets(config: ServeConfig) -> list[Target]:
    """Every front door that there is. Asks Ray on a cluster: not for the event loop's thread."""
    if config.ray_address is None:
        host = _own_address() if config.host in _ANY else config.host
        return [_target(host, config.port, socket.gethostname())]
    return [
        _target(
            node["NodeManagerAddress"],
            int(node["Labels"].get(PORT_LABEL, config.port)),
            node["NodeManagerHostname"],
        )
        for node in front_doors()
    ]


def _target(host: str, port: int, node: str) -> Target:
    bare = ":" in host and not host.startswith("[")
    return Target((f"[{host}]:{port}" if bare else f"{host}:{port}",), {"node": node})


def _own_address() -> str:
    """This machine's address in its network; its name where it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)  # which sends nothing, and chooses the way there
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
