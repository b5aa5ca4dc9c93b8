"""The real server around the fake service.

`python -m tests.serving.fake_server STORE PORT [good|two|broken]`
"""

import sys
from pathlib import Path

from serving.board import Board
from serving.config import ServeConfig
from serving.deployment import run
from serving.errors import ConfigError, ServingError
from serving.metrics import Metrics
from tests.serving.fake_service import FakeService, open_fake_service


def open_broken_service(
    config: ServeConfig, metrics: Metrics, board: Board, replica_id: str
) -> FakeService:
    """What a replica does whose store is damaged."""
    raise ConfigError("the store holds no backbone")


def main(store: str, port: str, kind: str = "good") -> None:
    """Serve until a signal comes."""
    replicas = {"two": 2, "three": 3}.get(kind, 1)
    config = ServeConfig.of(store=Path(store), port=int(port), replicas=replicas)
    try:
        run(config, open_broken_service if kind == "broken" else open_fake_service)
    except ServingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
