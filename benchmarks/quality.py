"""The quality benchmark: what the recipes give on every data set, and whether targets are met.

    python -m benchmarks.quality --data DIR --out docs/results [--work runs/quality] [--sets a,b]

DIR holds one folder per data set with `train.jsonl` and `test.jsonl`. Every part (one recipe on one
set with one seed) is computed in a process of its own; finished parts stay in the work folder, and
the same command goes on after an interruption. Then speeds are measured, the server is asked for
every test row, and tables, plots and `quality.json` are written. With --collect-only no part is
computed, and without --data nothing is measured either. The last line of output is the JSON.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks import machine
from benchmarks.quality_measured import measure
from benchmarks.quality_page import markdown, sheets, with_readme_table
from benchmarks.quality_plots import plots
from benchmarks.quality_pool import Ended
from benchmarks.quality_results import PartError, Results, collect
from benchmarks.quality_run import run_parts
from benchmarks.recipes import SETS
from examples.ready_made import add_backbone
from localization.errors import LocalizationError
from model_store.errors import ModelStoreError
from model_store.store import Store

WIDTH = 120


def main(words: Sequence[str] | None = None) -> int:
    """The command; exit status 1 if a part failed, 130 if it was stopped."""
    arguments = _arguments(words)
    console = Console(stderr=True)
    # Stopped alike by Ctrl-C and by a service manager, also where SIGINT was ignored.
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.default_int_handler)
    failed: list[Ended] = []
    try:
        arguments.work.mkdir(parents=True, exist_ok=True)
        if not arguments.collect_only:
            add_backbone(Store(arguments.work / "store"))
            sets, jobs = arguments.sets, arguments.jobs
            failed = run_parts(console, arguments.data, arguments.work, sets, jobs)
        results = _results(console, arguments)
        write(results, arguments.out, arguments.readme)
    except KeyboardInterrupt:
        where = escape(str(arguments.work))
        console.print(f"Stopped. Finished parts stay in {where}; the same command goes on.")
        return 130
    except (PartError, LocalizationError, ModelStoreError, OSError, ValueError) as error:
        console.print(f"[red]Error:[/] {escape(str(error))}")
        return 1
    show(results)
    for one in failed:
        console.print(f"[red]{escape(one.name)} failed:[/] {escape(one.error)}")
    if failed:
        console.print(f"Their whole output is in {escape(str(arguments.work / 'logs'))}.")
    print(json.dumps(results))
    return int(bool(failed))


def write(results: Results, out: Path, readme: Path | None = None) -> None:
    """Write JSON, page and plots into `out`, and the README's table where it is asked for.

    Raises `ValueError` where the README has no place for it; then nothing is written.
    """
    text = None if readme is None else with_readme_table(readme.read_text(), results)
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots(results)
    for name, (_, svg) in drawn.items():
        (out / name).write_text(svg)
    shown = [(name, caption) for name, (caption, _) in drawn.items()]
    (out / "quality.md").write_text(markdown(results, shown))
    (out / "quality.json").write_text(json.dumps(results, indent=1) + "\n")
    if readme is not None and text is not None:
        readme.write_text(text)


def show(results: Results) -> None:
    """The tables for people."""
    console = Console(width=WIDTH)
    for sheet in sheets(results):
        if sheet.rows:
            console.print(sheet.rich())


def _results(console: Console, arguments: argparse.Namespace) -> Results:
    work, sets = arguments.work, arguments.sets
    measured = measure(console, work, arguments.data, sets, arguments.measure_again)
    command = "python -m benchmarks.quality --data DIR --out docs/results"
    if sets != list(SETS):
        command += f" --sets {','.join(sets)}"
    today = datetime.now(UTC).date().isoformat()
    return collect(work, sets, measured, command, today, machine.facts())


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and plots")
    work = Path("runs/quality")
    parser.add_argument("--work", type=Path, default=work, help=f"folder of the parts [{work}]")
    parser.add_argument("--sets", help="names, separated by commas [all]")
    parser.add_argument("--jobs", type=int, default=cores, help="parts at once [cores]")
    parser.add_argument("--collect-only", action="store_true", help="compute no part")
    parser.add_argument("--measure-again", action="store_true", help="forget measured speeds")
    parser.add_argument("--readme", type=Path, help="a README whose table is written anew")
    arguments = parser.parse_args(words)
    arguments.sets = arguments.sets.split(",") if arguments.sets else list(SETS)
    for name in arguments.sets:
        if name not in SETS:
            parser.error(f"no set {name!r}; there are {', '.join(SETS)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: at least 1")
    if arguments.data is None and not arguments.collect_only:
        parser.error("--data is needed to compute parts; --collect-only computes none")
    if arguments.data is None and arguments.measure_again:
        parser.error("--measure-again needs --data")
    if arguments.data is not None and (lack := lacking(arguments.data, arguments.sets)):
        parser.error(f"--data lacks set {lack[0]!r}: {lack[1]} is missing")
    return arguments


def lacking(data: Path, sets: Sequence[str]) -> tuple[str, Path] | None:
    """The first set that has not both of its files, and the file; None: all are there."""
    for name in sets:
        for file in (data / name / "train.jsonl", data / name / "test.jsonl"):
            if not file.is_file():
                return name, file
    return None


if __name__ == "__main__":
    sys.exit(main())
