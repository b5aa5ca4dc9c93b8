"""What the API's documentation says: texts, examples and documented answers, as plain data.

Knows no framework; `serving/api.py` attaches these to its routes, and the tests check real answers
against them.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from model_store.manifest import Frozen
from serving.types import TaskAnswer, TaskInfo

TITLE = "Taskbone"
DESCRIPTION = """\
One frozen encoder answers for many tasks at once.

Every route but `/health/live` and `/health/ready` needs the server's token in the header
`Authorization: Bearer <token>`; `taskbone serve` prints it when it starts. A browser may open
`/docs` and `/openapi.json` with `?token=<token>` once.

Every error, whatever its cause, has the same body:
`{"error": {"type": "...", "message": "...", "request_id": "..."}}`. Every answer carries the header
`x-request-id`: the caller's own, if it sent one of at most 64 letters, digits and `._-`, else a new
one.
"""

_PREDICT = """\
Classifies one text, several texts, or several pairs of texts; one prediction per input, in order.

`inputs` is a text, a list of texts, or a list of pairs, each a list of two texts. **A list of texts
is always a list of single texts:** one pair is `[["first", "second"]]`, and `["first", "second"]`
are two single texts.
`GET /v1/tasks/{task}` says in `takes_pairs` which of them the task takes.
"""
_REGISTER = """\
The body is the artifact file itself (`curl --data-binary @overlay.safetensors`). It is checked
completely, kept in the store and made the task's active version; when the answer comes, every
replica answers with it. Sending the same file again changes nothing and answers 200 instead of 201.
"""


class ErrorDetail(Frozen):
    """What went wrong, for programs (`type`) and for people (`message`)."""

    type: str
    message: str
    request_id: str


class ErrorAnswer(Frozen):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class TaskList(Frozen):
    """Every task with an active version, by name."""

    tasks: tuple[TaskInfo, ...]


class Health(Frozen):
    """The state of the replica that answered."""

    status: str = Field(examples=["ready"])


_ERRORS: dict[int, tuple[str, str, str]] = {
    401: ("No token, or a wrong one.", "unauthorized", "this route needs the server's token"),
    403: ("A request from another site's page.", "forbidden", "pages of other sites are refused"),
    404: ("No such task.", "unknown_task", "no task 'sentimant'; tasks: 'sentiment', 'spam'"),
    409: ("The store's state forbids it.", "conflict", "the active version cannot be deleted"),
    413: ("Over a limit.", "too_large", "the body has 3000000 bytes; at most 2097152 are taken"),
    422: ("Not what the route takes.", "invalid_input", "the body needs the key 'inputs'"),
    500: ("The server's fault; its log says more.", "internal_error", "the server failed"),
    503: ("Overloaded or not ready.", "overloaded", "the queue is full; try again in 1 s"),
}


def _answers(success: int, model: Any, description: str, *errors: int) -> dict[int | str, Any]:
    """The documented answers of a route: its success, and the given error statuses."""
    documented: dict[int | str, Any] = {success: {"model": model, "description": description}}
    for status in errors:
        what, kind, message = _ERRORS[status]
        example = {"error": {"type": kind, "message": message, "request_id": "6f1d2c"}}
        documented[status] = {
            "model": ErrorAnswer,
            "description": what,
            "content": {"application/json": {"example": example}},
        }
        if status == 503:
            documented[status]["headers"] = {
                "Retry-After": {
                    "description": "Seconds after which to try again.",
                    "schema": {"type": "integer"},
                }
            }
    return documented


_TEXT = {"type": "string"}
_PREDICT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "additionalProperties": False,
                    "properties": {
                        "inputs": {
                            "oneOf": [
                                {**_TEXT, "title": "one text"},
                                {"type": "array", "minItems": 1, "items": _TEXT, "title": "texts"},
                                {
                                    "type": "array",
                                    "minItems": 1,
                                    "title": "pairs of texts",
                                    "items": {
                                        "type": "array",
                                        "minItems": 2,
                                        "maxItems": 2,
                                        "items": _TEXT,
                                    },
                                },
                            ]
                        }
                    },
                },
                "examples": {
                    "one text": {"value": {"inputs": "A charming and moving film."}},
                    "texts": {"value": {"inputs": ["A charming film.", "A waste of time."]}},
                    "pairs": {"value": {"inputs": [["He bought a car.", "A car was bought."]]}},
                },
            }
        },
    }
}
_REGISTER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The artifact, a `.safetensors` file.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_TASK_IN_PATH: dict[str, Any] = {
    "parameters": [
        {
            "name": "task",
            "in": "path",
            "required": True,
            "description": "A task's name, as `GET /v1/tasks` lists it.",
            "schema": {"type": "string"},
            "example": "sentiment",
        }
    ]
}
_METRICS_ANSWERS: dict[int | str, Any] = {
    **_answers(200, ErrorAnswer, "", 401, 500),
    200: {
        "description": "The metrics, summed over the node's replicas.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    },
}


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


PREDICT = RouteText(
    "POST",
    "/v1/tasks/{task}/predict",
    "tasks",
    "Predict",
    _answers(200, TaskAnswer, "One prediction per input.", 401, 403, 404, 413, 422, 500, 503),
    _PREDICT,
    _TASK_IN_PATH | _PREDICT_BODY,
)
TASKS = RouteText(
    "GET", "/v1/tasks", "tasks", "List the tasks", _answers(200, TaskList, "The tasks.", 401, 500)
)
TASK = RouteText(
    "GET",
    "/v1/tasks/{task}",
    "tasks",
    "Describe a task",
    _answers(200, TaskInfo, "The task's active version.", 401, 404, 500),
    extra=_TASK_IN_PATH,
)
REGISTER = RouteText(
    "POST",
    "/v1/tasks/{task}/versions",
    "tasks",
    "Register a version",
    {
        **_answers(201, TaskInfo, "New, and now active.", 401, 403, 409, 413, 422, 500, 503),
        200: {"model": TaskInfo, "description": "This very file was registered already."},
    },
    _REGISTER,
    _TASK_IN_PATH | _REGISTER_BODY,
)
LIVE = RouteText(
    "GET", "/health/live", "operation", "Is the process alive", _answers(200, Health, "It is.")
)
READY = RouteText(
    "GET",
    "/health/ready",
    "operation",
    "Are predictions answered",
    _answers(200, Health, "They are.", 503),
)
METRICS = RouteText("GET", "/metrics", "operation", "Prometheus metrics", _METRICS_ANSWERS)
