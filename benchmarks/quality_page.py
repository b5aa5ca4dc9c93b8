"""The quality benchmark's results as people read them: tables, Markdown, the README's table.

Everything is made from `Results`, that is from `quality.json`; what is missing is a dash. Knows
nothing of how results came about, nor how plots are drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.quality_results import MOST_BELOW, NETWORKS, OTHER_METRICS, TARGETS, Results
from benchmarks.recipes import CAP, MAX_TOKENS, RECIPES, SEARCHED, SEEDS, SETS

DASH = "-"
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"

NAMES = {
    "dense": "prompt tuning",
    "localized": "localized",
    "fine_tuned": "fine-tuning",
    "recovered": "recovered",
    "fast": "fast",
    "training_free": "training-free",
}
"""What people read, by measure."""


@dataclass(frozen=True)
class Sheet:
    """A table: the first column is text, the others are figures; `foot` is the mean."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    foot: tuple[str, ...] = ()

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left", caption_justify="left")
        for number, name in enumerate(self.head):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        if self.foot:
            table.add_section()
            table.add_row(*self.foot)
        return table

    def markdown(self) -> str:
        """A Markdown table, without title and note."""
        foot = tuple(f"**{cell}**" if cell not in ("", DASH) else cell for cell in self.foot)
        ruler = "|---|" + "---:|" * (len(self.head) - 1)
        lines = [_line(self.head), ruler, *map(_line, self.rows)]
        return "\n".join([*lines, _line(foot)] if foot else lines)


@dataclass(frozen=True)
class _Column:
    """One measure down a table. `signed`: with its sign, as a difference."""

    head: str
    measure: str
    places: int = 1
    signed: bool = False
    spread: bool = False

    def cell(self, row: Mapping[str, float | None], deviations: Mapping[str, float]) -> str:
        text = number(row.get(self.measure), self.places, self.signed)
        if self.spread and self.measure in deviations:
            text += f" \u00b1 {deviations[self.measure]:.{self.places}f}"
        return text


def number(value: float | None, places: int = 1, signed: bool = False) -> str:
    """A figure as text; a dash where there is none."""
    if value is None:
        return DASH
    text = f"{value:{'+' if signed else ''}.{places}f}"
    # A difference that rounds to nothing has no sign.
    return text.lstrip("+-") if not float(text) else text


def sheets(results: Results) -> list[Sheet]:
    """All tables, in reading order."""
    return [_targets(results), *(_by_set(results, *of) for of in _SHEETS), _other_metrics(results)]


_ACCURACY = (
    _Column("rows", "rows", 0),
    _Column("fine-tuning", "fine_tuned", spread=True),
    _Column("recovered", "recovered", spread=True),
    _Column("diff.", "recovered_minus_fine_tuned", signed=True),
    _Column("fast", "fast", spread=True),
    _Column("diff.", "fast_minus_fine_tuned", signed=True),
    _Column("prompt tuning", "dense", spread=True),
    _Column("localized", "localized", spread=True),
    _Column("diff.", "localized_minus_dense", signed=True),
)
_SIZE = (
    *(
        _Column(f"{NAMES[part]}: {head}", f"{part}_{measure}", places)
        for part in ("recovered", "fast", "localized")
        for head, measure, places in (
            ("FFN -%", "ffn_removed", 0),
            ("heads -%", "heads_removed", 0),
            ("KB", "kilobytes", 0),
        )
        if head != "heads -%" or part == "fast"
    ),
)
_SEARCH = (
    _Column("attribution", "attribution"),
    _Column("chance", "random"),
    _Column("diff.", "attribution_minus_random", signed=True),
    _Column("prompt tuning", "search_dense"),
    _Column("found", "search_result"),
    _Column("FFN -%", "search_ffn_removed", 0),
    _Column("networks tried", "search_trials", 0),
    _Column("time", "search_time", 2),
)
_SPEED = (
    *(
        _Column(f"{NAMES[part]}: {head}", f"{part}_{measure}", 2)
        for part in ("recovered", "fast", "localized")
        for head, measure in (("x whole", "speedup"), ("x prompt", "speedup_over_prompt"))
    ),
    _Column("server agrees %", "server_labels_equal", 2),
)
_UNTRAINED = (
    _Column("head on all", "training_free_dense"),
    _Column("training-free", "training_free"),
    _Column("loss", "training_free_loss"),
    _Column("FFN -%", "training_free_ffn_removed", 0),
    _Column("heads -%", "training_free_heads_removed", 0),
    _Column("KB", "training_free_kilobytes", 0),
    _Column("x whole", "training_free_speedup", 2),
)
_SHEETS: tuple[tuple[str, str, tuple[_Column, ...]], ...] = (
    (
        "Accuracy on the test rows, %",
        "*Fine-tuning* trains the whole backbone, one copy a task; *recovered* and *fast* are "
        "small overlays on the frozen backbone, compared with it. *Prompt tuning* trains a prompt "
        "and a head on the frozen backbone with every neuron; *localized* is the same with most "
        "neurons removed. ± is the sample standard deviation over seeds.",
        _ACCURACY,
    ),
    (
        "What is removed, and what is stored",
        "*FFN -%*: share of the feed-forward neurons removed; *heads -%*: of the attention heads; "
        "*KB*: size of the artifact.",
        _SIZE,
    ),
    (
        "Times as fast",
        "Forward of 32 of the set's test rows on the operations that serve, medians in turns: "
        "against the whole network without a prompt (*x whole*) and with a prompt of 10 tokens, as "
        "prompt tuning has it (*x prompt*). *Server agrees*: labels of the server, asked in mixed "
        "requests of 1 to 16 inputs, that equal those of `taskbone evaluate`; the lowest of all "
        "overlays.",
        _SPEED,
    ),
    (
        "Without training",
        "*Head on all*: a linear head by least squares on the whole network; *training-free*: "
        "units removed and the rest fitted again, no training at all. Neither has a prompt, so the "
        "speed that was asked for is against the whole network without one.",
        _UNTRAINED,
    ),
    (
        "Scores and search",
        "*Attribution* and *chance*: prompt tuning with 35 % of the neurons kept, by score or at "
        "random (mean of three draws), nothing tuned afterwards. *Found*: the smallest network "
        "within one point of prompt tuning on the validation rows; *time*: of all trainings of "
        f"that search, in trainings of the whole network; done on {', '.join(SEARCHED)}.",
        _SEARCH,
    ),
)


def _by_set(results: Results, title: str, note: str, columns: tuple[_Column, ...]) -> Sheet:
    rows = tuple(
        (name, *(column.cell(row, results["deviations"].get(name, {})) for column in columns))
        for name, row in results["tasks"].items()
    )
    foot = ("mean", *(column.cell(results["means"], {}) for column in columns))
    return Sheet(title, note, ("set", *(column.head for column in columns)), rows, foot)


def _targets(results: Results) -> Sheet:
    rows = []
    for target in TARGETS:
        value, reached, met = results["targets"][target.measure]
        lacking = results["incomplete"][target.measure]
        below = results["below"].get(target.measure)
        worse = DASH
        if below is not None:
            worse = ", ".join(f"{name} {below[name]:+.1f}" for name in below) or "none"
        verdict = "yes" if met else "no"
        if lacking:
            verdict = f"open: {len(lacking)} of {len(results['tasks'])} sets missing"
        sign = ">=" if target.at_least else "<="
        rows.append((target.text, f"{sign} {value:g}", number(reached, 2), verdict, worse))
    note = (
        "Means over the sets. *Sets far off*: single sets more than "
        f"{MOST_BELOW:g} points on the wrong side of the target."
    )
    head = ("mean over the sets", "target", "reached", "met", "sets far off")
    return Sheet("Targets", note, head, tuple(rows))


def _other_metrics(results: Results) -> Sheet:
    rows = []
    for name, metric in OTHER_METRICS.items():
        if name not in results["tasks"]:
            continue
        row, deviations = results["tasks"][name], results["deviations"].get(name, {})
        columns = [_Column("", f"{network}_{metric}", spread=True) for network in NETWORKS]
        label = {"macro_f1": "macro F1", "matthews": "Matthews correlation"}[metric]
        rows.append((name, label, *(column.cell(row, deviations) for column in columns)))
    head = ("set", "metric", *(NAMES[network] for network in NETWORKS))
    note = "Sets that are usually judged by another metric than accuracy; all times 100."
    return Sheet("Other metrics", note, head, tuple(rows))


def markdown(results: Results, plots: Iterable[tuple[str, str]]) -> str:
    """`quality.md`; `plots` are file names with what they show."""
    machine = results["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in machine if name != "commit")
    parts = [
        "# Quality",
        "Made by the command below; do not edit. `quality.json` has the same figures.",
        f"    {results['command']}",
        f"{results['date']}, commit {machine.get('commit', 'unknown')}. Machine: {facts}.",
        _recipes(),
    ]
    first, *others = sheets(results)
    parts += [f"## {first.title}", first.note, first.markdown()]
    parts += [f"![{text}]({file})" for file, text in plots]
    for sheet in others:
        parts += [f"## {sheet.title}", sheet.note, sheet.markdown()]
    return "\n\n".join(parts) + "\n"


def _recipes() -> str:
    caps = [f"{name} {of_set['cap']:,}" for name, of_set in SETS.items() if "cap" in of_set]
    fewer = f" ({', '.join(caps)})" if caps else ""
    seeds = ", ".join(f"{name} {count}" for name, count in SEEDS.items())
    epochs = {
        name: recipe["tuning"]["epochs"] for name, recipe in RECIPES.items() if "tuning" in recipe
    }
    trained = ", ".join(f"{NAMES[name]} {count}" for name, count in epochs.items())
    return (
        f"Every set is cut to {CAP:,} training rows{fewer}, validation rows included, and texts "
        f"to {MAX_TOKENS} tokens; all test rows count. Epochs on the whole network where a set has "
        f"none of its own: {trained}. Seeds: {seeds}, the others 1; ± is shown "
        "where more than one has been run: of fine-tuning, recovered, prompt tuning and localized. "
        "Differences are taken seed by seed, so that those of fast are of the first seed alone. "
        "The recipes are in `benchmarks/recipes.py`."
    )


def readme_table(results: Results) -> str:
    """The README's table in Markdown: accuracies, and below them what they cost."""
    networks = ("fine_tuned", "recovered", "fast", "dense", "localized")
    columns = [_Column(NAMES[network], network) for network in networks]
    sheet = _by_set(results, "", "", tuple(columns))
    means = results["means"]
    lines = [sheet.markdown()]
    for text, figure, places in (
        ("FFN neurons removed, %", "ffn_removed", 0),
        ("times as fast as the whole network", "speedup", 2),
        ("times as fast as prompt tuning", "speedup_over_prompt", 2),
        ("KB a task", "kilobytes", 0),
    ):
        cells = (number(means.get(f"{network}_{figure}"), places) for network in networks)
        lines.append(_line((text, *cells)))
    return "\n".join(lines)


def with_readme_table(text: str, results: Results) -> str:
    """The README `text` with its table made anew. Raises `ValueError` where a marker is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no table to write: it stands between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{readme_table(results)}\n{END}{after}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
