"""The server as one ASGI application: routes, and around them, in one wrapper, all that holds for
every request: its id, its caller, turning errors into answers, counting and timing.

Knows no Ray, no models and no metric names. Plain ASGI, because it is on every request's path.
"""

import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import EXCHANGE, Exchange, Service, build_api, error_answer, status_of
from serving.config import ServeConfig
from serving.guard import Guard
from serving.keys import KeyRing
from serving.metrics import UNKNOWN_TASK, Metrics
from serving.protocols.exchange import request_id_of
from serving.statuses import REJECTIONS
from serving.telemetry import Telemetry

CLIENT_GONE = 499
"""Status counted, never sent, for a client that hung up."""

_TASKS_PREFIXES = ("/v1/tasks/", "/v2/models/")
_COUNTED_PREFIXES = ("/v1/", "/v2/models/", "/predict", "/classify")
_NOT_COUNTED = "/v1/stats"
_log = logging.getLogger(__name__)


def build_app(
    service: Service,
    metrics: Metrics,
    config: ServeConfig,
    keys: KeyRing,
    telemetry: Telemetry | None = None,
) -> ASGIApp:
    """The whole application. `keys`: whose callers are let in, and to what; `telemetry`: who else
    hears of requests."""
    api = build_api(service, metrics, config)
    guard = Guard(keys, auth=config.auth)
    return Gate(api, api.router, metrics, guard, telemetry or Telemetry())


class Gate:
    """The wrapper around all routes."""

    def __init__(
        self,
        api: ASGIApp,
        routes: ASGIApp,
        metrics: Metrics,
        guard: Guard,
        telemetry: Telemetry,
    ) -> None:
        self._api = api
        # The router is called directly: the application's own layers around it would only catch
        # what is caught here.
        self._routes = routes
        self._metrics = metrics
        self._guard = guard
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._refuse_other_protocol(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = Exchange(request_id_of(headers), time.perf_counter(), headers=headers)
        if scope["path"].startswith(_TASKS_PREFIXES):
            exchange.task = UNKNOWN_TASK
        scope[EXCHANGE] = exchange
        scope["app"] = self._api
        extra = [(b"x-request-id", exchange.request_id.encode())]
        self._telemetry.begin(exchange, scope["headers"], scope["path"])

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            else:
                exchange.size += len(message.get("body", b""))
            await send(message)

        try:
            exchange.caller = self._guard.admit(
                scope["method"], scope["path"], headers, scope.get("query_string", b""), extra
            )
            await self._routes(scope, receive, answer)
        except ClientDisconnect:
            exchange.status = CLIENT_GONE
        except Exception as error:  # noqa: BLE001 - nothing but an answer may leave this wrapper
            await self._answer_error(error, exchange, scope, receive, answer)
        finally:
            exchange.status = exchange.status or CLIENT_GONE
            self._count(scope["path"], exchange)
            self._telemetry.end_http(exchange, scope)

    async def _answer_error(
        self, error: Exception, exchange: Exchange, scope: Scope, receive: Receive, send: Send
    ) -> None:
        status = status_of(error)
        exchange.fault = status.type
        if status.code in REJECTIONS:
            exchange.rejection = status.type
        if status.hidden:
            _log.error("request %s failed", exchange.request_id, exc_info=error)
        if exchange.status:
            # The answer has begun: all that is left is to cut the connection.
            raise error
        answer = error_answer(error, exchange.request_id, scope["path"])
        await answer(scope, receive, send)

    def _count(self, path: str, exchange: Exchange) -> None:
        if exchange.rejection:
            self._metrics.rejected(exchange.rejection)
        if path.startswith(_COUNTED_PREFIXES) and path != _NOT_COUNTED:
            duration_s = time.perf_counter() - exchange.started
            status = exchange.status or CLIENT_GONE
            self._metrics.request(exchange.task, exchange.version, status, duration_s)

    async def _refuse_other_protocol(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "lifespan":
            raise NotImplementedError(f"no such ASGI protocol: {scope['type']!r}")
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
