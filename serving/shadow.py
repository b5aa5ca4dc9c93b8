"""Has a task's shadow version answer what its active version has answered, and counts how often
they agree. Nobody waits for it, and when the engine is busy it gives way.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from model_store.errors import InputError
from model_store.manifest import TextInput
from serving.engine import Engine, EngineAnswer
from serving.errors import OverloadedError, ServingError
from serving.metrics import Metrics
from serving.tasks import LoadedVersion, TaskTable

MOST_WAITING = 64
"""Comparisons under way; beyond them, requests are not compared and counted as `skipped`."""

KEY = "taskbone-shadow"
WEIGHT = 0.05
"""All shadows share the queue and the turns as one caller of this weight would: where callers want
all of the engine, a twentieth of one caller's share is left to them."""

logger = logging.getLogger("taskbone.shadow")


class Shadow:
    """Compares in the background. For the event loop's thread."""

    def __init__(self, engine: Engine[Any], tasks: TaskTable, metrics: Metrics) -> None:
        self._engine = engine
        self._tasks = tasks
        self._metrics = metrics
        self._running: set[asyncio.Task[None]] = set()

    def compare(
        self,
        active: LoadedVersion,
        shadow: LoadedVersion,
        inputs: Sequence[TextInput],
        answer: EngineAnswer,
    ) -> None:
        """Ask the shadow the same, later."""
        if len(self._running) >= MOST_WAITING:
            self._metrics.shadow(active.info.task, "skipped", len(inputs))
            return
        self._tasks.hold(shadow)
        task = asyncio.create_task(self._compare(active, shadow, inputs, answer))
        # A task that nobody refers to may be collected before it ends.
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(
        self,
        active: LoadedVersion,
        shadow: LoadedVersion,
        inputs: Sequence[TextInput],
        answer: EngineAnswer,
    ) -> None:
        name = active.info.task
        try:
            other = await asyncio.wrap_future(
                self._engine.submit(
                    shadow.servable,
                    shadow.texts.encode(inputs),
                    key=KEY,
                    weight=WEIGHT,
                    observed=False,
                )
            )
        except OverloadedError:
            self._metrics.shadow(name, "skipped", len(inputs))
        except (ServingError, InputError) as error:
            self._metrics.shadow(name, "failed", len(inputs))
            logger.warning("task %s: the shadow gave no answer: %s", name, error)
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            self._metrics.shadow(name, "failed", len(inputs))
            # Not what the error says, which may quote a text.
            logger.error("task %s: the shadow failed: %s", name, type(error).__name__)
        else:
            given = _labels(active, answer.probabilities)
            found = _labels(shadow, other.probabilities)
            same = sum(one == two for one, two in zip(given, found, strict=True))
            self._metrics.shadow(name, "same", same)
            self._metrics.shadow(name, "different", len(inputs) - same)
        finally:
            self._tasks.release(shadow)


def _labels(version: LoadedVersion, probabilities: NDArray[Any]) -> list[str]:
    return [version.info.labels[best] for best in probabilities.argmax(axis=1).tolist()]
