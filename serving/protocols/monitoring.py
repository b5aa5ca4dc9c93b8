"""What is told to those who watch the server: metrics, the figures in them as JSON, and where the
nodes are that have them.
"""

import asyncio

from fastapi import FastAPI
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.protocols.exchange import JSON, query_of
from serving.protocols.routes import ErrorAnswer, RouteText, add_route, answers
from serving.stats import Stats, StatsReader, example
from serving.targets import Target, targets

_TARGETS = TypeAdapter(list[Target])

METRICS = RouteText(
    "GET",
    "/metrics",
    "operation",
    "Prometheus metrics",
    {
        **answers(200, ErrorAnswer, "", 401, 403, 500),
        200: {
            "description": "The metrics, summed over the node's replicas.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
    },
)
TARGETS = RouteText(
    "GET",
    "/metrics/targets",
    "operation",
    "Every node's address, for Prometheus' HTTP service discovery",
    answers(200, list[Target], "The front door of each living node.", 401, 403, 422, 500),
    "What `http_sd_configs` takes: one target for each node, whose `/metrics` has all its "
    "replicas. The label `node` is the machine's name.",
)
STATS = RouteText(
    "GET",
    "/v1/stats",
    "operation",
    "The metrics of this machine by task",
    answers(200, Stats, "What its replicas have counted since they started.", 401, 403, 422, 500),
    "Counts only go up: take two answers and subtract. `counts` has a number for each of "
    "`bounds_s`, how often something took at most so many seconds and more than the bound before "
    "it, and a last one for what took longer than all. The task `other` stands for all that have "
    "no numbers of their own.",
)
STATS.answers[200]["content"] = {"application/json": {"example": example()}}


def add_routes(api: FastAPI, metrics: Metrics, config: ServeConfig) -> None:
    """All of them."""
    stats = StatsReader(metrics)

    async def show_metrics(request: Request) -> Response:
        text, content_type = await asyncio.to_thread(metrics.render)
        return Response(text, headers={"content-type": content_type})

    async def show_targets(request: Request) -> Response:
        query_of(request)
        found = await asyncio.to_thread(targets, config)
        return Response(_TARGETS.dump_json(found), media_type=JSON)

    async def show_stats(request: Request) -> Response:
        query_of(request)
        return Response(await asyncio.to_thread(stats.read), media_type=JSON)

    add_route(api, METRICS, show_metrics)
    add_route(api, TARGETS, show_targets)
    add_route(api, STATS, show_stats)
