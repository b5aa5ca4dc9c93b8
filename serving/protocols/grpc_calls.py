"""The Open Inference Protocol over gRPC: the same service, keys, limits and errors as over HTTP.

Ray Serve tells a client whatever an error says: so none leaves this file. Metadata stand for
headers; what a call may do is what the HTTP route of the same meaning may do.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed
from typing import Any, Final

import grpc
from pydantic import ValidationError

from model_store.errors import NotFoundError
from model_store.manifest import describe
from serving.config import ServeConfig
from serving.errors import (
    InvalidInputError,
    TooLargeError,
    UnknownTaskError,
)
from serving.guard import Guard
from serving.metrics import UNKNOWN_TASK, Metrics
from serving.protocols import oip, repository, tensors
from serving.protocols.asking import Body, ask_task
from serving.protocols.core import Service, is_loaded
from serving.protocols.exchange import Exchange, number, request_id_of
from serving.protocols.faults import Fault, fault_of, status_of
from serving.protocols.grpc_messages import MESSAGES
from serving.protocols.site import check_ready
from serving.statuses import REJECTIONS, retry_after_s
from serving.telemetry import Telemetry
from serving.types import TaskAnswer, TaskInfo

CLIENT_GONE = 499
_CODES: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_ROUTES: Final = {
    "ServerLive": ("GET", "/v2/health/live"),
    "ServerReady": ("GET", "/v2/health/ready"),
    "ServerMetadata": ("GET", "/v2"),
    "ModelReady": ("GET", "/v2/models/-/ready"),
    "ModelMetadata": ("GET", "/v2/models/-"),
    "ModelInfer": ("POST", "/v2/models/-/infer"),
    "RepositoryIndex": ("POST", "/v2/repository/index"),
    "RepositoryModelLoad": ("POST", "/v2/repository/models/-/load"),
    "RepositoryModelUnload": ("POST", "/v2/repository/models/-/unload"),
}
"""The HTTP route that means the same: a key that opens the one opens the other."""

_log = logging.getLogger(__name__)


class GrpcCalls:
    """Answers calls by name."""

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        config: ServeConfig,
        guard: Guard,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._max_bytes = config.max_body_bytes
        self._guard = guard
        self._telemetry = telemetry or Telemetry()
        self._calls: dict[str, Callable[[Any, Exchange], Awaitable[dict[str, Any]]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def answer(self, name: str, request: Any, context: Any) -> Any:
        """The response to a request; after an error an empty one, and `context` says what it is."""
        headers = {
            key.encode(): value if isinstance(value, bytes) else value.encode()
            for key, value in context.invocation_metadata()
        }
        exchange = Exchange(request_id_of(headers), time.perf_counter(), headers=headers)
        trailing = [("x-request-id", exchange.request_id)]
        exchange.status = CLIENT_GONE
        code = grpc.StatusCode.CANCELLED
        self._telemetry.begin(exchange, list(headers.items()))
        try:
            exchange.caller = self._guard.admit(*_ROUTES[name], headers, b"", [])
            if request.ByteSize() > self._max_bytes:
                raise TooLargeError(
                    f"the request has {request.ByteSize()} bytes; at most {self._max_bytes} are "
                    "taken"
                )
            answer = MESSAGES[f"{name}Response"](**await self._calls[name](request, exchange))
            exchange.status, code = 200, grpc.StatusCode.OK
            return answer
        except Exception as error:  # noqa: BLE001 - Ray would tell the client all about it
            fault = fault_of(error, exchange.request_id)
            self._note(fault, exchange, error)
            if (seconds := retry_after_s(error)) is not None:
                trailing.append(("retry-after", str(seconds)))
            code = _CODES.get(fault.code, grpc.StatusCode.UNKNOWN)
            context.set_code(code)
            context.set_details(fault.message)
            return MESSAGES[f"{name}Response"]()
        finally:
            context.set_trailing_metadata(trailing)
            self._metrics.request(
                exchange.task,
                exchange.version,
                exchange.status,
                time.perf_counter() - exchange.started,
            )
            self._telemetry.end_grpc(exchange, name, code.name)

    def _note(self, fault: Fault, exchange: Exchange, error: Exception) -> None:
        exchange.status, exchange.fault = fault.code, fault.type
        if status_of(error).hidden:
            _log.error("request %s failed", exchange.request_id, exc_info=error)
        if fault.code in REJECTIONS:
            self._metrics.rejected(fault.type)

    # --- the calls ------------------------------------------------------------------------------

    async def _server_live(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        return {"live": True}

    async def _server_ready(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        check_ready(self._service)
        return {"ready": True}

    async def _server_metadata(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        return {
            "name": "taskbone",
            "version": installed("taskbone"),
            "extensions": oip.EXTENSIONS,
        }

    async def _model_ready(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        try:
            await self._described(request, exchange)
        except (UnknownTaskError, NotFoundError):
            return {"ready": False}
        check_ready(self._service)
        return {"ready": True}

    async def _model_metadata(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        info = await self._described(request, exchange)
        versions = [str(one.version) for one in await self._service.versions(info.task)]
        told = oip.model_metadata(info, versions)
        del told["parameters"]  # for which this protocol's message has no place
        return told

    async def _infer(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        asked = _read(request)
        version = number(request.model_version, "version") if request.model_version else None
        ask = exchange.ask(asked.request.parameters.truncate, version)
        ask = oip.sooner(ask, exchange, asked.request.parameters.timeout)
        answer = await ask_task(self._service, exchange, request.model_name, asked.inputs, ask)
        return _written(answer, request, asked.request)

    async def _index(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        found = await self._service.all_versions()
        return {
            "models": [
                repository.index_entry(info)
                for info in found
                if exchange.caller.may(info.task) and (info.active or not request.ready)
            ]
        }

    async def _load(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        task: str = request.model_name
        wanted = _checked(repository.LoadParameters, request.parameters).version
        exchange.caller.check(task)
        try:
            await repository.load_version(self._service, task, wanted, exchange.caller)
        finally:
            exchange.task = task if is_loaded(self._service, task) else UNKNOWN_TASK
        return {}

    async def _unload(self, request: Any, exchange: Exchange) -> dict[str, Any]:
        task: str = request.model_name
        _checked(repository.UnloadParameters, request.parameters)
        exchange.caller.check(task)
        exchange.task = task if is_loaded(self._service, task) else UNKNOWN_TASK
        await self._service.lifecycle.deactivate(task, exchange.caller)
        return {}

    async def _described(self, request: Any, exchange: Exchange) -> TaskInfo:
        """The version of a task that a request names."""
        exchange.caller.check(request.name)
        info = self._service.task(request.name)
        exchange.task = info.task
        if request.version:
            return await self._service.version(info.task, number(request.version, "version"))
        return info


def _values(entries: Any) -> dict[str, Any]:
    """Parameters as plain values."""
    found = {}
    for entry in entries:
        kind = entry.value.WhichOneof("choice")
        found[entry.key] = None if kind is None else getattr(entry.value, kind)
    return found


def _checked(kind: type[Body], entries: Any) -> Body:
    """Parameters as a record. Raises `InvalidInputError` that names every wrong one."""
    try:
        return kind.model_validate(_values(entries), strict=True)
    except ValidationError as error:
        raise InvalidInputError(f"the parameters: {describe(error)}") from None


def _read(request: Any) -> tensors.Infer:
    """What a message asks. Its texts lie in each tensor's `contents`, or all in
    `raw_input_contents`. Raises `InvalidInputError`."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInputError(
            f"raw_input_contents has {len(raw)} elements; expected one for each of "
            f"{len(request.inputs)} inputs"
        )
    found: dict[str, list[str]] = {}
    for index, tensor in enumerate(request.inputs):
        _checked(tensors.InputParameters, tensor.parameters)
        if raw:
            texts = tensors.unpack(tensor.name, memoryview(raw[index]))
        else:
            parts = enumerate(tensor.contents.bytes_contents)
            texts = [tensors.decoded(tensor.name, place, part) for place, part in parts]
        tensors.add(found, tensor.name, tensor.datatype, list(tensor.shape), texts)
    for wish in request.outputs:
        _checked(tensors.OutputParameters, wish.parameters)
    wishes = tuple(tensors.OutputWish(name=wish.name) for wish in request.outputs) or None
    tensors.check_outputs(wishes)
    asked = tensors.InferRequest(
        id=request.id,
        parameters=_checked(tensors.InferParameters, request.parameters),
        inputs=(),
        outputs=wishes,
    )
    return tensors.Infer(asked, tensors.join(found))


def _written(answer: TaskAnswer, request: Any, asked: tensors.InferRequest) -> dict[str, Any]:
    """An answer's fields: raw where the request was."""
    outputs, behind = [], []
    for name in [wish.name for wish in asked.outputs or ()] or tensors.OUTPUTS:
        described, values = tensors.output(name, answer)
        if request.raw_input_contents:
            behind.append(tensors.pack(values))
        elif described["datatype"] == "BYTES":
            described["contents"] = {"bytes_contents": [text.encode() for text in values]}
        else:
            described["contents"] = {"fp32_contents": values}
        outputs.append(described)
    return {
        "model_name": answer.task,
        "model_version": str(answer.version),
        "id": request.id,
        "outputs": outputs,
        "raw_output_contents": behind,
    }
