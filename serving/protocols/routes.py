"""How a route is documented and added: its texts as plain data, and the words that all share."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from model_store.manifest import TASK_NAME_PATTERN, Frozen
from serving.protocols import shapes
from serving.protocols.faults import Fault, Shape


class ErrorDetail(Frozen):
    """What went wrong, for programs (`type`) and for people (`message`)."""

    type: str
    message: str
    request_id: str


class ErrorAnswer(Frozen):
    """The body of every answer of the native routes that is not a success."""

    error: ErrorDetail


class Health(Frozen):
    """The state of the replica that answered."""

    status: str = Field(examples=["ready"])


@dataclass(frozen=True)
class RouteText:
    """A route and all that its documentation says."""

    method: str
    path: str
    tag: str
    summary: str
    answers: dict[int | str, Any]
    description: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def add_route(
    api: FastAPI, text: RouteText, handler: Callable[[Request], Awaitable[Response]]
) -> None:
    """Add a documented route to the application."""
    api.add_api_route(
        text.path,
        handler,
        methods=[text.method],
        operation_id=f"{text.method.lower()}{text.path}",
        summary=text.summary,
        description=text.description,
        responses=text.answers,
        openapi_extra=text.extra,
        tags=[text.tag],
        response_class=Response,
    )


ERRORS: dict[int, tuple[str, str, str]] = {
    401: ("No key, or a wrong one.", "unauthorized", "this route needs a key"),
    403: (
        "The key is not for this, or a page of another site asks.",
        "forbidden",
        "the key 'web' is not for the task 'spam'; it is for: sentiment",
    ),
    404: ("No such task.", "unknown_task", "no task 'sentimant'; tasks: 'sentiment', 'spam'"),
    408: ("The body came too slowly.", "body_timeout", "the body was not there after 30 s"),
    409: ("The store's state forbids it.", "conflict", "the active version cannot be deleted"),
    413: ("Over a limit.", "too_large", "the body has 3000000 bytes; at most 2097152 are taken"),
    422: ("Not what the route takes.", "invalid_input", "the body needs the key 'inputs'"),
    429: ("The key has too much waiting.", "rate_limited", "the key 'web' has too much waiting"),
    500: ("The server's fault; its log says more.", "internal_error", "the server failed"),
    503: ("Overloaded or not ready.", "overloaded", "the queue is full; try again in 1 s"),
    504: ("The deadline has passed.", "deadline_exceeded", "no answer within 50 ms"),
}
"""For each status: what it means, and an example's type and message."""

RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer"},
    }
}


def answers(
    success: int,
    model: Any,
    description: str,
    *errors: int,
    shape: Shape = shapes.native,
    error: type[Frozen] = ErrorAnswer,
) -> dict[int | str, Any]:
    """The documented answers of a route: its success, and errors by their native statuses, told in
    the protocol's shape."""
    documented: dict[int | str, Any] = {success: {"model": model, "description": description}}
    for status in errors:
        what, kind, message = ERRORS[status]
        code, example = shape(Fault(status, kind, message, "6f1d2c"))
        documented.setdefault(
            code,
            {
                "model": error,
                "description": what,
                "content": {"application/json": {"example": example}},
            },
        )
        if code in (429, 503):
            documented[code]["headers"] = RETRY_AFTER
    return documented


def extra(*parameters: dict[str, Any], body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the documentation says of a route's parameters and body."""
    found: dict[str, Any] = {}
    if parameters:
        found["parameters"] = list(parameters)
    if body is not None:
        found["requestBody"] = body
    return found


def json_body(schema: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    """A body in JSON; `examples` by name."""
    shown = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": {"schema": schema, "examples": shown}}
    return {"required": True, "content": content}


def record(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has nothing but the named properties."""
    return {
        "type": "object",
        "required": list(required),
        "additionalProperties": False,
        "properties": properties,
    }


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a value that may be null, too, which says the same as leaving it away."""
    more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **more, "nullable": True}


def flag_parameter(name: str, default: bool, description: str) -> dict[str, Any]:
    """A query parameter that is `true` or `false`."""
    return {
        "name": name,
        "in": "query",
        "description": description,
        "schema": {"type": "boolean", "default": default},
    }


VERSION_NUMBER = {"type": "integer", "minimum": 1, "maximum": 999_999_999}
TASK_IN_PATH: dict[str, Any] = {
    "name": "task",
    "in": "path",
    "required": True,
    "description": "A task's name, as `GET /v1/tasks` lists it.",
    "schema": {"type": "string", "pattern": TASK_NAME_PATTERN},
    "example": "sentiment",
}
VERSION_IN_PATH: dict[str, Any] = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "A version's number, as `GET /v1/tasks/{task}/versions` lists it.",
    "schema": VERSION_NUMBER,
    "example": 1,
}
DEADLINE_HEADER: dict[str, Any] = {
    "name": "x-deadline-ms",
    "in": "header",
    "description": "Milliseconds after which the answer is of no use: then it is 504 instead.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
}
