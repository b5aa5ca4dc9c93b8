"""Spans: a request's, those below it, its batches', and a collector that is away."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serving import deployment
from serving.app import build_app
from serving.config import ServeConfig
from serving.keys import KeyRing
from serving.local_key import environment_keys
from serving.protocols.exchange import Exchange
from serving.spans import Spans, open_spans
from serving.telemetry import Telemetry
from serving.types import Batch, Stages
from tests.running import free_port
from tests.serving.collector import collecting
from tests.serving.conftest import KEYS, Served
from tests.serving.test_grpc import Calls
from tests.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=value"}
PARITY = "/v1/tasks/parity/predict"
PREDICT = "POST /v1/tasks/{task}/predict"
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}


class Traced:
    """Spans that are kept."""

    def __init__(self) -> None:
        self.kept = InMemorySpanExporter()
        self.spans = Spans(SimpleSpanProcessor(self.kept), "one")
        self.telemetry = Telemetry(None, self.spans)

    def taken(self) -> list[ReadableSpan]:
        """All that have ended since the last time."""
        found = list(self.kept.get_finished_spans())
        self.kept.clear()
        return found

    def only(self) -> ReadableSpan:
        (span,) = self.taken()
        return span

    def app(self, served: Served) -> Served:
        """The application, traced."""
        keys = KeyRing(None, environment_keys(KEYS))
        app = build_app(served.service, served.metrics, served.config, keys, self.telemetry)
        return Served(app, served.service, served.metrics, served.config)


@pytest.fixture
def traced() -> Traced:
    return Traced()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def links(span: ReadableSpan) -> set[int]:
    """The spans that one is linked with."""
    return {link.context.span_id for link in span.links}


def own_id(span: ReadableSpan) -> int:
    assert span.context is not None
    found: int = span.context.span_id
    return found


def parent_id(span: ReadableSpan) -> int:
    assert span.parent is not None
    found: int = span.parent.span_id
    return found


# --- requests -------------------------------------------------------------------------------------


def test_a_request_is_a_server_span_of_its_callers_trace(traced: Traced, served: Served) -> None:
    headers = SAMPLED | {"x-request-id": "my-id"}
    traced.app(served).ask(
        "POST", "/v1/tasks/parity/predict?a=b", json={"inputs": "four"}, headers=headers
    )
    span = traced.only()
    assert span.context is not None
    assert (span.name, span.kind) == ("POST /v1/tasks/{task}/predict", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{parent_id(span):016x}" == PARENT
    assert span.context.trace_state["vendor"] == "value"
    assert span.status.status_code is StatusCode.UNSET
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/tasks/{task}/predict",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "taskbone.request_id": "my-id",
        "taskbone.task": "parity",
        "taskbone.version": 1,
    }


def test_a_request_without_a_trace_begins_one(traced: Traced, served: Served) -> None:
    app = traced.app(served)
    for headers in ({}, {"traceparent": "00-nonsense-01"}):
        app.ask("GET", "/v1/tasks", headers=headers)
    first, second = traced.taken()
    assert first.parent is None
    assert second.parent is None
    assert first.context is not None
    assert second.context is not None
    assert first.context.trace_id != second.context.trace_id


def test_who_does_not_want_a_trace_gets_none(traced: Traced, served: Served) -> None:
    traced.app(served).ask("GET", "/v1/tasks", headers=NOT_SAMPLED)
    assert traced.taken() == []


def test_the_standard_variables_say_what_is_sampled(
    monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "texts")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    traced = Traced()
    app = traced.app(served)
    app.ask("GET", "/v1/tasks")
    assert traced.taken() == []
    app.ask("GET", "/v1/tasks", headers=SAMPLED)
    resource = dict(traced.only().resource.attributes)
    assert resource["service.name"] == "texts"
    assert resource["deployment.environment.name"] == "test"
    assert resource["service.instance.id"] == "one"


def test_the_standard_variables_go_to_replicas_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    traced = ServeConfig.of(store=tmp_path, otlp_endpoint="http://collector:4318")
    assert deployment._tracing_variables(traced)["OTEL_TRACES_SAMPLER"] == "always_off"
    assert all(name.startswith("OTEL_") for name in deployment._tracing_variables(traced))
    assert deployment._tracing_variables(ServeConfig.of(store=tmp_path)) == {}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "name", "kind"),
    [
        ("GET", "/v1/tasks/secret", None, 404, "GET /v1/tasks/{task}", None),
        ("GET", "/secret", None, 404, "GET", None),
        ("SECRET", "/v1/tasks", None, 405, "HTTP /v1/tasks", None),
        ("POST", PARITY, "crash", 500, PREDICT, "internal_error"),
        ("POST", PARITY, "overload", 503, PREDICT, "overloaded"),
    ],
)
def test_a_failure_is_the_servers_or_not(
    traced: Traced,
    served: Served,
    method: str,
    path: str,
    body: str | None,
    status: int,
    name: str,
    kind: str | None,
) -> None:
    request: dict[str, Any] = {} if body is None else {"json": {"inputs": body}}
    traced.app(served).ask(method, path, **request)
    span = traced.only()
    found = attributes(span)
    assert (span.name, found["http.response.status_code"]) == (name, status)
    assert found.get("error.type") == kind
    assert (span.status.status_code is StatusCode.ERROR) == (kind is not None)
    assert "secret" not in span.to_json().lower()


def test_calls_over_grpc_are_spans(traced: Traced, served: Served) -> None:
    calls = Calls(served.service, served.metrics, served.config, traced.telemetry)
    calls.call("ServerReady", metadata=SAMPLED)
    span = traced.only()
    assert f"{parent_id(span):016x}" == PARENT
    assert span.name == "inference.GRPCInferenceService/ServerReady"
    found = attributes(span)
    assert (found["rpc.system.name"], found["rpc.response.status_code"]) == ("grpc", "OK")
    calls.call("ModelMetadata", name="nothing")
    assert attributes(traced.only())["rpc.response.status_code"] == "NOT_FOUND"


def test_probes_are_not_traced(traced: Traced, served: Served) -> None:
    traced.app(served).ask("GET", "/health/ready")
    assert traced.taken() == []


def test_what_fails_in_a_tracer_fails_no_request(
    traced: Traced,
    served: Served,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(traced.spans, "begin", broken)
    assert traced.app(served).predict("a").status_code == 200
    assert "a request is not traced" in caplog.text


# --- what a request waited for --------------------------------------------------------------------


def answered(traced: Traced, *stages: Stages, status: int = 200) -> None:
    """One request that was answered from these."""
    exchange = Exchange("id", stages[0].started - 0.001, task=stages[0].task)
    traced.telemetry.begin(exchange, [])
    asked = exchange.ask()
    assert asked.stages is not None
    asked.stages.extend(stages)
    exchange.status = status
    traced.telemetry.end_http(exchange, {"method": "POST"})
    # As a connection does until its next request.
    kept.append(exchange)


kept: list[Exchange] = []


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    kept.clear()


def test_below_a_request_is_what_it_waited_for(traced: Traced) -> None:
    now = time.perf_counter()
    batch = Batch(now + 0.004, 0.010, requests=3, sequences=7, tokens=90, tasks=2)
    answered(traced, Stages("sst2", 1, now, now + 0.001, 2, 31, (batch,)))
    assert [span.name for span in traced.taken()] == ["tokenize", "queue", "forward", "POST"]
    del batch
    assert [span.name for span in traced.taken()] == ["batch"]


def test_what_failed_before_its_forward_has_waited_until_then(traced: Traced) -> None:
    began = time.perf_counter() - 0.05
    answered(traced, Stages("sst2", 1, began, began + 0.001, 2, 31), status=504)
    spans = {span.name: span for span in traced.taken()}
    assert list(spans) == ["tokenize", "queue", "POST"]
    queue, request = spans["queue"], spans["POST"]
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert queue.end_time - queue.start_time >= 49e6
    assert request.end_time is not None
    assert queue.end_time <= request.end_time
    assert attributes(request)["taskbone.tokens"] == 31
    assert request.status.status_code is StatusCode.ERROR


def test_spans_tell_the_times_that_were_taken(traced: Traced) -> None:
    now = time.perf_counter()
    first = Batch(now + 0.004, 0.010, requests=3, sequences=7, tokens=90, tasks=2)
    second = Batch(now + 0.020, 0.005, requests=1, sequences=1, tokens=30, tasks=1)
    answered(traced, Stages("sst2", 1, now, now + 0.001, 8, 120, (second, first)))
    del first, second
    spans = traced.taken()
    request = next(span for span in spans if span.kind is SpanKind.SERVER)
    batches = [span for span in spans if span.name == "batch"]
    forwards = [span for span in spans if span.name == "forward"]
    assert attributes(request)["taskbone.sequences"] == 8
    assert attributes(request)["taskbone.tokens"] == 120
    assert request.start_time is not None
    starts: dict[str, list[tuple[int, int]]] = {}
    for span in spans:
        assert span.start_time is not None
        assert span.end_time is not None
        start = round((span.start_time - request.start_time) / 1e6)
        starts.setdefault(span.name, []).append(
            (start, round((span.end_time - span.start_time) / 1e6))
        )
        if span.name in ("tokenize", "queue", "forward"):
            assert parent_id(span) == own_id(request)
    assert starts["tokenize"] == [(1, 1)]
    assert starts["queue"] == [(2, 3)]
    assert starts["forward"] == [(5, 10), (21, 5)]
    assert sorted(starts["batch"]) == [(5, 10), (21, 5)]
    assert [links(span) for span in batches] == [{own_id(request)}] * 2
    assert {own_id(span) for span in batches} == set().union(*map(links, forwards))
    assert sorted(attributes(span)["taskbone.batch.tokens"] for span in batches) == [30, 90]


def test_a_batch_is_one_span_for_all_requests_that_it_answered(traced: Traced) -> None:
    now = time.perf_counter()
    batch = Batch(now + 0.002, 0.010, requests=3, sequences=3, tokens=90, tasks=2)
    for task in ("sst2", "sst2", "trec6"):
        answered(traced, Stages(task, 1, now, now + 0.001, 1, 30, (batch,)))
    requests = [span for span in traced.taken() if span.kind is SpanKind.SERVER]
    traces = {span.context.trace_id for span in requests if span.context}
    assert len(traces) == 3
    del batch
    shared = traced.only()
    assert shared.parent is None
    assert shared.context is not None
    assert shared.context.trace_id not in traces
    assert links(shared) == {own_id(span) for span in requests}
    assert attributes(shared) == {
        "taskbone.batch.requests": 3,
        "taskbone.batch.sequences": 3,
        "taskbone.batch.tokens": 90,
        "taskbone.batch.tasks": 2,
    }


def test_a_request_to_many_tasks_has_one_span_for_each_batch(traced: Traced) -> None:
    now = time.perf_counter()
    batch = Batch(now + 0.003, 0.010, requests=1, sequences=2, tokens=60, tasks=2)
    both = [Stages(task, 1, now, now + 0.002, 1, 30, (batch,)) for task in ("sst2", "trec6")]
    answered(traced, *both)
    del batch, both
    spans = traced.taken()
    assert sorted(span.name for span in spans) == ["POST", "batch", "forward", "queue", "tokenize"]
    request = next(span for span in spans if span.name == "POST")
    assert attributes(request)["taskbone.tasks"] == ("sst2", "trec6")


# --- the collector --------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends at once, and gives up soon."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("hasty")
def test_a_collector_that_is_away_is_said_once_and_costs_no_memory(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "600")
    port = free_port()
    spans = open_spans(f"http://somebody:secret@127.0.0.1:{port}", "one")
    telemetry = Telemetry(None, spans)

    def ask(times: int) -> None:
        for number in range(times):
            exchange = Exchange(str(number), time.perf_counter(), status=200)
            telemetry.begin(exchange, [])
            telemetry.end_http(exchange, {"method": "GET"})

    ask(5000)
    waiting = spans._processor._batch_processor._queue  # type: ignore[attr-defined]
    assert len(waiting) <= 600
    wait_until(lambda: "cannot be sent" in caplog.text)
    ask(5000)
    assert len(waiting) <= 600
    with collecting(port) as collector:

        def back() -> bool:
            ask(1)
            return "again" in caplog.text

        wait_until(back)
        wait_until(lambda: len(collector.spans) > 0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith(
        f"spans cannot be sent to http://127.0.0.1:{port}/v1/traces, and are dropped until they "
    )
    assert "Transient error" in said[0] or "Failed to export" in said[0]
    assert said[1] == f"spans are sent to http://127.0.0.1:{port}/v1/traces again"
    spans.close()


@pytest.mark.usefixtures("hasty")
def test_what_waits_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=mine")
    with collecting() as collector:
        spans = open_spans(collector.url + "/v1/traces/", "one")
        exchange = Exchange("id", time.perf_counter(), status=200)
        telemetry = Telemetry(None, spans)
        telemetry.begin(exchange, [])
        telemetry.end_http(exchange, {"method": "GET"})
        spans.close()
        assert [span.name for span in collector.spans] == ["GET"]
        assert collector.headers[0]["path"] == "/v1/traces"
        assert collector.headers[0]["x-tenant"] == "mine"


@pytest.mark.usefixtures("hasty")
def test_a_clients_broken_headers_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    spans = open_spans("http://127.0.0.1:9", "one")
    for state in ("SECRET", "a=b,a=SECRET", "=" * 600 + "SECRET"):
        headers = {**SAMPLED, "tracestate": state}
        trace = spans.begin([(k.encode(), v.encode()) for k, v in headers.items()], 0.0)
        trace.end("GET", {}, failed=False)
    assert "SECRET" not in caplog.text
    spans.close()


def test_the_clock_of_spans_is_the_worlds(traced: Traced) -> None:
    before = time.time_ns()
    exchange = Exchange("id", time.perf_counter(), status=200)
    traced.telemetry.begin(exchange, [])
    traced.telemetry.end_http(exchange, {"method": "GET"})
    span = traced.only()
    assert span.start_time is not None
    assert span.end_time is not None
    assert before - 1_000_000 < span.start_time <= span.end_time <= time.time_ns() + 1_000_000


def test_a_cancelled_request_is_a_span_too(traced: Traced, served: Served) -> None:
    app = traced.app(served)

    async def hang_up() -> None:
        asking = asyncio.create_task(
            app._ask("POST", "/v1/tasks/parity/predict", HEADERS, {"json": {"inputs": "wait"}})
        )
        await served.service.waiting.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(hang_up())
    assert attributes(traced.only())["http.response.status_code"] == 499


HEADERS = {"authorization": f"Bearer {KEYS['TASKBONE_ADMIN_TOKEN']}"}
