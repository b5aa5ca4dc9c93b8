"""From a localization's result to what its page says: the one place that knows both.

Measures what only the page wants: accuracy against size for several ways of scoring, and speed.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from localization import statistics
from localization.adapters import cut
from localization.attribution import score_units
from localization.config import AttributionConfig, BudgetConfig
from localization.costs import ROWS, time_forwards
from localization.evaluation import evaluate
from localization.job import Job
from localization.network import Examples, Tuned, predict
from localization.page import findings
from localization.results import Answers, Localized, NetworkName, Trial
from localization.selection import Kept, select

KEEPS = (0.2, 0.35, 0.5, 0.65, 0.8)
SCORES = ("attribution", "taylor", "activation", "magnitude", "random")
CURVE_ROWS = 500
"""Validation rows that the curves are measured on, at most."""


def summarize(
    result: Localized,
    others: Mapping[str, Sequence[Tensor]],
    artifact_bytes: int,
    repeats: Sequence[Localized] = (),
) -> findings.Report:
    """What the page says. `others`: neurons of other tasks on this backbone, `[K]` per layer.

    `repeats`: the same task with other seeds, `result` among them.
    """
    job, manifest = result.job, result.overlay.manifest
    answers = result.test or result.validation
    rows = job.dataset.test if result.test else job.dataset.validation
    classes = job.examples(rows).classes
    network = result.network
    final = _network(result, network, answers, classes, artifact_bytes, repeats)
    neurons = [layer.tolist() for layer in result.overlay.neurons]
    width, heads = manifest.ffn_width, result.overlay.heads
    return findings.Report(
        task=manifest.task,
        description=manifest.description,
        backbone=manifest.backbone.name,
        labels=manifest.labels,
        created=manifest.provenance.created,
        command=manifest.provenance.command,
        hardware=manifest.provenance.hardware,
        versions=tuple(manifest.provenance.versions.items()),
        splits=findings.Splits(
            len(job.dataset.train), len(job.dataset.validation), len(job.dataset.test)
        ),
        budget=describe_budget(job.config.budget),
        spent=result.trainings,
        dense=_network(result, "dense", answers, classes, None, repeats),
        localized=final if network == "localized" else None,
        recovered=final if network == "recovered" else None,
        keep_curves=_keep_curves(job, result.dense),
        neurons=findings.Kept(width, tuple(map(tuple, neurons))),
        heads=None
        if heads is None
        else findings.Kept(
            job.backbone.config.heads, tuple(tuple(layer.tolist()) for layer in heads)
        ),
        overlaps=tuple(
            findings.TaskOverlap(
                task, statistics.overlap(neurons, [layer.tolist() for layer in theirs], width)
            )
            for task, theirs in sorted(others.items())
            if task != manifest.task
        ),
        trainings=_curves(result),
        confusion=_confusion(answers[network], classes, len(manifest.labels)),
        mistakes=_mistakes(result, answers[network], classes),
        trials=tuple(_trial(result, trial) for trial in result.trials),
    )


def describe_budget(budget: BudgetConfig) -> str:
    """The budget in words."""
    if budget.keep is not None:
        return f"keep {100 * budget.keep:.0f} % of the work of what can be removed"
    if budget.speedup is not None:
        return f"{budget.speedup:g} times as fast as the whole network"
    return f"the smallest network that loses less than {budget.resolved_margin:g} points"


def _network(
    result: Localized,
    name: NetworkName,
    answers: Mapping[NetworkName, Answers],
    classes: Tensor,
    artifact_bytes: int | None,
    repeats: Sequence[Localized],
) -> findings.NetworkResult:
    found = answers[name].evaluation
    dense = name == "dense"
    manifest, config = result.overlay.manifest, result.job.backbone.config
    heads = manifest.heads_kept
    runs = [one.test or one.validation for one in repeats]
    return findings.NetworkResult(
        hits=round(found.accuracy * found.rows),
        rows=found.rows,
        macro_f1=found.macro_f1,
        matthews=found.matthews,
        neurons_kept=1.0 if dense else manifest.kept_share,
        heads_kept=1.0 if dense or heads is None else sum(heads) / (config.heads * config.layers),
        artifact_bytes=artifact_bytes,
        speed_up=None if dense else _speed_up(result),
        against_dense=None
        if dense
        else statistics.discordant(
            answers["dense"].probabilities.argmax(dim=1).tolist(),
            answers[name].probabilities.argmax(dim=1).tolist(),
            classes.tolist(),
        ),
        repeated=statistics.repeated([run[name].evaluation.accuracy for run in runs])
        if len(runs) > 1
        else None,
    )


def _speed_up(result: Localized) -> float:
    job = result.job
    rows = [job.validation.encodings[at % len(job.validation)] for at in range(ROWS)]
    plans = {
        "dense": result.dense_overlay.plan(job.served),
        "result": result.overlay.plan(job.served),
    }
    seconds = time_forwards(job.served, plans, rows)
    return seconds["dense"] / seconds["result"]


def _keep_curves(job: Job, dense: Tuned) -> findings.KeepCurves:
    """Accuracy of the dense network cut by several scores, before anything is tuned again."""
    shown = Examples(job.validation.encodings[:CURVE_ROWS], job.validation.classes[:CURVE_ROWS])
    progress = job.report.step("curves for the page")
    curves = []
    done = 0
    for score in SCORES:
        settings = AttributionConfig.model_validate({"score": score})
        scores = score_units(
            job.exact, dense, job.train, settings, ["ffn_in"], job.config.seed, lambda *_: None
        )["ffn_in"]
        points = []
        for keep in KEEPS:
            kept = Kept(select(scores, keep, "global"))
            tuned = Tuned(cut(dense.tensors, kept, job.backbone.config))
            plan = job.tuning.plan(tuned, kept)
            given = predict(job.tuning.encoder, plan, shown.encodings).argmax(dim=1)
            points.append((keep, evaluate(given, shown.classes, len(job.labels)).accuracy))
            done += 1
            progress(done, len(SCORES) * len(KEEPS), score)
        curves.append(findings.KeepCurve(score, tuple(points)))
    plan = job.tuning.plan(dense)
    given = predict(job.tuning.encoder, plan, shown.encodings).argmax(dim=1)
    accuracy = evaluate(given, shown.classes, len(job.labels)).accuracy
    return findings.KeepCurves("validation", accuracy, tuple(curves))


def _curves(result: Localized) -> tuple[findings.TrainingCurve, ...]:
    named = [("whole network", result.dense.curve)]
    named += [
        (f"{trial.share:.2f}{' (chosen)' if trial is result.chosen else ''}", trial.tuned.curve)
        for trial in result.trials
    ]
    return tuple(findings.TrainingCurve(name, curve) for name, curve in named if curve)


def _trial(result: Localized, trial: Trial) -> findings.TrialResult:
    config = result.job.backbone.config
    margin = result.job.config.budget.resolved_margin
    lost = 100 * (result.dense.validation - trial.tuned.validation)
    heads = trial.kept.heads
    return findings.TrialResult(
        asked=f"{100 * trial.share:.0f} % of the work",
        neurons_kept=sum(map(len, trial.kept.neurons)) / (config.ffn * config.layers),
        heads_kept=1.0 if heads is None else sum(map(len, heads)) / (config.heads * config.layers),
        validation_accuracy=trial.tuned.validation,
        accepted=margin is None or lost < margin,
        cost=len(trial.tuned.curve) * trial.cost / max(1, len(result.dense.curve)),
    )


def _confusion(answers: Answers, classes: Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    cells = torch.zeros(count, count, dtype=torch.long)
    predicted = answers.probabilities.argmax(dim=1)
    cells.index_put_((classes, predicted), torch.ones(len(classes), dtype=torch.long), True)
    return tuple(tuple(row) for row in cells.tolist())


def _mistakes(result: Localized, answers: Answers, classes: Tensor) -> tuple[findings.Mistake, ...]:
    """The wrong answers that the network is surest of."""
    rows = result.job.dataset.test if result.test else result.job.dataset.validation
    sureness, predicted = answers.probabilities.max(dim=1)
    wrong = (predicted != classes).nonzero()[:, 0]
    worst = wrong[sureness[wrong].argsort(descending=True)][:20].tolist()
    labels = result.job.labels
    return tuple(
        findings.Mistake(
            (given,) if isinstance(given := rows.inputs[at], str) else given,
            labels[int(classes[at])],
            labels[int(predicted[at])],
            min(1.0, max(0.0, float(sureness[at]))) if math.isfinite(sureness[at]) else 0.0,
        )
        for at in worst
    )
