"""Triton's model repository extension: which versions there are, load and unload.

A version is loaded by making it the active one, and a task unloaded by having none be active. What
a repository holds is given to it by the native routes alone, because a file has to be uploaded.
"""

from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from model_store.errors import ConflictError
from model_store.manifest import Frozen
from model_store.store import VersionInfo
from serving.config import ServeConfig
from serving.metrics import UNKNOWN_TASK
from serving.protocols import oip_docs as docs
from serving.protocols.asking import parse
from serving.protocols.core import Service, is_loaded
from serving.protocols.exchange import EXCHANGE, JSON, BodyReader, Exchange, number
from serving.protocols.routes import add_route
from serving.types import Caller


class IndexRequest(Frozen):
    """What of the repository is asked for."""

    ready: bool = False


class LoadParameters(Frozen):
    """What may be said of a load."""

    version: str | Annotated[int, Field(ge=1)] | None = None


class LoadRequest(Frozen):
    """The body of a load."""

    parameters: LoadParameters = LoadParameters()


class UnloadParameters(Frozen):
    """What may be said of an unload: tasks depend on none, so it changes nothing."""

    unload_dependents: bool = False


class UnloadRequest(Frozen):
    """The body of an unload."""

    parameters: UnloadParameters = UnloadParameters()


def add_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    """All of them."""
    bodies = BodyReader(config.max_body_bytes, config.body_timeout_s)

    async def index(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        wanted = parse(IndexRequest, await bodies.read(request) or b"{}")
        told = [
            index_entry(info)
            for info in await service.all_versions()
            if exchange.caller.may(info.task) and (info.active or not wanted.ready)
        ]
        return Response(to_json(told), media_type=JSON)

    async def load(request: Request) -> Response:
        exchange, task = _named(request)
        wanted = parse(LoadRequest, await bodies.read(request) or b"{}").parameters.version
        try:
            await load_version(service, task, wanted, exchange.caller)
        finally:
            exchange.task = task if is_loaded(service, task) else UNKNOWN_TASK
        return Response(b"{}", media_type=JSON)

    async def unload(request: Request) -> Response:
        exchange, task = _named(request)
        parse(UnloadRequest, await bodies.read(request) or b"{}")
        exchange.task = task if is_loaded(service, task) else UNKNOWN_TASK
        await service.lifecycle.deactivate(task, exchange.caller)
        return Response(b"{}", media_type=JSON)

    add_route(api, docs.INDEX, index)
    add_route(api, docs.LOAD, load)
    add_route(api, docs.UNLOAD, unload)


def index_entry(info: VersionInfo) -> dict[str, Any]:
    """One version in the index."""
    state, reason = ("READY", "") if info.active else ("UNAVAILABLE", "not the active version")
    return {"name": info.task, "version": str(info.version), "state": state, "reason": reason}


async def load_version(
    service: Service, task: str, wanted: str | int | None, caller: Caller
) -> None:
    """Make the named version the active one. Without a name, what is active stays, because many a
    client loads before it asks; else what was active last comes back, or the latest comes."""
    lifecycle = service.lifecycle
    if wanted is not None:
        await lifecycle.activate(task, number(str(wanted), "parameters.version"), caller)
        return
    versions = await service.versions(task)
    if any(info.active for info in versions):
        return
    try:
        await lifecycle.roll_back(task, caller)
    except ConflictError:
        await lifecycle.activate(task, max(info.version for info in versions), caller)


def _named(request: Request) -> tuple[Exchange, str]:
    exchange: Exchange = request.scope[EXCHANGE]
    task: str = request.path_params["task"]
    exchange.caller.check(task)
    return exchange, task
