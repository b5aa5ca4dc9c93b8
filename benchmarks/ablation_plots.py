"""The ablation's figures as SVG plots, each a file that can be shown by itself.

Knows figures by part and data set, as the tables do.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.ablation_bench import Figures, Grid
from benchmarks.ablation_parts import OURS, PAPERS
from benchmarks.ablation_tables import by_kind, having
from localization.page.charts import Series, lines

STYLE = """
svg { background: #fff; font-family: system-ui, sans-serif; }
text { font-size: 13px; fill: #1b1f24; } .quiet { fill: #57606a; }
.axis { stroke: #d5dae0; stroke-width: 1; }
.reference { stroke: #1b1f24; stroke-width: 1.5; stroke-dasharray: 6 4; }
.path { fill: none; stroke-width: 2; stroke-linejoin: round; }
""" + "".join(
    f".c{number} {{ stroke: {colour}; fill: {colour}; }}\n"
    for number, colour in enumerate("#0072b2 #d55e00 #00845f #b0578d #444b53 #a87700".split())
)
"""What the report's page gives its charts; a plot by itself must bring it along."""


def plots(results: Mapping[str, Mapping[str, Figures]], grid: Grid) -> dict[str, str]:
    """SVG files by name: scores against keep, injection by epoch, rows that score, ranks."""
    result = {}
    for name, dense, figures in having(results, "scores"):
        shown = (OURS, PAPERS, "activation, sum, absolute", "gradient, sum, absolute", "magnitude")
        rows = by_kind(figures)
        kinds = [kind for kind in rows if kind in shown or kind.startswith("random")]
        series = [
            Series(
                "the paper's attribution" if kind == PAPERS else kind,
                _points((100 * keep, rows[kind][f"{keep}"]) for keep in grid.keeps),
            )
            for kind in kinds
        ]
        label = f"{name}: test accuracy by score and share of neurons kept"
        result[f"ablation-scores-{name}.svg"] = plot(
            label, series, "neurons kept, %", "test accuracy, %", ("whole network", dense)
        )
    for name, _, figures in having(results, "injection"):
        series = [
            Series(variant, _points(enumerate(row["curve"]))) for variant, row in figures.items()
        ]
        label = f"{name}: validation accuracy by epoch, with and without prior injection"
        result[f"ablation-injection-{name}.svg"] = plot(
            label, series, "epochs of tuning again", "validation accuracy, %", whole=True
        )
    for name, dense, figures in having(results, "rows"):
        series = [
            Series(f"{score.removeprefix('attribution, ')}, {float(keep):.0%} kept", _points(
                (math.log10(int(count)), value) for count, value in by_count.items()
            ))
            for score, by_keep in figures.items()
            for keep, by_count in by_keep.items()
        ]  # fmt: skip
        label = f"{name}: test accuracy by rows that score"
        result[f"ablation-rows-{name}.svg"] = plot(
            label, series, "rows that score, as powers of ten", "test accuracy, %",
            ("whole network", dense),
        )  # fmt: skip
    ranks = [
        Series(name, _points((rank, figures[f"rank {rank}"]["after"]) for rank in grid.ranks))
        for name, _, figures in having(results, "deltas")
    ]
    if ranks:
        label = "Test accuracy by rank of the deltas, half of the neurons kept"
        result["ablation-ranks.svg"] = plot(
            label, ranks, "rank of the deltas", "test accuracy, %", whole=True
        )
    return result


def _points(pairs: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(pairs))


def plot(
    label: str,
    series: Sequence[Series],
    x_axis: str,
    y_axis: str,
    reference: tuple[str, float] | None = None,
    *,
    whole: bool = False,
) -> str:
    """A chart as a file of its own, with its name space and its colours."""
    chart = lines(label, series, x_axis, y_axis, reference, whole)
    opened, rest = chart.split(">", 1)
    name_space = 'xmlns="http://www.w3.org/2000/svg" width="620"'
    return f"{opened} {name_space}><style>{STYLE}</style>{rest}\n"
