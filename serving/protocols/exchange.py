"""One request on its way: its record, its body within limits, its headers and query read strictly.

Knows HTTP and the limits; nothing of any protocol's shapes.
"""

import asyncio
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.errors import BodyTimeoutError, InvalidInputError, TooLargeError
from serving.metrics import NO_TASK
from serving.tracing import Trace
from serving.types import ANYBODY, Ask, Caller

EXCHANGE = "taskbone.exchange"
"""Key in the ASGI scope under which the request's `Exchange` lies."""

JSON = "application/json"
DEADLINE = b"x-deadline-ms"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(slots=True)
class Exchange:
    """One request and what came of it; the handler fills in task and version, the wrapper all
    else."""

    request_id: str
    started: float
    task: str = NO_TASK
    version: int | None = None
    """The version that answered, or would have, where the request was for one."""
    status: int = 0
    rejection: str = ""
    fault: str = ""
    """What went wrong, as the native routes call it."""
    caller: Caller = ANYBODY
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    size: int = 0
    """Bytes of the answer's body."""
    trace: Trace | None = None
    """Its spans, where requests are traced."""

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to; empty where requests are not traced."""
        return "" if self.trace is None else self.trace.trace_id

    def ask(self, truncate: bool = True, version: int | None = None) -> Ask:
        """What this request says besides task and inputs. Raises `InvalidInputError`."""
        given = self.headers.get(DEADLINE)
        deadline = None if given is None else self.started + _milliseconds(given) / 1000
        stages = None if self.trace is None else self.trace.stages
        return Ask(self.request_id, self.caller, deadline, truncate, version, stages)


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """The caller's own id for the request, or a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _milliseconds(given: bytes) -> int:
    if not given.isdigit() or len(given) > 9 or int(given) == 0:
        shown = given[:40].decode("latin-1")
        raise InvalidInputError(
            f"the header x-deadline-ms is {shown!r}; expected the whole number of milliseconds, "
            "at least 1, within which the answer is of use"
        )
    return int(given)


class BodyReader:
    """Reads bodies that are neither too large nor too slow.

    One look at all that are being read, now and then, costs a request a tenth of what a timer of
    its own does.
    """

    def __init__(self, max_bytes: int, within_s: float) -> None:
        self._max_bytes = max_bytes
        self._within_s = within_s
        # In the order in which they are due.
        self._due: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._watching = False

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises `TooLargeError` as soon as too many bytes are announced or come,
        and `BodyTimeoutError` when they come too slowly."""
        exchange: Exchange = request.scope[EXCHANGE]
        announced = exchange.headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            raise TooLargeError(_over_limit(announced[:20].decode(), self._max_bytes))
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._due[task] = loop.time() + self._within_s
        if not self._watching:
            self._watch(loop)
        try:
            return await _chunks(request, self._max_bytes)
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            self._late.remove(task)
            task.uncancel()
            raise BodyTimeoutError(
                f"the body was not there after {self._within_s:g} s; send it faster, or in parts"
            ) from None
        finally:
            del self._due[task]

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Interrupt those that are late; look again as long as there are others."""
        now = loop.time()
        for task, due in self._due.items():
            if due > now:
                break
            self._late.add(task)
            task.cancel()
        self._watching = bool(self._due)
        if self._watching:
            loop.call_later(self._within_s / 10, self._watch, loop)


async def _chunks(request: Request, limit: int) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > limit:
            raise TooLargeError(_over_limit(f"more than {limit}", limit))
        chunks.append(chunk)
    return b"".join(chunks)


def _over_limit(given: str, limit: int) -> str:
    return f"the body has {given} bytes; this route takes at most {limit}"


def query_of(request: Request, *names: str) -> dict[str, str]:
    """The query's values. Raises `InvalidInputError` for a name that the route does not know."""
    given = request.query_params
    for name in given:
        if name not in names:
            known = ", ".join(names) or "none"
            raise InvalidInputError(
                f"query parameter {name[:80]!r}: not known here; known: {known}"
            )
    return dict(given)


def flag(query: Mapping[str, str], name: str, default: bool) -> bool:
    """A query parameter that is `true` or `false`."""
    given = query.get(name)
    if given is None:
        return default
    if given not in ("true", "false"):
        raise InvalidInputError(f"query parameter {name}: {given[:40]!r}; expected true or false")
    return given == "true"


def number(given: str, name: str) -> int:
    """A whole number of at least 1 from a path or a query."""
    if not (given.isascii() and given.isdecimal() and len(given) <= 9 and int(given)):
        raise InvalidInputError(f"{name}: {given[:40]!r}; expected a whole number, at least 1")
    return int(given)


def version_of(request: Request) -> int:
    """The version in the path."""
    return number(request.path_params["version"], "version")


def answer(adapter: "TypeAdapter[Any]", record: Any, status: int = 200) -> Response:
    """A record as JSON."""
    return Response(adapter.dump_json(record), status, media_type=JSON)
