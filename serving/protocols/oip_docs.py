"""What the documentation says of the Open Inference Protocol's routes, and their answers."""

from typing import Any

from model_store.manifest import Frozen
from serving.protocols import shapes
from serving.protocols.routes import (
    DEADLINE_HEADER,
    TASK_IN_PATH,
    VERSION_IN_PATH,
    RouteText,
    answers,
    extra,
    json_body,
    or_null,
    record,
)


class Error(Frozen):
    """The body of every answer of these routes that is not a success."""

    error: str


class ServerMetadata(Frozen):
    """What the server is."""

    name: str
    version: str
    extensions: tuple[str, ...]


class Live(Frozen):
    """The process answers."""

    live: bool


class Ready(Frozen):
    """Predictions are answered."""

    ready: bool


class ModelReady(Frozen):
    """A task answers."""

    name: str
    ready: bool


class TensorMetadata(Frozen):
    """A tensor by name; -1 stands for any number."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelParameters(Frozen):
    """What a caller of a task should know besides."""

    labels: tuple[str, ...]
    max_tokens: int


class ModelMetadata(Frozen):
    """What a task takes and gives."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    parameters: ModelParameters


class OutputParameters(Frozen):
    """Where an output lies behind the JSON: its bytes."""

    binary_data_size: int


class OutputTensor(Frozen):
    """One output."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: tuple[str, ...] | tuple[float, ...] | None = None
    parameters: OutputParameters | None = None


class InferAnswer(Frozen):
    """The outputs that were asked for."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: tuple[OutputTensor, ...]


class IndexEntry(Frozen):
    """A version in the repository; `READY` is the one that answers."""

    name: str
    version: str
    state: str
    reason: str


class Nothing(Frozen):
    """It is done."""


def _answers(model: Any, description: str, *errors: int) -> dict[int | str, Any]:
    return answers(200, model, description, *errors, shape=shapes.oip, error=Error)


def _route(
    method: str,
    path: str,
    summary: str,
    answers: dict[int | str, Any],
    description: str = "",
    *parameters: dict[str, Any],
    body: dict[str, Any] | None = None,
) -> RouteText:
    told = extra(*parameters, body=body)
    return RouteText(method, path, "Open Inference Protocol", summary, answers, description, told)


_VERSION = {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"}
_COUNT = {"type": "integer", "minimum": 0}
_INPUT = record(
    ("name", "shape", "datatype"),
    name={"type": "string", "enum": ["text", "text_pair"]},
    shape={"type": "array", "minItems": 1, "maxItems": 2, "items": _COUNT},
    datatype={"type": "string", "enum": ["BYTES"]},
    data=or_null({"type": "array", "items": {"type": "string"}}),
    parameters=record((), binary_data_size=or_null(_COUNT)),
)
_OUTPUT = record(
    ("name",),
    name={"type": "string", "enum": ["label", "score", "probabilities"]},
    parameters=record((), binary_data=or_null({"type": "boolean"})),
)
_PARAMETERS = record(
    (),
    binary_data_output={"type": "boolean", "default": False},
    truncate={"type": "boolean", "default": True},
    timeout=or_null({"type": "integer", "minimum": 1, "description": "In microseconds."}),
)
_BODY = json_body(
    record(
        ("inputs",),
        id={"type": "string"},
        parameters=_PARAMETERS,
        inputs={"type": "array", "minItems": 1, "items": _INPUT},
        outputs=or_null({"type": "array", "items": _OUTPUT}),
    ),
    {
        "two texts": {
            "inputs": [
                {
                    "name": "text",
                    "shape": [2],
                    "datatype": "BYTES",
                    "data": ["A charming film.", "A waste of time."],
                }
            ]
        }
    },
)
_INFER = """\
Texts go in as BYTES in the input `text` of shape [n] or [n, 1]; pairs have their second texts in
`text_pair`. Out come `label` (BYTES [n]), `score` (FP32 [n]: the label's probability) and
`probabilities` (FP32 [n, labels], in the order of the model's metadata); `outputs` chooses.

Tensors may lie behind the JSON, as in Triton's binary tensor data extension:
`binary_data_size`, `binary_data`, `binary_data_output`, `Inference-Header-Content-Length`.
"""
_ASKING = (401, 403, 404, 408, 413, 422, 429, 500, 503, 504)
_INFERRED = _answers(InferAnswer, "The outputs.", *_ASKING)
_INFERRED[200]["content"] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
}
_CHANGING = (401, 403, 404, 408, 409, 413, 422, 500, 503)

INFER = _route(
    "POST",
    "/v2/models/{task}/infer",
    "Predict",
    _INFERRED,
    _INFER,
    TASK_IN_PATH,
    DEADLINE_HEADER,
    body=_BODY,
)
INFER_VERSION = _route(
    "POST",
    "/v2/models/{task}/versions/{version}/infer",
    "Predict with one version",
    _INFERRED,
    _INFER,
    TASK_IN_PATH,
    VERSION_IN_PATH,
    DEADLINE_HEADER,
    body=_BODY,
)
MODEL = _route(
    "GET",
    "/v2/models/{task}",
    "Describe a task",
    _answers(ModelMetadata, "What it takes and gives.", 401, 403, 404, 500, 503),
    "",
    TASK_IN_PATH,
)
MODEL_VERSION = _route(
    "GET",
    "/v2/models/{task}/versions/{version}",
    "Describe a version",
    _answers(ModelMetadata, "What it takes and gives.", 401, 403, 404, 422, 500, 503),
    "",
    TASK_IN_PATH,
    VERSION_IN_PATH,
)
MODEL_READY = _route(
    "GET",
    "/v2/models/{task}/ready",
    "Does a task answer",
    _answers(ModelReady, "It does.", 401, 403, 404, 500, 503),
    "",
    TASK_IN_PATH,
)
MODEL_VERSION_READY = _route(
    "GET",
    "/v2/models/{task}/versions/{version}/ready",
    "Does a version answer",
    _answers(ModelReady, "It does.", 401, 403, 404, 422, 500, 503),
    "",
    TASK_IN_PATH,
    VERSION_IN_PATH,
)
SERVER = _route(
    "GET", "/v2", "Describe the server", _answers(ServerMetadata, "What it is.", 401, 403, 500)
)
LIVE = _route("GET", "/v2/health/live", "Is the process alive", _answers(Live, "It is."))
READY = _route(
    "GET", "/v2/health/ready", "Are predictions answered", _answers(Ready, "They are.", 503)
)
INDEX = _route(
    "POST",
    "/v2/repository/index",
    "List the repository",
    _answers(tuple[IndexEntry, ...], "Every version.", 401, 403, 408, 413, 422, 500, 503),
    "All versions of the tasks that the key is for; with `ready`, those alone that answer.",
    body={**json_body(record((), ready={"type": "boolean"}), {}), "required": False},
)
LOAD = _route(
    "POST",
    "/v2/repository/models/{task}/load",
    "Make a version the active one",
    _answers(Nothing, "Every live replica answers with it.", *_CHANGING),
    "`parameters.version` names it. Without one, what is active stays; where nothing is, what was "
    "active last comes back, or the latest comes.",
    TASK_IN_PATH,
    body={
        **json_body(
            record((), parameters=record((), version=or_null(_VERSION))),
            {"version 3": {"parameters": {"version": "3"}}},
        ),
        "required": False,
    },
)
UNLOAD = _route(
    "POST",
    "/v2/repository/models/{task}/unload",
    "Have a task answer no more",
    _answers(Nothing, "No replica answers for it any more.", *_CHANGING),
    "Its versions stay; `load` brings it back.",
    TASK_IN_PATH,
    body={
        **json_body(record((), parameters=record((), unload_dependents={"type": "boolean"})), {}),
        "required": False,
    },
)
