"""The report's sections that draw: curves, kept neurons and heads, shared neurons, confusion.

Each takes its part of a `Report` and gives the section as HTML, or nothing where there is nothing
to show. Knows which chart suits what; not how charts are drawn.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence

from localization.page.charts import RAMP, Cell, Key, Series, Tone, bars, grid, lines
from localization.page.findings import KeepCurves, Kept, Report, TaskOverlap, TrainingCurve
from localization.page.markup import (
    DASH,
    escape,
    figure,
    paragraph,
    percent,
    section,
    shorten,
    side_by_side,
    table,
)

CELLS = 96
"""Cells per layer in the map of kept neurons."""
READABLE_CLASSES = 12
"""More classes than this are drawn without names, more layers than this without figures."""
MOST_PAIRS = 15


def curves(by_keep: KeepCurves | None, trainings: Sequence[TrainingCurve]) -> str:
    """Accuracy by neurons kept, and while tuning."""
    found = [part for part in (_by_keep(by_keep), _trainings(trainings)) if part]
    return section("Accuracy along the way", side_by_side(*found)) if found else ""


def _by_keep(found: KeepCurves | None) -> str:
    if found is None or not any(curve.points for curve in found.curves):
        return ""
    series = [
        Series(curve.method, tuple((100 * keep, 100 * good) for keep, good in curve.points))
        for curve in found.curves
        if curve.points
    ]
    ends = "; ".join(
        f"{one.name} from {one.points[0][1]:.1f} % at {one.points[0][0]:g} % kept to "
        f"{one.points[-1][1]:.1f} % at {one.points[-1][0]:g} %"
        for one in series
    )
    reference = None if found.dense is None else ("dense", 100 * found.dense)
    chart = lines(
        f"{found.split} accuracy against the share of neurons kept: {ends}",
        series,
        "FFN neurons kept (%)",
        f"{found.split} accuracy (%)",
        reference,
    )
    note = "One line for each way of scoring neurons. Accuracy axes do not begin at zero."
    return figure("By neurons kept", note, chart)


def neurons(kept: Kept | None) -> str:
    title = "Feed-forward neurons kept"
    if kept is None or kept.share == 1:
        return section(title, paragraph("All feed-forward neurons are kept."))
    names = [f"layer {number}" for number in range(1, len(kept.layers) + 1)]
    shares = [
        (name, len(layer) / kept.width) for name, layer in zip(names, kept.layers, strict=True)
    ]
    said = ", ".join(f"{name} {percent(share)}" for name, share in shares)
    by_layer = figure(
        "By layer",
        f"Share of each layer's {kept.width} neurons; {percent(kept.share)} overall.",
        bars(
            f"Neurons kept: {said}",
            [(name, share, percent(share)) for name, share in shares],
            "share kept",
        ),
    )
    count = min(CELLS, kept.width)
    edges = [kept.width * number // count for number in range(count + 1)]
    per_cell = -(-kept.width // count)
    ticks = {round(count * part / 4): str(round(kept.width * part / 4)) for part in range(4)}
    within = figure(
        "Within each layer",
        f"A cell is up to {per_cell} neighbours; the fuller its colour, the more of them are kept.",
        grid(
            f"Where in each layer neurons are kept, in {count} cells a layer",
            names,
            [ticks.get(number, "") for number in range(count)],
            _neuron_cells(kept, edges),
            "neuron",
            "",
            [Key("share kept, 0 to 100 %", RAMP)],
            row_height=22,
        ),
    )
    return section(title, side_by_side(by_layer, within))


def _neuron_cells(kept: Kept, edges: Sequence[int]) -> Iterable[Cell]:
    for row, layer in enumerate(kept.layers):
        counts = Counter(bisect_right(edges, neuron) - 1 for neuron in layer)
        for column, count in sorted(counts.items()):
            start, end = edges[column], edges[column + 1]
            tip = f"layer {row + 1}, neurons {start} to {end - 1}: {count} of {end - start}"
            yield Cell(row, column, count / (end - start), tip)


def heads(kept: Kept | None) -> str:
    title = "Attention heads kept"
    if kept is None or kept.share == 1:
        return section(title, paragraph("All attention heads are kept."))
    cells = []
    names = [f"layer {number}" for number in range(1, len(kept.layers) + 1)]
    for row, layer in enumerate(kept.layers):
        for head in range(kept.width):
            state = "kept" if head in layer else "removed"
            tip = f"layer {row + 1}, head {head + 1}: {state}"
            cells.append(Cell(row, head, float(head in layer), tip))
    texts = [f"{len(layer)} of {kept.width}" for layer in kept.layers]
    said = ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=True))
    shares = [len(layer) / kept.width for layer in kept.layers]
    by_layer = figure(
        "By layer",
        f"{percent(kept.share)} of all heads.",
        bars(f"Heads kept: {said}", list(zip(names, shares, texts, strict=True)), "share kept"),
    )
    chart = grid(
        f"Which of {kept.width} heads are kept in each of {len(names)} layers",
        names,
        [str(number) for number in range(1, kept.width + 1)],
        cells,
        "head",
        "",
        [Key("kept", (1.0,)), Key("removed", (0.0,))],
        row_height=22,
    )
    return section(title, side_by_side(by_layer, figure("Head by head", "", chart)))


def overlaps(found: Sequence[TaskOverlap]) -> str:
    title = "Neurons shared with other tasks"
    if not found:
        return section(title, paragraph("There is no other task of this backbone to compare with."))
    rows = [
        [escape(one.task), _share(one.overlap.overall), _share(one.overlap.chance)] for one in found
    ]
    numbers = table(["other task", "shared", "by chance"], rows, numeric=(1, 2))
    layers = max(len(one.overlap.layers) for one in found)
    room = layers <= READABLE_CLASSES
    cells = [
        Cell(
            row,
            column,
            share,
            f"{one.task}, layer {column + 1}: {percent(share)}",
            f"{100 * share:.0f}" if room else "",
        )
        for row, one in enumerate(found)
        for column, share in enumerate(one.overlap.layers)
        if share is not None
    ]
    said = ", ".join(f"{one.task} {_share(one.overlap.overall)}" for one in found)
    chart = grid(
        f"Share of neurons in common with: {said}",
        [one.task for one in found],
        [str(number) for number in range(1, layers + 1)],
        cells,
        "layer",
        "",
        [Key("shared, 0 to 100 %", RAMP)],
        row_height=26,
    )
    note = "Jaccard index: neurons that both keep, of those that either keeps, in percent."
    by_chance = (
        "By chance is what sets of the same sizes would share if each layer's neurons were drawn "
        "at random."
    )
    left = numbers + paragraph(by_chance, "note")
    return section(title, side_by_side(left, figure("By layer", note, chart)))


def _share(share: float | None) -> str:
    return DASH if share is None else percent(share)


def _trainings(found: Sequence[TrainingCurve]) -> str:
    series = [
        Series(
            one.name,
            tuple((epoch, 100 * value) for epoch, value in enumerate(one.accuracies, 1)),
        )
        for one in found
        if one.accuracies
    ]
    if not series:
        return ""
    ends = "; ".join(
        f"{one.name} {max(y for _, y in one.points):.1f} % at best in {len(one.points)} epochs"
        for one in series
    )
    chart = lines(
        f"Validation accuracy by epoch: {ends}",
        series,
        "epoch",
        "validation accuracy (%)",
        whole=True,
    )
    note = "Validation accuracy after each epoch of each tuning run."
    return figure("While tuning", note, chart)


def confusion(report: Report) -> str:
    counts, labels = report.confusion, report.labels
    if not counts:
        return ""
    few = len(labels) <= READABLE_CLASSES
    every = 1 if few else 10
    ticks = [
        (label if few else str(number)) if few or number % every == 0 else ""
        for number, label in enumerate(labels, 1)
    ]
    keys = [Key("right", RAMP[1:]), Key("wrong", RAMP[1:], "wrong")]
    chart = grid(
        f"Confusion matrix of {len(labels)} classes: {_right(counts)}",
        ticks,
        ticks,
        _confusion_cells(counts, labels, few),
        "predicted class" if few else "predicted class (number)",
        "true class" if few else "true class (number)",
        keys,
    )
    note = "A row is a true class; the fuller a cell's colour, the larger its share of that row."
    map_ = figure("True class by predicted class", note, chart)
    pairs = _confused_pairs(counts, labels)
    title = f"Which classes it confuses ({report.measured_on} rows)"
    if few:
        return section(title, side_by_side(map_, pairs))
    names = "".join(f"<li>{escape(label)}</li>" for label in labels)
    listed = f"<h3>Numbers of the classes</h3><ol>{names}</ol>"
    return section(title, side_by_side(map_, pairs), listed)


def _right(counts: Sequence[Sequence[int]]) -> str:
    right = sum(row[number] for number, row in enumerate(counts))
    return f"{right} of {sum(map(sum, counts))} rows on the diagonal"


def _confusion_cells(
    counts: Sequence[Sequence[int]], labels: Sequence[str], few: bool
) -> Iterable[Cell]:
    for true, row in enumerate(counts):
        for guess, count in enumerate(row):
            if count:
                tip = f"{labels[true]}, answered {labels[guess]}: {count} of {sum(row)}"
                tone: Tone = "right" if true == guess else "wrong"
                # Small cells need stronger colours to be seen.
                depth = count / sum(row) if few else math.sqrt(count / sum(row))
                yield Cell(true, guess, depth, tip, str(count) if few else "", tone)


def _confused_pairs(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    pairs = sorted(
        (-count, true, guess)
        for true, row in enumerate(counts)
        for guess, count in enumerate(row)
        if count and true != guess
    )
    if not pairs:
        return paragraph("It confuses no classes on these rows.")
    many = len(labels) > READABLE_CLASSES

    def name(number: int) -> str:
        shown = escape(shorten(labels[number], 40)).replace("_", "_<wbr>")
        number_shown = f"<small>{number + 1}</small> " if many else ""
        return f'<span class="name">{number_shown}{shown}</span>'

    rows = [
        [name(true), name(guess), str(-count), percent(-count / sum(counts[true]))]
        for count, true, guess in pairs[:MOST_PAIRS]
    ]
    shown = table(["true", "predicted", "rows", "of the class"], rows, numeric=(2, 3))
    if len(pairs) > MOST_PAIRS:
        note = f"The {MOST_PAIRS} most frequent of {len(pairs)} confused pairs."
        shown += paragraph(note, "note")
    return shown
