"""The Skeleton paper's ablations: scores, modules, prior injection, rows that score, scope.

Each part is a function of one data set's `Bench` and gives plain figures; all numbers are points of
test accuracy unless they say otherwise. Knows nothing of tables.
"""

from functools import partial

from benchmarks.ablation_bench import Bench, Figures, Subject
from localization.closed_form import with_closed_form_head
from localization.config import AttributionConfig
from localization.modules import PARTS, Module, module_gate
from localization.network import Tuned, start
from localization.pipeline import inject
from localization.selection import Kept, select

OURS = "attribution, sum, absolute"
PAPERS = "attribution, max, signed, 20 rows (the paper's)"

SCORES: dict[str, AttributionConfig] = {
    OURS: AttributionConfig(),
    "attribution, mean, absolute": AttributionConfig(tokens="mean"),
    "attribution, max, absolute": AttributionConfig(tokens="max"),
    "attribution, sum, signed": AttributionConfig(signed=True),
    "attribution, mean, signed": AttributionConfig(tokens="mean", signed=True),
    "attribution, max, signed": AttributionConfig(tokens="max", signed=True),
    PAPERS: AttributionConfig(tokens="max", signed=True, rows=20),
    "activation, sum, absolute": AttributionConfig(score="activation"),
    "activation, sum, signed (the paper's)": AttributionConfig(score="activation", signed=True),
    "gradient, sum, absolute": AttributionConfig(score="gradient"),
    "gradient, sum, signed (the paper's)": AttributionConfig(score="gradient", signed=True),
    "Taylor of the loss, absolute": AttributionConfig(score="taylor"),
    "Fisher": AttributionConfig(score="fisher"),
    "fluctuation": AttributionConfig(score="fluctuation"),
    "magnitude": AttributionConfig(score="magnitude"),
}

RETUNED = (
    OURS,
    PAPERS,
    "activation, sum, absolute",
    "activation, sum, signed (the paper's)",
)
"""The scores whose networks are tuned again, too; and chance."""


def localized(bench: Bench) -> tuple[Subject, Tuned]:
    """The set under the recipe `localized`, and its one prompt tuning."""
    subject = bench.subject("localized")
    return subject, inject(subject.job)


def base(bench: Bench) -> Figures:
    """The whole network with its tuned prompt, which the other parts start from."""
    subject, dense = localized(bench)

    def compute() -> Figures:
        return {"dense": subject.accuracy(dense), "test_rows": len(subject.test)}

    return bench.cell(subject, "whole network", compute)


def chosen(
    bench: Bench,
    subject: Subject,
    tuned: Tuned,
    config: AttributionConfig,
    keep: float,
    seed: int = 0,
) -> Kept:
    """The best `keep` share of FFN neurons by a score."""
    found = bench.scores(subject, tuned, config, seed=seed)
    return Kept(select(found["ffn_in"], keep, config.scope))


def scores(bench: Bench) -> Figures:
    """How neurons are scored, against how many are kept; some networks are tuned again."""
    subject, dense = localized(bench)
    low = bench.grid.low_keep

    def cut(config: AttributionConfig, seed: int, keep: float) -> Figures:
        kept = chosen(bench, subject, dense, config, keep, seed)
        return {"before": subject.accuracy(subject.cut(dense, kept), kept)}

    def condensed(config: AttributionConfig, seed: int) -> Figures:
        return bench.condensed(subject, dense, chosen(bench, subject, dense, config, low, seed))

    chance = AttributionConfig(score="random")
    asked = {name: (config, 0) for name, config in SCORES.items()}
    asked |= {f"random {seed}": (chance, seed) for seed in range(bench.grid.random_seeds)}
    result: Figures = {}
    for name, (config, seed) in asked.items():
        result[name] = {}
        for keep in bench.grid.keeps:
            cell = f"score {name}, keep {keep}"
            found = bench.cell(subject, cell, partial(cut, config, seed, keep))
            result[name][f"{keep}"] = found["before"]
        if name in RETUNED or config is chance:
            cell = f"score {name}, keep {low}, tuned again"
            found = bench.cell(subject, cell, partial(condensed, config, seed))
            result[name]["after"] = found["after"]
    return result


def modules(bench: Bench) -> Figures:
    """Which kind of map is pruned, all at the same share of its neurons; chance beside it."""
    keep = bench.grid.module_keep
    subject, dense = localized(bench)

    def chance(module: Module) -> Figures:
        random = AttributionConfig(score="random")
        values = []
        for seed in range(bench.grid.random_seeds):
            found = bench.scores(subject, dense, random, PARTS["all"], seed)
            values.append(subject.accuracy(dense, gate=module_gate(found, module, keep)))
        return {"random": sum(values) / len(values)}

    def pruned(module: Module) -> Figures:
        found = bench.scores(subject, dense, AttributionConfig(), PARTS["all"])
        gate = module_gate(found, module, keep)
        figures = bench.condensed(subject, dense, subject.everything, gate)
        return {**figures, "pruned": 100 * gate.pruned}

    return {
        module: {
            **bench.cell(subject, f"module {module}, keep {keep}, random", partial(chance, module)),
            **bench.cell(subject, f"module {module}, keep {keep}", partial(pruned, module)),
        }
        for module in PARTS
    }


def injection(bench: Bench) -> Figures:
    """With and without prior injection: what neurons are chosen by, and what tuning starts from.

    Without it there is a prompt of random words, and a head by least squares: a head of zeros has
    no gradient, and so scores nothing.
    """
    keep, epochs = bench.grid.half_keep, bench.grid.epochs
    subject, dense = localized(bench)
    job = subject.job

    def plain() -> Tuned:
        blank = start(job.tuning, len(job.labels), job.config.prompt_tokens, job.config.seed)
        return with_closed_form_head(job.exact, blank, None, job.train, len(job.labels))

    def run(scored_by_dense: bool, from_dense: bool) -> Figures:
        by = dense if scored_by_dense else plain()
        kept = chosen(bench, subject, by, AttributionConfig(), keep)
        begin = dense if from_dense else plain()
        # What was never tuned has the first training's learning rates.
        return bench.condensed(subject, begin, kept, epochs=epochs, slower=from_dense)

    variants = {"with": (True, True), "scores without": (False, True), "without": (False, False)}
    cell = partial(bench.cell, subject)
    return {
        name: cell(f"injection {name}, keep {keep}, {epochs} epochs", partial(run, *how))
        for name, how in variants.items()
    }


def rows(bench: Bench) -> Figures:
    """How many rows score, for our default and for the paper's reduction over tokens."""
    grid = bench.grid
    subject, dense = localized(bench)

    def cut(config: AttributionConfig, keep: float) -> Figures:
        kept = chosen(bench, subject, dense, config, keep)
        return {"before": subject.accuracy(subject.cut(dense, kept), kept)}

    result: Figures = {}
    for name in (OURS, "attribution, max, signed"):
        for keep in (grid.half_keep, grid.low_keep):
            for count in grid.row_counts:
                config = SCORES[name].model_copy(update={"rows": count})
                cell = f"rows {count}, {name}, keep {keep}"
                found = bench.cell(subject, cell, partial(cut, config, keep))
                result.setdefault(name, {}).setdefault(f"{keep}", {})[f"{count}"] = found["before"]
    return result


def scope(bench: Bench) -> Figures:
    """All layers' neurons ranked together, or each layer's by itself."""
    subject, dense = localized(bench)

    def run(config: AttributionConfig, keep: float) -> Figures:
        kept = chosen(bench, subject, dense, config, keep)
        counts = [len(layer) for layer in kept.neurons]
        return {**bench.condensed(subject, dense, kept), "per_layer": counts}

    return {
        config.scope: {
            f"{keep}": bench.cell(
                subject, f"scope {config.scope}, keep {keep}", partial(run, config, keep)
            )
            for keep in (bench.grid.half_keep, bench.grid.low_keep)
        }
        for config in (AttributionConfig(), AttributionConfig(scope="layer"))
    }
