"""What a line of the log says, as text or as JSON, and to which request it belongs.

What a client sends stands in no line: no text, no key, no query, no path that it made up, and no
message of an error that may quote one of them. How lines get out is in `log_lines.py`.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from model_store.errors import ModelStoreError
from serving.config import ServeConfig
from serving.errors import ServingError
from serving.log_lines import LineHandler, LineWriter, Write, write_to_stderr
from serving.statuses import status_of

OURS = ("taskbone", "serving", "model_store")
_log = logging.getLogger("taskbone.server")

_QUOTE_NOTHING = (OSError, MemoryError, ArithmeticError, RuntimeError)
"""Errors whose messages speak of files, memory, numbers and devices. Those of others, of `KeyError`
or `ValueError` or a library's own, quote what could not be read: for a request, its text."""
_NOT_SHOWN = "(not shown: the message may quote the request)"


class Subject(Protocol):
    """A request that is under way; `serving.protocols.exchange.Exchange` is one."""

    request_id: str
    task: str
    version: int | None

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where nothing is traced."""
        ...


REQUEST: ContextVar[Subject | None] = ContextVar("request", default=None)
"""The request that the running code works for."""


def start(config: ServeConfig, write: Write = write_to_stderr) -> LineWriter:
    """Have all that this process logs written to `write`, in the settings' format."""
    handler = _handler(config, write)
    logging.getLogger().addHandler(handler)
    return handler.writer


def _handler(config: ServeConfig, write: Write) -> LineHandler:
    formatter = JsonFormatter() if config.log_format == "json" else TextFormatter()
    handler = LineHandler(LineWriter(write, lambda count: formatter.format(_lost(count))))
    handler.setFormatter(formatter)
    return handler


@contextmanager
def of_main_process(config: ServeConfig, as_json: bool = False) -> Iterator[Console]:
    """Log as `start` says, and give what speaks to the operator: in JSON, lines of the log, too.

    `as_json`: the standard output is for a program, and nothing of this goes there.
    """
    handler = _handler(config, write_to_stderr)
    root = logging.getLogger()
    root.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        in_log = config.log_format == "json"
        yield LogConsole() if in_log else Console(highlight=False, stderr=as_json)
    except (ServingError, ModelStoreError) as error:
        if config.log_format != "json":
            raise
        _log.error("%s", error)
        raise SystemExit(1) from error
    finally:
        handler.flush()
        root.removeHandler(handler)


class LogConsole(Console):
    """A console whose every print is a line of the log."""

    def __init__(self) -> None:
        super().__init__(file=sys.stderr, force_terminal=False)

    def print(self, *objects: Any, **_: Any) -> None:
        """Log at INFO."""
        _log.info("%s", " ".join(map(str, objects)))


def _lost(count: int) -> logging.LogRecord:
    message = "%d lines were lost: more was logged than could be written"
    return logging.LogRecord("taskbone.log", logging.WARNING, "", 0, message, (count,), None)


# --- formats --------------------------------------------------------------------------------------


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE`, with the request's id; an error's traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        subject, message = REQUEST.get(), _message(record)
        line = f"{_iso(record.created)} {record.levelname} {record.name}: {message}"
        if subject is not None and subject.request_id not in message:
            line += f" (request {subject.request_id})"
        if error := _error_of(record, subject):
            line += "\n" + error
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        subject = REQUEST.get()
        fields: dict[str, Any] = {
            "time": _iso(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            "pid": record.process,
        }
        if subject is not None:
            fields |= _named(subject.request_id, subject.task, subject.version, subject.trace_id)
        if error := _error_of(record, subject):
            fields["exception"] = error
        return json.dumps(fields)


def _named(request_id: str, task: str, version: int | None, trace_id: str) -> dict[str, Any]:
    """What tells a request from others, without what is not known of it."""
    fields: dict[str, Any] = {"request_id": request_id, "task": task}
    if version is not None:
        fields["version"] = version
    if trace_id:
        fields["trace_id"] = trace_id
    return fields


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    # asyncio's go on with the error itself.
    return message.partition("\n")[0] if record.name == "asyncio" else message


def _error_of(record: logging.LogRecord, subject: Subject | None) -> str:
    """The traceback of a record's error. All messages only where no request is at work in it."""
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    quotes_nothing = subject is None and record.name.startswith(OURS)
    return "".join(_traceback(record.exc_info[1], quotes_nothing, set())).rstrip()


def _traceback(error: BaseException, all_messages: bool, seen: set[int]) -> Iterator[str]:
    """As `traceback.format_exception`, without messages that may quote what a client sent."""
    seen.add(id(error))
    cause, context = error.__cause__, error.__context__
    if cause is not None and id(cause) not in seen:
        yield from _traceback(cause, all_messages, seen)
        yield "\nThe above exception was the direct cause of the following exception:\n\n"
    elif context is not None and not error.__suppress_context__ and id(context) not in seen:
        yield from _traceback(context, all_messages, seen)
        yield "\nDuring handling of the above exception, another exception occurred:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    told = all_messages or _quotes_nothing(error)
    yield f"{type(error).__qualname__}: {error if told else _NOT_SHOWN}\n"


def _quotes_nothing(error: BaseException) -> bool:
    if isinstance(error, ServingError | ModelStoreError):
        # What is the client's fault is told to the client, in its words.
        return status_of(error).code >= 500
    return isinstance(error, _QUOTE_NOTHING)


# --- one line for each request --------------------------------------------------------------------


class Access(NamedTuple):
    """An answered request, for its line. `route`: as it is documented, never as it was sent."""

    at: float
    method: str
    route: str
    status: int
    duration_s: float
    size: int
    """Bytes of the answer's body."""
    key: str
    """The key's name."""
    request_id: str
    task: str
    version: int | None
    trace_id: str


class AccessLog:
    """A line for each request that was answered."""

    def __init__(self, writer: LineWriter, log_format: str) -> None:
        self._writer = writer
        self._render = _access_json if log_format == "json" else _access_text

    def note(self, access: Access) -> None:
        """Have the line written."""
        self._writer.put(self._render, access)


_ACCESS = "taskbone.access"


def _access_text(access: Access) -> str:
    line = (
        f"{_iso(access.at)} INFO {_ACCESS}: {access.method} {access.route} {access.status} "
        f"{1000 * access.duration_s:.1f} ms, {access.size} bytes, key {access.key}, "
        f"task {access.task}"
    )
    if access.version is not None:
        line += f", version {access.version}"
    line += f" (request {access.request_id}"
    return line + (f", trace {access.trace_id})" if access.trace_id else ")")


def _access_json(access: Access) -> str:
    """Written by hand, for a third of what `json.dumps` costs: nothing in it can need escaping,
    because names of tasks and keys, request ids and routes have no such characters."""
    version = "" if access.version is None else f'"version": {access.version}, '
    trace = f'"trace_id": "{access.trace_id}", ' if access.trace_id else ""
    return (
        f'{{"time": "{_iso(access.at)}", "level": "INFO", "logger": "{_ACCESS}", '
        f'"message": "{access.method} {access.route} {access.status}", "pid": {os.getpid()}, '
        f'"request_id": "{access.request_id}", "task": "{access.task}", {version}{trace}'
        f'"method": "{access.method}", "route": "{access.route}", "status": {access.status}, '
        f'"duration_ms": {1000 * access.duration_s:.3f}, "bytes": {access.size}, '
        f'"key": "{access.key}"}}'
    )
