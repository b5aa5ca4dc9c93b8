"""Who may ask: keys, the documentation's cookie, and pages of other sites."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_store.store import Store
from serving.guard import COOKIE
from serving.key_book import KeyBook
from serving.keys import KeyRing
from tests.serving.conftest import PREDICT_TOKEN, TOKEN, Served
from tests.serving.test_api import error_of

GUARDED = [
    ("POST", "/v1/tasks/parity/predict"),
    ("GET", "/v1/tasks"),
    ("GET", "/v1/tasks/parity"),
    ("POST", "/v1/tasks/parity/versions"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/docs/swagger-ui.css"),
    ("GET", "/openapi.json"),
    ("POST", "/"),
    ("GET", "/page"),
    ("GET", "/page/"),
    ("GET", "/page/index.html"),
    ("GET", "/page/../app.py"),
    ("POST", "/page/page.js"),
    ("GET", "/nothing"),
    ("GET", "/health"),
]
Keyed = tuple[Served, KeyBook, KeyRing]
DOCUMENTATION = ["/docs", "/docs/swagger-ui.css", "/openapi.json"]


@pytest.fixture
def keyed(serve: Callable[..., Served], tmp_path: Path) -> Keyed:
    """The application with no key but those of a book; its ring must be told to look."""
    documents = Store(tmp_path)
    ring = KeyRing(documents)
    return serve(ring), KeyBook(documents), ring


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
def test_without_the_token_nothing_is_answered(
    served: Served, method: str, path: str, token: str | None
) -> None:
    answer = served.ask(method, path, token=token)
    assert error_of(answer, 401)["type"] == "unauthorized"
    assert answer.headers["www-authenticate"] == 'Bearer realm="taskbone"'
    assert TOKEN not in answer.text


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_is_for_everyone(served: Served, path: str) -> None:
    assert served.ask("GET", path, token=None).status_code == 200


@pytest.mark.parametrize("path", ["/health/%2e%2e/v1/tasks", "/health/%2e%2e/docs", "/health//"])
def test_nothing_else_is_reached_through_health(served: Served, path: str) -> None:
    error_of(served.ask("GET", path, token=None), 404)


@pytest.mark.parametrize("value", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER  {TOKEN} "])
def test_the_scheme_may_be_written_in_any_case(served: Served, value: str) -> None:
    answer = served.ask("GET", "/v1/tasks", token=None, headers={"authorization": value})
    assert answer.status_code == 200


@pytest.mark.parametrize("value", [TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN} {TOKEN}"])
def test_any_other_header_is_refused(served: Served, value: str) -> None:
    answer = served.ask("GET", "/v1/tasks", token=None, headers={"authorization": value})
    error_of(answer, 401)


def test_refusals_are_counted_and_make_no_series_of_the_tasks_name(served: Served) -> None:
    served.ask("POST", "/v1/tasks/parity/predict", token="wrong")
    assert served.count("taskbone_rejected_total", reason="unauthorized") == 1
    assert served.count("taskbone_requests_total", task="unknown", code="401") == 1


# --- a browser ------------------------------------------------------------------------------------


def cookie_from(answer: httpx.Response) -> str:
    """The documentation cookie that an answer sets."""
    value: str = answer.headers["set-cookie"].split(";")[0].partition("=")[2]
    return value


@pytest.mark.parametrize("path", DOCUMENTATION)
def test_a_browser_opens_the_documentation_with_the_token_once(served: Served, path: str) -> None:
    first = served.ask("GET", f"{path}?token={TOKEN}", token=None)
    assert first.status_code == 200
    assert first.headers["set-cookie"].startswith(f"{COOKIE}=")
    assert {"HttpOnly", "SameSite=Strict"} <= set(first.headers["set-cookie"].split("; "))
    assert first.headers["referrer-policy"] == "no-referrer"
    cookie = {"cookie": f"{COOKIE}={cookie_from(first)}"}
    for page in DOCUMENTATION:
        assert served.ask("GET", page, token=None, headers=cookie).status_code == 200


def test_the_cookie_is_not_the_token(served: Served) -> None:
    cookie = cookie_from(served.ask("GET", f"/docs?token={TOKEN}", token=None))
    assert TOKEN not in cookie
    error_of(served.ask("GET", "/v1/tasks", token=cookie), 401)


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_the_cookie_opens_the_documentation_alone(served: Served, method: str, path: str) -> None:
    cookie = cookie_from(served.ask("GET", f"/docs?token={TOKEN}", token=None))
    answer = served.ask(method, path, token=None, headers={"cookie": f"{COOKIE}={cookie}"})
    assert answer.status_code == (200 if path in DOCUMENTATION else 401)


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_the_token_in_the_address_opens_the_documentation_alone(
    served: Served, method: str, path: str
) -> None:
    answer = served.ask(method, f"{path}?token={TOKEN}", token=None)
    assert answer.status_code == (200 if path in DOCUMENTATION else 401)


@pytest.mark.parametrize("query", ["token=wrong", "token=", "token", "Token=" + TOKEN])
def test_a_wrong_token_in_the_address_sets_no_cookie(served: Served, query: str) -> None:
    answer = served.ask("GET", f"/docs?{query}", token=None)
    error_of(answer, 401)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "cookie", [f"{COOKIE}=wrong", f"{COOKIE}=", "other=1", "=;;,", "\xff=\xfe"]
)
def test_a_wrong_cookie_is_refused(served: Served, cookie: str) -> None:
    headers = [("cookie", cookie.encode("latin-1"))]
    error_of(served.ask("GET", "/docs", token=None, headers=headers), 401)


@pytest.mark.parametrize("path", DOCUMENTATION)
def test_a_key_without_predictions_opens_no_documentation(keyed: Keyed, path: str) -> None:
    served, book, ring = keyed
    _, secret = book.add("scraper", ["metrics"])
    ring.refresh()
    answer = served.ask("GET", f"{path}?token={secret}", token=None)
    assert "'scraper' has the scopes metrics" in error_of(answer, 403)["message"]
    assert "set-cookie" not in answer.headers


def test_the_cookie_ends_with_its_key(keyed: Keyed) -> None:
    served, book, ring = keyed
    _, secret = book.add("reader", ["predict"])
    ring.refresh()
    cookie = cookie_from(served.ask("GET", f"/docs?token={secret}", token=None))
    headers = {"cookie": f"{COOKIE}={cookie}"}
    assert served.ask("GET", "/docs", token=None, headers=headers).status_code == 200
    book.rotate("reader")
    ring.refresh()
    error_of(served.ask("GET", "/docs", token=None, headers=headers), 401)


# --- what a key opens -----------------------------------------------------------------------------


def test_a_key_of_the_wrong_scope_is_told_what_is_needed(keyed: Keyed) -> None:
    served, book, ring = keyed
    _, predict = book.add("shop", ["predict"])
    _, metrics = book.add("scraper", ["metrics"])
    book.add("boss", ["admin"])
    ring.refresh()
    for token, method, path, message in [
        (predict, "GET", "/metrics", "the key 'shop' has the scopes predict; this route needs"),
        (predict, "POST", "/v1/tasks/parity/versions", "this route needs 'admin'"),
        (metrics, "GET", "/v1/tasks", "the key 'scraper' has the scopes metrics; this route"),
    ]:
        error = error_of(served.ask(method, path, token=token), 403)
        assert error["type"] == "forbidden"
        assert message in error["message"]


def test_changes_are_off_until_there_is_an_admin_key(keyed: Keyed) -> None:
    served, book, ring = keyed
    _, predict = book.add("shop", ["predict"])
    ring.refresh()
    path = "/v1/tasks/new/versions"
    error = error_of(served.ask("POST", path, token=predict, content=b"a"), 403)
    assert "taskbone keys add NAME --scope admin" in error["message"]
    error_of(served.ask("POST", path, token=None, content=b"a"), 401)
    _, admin = book.add("boss", ["admin"])
    ring.refresh()
    assert served.ask("POST", path, token=admin, content=b"a").status_code == 201


def test_a_key_for_some_tasks_sees_no_others(keyed: Keyed) -> None:
    served, book, ring = keyed
    _, secret = book.add("shop", ["predict", "admin"], ["parity", "new"])
    ring.refresh()

    def ask(method: str, path: str, **request: Any) -> httpx.Response:
        return served.ask(method, path, token=secret, **request)

    assert [task["task"] for task in ask("GET", "/v1/tasks").json()["tasks"]] == ["parity"]
    inputs = {"inputs": "a"}
    assert ask("POST", "/v1/tasks/parity/predict", json=inputs).status_code == 200
    assert ask("GET", "/v1/tasks/parity").status_code == 200
    assert ask("POST", "/v1/tasks/new/versions", content=b"a").status_code == 201
    for other in ("pairs", "nothing"):
        for answer in (
            ask("GET", f"/v1/tasks/{other}"),
            ask("POST", f"/v1/tasks/{other}/predict", json=inputs),
            ask("POST", f"/v1/tasks/{other}/versions", content=b"a"),
        ):
            message = error_of(answer, 403)["message"]
            assert (
                message == f"the key 'shop' is not for the task '{other}'; it is for: new, parity"
            )


def test_a_change_of_the_keys_holds_without_a_restart(keyed: Keyed) -> None:
    served, book, ring = keyed
    _, old = book.add("shop", ["predict"])
    ring.refresh()
    assert served.ask("GET", "/v1/tasks", token=old).status_code == 200
    _, new = book.rotate("shop")
    ring.refresh()
    error_of(served.ask("GET", "/v1/tasks", token=old), 401)
    assert served.ask("GET", "/v1/tasks", token=new).status_code == 200


# --- without a token ------------------------------------------------------------------------------


@pytest.fixture
def open_served(serve: Callable[..., Served]) -> Served:
    """The application with `--no-auth`."""
    return serve(auth=False)


def test_without_auth_changes_still_need_an_admin_key(
    serve: Callable[..., Served], open_served: Served
) -> None:
    path = "/v1/tasks/new/versions"
    for token, status in ((None, 401), ("wrong", 401), (PREDICT_TOKEN, 403), (TOKEN, 201)):
        answer = open_served.ask("POST", path, token=token, content=b"a")
        assert answer.status_code == status
    keyless = serve(KeyRing(None), auth=False)
    error = error_of(keyless.ask("POST", path, token=None, content=b"a"), 403)
    assert "taskbone keys add NAME --scope admin" in error["message"]


def test_without_auth_everything_else_is_answered(open_served: Served) -> None:
    for path in ("/v1/tasks", "/metrics", "/docs", "/openapi.json"):
        assert open_served.ask("GET", path, token=None).status_code == 200
    answer = open_served.ask("POST", "/v1/tasks/parity/predict", token=None, json={"inputs": "a"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://here", 200),
        ("http://evil.example", 403),
        ("http://here:81", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_without_auth_pages_of_other_sites_change_nothing(
    open_served: Served, origin: str, status: int
) -> None:
    answer = open_served.ask(
        "POST",
        "/v1/tasks/parity/predict",
        token=None,
        json={"inputs": "a"},
        headers={"origin": origin},
    )
    assert answer.status_code == status
    if status == 403:
        assert error_of(answer, 403)["type"] == "forbidden"


def test_with_the_token_the_origin_does_not_matter(served: Served) -> None:
    answer = served.ask(
        "POST",
        "/v1/tasks/parity/predict",
        json={"inputs": "a"},
        headers={"origin": "http://elsewhere"},
    )
    assert answer.status_code == 200
