"""Who may ask: the token, the documentation's cookie, and pages of other sites."""

from collections.abc import Callable

import httpx
import pytest

from serving.app import COOKIE
from tests.serving.conftest import TOKEN, Served
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
    ("GET", "/"),
    ("GET", "/nothing"),
    ("GET", "/health"),
]
DOCUMENTATION = ["/docs", "/docs/swagger-ui.css", "/openapi.json"]


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


# --- without a token ------------------------------------------------------------------------------


@pytest.fixture
def open_served(serve: Callable[..., Served]) -> Served:
    """The application with `--no-auth`."""
    return serve(auth=False)


def test_without_auth_everything_is_answered(open_served: Served) -> None:
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
