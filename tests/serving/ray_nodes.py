"""Several Ray nodes on this machine, each as it would be on its own.

`python -m tests.serving.ray_nodes FOLDER HEAD_PORT OTHER_PORT`: starts a head, prints its address,
and does what the lines of its input say: `add plain` and `add good` start a node without and with
the variables that the server needs, `remove` ends it. At the end of the input all ends.
"""

import os
import sys
from pathlib import Path
from typing import Any

from serving import processes
from serving.cluster_environment import environment


def main(folder: str, head_port: str, other_port: str) -> None:
    """Until the input ends."""
    processes.adopt_orphans()
    block = processes.free_ports(20)
    plain = dict(os.environ) | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(block),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(block + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(block + 17),
        # What Ray has for several nodes on one machine; the head keeps the port it was told.
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": other_port,
    }
    good = plain | environment()
    os.environ.update(good)
    import ray._private.utils
    from ray.cluster_utils import Cluster

    # Nobody else on this machine shall take this Ray for its own.
    ray._private.utils.write_ray_address = lambda *_: None
    common: dict[str, Any] = {"object_store_memory": 80 * 1024 * 1024, "include_log_monitor": False}
    cluster: Any = Cluster(
        initialize_head=True,
        head_node_args={
            **common,
            "include_dashboard": False,
            "dashboard_agent_listen_port": block + 18,
            "temp_dir": str(Path(folder) / "r"),
        },
    )
    say(cluster.address)
    others: list[Any] = []
    for line in sys.stdin:
        match line.split():
            case ["add", kind]:
                os.environ.clear()
                os.environ.update(good if kind == "good" else plain)
                others.append(cluster.add_node(**common))
            case ["remove"]:
                cluster.remove_node(others.pop())
        say(line.strip())
    cluster.shutdown()
    processes.end_descendants(grace_s=2)


def say(line: str) -> None:
    """Tell the one who started this."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
