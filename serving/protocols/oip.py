"""The Open Inference Protocol, version 2: a task is a model, its versions are the model's.

Texts go in as BYTES, labels and probabilities come out; see `tensors.py`. Triton's routes for its
repository are in `repository.py`.
"""

from dataclasses import replace
from importlib.metadata import version as installed
from typing import Any

from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from serving.config import ServeConfig
from serving.errors import InvalidInputError
from serving.protocols import oip_docs as docs
from serving.protocols.asking import ask_task
from serving.protocols.core import Service
from serving.protocols.exchange import EXCHANGE, JSON, BodyReader, Exchange, version_of
from serving.protocols.routes import add_route
from serving.protocols.site import check_ready
from serving.protocols.tensors import read_infer, write_infer
from serving.types import Ask, TaskInfo

PLATFORM = "taskbone"
EXTENSIONS = ("binary_tensor_data", "model_repository")
_JSON_LENGTH = b"inference-header-content-length"


def add_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    """All of them."""
    bodies = BodyReader(config.max_body_bytes, config.body_timeout_s)

    async def infer(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task: str = request.path_params["task"]
        version = version_of(request) if "version" in request.path_params else None
        read = read_infer(await bodies.read(request), _json_length(exchange))
        parameters = read.request.parameters
        ask = sooner(exchange.ask(parameters.truncate, version), exchange, parameters.timeout)
        answer = await ask_task(service, exchange, task, read.inputs, ask)
        body, json_bytes = write_infer(answer, read.request)
        if json_bytes is None:
            return Response(body, media_type=JSON)
        headers = {"inference-header-content-length": str(json_bytes)}
        return Response(body, headers=headers, media_type="application/octet-stream")

    add_route(api, docs.INFER, infer)
    add_route(api, docs.INFER_VERSION, infer)
    _add_models(api, service)
    _add_server(api, service)


def _add_models(api: FastAPI, service: Service) -> None:
    async def metadata(request: Request) -> Response:
        info = await _described(service, request)
        versions = [str(one.version) for one in await service.versions(info.task)]
        return _json(model_metadata(info, versions))

    async def ready(request: Request) -> Response:
        info = await _described(service, request)
        check_ready(service)
        return _json({"name": info.task, "ready": True})

    add_route(api, docs.MODEL, metadata)
    add_route(api, docs.MODEL_VERSION, metadata)
    add_route(api, docs.MODEL_READY, ready)
    add_route(api, docs.MODEL_VERSION_READY, ready)


def _add_server(api: FastAPI, service: Service) -> None:
    about = {"name": "taskbone", "version": installed("taskbone"), "extensions": EXTENSIONS}

    async def server(request: Request) -> Response:
        return _json(about)

    async def live(request: Request) -> Response:
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        check_ready(service)
        return _json({"ready": True})

    add_route(api, docs.SERVER, server)
    add_route(api, docs.LIVE, live)
    add_route(api, docs.READY, ready)


async def _described(service: Service, request: Request) -> TaskInfo:
    """The version of a task that a path names."""
    exchange: Exchange = request.scope[EXCHANGE]
    task: str = request.path_params["task"]
    exchange.caller.check(task)
    info = service.task(task)
    exchange.task = task
    if "version" in request.path_params:
        return await service.version(task, version_of(request))
    return info


def model_metadata(info: TaskInfo, versions: list[str]) -> dict[str, Any]:
    """What a task takes and gives."""
    names = ["text", "text_pair"] if info.takes_pairs else ["text"]
    return {
        "name": info.task,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in names],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "score", "datatype": "FP32", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(info.labels)]},
        ],
        "parameters": {"labels": info.labels, "max_tokens": info.max_tokens},
    }


def _json_length(exchange: Exchange) -> int | None:
    """How much of the body is JSON, where the rest is tensors."""
    given = exchange.headers.get(_JSON_LENGTH)
    if given is None:
        return None
    if not given.isdigit() or len(given) > 12:
        raise InvalidInputError(
            f"Inference-Header-Content-Length is {given[:40].decode('latin-1')!r}; expected a "
            "number of bytes"
        )
    return int(given)


def sooner(ask: Ask, exchange: Exchange, timeout_us: int | None) -> Ask:
    """The question with the nearer of two deadlines: the header's and the body's."""
    if timeout_us is None:
        return ask
    deadline = exchange.started + timeout_us / 1e6
    if ask.deadline is not None:
        deadline = min(deadline, ask.deadline)
    return replace(ask, deadline=deadline)


def _json(record: dict[str, Any]) -> Response:
    return Response(to_json(record), media_type=JSON)
