"""What is told of each request beside its metrics: a line of the access log, and its spans.

Knows ASGI's names and OpenTelemetry's words for HTTP and gRPC; imports neither. What a client made
up is told to nobody: routes as they are documented, tasks that are served, methods that exist.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from serving.logs import REQUEST, Access, AccessLog
from serving.protocols.exchange import Exchange
from serving.tracing import HeaderList, Tracing

UNKNOWN_ROUTE = "-"
_GRPC_SERVICE = "inference.GRPCInferenceService"
_METHODS = frozenset("GET HEAD POST PUT DELETE OPTIONS PATCH TRACE CONNECT".split())
_OTHER_METHOD = "_OTHER"
_PROBES = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""Asked all the time, and no news as long as they are answered well."""
_log = logging.getLogger("taskbone.tracing")


class Telemetry:
    """Tells it where somebody wants to know. For the event loop's thread."""

    def __init__(self, access_log: AccessLog | None = None, tracing: Tracing | None = None) -> None:
        self._access_log = access_log
        self._tracing = tracing

    def begin(self, exchange: Exchange, headers: HeaderList, path: str = "") -> None:
        """A request has come: what is logged from here on in its task is about it."""
        REQUEST.set(exchange)
        if self._tracing is not None and path not in _PROBES:
            try:
                exchange.trace = self._tracing.begin(headers, exchange.started)
            except Exception:  # noqa: BLE001 - of whoever writes spans, not of the request
                _log.exception("a request is not traced; it is answered all the same")

    def end_http(self, exchange: Exchange, scope: Mapping[str, Any]) -> None:
        """It has its answer, over HTTP."""
        if self._access_log is None and exchange.trace is None:
            return
        method = scope["method"] if scope["method"] in _METHODS else _OTHER_METHOD
        route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
        if exchange.trace is not None:
            attributes = {
                "http.request.method": method,
                "http.response.status_code": exchange.status,
                "url.scheme": scope.get("scheme", "http"),
            }
            name = "HTTP" if method == _OTHER_METHOD else method
            if route != UNKNOWN_ROUTE:
                attributes["http.route"] = route
                name += f" {route}"
            self._end_trace(exchange, name, attributes)
        if self._access_log is not None and (route not in _PROBES or exchange.status != 200):
            self._access_log.note(_access(exchange, method, route))

    def end_grpc(self, exchange: Exchange, call: str, code: str) -> None:
        """It has its answer, over gRPC; `code` is the name of its status."""
        method = f"{_GRPC_SERVICE}/{call}"
        if exchange.trace is not None:
            attributes = {
                "rpc.system.name": "grpc",
                "rpc.method": method,
                "rpc.response.status_code": code,
            }
            self._end_trace(exchange, method, attributes)
        if self._access_log is not None:
            self._access_log.note(_access(exchange, "gRPC", method))

    def _end_trace(self, exchange: Exchange, name: str, attributes: dict[str, Any]) -> None:
        assert exchange.trace is not None
        attributes["taskbone.request_id"] = exchange.request_id
        attributes["taskbone.task"] = exchange.task
        if exchange.version is not None:
            attributes["taskbone.version"] = exchange.version
        failed = exchange.status >= 500
        if failed:
            attributes["error.type"] = exchange.fault
        try:
            exchange.trace.end(name, attributes, failed)
        except Exception:  # noqa: BLE001 - as above
            _log.exception("a request is not traced; it was answered all the same")


def _access(exchange: Exchange, method: str, route: str) -> Access:
    return Access(
        time.time(),
        method,
        route,
        exchange.status,
        time.perf_counter() - exchange.started,
        exchange.size,
        exchange.caller.name,
        exchange.request_id,
        exchange.task,
        exchange.version,
        exchange.trace_id,
    )
