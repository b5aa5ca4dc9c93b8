"""Errors as answers, and what a client may read of them. Which error has which status is in
`serving/statuses.py`, in the native routes' words; a protocol with others gives a `Shape`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving import errors, statuses
from serving.protocols.exchange import JSON
from serving.statuses import Status


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong, as far as a client may know it."""

    code: int
    type: str
    message: str
    request_id: str


Shape = Callable[[Fault], tuple[int, dict[str, Any]]]
"""How a protocol tells a fault: its HTTP status and its body."""

_HTTP_TYPES = {404: "no_such_route", 405: "method_not_allowed"}
_SECRET = "the server failed to answer; its log says more under this request_id"  # noqa: S105


def status_of(error: Exception) -> Status:
    """How an error is answered."""
    if isinstance(error, HTTPException):
        return Status(error.status_code, _HTTP_TYPES.get(error.status_code, "http_error"))
    return statuses.status_of(error)


def fault_of(error: Exception, request_id: str) -> Fault:
    """What may be told of an error. What is the server's own trouble stands in the log alone."""
    status = status_of(error)
    message = _SECRET if status.hidden else str(error)
    if isinstance(error, HTTPException):
        message = f"{error.detail}; the routes are listed at /docs and /openapi.json"
    return Fault(status.code, status.type, message, request_id)


def error_answer(error: Exception, request_id: str, shape: Shape) -> Response:
    """The answer to an error, in a protocol's shape."""
    code, body = shape(fault_of(error, request_id))
    return Response(to_json(body), code, _headers(error), JSON)


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, HTTPException):
        return dict(error.headers or {})
    if (seconds := statuses.retry_after_s(error)) is not None:
        return {"retry-after": str(seconds)}
    if isinstance(error, errors.UnauthorizedError):
        return {"www-authenticate": 'Bearer realm="taskbone"'}
    if isinstance(error, errors.BodyTimeoutError):
        # Whatever of the body may still come belongs to no request.
        return {"connection": "close"}
    return {}
