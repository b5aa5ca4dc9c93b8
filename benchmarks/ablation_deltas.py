"""The Pruning-Adapter paper's ablation, on neurons: which low-rank deltas make up for removal.

Each variant is trained on the whole network, cut to half of the neurons, and trained on, as in the
recipe `recovered`. Knows nothing of tables.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

from benchmarks.ablation_bench import Bench, Figures, Subject, after_removal
from benchmarks.ablation_parts import chosen, localized
from localization.adapters import layer_importance, new_deltas, new_scales, with_ranks
from localization.config import AttributionConfig
from localization.network import Tuned, no_progress, start
from localization.pipeline import inject, quantify
from localization.selection import Kept, select
from localization.stages import key_of
from localization.tuning import tune

HIGH, LOW = 8, 4
"""Ranks in the most important third of the layers, and elsewhere (Pruning-Adapter)."""


@dataclass(frozen=True)
class Variant:
    """What is trained beside the head."""

    rank: int
    low_rank: int
    attention: bool = True
    norms: bool = True


def variants(ranks: tuple[int, ...]) -> dict[str, Variant]:
    """By the names that the table has."""
    result = {f"rank {rank}": Variant(rank, rank) for rank in ranks}
    result[f"rank {HIGH} in the top third, {LOW} elsewhere"] = Variant(HIGH, LOW)
    result[f"rank {HIGH}, FFN alone"] = Variant(HIGH, HIGH, attention=False)
    result[f"rank {HIGH}, without norms"] = Variant(HIGH, HIGH, norms=False)
    return result


def deltas(bench: Bench) -> Figures:
    """Accuracy before and after the second training, by variant; without deltas for comparison."""
    keep = bench.grid.half_keep
    subject, dense = localized(bench)

    def without() -> Figures:
        kept = chosen(bench, subject, dense, AttributionConfig(), keep)
        found = bench.condensed(subject, dense, kept)
        return {**found, "dense": subject.accuracy(dense), "parameters": 0}

    cell = f"deltas none: a prompt and scales, keep {keep}"
    result = {"none: a prompt and scales": bench.cell(subject, cell, without)}
    for name, variant in variants(bench.grid.ranks).items():
        rank, attention = variant.rank, variant.attention
        recovery = {"rank": rank, "low_rank": rank, "attention": attention}
        trained = bench.subject("recovered", recovery=recovery)
        cell = f"deltas {name}, keep {keep}"
        result[name] = bench.cell(trained, cell, partial(_run, trained, variant, keep))
    return result


def _run(subject: Subject, variant: Variant, keep: float) -> Figures:
    job = subject.job
    dense = inject(job) if variant.norms or not variant.attention else _without_norms(subject)
    # Scores are a stage of the job; those of another network must not be taken for them.
    name = dataclasses.replace(job, key=key_of(job.key, variant.norms))
    scores = quantify(name, dense)
    kept = Kept(select(scores.neurons, keep, job.config.attribution.scope))
    layers = layer_importance(scores.heads).argsort(descending=True)
    ranks = [variant.low_rank] * len(layers)
    for layer in layers[: -(-len(layers) // 3)].tolist():
        ranks[layer] = variant.rank
    begin = Tuned(with_ranks(subject.cut(dense, kept).tensors, ranks))
    found = _tuned(subject, begin, kept)
    size = sum(part.numel() for key, part in found.tensors.items() if key.startswith("delta."))
    return {
        "dense": subject.accuracy(dense),
        "before": subject.accuracy(begin, kept),
        "after": subject.accuracy(found, kept),
        "parameters": size,
        "seconds": dense.seconds + found.seconds,
    }


def _without_norms(subject: Subject) -> Tuned:
    """The recipe's first training with the backbone's own LayerNorms."""
    job, recovery = subject.job, subject.job.config.recovery
    assert recovery is not None, "the recipe has deltas"
    config, seed = job.backbone.config, job.config.seed
    begin = start(job.tuning, len(job.labels), job.config.prompt_tokens, seed)
    added = new_scales(config) | new_deltas(config, recovery.rank, attention=True, seed=seed)
    return _tuned(subject, Tuned({**begin.tensors, **added}), None)


def _tuned(subject: Subject, begin: Tuned, kept: Kept | None) -> Tuned:
    job, config = subject.job, subject.job.config.tuning
    return tune(
        job.tuning,
        begin,
        kept,
        job.train,
        job.validation,
        config if kept is None else after_removal(config),
        config.epochs if kept is None else config.condense_epochs or config.epochs,
        job.config.seed,
        no_progress,
        metric=job.config.metric,
    )
