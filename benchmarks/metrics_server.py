"""The real server, with its metrics or with none counted, for `benchmarks.metrics`.

`python -m benchmarks.metrics_server STORE PORT on|off`
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serving.board import Board
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.private_ray import run
from serving.replica import open_service

if TYPE_CHECKING:
    from serving.api import Service

COUNTING = (
    *("request", "timings", "batch", "queued", "rejected", "shadow", "start"),
    *("plan_lookup", "plan_built", "plan_evicted", "plan_bytes"),
)
"""What the metrics do while requests are answered."""


def open_silent(
    config: ServeConfig, metrics: Metrics, board: Board, replica_id: str, weights: Path | None
) -> "Service":
    """The real service, with metrics that count nothing and write nothing."""
    for name in COUNTING:
        setattr(metrics, name, _nothing)
    return open_service(config, metrics, board, replica_id, weights)


def _nothing(*_: object, **__: object) -> None:
    pass


def main(store: str, port: str, counting: str) -> None:
    """Serve until a signal comes."""
    config = ServeConfig.of(store=Path(store), port=int(port))
    run(config, open_service if counting == "on" else open_silent)


if __name__ == "__main__":
    main(*sys.argv[1:])
