"""vLLM's `/classify`, and OpenAI's list of models as vLLM answers it: a task is a model whose
parent is the backbone.
"""

import time
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from model_store.manifest import Frozen
from serving.config import ServeConfig
from serving.errors import InvalidInputError
from serving.inputs import inputs_of
from serving.protocols import vllm_docs as docs
from serving.protocols.asking import ask_task, only_task, parse
from serving.protocols.core import Service
from serving.protocols.exchange import EXCHANGE, JSON, BodyReader, Exchange
from serving.protocols.routes import add_route
from serving.types import TaskAnswer, TaskInfo

CUT_TO_FIT = -1
"""`truncate_prompt_tokens` with which vLLM, too, cuts to what the model takes."""


class ClassifyRequest(Frozen):
    """The body of `/classify`. `user` is OpenAI's, and changes nothing."""

    model: str | None = None
    input: Any
    truncate_prompt_tokens: int | None = None
    user: str | None = None


def add_routes(api: FastAPI, service: Service, config: ServeConfig) -> None:
    """All of them."""
    bodies = BodyReader(config.max_body_bytes, config.body_timeout_s)

    async def classify(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        asked = parse(ClassifyRequest, await bodies.read(request))
        task = asked.model or only_task(service, exchange, "give it in 'model'")
        inputs = inputs_of(asked.input, "input")
        ask = exchange.ask(truncate=_truncates(asked))
        answer = await ask_task(service, exchange, task, inputs, ask)
        return _json(_classified(answer, exchange.request_id))

    async def models(request: Request) -> Response:
        caller = request.scope[EXCHANGE].caller
        found = [info for info in service.tasks() if caller.may(info.task)]
        cards = [_card(info, service.backbone.name) for info in found]
        return _json({"object": "list", "data": cards})

    async def model(request: Request) -> Response:
        exchange: Exchange = request.scope[EXCHANGE]
        task: str = request.path_params["task"]
        exchange.caller.check(task)
        info = service.task(task)
        exchange.task = task
        return _json(_card(info, service.backbone.name))

    add_route(api, docs.CLASSIFY, classify)
    add_route(api, docs.MODELS, models)
    add_route(api, docs.MODEL, model)


def _truncates(asked: ClassifyRequest) -> bool:
    """Whether texts may be cut; vLLM, and so this route, refuses them unless told."""
    if asked.truncate_prompt_tokens not in (None, CUT_TO_FIT):
        raise InvalidInputError(
            f"truncate_prompt_tokens is {asked.truncate_prompt_tokens}; expected -1, which cuts "
            "texts to what the task takes, or nothing, which refuses longer ones"
        )
    return asked.truncate_prompt_tokens is not None


def _classified(answer: TaskAnswer, request_id: str) -> dict[str, Any]:
    data = [
        {
            "index": index,
            "label": one.label,
            "probs": list(one.scores.values()),
            "num_classes": len(one.scores),
        }
        for index, one in enumerate(answer.predictions)
    ]
    usage = {
        "prompt_tokens": answer.tokens,
        "total_tokens": answer.tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    return {
        "id": f"classify-{request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": answer.task,
        "data": data,
        "usage": usage,
    }


def _card(info: TaskInfo, backbone: str) -> dict[str, Any]:
    """A task as a model: its root is the very file that answers, its parent the backbone."""
    return {
        "id": info.task,
        "object": "model",
        "created": int(datetime.fromisoformat(info.published_at).timestamp()),
        "owned_by": "taskbone",
        "root": f"sha256:{info.digest}",
        "parent": backbone,
        "max_model_len": info.max_tokens,
        "permission": [],
    }


def _json(record: dict[str, Any]) -> Response:
    return Response(to_json(record), media_type=JSON)
