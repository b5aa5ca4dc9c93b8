"""The routes, what they read and what they answer, over a `Service`; and the one table from errors
to HTTP statuses. Knows nothing of Ray, tokens or models.

Handlers raise; `serving/app.py` turns every error into an answer with `error_answer`. Bodies are
parsed once and answers serialized once, straight from the service's records.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from swagger_ui_bundle import swagger_ui_path

from model_store import errors as store_errors
from model_store.manifest import TASK_NAME_PATTERN
from serving import errors, openapi, statuses
from serving.config import ServeConfig
from serving.inputs import parse_inputs
from serving.metrics import NO_TASK, UNKNOWN_TASK, Metrics
from serving.types import ANYBODY, PLAIN, Ask, Caller, TaskAnswer, TaskInfo, TextInput

EXCHANGE = "taskbone.exchange"
"""Key in the ASGI scope under which the request's `Exchange` lies."""

_ANSWER = TypeAdapter(TaskAnswer)
_TASK = TypeAdapter(TaskInfo)
_TASKS = TypeAdapter(openapi.TaskList)
_HEALTH = TypeAdapter(openapi.Health)
_ERROR = TypeAdapter(openapi.ErrorAnswer)
_JSON = "application/json"
_DOCS_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}


class Service(Protocol):
    """What the server needs of `serving.service.Service`."""

    async def predict(
        self, task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN
    ) -> TaskAnswer: ...
    def tasks(self) -> list[TaskInfo]: ...
    def task(self, name: str) -> TaskInfo: ...
    async def register(self, task: str, data: bytes) -> tuple[TaskInfo, bool]: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Exchange:
    """One request and what came of it; the handler fills in the task, the wrapper the rest."""

    request_id: str
    started: float
    task: str = NO_TASK
    status: int = 0
    rejection: str = ""
    caller: Caller = ANYBODY


_HTTP_TYPES = {404: "no_such_route", 405: "method_not_allowed"}


def status_of(error: Exception) -> statuses.Status:
    """How an error is answered."""
    if isinstance(error, HTTPException):
        return statuses.Status(error.status_code, _HTTP_TYPES.get(error.status_code, "http_error"))
    return statuses.status_of(error)


def error_answer(error: Exception, request_id: str) -> Response:
    """The answer to an error. What a 500 is about stands in the log alone, under the request id."""
    status = status_of(error)
    headers: dict[str, str] = {}
    message = str(error)
    if status.code >= 500 and not isinstance(error, errors.OverloadedError):
        message = "the server failed to answer; its log says more under this request_id"
    if isinstance(error, errors.OverloadedError):
        headers["retry-after"] = str(error.retry_after_s)
    if status.code == 401:
        headers["www-authenticate"] = 'Bearer realm="taskbone"'
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
        message = f"{error.detail}; the routes are listed at /docs and /openapi.json"
    body = openapi.ErrorAnswer(
        error=openapi.ErrorDetail(type=status.type, message=message, request_id=request_id)
    )
    return Response(_ERROR.dump_json(body), status.code, headers, _JSON)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body; `TooLargeError` as soon as more than `limit` bytes are announced or come."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise errors.TooLargeError(_over_limit(announced[:20], limit))
    chunks, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise errors.TooLargeError(_over_limit(f"more than {limit}", limit))
        chunks.append(chunk)
    return b"".join(chunks)


def _over_limit(given: str, limit: int) -> str:
    return f"the body has {given} bytes; this route takes at most {limit}"


def _is_loaded(service: Service, task: str) -> bool:
    try:
        service.task(task)
    except (errors.ServingError, store_errors.ModelStoreError):
        return False
    return True


class _LeanRoute(APIRoute):
    """A route that is documented like any other, and whose handler takes the bare request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


class Api(FastAPI):
    """The application, whose OpenAPI document also names the token."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made once."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                # The documentation page's files read 3.0 and not 3.1.
                openapi_version="3.0.3",
                description=self.description,
                routes=self.routes,
            )
            schemes = {"token": {"type": "http", "scheme": "bearer"}}
            document.setdefault("components", {})["securitySchemes"] = schemes
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    operation["security"] = [] if path.startswith("/health/") else [{"token": []}]
            self.openapi_schema = document
        return self.openapi_schema


def build_api(service: Service, metrics: Metrics, config: ServeConfig) -> Api:
    """All routes. Errors are raised to the caller, which answers them with `error_answer`."""
    api = Api(
        title=openapi.TITLE,
        description=openapi.DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    api.router.route_class = _LeanRoute
    _add_task_routes(api, service, metrics, config)
    _add_health_routes(api, service, metrics)
    _add_docs_routes(api)
    return api


def _add_task_routes(api: Api, service: Service, metrics: Metrics, config: ServeConfig) -> None:
    async def predict(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task: str = request.path_params["task"]
        try:
            inputs = parse_inputs(await read_body(request, config.max_body_bytes))
            answer = await service.predict(task, inputs, Ask(exchange.request_id, exchange.caller))
        except (Exception, asyncio.CancelledError):
            exchange.task = task if _is_loaded(service, task) else UNKNOWN_TASK
            raise
        exchange.task = task
        return Response(_ANSWER.dump_json(answer), media_type=_JSON)

    async def tasks(request: Request) -> Response:
        found = openapi.TaskList(tasks=tuple(service.tasks()))
        return Response(_TASKS.dump_json(found), media_type=_JSON)

    async def task(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        info = service.task(request.path_params["task"])
        exchange.task = info.task
        return Response(_TASK.dump_json(info), media_type=_JSON)

    async def register(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task: str = request.path_params["task"]
        try:
            if not re.fullmatch(TASK_NAME_PATTERN, task):
                raise errors.InvalidInputError(
                    f"the task name {task[:80]!r} is not usable; expected {TASK_NAME_PATTERN}"
                )
            data = await read_body(request, config.max_artifact_bytes)
            info, created = await service.register(task, data)
        except Exception:
            metrics.registrations("refused")
            raise
        exchange.task = info.task
        metrics.registrations("created" if created else "unchanged")
        return Response(_TASK.dump_json(info), 201 if created else 200, media_type=_JSON)

    _add(api, openapi.PREDICT, predict)
    _add(api, openapi.TASKS, tasks)
    _add(api, openapi.TASK, task)
    _add(api, openapi.REGISTER, register)


def _add_health_routes(api: Api, service: Service, metrics: Metrics) -> None:
    async def live(request: Request) -> Response:
        return Response(_HEALTH.dump_json(openapi.Health(status="live")), media_type=_JSON)

    async def ready(request: Request) -> Response:
        try:
            service.check()
        except errors.EngineError as error:
            raise errors.NotReadyError(f"the engine does not run: {error}") from error
        return Response(_HEALTH.dump_json(openapi.Health(status="ready")), media_type=_JSON)

    async def show_metrics(request: Request) -> Response:
        text, content_type = await asyncio.to_thread(metrics.render)
        return Response(text, headers={"content-type": content_type})

    _add(api, openapi.LIVE, live)
    _add(api, openapi.READY, ready)
    _add(api, openapi.METRICS, show_metrics)


def _add_docs_routes(api: Api) -> None:
    async def document(request: Request) -> Response:
        return Response(TypeAdapter(dict[str, Any]).dump_json(api.openapi()), media_type=_JSON)

    async def docs(request: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=openapi.TITLE,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
        )

    async def docs_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _DOCS_FILES:
            raise HTTPException(404)
        return FileResponse(Path(str(swagger_ui_path)) / name, media_type=_DOCS_FILES[name])

    api.add_route("/openapi.json", document, ["GET"], include_in_schema=False)
    api.add_route("/docs", docs, ["GET"], include_in_schema=False)
    api.add_route("/docs/{name}", docs_file, ["GET"], include_in_schema=False)


def _add(
    api: Api, text: openapi.RouteText, handler: Callable[[Request], Awaitable[Response]]
) -> None:
    api.add_api_route(
        text.path,
        handler,
        methods=[text.method],
        summary=text.summary,
        description=text.description,
        responses=text.answers,
        openapi_extra=text.extra,
        tags=[text.tag],
        response_class=Response,
    )
