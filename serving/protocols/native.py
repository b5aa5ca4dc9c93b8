"""The native routes that ask: predict with one task or many, and what there is to ask.

The predict route is the hot path: one parse, one service call, one serialization.
"""

import asyncio
import time
from collections.abc import Sequence

from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from serving.config import ServeConfig
from serving.errors import ServingError
from serving.inputs import parse_inputs, parse_many
from serving.metrics import UNKNOWN_TASK
from serving.protocols import native_docs as docs
from serving.protocols.asking import note_failure
from serving.protocols.core import Service, is_loaded
from serving.protocols.exchange import (
    EXCHANGE,
    JSON,
    BodyReader,
    Exchange,
    answer,
    query_of,
    version_of,
)
from serving.protocols.faults import fault_of
from serving.protocols.routes import add_route
from serving.types import Caller, TaskAnswer, TaskInfo, TextInput, Timings

_ANSWER = TypeAdapter(TaskAnswer)
_MANY = TypeAdapter(docs.ManyAnswer)
_TASK = TypeAdapter(TaskInfo)
_TASKS = TypeAdapter(docs.TaskList)
_VERSIONS = TypeAdapter(docs.VersionList)
_NEURONS = TypeAdapter(docs.Neurons)


def add_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    """All of them; the busiest first, because routes are tried in order."""
    bodies = BodyReader(config.max_body_bytes, config.body_timeout_s)

    async def predict(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task: str = request.path_params["task"]
        version = version_of(request) if "version" in request.path_params else None
        try:
            inputs, truncate = parse_inputs(await bodies.read(request))
            found = await service.predict(task, inputs, exchange.ask(truncate, version))
        except (Exception, asyncio.CancelledError):
            note_failure(service, exchange, task, version)
            raise
        exchange.task, exchange.version = task, found.version
        return Response(_ANSWER.dump_json(found), media_type=JSON)

    async def predict_many(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        named, inputs, truncate = parse_many(await bodies.read(request))
        tasks = _suitable(service, exchange.caller, inputs) if named is None else named
        found = await service.predict_many(tasks, inputs, exchange.ask(truncate))
        told = _many(dict(zip(tasks, found, strict=True)), exchange)
        return answer(_MANY, told)

    add_route(api, docs.PREDICT, predict)
    add_route(api, docs.PREDICT_VERSION, predict)
    add_route(api, docs.PREDICT_MANY, predict_many)
    _add_descriptions(api, service)


def _add_descriptions(api: FastAPI, service: Service) -> None:
    async def tasks(request: Request) -> Response:
        caller: Caller = request.scope[EXCHANGE].caller
        found = tuple(info for info in service.tasks() if caller.may(info.task))
        return answer(_TASKS, docs.TaskList(tasks=found))

    async def task(request: Request) -> Response:
        exchange, name = _named(request)
        if "version" in request.path_params:
            info = await service.version(name, version_of(request))
        else:
            info = service.task(name)
        exchange.task = info.task
        return answer(_TASK, info)

    async def versions(request: Request) -> Response:
        exchange, name = _named(request)
        found = await service.versions(name)
        exchange.task = name if is_loaded(service, name) else UNKNOWN_TASK
        return answer(_VERSIONS, docs.VersionList(task=name, versions=tuple(found)))

    async def neurons(request: Request) -> Response:
        exchange, name = _named(request)
        found = await service.neurons(name, exchange.caller)
        exchange.task = found.task
        return answer(_NEURONS, docs.neurons_of(found))

    add_route(api, docs.TASKS, tasks)
    add_route(api, docs.TASK, task)
    add_route(api, docs.VERSIONS, versions)
    add_route(api, docs.VERSION, task)
    add_route(api, docs.NEURONS, neurons)


def _named(request: Request) -> tuple[Exchange, str]:
    """The exchange, and the task that its path names, if the key is for it."""
    exchange: Exchange = request.scope[EXCHANGE]
    task: str = request.path_params["task"]
    query_of(request)
    exchange.caller.check(task)
    return exchange, task


def _suitable(service: Service, caller: Caller, inputs: Sequence[TextInput]) -> list[str]:
    """All tasks that the key is for and that take such inputs: texts, or pairs."""
    pairs = not isinstance(inputs[0], str)
    return [
        info.task for info in service.tasks() if info.takes_pairs == pairs and caller.may(info.task)
    ]


def _many(found: dict[str, TaskAnswer | ServingError], exchange: Exchange) -> docs.ManyAnswer:
    results: dict[str, docs.TaskResult | docs.TaskFailure] = {}
    for task, one in found.items():
        if isinstance(one, TaskAnswer):
            results[task] = docs.TaskResult(one.version, one.predictions)
        else:
            fault = fault_of(one, exchange.request_id)
            results[task] = docs.TaskFailure(docs.Failure(fault.type, fault.message))
    timings = [one.timings_ms for one in found.values() if isinstance(one, TaskAnswer)]
    return docs.ManyAnswer(results, _together(timings, exchange))


def _together(timings: Sequence[Timings], exchange: Exchange) -> Timings:
    """Tasks are tokenized one after another, and wait and run side by side."""
    return Timings(
        tokenize_ms=sum(one.tokenize_ms for one in timings),
        queue_ms=max((one.queue_ms for one in timings), default=0.0),
        forward_ms=max((one.forward_ms for one in timings), default=0.0),
        total_ms=1000 * (time.perf_counter() - exchange.started),
    )
