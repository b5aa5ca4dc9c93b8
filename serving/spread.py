"""How many replicas a cluster has whose every node shall have the same number: Ray Serve asks.

Knows Ray. A node that joins gets its replicas, and with them its front door; one that is gone is
not made up for by others. A node may be told to have none: a head that does nothing but lead.
"""

import time
from typing import Any

PORT_LABEL = "taskbone-port"
"""Of nodes that `taskbone node` has started: the port of their HAProxy."""
LABEL = "taskbone-replicas"
"""A node's Ray label; with the value `NONE` it gets no replica."""
NONE = "none"
_LOOK_S = 0.5
_GONE_S = 1.0
"""How long a node must be gone before its replicas count as gone."""
_MOST_NODES = 1000


class SameOnEveryNode:
    """Ray Serve makes it from `policy`, and calls it several times a second."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._nodes = 1
        self._looked_at = float("-inf")

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas there shall be now."""
        now = time.monotonic()
        if now - self._looked_at > _LOOK_S:
            self._nodes, self._looked_at = max(1, len(_takers())), now
        return self._replicas * self._nodes, context.policy_state


def same_on_every_node(replicas: int) -> dict[str, Any]:
    """The options of a deployment with so many replicas on every node."""
    return {
        "max_replicas_per_node": replicas,
        "autoscaling_config": {
            "initial_replicas": replicas * max(1, len(_takers())),
            "min_replicas": 1,
            "max_replicas": replicas * _MOST_NODES,
            "policy": {
                "policy_function": "serving.spread:SameOnEveryNode",
                "policy_kwargs": {"replicas": replicas},
            },
            "upscale_delay_s": 0.0,
            "downscale_delay_s": _GONE_S,
        },
    }


def front_doors() -> list[dict[str, Any]]:
    """The living nodes that have one, which are those with replicas, and the head."""
    from ray import serve

    doors = serve.status().proxies
    return [node for node in living_nodes() if node["NodeID"] in doors]


def living_nodes() -> list[dict[str, Any]]:
    """The nodes, as Ray describes them; none where this process is in no cluster."""
    import ray

    if not ray.is_initialized():
        return []
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _takers() -> list[dict[str, Any]]:
    """The nodes that take replicas."""
    return [node for node in living_nodes() if node["Labels"].get(LABEL) != NONE]
