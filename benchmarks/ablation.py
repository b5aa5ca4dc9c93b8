"""Repeats the papers' ablations on MiniLM-L6 and small samples of public data sets.

    python -m benchmarks.ablation --data DIR --out docs/results [--sets sst2,trec6]
        [--work runs/ablation] [--jobs N]

DIR holds one folder per data set with `train.jsonl` and `test.jsonl`. Every finished figure is kept
in the work folder, so that a run goes on where it was. Writes `ablation.json`, `ablation.md` and
plots into --out; tables go to standard output, whose last line is one JSON object, and progress to
standard error. Some tens of minutes per data set on one core.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.ablation_bench import Bench, Figures, Grid
from benchmarks.ablation_deltas import deltas
from benchmarks.ablation_free import SAME_TASK, domains, training_free
from benchmarks.ablation_parts import base, injection, modules, rows, scope, scores
from benchmarks.ablation_plots import plots
from benchmarks.ablation_tables import sheets
from benchmarks.recipes import SETS
from examples.ready_made import add_backbone
from localization.errors import LocalizationError
from model_store.backbone import load_backbone
from model_store.errors import ModelStoreError
from model_store.store import Store

PARTS: dict[str, Callable[[Bench], Figures]] = {
    "base": base,
    "scores": scores,
    "modules": modules,
    "injection": injection,
    "rows": rows,
    "scope": scope,
    "training_free": training_free,
    "domains": domains,
    "deltas": deltas,
}
"""In this order; `base` comes first, for the others start from its training."""


@dataclass(frozen=True)
class Part:
    """One part on one data set: all that a process of its own needs to know."""

    name: str
    part: str
    backbone: Path
    data: Path
    work: Path
    grid: Grid


def compute(asked: Part) -> tuple[str, str, Figures]:
    """Set, part and its figures."""
    torch.set_num_threads(1)
    backbone = load_backbone(asked.backbone, asked.backbone.name)
    bench = Bench(asked.name, backbone, asked.data, asked.work, asked.grid)
    return asked.name, asked.part, PARTS[asked.part](bench)


def run(
    backbone: Path, data: Path, work: Path, names: Sequence[str], grid: Grid, jobs: int
) -> dict[str, dict[str, Figures]]:
    """All parts on the named sets, `jobs` at once; figures by set and part.

    `backbone` is its folder in a store. Rows from another domain are tried where a set has one.
    """
    asked = [
        Part(name, part, backbone, data, work, grid)
        for name in names
        for part in PARTS
        if part != "domains" or _has_other_domain(name, data)
    ]
    result: dict[str, dict[str, Figures]] = {name: {} for name in names}
    # Fresh interpreters: torch's threads do not survive a fork.
    fresh = multiprocessing.get_context("spawn")
    first = [part for part in asked if part.part == "base"]
    with ProcessPoolExecutor(jobs, fresh, _begin_process) as pool:
        try:
            for wave in (first, [part for part in asked if part.part != "base"]):
                for done in as_completed([pool.submit(compute, part) for part in wave]):
                    name, part, figures = done.result()
                    result[name][part] = figures
                    print(f"{name}: {part} is complete", file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return {
        name: {part: found[part] for part in PARTS if part in found}
        for name, found in result.items()
    }


def _begin_process() -> None:
    """Leave Ctrl-C to the process that started this one, and end with it, however that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    starter = multiprocessing.parent_process()
    assert starter is not None, "this runs in the processes that are started"

    def end() -> None:
        starter.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _has_other_domain(name: str, data: Path) -> bool:
    # Both ways at once, so for the first of the two alone.
    here = all((data / other / "train.jsonl").is_file() for other in SAME_TASK)
    return name == SAME_TASK[0] and here


def write(results: dict[str, dict[str, Figures]], grid: Grid, out: Path) -> Figures:
    """Tables to standard output, files into `out`; gives what `ablation.json` holds."""
    console = Console(width=140)
    tables = sheets(results, grid)
    for sheet in tables:
        console.print(sheet.table())
    record = {"sets": results, "grid": dataclasses.asdict(grid), "machine": machine.facts()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablation.json").write_text(json.dumps(record, indent=1) + "\n")
    drawings = plots(results, grid)
    for name, drawing in drawings.items():
        (out / name).write_text(drawing)
    page = [
        introduction(results, grid),
        *(sheet.markdown() for sheet in tables),
        *(f"![{name.removesuffix('.svg')}]({name})\n" for name in drawings),
    ]
    (out / "ablation.md").write_text("\n".join(page))
    return record


def introduction(results: dict[str, dict[str, Figures]], grid: Grid) -> str:
    """What was measured on what, and how much chance there is in it."""
    counts = {name: parts["base"]["test_rows"] for name, parts in results.items()}
    error = max(100 * (0.85 * 0.15 / count) ** 0.5 for count in counts.values())
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"""# Ablations

`python -m benchmarks.ablation`, commit {machine.commit()}: MiniLM-L6, one run and one seed each. At
most {grid.cap} training rows, 15 % of them for validation; texts of at most {grid.max_tokens}
tokens; {grid.epochs} epochs of tuning, {grid.condense_epochs} after removal, where it does not say
otherwise. Test rows: {shown}. All figures are test accuracy in per cent unless it says otherwise.
The standard error of one is up to {error:.1f} points: smaller differences may be chance.
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--sets", default="sst2,trec6", help="names, separated by commas")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--jobs", type=int, default=1, help="parts computed at once [1]")
    arguments = parser.parse_args()
    names = arguments.sets.split(",")
    for name in names:
        if name not in SETS:
            parser.error(f"no data set {name!r}; there are {', '.join(SETS)}")
        for split in ("train", "test"):
            if not (arguments.data / name / f"{split}.jsonl").is_file():
                parser.error(f"{arguments.data / name / f'{split}.jsonl'} is missing")
    if arguments.jobs < 1:
        parser.error("--jobs: at least 1")
    # For the processes that are started: they share the cores among themselves.
    os.environ["OMP_NUM_THREADS"] = "1"
    store = Store(arguments.work / "store")
    backbone = store.backbone_path(add_backbone(store).fingerprint)
    grid = Grid()
    try:
        results = run(backbone, arguments.data, arguments.work, names, grid, arguments.jobs)
    except (LocalizationError, ModelStoreError) as error:
        raise SystemExit(str(error)) from None
    except BrokenProcessPool:
        raise SystemExit("a process was ended from outside; is there enough memory?") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on where it was") from None
    print(json.dumps(write(results, grid, arguments.out)))


if __name__ == "__main__":
    main()
