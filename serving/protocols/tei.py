"""Text Embeddings Inference's `/predict` and `/info`. The task is named beside the body, because
that server has one model: by the header `x-task` or the query's `task`.

Inputs are read as that server reads them, and not as the native routes do: `["a", "b"]` is one
pair, and a batch is `[["a"], ["b"]]`.
"""

from typing import Any

from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from model_store.manifest import Frozen
from serving.config import ServeConfig
from serving.errors import InvalidInputError
from serving.protocols import tei_docs as docs
from serving.protocols.asking import ask_task, only_task, parse
from serving.protocols.core import Service
from serving.protocols.exchange import EXCHANGE, JSON, BodyReader, Exchange, query_of
from serving.protocols.routes import add_route
from serving.types import Prediction, TaskInfo, TextInput

_TASK_HEADER = b"x-task"


class PredictRequest(Frozen):
    """The body of `/predict`."""

    inputs: Any
    truncate: bool | None = None
    truncation_direction: str = "Right"
    raw_scores: bool = False


def add_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    """All of them."""
    bodies = BodyReader(config.max_body_bytes, config.body_timeout_s)

    async def predict(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task = _task(service, request, exchange)
        asked = parse(PredictRequest, await bodies.read(request))
        _check(asked)
        inputs, is_batch = read_inputs(asked.inputs)
        ask = exchange.ask(truncate=asked.truncate is not False)
        answer = await ask_task(service, exchange, task, inputs, ask)
        told = [_sorted(one) for one in answer.predictions]
        return Response(to_json(told if is_batch else told[0]), media_type=JSON)

    async def info(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task = _task(service, request, exchange)
        exchange.caller.check(task)
        found = service.task(task)
        exchange.task = task
        return Response(to_json(_info(found, config)), media_type=JSON)

    add_route(api, docs.PREDICT, predict)
    add_route(api, docs.INFO, info)


def _task(service: Service, request: Request, exchange: Exchange) -> str:
    """The task that a request names, in one place or in both alike."""
    header = exchange.headers.get(_TASK_HEADER)
    query = query_of(request, "task").get("task")
    named = [] if header is None else [header.decode("latin-1")]
    named += [] if query is None else [query]
    if len(set(named)) > 1:
        raise InvalidInputError(
            f"the header x-task names {named[0][:80]!r} and the query {named[1][:80]!r}; name one "
            "task"
        )
    return named[0] if named else only_task(service, exchange, "give it in the header x-task")


def _check(asked: PredictRequest) -> None:
    if asked.truncation_direction != "Right":
        raise InvalidInputError(
            f"truncation_direction is {asked.truncation_direction[:40]!r}; expected 'Right': texts "
            "lose their ends"
        )
    if asked.raw_scores:
        raise InvalidInputError("raw_scores is true; this server answers probabilities alone")


def read_inputs(given: object) -> tuple[list[TextInput], bool]:
    """The inputs as Text Embeddings Inference reads them, and whether they are a batch."""
    if isinstance(given, str):
        return [given], False
    if not isinstance(given, list) or not given:
        raise InvalidInputError(
            'inputs: expected a text, a pair ["first", "second"], or a batch of [["text"], '
            '["first", "second"], ...]'
        )
    if isinstance(given[0], str):
        return [_one(given, "inputs")], False
    return [_one(item, f"inputs.{number}") for number, item in enumerate(given)], True


def _one(item: object, where: str) -> TextInput:
    match item:
        case [str(text)]:
            return text
        case [str(first), str(second)]:
            return first, second
    raise InvalidInputError(f'{where}: expected ["text"] or a pair as ["first", "second"]')


def _sorted(prediction: Prediction) -> list[dict[str, Any]]:
    """All labels, the likeliest first."""
    told = [{"score": score, "label": label} for label, score in prediction.scores.items()]
    return sorted(told, key=lambda one: one["score"], reverse=True)


def _info(task: TaskInfo, config: ServeConfig) -> dict[str, Any]:
    labels = {str(number): label for number, label in enumerate(task.labels)}
    return {
        "model_id": task.task,
        "model_sha": task.digest,
        "model_dtype": config.precision,
        "model_type": {
            "classifier": {
                "id2label": labels,
                "label2id": {label: number for number, label in enumerate(task.labels)},
            }
        },
        "max_input_length": task.max_tokens,
        "max_batch_tokens": config.max_queued_tokens,
        "max_client_batch_size": config.max_inputs,
        "auto_truncate": True,
        "version": str(task.version),
    }
