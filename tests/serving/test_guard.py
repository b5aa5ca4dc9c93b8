"""Which key opens which route: every documented route with every scope, from the OpenAPI document.

A new route fails here until somebody has decided who may use it.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api import build_api
from serving.config import ServeConfig
from serving.guard import scope_of
from serving.key_book import make_key
from serving.keys import KeyRing, new_secret
from serving.metrics import Metrics
from serving.types import SCOPES, Scope
from tests.serving.conftest import Served
from tests.serving.fake_service import FakeService

OPEN = None
DECIDED: dict[tuple[str, str], Scope | None] = {
    ("GET", "/health/live"): OPEN,
    ("GET", "/health/ready"): OPEN,
    ("GET", "/metrics"): "metrics",
    ("GET", "/v1/tasks"): "predict",
    ("GET", "/v1/tasks/{task}"): "predict",
    ("GET", "/v1/tasks/{task}/versions"): "predict",
    ("GET", "/v1/tasks/{task}/versions/{version}"): "predict",
    ("POST", "/v1/predict"): "predict",
    ("POST", "/v1/tasks/{task}/predict"): "predict",
    ("POST", "/v1/tasks/{task}/versions/{version}/predict"): "predict",
    ("POST", "/v1/tasks/{task}/versions"): "admin",
    ("DELETE", "/v1/tasks/{task}/versions/{version}"): "admin",
    ("DELETE", "/v1/tasks/{task}"): "admin",
    ("POST", "/v1/tasks/{task}/activate"): "admin",
    ("POST", "/v1/tasks/{task}/deactivate"): "admin",
    ("POST", "/v1/tasks/{task}/rollback"): "admin",
    ("PUT", "/v1/tasks/{task}/canary"): "admin",
    ("DELETE", "/v1/tasks/{task}/canary"): "admin",
    ("PUT", "/v1/tasks/{task}/shadow"): "admin",
    ("DELETE", "/v1/tasks/{task}/shadow"): "admin",
    ("GET", "/v1/operations"): "admin",
    ("GET", "/v1/operations/{operation}"): "admin",
    ("GET", "/v1/audit"): "admin",
    ("GET", "/v2"): "predict",
    ("GET", "/v2/health/live"): OPEN,
    ("GET", "/v2/health/ready"): OPEN,
    ("GET", "/v2/models/{task}"): "predict",
    ("GET", "/v2/models/{task}/ready"): "predict",
    ("GET", "/v2/models/{task}/versions/{version}"): "predict",
    ("GET", "/v2/models/{task}/versions/{version}/ready"): "predict",
    ("POST", "/v2/models/{task}/infer"): "predict",
    ("POST", "/v2/models/{task}/versions/{version}/infer"): "predict",
    ("POST", "/v2/repository/index"): "predict",
    ("POST", "/v2/repository/models/{task}/load"): "admin",
    ("POST", "/v2/repository/models/{task}/unload"): "admin",
    ("POST", "/classify"): "predict",
    ("GET", "/v1/models"): "predict",
    ("GET", "/v1/models/{task}"): "predict",
    ("POST", "/predict"): "predict",
    ("GET", "/info"): "predict",
}
"""For every documented route what it needs."""

PARAMETERS = {"task": "parity", "version": "1", "operation": "nothing"}


def documented() -> dict[str, dict[str, Any]]:
    """The OpenAPI document's paths."""
    config = ServeConfig.of(store="/nowhere")
    api = build_api(FakeService(), Metrics(), config)
    paths: dict[str, dict[str, Any]] = api.openapi()["paths"]
    return paths


PATHS = documented()
OPERATIONS = [(method.upper(), path) for path, methods in PATHS.items() for method in methods]


def test_every_route_is_decided_and_no_other() -> None:
    assert set(OPERATIONS) == set(DECIDED)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_document_says_what_is_needed(method: str, path: str) -> None:
    operation = PATHS[path][method.lower()]
    scope = DECIDED[method, path]
    assert operation["security"] == ([] if scope is OPEN else [{"key": []}])
    if scope is not OPEN:
        assert operation["description"].startswith(f"Needs a key with the scope `{scope}`.")
        assert {"401", "403"} <= set(operation["responses"])


@pytest.fixture(scope="module")
def secrets() -> dict[Scope | None, str]:
    """A secret for each scope alone, and one that nobody knows."""
    return {scope: new_secret() for scope in (*SCOPES, None)}


@pytest.fixture
def one_scope_each(serve: Callable[..., Served], secrets: dict[Scope | None, str]) -> Served:
    """The application with a key for each scope alone."""
    keys = [make_key(f"only-{scope}", [scope], secret=secrets[scope])[0] for scope in SCOPES]
    return serve(KeyRing(None, keys))


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_each_route_opens_to_its_scope_alone(
    one_scope_each: Served, secrets: dict[Scope | None, str], method: str, path: str
) -> None:
    needed = DECIDED[method, path]
    path = path.format(**PARAMETERS)
    for shown in (None, "", secrets[None]):
        answer = one_scope_each.ask(method, path, token=shown)
        if needed is OPEN:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401
            assert "the request carries" in answer.text
    for scope in SCOPES:
        answer = one_scope_each.ask(method, path, token=secrets[scope])
        if needed in (OPEN, scope):
            assert answer.status_code not in (401, 403)
        else:
            assert answer.status_code == 403
            said = f"the key 'only-{scope}' has the scopes {scope}; this route needs {needed!r}"
            assert said in answer.text


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("auth", [True, False])
def test_without_an_admin_key_nothing_can_be_changed(
    serve: Callable[..., Served], method: str, path: str, auth: bool
) -> None:
    secret = new_secret()
    key, _ = make_key("both", ["predict", "metrics"], secret=secret)
    answer = serve(KeyRing(None, [key]), auth=auth).ask(
        method, path.format(**PARAMETERS), token=secret
    )
    if DECIDED[method, path] == "admin":
        assert answer.status_code == 403
        assert "taskbone keys add NAME --scope admin" in answer.text
    else:
        assert answer.status_code not in (401, 403)


ROUTES = [
    (method, path, re.compile("^" + re.sub(r"\{\w+\}", "[^/]+", path) + "$"))
    for method, path in OPERATIONS
]
"""As the router matches: `$` lets a line feed at the end pass."""


@given(
    route=st.sampled_from(OPERATIONS),
    method=st.sampled_from("GET HEAD POST PUT DELETE PATCH OPTIONS get TRACE".split()),
    part=st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1),
    end=st.sampled_from(["", "\n", "/", "//", "\r\n", "?", "%", "\n\n"]),
)
def test_no_spelling_of_a_path_needs_less(
    route: tuple[str, str], method: str, part: str, end: str
) -> None:
    """Whatever the router takes for a route, the guard takes for it too, or for more."""
    for tried in (route[0], method):
        path = re.sub(r"\{\w+\}", lambda _: part, route[1]) + end
        needed = [
            DECIDED[verb, template]
            for verb, template, pattern in ROUTES
            if pattern.match(path) and verb == tried
        ]
        given = scope_of(tried, path)
        for scope in needed:
            if scope is OPEN:
                continue
            assert given in ({"admin"} if scope == "admin" else {scope, "admin"}), path


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/v1/anything/new", "admin"),
        ("PATCH", "/v1/tasks/a/predict/more", "admin"),
        ("BREW", "/v1/tasks", "admin"),
        ("GET", "/v1/audit\n", "admin"),
        ("GET", "/metrics\n", "metrics"),
        ("POST", "/v2/repository/models/a/load", "admin"),
        ("POST", "/v2/repository/models/a/unload", "admin"),
        ("POST", "/v2/repository/anything", "admin"),
        ("POST", "/v2/repository/index", "predict"),
        ("POST", "/v2/models/a/infer", "predict"),
        ("GET", "/v2/health/ready", None),
        ("GET", "/", "predict"),
        ("GET", "/health", "predict"),
    ],
)
def test_what_no_route_is_named_for(method: str, path: str, scope: Scope | None) -> None:
    assert scope_of(method, path) == scope
