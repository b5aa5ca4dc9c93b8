"""The replicas as one application of Ray Serve, in any Ray: how many there are, how they are looked
after, and how they are started.

`serving.deployment:application` is what `serve run`, `serve deploy` and Kubernetes' RayService
take.
"""

import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_store.store import CACHE_VARIABLE, STORE_VARIABLE, open_store
from serving.cluster_environment import check_process
from serving.config import ServeConfig
from serving.errors import ConfigError, ServingError
from serving.keys import Key
from serving.local_key import environment_keys, prepare
from serving.replica import NAME, OpenService, Replica, open_service
from serving.spread import LABEL, NONE, same_on_every_node

if TYPE_CHECKING:
    from ray.serve import Application

QUIET = {"log_level": "WARNING", "enable_access_log": False}
GRACE_S = 20
"""How long requests under way may take to finish when a replica or the server stops."""
_VARIABLES = {
    # The engine's thread sets its own number. If other threads made teams of their own, OpenMP
    # would count more threads than cores, and each of ours would sleep between operations.
    "OMP_NUM_THREADS": "1",
}
"""For the replicas alone, and not for Ray's own processes."""
LOOK_BACK_S = 10.0
"""The load is the mean over so many seconds."""
UPSCALE_S = 5.0
"""How long the load must have been too high before a replica is started."""
DOWNSCALE_S = 300.0
"""How long the load must have been low before one is ended."""


def application(settings: dict[str, Any]) -> "Application":
    """The application from the settings of `ServeConfig`, by their names. Where `store` or `cache`
    are not given, the environment of the Ray's nodes says them, as it does for the commands.

    For a Ray whose nodes were started with the variables of `taskbone ray-environment`.
    """
    check_process()
    variables = {"store": STORE_VARIABLE, "cache": CACHE_VARIABLE}
    found = {
        name: value for name, variable in variables.items() if (value := os.environ.get(variable))
    }
    config = ServeConfig.of(**{"ray_address": "auto", **found, **settings})
    prepare(config, open_store(config.store))
    return bind(config, common_folder(), environment_keys())


def common_folder() -> Path:
    """A new folder's path, which may be made on every node of a cluster."""
    return Path(f"/tmp/taskbone-{os.getuid()}") / secrets.token_hex(4)  # noqa: S108 - 0700


def bind(
    config: ServeConfig,
    folder: Path,
    keys: tuple[Key, ...],
    open_service: OpenService = open_service,
) -> "Application":
    """The application whose replicas share `folder` on each machine."""
    from ray import serve

    deployment = serve.deployment(
        name=NAME,
        **_scaling(config),
        # The engine's queue decides what is too much.
        max_ongoing_requests=1_000_000,
        max_queued_requests=-1,
        ray_actor_options={
            # Replicas share the cores: the engine says how many threads it takes.
            "num_cpus": 0,
            "label_selector": {LABEL: f"!{NONE}"},
            "runtime_env": {"env_vars": _VARIABLES},
        },
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.1,
        # A dead process is seen at the next look; a silent one after three of them.
        health_check_period_s=1,
        health_check_timeout_s=10,
        logging_config=QUIET,
    )(serve.ingress()(Replica))
    # The environment's keys go along, as hashes: other machines have another environment.
    return deployment.bind(config, folder, open_service, keys, _tracing_variables(config))


def start(application: "Application") -> None:
    """Start the replicas; return when all have loaded what they need."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.run(application, name=NAME, route_prefix="/")
    except RuntimeError as error:
        reason = _reason(serve.status(), error)
        raise ServingError(f"the replicas did not start: {reason}") from error


def _tracing_variables(config: ServeConfig) -> dict[str, str]:
    """The standard variables of OpenTelemetry, which an operator sets where the server is started.

    They are not among those above: Ray shows these to whoever looks at its state, and headers for a
    collector hold its password.
    """
    if config.otlp_endpoint is None:
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}


def _scaling(config: ServeConfig) -> dict[str, Any]:
    """How many replicas there are, as Ray Serve is told."""
    if config.replicas_per_node:
        if config.max_replicas:
            raise ConfigError("give either replicas_per_node or max_replicas, not both")
        return same_on_every_node(config.replicas_per_node)
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
