"""The real server and the real service on a tiny backbone, logging all that there is to log, with
faults that can be asked for.

`python -m tests.serving.told_server STORE PORT SETTINGS`, the settings as JSON. In every replica
the root logger is at DEBUG. A text that begins with `CRASH` makes an error that quotes it, one that
begins with `ENGINE` a forward that fails.
"""

import json
import logging
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

CRASH = "CRASH"
ENGINE = "ENGINE"


def open_told_service(
    config: ServeConfig, metrics: Metrics, board: Board, replica_id: str, weights: Path | None
) -> Any:
    """The real service, and the faults."""
    logging.getLogger().setLevel(logging.DEBUG)
    service: Any = open_service(config, metrics, board, replica_id, weights)
    predict, answer = service.predict, service._backend.answer
    doomed: list[str] = []

    async def listen(task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        first = inputs[0] if isinstance(inputs[0], str) else inputs[0][0]
        if first.startswith(CRASH):
            try:
                raise KeyError(first)
            except KeyError as error:
                raise ValueError(f"cannot read {first!r}") from error
        if first.startswith(ENGINE):
            doomed.append(task)
        found: TaskAnswer = await predict(task, inputs, ask)
        return found

    def fail(items: Any, plans: Any) -> Any:
        if doomed:
            doomed.pop()
            raise RuntimeError("the forward has failed as it was told")
        return answer(items, plans)

    service.predict, service._backend.answer = listen, fail
    return service


def main(store: str, port: str, settings: str) -> None:
    """Serve until a signal comes."""
    more: dict[str, Any] = json.loads(settings)
    plain = {"device": "cpu", "precision": "fp32", "engine_threads": 1}
    config = ServeConfig.of(store=Path(store), port=int(port), **plain, **more)
    run(config, open_told_service)


if __name__ == "__main__":
    main(*sys.argv[1:])
