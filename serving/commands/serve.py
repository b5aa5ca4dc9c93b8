"""`taskbone serve`, and what it needs on a cluster: `taskbone node`, `taskbone ray-environment`.

Every setting of the server is an option here. Ray is imported inside the commands.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from model_store.options import json_option, store_option
from model_store.store import CACHE_VARIABLE, Store
from serving.config import ServeConfig

SERVE_HELP = {
    "cache": "This machine's folder for the backbones of an object store.",
    "backbone": "Name or start of the fingerprint of the backbone; needed where there are several.",
    "host": "Address to listen on; 0.0.0.0 for all of this machine's.",
    "port": "Port to listen on.",
    "grpc_port": "Port for the Open Inference Protocol over gRPC; 0 for none.",
    "ray_address": "Serve on this running Ray, HOST:PORT or auto; see taskbone ray-environment.",
    "replicas": "Processes that answer requests; with --max-replicas, those at the start.",
    "min_replicas": "Fewest replicas, where their number follows the load.",
    "max_replicas": "Most replicas; 0: their number does not follow the load.",
    "replicas_per_node": "With --ray-address: replicas of every node, also of later ones.",
    "target_ongoing_requests": "Requests under way for each replica above which more are started.",
    "device": "Where to compute; auto takes CUDA where there is one.",
    "precision": "Number format; auto takes bf16 where the processor has it, int8 is faster.",
    "engine_threads": "Threads of one replica's forward; 0 for all cores.",
    "max_batch_tokens": "Most tokens in one forward; 0: as many as are efficient here, measured.",
    "max_queued_tokens": "Most tokens waiting; more are answered with 503.",
    "max_queue_ms": "Longest wait; what would wait longer is answered with 503 or 429 at once.",
    "max_inputs": "Most inputs in one request.",
    "max_body_bytes": "Largest body of a question.",
    "max_artifact_bytes": "Largest artifact that may be uploaded.",
    "body_timeout_s": "Seconds that a request's body may take to come.",
    "plan_cache_bytes": "Memory for overlays made ready to run.",
    "signature_key": "Public key (PEM) with which every uploaded artifact must be signed.",
    "auth": "Whether every route but health needs a key; without, only changes do.",
    "log_format": "How the lines of the log are written; json: one object a line.",
    "access_log": "Whether each answered request is a line of the log.",
    "otlp_endpoint": "Send OpenTelemetry spans to this collector: http://HOST:4318; else to none.",
}
_VARIABLES = {"cache": CACHE_VARIABLE, "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}
"""Environment variables that give a setting where no option does."""


def serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each setting of the server but the store, with the setting's own default."""
    for name, setting in reversed(ServeConfig.model_fields.items()):
        if name == "store":
            continue
        flag = f"--{name.replace('_', '-')}"
        choices = get_args(setting.annotation) if get_origin(setting.annotation) is Literal else ()
        kind = click.Choice(choices) if choices else type(setting.default)
        add = click.option(
            f"{flag}/--no-{flag[2:]}" if setting.annotation is bool else flag,
            type=str if setting.default is None else kind,
            metavar="FOLDER" if isinstance(setting.default, Path) else None,
            default=setting.default,
            show_default=setting.default is not None,
            envvar=_VARIABLES.get(name),
            show_envvar=name in _VARIABLES,
            help=SERVE_HELP.get(name),
        )
        command = add(command)
    return command


@click.command("serve", short_help="Answer requests for all tasks of the store.")
@store_option
@serve_options
@json_option
def serve(store: Store, as_json: bool, **settings: Any) -> None:
    """Answer requests for all tasks of the store over HTTP, until Ctrl-C.

    The first start makes a key for this machine, in the file token of the store; it is printed with
    a curl line that can be pasted as it is. TASKBONE_TOKEN sets another, TASKBONE_ADMIN_TOKEN one
    that may change what is served, and `taskbone keys` makes more. The routes are described at
    /docs.

    With --json, one line of JSON says on the standard output that the server is ready, where it is,
    what it serves and which file has the key; all else goes to the error stream.

    \b
    Examples:
        taskbone serve --port 8080 --max-batch-tokens 8192
        taskbone serve --json
    """
    config = ServeConfig.of(store=store.location, **settings)
    # What would stop every replica is said before the seconds that starting Ray takes.
    store.backbone(config.backbone)
    if config.signature_key is not None:
        from model_store.signatures import check_key

        check_key(config.signature_key)
    if config.otlp_endpoint:
        from serving.tracing import check_installed

        check_installed()
    if config.ray_address:
        from serving import cluster

        cluster.run(config, as_json=as_json)
    else:
        from serving import private_ray

        private_ray.run(config, as_json=as_json)


@click.command("ray-environment", short_help="Print what a Ray's nodes must be started with.")
def ray_environment() -> None:
    """Print the variables that the nodes of a Ray need to be started with.

    For `taskbone serve --ray-address` and for `serve deploy`. On every node, before `ray start`:
    eval "$(taskbone ray-environment)". It writes what HAProxy needs into a folder of this user's
    below /tmp.

    \b
    Example:
        taskbone ray-environment
    """
    from serving.cluster_environment import exports

    click.echo(exports(), nl=False)


@click.command("node", short_help="Be one machine of a server over several.")
@click.option("--head", is_flag=True, help="Be the first node of a new cluster.")
@click.option("--join", metavar="HEAD:PORT", help="Where the cluster's head is.")
@click.option("--host", required=True, help="This machine's address; other nodes must reach it.")
@click.option("--port", default=8000, show_default=True, help="Port of its front door.")
@click.option("--ray-port", default=6379, show_default=True, help="With --head: Ray's own port.")
@click.option(
    "--ray-token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the secret that all nodes share.  [default: RAY_AUTH_TOKEN]",
)
def node_command(
    head: bool, join: str | None, host: str, port: int, ray_port: int, ray_token_file: Path | None
) -> None:
    """Be one machine of a server over several machines, until Ctrl-C.

    All nodes share a secret: RAY_AUTH_TOKEN, or a file. `taskbone serve --ray-address` puts the
    server onto the cluster; each node then answers for all tasks at its own address.

    \b
    Examples:
        taskbone node --head --host 10.0.0.1 --ray-token-file secret
        taskbone node --join 10.0.0.1:6379 --host 10.0.0.2 --ray-token-file secret
        taskbone serve --ray-address 10.0.0.1:6379 --replicas-per-node 1
    """
    if head == (join is not None):
        raise click.UsageError("give either --head, for the first node, or --join HEAD:PORT")
    from serving import node
    from serving.ray_token import ray_token

    node.run(host, port, ray_token(ray_token_file), ray_port, join)
