"""The routes and their answers, over a fake service."""

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import jsonschema
import pytest

import model_store.errors
import serving.errors
from model_store import errors as store_errors
from serving.api import status_of
from serving.errors import (
    EngineError,
    ForbiddenError,
    InvalidInputError,
    NotReadyError,
    OverloadedError,
    ServingError,
    TooLargeError,
    UnauthorizedError,
    UnknownTaskError,
)
from serving.guard import scope_of
from tests.serving.conftest import TOKEN, Served


def error_of(answer: httpx.Response, status: int) -> dict[str, str]:
    """The error in an answer, after checking what holds for all of them."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error: dict[str, str] = answer.json()["error"]
    assert set(error) == {"type", "message", "request_id"}
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


# --- predict --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "inputs", "labels"),
    [
        ("parity", "abc", ["odd"]),
        ("parity", ["abc", "ab"], ["odd", "even"]),
        ("pairs", [["a", "bc"], ["a", "b"]], ["odd", "even"]),
    ],
)
def test_one_prediction_for_each_input(
    served: Served, task: str, inputs: object, labels: list[str]
) -> None:
    answer = served.predict(inputs, task)
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["task", "version", "predictions", "timings_ms", "tokens"]
    assert (body["task"], body["version"]) == (task, 1)
    assert [prediction["label"] for prediction in body["predictions"]] == labels
    for prediction in body["predictions"]:
        assert prediction["score"] == prediction["scores"][prediction["label"]] == 1.0
    assert set(body["timings_ms"]) == {"tokenize_ms", "queue_ms", "forward_ms", "total_ms"}


def test_an_unknown_task_is_404_and_the_known_ones_are_named(served: Served) -> None:
    error = error_of(served.predict("a", "nothing"), 404)
    assert error["type"] == "unknown_task"
    assert "parity" in error["message"]


@pytest.mark.parametrize("name", ["...", "%2e%2e", "a b", "A", "\N{SNOWMAN}", "a" * 1000])
def test_a_name_that_no_task_can_have_is_unknown(served: Served, name: str) -> None:
    error_of(served.ask("POST", f"/v1/tasks/{name}/predict", json={"inputs": "a"}), 404)


def test_inputs_of_the_wrong_kind_are_422(served: Served) -> None:
    error = error_of(served.predict(["a", "b"], "pairs"), 422)
    assert error["type"] == "invalid_input"
    assert "inputs[0]" in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"inputs": "\\ud800"}', b'{"inputs": "\xff"}', b"[]"]
)
def test_a_body_that_is_not_understood_is_422(served: Served, body: bytes) -> None:
    error_of(served.ask("POST", "/v1/tasks/parity/predict", content=body), 422)


def test_a_full_queue_is_503_and_says_when_to_come_again(served: Served) -> None:
    answer = served.predict("overload")
    assert error_of(answer, 503)["type"] == "overloaded"
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("text", "kind"), [("engine", "engine_error"), ("crash", "internal_error")]
)
def test_a_fault_of_the_server_is_in_the_log_and_not_in_the_answer(
    served: Served, caplog: pytest.LogCaptureFixture, text: str, kind: str
) -> None:
    answer = served.predict(text)
    error = error_of(answer, 500)
    assert error["type"] == kind
    assert "secret" not in answer.text
    assert error["request_id"] in caplog.text
    assert "secret detail" in caplog.text


def test_a_client_that_hangs_up_cancels_its_prediction(served: Served) -> None:
    async def hang_up() -> None:
        transport = httpx.ASGITransport(app=served.app)
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            request = asyncio.create_task(
                client.post("/v1/tasks/parity/predict", json={"inputs": "wait"}, headers=headers)
            )
            await served.service.waiting.wait()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    asyncio.run(hang_up())
    assert served.service.cancelled == 1
    assert served.count("taskbone_requests_total", task="parity", code="499") == 1


# --- limits ---------------------------------------------------------------------------------------


def test_a_body_that_announces_too_much_is_413_unread(serve: Callable[..., Served]) -> None:
    served = serve(max_body_bytes=100)

    async def body() -> AsyncIterator[bytes]:
        yield pytest.fail("the body was read")

    answer = served.ask(
        "POST", "/v1/tasks/parity/predict", content=body(), headers={"content-length": "101"}
    )
    error = error_of(answer, 413)
    assert error["type"] == "too_large"
    assert "101" in error["message"]
    assert "100" in error["message"]


def test_a_body_without_length_is_cut_off_at_the_limit(serve: Callable[..., Served]) -> None:
    served = serve(max_body_bytes=100)
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10
            yield b" " * 10

    error_of(served.ask("POST", "/v1/tasks/parity/predict", content=body()), 413)
    assert sent <= 120


@pytest.mark.parametrize("extra", [0, 1])
def test_the_limit_itself_is_allowed(serve: Callable[..., Served], extra: int) -> None:
    body = json.dumps({"inputs": "a" * 50}).encode()
    served = serve(max_body_bytes=len(body) - extra)
    answer = served.ask("POST", "/v1/tasks/parity/predict", content=body)
    assert answer.status_code == (413 if extra else 200)


def test_artifacts_have_their_own_limit(serve: Callable[..., Served]) -> None:
    served = serve(max_body_bytes=10, max_artifact_bytes=20)
    assert served.ask("POST", "/v1/tasks/new/versions", content=b"a" * 20).status_code == 201
    error_of(served.ask("POST", "/v1/tasks/new/versions", content=b"a" * 21), 413)


# --- the other routes -----------------------------------------------------------------------------


def test_the_tasks_are_listed_and_described(served: Served) -> None:
    tasks = served.ask("GET", "/v1/tasks").json()["tasks"]
    assert [task["task"] for task in tasks] == ["parity", "pairs"]
    assert served.ask("GET", "/v1/tasks/pairs").json() == tasks[1]
    error_of(served.ask("GET", "/v1/tasks/nothing"), 404)


def test_a_sick_engine_is_alive_and_not_ready(served: Served) -> None:
    assert served.ask("GET", "/health/ready").json() == {"status": "ready"}
    served.service.healthy = False
    assert served.ask("GET", "/health/live").json() == {"status": "live"}
    answer = served.ask("GET", "/health/ready")
    assert error_of(answer, 503)["type"] == "not_ready"
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/page", 404, "no_such_route"),
        ("GET", "/page/index.html", 404, "no_such_route"),
        ("GET", "/v1/tasks/", 404, "no_such_route"),
        ("GET", "/docs/../api.py", 404, "no_such_route"),
        ("GET", "/docs/index.html", 404, "no_such_route"),
        ("POST", "/v1/tasks", 405, "method_not_allowed"),
        ("GET", "/v1/tasks/parity/predict", 405, "method_not_allowed"),
        ("GET", "/v1/predict", 405, "method_not_allowed"),
        ("DELETE", "/health/live", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_said_in_the_same_shape(
    served: Served, method: str, path: str, status: int, kind: str
) -> None:
    answer = served.ask(method, path)
    assert error_of(answer, status)["type"] == kind
    assert ("allow" in answer.headers) == (status == 405)


# --- request ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc", "A-1_b.2", "x" * 64])
def test_a_good_request_id_is_taken_over(served: Served, given: str) -> None:
    answer = served.ask("GET", "/v1/tasks", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a;b", "<script>", "caf\xe9"])
def test_a_bad_request_id_is_replaced(served: Served, given: str) -> None:
    answer = served.ask("GET", "/v1/tasks", headers=[("x-request-id", given.encode("latin-1"))])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_every_request_has_its_own_id(served: Served) -> None:
    ids = {served.ask("GET", "/nothing").headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


# --- the table from errors to statuses ------------------------------------------------------------

TABLE: list[tuple[Exception, int]] = [
    (serving.errors.KeysError("x"), 500),
    (UnauthorizedError("x"), 401),
    (ForbiddenError("x"), 403),
    (UnknownTaskError("x"), 404),
    (serving.errors.BodyTimeoutError("x"), 408),
    (TooLargeError("x"), 413),
    (InvalidInputError("x"), 422),
    (EngineError("x"), 500),
    (ServingError("x"), 500),
    (serving.errors.ConfigError("x"), 500),
    (serving.errors.BoardError("x"), 500),
    (serving.errors.RateLimitedError("x"), 429),
    (OverloadedError("x"), 503),
    (serving.errors.DeadlineError("x"), 504),
    (NotReadyError("x"), 503),
    (store_errors.InputError("x"), 422),
    (store_errors.ManifestError("x"), 422),
    (store_errors.ArtifactError("x"), 422),
    (store_errors.BackboneMismatchError("x"), 422),
    (store_errors.SignatureError("x"), 422),
    (store_errors.GoldenMismatchError("x"), 422),
    (store_errors.BackboneError("x"), 500),
    (store_errors.UnsupportedCheckpointError("x"), 500),
    (store_errors.NotFoundError("x"), 404),
    (store_errors.ConflictError("x"), 409),
    (store_errors.StoreError("x"), 500),
    (store_errors.StoreUnreachableError("x"), 503),
    (store_errors.ModelStoreError("x"), 500),
    (ZeroDivisionError("x"), 500),
]


@pytest.mark.parametrize(("error", "code"), TABLE, ids=[type(error).__name__ for error, _ in TABLE])
def test_the_status_of_each_error(error: Exception, code: int) -> None:
    assert status_of(error).code == code


def test_every_error_class_is_in_the_test_above() -> None:
    classes = {
        value
        for module in (serving.errors, model_store.errors)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert classes <= {type(error) for error, _ in TABLE}


# --- the documentation ----------------------------------------------------------------------------


@pytest.fixture
def document(served: Served) -> dict[str, Any]:
    """The OpenAPI document, as a client gets it."""
    answer: dict[str, Any] = served.ask("GET", "/openapi.json").json()
    return answer


def test_every_route_documents_its_success_and_its_errors(document: dict[str, Any]) -> None:
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert ("post", "/v1/tasks/{task}/predict") in operations
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    for (method, path), operation in operations.items():
        assert operation["summary"]
        answers = set(operation["responses"])
        assert "200" in answers
        scope = scope_of(method.upper(), path)
        assert operation["security"] == ([{"key": []}] if scope else [])
        if scope:
            assert {"401", "403"} <= answers
            assert answers & {"500", "424"}
        parameters = operation.get("parameters", [])
        assert [one["name"] for one in parameters if one["in"] == "path"] == re.findall(
            r"\{(\w+)\}", path
        )
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in body.get("examples", {}).values():
            # OpenAPI 3.0 writes its schemas as that draft does.
            jsonschema.Draft4Validator(body["schema"]).validate(example["value"])


@pytest.mark.parametrize(
    ("method", "path", "request_", "template"),
    [
        ("POST", "/v1/tasks/parity/predict", {"json": {"inputs": "a"}}, "/v1/tasks/{task}/predict"),
        ("POST", "/v1/tasks/no/predict", {"json": {"inputs": "a"}}, "/v1/tasks/{task}/predict"),
        ("POST", "/v1/tasks/parity/predict", {"content": b"{"}, "/v1/tasks/{task}/predict"),
        (
            "POST",
            "/v1/tasks/parity/predict",
            {"json": {"inputs": "overload"}},
            "/v1/tasks/{task}/predict",
        ),
        (
            "POST",
            "/v1/tasks/parity/predict",
            {"json": {"inputs": "engine"}},
            "/v1/tasks/{task}/predict",
        ),
        (
            "POST",
            "/v1/tasks/parity/versions/1/predict",
            {"json": {"inputs": "late"}},
            "/v1/tasks/{task}/versions/{version}/predict",
        ),
        ("POST", "/v1/predict", {"json": {"tasks": "*", "inputs": "a"}}, "/v1/predict"),
        (
            "POST",
            "/v1/predict",
            {"json": {"tasks": ["parity", "pairs"], "inputs": "a"}},
            "/v1/predict",
        ),
        ("POST", "/v1/predict", {"json": {"tasks": ["no"], "inputs": "a"}}, "/v1/predict"),
        ("GET", "/v1/tasks", {}, "/v1/tasks"),
        ("GET", "/v1/tasks", {"token": None}, "/v1/tasks"),
        ("GET", "/v1/tasks/pairs", {}, "/v1/tasks/{task}"),
        ("GET", "/v1/tasks/no", {}, "/v1/tasks/{task}"),
        ("GET", "/v1/tasks/pairs/versions", {}, "/v1/tasks/{task}/versions"),
        ("GET", "/v1/tasks/pairs/versions/1", {}, "/v1/tasks/{task}/versions/{version}"),
        ("GET", "/v1/tasks/pairs/versions/x", {}, "/v1/tasks/{task}/versions/{version}"),
        ("POST", "/v1/tasks/a/versions", {"content": b"b"}, "/v1/tasks/{task}/versions"),
        ("POST", "/v1/tasks/a/versions?wait=false", {"content": b"b"}, "/v1/tasks/{task}/versions"),
        ("POST", "/v1/tasks/A/versions", {"content": b"b"}, "/v1/tasks/{task}/versions"),
        ("GET", "/health/live", {}, "/health/live"),
        ("GET", "/health/ready", {}, "/health/ready"),
    ],
)
def test_real_answers_are_as_documented(
    served: Served,
    document: dict[str, Any],
    method: str,
    path: str,
    request_: dict[str, Any],
    template: str,
) -> None:
    answer = served.ask(method, path, **request_)
    documented = document["paths"][template][method.lower()]["responses"]
    schema = documented[str(answer.status_code)]["content"]["application/json"]["schema"]
    whole = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(answer.json())


def test_the_examples_of_the_documentation_work(served: Served, document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/tasks/{task}/predict"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    for name, example in content["examples"].items():
        jsonschema.validate(example["value"], content["schema"])
        task = "pairs" if name == "pairs" else "parity"
        answer = served.ask("POST", f"/v1/tasks/{task}/predict", json=example["value"])
        assert answer.status_code == 200


def test_the_documentation_page_needs_no_other_server(served: Served) -> None:
    page = served.ask("GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert re.findall("https?://", page.text) == []
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) == 3
    for file in files:
        answer = served.ask("GET", f"/{file}")
        assert answer.status_code == 200
        assert len(answer.content) > 100


def test_the_documentation_is_of_a_version_that_its_page_reads(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.0.")
