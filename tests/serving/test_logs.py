"""What lines say: as text and as JSON, of which request, and what they must not say."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import logs, startup
from serving.app import build_app
from serving.config import ServeConfig
from serving.errors import ConfigError, EngineError, InvalidInputError
from serving.keys import KeyRing
from serving.local_key import environment_keys
from serving.log_lines import LineWriter
from serving.logs import REQUEST, AccessLog, JsonFormatter, TextFormatter
from serving.protocols.exchange import Exchange
from serving.telemetry import Telemetry
from serving.tracing import open_tracing
from serving.types import Caller
from tests.serving.conftest import KEYS, TOKEN, Served
from tests.serving.test_grpc import Calls

SECRET = "my own words"


@pytest.fixture
def request_under_way() -> Iterator[Exchange]:
    exchange = Exchange("my-id", 0.0, task="sst2", version=3)
    token = REQUEST.set(exchange)
    yield exchange
    REQUEST.reset(token)


def record(message: str, error: BaseException | None = None, name: str = "serving.app") -> Any:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(name, logging.ERROR, "file", 1, message, (), info)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it is after it was raised."""
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001 - that one
        return caught


def as_json(one: Any) -> dict[str, Any]:
    line = JsonFormatter().format(one)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line)
    return found


# --- lines ----------------------------------------------------------------------------------------


def test_a_line_without_a_request() -> None:
    one = record('it "says"\nmuch \ud800')
    one.created = 1764492000.1239
    found = as_json(one)
    assert found == {
        "time": "2025-11-30T08:40:00.123Z",
        "level": "ERROR",
        "logger": "serving.app",
        "message": 'it "says"\nmuch \ud800',
        "pid": one.process,
    }
    text = TextFormatter().format(record("it happened"))
    assert text.endswith("Z ERROR serving.app: it happened")


def test_a_line_of_a_request_says_of_which(request_under_way: Exchange) -> None:
    found = as_json(record("it happened"))
    assert (found["request_id"], found["task"], found["version"]) == ("my-id", "sst2", 3)
    assert "trace_id" not in found
    assert TextFormatter().format(record("it happened")).endswith("happened (request my-id)")
    assert TextFormatter().format(record("request my-id failed")).endswith("request my-id failed")
    request_under_way.version = None
    assert "version" not in as_json(record("it happened"))


@pytest.mark.parametrize("error", [KeyError(SECRET), ValueError(SECRET), Exception(SECRET)])
def test_an_error_that_may_quote_a_request_is_shown_without_its_message(
    request_under_way: Exchange, error: Exception
) -> None:
    found = as_json(record("it failed", raised(EngineError("the engine says"), raised(error))))
    assert SECRET not in json.dumps(found)
    assert f"{type(error).__name__}: (not shown" in found["exception"]
    assert "in raised" in found["exception"]
    assert "EngineError: the engine says" in found["exception"]


def test_what_is_told_to_the_client_in_its_words_is_not_logged(request_under_way: Exchange) -> None:
    found = as_json(record("it failed", raised(RuntimeError("odd"), InvalidInputError(SECRET))))
    assert SECRET not in found["exception"]
    assert "RuntimeError: odd" in found["exception"]


def test_errors_of_machines_are_shown_in_full(request_under_way: Exchange) -> None:
    for error in (
        OSError(28, "No space left"),
        RuntimeError("out of memory"),
        ZeroDivisionError("n"),
    ):
        found = as_json(record("it failed", raised(error)))
        assert found["exception"].endswith(f"{type(error).__name__}: {error}")


def test_without_a_request_our_own_errors_are_shown_and_others_are_not() -> None:
    assert SECRET in as_json(record("it failed", raised(KeyError(SECRET))))["exception"]
    theirs = record(f"never retrieved\nfuture: {SECRET}", raised(KeyError(SECRET)), "asyncio")
    found = as_json(theirs)
    assert SECRET not in json.dumps(found)
    assert found["message"] == "never retrieved"
    assert "KeyError" in found["exception"]


def test_errors_in_a_circle_have_an_end() -> None:
    first, second = raised(KeyError("a")), raised(KeyError("b"))
    first.__cause__, second.__cause__ = second, first
    assert as_json(record("it failed", first))["exception"].count("KeyError: ") == 2


# --- the access log -------------------------------------------------------------------------------


class Heard:
    """The application with an access log that is kept."""

    def __init__(self, served: Served, log_format: str = "json") -> None:
        self.writes: list[bytes] = []
        self.writer = LineWriter(self.writes.append, str)
        telemetry = Telemetry(AccessLog(self.writer, log_format))
        keys = KeyRing(None, environment_keys(KEYS))
        app = build_app(served.service, served.metrics, served.config, keys, telemetry)
        self.served = Served(app, served.service, served.metrics, served.config)
        self.telemetry = telemetry

    def lines(self) -> list[str]:
        self.writer.flush()
        said = b"".join(self.writes).decode().splitlines()
        self.writes.clear()
        return said

    def line(self) -> dict[str, Any]:
        (line,) = self.lines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def heard(served: Served) -> Heard:
    return Heard(served)


def test_each_request_is_a_line(heard: Heard) -> None:
    headers = {"x-request-id": "my-id"}
    path = "/v1/tasks/parity/predict?a=b"
    answer = heard.served.ask("POST", path, json={"inputs": "four"}, headers=headers)
    found = heard.line()
    assert answer.status_code == 200
    assert found.pop("time").endswith("Z")
    assert found.pop("pid") > 0
    assert found.pop("duration_ms") > 0
    assert found == {
        "level": "INFO",
        "logger": "taskbone.access",
        "message": "POST /v1/tasks/{task}/predict 200",
        "request_id": "my-id",
        "task": "parity",
        "version": 1,
        "method": "POST",
        "route": "/v1/tasks/{task}/predict",
        "status": 200,
        "bytes": len(answer.content),
        "key": "environment-admin",
    }


def test_the_same_as_text(served: Served) -> None:
    heard = Heard(served, "text")
    answer = heard.served.ask(
        "POST", "/v1/tasks/parity/predict", json={"inputs": "a"}, headers={"x-request-id": "my-id"}
    )
    (line,) = heard.lines()
    start, middle, end = line.partition(" INFO taskbone.access: POST /v1/tasks/{task}/predict 200 ")
    assert start.endswith("Z")
    assert middle
    rest = f" ms, {len(answer.content)} bytes, key environment-admin, task parity, version 1"
    assert end.partition(" ms,")[0].replace(".", "").isdigit()
    assert end.endswith(f"{rest} (request my-id)")


PREDICT = "/v1/tasks/{task}/predict"


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "route", "task"),
    [
        ("POST", "/v1/tasks/parity/predict", {"content": b"{"}, 422, PREDICT, "parity"),
        (
            *("POST", f"/v1/tasks/{SECRET}/predict", {"json": {"inputs": "a"}}),
            *(404, PREDICT, "unknown"),
        ),
        ("GET", f"/{SECRET}", {}, 404, "-", "none"),
        ("GET", f"/v1/tasks/parity?token={SECRET}", {}, 422, "/v1/tasks/{task}", "unknown"),
        ("GET", "/v1/tasks", {"token": SECRET}, 401, "-", "none"),
        (
            *("POST", "/v1/tasks/parity/predict", {"json": {"inputs": "crash"}}),
            *(500, PREDICT, "parity"),
        ),
    ],
)
def test_a_line_says_nothing_that_a_client_made_up(
    heard: Heard,
    method: str,
    path: str,
    request_: dict[str, Any],
    status: int,
    route: str,
    task: str,
) -> None:
    heard.served.ask(method, path, **request_)
    found = heard.line()
    assert (found["status"], found["route"], found["task"]) == (status, route, task)
    assert SECRET not in json.dumps(found)


def test_a_method_that_does_not_exist_is_not_repeated(heard: Heard) -> None:
    heard.served.ask("SECRETS", "/v1/tasks")
    assert heard.line()["method"] == "_OTHER"


def test_probes_are_lines_only_where_they_fail(heard: Heard) -> None:
    heard.served.ask("GET", "/health/ready")
    assert heard.lines() == []
    heard.served.service.healthy = False
    heard.served.ask("GET", "/health/ready")
    assert heard.line()["status"] == 503


def test_calls_over_grpc_are_lines(heard: Heard) -> None:
    calls = Calls(heard.served.service, heard.served.metrics, heard.served.config, heard.telemetry)
    calls.call("ServerReady", metadata={"x-request-id": "my-id"})
    found = heard.line()
    assert (found["method"], found["route"], found["status"], found["request_id"]) == (
        "gRPC",
        "inference.GRPCInferenceService/ServerReady",
        200,
        "my-id",
    )


def test_the_access_log_can_be_off(served: Served) -> None:
    """Then nothing of it is called."""
    served.predict("a")
    assert Telemetry().end_http(Exchange("id", 0.0, caller=Caller()), {}) is None  # type: ignore[func-returns-value]


def test_requests_at_once_do_not_mix_their_names(served: Served) -> None:
    """The request that a line belongs to is that of the task that logs it."""
    seen: dict[str, str] = {}

    async def one(name: str) -> None:
        Telemetry().begin(Exchange(name, 0.0), [])
        await asyncio.sleep(0)
        await asyncio.to_thread(lambda: seen.update({name: REQUEST.get().request_id}))  # type: ignore[union-attr]

    async def both() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(both())
    assert seen == {"a": "a", "b": "b"}


# --- processes ------------------------------------------------------------------------------------


def test_the_main_process_logs_json_without_the_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = ServeConfig.of(store=tmp_path, log_format="json")
    before = logging.getLogger().handlers[:]

    def fail() -> None:
        with logs.of_main_process(config) as console:
            with startup.progress(console) as step:
                step("starting")
            startup.show(console, config, TOKEN, [{"task": "sst2", "takes_pairs": False}])
            raise ConfigError("it cannot be")

    with pytest.raises(SystemExit):
        fail()
    out, err = capfd.readouterr()
    said = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [one["level"] for one in said] == ["INFO", "INFO", "ERROR"]
    assert said[0]["message"] == "starting ..."
    assert said[1]["message"].startswith("Taskbone answers at http://127.0.0.1:8000")
    assert said[2]["message"] == "it cannot be"
    assert TOKEN not in err
    assert logging.getLogger().handlers == before


def test_nothing_of_opentelemetry_is_loaded_where_nothing_is_traced(tmp_path: Path) -> None:
    """Of its API FastAPI loads some by itself; what makes and sends spans is loaded by nobody."""
    program = f"""
import asyncio, sys, httpx
from pathlib import Path
import serving.engine, serving.private_ray, serving.replica
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
from serving.app import build_app
from serving.config import ServeConfig
from serving.keys import KeyRing
from serving.metrics import Metrics
from serving.protocols.grpc_calls import GrpcCalls
from serving.telemetry import Telemetry
from serving.tracing import open_tracing
from serving.tracing import open_tracing
from tests.serving.fake_service import open_fake_service

config = ServeConfig.of(store=Path({str(tmp_path)!r}), auth=False)
metrics = Metrics()
service = open_fake_service(config, metrics)
telemetry = Telemetry(None, open_tracing(config, "one"))
app = build_app(service, metrics, config, KeyRing(None, ()), telemetry)

async def ask():
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
        headers = {{"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}}
        return await client.post(
            "/v1/tasks/parity/predict", json={{"inputs": "a"}}, headers=headers
        )

assert asyncio.run(ask()).status_code == 200
made_by = ("opentelemetry.sdk", "opentelemetry.exporter", "serving.spans")
print([name for name in sys.modules if name.startswith(made_by)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_what_tracing_needs_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "serving.spans", None)
    config = ServeConfig.of(store=tmp_path, otlp_endpoint="http://127.0.0.1:4318")
    with pytest.raises(ConfigError, match=r"pip install 'taskbone\[tracing\]'"):
        open_tracing(config, "one")
    assert open_tracing(ServeConfig.of(store=tmp_path), "one") is None


@pytest.mark.parametrize("given", ["collector:4318", "ftp://collector", "http://", "http://a?b=c"])
def test_an_endpoint_is_a_url(tmp_path: Path, given: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .*http://collector:4318"):
        ServeConfig.of(store=tmp_path, otlp_endpoint=given)
