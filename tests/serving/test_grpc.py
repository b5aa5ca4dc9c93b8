"""The Open Inference Protocol over gRPC, without a network: what is answered, refused and told."""

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from serving.config import ServeConfig
from serving.guard import Guard
from serving.keys import KeyRing
from serving.local_key import environment_keys
from serving.metrics import Metrics
from serving.protocols.grpc_calls import GrpcCalls
from serving.protocols.grpc_messages import MESSAGES, METHODS
from serving.protocols.grpc_methods import GrpcMethods
from serving.telemetry import Telemetry
from serving.types import Caller
from tests.serving.conftest import KEYS, PREDICT_TOKEN, TOKEN
from tests.serving.fake_service import FakeService, open_fake_service
from tests.serving.test_api import TABLE


class Context:
    """What Ray Serve gives of a call."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, str] = {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return list(self._metadata.items())

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None:
        self.trailing = dict(metadata)


class Calls(GrpcMethods):
    """A replica's gRPC side."""

    def __init__(
        self,
        service: FakeService,
        metrics: Metrics,
        config: ServeConfig,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.service, self.metrics = service, metrics
        guard = Guard(KeyRing(None, environment_keys(KEYS)), auth=True)
        self._grpc = GrpcCalls(service, metrics, config, guard, telemetry)

    def call(
        self,
        name: str,
        /,
        token: str | None = TOKEN,
        metadata: dict[str, str] | None = None,
        **fields: Any,
    ) -> tuple[Any, Context]:
        """One call, which must not raise."""
        shown = {} if token is None else {"authorization": f"Bearer {token}"}
        context = Context(shown | (metadata or {}))
        request = MESSAGES[f"{name}Request"](**fields)
        response = asyncio.run(getattr(self, name)(request, context))
        assert type(response) is MESSAGES[f"{name}Response"]
        assert context.trailing["x-request-id"]
        return response, context

    def fails(self, code: grpc.StatusCode, name: str, /, *given: Any, **fields: Any) -> str:
        """The message of a call that must fail, and must answer nothing."""
        response, context = self.call(name, *given, **fields)
        assert context.code is code, context.details
        assert not response.ListFields()
        return context.details


@pytest.fixture
def calls(tmp_path: Any) -> Calls:
    config = ServeConfig.of(store=tmp_path, max_body_bytes=10_000)
    metrics = Metrics()
    return Calls(open_fake_service(config, metrics), metrics, config)


def tensor(texts: list[str], name: str = "text", **more: Any) -> dict[str, Any]:
    """One input with its texts in the message."""
    contents = {"bytes_contents": [text.encode() for text in texts]}
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "contents": contents} | more


def infer(texts: list[str], **more: Any) -> dict[str, Any]:
    """The fields of a question to `parity`."""
    return {"model_name": "parity", "inputs": [tensor(texts)]} | more


# --- asking ---------------------------------------------------------------------------------------


def test_texts_come_back_as_labels_and_probabilities(calls: Calls) -> None:
    response, context = calls.call(
        "ModelInfer", metadata={"x-request-id": "mine"}, **infer(["abc", "ab"], id="42")
    )
    assert context.code is None
    assert context.trailing == {"x-request-id": "mine"}
    assert (response.model_name, response.model_version, response.id) == ("parity", "1", "42")
    label, score, probabilities = response.outputs
    assert list(label.contents.bytes_contents) == [b"odd", b"even"]
    assert list(score.contents.fp32_contents) == [1.0, 1.0]
    assert list(probabilities.shape) == [2, 2]
    assert list(probabilities.contents.fp32_contents) == [0.0, 1.0, 1.0, 0.0]
    assert calls.metrics.registry.get_sample_value(
        "taskbone_requests_total", {"task": "parity", "version": "1", "code": "200"}
    )


def test_raw_contents_are_answered_by_raw_contents(calls: Calls) -> None:
    raw = b"".join(struct.pack("<I", len(text)) + text for text in (b"abc", b"ab"))
    bare = {"name": "text", "datatype": "BYTES", "shape": [2, 1]}
    response, _ = calls.call(
        "ModelInfer",
        model_name="parity",
        inputs=[bare],
        raw_input_contents=[raw],
        outputs=[{"name": "probabilities"}, {"name": "label"}],
    )
    probabilities, label = response.raw_output_contents
    np.testing.assert_array_equal(np.frombuffer(probabilities, "<f4"), [0, 1, 1, 0])
    assert label == b"\3\0\0\0odd\4\0\0\0even"
    assert [one.name for one in response.outputs] == ["probabilities", "label"]


def test_pairs_versions_and_what_is_said_of_a_request(calls: Calls) -> None:
    response, _ = calls.call(
        "ModelInfer",
        metadata={"x-deadline-ms": "60000"},
        model_name="pairs",
        model_version="1",
        inputs=[tensor(["a"]), tensor(["bc"], "text_pair")],
        parameters=[
            {"key": "truncate", "value": {"bool_param": False}},
            {"key": "timeout", "value": {"int64_param": 1000}},
        ],
    )
    assert list(response.outputs[0].contents.bytes_contents) == [b"odd"]
    (ask,) = calls.service.asks
    assert (ask.truncate, ask.version) == (False, 1)
    assert ask.deadline is not None


NOT_UNDERSTOOD = [
    ({"inputs": []}, "inputs: none"),
    ({"inputs": [tensor(["a"]), tensor(["a"])]}, "given twice"),
    ({"inputs": [tensor(["a"], shape=[2])]}, "needs 2 elements; 1 are given"),
    ({"inputs": [tensor(["a"], shape=[-1])]}, "needs -1 elements"),
    ({"inputs": [tensor(["a"], shape=[])]}, "expected [n] or [n, 1]"),
    ({"inputs": [tensor(["a"], datatype="FP32")]}, "expected 'BYTES'"),
    ({"inputs": [tensor(["a"], contents={"bytes_contents": [b"\xff"]})]}, "not UTF-8"),
    ({"raw_input_contents": [b"", b""]}, "raw_input_contents has 2 elements"),
    ({"raw_input_contents": [b"\1\0"]}, "cut off"),
    ({"outputs": [{"name": "logits"}]}, "output 'logits'"),
    (
        {
            "outputs": [
                {
                    "name": "label",
                    "parameters": [{"key": "classification", "value": {"int64_param": 1}}],
                }
            ]
        },
        "classification",
    ),
    ({"parameters": [{"key": "priority", "value": {"int64_param": 1}}]}, "priority"),
    ({"parameters": [{"key": "truncate"}]}, "truncate"),
    ({"model_version": "one"}, "version: 'one'"),
]


@pytest.mark.parametrize(
    ("fields", "message"), NOT_UNDERSTOOD, ids=[message for _, message in NOT_UNDERSTOOD]
)
def test_what_is_not_understood_is_said(calls: Calls, fields: dict[str, Any], message: str) -> None:
    code = grpc.StatusCode.INVALID_ARGUMENT
    assert message in calls.fails(code, "ModelInfer", **infer(["a"], **fields))


@pytest.mark.parametrize(
    ("text", "code", "retry"),
    [
        ("overload", grpc.StatusCode.UNAVAILABLE, "7"),
        ("greedy", grpc.StatusCode.RESOURCE_EXHAUSTED, "3"),
        ("late", grpc.StatusCode.DEADLINE_EXCEEDED, None),
        ("engine", grpc.StatusCode.INTERNAL, None),
        ("crash", grpc.StatusCode.INTERNAL, None),
    ],
)
def test_errors_have_codes_and_keep_the_servers_secrets(
    calls: Calls, text: str, code: grpc.StatusCode, retry: str | None
) -> None:
    _, context = calls.call("ModelInfer", **infer([text]))
    assert context.code is code
    assert "secret" not in context.details
    assert context.trailing.get("retry-after") == retry


def test_too_much_is_refused(calls: Calls) -> None:
    message = calls.fails(grpc.StatusCode.INVALID_ARGUMENT, "ModelInfer", **infer(["a" * 10_000]))
    assert "at most 10000" in message
    assert calls.service.asks == []


def test_every_error_has_a_code(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, status in TABLE:

        async def predict(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(calls.service, "predict", predict)
        _, context = calls.call("ModelInfer", **infer(["a"]))
        assert context.code is not None, error
        assert (context.code is grpc.StatusCode.UNKNOWN) == (status == 408), error


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("token", [None, "wrong"])
def test_nothing_is_answered_without_a_key(calls: Calls, name: str, token: str | None) -> None:
    _, context = calls.call(name, token)
    if name in ("ServerLive", "ServerReady"):
        assert context.code is None
    else:
        assert context.code is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_changes_need_a_key_of_their_own(calls: Calls, name: str) -> None:
    before = calls.service.task("parity")
    message = calls.fails(
        grpc.StatusCode.PERMISSION_DENIED, name, PREDICT_TOKEN, model_name="parity"
    )
    assert "admin" in message
    assert calls.service.task("parity") == before


def test_a_key_is_for_its_tasks_alone(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller("web", frozenset(("predict", "admin")), frozenset(["parity"]))
    monkeypatch.setattr(Guard, "admit", lambda *_: caller)
    response, _ = calls.call("RepositoryIndex")
    assert [one.name for one in response.models] == ["parity"]
    pairs = {"model_name": "pairs", "inputs": [tensor(["a"]), tensor(["b"], "text_pair")]}
    for name, fields in (
        ("ModelInfer", pairs),
        ("ModelMetadata", {"name": "pairs"}),
        ("ModelReady", {"name": "pairs"}),
        ("RepositoryModelLoad", {"model_name": "pairs"}),
        ("RepositoryModelUnload", {"model_name": "pairs"}),
    ):
        assert "'web'" in calls.fails(grpc.StatusCode.PERMISSION_DENIED, name, **fields)


# --- what there is --------------------------------------------------------------------------------


def test_the_server_and_its_models_are_described(calls: Calls) -> None:
    assert calls.call("ServerLive")[0].live
    assert calls.call("ServerReady")[0].ready
    assert calls.call("ServerMetadata")[0].name == "taskbone"
    assert calls.call("ModelReady", name="parity", version="1")[0].ready
    metadata, _ = calls.call("ModelMetadata", name="pairs")
    assert [one.name for one in metadata.inputs] == ["text", "text_pair"]
    assert (list(metadata.versions), metadata.platform) == (["1"], "taskbone")
    absent: list[dict[str, Any]] = [{"name": "nothing"}, {"name": "parity", "version": "9"}]
    for fields in absent:
        response, context = calls.call("ModelReady", **fields)
        assert (response.ready, context.code) == (False, None)
    for name, fields in (
        ("ModelMetadata", {"name": "parity", "version": "9"}),
        ("ModelInfer", infer(["a"], model_version="9")),
    ):
        calls.fails(grpc.StatusCode.NOT_FOUND, name, **fields)
    calls.service.healthy = False
    assert calls.call("ServerLive")[0].live
    calls.fails(grpc.StatusCode.UNAVAILABLE, "ServerReady")
    calls.fails(grpc.StatusCode.UNAVAILABLE, "ModelReady", name="parity")


def test_a_task_is_unloaded_and_loaded(calls: Calls) -> None:
    calls.call("RepositoryModelUnload", model_name="parity")
    calls.fails(grpc.StatusCode.NOT_FOUND, "ModelInfer", **infer(["a"]))
    states = {one.name: one.state for one in calls.call("RepositoryIndex")[0].models}
    assert states == {"pairs": "READY", "parity": "UNAVAILABLE"}
    assert len(calls.call("RepositoryIndex", ready=True)[0].models) == 1
    wrong = [{"key": "version", "value": {"string_param": "9"}}]
    calls.fails(
        grpc.StatusCode.NOT_FOUND, "RepositoryModelLoad", model_name="parity", parameters=wrong
    )
    calls.call("RepositoryModelLoad", model_name="parity")
    assert calls.call("ModelReady", name="parity")[0].ready


def test_a_call_that_is_cancelled_cancels_its_prediction(calls: Calls) -> None:
    async def hang_up() -> None:
        context = Context({"authorization": f"Bearer {TOKEN}"})
        request = MESSAGES["ModelInferRequest"](**infer(["wait"]))
        call = asyncio.create_task(calls.ModelInfer(request, context))
        await calls.service.waiting.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(hang_up())
    assert calls.service.cancelled == 1


def test_the_messages_are_those_of_tritons_client() -> None:
    """What one writes, the other reads: the field numbers are the protocol's."""
    service = pytest.importorskip("tritonclient.grpc.service_pb2")
    ours = MESSAGES["ModelInferRequest"](
        **infer(["abc"], id="1", raw_input_contents=[b"x"], outputs=[{"name": "label"}]),
        parameters=[{"key": "truncate", "value": {"bool_param": True}}],
    )
    theirs = service.ModelInferRequest.FromString(ours.SerializeToString())
    assert theirs.inputs[0].contents.bytes_contents[0] == b"abc"
    assert theirs.parameters["truncate"].bool_param
    assert (theirs.outputs[0].name, theirs.raw_input_contents[0]) == ("label", b"x")
    unknown = [
        name for name in METHODS if f"{name}Request" not in service.DESCRIPTOR.message_types_by_name
    ]
    assert unknown == []


def test_both_ports_are_different(tmp_path: Any) -> None:
    make: Callable[..., ServeConfig] = ServeConfig.of
    with pytest.raises(Exception, match="8000 is the port of HTTP already"):
        make(store=tmp_path, grpc_port=8000)
    with pytest.raises(Exception, match="a Ray of its own"):
        make(store=tmp_path, grpc_port=8001, ray_address="auto")
