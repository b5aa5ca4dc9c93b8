"""`taskbone serve --ray-address`: the replicas on the nodes of a Ray that runs already.

Knows Ray; nothing of models. Every node's HAProxy answers for all replicas. At the end the
application is taken out, and the Ray goes on.
"""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console

from model_store.store import open_store
from serving import cluster_environment, deployment, logs, processes, ray_token, startup
from serving.config import ServeConfig
from serving.errors import ConfigError, ServingError
from serving.local_key import environment_keys, prepare
from serving.replica import NAME, OpenService, open_service
from serving.shared_board import remove
from serving.spread import PORT_LABEL, living_nodes

_LOOK_S = 2.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(
    config: ServeConfig, open_service: OpenService = open_service, *, as_json: bool = False
) -> None:
    """Serve until SIGINT or SIGTERM. Blocks; must be called in the main thread of a node's process.

    `as_json`: say on the standard output nothing but one line of JSON, when it is ready. Raises
    `ConfigError` before anything is deployed where the nodes cannot serve, `ServingError`
    where the replicas do not come up or the Ray ends.
    """
    with logs.of_main_process(config, as_json) as console:
        _run(config, open_service, console, as_json)


def _run(config: ServeConfig, open_service: OpenService, console: Console, as_json: bool) -> None:
    # What is decided where the application is put together is decided as on the nodes.
    os.environ.update(cluster_environment.needed())
    if token := os.environ.get(ray_token.VARIABLE):
        os.environ.update(ray_token.variables(token))
    keys = environment_keys()
    key = prepare(config, open_store(config.store))
    with processes.Signals() as signals, startup.progress(console) as step:
        step(f"joining the Ray at {config.ray_address}")
        nodes = _join(config)
        signals.install()
        try:
            _check(config, nodes)
            step(f"loading the backbone and the tasks in {config.replicas} replica(s)")
            _open_doors(config)
            folder = deployment.common_folder()
            deployment.start(deployment.bind(config, folder, keys, open_service))
            reached = config.model_copy(update=_door(config))
            tasks = startup.wait_until_ready(reached, key)
            startup.announce(console, reached, key, tasks, as_json)
            _watch()
        except KeyboardInterrupt as received:
            console.print(f"{received}: finishing the requests under way; Ctrl-C stops at once.")
        finally:
            _leave(signals)


def _join(config: ServeConfig) -> list[dict[str, Any]]:
    """Connect to the Ray; gives its living nodes."""
    import ray

    address = config.ray_address or ""
    if "://" in address:
        raise ConfigError(
            f"ray_address {address!r}: a Ray is joined from one of its own nodes; expected "
            "HOST:PORT of its head, or auto"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"there is no Ray to join at {address!r}: {error}") from error
    return living_nodes()


def _check(config: ServeConfig, nodes: list[dict[str, Any]]) -> None:
    """Raise `ConfigError` unless every node was started so that replicas can serve there."""
    addresses = {node["NodeManagerAddress"] for node in nodes if PORT_LABEL not in node["Labels"]}
    if len(addresses) > 1 and config.host in _LOOPBACK:
        raise ConfigError(
            f"host {config.host}: the machines of this Ray must reach each other's replicas; "
            "start with --host 0.0.0.0"
        )
    for node, given in _environments(nodes).items():
        cluster_environment.check(given, node)


def _environments(nodes: list[dict[str, Any]]) -> Mapping[str, Mapping[str, str | None]]:
    """What each node's processes have of the variables that matter."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def read(names: list[str]) -> dict[str, str | None]:
        import os

        return {name: os.environ.get(name) for name in names}

    task = ray.remote(num_cpus=0)(read)
    asked = {
        f"the Ray node {node['NodeID'][:12]} at {node['NodeManagerAddress']}": task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(list(cluster_environment.needed()))
        for node in nodes
    }
    answers: list[dict[str, str | None]] = ray.get(list(asked.values()))
    return dict(zip(asked, answers, strict=True))


def _open_doors(config: ServeConfig) -> None:
    """HAProxy on every node with a replica. Where Ray Serve runs already, its doors are kept."""
    from ray import serve
    from ray.serve.config import ProxyLocation

    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options={"host": config.host, "port": config.port},
        logging_config=deployment.QUIET,
    )


def _door(config: ServeConfig) -> dict[str, Any]:
    """Host and port of a node whose HAProxy answers: this one, if it is one of them."""
    import ray
    from ray import serve

    nodes = {node["NodeID"]: node for node in living_nodes()}
    here = ray.get_runtime_context().get_node_id()
    doors = list(serve.status().proxies)
    node = nodes[here if here in doors or not doors else doors[0]]
    address = str(node["NodeManagerAddress"])
    if PORT_LABEL in node["Labels"]:
        return {"host": address, "port": int(node["Labels"][PORT_LABEL])}
    return {"host": config.host if config.host in _LOOPBACK else address}


def _watch() -> None:
    """Return never. Raises `ServingError` when the application or the Ray has gone."""
    from ray import serve

    while True:
        time.sleep(_LOOK_S)
        try:
            found = serve.status().applications.get(NAME)
        except Exception as error:
            raise ServingError(f"the Ray does not answer any more: {error}") from error
        if found is None:
            raise ServingError("the application was taken out of the Ray by someone else")


def _leave(signals: processes.Signals) -> None:
    """Take the application out: its replicas finish what they have begun."""
    import ray
    from ray import serve

    with suppress(KeyboardInterrupt, Exception), signals.interruptible():
        serve.delete(NAME)
        remove(NAME)
    with suppress(Exception):
        ray.shutdown()
