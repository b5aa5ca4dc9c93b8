"""Measures what scaling depends on, checks the simulation against this machine, and projects.

    python -m benchmarks.scaling                     # all, some ten minutes on two quiet cores
    python -m benchmarks.scaling --quick             # short runs, to see that it works
    python -m benchmarks.scaling --only page         # write docs/scaling.md's figures again

    engine     what a batch costs: tokens, sequences, tasks, warm and cold
    server     what a request costs around it; throughput and latency at several loads
    limits     10,000 tasks in the registry, the store, a replica's memory; the board; /metrics
    validation each load of those servers, as the simulation foretells it
    projection from these: tasks, skew, memory, replicas, nodes; GPUs by assumption
    page       the figures in docs/scaling.md and its plots

Writes docs/results/scaling.json after each part, and takes up the parts that are there.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, scaling_gpu, scaling_limits
from benchmarks.engine_models import zipf_tasks
from benchmarks.scaling_engine import backend_of, drawn, measure, ready_made
from benchmarks.scaling_page import write_page
from benchmarks.scaling_projection import projection
from benchmarks.scaling_server import Setting, serving, start_s
from benchmarks.scaling_server import measure as measure_server
from benchmarks.scaling_validation import around_of, validation
from benchmarks.server_works import sentences
from model_store.manifest import read_header
from model_store.store import Store
from serving.calibration import efficient_tokens
from serving.config import MIB
from serving.load import Question
from serving.questions import as_input, questions
from serving.tasks import LoadedVersion

PARTS = ("engine", "server", "limits", "validation", "projection", "page")
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "scaling.json"
MANY = 1000
"""Tasks of the server whose plans do not all fit in."""
PLANS_MIB = 256
CORES = 2


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short runs: for a look, no result")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"no part {sorted(unknown)}; there are {', '.join(PARTS)}")
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in (part for part in PARTS if part in arguments.only):
            with console.status(f"{part} ..."):
                if part == "page":
                    write_page(report)
                    continue
                report[part] = _MAKERS[part](report, Path(folder), arguments.quick)
            report["machine"] = machine.facts() | {"quick": arguments.quick}
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
            console.print(f"{part}: done")
    print(json.dumps({part: part in report for part in PARTS[:-1]}))
    return 0


def engine(report: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """What a batch costs, with two threads and with one, of both kinds of tasks."""
    rounds = 2 if quick else 7
    own, drawn_tasks = ready_made(folder), drawn(folder)
    backend = backend_of(own, CORES)
    found: dict[str, Any] = {"batch_tokens": efficient_tokens(backend, own.backbone)}
    found["ready-made"] = measure(own, backend, rounds).record()
    found["drawn"] = measure(drawn_tasks, backend, rounds).record()
    found["ready-made, one thread"] = measure(own, backend_of(own, 1), rounds).record()
    return found


def server(report: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """Three servers: one replica, two, and one with more tasks than plans fit in."""
    seconds = 2.0 if quick else 10.0
    tokens = report["engine"]["batch_tokens"]
    own = ready_made(folder)
    store = Store(folder / "ready-made")
    names = store.task_names()
    pairs = {name: read_header(store.read(name)[1])[0].takes_pairs for name in names}
    asked = questions(sentences(None), pairs, 1)
    found: dict[str, Any] = {}
    for name, replicas, threads in (("one replica", 1, CORES), ("two replicas", 2, 1)):
        kind = "ready-made" if threads == CORES else "ready-made, one thread"
        setup = _setup(kind, replicas, threads, len(names), 0.0, own.versions)
        with serving(store, Setting(name, replicas, threads, tokens)) as running:
            found[name] = measure_server(running, asked, seconds) | {"setup": setup}
    around = around_of(found["one replica"])
    place = folder / "many"
    place.mkdir()
    store = scaling_limits.many_tasks(place, MANY)
    setup = _setup("drawn", 1, CORES, MANY, 1.0, drawn(folder, 1).versions, PLANS_MIB * MIB)
    options = ("--plan-cache-bytes", str(PLANS_MIB * MIB))
    with serving(store, Setting("many tasks", 1, CORES, tokens, options)) as running:
        measured = measure_server(running, _zipf_questions(), seconds, around)
        found["many tasks"] = measured | {"setup": setup}
    return found


def _setup(
    kind: str,
    replicas: int,
    threads: int,
    tasks: int,
    skew: float,
    versions: Sequence[LoadedVersion],
    plan_bytes: int = 0,
) -> dict[str, Any]:
    """What a simulation of a server needs beside its costs; 0 plan bytes: all tasks are warm."""
    return {
        "kind": kind,
        "cores": CORES,
        "replicas": replicas,
        "threads": threads,
        "tasks": tasks,
        "skew": skew,
        "plan_bytes": plan_bytes,
        "lengths": _lengths(versions),
    }


def _zipf_questions() -> list[Question]:
    texts = sentences(None)
    return [
        Question(
            f"/v1/tasks/task-{task}/predict",
            json.dumps({"inputs": [texts[number % len(texts)]]}),
        )
        for number, task in enumerate(zipf_tasks(MANY, 20_000, seed=1))
    ]


def _lengths(versions: Sequence[LoadedVersion]) -> list[int]:
    """Tokens of the sentences that are asked, prompt included, over all tasks."""
    found = []
    for number, text in enumerate(sentences(None)):
        version = versions[number % len(versions)]
        (one,) = version.texts.encode([as_input(text, version.info.takes_pairs)])
        found.append(len(one.token_ids) + version.info.prompt_tokens)
    return found


def limits(report: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """What grows with tasks and replicas."""
    found: dict[str, Any] = {
        "registry": [scaling_limits.registry(count) for count in (100, 1_000, 10_000)],
        "store": [],
        "loaded": [],
        "start": [],
        "metrics": [scaling_limits.metrics_page(count) for count in (10, 200, 10_000)],
    }
    for count in (100, 1_000) if quick else (100, 1_000, 10_000):
        place = folder / f"limits-{count}"
        place.mkdir()
        store = scaling_limits.many_tasks(place, count)
        found["store"].append(scaling_limits.store_times(store))
        found["loaded"].append(scaling_limits.loaded(store, count))
        taken = start_s(store, report["engine"]["batch_tokens"])
        found["start"].append({"tasks": count, "seconds": round(taken, 1)})
    with scaling_limits.ray_board() as (call, process):
        found["board"] = [
            scaling_limits.board_round(call, process, replicas)
            for replicas in (scaling_limits.REPLICAS[:3] if quick else scaling_limits.REPLICAS)
        ]
    return found


def project(report: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """Up to 10,000 tasks and 100 GPUs."""
    around = around_of(report["server"]["one replica"])
    return projection(report, quick) | {
        "gpu": scaling_gpu.scenarios(around, 10_000, 1.0, 100),
        "gpu_assumptions": scaling_gpu.assumptions(),
    }


def validate(report: dict[str, Any], folder: Path, quick: bool) -> dict[str, Any]:
    """What the simulation foretells of the measured servers."""
    return validation(report, quick)


_MAKERS = {
    "engine": engine,
    "server": server,
    "limits": limits,
    "validation": validate,
    "projection": project,
}


if __name__ == "__main__":
    sys.exit(main())
