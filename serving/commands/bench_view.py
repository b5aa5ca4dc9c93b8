"""How `taskbone bench` shows a load: figures and bars of latencies; and all loads in a table."""

from collections.abc import Sequence
from math import floor

import click

from model_store.tables import show_table
from serving.load_results import PERCENTILES, REFUSALS, Bucket, Figures
from serving.statistics import PHASES

BAR = 36
"""Cells of the longest bar."""
_NOTHING_MORE = "..."
_EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"


def show(title: str, found: Figures) -> None:
    """Print what one load gave."""
    click.echo(f"{title}, {found.seconds:g} s")
    rates = f"  {found.requests_per_s:,.1f} requests/s"
    if found.inputs > 1:
        rates += f", {found.sentences_per_s:,.1f} texts/s ({found.inputs} a request)"
    click.echo(rates)
    click.echo(f"  {ended(found)}")
    if found.latency_ms is not None and found.server_ms is not None:
        latency, server = found.latency_ms, found.server_ms
        quantiles = (f"p{share} {_ms(latency[f'p{share}'])}" for share in PERCENTILES)
        click.echo(f"  latency ms: {'   '.join(quantiles)}   max {_ms(latency['max'])}")
        parts = [f"{_ms(server[name])} {name}" for name in PHASES]
        elsewhere = max(0.0, latency["mean"] - sum(server[name] for name in PHASES))
        parts.append(f"{_ms(elsewhere)} elsewhere")
        click.echo(f"  mean ms: {_ms(latency['mean'])} = {' + '.join(parts)}")
        click.echo()
        for line in bars(found.histogram):
            click.echo(f"  {line}")
    click.echo()


def ended(found: Figures) -> str:
    """How many requests ended in which way."""
    parts = [f"{found.answered:,} answered"]
    for status, count in found.statuses.items():
        if status != "200":
            kind = "refused" if int(status) in REFUSALS else "failed"
            parts.append(f"{count:,} {kind} ({status})")
    if found.lost:
        parts.append(f"{found.lost:,} without an answer")
    return ", ".join(parts)


def bars(histogram: Sequence[Bucket]) -> list[str]:
    """A line for each bucket: its bounds, a bar, its count, its share. Of empty ones in a row only
    the first has one."""
    total = sum(bucket.count for bucket in histogram)
    most = max(bucket.count for bucket in histogram)
    lows = [_bound(bucket.from_ms) for bucket in histogram]
    highs = [_bound(bucket.to_ms) for bucket in histogram]
    left, right = max(map(len, lows)), max(map(len, highs))
    width = len(f"{most:,}")
    lines: list[str] = []
    for number, (bucket, low, high) in enumerate(zip(histogram, lows, highs, strict=True)):
        if bucket.count == 0 and histogram[number - 1].count == 0:
            if lines[-1] != _NOTHING_MORE:
                lines.append(_NOTHING_MORE)
            continue
        lines.append(
            f"{low:>{left}} - {high:>{right}} ms  {_bar(bucket.count / most)}"
            f"  {bucket.count:>{width},}  {bucket.count / total:>6.1%}"
        )
    return lines


def summary(loads: Sequence[Figures]) -> None:
    """Print all loads under each other."""
    rows = []
    for one in loads:
        latency = one.latency_ms or {}
        others = sum(one.statuses.values()) - one.answered + one.lost
        rows.append(
            (
                str(one.connections or f"{one.rate:g}/s"),
                f"{one.requests_per_s:,.1f}",
                f"{one.sentences_per_s:,.1f}",
                *(_ms(latency.get(name)) for name in ("p50", "p95", "p99", "max")),
                f"{others:,}",
            )
        )
    heads = ("load", "requests/s", "texts/s", "p50 ms", "p95", "p99", "max", "failed")
    show_table("All loads", heads, rows)


def _bar(share: float) -> str:
    eighths = floor(share * BAR * 8)
    if share > 0:
        eighths = max(1, eighths)
    full, part = divmod(eighths, 8)
    return ("\u2588" * full + (_EIGHTHS[part] if part else "")).ljust(BAR)


def _bound(milliseconds: float) -> str:
    return f"{milliseconds:,.6g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
