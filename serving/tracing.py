"""Spans as the rest of the server sees them: what a traced request notes, and what it is told.

Imports nothing of OpenTelemetry, which is in `spans.py` alone: a server that traces nothing does
not load it.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from serving.config import ServeConfig
from serving.errors import ConfigError
from serving.types import Stages

SEND_MS = 1000
"""How long spans are gathered, unless the environment says so: what a process that is killed loses.
OpenTelemetry's own 5 s would lose more, and hold up the end of a server."""
SENT_S = 1.5 * SEND_MS / 1000
"""After so long, the spans of the last requests have been sent, if somebody takes them."""

HeaderList = Iterable[tuple[bytes, bytes]]


class Trace(Protocol):
    """One request's part in a trace."""

    trace_id: str
    """32 hexadecimal digits."""
    stages: list[Stages] | None
    """Where to note what its answers took; None where it is not recorded."""

    def end(self, name: str, attributes: dict[str, Any], failed: bool) -> None:
        """The answer has gone out: make the spans. `failed`: by the server's fault."""
        ...


class Tracing(Protocol):
    """Makes traces, and sends them where they are collected; `serving.spans` has the real one."""

    def begin(self, headers: HeaderList, started: float) -> Trace:
        """A request's trace: the one that its headers name, or a new one.

        `started` by `time.perf_counter`.
        """
        ...

    def close(self) -> None:
        """Send what waits, if it is taken within seconds."""
        ...


def check_installed() -> None:
    """Raise `ConfigError` unless what tracing needs is installed."""
    try:
        import serving.spans  # noqa: F401 - only whether it can be
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: tracing needs packages that are not installed ({error}); install them "
            "with: pip install 'taskbone[tracing]'"
        ) from error


def open_tracing(config: ServeConfig, instance: str) -> Tracing | None:
    """What the settings ask for; `instance` names this process. Raises `ConfigError`."""
    if config.otlp_endpoint is None:
        return None
    check_installed()
    from serving.spans import open_spans

    return open_spans(config.otlp_endpoint, instance)
