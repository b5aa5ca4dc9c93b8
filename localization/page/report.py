"""One HTML page on a localization: what was found, how good it is, and how it was found.

`render` writes the page from a `Report` (see `findings.py`), section by section. Knows nothing of
tensors or files. The page needs nothing beside itself.
"""

from collections.abc import Iterable, Sequence

from localization.page import sections
from localization.page.charts import Range, intervals
from localization.page.findings import (
    KeepCurve,
    KeepCurves,
    Kept,
    Mistake,
    NetworkResult,
    Report,
    Splits,
    TaskOverlap,
    TrainingCurve,
    TrialResult,
)
from localization.page.markup import (
    DASH,
    escape,
    facts,
    figure,
    page,
    paragraph,
    percent,
    section,
    shorten,
    side_by_side,
    table,
)
from localization.statistics import mcnemar, wilson

__all__ = [
    "KeepCurve",
    "KeepCurves",
    "Kept",
    "Mistake",
    "NetworkResult",
    "Report",
    "Splits",
    "TaskOverlap",
    "TrainingCurve",
    "TrialResult",
    "render",
    "verdict",
]

MOST_MISTAKES = 20
LONGEST_TEXT = 300
SIGNIFICANT = 0.05
"""Below this p value a difference is called more than chance."""


def render(report: Report) -> str:
    """The page, as one HTML document in which nothing is loaded from elsewhere."""
    body = [
        f"<header><h1>{escape(report.task)}</h1>"
        f"{paragraph(report.description, 'lead') if report.description else ''}</header>",
        _headline(report),
        sections.curves(report.keep_curves, report.trainings),
        sections.neurons(report.neurons),
        sections.heads(report.heads),
        sections.overlaps(report.overlaps),
        _trials(report.trials),
        sections.confusion(report),
        _mistakes(report),
        _facts(report),
    ]
    return page(f"{report.task}: localization report", "\n".join(part for part in body if part))


def verdict(name: str, network: NetworkResult, dense: NetworkResult, split: str) -> str:
    """One sentence on a network's accuracy beside the dense one's, and whether it is chance."""
    # One division of whole numbers, so that the size is what a reader gets by subtracting.
    more = network.hits * dense.rows - dense.hits * network.rows
    points = 100 * more / (network.rows * dense.rows)
    if not more:
        return f"The {name} network is as accurate as the dense one on {network.rows} {split} rows."
    size = f"{abs(points):.1f}" if abs(points) >= 0.05 else "less than 0.1"
    side = "above" if points > 0 else "below"
    said = f"The {name} network is {size} points {side} the dense one"
    if network.against_dense is None:
        return f"{said} on {network.rows} {split} rows."
    chance = mcnemar(network.against_dense)
    if chance < SIGNIFICANT:
        return f"{said}; with {network.rows} {split} rows this is hardly chance ({_p(chance)})."
    return f"{said}; with {network.rows} {split} rows this may be chance ({_p(chance)})."


def _p(value: float) -> str:
    return (
        "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
    )


def _headline(report: Report) -> str:
    split = report.measured_on
    sentences = [
        verdict(name, network, report.dense, split) for name, network in report.networks[1:]
    ]
    said = [paragraph(sentence, "verdict") for sentence in sentences]
    if not said:
        said.append(paragraph("Only the dense network was measured.", "verdict"))
    if split == "validation":
        note = (
            "There are no test rows: these are the validation rows, which also chose the network, "
            "so the figures flatter it."
        )
        said.append(paragraph(note, "note"))
    ranges = []
    for name, network in report.networks:
        ends = wilson(network.hits, network.rows)
        ranges.append(Range(name, 100 * ends.low, 100 * network.accuracy, 100 * ends.high))
    label = "; ".join(
        f"{one.name} {one.middle:.1f} %, {one.low:.1f} to {one.high:.1f} %" for one in ranges
    )
    chart = figure(
        f"Accuracy on {report.dense.rows} {split} rows",
        "Whiskers are 95 % confidence intervals; the dashed line is the dense network. All answer "
        "the same rows, so differences are surer than the whiskers let them seem: see McNemar.",
        intervals(f"Accuracy with its 95 % interval: {label}", ranges, "accuracy (%)"),
    )
    return section("Result", *said, side_by_side(_figures_table(report), chart))


def _figures_table(report: Report) -> str:
    networks = report.networks
    rows: list[list[str]] = []

    def add(name: str, values: Iterable[str | None]) -> None:
        cells = [value or DASH for value in values]
        if any(cell != DASH for cell in cells):
            rows.append([escape(name), *cells])

    results = [network for _, network in networks]
    add("accuracy", (_accuracy(one) for one in results))
    add("several seeds", (_spread(one) for one in results))
    add("macro F1", (f"{one.macro_f1:.3f}" for one in results))
    add("Matthews correlation", (f"{one.matthews:.3f}" for one in results))
    add("right, dense wrong", (_discordant(one, 1) for one in results))
    add("wrong, dense right", (_discordant(one, 0) for one in results))
    add("McNemar, against dense", (_chance(one) for one in results))
    add("FFN neurons kept", (percent(one.neurons_kept) for one in results))
    add("attention heads kept", (percent(one.heads_kept) for one in results))
    add("artifact", (_size(one.artifact_bytes) for one in results))
    add("speed", (f"{one.speed_up:.2f}x" if one.speed_up else None for one in results))
    head = ["", *(name for name, _ in networks)]
    return table(head, rows, numeric=range(1, len(head)))


def _accuracy(network: NetworkResult) -> str:
    ends = wilson(network.hits, network.rows)
    interval = f"{100 * ends.low:.1f} to {100 * ends.high:.1f}"
    return f"<b>{percent(network.accuracy)}</b><br><small>{interval}</small>"


def _spread(network: NetworkResult) -> str | None:
    if network.repeated is None:
        return None
    runs = f"<br><small>{network.repeated.runs} runs</small>"
    if network.repeated.deviation is None:
        return percent(network.repeated.mean) + runs
    return f"{100 * network.repeated.mean:.1f} &plusmn; {percent(network.repeated.deviation)}{runs}"


def _discordant(network: NetworkResult, which: int) -> str | None:
    counts = network.against_dense
    return None if counts is None else str((counts.first_only, counts.second_only)[which])


def _chance(network: NetworkResult) -> str | None:
    counts = network.against_dense
    return None if counts is None else escape(_p(mcnemar(counts)))


def _size(count: int | None) -> str | None:
    return None if count is None else f"{count / 1000:.1f} KB"


def _trials(trials: Sequence[TrialResult]) -> str:
    title = "The search"
    if not trials:
        return section(title, paragraph("No search was made."))
    rows = [
        [
            escape(trial.asked),
            percent(trial.neurons_kept),
            percent(trial.heads_kept),
            percent(trial.validation_accuracy),
            "accepted" if trial.accepted else "rejected",
            f"{trial.cost:.2f}",
        ]
        for trial in trials
    ]
    head = ["tried", "neurons", "heads", "validation accuracy", "result", "cost"]
    note = "In the order tried. Cost is in trainings: 1 is what tuning the dense network took."
    return section(title, table(head, rows, numeric=(1, 2, 3, 5)), paragraph(note, "note"))


def _mistakes(report: Report) -> str:
    if not report.mistakes:
        return ""
    rows = [
        [
            "".join(
                f'<bdi class="text">{escape(shorten(text, LONGEST_TEXT))}</bdi>'
                for text in mistake.texts
            ),
            escape(shorten(mistake.label, 40)),
            escape(shorten(mistake.predicted, 40)),
            percent(mistake.probability),
        ]
        for mistake in report.mistakes[:MOST_MISTAKES]
    ]
    shown = table(["row", "true", "predicted", "probability"], rows, numeric=(3,))
    return section(f"Rows that it gets wrong ({report.measured_on} rows)", shown)


def _facts(report: Report) -> str:
    splits = report.splits
    few = len(report.labels) <= sections.READABLE_CLASSES
    spent = None if report.spent is None else f"{report.spent:.1f} trainings"
    pairs = [
        ("backbone", report.backbone),
        ("classes", ", ".join(report.labels) if few else str(len(report.labels))),
        ("rows", f"{splits.train} train, {splits.validation} validation, {splits.test} test"),
        ("asked for", report.budget),
        ("spent (1 = tuning the dense network)", spent or ""),
        ("when", report.created),
        ("command", report.command),
        ("hardware", report.hardware),
        ("versions", ", ".join(f"{name} {number}" for name, number in report.versions)),
    ]
    return section("How it was made", facts(pairs))
