"""What a number format costs on real test sets: labels that stay, accuracy, largest differences.

The ready-made overlays, or those of a folder, answer every test row of their data sets in fp32 and
in each format that this processor serves; the same rows, the same native forward.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import machine
from benchmarks.quality_measured import test_rows, texts_of
from examples.ready_made import add_backbone
from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.backend import answer_all
from model_store.native import NativeBackend, builds
from model_store.native_weights import Precision
from model_store.store import Store
from model_store.tokenization import Encoding

OVERLAYS = Path(__file__).parents[1] / "examples" / "overlays"
FORMATS: tuple[Precision, ...] = ("bf16", "int8")

Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description="Compare the labels that bf16 and int8 give with those of fp32, on real rows.",
        epilog="example: python -m benchmarks.precision --data datasets --out docs/results",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--overlays", type=Path, default=OVERLAYS, help="folder of *.safetensors")
    parser.add_argument("--out", type=Path, help="folder for precision.md and precision.json")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        backbone = add_backbone(Store(Path(folder)))
        rows = [
            measure(backbone, file.stem, file.read_bytes(), given.data)
            for file in track(sorted(given.overlays.glob("*.safetensors")), console=console)
        ]
    result = {"machine": machine.facts(), "rows": rows, "total": total(rows)}
    Console().print(table(result))
    if given.out:
        (given.out / "precision.json").write_text(json.dumps(result, indent=1) + "\n")
        (given.out / "precision.md").write_text(markdown(result))
    print(json.dumps(result))


def measure(backbone: Backbone, name: str, content: bytes, data: Path) -> Figures:
    """One overlay over its set's test rows: accuracy by format, and per cent of equal labels."""
    overlay = artifact.read(content, backbone.config, backbone.fingerprint)
    rows = test_rows(data, name)
    encodings = texts_of(backbone, overlay).encode(rows.inputs)
    expected = np.array([overlay.manifest.labels.index(label) for label in rows.labels])
    figures: Figures = {"set": name, "rows": len(encodings)}
    exact = answers(backbone, overlay, encodings, "fp32")
    figures["fp32"] = _accuracy(exact, expected)
    for precision in FORMATS:
        given = answers(backbone, overlay, encodings, precision)
        figures[precision] = _accuracy(given, expected)
        equal = given.argmax(1) == exact.argmax(1)
        figures[f"{precision}_equal"] = round(100 * float(equal.mean()), 3)
        figures[f"{precision}_different"] = int((~equal).sum())
        figures[f"{precision}_largest"] = round(float(np.abs(given - exact).max()), 4)
    return figures


def answers(
    backbone: Backbone, overlay: Overlay, encodings: Sequence[Encoding], precision: Precision
) -> NDArray[Any]:
    """Probabilities `[rows, C]`."""
    backend = NativeBackend(backbone.config, backbone.tensors, precision, 2, builds()[0])
    answers: NDArray[Any] = answer_all(backend, overlay, encodings).numpy()
    return answers


def _accuracy(given: NDArray[Any], expected: NDArray[Any]) -> float:
    return round(100 * float((given.argmax(1) == expected).mean()), 2)


def total(rows: Sequence[Figures]) -> Figures:
    """Over all rows of all sets: equal labels; over the sets: mean change of accuracy in points."""
    count = sum(row["rows"] for row in rows)
    figures: Figures = {"rows": count}
    for precision in FORMATS:
        different = sum(row[f"{precision}_different"] for row in rows)
        figures[f"{precision}_equal"] = round(100 * (1 - different / count), 3)
        change = sum(row[precision] - row["fp32"] for row in rows) / len(rows)
        figures[f"{precision}_change"] = round(change, 3)
    return figures


def _cells(result: Figures) -> tuple[list[str], list[list[str]]]:
    heads = ["set", "rows", "fp32 %"]
    for precision in FORMATS:
        heads += [f"{precision} %", "equal %", "largest"]
    lines = [
        [row["set"], f"{row['rows']:,}", f"{row['fp32']:.2f}"]
        + [
            cell
            for precision in FORMATS
            for cell in (
                f"{row[precision]:.2f}",
                f"{row[f'{precision}_equal']:.2f}",
                f"{row[f'{precision}_largest']:.4f}",
            )
        ]
        for row in result["rows"]
    ]
    all_rows = result["total"]
    last = ["all", f"{all_rows['rows']:,}", ""]
    for precision in FORMATS:
        equal = f"{all_rows[f'{precision}_equal']:.3f}"
        last += [f"{all_rows[f'{precision}_change']:+.2f}", equal, ""]
    return heads, [*lines, last]


def table(result: Figures) -> Table:
    """For the terminal."""
    heads, lines = _cells(result)
    shown = Table(title="Labels and accuracy by number format (last line: all rows, mean change)")
    for number, head in enumerate(heads):
        shown.add_column(head, justify="right" if number else "left")
    for line in lines:
        shown.add_row(*line)
    return shown


def markdown(result: Figures) -> str:
    """For `docs/results`."""
    heads, lines = _cells(result)
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    marks = "|".join(["---", *["---:"] * (len(heads) - 1)])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# What a number format costs on real rows\n\n"
        "Every test row of every set through its ready-made overlay, natively in fp32, bf16 and "
        "int8. *equal* counts rows that get the label that fp32 gives; *largest* is the largest "
        "difference of a probability. The last line is over all rows, with the mean change of "
        "accuracy in points.\n\n"
        f"| {' | '.join(heads)} |\n|{marks}|\n{body}\n\n"
        "Command: `python -m benchmarks.precision --data DIR --out docs/results`.\n\n"
        f"Measured on: {facts}.\n"
    )


if __name__ == "__main__":
    main()
