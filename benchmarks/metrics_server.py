"""The real server, whose metrics can be switched off and on, for `benchmarks.metrics`.

`python -m benchmarks.metrics_server STORE PORT`. A request with the text `ON` or `OFF` switches:
the same process is measured with and without, and nothing else differs.
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

ON = "the metrics shall count"
OFF = "the metrics shall count nothing"
COUNTING = (
    *("request", "timings", "batch", "queued", "rejected", "shadow"),
    *("plan_lookup", "plan_built", "plan_evicted", "plan_bytes"),
)
"""What the metrics do while requests are answered."""


def switch(metrics: Metrics, text: str) -> None:
    """Have the metrics count, or count nothing and write nothing."""
    for owner, names in ((metrics, COUNTING), (metrics._reporter, ("_write",))):
        for name in names:
            owner.__dict__.pop(name, None)
            if text == OFF:
                setattr(owner, name, _nothing)


def open_switched(
    config: ServeConfig, metrics: Metrics, board: Board, replica_id: str, weights: Path | None
) -> Any:
    """The real service, and the switch."""
    service: Any = open_service(config, metrics, board, replica_id, weights)
    predict = service.predict

    async def listen(task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        if inputs[0] in (ON, OFF):
            switch(metrics, str(inputs[0]))
        found: TaskAnswer = await predict(task, inputs, ask)
        return found

    service.predict = listen
    return service


def _nothing(*_: object, **__: object) -> None:
    pass


def main(store: str, port: str) -> None:
    """Serve until a signal comes."""
    run(ServeConfig.of(store=Path(store), port=int(port)), open_switched)


if __name__ == "__main__":
    main(*sys.argv[1:])
