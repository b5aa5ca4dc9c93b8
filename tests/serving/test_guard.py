"""Which key opens which route: every documented route with every scope, from the OpenAPI document.

A new route fails here until somebody has decided who may use it.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api import build_api
from serving.config import ServeConfig
from serving.errors import ForbiddenError, UnauthorizedError
from serving.guard import Guard, scope_of
from serving.key_book import make_key
from serving.keys import KeyRing, new_secret
from serving.local_key import environment_keys
from serving.metrics import Metrics
from serving.types import ANYBODY, SCOPES, Caller, Scope
from tests.serving.conftest import KEYS, Served
from tests.serving.fake_service import FakeService

OPEN = None
DECIDED: dict[tuple[str, str], Scope | None] = {
    ("GET", "/health/live"): OPEN,
    ("GET", "/health/ready"): OPEN,
    ("GET", "/metrics"): "metrics",
    ("GET", "/metrics/targets"): "metrics",
    ("GET", "/v1/stats"): "metrics",
    ("GET", "/v1/tasks"): "predict",
    ("GET", "/v1/tasks/{task}"): "predict",
    ("GET", "/v1/tasks/{task}/versions"): "predict",
    ("GET", "/v1/tasks/{task}/neurons"): "predict",
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
        ("GET", "/", None),
        ("HEAD", "/page/page.js", None),
        ("POST", "/", "predict"),
        ("OPTIONS", "/page/page.js", "predict"),
        ("GET", "//", "predict"),
        ("GET", "/\n", "predict"),
        ("GET", "/page", "predict"),
        ("GET", "/page/", "predict"),
        ("GET", "/page/page.js\n", "predict"),
        ("GET", "/page/__init__.py", "predict"),
        ("GET", "/page/../v1/tasks", "predict"),
        ("GET", "/health", "predict"),
    ],
)
def test_what_no_route_is_named_for(method: str, path: str, scope: Scope | None) -> None:
    assert scope_of(method, path) == scope


# --- keys for some tasks --------------------------------------------------------------------------

MINE, OTHER = "parity", "pairs"
Ask = Callable[..., httpx.Response]
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
BODIES: dict[str, dict[str, Any]] = {
    "predict": {"json": {"inputs": "a"}},
    "infer": {"json": {"inputs": [TENSOR]}},
}


@pytest.fixture
def for_one_task(serve: Callable[..., Served]) -> Ask:
    """The application, asked with a key that opens everything of one task."""
    key, secret = make_key("mine", sorted(SCOPES), [MINE])
    served = serve(KeyRing(None, [key, *environment_keys(KEYS)]))
    for task in (MINE, OTHER):
        assert served.ask("POST", f"/v1/tasks/{task}/versions", content=b"artifact").is_success
    return partial(served.ask, token=secret)


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if "{task}" in one[1]])
def test_a_key_for_one_task_reaches_no_other(for_one_task: Ask, method: str, path: str) -> None:
    body = BODIES.get(path.rpartition("/")[2], {})
    for other in (OTHER, "nothing"):
        answer = for_one_task(method, path.format(**(PARAMETERS | {"task": other})), **body)
        assert answer.status_code == 403
        assert f"'mine' is not for the task '{other}'" in answer.text
    assert for_one_task(method, path.format(**PARAMETERS), **body).status_code != 403


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/predict", {"tasks": [MINE, OTHER], "inputs": "a"}),
        ("/classify", {"model": OTHER, "input": "a"}),
        (f"/predict?task={OTHER}", {"inputs": "a"}),
    ],
)
def test_nor_does_it_by_a_name_in_the_body(
    for_one_task: Ask, path: str, body: dict[str, Any]
) -> None:
    answer = for_one_task("POST", path, json=body)
    assert answer.status_code == 403


LISTS = [
    (method, path)
    for method, path in OPERATIONS
    if "{" not in path and DECIDED.get((method, path)) in ("predict", "admin")
]


@pytest.mark.parametrize(("method", "path"), LISTS)
def test_no_list_names_another_task(for_one_task: Ask, method: str, path: str) -> None:
    """But `/metrics`, whose series name every task: a key for metrics sees the whole server."""
    body = {
        "/v1/predict": {"tasks": "*", "inputs": "a"},
        "/predict": {"inputs": "a"},
        "/classify": {"input": "a"},
    }
    content = {"json": body[path]} if path in body else {}
    answer = for_one_task(method, path, **content)
    assert answer.status_code == 200
    assert f'"{OTHER}"' not in answer.text


# --- whatever is sent -----------------------------------------------------------------------------


@given(
    authorization=st.binary(max_size=80),
    cookie=st.one_of(
        st.binary(max_size=80), st.from_regex(rb"taskbone_docs=[0-9a-f]{12}\\.[0-9a-f]{64}")
    ),
    origin=st.binary(max_size=40),
    query=st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda b: b"token=" + b)),
    method=st.sampled_from(["GET", "POST", "DELETE"]),
    path=st.sampled_from(["/docs", "/v1/tasks", "/metrics", "/v1/audit", "/openapi.json"]),
    auth=st.booleans(),
)
def test_whatever_the_headers_are_nobody_gets_in_and_nothing_breaks(
    authorization: bytes,
    cookie: bytes,
    origin: bytes,
    query: bytes,
    method: str,
    path: str,
    auth: bool,
) -> None:
    headers = {b"authorization": authorization, b"cookie": cookie, b"origin": origin}
    extra: list[tuple[bytes, bytes]] = []
    guard = Guard(RING, auth=auth)
    caller: Caller | None
    try:
        caller = guard.admit(method, path, headers, query, extra)
    except (UnauthorizedError, ForbiddenError):
        caller = None
    may_enter = not auth and scope_of(method, path) != "admin"
    assert caller is (ANYBODY if may_enter and caller else None)
    assert extra == []


RING = KeyRing(None, [make_key("somebody", sorted(SCOPES))[0]])
