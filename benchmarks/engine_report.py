"""The engine benchmark's rows, its targets, and its tables for people."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.engine_works import TARGET_PEER, TARGETS

Row = dict[str, Any]
"""One contest: `work`, `precision`, `keep`, `ours_ms`, `peer`, `peer_ms`, `ratio` and more."""

PEER_ORDER = ("openvino", "onnxruntime", "torch.compile", "transformers")


def row(
    work: str,
    precision: str,
    keep: float,
    ours_s: Sequence[float] | None,
    peer: str,
    peer_s: Sequence[float],
) -> Row:
    """Medians in milliseconds, and our time over the peer's; None where ours did not run."""
    peer_ms = 1000 * statistics.median(peer_s)
    ours_ms = None if ours_s is None else 1000 * statistics.median(ours_s)
    return {
        "work": work,
        "precision": precision,
        "keep": keep,
        "ours_ms": None if ours_ms is None else round(ours_ms, 3),
        "peer": peer,
        "peer_ms": round(peer_ms, 3),
        "ratio": None if ours_ms is None else round(ours_ms / peer_ms, 4),
    }


def target_of(entry: Row) -> float | None:
    """The largest ratio that this row may have, if there is a target for it."""
    if entry["peer"] != TARGET_PEER:
        return None
    return TARGETS.get((entry["work"], entry["precision"], entry["keep"]))


def table(rows: Sequence[Row]) -> Table:
    """One line per work, precision and keep; the ratio is to the peer that the targets name."""
    result = Table(title="Milliseconds for a batch, medians; ratio: ours over OpenVINO's")
    result.add_column("work")
    for head in ("precision", "keep", "ours", *PEER_ORDER, "ratio", "target", "met"):
        result.add_column(head, justify="right")
    contests: dict[tuple[str, str, float], dict[str, Row]] = {}
    for entry in rows:
        contest = (entry["work"], entry["precision"], entry["keep"])
        contests.setdefault(contest, {})[entry["peer"]] = entry
    for (work, precision, keep), peers in contests.items():
        ours = next(iter(peers.values()))["ours_ms"]
        cells = [
            milliseconds(peers[name]["peer_ms"] if name in peers else None) for name in PEER_ORDER
        ]
        against = peers.get(TARGET_PEER)
        ratio = against["ratio"] if against else None
        target = target_of(against) if against else None
        result.add_row(
            work,
            precision,
            str(keep),
            milliseconds(ours),
            *cells,
            "-" if ratio is None else f"{ratio:.2f}",
            "" if target is None else f"≤ {target}",
            verdict(ratio, target, smaller=True),
        )
    return result


def other_targets(report: Mapping[str, Any]) -> Table:
    """What has a target and no peer."""
    result = Table(title="Ours alone")
    result.add_column("what")
    result.add_column("precision")
    for head in ("measured", "target", "met"):
        result.add_column(head, justify="right")
    share_targets = {"bf16": 0.85, "int8": 0.7}
    lines: list[tuple[str, str, float, float | None, bool]] = []
    for precision, value in report["share_of_ceiling"].items():
        lines.append(
            ("share of the GEMM ceiling", precision, value, share_targets.get(precision), False)
        )
    for key, what, target, smaller in (
        ("tasks16_over_one", "32 sentences of 16 tasks over one task, time", 1.10, True),
        ("zipf_1000_over_one", "1,000 tasks over one, throughput", 0.97, False),
        ("sentences_per_second", "SST-2 sentences a second", 900.0, False),
        ("cold_task_bytes", "bytes of a cold task", 100_000.0, True),
    ):
        for precision, value in report[key].items():
            lines.append((what, precision, value, target, smaller))
    for what, precision, measured, limit, smaller in lines:
        sign = "≤" if smaller else "≥"
        result.add_row(
            what,
            precision,
            f"{measured:,.2f}" if measured < 100 else f"{measured:,.0f}",
            "" if limit is None else f"{sign} {limit:,g}",
            verdict(measured, limit, smaller=smaller),
        )
    return result


def verdict(value: float | None, target: float | None, *, smaller: bool) -> str:
    """Whether a target is met, where there is one."""
    if target is None or value is None:
        return ""
    return "yes" if (value <= target if smaller else value >= target) else "no"


def milliseconds(value: float | None) -> str:
    """Three figures that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def add_shares(rows: Sequence[Row], ceilings: dict[str, float]) -> None:
    """Write into each row our useful operations per second over the ceiling of its precision."""
    for entry in rows:
        ceiling, ours_ms = ceilings.get(entry["precision"]), entry["ours_ms"]
        entry["share_of_ceiling"] = (
            None
            if ceiling is None or ours_ms is None
            else round(entry["useful_gflop"] / (ours_ms / 1000) / ceiling, 4)
        )
