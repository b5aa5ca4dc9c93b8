"""What the documentation says of vLLM's routes, and their answers."""

from typing import Any, Literal

from model_store.manifest import Frozen
from serving.protocols import shapes
from serving.protocols.native_docs import INPUTS
from serving.protocols.routes import (
    DEADLINE_HEADER,
    TASK_IN_PATH,
    RouteText,
    answers,
    extra,
    json_body,
    or_null,
    record,
)


class ErrorDetail(Frozen):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class Error(Frozen):
    """The body of every answer of these routes that is not a success."""

    error: ErrorDetail


class Classified(Frozen):
    """One input's label and probabilities, in the order of the task's labels."""

    index: int
    label: str
    probs: tuple[float, ...]
    num_classes: int


class Usage(Frozen):
    """How many tokens were read, with template and prompt."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]
    prompt_tokens_details: None


class ClassifyAnswer(Frozen):
    """One entry for each input, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: tuple[Classified, ...]
    usage: Usage


class ModelCard(Frozen):
    """A task; `root` is the digest of the version that answers, `parent` the backbone."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str
    max_model_len: int
    permission: tuple[str, ...]


class ModelList(Frozen):
    """The tasks that the key is for."""

    object: Literal["list"]
    data: tuple[ModelCard, ...]


def _answers(model: Any, description: str, *errors: int) -> dict[int | str, Any]:
    return answers(200, model, description, *errors, shape=shapes.openai, error=Error)


_TAG = "vLLM and OpenAI"
_CLASSIFY = """\
As vLLM's: `model` is the task, and may be missing where there is only one. `input` is a text, a
list of texts, or a list of pairs. Texts that are too long are refused, unless
`truncate_prompt_tokens` is -1.
"""
_BODY = json_body(
    record(
        ("input",),
        model=or_null({"type": "string"}),
        input=INPUTS,
        truncate_prompt_tokens=or_null({"type": "integer", "enum": [-1]}),
        user=or_null({"type": "string"}),
    ),
    {"a text": {"model": "sentiment", "input": "A charming and moving film."}},
)

CLASSIFY = RouteText(
    "POST",
    "/classify",
    _TAG,
    "Classify",
    _answers(
        ClassifyAnswer,
        "One entry for each input.",
        *(401, 403, 404, 408, 422, 429, 500, 503, 504),
    ),
    _CLASSIFY,
    extra(DEADLINE_HEADER, body=_BODY),
)
MODELS = RouteText(
    "GET",
    "/v1/models",
    _TAG,
    "List the tasks as models",
    _answers(ModelList, "The tasks that the key is for.", 401, 403, 500),
)
MODEL = RouteText(
    "GET",
    "/v1/models/{task}",
    _TAG,
    "Describe a task as a model",
    _answers(ModelCard, "The task.", 401, 403, 404, 500),
    extra=extra(TASK_IN_PATH),
)
