"""The routes of vLLM and of Text Embeddings Inference, over a fake service."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving.errors import InvalidInputError
from serving.protocols.faults import fault_of
from serving.protocols.shapes import openai, tei
from serving.protocols.tei import read_inputs
from serving.types import TextInput
from tests.serving.conftest import Served
from tests.serving.test_api import TABLE

# --- vLLM -----------------------------------------------------------------------------------------


def classify(served: Served, **body: Any) -> httpx.Response:
    """One request to `/classify`."""
    return served.ask("POST", "/classify", json=body)


def openai_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error in an answer, after checking what holds for all of them."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


def test_texts_are_classified_as_vllm_does(served: Served) -> None:
    answer = served.ask(
        "POST",
        "/classify",
        json={"model": "parity", "input": ["abc", "ab"], "user": "me"},
        headers={"x-request-id": "mine"},
    )
    body = answer.json()
    assert (body["id"], body["object"], body["model"]) == ("classify-mine", "list", "parity")
    assert body["data"] == [
        {"index": 0, "label": "odd", "probs": [0.0, 1.0], "num_classes": 2},
        {"index": 1, "label": "even", "probs": [1.0, 0.0], "num_classes": 2},
    ]
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 14
    assert isinstance(body["created"], int)
    assert served.count("taskbone_requests_total", task="parity", code="200") == 1


def test_one_text_and_pairs_are_classified_too(served: Served) -> None:
    assert len(classify(served, model="parity", input="abc").json()["data"]) == 1
    assert len(classify(served, model="pairs", input=[["a", "bc"]]).json()["data"]) == 1


def test_texts_are_cut_only_where_the_caller_says_so(served: Served) -> None:
    long = "a" * 2000
    assert "inputs[0]" in openai_error(classify(served, model="parity", input=long), 400)["message"]
    cut = classify(served, model="parity", input=long, truncate_prompt_tokens=-1)
    assert cut.status_code == 200
    message = openai_error(
        classify(served, model="parity", input="a", truncate_prompt_tokens=5), 400
    )["message"]
    assert "truncate_prompt_tokens is 5" in message


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"model": "nothing", "input": "a"}, 404, "NotFoundError", "no task 'nothing'"),
        ({"input": "a"}, 400, "BadRequestError", "names no task: give it in 'model'"),
        ({"model": "parity", "input": [1, 2]}, 400, "BadRequestError", "input.0 is a number"),
        ({"model": "parity"}, 400, "BadRequestError", "input: Field required"),
        ({"model": "parity", "input": "overload"}, 503, "ServiceUnavailableError", "full"),
        ({"model": "parity", "input": "greedy"}, 429, "RateLimitError", "waiting"),
        ({"model": "parity", "input": "engine"}, 500, "InternalServerError", "log"),
        ({"model": "parity", "input": ["a"] * 200}, 400, "BadRequestError", "200 given"),
    ],
)
def test_errors_have_the_shape_of_openai(
    served: Served, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    answer = classify(served, **body)
    error = openai_error(answer, status)
    assert error["type"] == kind
    assert message in error["message"]
    assert ("retry-after" in answer.headers) == (status in (429, 503))


def test_tasks_are_models_of_one_parent(served: Served) -> None:
    listed = served.ask("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["parity", "pairs"]
    digest = served.ask("GET", "/v1/tasks/pairs").json()["digest"]
    card = served.ask("GET", "/v1/models/pairs").json()
    assert card == listed["data"][1]
    assert (card["parent"], card["root"]) == ("nothing", f"sha256:{digest}")
    assert (card["max_model_len"], card["created"]) == (128, 1767323045)
    openai_error(served.ask("GET", "/v1/models/nothing"), 404)
    openai_error(served.ask("GET", "/v1/models", token=None), 401)


# --- Text Embeddings Inference --------------------------------------------------------------------


def predict(served: Served, inputs: object, task: str = "parity", **more: Any) -> httpx.Response:
    """One request to `/predict`."""
    body = {"inputs": inputs, **more}
    return served.ask("POST", "/predict", json=body, headers={"x-task": task})


def tei_error(answer: httpx.Response, status: int, kind: str) -> str:
    """The message of an error, after checking what holds for all of them."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == kind
    message: str = answer.json()["error"]
    return message


ODD = [{"score": 1.0, "label": "odd"}, {"score": 0.0, "label": "even"}]
EVEN = [{"score": 1.0, "label": "even"}, {"score": 0.0, "label": "odd"}]


def test_one_text_has_one_list_of_labels_and_a_batch_several(served: Served) -> None:
    assert predict(served, "abc").json() == ODD
    assert predict(served, ["abc"]).json() == ODD
    assert predict(served, ["a", "b"], "pairs").json() == EVEN
    assert predict(served, [["abc"], ["ab"]]).json() == [ODD, EVEN]
    assert predict(served, [["a", "bc"]], "pairs").json() == [ODD]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a", (["a"], False)),
        (["a"], (["a"], False)),
        (["a", "b"], ([("a", "b")], False)),
        ([["a"]], (["a"], True)),
        ([["a"], ["b", "c"]], (["a", ("b", "c")], True)),
    ],
)
def test_inputs_are_read_as_that_server_does(
    given: object, read: tuple[list[TextInput], bool]
) -> None:
    assert read_inputs(given) == read


@pytest.mark.parametrize(
    "given", [None, 1, [], {}, ["a", "b", "c"], ["a", 1], [[]], [["a"], "b"], [["a", "b", "c"]]]
)
def test_other_inputs_are_refused(given: object) -> None:
    with pytest.raises(InvalidInputError, match="inputs"):
        read_inputs(given)


def test_the_task_is_named_beside_the_body(served: Served) -> None:
    ask: dict[str, Any] = {"json": {"inputs": "abc"}}
    assert served.ask("POST", "/predict?task=parity", **ask).json() == ODD
    both = served.ask("POST", "/predict?task=parity", headers={"x-task": "parity"}, **ask)
    assert both.json() == ODD
    differing = served.ask("POST", "/predict?task=parity", headers={"x-task": "pairs"}, **ask)
    assert "name one task" in tei_error(differing, 422, "Tokenizer")
    empty = served.ask("POST", "/predict?task=parity", headers={"x-task": ""}, **ask)
    assert "name one task" in tei_error(empty, 422, "Tokenizer")
    unnamed = served.ask("POST", "/predict", **ask)
    assert "tasks: parity, pairs" in tei_error(unnamed, 422, "Tokenizer")


def test_the_only_task_of_a_key_need_not_be_named(
    served: Served, as_caller: Callable[..., Served]
) -> None:
    mine = as_caller(served, name="web", tasks=frozenset(["parity"]))
    assert mine.ask("POST", "/predict", json={"inputs": "abc"}).json() == ODD
    assert classify(mine, input="abc").json()["model"] == "parity"
    assert mine.ask("GET", "/info").json()["model_id"] == "parity"
    assert [card["id"] for card in mine.ask("GET", "/v1/models").json()["data"]] == ["parity"]
    assert "'web'" in tei_error(predict(mine, [["a", "b"]], "pairs"), 403, "Validation")
    assert "'web'" in openai_error(classify(mine, model="pairs", input="a"), 403)["message"]
    openai_error(mine.ask("GET", "/v1/models/pairs"), 403)
    tei_error(mine.ask("GET", "/info?task=pairs"), 403, "Validation")


def test_texts_are_cut_unless_the_caller_says_no(served: Served) -> None:
    assert predict(served, "a" * 2000).status_code == 200
    assert predict(served, "a" * 2000, truncate=True).status_code == 200
    tei_error(predict(served, "a" * 2000, truncate=False), 422, "Tokenizer")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"truncation_direction": "Left"}, "truncation_direction is 'Left'"),
        ({"raw_scores": True}, "probabilities alone"),
        ({"top_k": 1}, "top_k"),
    ],
)
def test_what_is_not_offered_is_said(served: Served, more: dict[str, Any], message: str) -> None:
    assert message in tei_error(predict(served, "a", **more), 422, "Tokenizer")
    plain: dict[str, Any] = {"truncation_direction": "Right", "raw_scores": False, "truncate": None}
    assert predict(served, "abc", **plain).json() == ODD


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("overload", 429, "Overloaded"),
        ("greedy", 429, "Overloaded"),
        ("engine", 424, "Backend"),
        ("crash", 424, "Backend"),
        ("late", 504, "Validation"),
    ],
)
def test_errors_have_that_servers_statuses(
    served: Served, text: str, status: int, kind: str
) -> None:
    answer = predict(served, text)
    message = tei_error(answer, status, kind)
    assert "secret" not in message
    assert ("retry-after" in answer.headers) == (status == 429)


def test_too_much_is_413(served: Served) -> None:
    tei_error(predict(served, [["a"]] * 200), 413, "Validation")
    tei_error(predict(served, "a", "nothing"), 404, "Validation")


def test_a_task_is_described_as_that_servers_model(served: Served) -> None:
    info = served.ask("GET", "/info?task=parity").json()
    assert (info["model_id"], info["max_input_length"]) == ("parity", 128)
    assert info["model_type"]["classifier"] == {
        "id2label": {"0": "even", "1": "odd"},
        "label2id": {"even": 0, "odd": 1},
    }
    assert (info["max_client_batch_size"], info["auto_truncate"]) == (128, True)
    tei_error(served.ask("GET", "/info"), 422, "Tokenizer")


@pytest.mark.parametrize("error", [error for error, _ in TABLE], ids=lambda one: type(one).__name__)
def test_every_error_has_a_place_in_both_shapes(error: Exception) -> None:
    fault = fault_of(error, "id")
    code, body = openai(fault)
    assert body["error"]["code"] == code
    assert (code >= 500) == (fault.code >= 500)
    code, body = tei(fault)
    assert body["error_type"] in ("Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer")
    assert (code >= 500) == (fault.code in (503, 504) and fault.type != "overloaded")
