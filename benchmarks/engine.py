"""Measures the engine without a server, against other engines on the same machine.

    pip install --constraint constraints.txt -e '.[bench]'
    python -m benchmarks.engine --data DIR [--work runs/engine] [--rounds 16]

BERT-base (random weights) and MiniLM-L6 answer batches of 32 sentences and single sentences. All
contestants of a work and a precision take turns in one process, and medians are compared: like
precision with like. Sentences have the token lengths of the data sets in --data, scaled to a mean
of 32; a single sentence has 32 tokens. Peers get them padded to the longest of the batch.

Parts of it, for a quick look:

    --only minilm-l6-32,minilm-l6-1     works: these two, bert-base-32 and bert-base-1
    --only tasks16,zipf,sst2,memory     what many tasks cost, and throughput: no peers
    --precision bf16 --peers openvino   one precision, one peer
    --without-amx                       as a processor without AMX computes, for every contestant

The first run exports and quantizes the peers' models into --work, which takes minutes. Peers whose
packages are missing are named and left out. The last line of output is one JSON object.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import engine_isa, engine_peers, machine
from benchmarks.engine_contest import Report, Settings, measure
from benchmarks.engine_models import Model, open_model
from benchmarks.engine_report import add_shares, other_targets, table
from benchmarks.engine_tasks import measure_alone
from benchmarks.engine_timing import Others, gemm_ceilings
from benchmarks.engine_works import PRECISIONS, WORKS, read_lengths, sentence_sets

BUSY = 0.05
"""A share of the processor that other programs took, above which people are warned."""
SHARE_WORK, SHARE_KEEP = "bert-base-32", 0.5
"""Whose share of the ceiling has a target."""


def main() -> int:
    """The command."""
    settings, without_amx = parse()
    if without_amx:
        engine_isa.refuse_amx()
    torch.set_num_threads(settings.threads)
    console = Console(stderr=True)
    report = run(settings, console)
    people = Console(width=130)
    if report["rows"]:
        people.print(table(report["rows"]))
    alone = other_targets(report)
    if alone.row_count:
        people.print(alone)
    for what, why in report["left_out"].items():
        people.print(f"left out: {what}: {why}", markup=False)
    facts = report["machine"]
    people.print(
        f"{facts['processor']}, {report['settings']['threads']} threads, "
        f"{', '.join(facts['flags'])}; AMX {facts['amx']}",
        markup=False,
    )
    if (share := report["others_share_of_processor"]) > BUSY:
        people.print(
            f"other programs took {share:.0%} of the processor: measure again on a quiet machine",
            style="bold red",
        )
    print(json.dumps(report))
    return 0


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """The command line: what to measure, and whether without AMX."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings(Path(), Path())

    def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
        def parsed(text: str) -> tuple[str, ...]:
            unknown = [name for name in text.split(",") if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(
                    f"unknown {unknown[0]!r}; known are {', '.join(known)}"
                )
            return tuple(text.split(","))

        return parsed

    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/engine"),
        help="keeps the peers' models (%(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=default.rounds, help="turns of each contestant"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, tokens and traffic")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of everyone")
    parser.add_argument("--only", type=names(default.parts), default=default.parts, help="parts")
    parser.add_argument("--precision", type=names(PRECISIONS), default=PRECISIONS)
    parser.add_argument("--peers", type=names(default.peers), default=default.peers)
    parser.add_argument("--without-amx", action="store_true", help="refuse AMX to this process")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    settings = Settings(
        given.data,
        given.work,
        given.rounds,
        given.seed,
        given.threads,
        given.only,
        given.precision,
        given.peers,
    )
    return settings, given.without_amx


def run(
    settings: Settings,
    console: Console,
    open_model: Callable[[str, Path], Model] = open_model,
) -> dict[str, Any]:
    """Measure everything that `settings` asks for; what the JSON line holds."""
    models: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in models:
            models[name] = open_model(name, settings.work)
        return models[name]

    lengths = read_lengths(settings.data, model("minilm-l6").backbone.tokenizer)
    report = Report()
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description},"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        others = Others()
        before = gemm_ceilings()
        for work in WORKS:
            if work.name in settings.parts:
                measure(work, model(work.model), lengths, settings, report, progress)
        alone = measure_alone(model, lengths, settings, progress)
        # The machine may have been busy the first time.
        ceilings = {name: max(before[name], value) for name, value in gemm_ceilings().items()}
    add_shares(report.rows, ceilings)
    shares = {
        entry["precision"]: entry["share_of_ceiling"]
        for entry in report.rows
        if (entry["work"], entry["keep"]) == (SHARE_WORK, SHARE_KEEP)
        and entry["share_of_ceiling"] is not None
    }
    return {
        "ceiling_gflops": {name: round(value) for name, value in ceilings.items()},
        "rows": report.rows,
        "share_of_ceiling": shares,
        **alone,
        "left_out": report.left_out,
        "settings": {
            "rounds": settings.rounds,
            "seed": settings.seed,
            "threads": settings.threads,
            "data_sets": sorted(sentence_sets(lengths)),
        },
        "others_share_of_processor": round(others.share(), 3),
        "versions": {name: version(name) for name in sorted(engine_peers.installed())}
        | {"transformers": version("transformers")},
        "machine": machine.facts()
        | {
            "flags": engine_isa.flags(),
            "amx": "in use" if engine_isa.amx_granted() else "not in use",
        },
    }


if __name__ == "__main__":
    sys.exit(main())
