"""The real server and the real service on a tiny backbone, with a fault that can be asked for.

`python -m tests.abuse.tiny_server STORE PORT REPLICAS`. The text `DIE` ends the engine's thread of
the replica that it reaches.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.board import Board
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.private_ray import run
from serving.replica import open_service
from serving.types import PLAIN, Ask, TaskAnswer, TextInput

DIE = "the engine shall die now"


def open_mortal_service(
    config: ServeConfig, metrics: Metrics, board: Board, replica_id: str, weights: Path | None
) -> Any:
    """The real service, and `DIE`."""
    service: Any = open_service(config, metrics, board, replica_id, weights)
    predict, answer = service.predict, service._backend.answer
    doomed: list[str] = []

    async def listen(task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        if DIE in inputs:
            doomed.append(task)
        found: TaskAnswer = await predict(task, inputs, ask)
        return found

    def die(items: Any, plans: Any) -> Any:
        if doomed:
            raise SystemExit("as it was told")
        return answer(items, plans)

    service.predict, service._backend.answer = listen, die
    return service


def main(store: str, port: str, replicas: str) -> None:
    """Serve until a signal comes."""
    config = ServeConfig(
        store=Path(store),
        port=int(port),
        replicas=int(replicas),
        device="cpu",
        precision="fp32",
        engine_threads=1,
        # On a machine that does other things as well, nothing shall be refused.
        max_queue_ms=60_000,
    )
    run(config, open_mortal_service)


if __name__ == "__main__":
    main(*sys.argv[1:])
