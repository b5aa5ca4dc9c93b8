"""Asking with the native routes: versions, many tasks, deadlines, truncation, and slow bodies."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from serving.api import EXCHANGE
from serving.protocols.exchange import BodyReader, Exchange
from tests.serving.conftest import Served
from tests.serving.test_api import error_of

# --- versions -------------------------------------------------------------------------------------


def test_a_version_is_asked_by_its_number(served: Served) -> None:
    served.ask("POST", "/v1/tasks/new/versions", content=b"one")
    served.ask("POST", "/v1/tasks/new/versions?activate=false", content=b"two")
    body = {"inputs": "abc"}
    active = served.ask("POST", "/v1/tasks/new/predict", json=body).json()
    second = served.ask("POST", "/v1/tasks/new/versions/2/predict", json=body).json()
    assert (active["version"], second["version"]) == (1, 2)
    assert second["predictions"][0]["label"] == "odd"


@pytest.mark.parametrize(("version", "status"), [("9", 404), ("0", 422), ("-1", 422), ("x", 422)])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_version_that_is_not_there(
    served: Served, method: str, version: str, status: int
) -> None:
    path = f"/v1/tasks/parity/versions/{version}" + ("/predict" if method == "POST" else "")
    error_of(served.ask(method, path, json={"inputs": "a"} if method == "POST" else None), status)


def test_versions_are_listed_and_described(served: Served) -> None:
    served.ask("POST", "/v1/tasks/new/versions", content=b"one")
    served.ask("POST", "/v1/tasks/new/versions?activate=false", content=b"two")
    listed = served.ask("GET", "/v1/tasks/new/versions").json()
    assert [(one["version"], one["active"]) for one in listed["versions"]] == [
        (1, True),
        (2, False),
    ]
    second = served.ask("GET", "/v1/tasks/new/versions/2").json()
    assert (second["version"], second["digest"]) == (2, listed["versions"][1]["digest"])
    error_of(served.ask("GET", "/v1/tasks/nothing/versions"), 404)


# --- many tasks -----------------------------------------------------------------------------------


def ask_many(served: Served, tasks: object, inputs: object, **more: Any) -> httpx.Response:
    """One request for many tasks."""
    return served.ask("POST", "/v1/predict", json={"tasks": tasks, "inputs": inputs, **more})


def test_many_tasks_answer_one_text(served: Served) -> None:
    served.ask("POST", "/v1/tasks/new/versions", content=b"one")
    body = ask_many(served, ["new", "parity"], "abc").json()
    assert list(body) == ["results", "timings_ms"]
    assert list(body["results"]) == ["new", "parity"]
    for result in body["results"].values():
        assert result["version"] == 1
        assert [one["label"] for one in result["predictions"]] == ["odd"]
    assert set(body["timings_ms"]) == {"tokenize_ms", "queue_ms", "forward_ms", "total_ms"}


def test_a_task_that_cannot_answer_says_so_beside_the_others(served: Served) -> None:
    results = ask_many(served, ["parity", "pairs"], ["a", "bc"]).json()["results"]
    assert [one["label"] for one in results["parity"]["predictions"]] == ["odd", "even"]
    assert set(results["pairs"]) == {"error"}
    assert results["pairs"]["error"]["type"] == "invalid_input"
    assert "wrong kind" in results["pairs"]["error"]["message"]


@pytest.mark.parametrize(
    ("inputs", "tasks"), [("abc", ["parity"]), ([["a", "bc"]], ["pairs"]), (["a"], ["parity"])]
)
def test_a_star_is_all_tasks_that_take_such_inputs(
    served: Served, inputs: object, tasks: list[str]
) -> None:
    assert list(ask_many(served, "*", inputs).json()["results"]) == tasks


def test_unknown_tasks_are_an_error_of_the_whole_call(served: Served) -> None:
    error = error_of(ask_many(served, ["parity", "nothing"], "abc"), 404)
    assert error["type"] == "unknown_task"
    assert "nothing" in error["message"]
    assert served.service.asks == []


def test_no_room_is_an_error_of_the_whole_call(served: Served) -> None:
    answer = ask_many(served, ["parity"], "overload")
    assert error_of(answer, 503)["type"] == "overloaded"
    assert answer.headers["retry-after"] == "7"


# --- a key that is for some tasks -----------------------------------------------------------------


def test_a_key_is_for_its_tasks_alone(served: Served, as_caller: Callable[..., Served]) -> None:
    mine = as_caller(served, name="web", tasks=frozenset(["parity"]))
    assert mine.predict("abc").status_code == 200
    assert [task["task"] for task in mine.ask("GET", "/v1/tasks").json()["tasks"]] == ["parity"]
    assert list(ask_many(mine, "*", "abc").json()["results"]) == ["parity"]
    assert ask_many(mine, "*", [["a", "b"]]).json()["results"] == {}
    for refused in (
        mine.predict([["a", "b"]], "pairs"),
        mine.predict("a", "no-such-task"),
        ask_many(mine, ["parity", "pairs"], "abc"),
        mine.ask("GET", "/v1/tasks/pairs"),
        mine.ask("GET", "/v1/tasks/pairs/versions"),
        mine.ask("GET", "/v1/tasks/pairs/versions/1"),
        mine.ask("POST", "/v1/tasks/pairs/versions/1/predict", json={"inputs": [["a", "b"]]}),
        mine.ask("POST", "/v1/tasks/pairs/versions", content=b"artifact"),
        mine.ask("DELETE", "/v1/tasks/pairs"),
        mine.ask("PUT", "/v1/tasks/pairs/canary", json={"version": 1, "percent": 10}),
    ):
        error = error_of(refused, 403)
        assert error["type"] == "forbidden"
        assert "'web'" in error["message"]


# --- deadlines and truncation ---------------------------------------------------------------------


def test_a_deadline_goes_with_the_request(served: Served) -> None:
    body = {"inputs": "abc"}
    before = time.perf_counter()
    served.ask("POST", "/v1/tasks/parity/predict", json=body, headers={"x-deadline-ms": "5000"})
    after = time.perf_counter()
    served.ask("POST", "/v1/tasks/parity/predict", json=body)
    first, second = served.service.asks
    assert first.deadline is not None
    assert before + 5 <= first.deadline <= after + 5
    assert second.deadline is None
    error_of(served.predict("late"), 504)


@pytest.mark.parametrize("given", ["", "0", "-1", "1.5", "1e3", "ten", "9" * 10, "+5", "\xb2"])
def test_a_deadline_is_a_whole_number_of_milliseconds(served: Served, given: str) -> None:
    headers = [("x-deadline-ms", given.encode("latin-1"))]
    answer = served.ask("POST", "/v1/tasks/parity/predict", json={"inputs": "a"}, headers=headers)
    assert "x-deadline-ms" in error_of(answer, 422)["message"]


def test_the_caller_chooses_whether_texts_are_cut(served: Served) -> None:
    path, text = "/v1/tasks/parity/predict", "a" * 2000
    for body, status in (
        ({"inputs": ["b", text]}, 200),
        ({"inputs": ["b", text], "truncate": True}, 200),
        ({"inputs": ["b", text], "truncate": False}, 422),
    ):
        assert served.ask("POST", path, json=body).status_code == status
    assert [ask.truncate for ask in served.service.asks] == [True, True, False]
    many = ask_many(served, ["parity"], text, truncate=False).json()["results"]["parity"]
    assert "inputs[0]" in many["error"]["message"]


# --- bodies that come slowly ----------------------------------------------------------------------


def test_a_body_that_does_not_come_is_408(serve: Callable[..., Served]) -> None:
    served = serve(body_timeout_s=0.05)

    async def body() -> Any:
        yield b'{"inputs":'
        await asyncio.sleep(60)

    answer = served.ask("POST", "/v1/tasks/parity/predict", content=body())
    error = error_of(answer, 408)
    assert error["type"] == "body_timeout"
    assert "0.05 s" in error["message"]
    assert answer.headers["connection"] == "close"


def test_a_trickle_does_not_prolong_the_time() -> None:
    """The time is for the whole body: bytes that keep coming do not start it again."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        received += 1
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def read() -> None:
        scope = {"type": "http", "headers": [], EXCHANGE: Exchange("id", 0.0)}
        await BodyReader(1_000_000, 0.1).read(Request(scope, receive))

    with pytest.raises(Exception, match=r"not there after 0\.1 s"):
        asyncio.run(read())
    assert received >= 2


def test_what_is_asked_is_counted_under_its_task(served: Served) -> None:
    served.predict("abc")
    served.ask("POST", "/v1/tasks/parity/versions/1/predict", json={"inputs": "a"})
    served.ask("POST", "/v1/tasks/parity/versions/9/predict", json={"inputs": "a"})
    assert served.count("taskbone_requests_total", task="parity", code="200") == 2
    assert served.count("taskbone_requests_total", task="parity", code="404") == 1
