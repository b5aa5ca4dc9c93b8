"""The routes that change what is served, over a service that keeps its versions in memory."""

import base64
from typing import Any

import httpx
import pytest

from model_store import errors as store_errors
from serving.statuses import STATUSES
from serving.types import Operation
from tests.serving.conftest import Served
from tests.serving.test_api import error_of


@pytest.fixture
def three(served: Served) -> Served:
    """A task `new` with three versions, the second active."""
    for content, query in ((b"one", ""), (b"two", ""), (b"three", "?activate=false")):
        assert served.ask("POST", f"/v1/tasks/new/versions{query}", content=content).is_success
    return served


def active(served: Served) -> int:
    """The version of `new` that answers."""
    version: int = served.ask("GET", "/v1/tasks/new").json()["version"]
    return version


def test_a_new_version_is_201_and_the_same_again_200(served: Served) -> None:
    first = served.ask("POST", "/v1/tasks/new/versions", content=b"artifact")
    again = served.ask("POST", "/v1/tasks/new/versions", content=b"artifact")
    assert (first.status_code, again.status_code) == (201, 200)
    body = first.json()
    assert (body["task"], body["version"], body["created"]) == ("new", 1, True)
    assert (body["status"], body["ready"], body["replicas"]) == ("ready 1/1", 1, 1)
    assert body["digest"] == served.ask("GET", "/v1/tasks/new").json()["digest"]
    assert body["error"] is None
    assert again.json()["created"] is False
    assert served.count("taskbone_registrations_total", result="created") == 1
    assert served.count("taskbone_registrations_total", result="unchanged") == 1


@pytest.mark.parametrize("name", ["A", "a%20b", "-a", "a" * 65, "%2e%2e"])
def test_a_version_under_an_unusable_name_is_422(served: Served, name: str) -> None:
    error_of(served.ask("POST", f"/v1/tasks/{name}/versions", content=b"artifact"), 422)
    assert served.count("taskbone_registrations_total", result="refused") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (store_errors.ArtifactError("cut off"), 422),
        (store_errors.BackboneMismatchError("another backbone"), 422),
        (store_errors.ConflictError("not now"), 409),
        (store_errors.StoreError("disk full"), 500),
        (store_errors.StoreUnreachableError("the bucket's name and reason"), 503),
    ],
)
def test_an_artifact_that_is_not_taken(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    async def register(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(served.service, "register", register)
    answer = served.ask("POST", "/v1/tasks/new/versions", content=b"artifact")
    told = error_of(answer, status)
    assert told["type"] == STATUSES[type(error)].type
    assert (str(error) in told["message"]) == (status < 500)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert served.count("taskbone_registrations_total", result="refused") == 1


def test_who_does_not_wait_gets_an_operation_to_follow(served: Served) -> None:
    accepted = served.ask("POST", "/v1/tasks/new/versions?wait=false", content=b"artifact")
    assert accepted.status_code == 202
    body = accepted.json()
    assert accepted.headers["location"] == f"/v1/operations/{body['operation']}"
    assert (body["state"], body["status"]) == ("running", "verify 0/1")
    followed = served.ask("GET", accepted.headers["location"]).json()
    assert (followed["state"], followed["status"]) == ("done", "ready 1/1")
    listed = served.ask("GET", "/v1/operations").json()["operations"]
    assert [one["operation"] for one in listed] == [body["operation"]]
    error_of(served.ask("GET", "/v1/operations/nothing"), 404)


def test_a_failed_operation_says_why(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Operation(
        id="o",
        kind="register",
        task="new",
        version=None,
        digest=None,
        by="ci",
        started_at="2026-01-02T03:04:05Z",
        state="failed",
        step="stage",
        replicas=3,
        ready=1,
        error_type="golden_mismatch",
        error="expected 0.9, got 0.1",
    )

    async def operation(_: str) -> Operation:
        return failed

    monkeypatch.setattr(served.service, "operation", operation)
    body = served.ask("GET", "/v1/operations/o").json()
    assert body["status"] == "failed at stage 1/3"
    assert body["error"] == {"type": "golden_mismatch", "message": "expected 0.9, got 0.1"}


def test_a_version_is_activated_and_rolled_back(three: Served) -> None:
    assert active(three) == 2
    answer = three.ask("POST", "/v1/tasks/new/activate", json={"version": 3})
    assert (answer.status_code, answer.json()["version"], active(three)) == (200, 3, 3)
    answer = three.ask("POST", "/v1/tasks/new/rollback")
    assert (answer.status_code, answer.json()["version"], active(three)) == (200, 2, 2)
    assert three.ask("POST", "/v1/tasks/new/rollback?wait=false").status_code == 202
    error_of(three.ask("POST", "/v1/tasks/new/rollback"), 409)


def test_canary_and_shadow_come_and_go(three: Served) -> None:
    task = three.service._tasks["new"]
    for name, body, kept in (
        ("canary", {"version": 3, "percent": 12.5}, (3, 12.5)),
        ("shadow", {"version": 1}, 1),
    ):
        answer = three.ask("PUT", f"/v1/tasks/new/{name}", json=body)
        assert (answer.status_code, answer.json()["kind"]) == (200, name)
        assert getattr(task, name) == kept
        answer = three.ask("DELETE", f"/v1/tasks/new/{name}")
        assert (answer.status_code, answer.json()["version"]) == (200, None)
        assert getattr(task, name) is None


def test_a_task_answers_no_more_until_it_is_brought_back(three: Served) -> None:
    assert three.ask("POST", "/v1/tasks/new/deactivate").json()["kind"] == "deactivate"
    error_of(three.predict("abc", "new"), 404)
    error_of(three.ask("POST", "/v1/tasks/new/deactivate"), 404)
    assert len(three.ask("GET", "/v1/tasks/new/versions").json()["versions"]) == 3
    assert three.ask("POST", "/v1/tasks/new/rollback").json()["version"] == 2
    assert active(three) == 2


def test_versions_and_tasks_are_deleted(three: Served) -> None:
    error_of(three.ask("DELETE", "/v1/tasks/new/versions/2"), 409)
    assert three.ask("DELETE", "/v1/tasks/new/versions/1").status_code == 200
    error_of(three.ask("DELETE", "/v1/tasks/new/versions/1"), 404)
    assert three.ask("DELETE", "/v1/tasks/new").status_code == 200
    error_of(three.predict("abc", "new"), 404)
    error_of(three.ask("DELETE", "/v1/tasks/new"), 404)
    again = three.ask("POST", "/v1/tasks/new/versions", content=b"one").json()
    assert again["version"] == 4


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "activate", None),
        ("POST", "activate", {}),
        ("POST", "activate", {"version": "3"}),
        ("POST", "activate", {"version": True}),
        ("POST", "activate", {"version": 0}),
        ("POST", "activate", {"version": 1.0}),
        ("POST", "activate", {"version": 1, "force": True}),
        ("PUT", "canary", {"version": 3}),
        ("PUT", "canary", {"version": 3, "percent": 0}),
        ("PUT", "canary", {"version": 3, "percent": 100}),
        ("PUT", "canary", {"version": 3, "percent": "10"}),
        ("PUT", "shadow", {"version": None}),
        ("POST", "activate?wait=yes", {"version": 1}),
        ("POST", "rollback?wait=1", None),
        ("POST", "rollback?version=1", None),
        ("POST", "versions?activate=no", None),
        ("DELETE", "versions/1?wait=", None),
        ("DELETE", "canary?wait=no", None),
    ],
)
def test_what_is_asked_wrongly_changes_nothing(
    three: Served, method: str, path: str, body: object
) -> None:
    before = three.ask("GET", "/v1/operations").json()
    error = error_of(three.ask(method, f"/v1/tasks/new/{path}", json=body), 422)
    assert error["type"] == "invalid_input"
    assert three.ask("GET", "/v1/operations").json() == before


@pytest.mark.parametrize("path", ["activate", "canary", "shadow"])
def test_a_version_that_is_not_there_is_404(three: Served, path: str) -> None:
    body = {"version": 9} | ({"percent": 5} if path == "canary" else {})
    answer: httpx.Response = three.ask(
        "POST" if path == "activate" else "PUT", f"/v1/tasks/new/{path}", json=body
    )
    assert error_of(answer, 404)["type"] == "not_found"


def test_the_audit_log_is_read_from_its_end(three: Served) -> None:
    three.ask("POST", "/v1/tasks/new/rollback")
    entries = three.ask("GET", "/v1/audit").json()["entries"]
    assert [entry["action"] for entry in entries] == ["register"] * 3 + ["rollback"]
    assert three.ask("GET", "/v1/audit?limit=1").json()["entries"] == entries[-1:]
    for query in ("limit=0", "limit=x", "limit=-1", "last=1"):
        error_of(three.ask("GET", f"/v1/audit?{query}"), 422)


def test_a_signature_is_passed_on_as_it_was_signed(served: Served) -> None:
    bundle = b'{"mediaType": "..."}'
    path, header = "/v1/tasks/new/versions", "x-taskbone-signature"
    headers = {header: base64.b64encode(bundle).decode()}
    assert served.ask("POST", path, content=b"one", headers=headers).status_code == 201
    assert served.ask("POST", path, content=b"two").status_code == 201
    assert served.service.signatures == [bundle, None]


@pytest.mark.parametrize("given", ["%", "a", "YQ==\x7f", "YQ"])
def test_a_signature_that_is_not_base64_is_422(served: Served, given: str) -> None:
    headers = {"x-taskbone-signature": given}
    answer = served.ask("POST", "/v1/tasks/new/versions", content=b"one", headers=headers)
    assert "Base64" in error_of(answer, 422)["message"]
    assert served.service.signatures == []
