"""The native routes that change what is served, and those that say what was changed.

Every change is an operation of the service, answered in one shape: when it is done, or, with
`?wait=false`, as soon as it is accepted.
"""

import base64
import binascii
import re
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from model_store.manifest import TASK_NAME_PATTERN
from serving.config import ServeConfig
from serving.errors import InvalidInputError, ServingError
from serving.metrics import UNKNOWN_TASK, Metrics
from serving.protocols import changes_docs as docs
from serving.protocols.asking import Body, parse
from serving.protocols.core import Lifecycle, Service, is_loaded
from serving.protocols.exchange import (
    EXCHANGE,
    JSON,
    BodyReader,
    Exchange,
    answer,
    flag,
    number,
    query_of,
    version_of,
)
from serving.protocols.routes import RouteText, add_route
from serving.types import Caller, Operation

_CHANGE = TypeAdapter(docs.Change)
_CHANGES = TypeAdapter(docs.ChangeList)
_AUDIT = TypeAdapter(docs.AuditList)

Change = Callable[[Request, str, Caller], Awaitable[Operation]]
"""Changes a task: what the route's body and query ask for."""


def add_routes(api: FastAPI, service: Service, metrics: Metrics, config: ServeConfig) -> None:
    """All of them."""

    def add(text: RouteText, change: Change) -> None:
        async def handler(request: Request) -> Response:
            exchange: Exchange = request.scope[EXCHANGE]
            task: str = request.path_params["task"]
            exchange.caller.check(task)
            try:
                operation = await change(request, task, exchange.caller)
            finally:
                exchange.task = task if is_loaded(service, task) else UNKNOWN_TASK
            return changed(operation)

        add_route(api, text, handler)

    _add_versions(
        add,
        service.lifecycle,
        metrics,
        BodyReader(config.max_artifact_bytes, config.body_timeout_s),
    )
    _add_choices(add, service.lifecycle, BodyReader(config.max_body_bytes, config.body_timeout_s))
    _add_operations(api, service.lifecycle)


def _add_versions(
    add: Callable[[RouteText, Change], None],
    lifecycle: Lifecycle,
    metrics: Metrics,
    bodies: BodyReader,
) -> None:
    async def register(request: Request, task: str, caller: Caller) -> Operation:
        try:
            query = query_of(request, "activate", "wait")
            activate, wait = flag(query, "activate", True), flag(query, "wait", True)
            if not re.fullmatch(TASK_NAME_PATTERN, task):
                raise InvalidInputError(
                    f"the task name {task[:80]!r} is not usable; expected {TASK_NAME_PATTERN}"
                )
            data = await bodies.read(request)
            signature = signature_of(request)
            done = await lifecycle.register(
                task, data, caller, activate=activate, signature=signature, wait=wait
            )
        except Exception:
            metrics.registrations("refused")
            raise
        if done.state == "done":
            metrics.registrations("created" if done.created else "unchanged")
        return done

    async def delete(request: Request, task: str, caller: Caller) -> Operation:
        version = version_of(request) if "version" in request.path_params else None
        return await lifecycle.delete(task, version, caller, wait=_wait(request))

    add(docs.REGISTER, register)
    add(docs.DELETE_VERSION, delete)
    add(docs.DELETE_TASK, delete)


def _add_choices(
    add: Callable[[RouteText, Change], None], lifecycle: Lifecycle, bodies: BodyReader
) -> None:
    """Which version answers."""

    async def activate(request: Request, task: str, caller: Caller) -> Operation:
        wait, chosen = _wait(request), await _body(request, bodies, docs.Chosen)
        return await lifecycle.activate(task, chosen.version, caller, wait=wait)

    async def roll_back(request: Request, task: str, caller: Caller) -> Operation:
        return await lifecycle.roll_back(task, caller, wait=_wait(request))

    async def deactivate(request: Request, task: str, caller: Caller) -> Operation:
        return await lifecycle.deactivate(task, caller, wait=_wait(request))

    async def set_canary(request: Request, task: str, caller: Caller) -> Operation:
        wait, canary = _wait(request), await _body(request, bodies, docs.CanaryShare)
        return await lifecycle.set_canary(task, canary.version, canary.percent, caller, wait=wait)

    async def clear_canary(request: Request, task: str, caller: Caller) -> Operation:
        return await lifecycle.clear_canary(task, caller, wait=_wait(request))

    async def set_shadow(request: Request, task: str, caller: Caller) -> Operation:
        wait, chosen = _wait(request), await _body(request, bodies, docs.Chosen)
        return await lifecycle.set_shadow(task, chosen.version, caller, wait=wait)

    async def clear_shadow(request: Request, task: str, caller: Caller) -> Operation:
        return await lifecycle.clear_shadow(task, caller, wait=_wait(request))

    add(docs.ACTIVATE, activate)
    add(docs.ROLL_BACK, roll_back)
    add(docs.DEACTIVATE, deactivate)
    add(docs.SET_CANARY, set_canary)
    add(docs.CLEAR_CANARY, clear_canary)
    add(docs.SET_SHADOW, set_shadow)
    add(docs.CLEAR_SHADOW, clear_shadow)


def _add_operations(api: FastAPI, lifecycle: Lifecycle) -> None:
    async def operation(request: Request) -> Response:
        query_of(request)
        found = await lifecycle.operation(request.path_params["operation"])
        request.scope[EXCHANGE].caller.check(found.task)
        return answer(_CHANGE, docs.change_of(found))

    async def operations(request: Request) -> Response:
        query_of(request)
        caller: Caller = request.scope[EXCHANGE].caller
        found = [one for one in await lifecycle.operations() if caller.may(one.task)]
        told = docs.ChangeList(operations=tuple(map(docs.change_of, found)))
        return answer(_CHANGES, told)

    async def audit(request: Request) -> Response:
        given = query_of(request, "limit").get("limit", str(docs.AUDIT_LIMIT))
        limit = min(number(given, "limit"), docs.MAX_AUDIT_LIMIT)
        caller: Caller = request.scope[EXCHANGE].caller
        found = [entry for entry in await lifecycle.audit(limit) if caller.may(entry.task)]
        return answer(_AUDIT, docs.AuditList(entries=tuple(found)))

    add_route(api, docs.OPERATION, operation)
    add_route(api, docs.OPERATIONS, operations)
    add_route(api, docs.AUDIT, audit)


def changed(operation: Operation) -> Response:
    """The answer to a change: 201 for a new version, 202 while it runs, else 200."""
    if operation.state == "failed":
        # The service raises what made a change fail that was waited for.
        raise ServingError(f"operation {operation.id} failed: {operation.error}")
    running = operation.state == "running"
    headers = {"location": f"/v1/operations/{operation.id}"} if running else None
    status = 202 if running else 201 if operation.created else 200
    body = _CHANGE.dump_json(docs.change_of(operation))
    return Response(body, status, headers, JSON)


def signature_of(request: Request) -> bytes | None:
    """The artifact's signature in the request's header. Raises `InvalidInputError`."""
    exchange: Exchange = request.scope[EXCHANGE]
    given = exchange.headers.get(docs.SIGNATURE)
    if given is None:
        return None
    try:
        return base64.b64decode(given, validate=True)
    except binascii.Error as error:
        raise InvalidInputError(
            f"the header x-taskbone-signature: {error}; expected the signature's file in Base64, "
            "on one line"
        ) from None


def _wait(request: Request) -> bool:
    return flag(query_of(request, "wait"), "wait", True)


async def _body(request: Request, bodies: BodyReader, kind: type[Body]) -> Body:
    return parse(kind, await bodies.read(request))
