"""The scaling benchmark's figures as people read them: tables in docs/scaling.md, and its plots.

Everything is made from the report. The page has a pair of marks around each table; the words
around them are written by hand.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_plots import plot
from localization.page.charts import Series

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "scaling.md"

Report = Mapping[str, Any]


def write_page(report: Report) -> None:
    """Put the figures into the page, and the plots beside the report."""
    PAGE.write_text(with_tables(PAGE.read_text(), report))
    for name, svg in plots(report).items():
        (DOCS / "results" / name).write_text(svg)


def with_tables(page: str, report: Report) -> str:
    """The page with every table as the report has it. Raises `ValueError` where marks are missing.

    A table whose part the report lacks stays as it is.
    """
    for name, table in tables(report).items():
        begin, end = f"<!-- scaling-{name}:begin -->", f"<!-- scaling-{name}:end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page needs {begin} and {end} once each")
        around = re.compile(f"({re.escape(begin)}).*({re.escape(end)})", re.S)
        page = around.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", page)  # noqa: B023
    return page


def tables(report: Report) -> dict[str, str]:
    """Markdown by name."""
    found: dict[str, str] = {}
    if "machine" in report:
        found["machine"] = _machine(report["machine"])
    if "engine" in report:
        found["batch"] = _batch(report["engine"])
    if "server" in report:
        found["request"] = _request(report["server"])
    if "validation" in report:
        found["validation"] = _validation(report["validation"])
    if "limits" in report:
        found |= _limits(report["limits"])
    if "projection" in report:
        found |= _projection(report["projection"])
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([_line(head), ruler, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(facts: Mapping[str, Any]) -> str:
    short = ", **short runs that only show that it works**" if facts["quick"] else ""
    return (
        f"{facts['cores']} cores of an {facts['processor']}, Python {facts['python']}, torch "
        f"{facts['torch']}, Ray {facts['ray']}, commit {facts['commit']}{short}."
    )


_TERMS = {
    "fixed": "any batch",
    "token": "a token",
    "sequence": "a sequence",
    "warm_task": "a warm task",
    "cold_task": "a cold task",
    "cold_token": "a token of a cold task, more",
}


def _batch(engine: Mapping[str, Any]) -> str:
    kinds = [kind for kind in engine if kind != "batch_tokens"]
    rows = [
        (name, *(f"{engine[kind]['batch'][f'{term}_us']:,.1f}" for kind in kinds))
        for term, name in _TERMS.items()
    ]
    rows += [
        (
            "mean error of the fit, %",
            *(f"{100 * engine[kind]['mean_error']:.1f}" for kind in kinds),
        ),
        ("worst error, %", *(f"{100 * engine[kind]['worst_error']:.1f}" for kind in kinds)),
        ("a warm plan, MB", *(f"{engine[kind]['warm_bytes'] / 1e6:.2f}" for kind in kinds)),
        ("making it warm, ms", *(f"{engine[kind]['build_ms']:.1f}" for kind in kinds)),
    ]
    return _table(("microseconds for", *kinds), rows)


def _request(server: Mapping[str, Any]) -> str:
    parts = {
        "loop": "event loop: HTTP, JSON, tokens",
        "input": "event loop, each further input",
        "door": "HAProxy",
        "client": "the measuring client",
        "wait": "waits without a core",
    }
    kinds = [name for name in server if name != "many tasks"]
    rows = [
        (name, *(f"{server[kind]['request'][f'{part}_us']:,.0f}" for kind in kinds))
        for part, name in parts.items()
    ]
    return _table(("microseconds for one request", *kinds), rows)


def _validation(validation: Mapping[str, Any]) -> str:
    rows = []
    for kind, runs in validation.items():
        for load, figures in runs.items():
            shown = (("rate", 0), ("p50_ms", 1), ("p99_ms", 1))
            cells = (_beside(figures[name], places) for name, places in shown)
            rows.append((f"{kind}, {load}", *cells))
    return _table(("measured / simulated (error)", "requests/s", "p50 ms", "p99 ms"), rows)


def _beside(figure: Mapping[str, float], places: int) -> str:
    both = f"{figure['measured']:,.{places}f} / {figure['simulated']:,.{places}f}"
    return f"{both} ({100 * figure['error']:+.0f} %)"


def _limits(limits: Mapping[str, Any]) -> dict[str, str]:
    store = {row["tasks"]: row for row in limits["store"]}
    loaded = {row["tasks"]: row for row in limits["loaded"]}
    started = {row["tasks"]: row for row in limits["start"]}
    registry = [
        (
            f"{row['tasks']:,}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['read_ms']:,.1f}",
            _figure(store.get(row["tasks"]), "read_version_ms", 1),
            _figure(store.get(row["tasks"]), "change_ms", 0),
            _figure(loaded.get(row["tasks"]), "ms_a_task", 2),
            _figure(loaded.get(row["tasks"]), "bytes_a_task", 1, 1e-3),
            _figure(started.get(row["tasks"]), "seconds", 1),
        )
        for row in limits["registry"]
    ]
    board = [
        (
            f"{row['replicas']}",
            f"{row['calls_a_change']:,}",
            f"{row['change_ms']:,.0f}",
            f"{row['board_core_us_a_call']:,.0f}",
            f"{row['calls_a_second_idle']:,.0f}",
        )
        for row in limits["board"]
    ]
    metrics = [
        (f"{row['tasks']:,}", f"{row['series']:,}", f"{row['bytes'] / 1e6:.2f}",
         f"{row['render_ms']:,.0f}")
        for row in limits["metrics"]
    ]  # fmt: skip
    return {
        "registry": _table(
            (
                "tasks", "registry, MB", "read it, ms", "read one version, ms",
                "two changes, ms", "load a task, ms", "memory of a task, KB", "a server's start, s",
            ),
            registry,
        ),
        "board": _table(
            ("replicas", "calls for one change", "the change, ms", "core µs a call",
             "calls a second without changes"),
            board,
        ),
        "metrics": _table(("tasks asked", "series", "MB", "to make it, ms"), metrics),
    }  # fmt: skip


def _figure(row: Mapping[str, Any] | None, name: str, places: int, times: float = 1.0) -> str:
    return "-" if row is None else f"{times * row[name]:,.{places}f}"


def _projection(found: Mapping[str, Any]) -> dict[str, str]:
    skews = sorted({row["skew"] for row in found["tasks"]})
    budgets = sorted({row["plans_gib"] for row in found["tasks"]})
    by_place = {(row["skew"], row["plans_gib"], row["tasks"]): row for row in found["tasks"]}
    counts = sorted({row["tasks"] for row in found["tasks"]})
    tasks = [
        (
            f"{skew}, {gib} GiB",
            *(
                f"{row['requests_per_s']:,.0f} ({row['core_us']:,.0f})"
                for row in (by_place[skew, gib, count] for count in counts)
            ),
        )
        for skew in skews
        for gib in budgets
    ]
    nodes = [
        (
            f"{row['nodes']}, {'one front door' if row['doors'] == 1 else 'one each'}",
            f"{row['offered_per_s']:,}",
            f"{row['answered_per_s']:,}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['sequences_a_batch']:.1f}",
        )
        for row in found["nodes"]
    ]
    gpu = [
        (
            f"{row['backbone']}, {row['gpu']}",
            f"{row['gpu_us_a_sequence']:,.1f}",
            f"{row['sequences_per_s']:,}",
            f"{row['through_loop_per_s']:,}",
            f"{row['through_loop_64_per_s']:,}",
            f"{100 * row['gpu_used']:.0f}",
            f"{row['all_gpus_per_s']:,}",
            f"{100 * row['memory_share']:.1f}",
        )
        for row in found["gpu"]
    ]
    simulated = [
        (
            f"{row['gpus']}",
            f"{row['sequences_per_s']:,}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{100 * row['gpu_used']:.0f}",
            f"{row['tasks_a_batch']:.0f}",
        )
        for row in found["gpu_nodes"]
    ]
    return {
        "tasks": _table(("skew, memory for plans", *(f"{n:,} tasks" for n in counts)), tasks),
        "nodes": _table(
            ("nodes, front doors", "offered/s", "answered/s", "p50 ms", "p99 ms",
             "sequences a batch"),
            nodes,
        ),
        "gpu": _table(
            ("backbone, GPU", "GPU µs a sequence", "sequences/s of the GPU",
             "through one event loop", "... 64 inputs a request", "GPU used, %",
             "100 GPUs, sequences/s", "10,000 tasks' memory, %"),
            gpu,
        ),
        "gpu-nodes": _table(
            ("GPUs", "sequences/s", "p50 ms", "p99 ms", "GPU used, %", "tasks a batch"), simulated
        ),
    }  # fmt: skip


def plots(report: Report) -> dict[str, str]:
    """SVG files by name; what the report lacks is left out."""
    found = {}
    if "validation" in report:
        found["scaling-validation.svg"] = _validation_plot(report["validation"]["one replica"])
    if "projection" in report:
        found["scaling-tasks.svg"] = _tasks_plot(report["projection"]["tasks"])
    return found


def _validation_plot(runs: Mapping[str, Any]) -> str:
    loads = {int(name.split("%")[0]): row for name, row in runs.items() if "%" in name}
    series = [
        Series(
            f"{quantile}, {what}",
            tuple((load, row[f"{quantile}_ms"][what]) for load, row in sorted(loads.items())),
        )
        for quantile in ("p50", "p99")
        for what in ("measured", "simulated")
    ]
    label = "Latency of one replica by load, measured and simulated"
    return plot(label, series, "% of the highest rate", "milliseconds", whole=True)


def _tasks_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = [row for row in rows if row["skew"] == 1.0]
    series = [
        Series(
            f"{gib} GiB for plans",
            tuple(
                (math.log10(row["tasks"]), row["requests_per_s"])
                for row in chosen
                if row["plans_gib"] == gib
            ),
        )
        for gib in sorted({row["plans_gib"] for row in chosen})
    ]
    label = "Requests a second of one replica by tasks, skew 1"
    return plot(label, series, "tasks, as powers of ten", "requests a second", whole=True)
