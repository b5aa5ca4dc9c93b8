"""The real server around the fake service.

`python -m tests.serving.fake_server STORE PORT [good|two|three|scaled|broken [GRPC_PORT]]`
"""

import sys
from pathlib import Path
from typing import Any

from serving import deployment
from serving.board import Board
from serving.config import ServeConfig
from serving.errors import ConfigError, ServingError
from serving.metrics import Metrics
from serving.private_ray import run
from tests.serving.fake_service import FakeService, open_fake_service

SETTINGS: dict[str, dict[str, Any]] = {
    "two": {"replicas": 2},
    "three": {"replicas": 3},
    "impatient": {"replicas": 2, "body_timeout_s": 2},
    "scaled": {"max_replicas": 2, "target_ongoing_requests": 3},
}


def open_broken_service(
    config: ServeConfig,
    metrics: Metrics,
    board: Board,
    replica_id: str,
    weights_folder: Path | None,
) -> FakeService:
    """What a replica does whose store is damaged."""
    raise ConfigError("the store holds no backbone")


def main(store: str, port: str, kind: str = "good", grpc_port: str = "0") -> None:
    """Serve until a signal comes."""
    ports = {"port": int(port), "grpc_port": int(grpc_port)}
    config = ServeConfig.of(store=Path(store), **ports, **SETTINGS.get(kind, {}))
    if kind == "scaled":
        deployment.LOOK_BACK_S = 2.0
        deployment.UPSCALE_S = deployment.DOWNSCALE_S = 1.0
    try:
        run(config, open_broken_service if kind == "broken" else open_fake_service)
    except ServingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
