"""What the access log and tracing cost a request: processor time, without a server around it.

`python -m benchmarks.telemetry`. Best of several runs; microseconds for one request.
"""

import os
import time
from collections.abc import Callable

os.environ |= {
    # Nothing is sent while it is measured, and nothing lost.
    "OTEL_BSP_SCHEDULE_DELAY": "3600000",
    "OTEL_BSP_MAX_QUEUE_SIZE": "1000000",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1000000",
}

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)

from serving import logs
from serving.log_lines import LineWriter
from serving.logs import Access, AccessLog
from serving.protocols.exchange import Exchange
from serving.spans import Spans, open_spans
from serving.telemetry import Telemetry
from serving.types import Batch, Stages

RUNS = 5
ID = "0af7651916cd43dd8448eb211c80319c"
HEADERS = [(name, b"x") for name in (b"host", b"accept", b"authorization", b"content-length")]
NOT_SAMPLED = [*HEADERS, (b"traceparent", f"00-{ID}-b7ad6b7169203331-00".encode())]


class Route:
    """What the router leaves in the scope."""

    path = "/v1/tasks/{task}/predict"


def microseconds(count: int, work: Callable[[], object]) -> float:
    """The least processor time of this thread for one call."""
    best = float("inf")
    for _ in range(RUNS):
        began = time.thread_time()
        for _ in range(count):
            work()
        best = min(best, time.thread_time() - began)
    return 1e6 * best / count


def exchange() -> Exchange:
    """A request that is answered."""
    return Exchange(ID, time.perf_counter(), task="sst2", version=1, status=200, size=203)


def request(telemetry: Telemetry, headers: list[tuple[bytes, bytes]] = HEADERS) -> None:
    """One request, from its beginning to its end, with one batch of its own."""
    made = exchange()
    telemetry.begin(made, headers, "/v1/tasks/sst2/predict")
    asked = made.ask()
    if asked.stages is not None:
        now = time.perf_counter()
        batch = Batch(now, 0.01, requests=1, sequences=1, tokens=31, tasks=1)
        asked.stages.append(Stages("sst2", 1, now, now, 1, 31, (batch,)))
    telemetry.end_http(made, {"method": "POST", "route": Route})


def main() -> None:
    """Measure and print."""
    alone = microseconds(20_000, lambda: exchange().ask())

    def tell(what: str, cost: float) -> None:
        print(f"{what:<50} {cost:7.2f} us")

    tell("neither", microseconds(20_000, lambda: request(Telemetry())) - alone)
    noted = Telemetry(AccessLog(LineWriter(lambda data: None, str), "json"))
    # Fewer than may wait, so that none is lost.
    tell("access log, the request's own part", microseconds(3_000, lambda: request(noted)) - alone)
    access = Access(time.time(), "POST", Route.path, 200, 0.005, 203, "web", ID, "sst2", 1, ID)
    for name, render in (("text", logs._access_text), ("JSON", logs._access_json)):
        tell(f"... making the line, {name}", microseconds(10_000, lambda r=render: r(access)))  # type: ignore[misc]
    traced = Telemetry(None, open_spans("http://127.0.0.1:9", "one"))
    tell(
        "tracing, not sampled by the caller",
        microseconds(2_000, lambda: request(traced, NOT_SAMPLED)) - alone,
    )
    tell("tracing, five spans", microseconds(2_000, lambda: request(traced)) - alone)
    kept = InMemorySpanExporter()
    request(Telemetry(None, Spans(SimpleSpanProcessor(kept), "one")))
    spans = kept.get_finished_spans() * 100
    encoding = microseconds(20, lambda: encode_spans(spans).SerializePartialToString())
    tell("... encoding them, in the sending thread", encoding / 100)


if __name__ == "__main__":
    main()
    os._exit(0)  # nobody takes the spans
