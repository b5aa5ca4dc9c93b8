"""Any request that the API's own document allows, or forbids, to every route of every protocol.

Schemathesis makes the requests from the document and compares each answer with it: no fault of the
server, no status, header or body that is not documented, nothing without a key. Short here; long,
and against the real server, by `make soak`.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.core.result import Ok

from serving.api import build_api
from serving.app import build_app
from serving.config import ServeConfig
from serving.guard import scope_of
from serving.keys import KeyRing
from serving.local_key import environment_keys
from serving.metrics import Metrics
from tests.running import ADMIN_TOKEN, free_port, running
from tests.serving.conftest import KEYS, TOKEN
from tests.serving.fake_service import open_fake_service
from tests.soak import report, soak

EXAMPLES = 1000 if soak() else 5
TASKS = ("parity", "pairs")
Case = schemathesis.Case[Any]


def application() -> tuple[Any, dict[str, Any]]:
    """An application around a fake service, and its document."""
    config = ServeConfig.of(store=Path(tempfile.gettempdir()))
    metrics = Metrics()
    service = open_fake_service(config, metrics)
    keys = KeyRing(None, environment_keys(KEYS))
    document = build_api(service, metrics, config).openapi()
    return build_app(service, metrics, config, keys), document


APP, DOCUMENT = application()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
SCHEMA.app = APP


@SCHEMA.auth()
class Key:
    """How schemathesis shows a key, and leaves it away to see what happens then."""

    def get(self, case: Case, context: Any) -> str:
        """The key."""
        return TOKEN

    def set(self, case: Case, data: str, context: Any) -> None:
        """Show it."""
        case.headers["Authorization"] = f"Bearer {data}"


class AdminKey(Key):
    """The same for the real server, which has other keys."""

    def get(self, case: Case, context: Any) -> str:
        """The key."""
        return ADMIN_TOKEN


@SCHEMA.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> Any:
    """Every other time a task that is there: most made-up names only lead to 404."""
    name = (path_parameters or {}).get("task")
    if isinstance(name, str) and len(name) % 2:
        return {**(path_parameters or {}), "task": TASKS[len(name) // 2 % 2]}
    return path_parameters


EVERY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not soak(),
    suppress_health_check=list(HealthCheck),
)


@SCHEMA.parametrize()
@EVERY
def test_every_answer_is_as_documented(case: Case) -> None:
    # What a task takes, and whether it is there, is not in the schema.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


@SCHEMA.parametrize()
@EVERY
def test_nothing_is_answered_without_a_key(case: Case) -> None:
    case.headers.pop("Authorization", None)
    answer = case.call()
    if scope_of(case.method.upper(), case.formatted_path) is None:
        assert answer.status_code in (200, 405)
    else:
        assert answer.status_code == 401


@pytest.mark.skipif(not soak(), reason="against the real server by `make soak` alone")
def test_the_real_server_answers_as_documented(tmp_path: Path) -> None:
    port = free_port()
    command = ["-m", "tests.serving.fake_server", str(tmp_path / "store"), str(port), "two"]
    asked = 0

    @EVERY
    def ask(case: Case) -> None:
        nonlocal asked
        asked += 1
        case.call_and_validate(base_url=server.address, excluded_checks=[positive_data_acceptance])

    with running(command, port, tmp_path / "log") as server:
        schema = schemathesis.openapi.from_dict(DOCUMENT)
        schema.auth()(AdminKey)
        for found in schema.get_all_operations():
            assert isinstance(found, Ok)
            made = [found.ok().as_strategy(generation_mode=mode) for mode in GenerationMode]
            given(st.one_of(made))(ask)()
    report("schemathesis against the real server", f"{asked} requests, each answered as documented")
