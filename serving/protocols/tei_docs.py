"""What the documentation says of Text Embeddings Inference's routes, and their answers."""

from typing import Any

from model_store.manifest import TASK_NAME_PATTERN, Frozen
from serving.protocols import shapes
from serving.protocols.routes import (
    DEADLINE_HEADER,
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
    error_type: str


class Label(Frozen):
    """A label and its probability."""

    score: float
    label: str


class Classifier(Frozen):
    """The labels by number, and back."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(Frozen):
    """What kind of model it is."""

    classifier: Classifier


class Info(Frozen):
    """A task, as that server describes its model."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: ModelType
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str


def _answers(model: Any, description: str, *errors: int) -> dict[int | str, Any]:
    return answers(200, model, description, *errors, shape=shapes.tei, error=Error)


_TAG = "Text Embeddings Inference"
_PREDICT = """\
As Text Embeddings Inference's; the header `x-task` or the query's `task` names the task, unless
there is only one. **`["a", "b"]` is one pair here;** a batch is `[["a"], ["b"]]`. Each answer has
all labels, the likeliest first. `raw_scores` and `truncation_direction: Left` are refused.
"""
_TEXT = {"type": "string"}
_PAIR = {"type": "array", "minItems": 1, "maxItems": 2, "items": _TEXT}
_BODY = json_body(
    record(
        ("inputs",),
        inputs={
            "oneOf": [
                {**_TEXT, "title": "one text"},
                {**_PAIR, "title": "a pair"},
                {"type": "array", "minItems": 1, "items": _PAIR, "title": "a batch"},
            ]
        },
        truncate=or_null({"type": "boolean", "default": True}),
        truncation_direction={"type": "string", "enum": ["Right"]},
        raw_scores={"type": "boolean", "enum": [False]},
    ),
    {
        "a text": {"inputs": "A charming and moving film."},
        "a batch": {"inputs": [["A charming film."], ["A waste of time."]]},
    },
)
_HEADER = {
    "name": "x-task",
    "in": "header",
    "description": "The task; the query's `task` does the same.",
    "schema": {"type": "string", "pattern": TASK_NAME_PATTERN},
}
_QUERY = {**_HEADER, "name": "task", "in": "query", "description": "The task."}

PREDICT = RouteText(
    "POST",
    "/predict",
    _TAG,
    "Predict",
    _answers(
        tuple[Label, ...] | tuple[tuple[Label, ...], ...],
        "For each input all labels; for one input, its labels alone.",
        *(401, 403, 404, 408, 413, 422, 429, 500, 504),
    ),
    _PREDICT,
    extra(_HEADER, _QUERY, DEADLINE_HEADER, body=_BODY),
)
INFO = RouteText(
    "GET",
    "/info",
    _TAG,
    "Describe a task",
    _answers(Info, "The task that is named, or the only one.", 401, 403, 404, 422, 500),
    extra=extra(_HEADER, _QUERY),
)
