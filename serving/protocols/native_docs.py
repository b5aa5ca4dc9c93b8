"""What the documentation says of the native routes that ask, and the records that they answer."""

import base64
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from model_store.manifest import TASK_NAME_PATTERN, Frozen
from model_store.store import VersionInfo
from serving.protocols.routes import (
    DEADLINE_HEADER,
    TASK_IN_PATH,
    VERSION_IN_PATH,
    RouteText,
    answers,
    extra,
    json_body,
    record,
)
from serving.types import NeuronMap, NeuronOverlap, Prediction, TaskAnswer, TaskInfo, Timings


class TaskList(Frozen):
    """Every task with an active version that the key is for, by name."""

    tasks: tuple[TaskInfo, ...]


class VersionList(Frozen):
    """The published versions of a task, oldest first."""

    task: str
    versions: tuple[VersionInfo, ...]


class Layer(Frozen):
    """What a version keeps of one layer."""

    kept: int = Field(description="How many feed-forward neurons.")
    neurons: str = Field(
        description=(
            "Which: a bitmap of `ffn_width` bits in Base64. Neuron n is bit n % 8, the lowest "
            "first, of byte n // 8; 1 is kept. Bits beyond the width are 0."
        )
    )
    heads: tuple[int, ...] = Field(description="Which attention heads, ascending.")


class Neurons(Frozen):
    """What a task's active version keeps of the backbone, and its overlap with other tasks."""

    task: str
    version: int
    digest: str
    ffn_width: int = Field(description="Feed-forward neurons of a layer of the backbone.")
    heads: int = Field(description="Attention heads of a layer of the backbone.")
    layers: tuple[Layer, ...] = Field(description="From the first to the last.")
    overlaps: tuple[NeuronOverlap, ...] = Field(
        description=(
            "With the active version of each other task that the key is for, by name: `kept` "
            "neurons of the other, those `shared`, how many random choices of these sizes would "
            "share `by_chance`, and `jaccard`, the shared ones divided by those that at least one "
            "of the two keeps."
        )
    )


def neurons_of(found: NeuronMap) -> Neurons:
    """A neuron map as clients see it."""
    return Neurons(
        task=found.task,
        version=found.version,
        digest=found.digest,
        ffn_width=found.ffn_width,
        heads=found.heads,
        layers=tuple(
            Layer(
                kept=layer.kept,
                neurons=base64.b64encode(layer.neurons).decode(),
                heads=layer.heads,
            )
            for layer in found.layers
        ),
        overlaps=found.overlaps,
    )


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task gave no answer, for programs and for people."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task's answer among many."""

    version: int
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """One task that cannot answer these inputs."""

    error: Failure


@dataclass(frozen=True, slots=True)
class ManyAnswer:
    """What each task says of the same inputs."""

    results: dict[str, TaskResult | TaskFailure]
    timings_ms: Timings


_PREDICT = """\
Classifies one text, several texts, or several pairs of texts; one prediction per input, in order.

`inputs` is a text, a list of texts, or a list of pairs, each a list of two texts. **A list of texts
is always a list of single texts:** one pair is `[["first", "second"]]`, and `["first", "second"]`
are two single texts.
`GET /v1/tasks/{task}` says in `takes_pairs` which of them the task takes.

Texts longer than the task's `max_tokens` lose their ends; with `"truncate": false` they are refused
instead, and the answer says which.
"""
_PREDICT_MANY = """\
Answers the same inputs for many tasks, as one batch.

`tasks` names them; `"*"` means all tasks that take such inputs (texts, or pairs) and that the key
is for. A task that cannot answer has an `error` in place of its predictions; one that does not
exist is an error of the whole call.
"""

_TEXT = {"type": "string"}
_PAIR = {"type": "array", "minItems": 2, "maxItems": 2, "items": _TEXT}
INPUTS: dict[str, Any] = {
    "oneOf": [
        {**_TEXT, "title": "one text"},
        {"type": "array", "minItems": 1, "items": _TEXT, "title": "texts"},
        {"type": "array", "minItems": 1, "items": _PAIR, "title": "pairs of texts"},
    ]
}
TRUNCATE: dict[str, Any] = {
    "type": "boolean",
    "default": True,
    "description": "Cut texts that are too long; else they are refused.",
}
_BODY = json_body(
    record(("inputs",), inputs=INPUTS, truncate=TRUNCATE),
    {
        "one text": {"inputs": "A charming and moving film."},
        "texts": {"inputs": ["A charming film.", "A waste of time."]},
        "pairs": {"inputs": [["He bought a car.", "A car was bought."]]},
        "nothing cut": {"inputs": "A charming and moving film.", "truncate": False},
    },
)
_TASKS_NAMED: dict[str, Any] = {
    "oneOf": [
        {"type": "string", "enum": ["*"], "title": "all that take such inputs"},
        {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"type": "string", "pattern": TASK_NAME_PATTERN},
            "title": "these",
        },
    ]
}
_MANY_BODY = json_body(
    record(("tasks", "inputs"), tasks=_TASKS_NAMED, inputs=INPUTS, truncate=TRUNCATE),
    {"all tasks": {"tasks": "*", "inputs": "A charming and moving film."}},
)
_ASKING = (401, 403, 404, 408, 413, 422, 429, 500, 503, 504)

PREDICT = RouteText(
    "POST",
    "/v1/tasks/{task}/predict",
    "predict",
    "Predict",
    answers(200, TaskAnswer, "One prediction per input.", *_ASKING),
    _PREDICT,
    extra(TASK_IN_PATH, DEADLINE_HEADER, body=_BODY),
)
PREDICT_VERSION = RouteText(
    "POST",
    "/v1/tasks/{task}/versions/{version}/predict",
    "predict",
    "Predict with one version",
    answers(200, TaskAnswer, "One prediction per input.", *_ASKING),
    "As `POST /v1/tasks/{task}/predict`, answered by this version, active or not.",
    extra(TASK_IN_PATH, VERSION_IN_PATH, DEADLINE_HEADER, body=_BODY),
)
PREDICT_MANY = RouteText(
    "POST",
    "/v1/predict",
    "predict",
    "Predict with many tasks",
    answers(200, ManyAnswer, "What each task says of the inputs.", *_ASKING),
    _PREDICT_MANY,
    extra(DEADLINE_HEADER, body=_MANY_BODY),
)
TASKS = RouteText(
    "GET",
    "/v1/tasks",
    "tasks",
    "List the tasks",
    answers(200, TaskList, "The tasks that the key is for.", 401, 403, 500),
)
TASK = RouteText(
    "GET",
    "/v1/tasks/{task}",
    "tasks",
    "Describe a task",
    answers(200, TaskInfo, "The task's active version.", 401, 403, 404, 422, 500),
    extra=extra(TASK_IN_PATH),
)
VERSIONS = RouteText(
    "GET",
    "/v1/tasks/{task}/versions",
    "tasks",
    "List a task's versions",
    answers(200, VersionList, "All of them, oldest first.", 401, 403, 404, 422, 500, 503),
    extra=extra(TASK_IN_PATH),
)
VERSION = RouteText(
    "GET",
    "/v1/tasks/{task}/versions/{version}",
    "tasks",
    "Describe a version",
    answers(200, TaskInfo, "This version.", 401, 403, 404, 422, 500, 503),
    extra=extra(TASK_IN_PATH, VERSION_IN_PATH),
)
NEURONS = RouteText(
    "GET",
    "/v1/tasks/{task}/neurons",
    "tasks",
    "Show which neurons a task keeps",
    answers(200, Neurons, "Those of the task's active version.", 401, 403, 404, 422, 500),
    "The feed-forward neurons and attention heads of the active version, layer by layer, and how "
    "many of the neurons each other served task keeps, too.",
    extra(TASK_IN_PATH),
)
