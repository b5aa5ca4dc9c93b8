"""The server as one ASGI application: routes, and around them, in one wrapper, all that holds for
every request: its id, the token, turning errors into answers, counting and timing.

Knows no Ray, no models and no metric names. Plain ASGI, because it is on every request's path.
"""

import hashlib
import hmac
import logging
import re
import time
import uuid
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import EXCHANGE, Exchange, Service, build_api, error_answer, status_of
from serving.config import ServeConfig
from serving.errors import ForbiddenError, UnauthorizedError
from serving.metrics import UNKNOWN_TASK, Metrics

COOKIE = "taskbone_docs"
CLIENT_GONE = 499
"""Status counted, never sent, for a client that hung up."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PREFIX = "/health/"
_TASKS_PREFIX = "/v1/tasks/"
_COUNTED_PREFIX = "/v1/"
_REJECTIONS = (401, 403, 413, 503)
_log = logging.getLogger(__name__)


def build_app(
    service: Service, metrics: Metrics, config: ServeConfig, token: str | None
) -> ASGIApp:
    """The whole application. `token`: what clients must show; None lets everyone in."""
    api = build_api(service, metrics, config)
    return Gate(api, api.router, metrics, token)


class Gate:
    """The wrapper around all routes."""

    def __init__(self, api: ASGIApp, routes: ASGIApp, metrics: Metrics, token: str | None) -> None:
        self._api = api
        # The router is called directly: the application's own layers around it would only catch
        # what is caught here.
        self._routes = routes
        self._metrics = metrics
        self._guard = None if token is None else TokenGuard(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._refuse_other_protocol(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = Exchange(_request_id(headers), time.perf_counter(), headers=headers)
        if scope["path"].startswith(_TASKS_PREFIX):
            exchange.task = UNKNOWN_TASK
        scope[EXCHANGE] = exchange
        scope["app"] = self._api
        extra = [(b"x-request-id", exchange.request_id.encode())]

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            self._admit(scope, headers, extra)
            await self._routes(scope, receive, answer)
        except ClientDisconnect:
            exchange.status = CLIENT_GONE
        except Exception as error:  # noqa: BLE001 - nothing but an answer may leave this wrapper
            await self._answer_error(error, exchange, scope, receive, answer)
        finally:
            self._count(scope["path"], exchange)

    def _admit(
        self, scope: Scope, headers: dict[bytes, bytes], extra: list[tuple[bytes, bytes]]
    ) -> None:
        """Raise unless the request may go on; add the cookie's header to `extra` when it is due."""
        if self._guard is None:
            if scope["method"] not in ("GET", "HEAD"):
                _refuse_foreign_page(headers)
        elif not scope["path"].startswith(_OPEN_PREFIX):
            self._guard.check(scope, headers, extra)

    async def _answer_error(
        self, error: Exception, exchange: Exchange, scope: Scope, receive: Receive, send: Send
    ) -> None:
        status = status_of(error)
        if status.code in _REJECTIONS:
            exchange.rejection = status.type
        if status.code == 500:
            _log.error("request %s failed", exchange.request_id, exc_info=error)
        if exchange.status:
            # The answer has begun: all that is left is to cut the connection.
            raise error
        answer = error_answer(error, exchange.request_id, scope["path"])
        await answer(scope, receive, send)

    def _count(self, path: str, exchange: Exchange) -> None:
        if exchange.rejection:
            self._metrics.rejected(exchange.rejection)
        if path.startswith(_COUNTED_PREFIX):
            duration_s = time.perf_counter() - exchange.started
            self._metrics.request(exchange.task, exchange.status or CLIENT_GONE, duration_s)

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


class TokenGuard:
    """Lets in who shows the token; and a browser, to the two documentation routes, by a cookie."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        # The cookie is not the token: who reads it may read the documentation and nothing else.
        self._cookie = hmac.new(self._token, b"taskbone documentation", hashlib.sha256).hexdigest()

    def check(
        self, scope: Scope, headers: dict[bytes, bytes], extra: list[tuple[bytes, bytes]]
    ) -> None:
        """Raise `UnauthorizedError` unless the token is there; `extra`: headers for the answer."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token):
            return
        if scope["method"] == "GET" and _is_documentation(scope["path"]):
            if _has_cookie(headers, self._cookie):
                return
            if hmac.compare_digest(_query_token(scope), self._token):
                cookie = f"{COOKIE}={self._cookie}; HttpOnly; SameSite=Strict; Path=/"
                extra.append((b"set-cookie", cookie.encode()))
                extra.append((b"referrer-policy", b"no-referrer"))
                return
        found = "a wrong token" if scheme else "no token"
        raise UnauthorizedError(
            f"the request carries {found}; send the header 'Authorization: Bearer <token>' with "
            "the token that the server printed at its start (in the file 'token' of its store)"
        )


def _is_documentation(path: str) -> bool:
    return path in ("/docs", "/openapi.json") or path.startswith("/docs/")


def _has_cookie(headers: dict[bytes, bytes], expected: str) -> bool:
    try:
        found = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(COOKIE)
    except CookieError:
        return False
    return found is not None and hmac.compare_digest(found.value.encode(), expected.encode())


def _query_token(scope: Scope) -> bytes:
    query: bytes = scope.get("query_string", b"")
    return parse_qs(query.decode("latin-1")).get("token", [""])[0].encode()


def _refuse_foreign_page(headers: dict[bytes, bytes]) -> None:
    """Without a token, a page of another site in the user's browser must not reach the server."""
    origin = headers.get(b"origin")
    if origin is None:
        return
    if origin.partition(b"://")[2] != headers.get(b"host"):
        raise ForbiddenError(
            f"the request comes from a page of {origin.decode('latin-1')[:200]!r}; only this "
            "server's own pages may send requests while it runs without a token"
        )


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
