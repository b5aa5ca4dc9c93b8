"""Spans with OpenTelemetry: a request's, below it those of what it waited for, and its batches'.

The only file that knows OpenTelemetry. Nothing here waits for a collector: spans lie in a bounded
queue, from which a thread sends them; while nobody takes them they are dropped, which is said once.
All spans of a request are made when it has its answer, from times that were taken on its way.

A batch answers many requests, whose traces it belongs to all alike: its span is the root of a trace
of its own, linked with the requests' spans in both directions, and recorded where one of them is.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk import _shared_internal as batching
from opentelemetry.sdk import environment_variables
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace import span as trace_span
from opentelemetry.trace.propagation import tracecontext

from serving.tracing import SEND_MS, HeaderList
from serving.types import Batch, Stages

NAME = "taskbone"
CLOSE_S = 5.0
"""How long a process that ends waits for the collector."""
_PATH = "/v1/traces"
_logger = logging.getLogger("taskbone.tracing")


def open_spans(endpoint: str, instance: str) -> "Spans":
    """Spans that are sent to the collector at `endpoint`; `instance` names this process.

    Sampling, headers, limits and the resource's attributes are as the standard environment
    variables of OpenTelemetry (`OTEL_...`) say.
    """
    url = endpoint.rstrip("/").removesuffix(_PATH) + _PATH
    # What goes wrong is said by `_Exporter`, once. The library would say it every few seconds, and
    # of a client's broken header what is in it.
    for module in (batching, trace_span, tracecontext):
        logging.getLogger(module.__name__).setLevel(logging.ERROR)
    exporter = _Exporter(trace_exporter.OTLPSpanExporter(endpoint=url), url)
    given = environment_variables.OTEL_BSP_SCHEDULE_DELAY in os.environ
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=None if given else SEND_MS)
    return Spans(processor, instance, exporter.give_up)


class Spans:
    """Makes the spans of requests and batches. For the event loop's thread."""

    def __init__(
        self,
        processor: SpanProcessor,
        instance: str,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`give_up` is called first at the end: nothing that cannot be sent now is waited for."""
        release = installed(NAME)
        own = Resource(
            {"service.name": NAME, "service.version": release, "service.instance.id": instance}
        )
        # What the environment says comes after, and wins.
        resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())
        self._processor = processor
        self._give_up = give_up
        requests = TracerProvider(resource=resource, shutdown_on_exit=False)
        batches = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        for provider in (requests, batches):
            provider.add_span_processor(processor)
        self._requests = requests.get_tracer(NAME, release)
        self._batches = batches.get_tracer(NAME, release)
        self._open: weakref.WeakKeyDictionary[Batch, Span] = weakref.WeakKeyDictionary()

    def begin(self, headers: HeaderList, started: float) -> "_Trace":
        """A request's trace: the one that its headers name, or a new one."""
        offset_ns = time.time_ns() - time.perf_counter_ns()
        span = self._requests.start_span(
            "request",
            _W3C.extract(headers, Context(), _HEADERS),
            SpanKind.SERVER,
            start_time=offset_ns + _ns(started),
        )
        return _Trace(self, span, offset_ns)

    def close(self) -> None:
        """Send what waits, if it is taken within seconds."""
        self._give_up()
        sending = threading.Thread(target=self._processor.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_S)

    def stages(self, request: Span, stages: Sequence[Stages], offset_ns: int) -> None:
        """The spans below a request's: tokenize, queue, and a forward for each of its batches.

        Of a request that failed after its texts had become tokens, all the rest is its wait.
        """

        def child(name: str, start: float, end: float, links: Sequence[Link] = ()) -> Span:
            span = self._requests.start_span(
                name, context, links=links, start_time=offset_ns + _ns(start)
            )
            span.end(offset_ns + _ns(end))
            return span

        context = set_span_in_context(request, Context())
        tokenized = max(one.tokenized for one in stages)
        batches = dict.fromkeys(batch for one in stages for batch in one.batches)
        in_turn = sorted(batches, key=lambda batch: batch.started)
        child("tokenize", min(one.started for one in stages), tokenized)
        begun = in_turn[0].started if in_turn else time.perf_counter()
        child("queue", tokenized, max(tokenized, begun))
        for batch in in_turn:
            shared = self._batch(batch, offset_ns)
            link = Link(shared.get_span_context(), {"taskbone.link": "batch"})
            child("forward", batch.started, batch.started + batch.forward_s, [link])
            shared.add_link(request.get_span_context(), {"taskbone.link": "request"})

    def _batch(self, batch: Batch, offset_ns: int) -> Span:
        """A batch's span, which ends when the last request that it answered is done with it."""
        span = self._open.get(batch)
        if span is None:
            span = self._batches.start_span(
                "batch",
                Context(),
                attributes=_sizes(batch),
                start_time=offset_ns + _ns(batch.started),
            )
            self._open[batch] = span
            end = offset_ns + _ns(batch.started + batch.forward_s)
            weakref.finalize(batch, span.end, end).atexit = False
        return span


class _Trace:
    """One request's part in a trace."""

    __slots__ = ("_offset_ns", "_span", "_spans", "stages", "trace_id")

    def __init__(self, spans: Spans, span: Span, offset_ns: int) -> None:
        self._spans = spans
        self._span = span
        self._offset_ns = offset_ns
        self.trace_id = format(span.get_span_context().trace_id, "032x")
        self.stages: list[Stages] | None = [] if span.is_recording() else None

    def end(self, name: str, attributes: dict[str, Any], failed: bool) -> None:
        """The answer has gone out: make the spans. `failed`: by the server's fault."""
        if self.stages is None:
            return
        span, stages = self._span, self.stages
        span.update_name(name)
        if stages:
            attributes |= _answered(stages)
            self._spans.stages(span, stages, self._offset_ns)
            # Who keeps this record, as a connection does until its next request, keeps no batch.
            self.stages = None
        span.set_attributes(attributes)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(time.time_ns())


def _answered(stages: Sequence[Stages]) -> dict[str, Any]:
    """What a request was answered from, in all."""
    found = {
        "taskbone.sequences": sum(one.sequences for one in stages),
        "taskbone.tokens": sum(one.tokens for one in stages),
    }
    return found if len(stages) == 1 else found | {"taskbone.tasks": [one.task for one in stages]}


def _sizes(batch: Batch) -> dict[str, Any]:
    return {
        "taskbone.batch.requests": batch.requests,
        "taskbone.batch.sequences": batch.sequences,
        "taskbone.batch.tokens": batch.tokens,
        "taskbone.batch.tasks": batch.tasks,
    }


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


class _Headers(Getter[HeaderList]):
    """Headers as ASGI has them, for who reads a trace's context."""

    def get(self, carrier: HeaderList, key: str) -> list[str] | None:
        """The values of a header, in any case."""
        name = key.encode()
        return [value.decode("latin-1") for one, value in carrier if one == name] or None

    def keys(self, carrier: HeaderList) -> list[str]:
        """All names."""
        return [name.decode("latin-1") for name, _ in carrier]


_HEADERS = _Headers()
_W3C = tracecontext.TraceContextTextMapPropagator()


class _Exporter(SpanExporter):
    """Says once that spans are not taken, and once that they are again."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        address = urlsplit(url)
        # Without a user's name and password.
        self._url = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
        self._reason = _Reason()
        logging.getLogger(trace_exporter.__name__).addFilter(self._reason)
        self._dropped = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. In the sending thread; waits and tries again for some seconds."""
        result = self._exporter.export(spans)
        if result is SpanExportResult.FAILURE:
            if not self._dropped:
                _logger.warning(
                    "spans cannot be sent to %s, and are dropped until they can: %s",
                    self._url,
                    self._reason.last,
                )
            self._dropped += len(spans)
        elif self._dropped:
            _logger.warning("spans are sent to %s again", self._url)
            self._dropped = 0
        return result

    def give_up(self) -> None:
        """Do not wait for a collector that did not answer last time."""
        if self._dropped:
            self._exporter.shutdown()

    def shutdown(self) -> None:
        """Close what is open."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing waits here."""
        return True


class _Reason(logging.Filter):
    """Keeps what the library would log, and lets none of it through."""

    last = "no reason was given"

    def filter(self, record: logging.LogRecord) -> bool:
        """Note a record."""
        self.last = record.getMessage()
        return False
