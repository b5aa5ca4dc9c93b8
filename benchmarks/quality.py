"""Measures the ready-made overlays again on their test rows.

    python -m benchmarks.quality --data DIR [--tasks sst2,trec6]

DIR holds one folder per data set with `train.jsonl` and `test.jsonl`. `localized` is measured now,
in fp32, from the committed artifacts; `dense` is the same backbone's prompt tuning with every
neuron, as measured when the artifact was made and recorded in its manifest. The last line of
output is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from examples.ready_made import OVERLAYS, add_backbone
from localization.commands import evaluate_file
from model_store import artifact
from model_store.manifest import Manifest
from model_store.store import Store

MAX_LOSS = 1.5
"""Points of accuracy below dense that a ready-made overlay may have."""


def main() -> int:
    """The command; exit status 1 if an overlay has lost more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--tasks", help="names, separated by commas [all ready-made tasks]")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    files = {file.stem: file for file in sorted(OVERLAYS.glob("*.safetensors"))}
    names = arguments.tasks.split(",") if arguments.tasks else list(files)
    unknown = sorted(set(names) - set(files))
    if unknown:
        parser.error(f"no ready-made task {unknown[0]!r}; there are {', '.join(files)}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        backbone = add_backbone(store)
        for name in track(names, "Measuring", console=console):
            rows = arguments.data / name / "test.jsonl"
            if not rows.is_file():
                raise SystemExit(f"{rows} is missing; --data must hold one folder per data set")
            data = files[name].read_bytes()
            verified = artifact.verify(data, backbone.config, backbone.fingerprint)
            store.publish(verified)
            _, _, figures = evaluate_file(
                rows, store=store, task=name, version=None, text=(), label=None, device="cpu"
            )
            results[name] = {
                "dense": round(100 * dense_accuracy(verified.manifest), 2),
                "localized": round(100 * figures.accuracy, 2),
                "ffn_kept": round(verified.manifest.kept_share, 4),
                "rows": figures.rows,
                "macro_f1": round(100 * figures.macro_f1, 2),
                "kilobytes": round(len(data) / 1000, 1),
            }
    show(results)
    print(json.dumps({"tasks": results, "machine": machine.facts()}))
    losses = [row["dense"] - row["localized"] for row in results.values()]
    return int(max(losses) > MAX_LOSS)


def dense_accuracy(manifest: Manifest) -> float:
    """Test accuracy of dense prompt tuning as the manifest records it."""
    for item in manifest.metrics:
        if (item.network, item.split, item.metric) == ("dense", "test", "accuracy"):
            return item.value
    raise SystemExit(f"the manifest of task {manifest.task!r} has no dense test accuracy")


def show(results: dict[str, dict[str, float]]) -> None:
    """The table for people."""
    table = Table(title="Test accuracy of the ready-made overlays")
    table.add_column("task")
    heads = ("rows", "dense %", "localized %", "difference", "macro F1 %", "FFN kept %", "KB")
    for head in heads:
        table.add_column(head, justify="right")
    for name, row in results.items():
        table.add_row(
            name,
            str(row["rows"]),
            f"{row['dense']:.1f}",
            f"{row['localized']:.1f}",
            f"{row['localized'] - row['dense']:+.1f}",
            f"{row['macro_f1']:.1f}",
            f"{100 * row['ffn_kept']:.0f}",
            f"{row['kilobytes']:.0f}",
        )
    count = len(results)
    table.add_section()
    mean = {
        key: sum(row[key] for row in results.values()) / count
        for key in next(iter(results.values()))
    }
    table.add_row(
        "mean",
        "",
        f"{mean['dense']:.1f}",
        f"{mean['localized']:.1f}",
        f"{mean['localized'] - mean['dense']:+.1f}",
        f"{mean['macro_f1']:.1f}",
        f"{100 * mean['ffn_kept']:.0f}",
        f"{mean['kilobytes']:.0f}",
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    sys.exit(main())
