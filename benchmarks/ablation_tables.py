"""The ablation's figures as tables for people, in the terminal and in Markdown.

Knows figures by part and data set, as `benchmarks.ablation_parts` and its siblings give them;
computes nothing but means.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.ablation_bench import Figures, Grid
from localization.page.markup import DASH


@dataclass(frozen=True)
class Sheet:
    """One table: `rows` of texts, the first `names` columns of which are names, not numbers."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    names: int = 2

    def table(self) -> Table:
        """For the terminal."""
        result = Table(title=self.title, title_justify="left", caption=self.note)
        for number, name in enumerate(self.head):
            result.add_column(name, justify="left" if number < self.names else "right")
        for before, row in zip([None, *self.rows], self.rows, strict=False):
            if before is not None and before[0] != row[0]:
                result.add_section()
            result.add_row(*row)
        return result

    def markdown(self) -> str:
        """A section of a Markdown page."""
        ruler = ["---" if number < self.names else "---:" for number in range(len(self.head))]
        body = [self.head, ruler, *self.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in body)
        return f"## {self.title}\n\n{self.note}\n\n{table}\n"


def points(value: float | None) -> str:
    """An accuracy."""
    return DASH if value is None else f"{value:.1f}"


def sheets(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> list[Sheet]:
    """A table for each part that there are figures of; `results[set][part]`."""
    makers: list[Callable[[Mapping[str, Mapping[str, Figures]], Grid], Sheet]] = [
        _scores, _modules, _injection, _rows, _scope, _training_free, _domains, _deltas
    ]  # fmt: skip
    return [sheet for sheet in (make(results, grid) for make in makers) if sheet.rows]


def by_kind(figures: Figures) -> dict[str, dict[str, float]]:
    """The scores' figures with the mean of all random seeds as one score."""
    result = {name: row for name, row in figures.items() if not name.startswith("random ")}
    chance = [row for name, row in figures.items() if name.startswith("random ")]
    if chance:
        result[f"random, mean of {len(chance)}"] = {
            column: sum(row[column] for row in chance) / len(chance) for column in chance[0]
        }
    return result


def having(
    results: Mapping[str, Mapping[str, Figures]], part: str
) -> list[tuple[str, float, Figures]]:
    """The sets that have the part: name, accuracy of the whole network, the part's figures."""
    return [
        (name, parts.get("base", {}).get("dense", math.nan), parts[part])
        for name, parts in results.items()
        if part in parts
    ]


def _scores(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    keeps = [f"{keep}" for keep in grid.keeps]
    rows = []
    for name, dense, figures in having(results, "scores"):
        rows.append((name, "(the whole network)", *[points(dense)] * (len(keeps) + 1)))
        for score, row in by_kind(figures).items():
            cells = [points(row[keep]) for keep in keeps]
            rows.append((name, score, *cells, points(row.get("after"))))
    return Sheet(
        "What neurons are scored by",
        "Test accuracy with the best share of all FFN neurons kept, nothing tuned afterwards; the "
        f"last column after tuning again at {grid.low_keep:.0%}. "
        "200 rows score, unless it says otherwise.",
        ("set", "score", *(f"{keep:.0%}" for keep in grid.keeps), "tuned again"),
        rows,
    )


def _modules(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = [
        (name, module, points(dense), points(row["random"]), points(row["before"]),
         points(row["after"]), f"{row['pruned']:.1f}")
        for name, dense, figures in having(results, "modules")
        for module, row in figures.items()
    ]  # fmt: skip
    return Sheet(
        "Which maps are pruned",
        f"{1 - grid.module_keep:.0%} of the module's neurons are zero, by attribution or at random "
        f"(mean of {grid.random_seeds}). ffn: FFN neurons; attention: outputs of Q, K, V, O; "
        "dense: of O and both FFN maps; all: of all six. Tuned again: prompt and head.",
        ("set", "module", "whole", "random", "pruned", "tuned again", "pruned %"),
        rows,
    )


def _injection(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = []
    for name, dense, figures in having(results, "injection"):
        for variant, row in figures.items():
            curve = [points(value) for value in row["curve"]]
            curve += [DASH] * (grid.epochs + 1 - len(curve))
            cells = (points(dense), points(row["before"]), *curve, points(row["after"]))
            rows.append((name, variant, *cells))
    return Sheet(
        "Prior injection",
        f"{grid.half_keep:.0%} of the neurons kept. With: scores from the tuned prompt and head, "
        "which are tuned again. Scores without: scores from a random prompt and a least-squares "
        "head; the tuned ones are tuned again. Without: neither. Epochs: validation accuracy.",
        ("set", "injection", "whole", "cut", "epoch 0", *map(str, range(1, grid.epochs + 1)),
         "tuned again"),
        rows,
    )  # fmt: skip


def _rows(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = [
        (name, score, f"{float(keep):.0%}", *map(points, by_count.values()))
        for name, _, figures in having(results, "rows")
        for score, by_keep in figures.items()
        for keep, by_count in by_keep.items()
    ]
    return Sheet(
        "How many rows score",
        "Test accuracy by the number of labelled rows that score the neurons; nothing is tuned "
        "afterwards.",
        ("set", "score", "kept", *map(str, grid.row_counts)),
        rows,
        names=3,
    )


def _scope(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = [
        (name, scope, f"{float(keep):.0%}", points(dense), points(row["before"]),
         points(row["after"]), " ".join(map(str, row["per_layer"])))
        for name, dense, figures in having(results, "scope")
        for scope, by_keep in figures.items()
        for keep, row in by_keep.items()
    ]  # fmt: skip
    return Sheet(
        "Ranking of all layers together, or of each by itself",
        "By attribution (sum, absolute).",
        ("set", "scope", "kept", "whole", "cut", "tuned again", "neurons kept per layer"),
        rows,
        names=3,
    )


def _training_free(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = []
    for name, _, figures in having(results, "training_free"):
        head = figures["head"]
        for kind, row in figures.items():
            if kind == "head":
                continue
            cells = [row["cut"], row["scales"], row["refit"], row["refit_and_head"]]
            spent = head["seconds"] + row["score_seconds"] + row["refit_seconds"]
            seconds = (
                f"{row['scales_seconds']:.1f}",
                f"{row['refit_seconds']:.1f}",
                f"{spent:.1f}",
            )
            rows.append((name, kind, points(head["dense"]), *map(points, cells), *seconds))
    return Sheet(
        "Without training: which rows score, and what makes up for the rest",
        f"{grid.half_keep:.0%} of the neurons kept; the least-squares head stays as it is. Scales: "
        f"one per kept neuron (Kwon et al.); refit: deltas of rank {grid.refit_rank}; new head: "
        "refit, and the head fitted again on all labelled rows. Seconds on one core: of the "
        "scales, of the refit, and of head, scores and refit together.",
        ("set", "rows that score", "whole", "cut", "scales", "refit", "new head",
         "scales s", "refit s", "all s"),
        rows,
    )  # fmt: skip


def _domains(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = [
        (tested, kind, *(points(row[column]) for column in ("dense", "cut", "scales", "refit")))
        for _, _, figures in having(results, "domains")
        for tested, kinds in figures.items()
        for kind, row in kinds.items()
    ]
    return Sheet(
        "Rows from another domain",
        f"Without training, {grid.half_keep:.0%} of the neurons kept: the rows that choose neurons "
        "and fit what is left come from the set itself or from the other of SST-2 and IMDB.",
        ("test rows", "rows that score", "whole", "cut", "scales", "refit"),
        rows,
    )


def _deltas(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> Sheet:
    rows = [
        (name, kind, f"{row['parameters'] / 1000:.0f}", points(row["dense"]),
         points(row["before"]), points(row["after"]), f"{row['seconds']:.0f}")
        for name, _, figures in having(results, "deltas")
        for kind, row in figures.items()
    ]  # fmt: skip
    return Sheet(
        "Low-rank deltas",
        f"{grid.half_keep:.0%} of the neurons kept. Whole: trained on the whole network; then cut, "
        "then trained on. Deltas on all six maps of a layer, LayerNorms and scales, unless it says "
        "otherwise. Seconds: of the trainings.",
        ("set", "deltas", "thousand weights", "whole", "cut", "trained on", "s"),
        rows,
    )
