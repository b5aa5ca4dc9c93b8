"""How `taskbone status` draws a server: a few lines about all of it, and a row for each task.

Fits 80 columns, and with more gives them to the names of the tasks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model_store.tables import printable, size
from serving.statistics import PHASES, Rates, Sample

if TYPE_CHECKING:
    from serving.commands.status import Look

BAR = 10
"""Cells of the bar that shows where the time went."""
_MARKS = {"tokenize": ("t", "cyan"), "queue": ("q", "yellow"), "forward": ("f", "green")}
_REST = ("\u00b7", "dim")
_FRAME = 10
"""Lines that are no tasks, with the longest head."""
_NO_FIGURE = "-"


def view(look: "Look", width: int, height: int | None = None) -> RenderableType:
    """One look, drawn in so many columns; with `height` only as many tasks as fit, the busiest."""
    rows = sorted(look.facts()["tasks"], key=lambda task: (-task["requests_per_s"], task["task"]))
    most = len(rows) if height is None else max(1, height - _FRAME)
    parts: list[RenderableType] = [*_head(look), _table(rows[:most], width)]
    if len(rows) > most:
        parts.append(Text(f"and {len(rows) - most} more tasks with fewer requests", style="dim"))
    parts.append(_legend(look.rates))
    for part in parts:
        if isinstance(part, Text):
            part.no_wrap, part.overflow = True, "ellipsis"
    return Group(*parts)


def _head(look: "Look") -> list[Text]:
    sample, rates = look.sample, look.rates
    lines = [_replicas(look.url, sample)]
    if look.failure:
        lines.append(Text(f"asking again: {printable(look.failure)}", style="bold red"))
    lines.append(
        Text(
            f"{_number(rates.requests_per_s)} requests/s, {sample.queued_tokens:,} tokens waiting, "
            f"{size(sample.memory_bytes)} of memory"
        )
    )
    hits = rates.plan_hit_share
    lines.append(
        Text(
            f"backbone {printable(sample.backbone.name)} ({sample.backbone.fingerprint[:12]}), "
            f"{size(sample.backbone.bytes)}; plans {size(sample.plan_cache.bytes)}"
            + ("" if hits is None else f", {hits:.0%} hits")
        )
    )
    rejected = {reason: rate for reason, rate in rates.rejected_per_s.items() if rate}
    if rejected:
        reasons = ", ".join(
            f"{printable(name)} {_number(rate)}/s" for name, rate in rejected.items()
        )
        lines.append(Text(f"rejected: {reasons}", style="yellow"))
    return lines


def _replicas(url: str, sample: Sample) -> Text:
    ready = sample.replicas_ready >= sample.replicas
    line = Text(printable(url), style="bold")
    place = f" on {printable(sample.node)}" if sample.node else ""
    state = f"   {sample.replicas_ready} of {sample.replicas} replicas ready{place}"
    return line.append(state, style="green" if ready else "bold yellow")


def _table(rows: list[dict[str, Any]], width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, width=min(width, 110))
    table.add_column("task", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("version", no_wrap=True)
    for head in ("kept", "req/s", "p50 ms", "p95 ms", "p99 ms", "errors"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True, width=BAR)
    for row in rows:
        kept, latency = row["kept_share"], row["latency_s"]
        errors = row["error_share"]
        table.add_row(
            Text(printable(row["task"])),
            _version(row),
            _NO_FIGURE if kept is None else f"{kept:.0%}",
            _number(row["requests_per_s"]),
            *(_milliseconds(latency[name]) for name in ("p50", "p95", "p99")),
            Text(_share(errors), style="red" if errors else ""),
            _bar(row["time_shares"]),
        )
    return table


def _version(row: Mapping[str, Any]) -> str:
    parts = [str(row["version"] or _NO_FIGURE)]
    if canary := row["canary"]:
        parts.append(f"c{canary['version']}:{canary['percent']:g}%")
    if shadow := row["shadow"]:
        parts.append(f"s{shadow}")
    return " ".join(parts)


def _bar(shares: Mapping[str, float] | None) -> Text:
    """Where the time went, a cell for each tenth; none is left out for rounding alone."""
    bar = Text()
    if shares is None:
        return bar
    filled, end = 0, 0.0
    for phase in PHASES:
        end += shares[phase] * BAR
        cells = round(end) - filled
        mark, style = _MARKS[phase]
        bar.append(mark * cells, style=style)
        filled += cells
    return bar.append(_REST[0] * (BAR - filled), style=_REST[1])


def _legend(rates: Rates) -> Text:
    words = (f"{mark} {phase}" for phase, (mark, _) in _MARKS.items())
    return Text(
        f"over {rates.seconds:.0f} s; where the time goes: {', '.join(words)}, {_REST[0]} HTTP",
        style="dim",
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return _NO_FIGURE if seconds is None else _number(1000 * seconds)


def _share(share: float) -> str:
    return "0" if share == 0 else f"{share:.1%}" if share >= 0.001 else "<0.1%"
