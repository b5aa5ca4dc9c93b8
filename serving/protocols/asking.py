"""What the adapters share: which task is meant, and one question to it, counted under its name.

The native predict route is on the hot path and does the same for itself.
"""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError

from model_store.errors import ModelStoreError
from model_store.manifest import Frozen, describe
from serving.errors import InvalidInputError, ServingError
from serving.metrics import UNKNOWN_TASK
from serving.protocols.core import Service
from serving.protocols.exchange import Exchange
from serving.types import Ask, TaskAnswer, TextInput

Body = TypeVar("Body", bound=Frozen)


async def ask_task(
    service: Service, exchange: Exchange, task: str, inputs: Sequence[TextInput], ask: Ask
) -> TaskAnswer:
    """The task's answer; the exchange learns which version of which task it was."""
    try:
        answer = await service.predict(task, inputs, ask)
    except (Exception, asyncio.CancelledError):
        note_failure(service, exchange, task, ask.version)
        raise
    exchange.task, exchange.version = task, answer.version
    return answer


def note_failure(service: Service, exchange: Exchange, task: str, version: int | None) -> None:
    """Have a request without an answer counted under the version that would have given it.

    `version`: the one that the request names, if it names one.
    """
    try:
        chosen = service.chosen(task, Ask(exchange.request_id, version=version))
    except (ServingError, ModelStoreError):
        exchange.task = UNKNOWN_TASK
    else:
        exchange.task, exchange.version = task, chosen


def only_task(service: Service, exchange: Exchange, how: str) -> str:
    """The task of a request that names none: the only one that its key may ask.

    `how` says how a request names one.
    """
    names = [info.task for info in service.tasks() if exchange.caller.may(info.task)]
    if len(names) != 1:
        shown = ", ".join(names[:20]) or "none is served"
        raise InvalidInputError(f"the request names no task: {how}; tasks: {shown}")
    return names[0]


def parse(kind: type[Body], body: bytes) -> Body:
    """A body as a record. Raises `InvalidInputError` that names every wrong field."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise InvalidInputError(f"the body: {describe(error)}") from None
