"""The real server and the real service on a tiny backbone, with little room and a slow engine, so
that requests wait and are refused, and plans make room for each other.

`python -m tests.deploy.slow_server STORE PORT`
"""

import sys
import time
from pathlib import Path
from typing import Any

from serving.board import Board
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.private_ray import run
from serving.replica import open_service

SLOWER_S = 0.02


def open_slow_service(
    config: ServeConfig, metrics: Metrics, board: Board, replica_id: str, weights: Path | None
) -> Any:
    """The real service, each of whose batches takes longer."""
    service: Any = open_service(config, metrics, board, replica_id, weights)
    answer = service._backend.answer

    def answer_later(items: Any, plans: Any) -> Any:
        time.sleep(SLOWER_S)
        return answer(items, plans)

    service._backend.answer = answer_later
    return service


def main(store: str, port: str) -> None:
    """Serve until a signal comes."""
    config = ServeConfig(
        store=Path(store),
        port=int(port),
        device="cpu",
        precision="fp32",
        engine_threads=1,
        max_queued_tokens=1500,
        plan_cache_bytes=200_000,
    )
    run(config, open_slow_service)


if __name__ == "__main__":
    main(*sys.argv[1:])
