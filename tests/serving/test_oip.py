"""The Open Inference Protocol over a fake service: routes, tensors, and Triton's repository."""

import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidInputError
from serving.protocols.tensors import read_infer
from tests.serving.conftest import Served

TEXTS = ["abc", "ab", "\N{SNOWMAN}"]


def text_input(texts: list[str], name: str = "text", **more: Any) -> dict[str, Any]:
    """One input tensor in JSON."""
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": texts, **more}


def infer(served: Served, body: dict[str, Any], task: str = "parity", **more: Any) -> Any:
    """One inference request."""
    return served.ask("POST", f"/v2/models/{task}/infer", json=body, **more)


def error_in(answer: httpx.Response, status: int) -> str:
    """The message of an error, after checking what holds for all of them."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert answer.headers["x-request-id"]
    message: str = answer.json()["error"]
    return message


def packed(texts: list[bytes]) -> bytes:
    """Texts as the binary extension has them."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def infer_binary(served: Served, body: dict[str, Any], data: bytes, **headers: str) -> Any:
    """One inference request with tensors behind its JSON."""
    start = json.dumps(body).encode()
    headers = {"inference-header-content-length": str(len(start)), **headers}
    return served.ask("POST", "/v2/models/parity/infer", content=start + data, headers=headers)


# --- asking ---------------------------------------------------------------------------------------


def test_texts_come_back_as_labels_and_probabilities(served: Served) -> None:
    body = infer(served, {"id": "42", "inputs": [text_input(TEXTS)]}).json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("parity", "1", "42")
    label, score, probabilities = body["outputs"]
    assert label == {
        "name": "label",
        "datatype": "BYTES",
        "shape": [3],
        "data": ["odd", "even", "odd"],
    }
    assert (score["datatype"], score["shape"], score["data"]) == ("FP32", [3], [1.0, 1.0, 1.0])
    assert probabilities["shape"] == [3, 2]
    assert probabilities["data"] == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0]


def test_rows_of_one_are_texts_too(served: Served) -> None:
    tensor = {**text_input([]), "shape": [2, 1], "data": [["abc"], ["ab"]]}
    assert infer(served, {"inputs": [tensor]}).json()["outputs"][0]["data"] == ["odd", "even"]


def test_pairs_come_in_two_inputs(served: Served) -> None:
    inputs = [text_input(["bc", "b"], "text_pair"), text_input(["a", "a"])]
    body = infer(served, {"inputs": inputs}, "pairs").json()
    assert body["outputs"][0]["data"] == ["odd", "even"]
    assert "text_pair" in error_in(infer(served, {"inputs": inputs[:1]}, "pairs"), 422)
    assert "wrong kind" in error_in(infer(served, {"inputs": inputs}), 422)


def test_the_caller_chooses_the_outputs(served: Served) -> None:
    wishes = [{"name": "score"}, {"name": "label"}]
    body = infer(served, {"inputs": [text_input(TEXTS)], "outputs": wishes}).json()
    assert [one["name"] for one in body["outputs"]] == ["score", "label"]
    assert "id" not in body


def test_a_version_is_asked_by_its_number(served: Served) -> None:
    served.ask("POST", "/v1/tasks/new/versions", content=b"one")
    served.ask("POST", "/v1/tasks/new/versions", content=b"two")
    body = {"inputs": [text_input(["a"])]}
    answer = served.ask("POST", "/v2/models/new/versions/1/infer", json=body)
    assert answer.json()["model_version"] == "1"
    error_in(served.ask("POST", "/v2/models/new/versions/3/infer", json=body), 404)
    error_in(served.ask("POST", "/v2/models/new/versions/x/infer", json=body), 422)


def test_what_is_said_of_the_request_reaches_the_service(served: Served) -> None:
    body = {"inputs": [text_input(["a"])], "parameters": {"truncate": False, "timeout": 2_000_000}}
    infer(served, body, headers={"x-deadline-ms": "60000", "x-request-id": "mine"})
    infer(served, body, headers={"x-deadline-ms": "1000"})
    first, second = served.service.asks
    assert (first.truncate, first.request_id) == (False, "mine")
    assert first.deadline is not None
    assert second.deadline is not None
    assert first.deadline - second.deadline < 10


# --- tensors behind the JSON ----------------------------------------------------------------------


def test_inputs_may_lie_behind_the_json(served: Served) -> None:
    data = packed([text.encode() for text in TEXTS])
    tensor = {"name": "text", "shape": [3, 1], "datatype": "BYTES"}
    body = {"inputs": [tensor | {"parameters": {"binary_data_size": len(data)}}]}
    answer = infer_binary(served, body, data)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["outputs"][0]["data"] == ["odd", "even", "odd"]


def test_outputs_may_lie_behind_the_json(served: Served) -> None:
    wishes = [
        {"name": "probabilities"},
        {"name": "score", "parameters": {"binary_data": False}},
        {"name": "label"},
    ]
    body = {"inputs": [text_input(TEXTS)], "parameters": {"binary_data_output": True}}
    answer = infer(served, body | {"outputs": wishes})
    assert answer.headers["content-type"] == "application/octet-stream"
    start = int(answer.headers["inference-header-content-length"])
    outputs = json.loads(answer.content[:start])["outputs"]
    assert [one.get("parameters", {}).get("binary_data_size") for one in outputs] == [24, None, 22]
    assert outputs[1]["data"] == [1.0, 1.0, 1.0]
    behind = answer.content[start:]
    np.testing.assert_array_equal(np.frombuffer(behind[:24], "<f4"), [0, 1, 1, 0, 0, 1])
    assert behind[24:] == packed([b"odd", b"even", b"odd"])


TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES"}


@pytest.mark.parametrize(
    ("tensor", "data", "message"),
    [
        ({"parameters": {"binary_data_size": 5}}, b"", "5; 0 bytes are left"),
        ({"parameters": {"binary_data_size": 3}}, b"\x01\0\0", "cut off"),
        ({"parameters": {"binary_data_size": 5}}, b"\x02\0\0\0a", "cut off"),
        ({"parameters": {"binary_data_size": 5}}, b"\xff\xff\xff\xffa", "cut off"),
        ({"parameters": {"binary_data_size": 5}}, b"\x01\0\0\0\xff", "element 0 is not UTF-8"),
        ({"parameters": {"binary_data_size": 0}}, b"", "needs 1 elements; 0 are given"),
        ({"parameters": {"binary_data_size": 5}}, b"\x01\0\0\0ab", "1 bytes are left behind"),
        ({"parameters": {"binary_data_size": -1}}, b"", "binary_data_size"),
        ({"parameters": {"binary_data_size": 5}, "data": ["a"]}, b"\x01\0\0\0a", "expected either"),
        ({}, b"", "expected either"),
    ],
)
def test_binary_data_that_does_not_agree_is_said(
    served: Served, tensor: dict[str, Any], data: bytes, message: str
) -> None:
    assert message in error_in(infer_binary(served, {"inputs": [TENSOR | tensor]}, data), 422)


@pytest.mark.parametrize("length", ["x", "-1", "", "9" * 20, "1000000"])
def test_a_wrong_length_of_the_json_is_said(served: Served, length: str) -> None:
    body = json.dumps({"inputs": [text_input(["a"])]}).encode()
    answer = served.ask(
        "POST",
        "/v2/models/parity/infer",
        content=body,
        headers={"inference-header-content-length": length},
    )
    assert "Inference-Header-Content-Length" in error_in(answer, 422)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "inputs: Field required"),
        ({"inputs": []}, "inputs: none"),
        ({"inputs": [text_input(["a"]), text_input(["b"])]}, "'text' is given twice"),
        ({"inputs": [text_input(["a"], "words")]}, "inputs: 'words'; expected 'text'"),
        ({"inputs": [text_input(["a"], datatype="FP32")]}, "datatype 'FP32'; expected 'BYTES'"),
        ({"inputs": [text_input(["a"], shape=[2])]}, "needs 2 elements; 1 are given"),
        ({"inputs": [text_input(["a"], shape=[1, 2])]}, "expected [n] or [n, 1]"),
        ({"inputs": [text_input(["a"], shape=[-1])]}, "inputs.0.shape.0"),
        ({"inputs": [text_input(["a"], shape=[])]}, "expected [n] or [n, 1]"),
        ({"inputs": [text_input(["a"], data=[1])]}, "element 0 is no text"),
        ({"inputs": [text_input(["a"], data="a")]}, "inputs.0.data"),
        ({"inputs": [text_input([], shape=[0])]}, "at least one input"),
        (
            {"inputs": [text_input(["a"]), text_input(["b", "c"], "text_pair")]},
            "'text' has 1 elements and 'text_pair' 2",
        ),
        ({"inputs": [text_input(["a"])], "outputs": [{"name": "logits"}]}, "output 'logits'"),
        ({"inputs": [text_input(["a"])], "outputs": [{"name": "label"}] * 2}, "asked for twice"),
        ({"inputs": [text_input(["a"])], "parameters": {"priority": 1}}, "parameters.priority"),
        ({"inputs": [text_input(["a"])], "parameters": {"timeout": 0}}, "parameters.timeout"),
        ({"inputs": [text_input(["a"])], "more": 1}, "more"),
    ],
)
def test_a_request_that_is_not_understood_is_said(
    served: Served, body: dict[str, Any], message: str
) -> None:
    assert message in error_in(infer(served, body), 422)


@given(st.binary(), st.none() | st.integers(0, 40))
def test_any_bytes_are_a_request_or_an_error_of_ours(body: bytes, json_bytes: int | None) -> None:
    with pytest.raises(InvalidInputError):
        read_infer(body, json_bytes)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.booleans())
def test_texts_come_out_as_they_went_in(texts: list[str], binary: bool) -> None:
    data = packed([text.encode() for text in texts]) if binary else b""
    tensor = text_input(texts)
    if binary:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(data)}
    start = json.dumps({"inputs": [tensor]}).encode()
    assert read_infer(start + data, len(start) if binary else None).inputs == texts


# --- what there is --------------------------------------------------------------------------------


def test_the_server_says_what_it_is(served: Served) -> None:
    body = served.ask("GET", "/v2").json()
    assert body["name"] == "taskbone"
    assert body["extensions"] == ["binary_tensor_data", "model_repository"]


def test_health_is_for_everyone(served: Served) -> None:
    assert served.ask("GET", "/v2/health/live", token=None).json() == {"live": True}
    assert served.ask("GET", "/v2/health/ready", token=None).json() == {"ready": True}
    served.service.healthy = False
    assert served.ask("GET", "/v2/health/live", token=None).status_code == 200
    error_in(served.ask("GET", "/v2/health/ready", token=None), 503)
    error_in(served.ask("GET", "/v2/models/parity/ready"), 503)


def test_a_task_is_described_as_a_model(served: Served) -> None:
    body = served.ask("GET", "/v2/models/pairs").json()
    assert (body["name"], body["platform"], body["versions"]) == ("pairs", "taskbone", ["1"])
    assert [one["name"] for one in body["inputs"]] == ["text", "text_pair"]
    assert body["outputs"][2] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}
    assert body["parameters"] == {"labels": ["even", "odd"], "max_tokens": 128}
    assert served.ask("GET", "/v2/models/pairs/versions/1").json() == body
    error_in(served.ask("GET", "/v2/models/nothing"), 404)
    error_in(served.ask("GET", "/v2/models/pairs/versions/2"), 404)


def test_a_task_says_whether_it_answers(served: Served) -> None:
    ready = {"name": "parity", "ready": True}
    assert served.ask("GET", "/v2/models/parity/ready").json() == ready
    assert served.ask("GET", "/v2/models/parity/versions/1/ready").json() == ready
    error_in(served.ask("GET", "/v2/models/parity/versions/2/ready"), 404)
    error_in(served.ask("GET", "/v2/models/nothing/ready"), 404)


def test_requests_are_counted_under_their_task(served: Served) -> None:
    infer(served, {"inputs": [text_input(["a"])]})
    infer(served, {"inputs": [text_input(["a"])]}, "nothing")
    assert served.count("taskbone_requests_total", task="parity", code="200") == 1
    assert served.count("taskbone_requests_total", task="unknown", code="404") == 1


# --- the repository -------------------------------------------------------------------------------


@pytest.fixture
def three(served: Served) -> Served:
    """A task `new` with three versions, the second active."""
    for content, query in ((b"one", ""), (b"two", ""), (b"three", "?activate=false")):
        assert served.ask("POST", f"/v1/tasks/new/versions{query}", content=content).is_success
    return served


def states(served: Served, **body: Any) -> list[tuple[str, str, str]]:
    """The index of the repository."""
    answer = served.ask("POST", "/v2/repository/index", json=body or None)
    return [(one["name"], one["version"], one["state"]) for one in answer.json()]


def test_the_index_has_every_version(three: Served) -> None:
    assert states(three) == [
        ("new", "1", "UNAVAILABLE"),
        ("new", "2", "READY"),
        ("new", "3", "UNAVAILABLE"),
        ("pairs", "1", "READY"),
        ("parity", "1", "READY"),
    ]
    assert states(three, ready=True) == [
        ("new", "2", "READY"),
        ("pairs", "1", "READY"),
        ("parity", "1", "READY"),
    ]


def change(served: Served, verb: str, body: object = None, task: str = "new") -> Any:
    """Load or unload."""
    return served.ask("POST", f"/v2/repository/models/{task}/{verb}", json=body)


@pytest.mark.parametrize("version", ["3", 3])
def test_a_version_is_loaded_by_its_number(three: Served, version: object) -> None:
    assert change(three, "load", {"parameters": {"version": version}}).json() == {}
    assert three.ask("GET", "/v1/tasks/new").json()["version"] == 3


def test_loading_what_is_active_changes_nothing(three: Served) -> None:
    before = three.ask("GET", "/v1/operations").json()
    assert change(three, "load").status_code == 200
    assert three.ask("GET", "/v1/operations").json() == before


def test_a_task_is_unloaded_and_comes_back_as_it_was(three: Served) -> None:
    assert change(three, "unload", {"parameters": {"unload_dependents": True}}).json() == {}
    error_in(infer(three, {"inputs": [text_input(["a"])]}, "new"), 404)
    error_in(change(three, "unload"), 404)
    assert change(three, "load").status_code == 200
    assert three.ask("GET", "/v1/tasks/new").json()["version"] == 2


def test_a_task_that_never_answered_is_loaded_with_its_latest_version(served: Served) -> None:
    for content in (b"one", b"two"):
        served.ask("POST", "/v1/tasks/new/versions?activate=false", content=content)
    assert change(served, "load").status_code == 200
    assert served.ask("GET", "/v1/tasks/new").json()["version"] == 2


@pytest.mark.parametrize(
    ("verb", "body", "status", "message"),
    [
        ("load", {"parameters": {"version": "9"}}, 404, "no version 9"),
        ("load", {"parameters": {"version": "one"}}, 422, "parameters.version: 'one'"),
        ("load", {"parameters": {"version": 0}}, 422, "parameters.version"),
        ("load", {"parameters": {"config": "{}"}}, 422, "parameters.config"),
        ("load", {"version": "3"}, 422, "version"),
        ("unload", {"parameters": {"version": "3"}}, 422, "parameters.version"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    three: Served, verb: str, body: object, status: int, message: str
) -> None:
    assert message in error_in(change(three, verb, body), status)
    assert three.ask("GET", "/v1/tasks/new").json()["version"] == 2


def test_a_key_sees_its_own_tasks_alone(served: Served, as_caller: Callable[..., Served]) -> None:
    mine = as_caller(served, name="web", tasks=frozenset(["parity"]))
    assert states(mine) == [("parity", "1", "READY")]
    body = {"inputs": [text_input(["a"]), text_input(["b"], "text_pair")]}
    for refused in (
        infer(mine, body, "pairs"),
        mine.ask("GET", "/v2/models/pairs"),
        mine.ask("GET", "/v2/models/pairs/ready"),
        mine.ask("GET", "/v2/models/pairs/versions/1"),
        change(mine, "load", task="pairs"),
        change(mine, "unload", task="pairs"),
    ):
        assert "'web'" in error_in(refused, 403)
