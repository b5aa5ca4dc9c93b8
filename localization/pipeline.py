"""A task file and its rows to an overlay: the algorithm of the Skeleton paper, step by step.

    inject     train on the whole frozen network: prompt and head, with recovery also deltas
    quantify   score every neuron's and every head's part in the task
    search     over how much is kept; each trial
      localize   keeps what is worth most under the budget, and fits again what is left
      condense   trains again on it, from where `inject` arrived

Every finished step is kept in the work folder (see `stages.py`). Knows nothing of the store, nor
of how the result is written down (see `results.py`).
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from localization.adapters import new_deltas, new_norms, new_scales
from localization.attribution import score_units
from localization.budget import budgeted, cost_model, localized
from localization.closed_form import with_closed_form_head
from localization.config import TaskConfig
from localization.cutting import cut_network
from localization.data import Dataset
from localization.errors import ConfigError
from localization.evaluation import evaluate
from localization.job import Job, Reporter, prepare
from localization.network import Examples, Tuned, predict, start
from localization.results import Localized, Trial, finish
from localization.selection import Costs, Kept, Scores, smallest_acceptable
from localization.stages import digest_of, key_of
from localization.tuning import tune
from model_store import artifact
from model_store.backbone import Backbone
from model_store.plan import Part


def localize(
    config: TaskConfig,
    backbone: Backbone,
    dataset: Dataset,
    work: Path,
    command: str,
    device: str,
    report: Reporter,
) -> Localized:
    """Find the overlay of a task. Raises `ConfigError` where task, backbone and rows do not fit."""
    job = with_searched_rates(prepare(config, backbone, dataset, work, device, report))
    dense = inject(job)
    scores = quantify(job, begun(job) if config.inject == "none" else dense)
    costs = cost_model(job)
    margin = config.budget.resolved_margin
    if margin is None:
        share, kept = budgeted(job, dense, scores, costs)
        chosen = trial(job, dense, scores, costs, share, kept, dense)
        trials = [chosen]
    else:
        chosen, trials = search(job, dense, scores, costs, margin)
    return finish(job, dense, chosen, tuple(trials), command)


def with_searched_rates(job: Job) -> Job:
    """The job with the learning rates and prompt length that a short search likes best."""
    config, search = job.config, job.config.tuning.search
    if search is None or config.inject not in ("tune", "none"):
        return job
    candidates = [config] + [
        config.model_copy(
            update={"tuning": config.tuning.scaled(factor), "prompt_tokens": prompt_tokens}
        )
        for prompt_tokens in search.prompt_tokens or (config.prompt_tokens,)
        for factor in search.factors
    ]
    tried: dict[str, tuple[float, TaskConfig]] = {}
    seconds = 0.0
    for candidate in candidates:
        name = f"rate {candidate.tuning.delta_learning_rate:g} prompt {candidate.prompt_tokens}"
        if name in tried:
            continue
        if tried and seconds > 60 * search.minutes:
            break
        # Settings that a training depends on are in the job's key.
        one = dataclasses.replace(
            job, config=candidate, key=key_of(job.key, name, candidate.tuning.head_learning_rate)
        )
        tuned = inject(one, -(-config.tuning.epochs // 3))
        seconds += tuned.seconds
        tried[name] = tuned.validation, candidate
    best = max(tried, key=lambda name: tried[name][0])
    job.report.note(f"of {len(tried)} settings tried, the best is: {best}")
    return dataclasses.replace(job, config=tried[best][1], key=key_of(job.key, best))


def begun(job: Job) -> Tuned:
    """Prompt and head before any training."""
    return start(job.tuning, len(job.labels), job.config.prompt_tokens, job.config.seed)


def inject(job: Job, epochs: int | None = None) -> Tuned:
    """Train prompt and head, and what recovery adds, on the whole network."""
    config, encoder = job.config, job.tuning.encoder
    begin = begun(job)
    if config.inject == "existing":
        return _scored(job, existing(job), None)
    if config.inject == "closed_form":
        classes = len(job.labels)
        return _scored(
            job, with_closed_form_head(job.tuning, begin, None, job.train, classes), None
        )
    added: dict[str, Tensor] = {}
    if config.recovery is not None:
        added |= new_scales(encoder.config)
        attention, rank = config.recovery.attention, config.recovery.rank
        added |= new_deltas(encoder.config, rank, attention=attention, seed=config.seed)
        if attention:
            added |= new_norms(encoder.config, job.backbone.tensors)
    begin = Tuned({**begin.tensors, **added})
    return _tune(job, "inject", begin, None, epochs or config.tuning.epochs)


def existing(job: Job) -> Tuned:
    """Prompt and head of an artifact that keeps the whole network. Raises `ConfigError`."""
    config, backbone = job.config, job.backbone
    assert config.existing is not None, "the settings are checked"
    try:
        data = Path(config.existing).read_bytes()
    except OSError as error:
        raise ConfigError(f"existing: {config.existing}: {error.strerror}") from None
    overlay = artifact.read(data, backbone.config, backbone.fingerprint)
    if overlay.manifest.labels != job.labels:
        raise ConfigError(
            f"existing: {config.existing} has the labels {', '.join(overlay.manifest.labels)}; "
            f"the rows have {', '.join(job.labels)}"
        )
    if overlay.manifest.kept_share < 1 or overlay.heads is not None or overlay.changes:
        raise ConfigError(
            f"existing: {config.existing} does not keep the whole network as it is; "
            "an artifact of `budget: {keep: 1.0}` does"
        )
    tensors = {} if overlay.prompt is None else {"prompt": overlay.prompt}
    if overlay.head is not None:
        tensors |= {"head.weight": overlay.head.weight, "head.bias": overlay.head.bias}
    return Tuned(tensors)


def quantify(job: Job, tuned: Tuned) -> Scores:
    """Score all units by the first rows of training."""
    config = job.config.attribution
    settings = config.model_dump(mode="json")
    key = key_of(job.key, "quantify", settings, digest_of(tuned.tensors, None))
    kept = job.stages.load("quantify", key)
    if kept is None:
        rows = job.train
        if config.labels == "predicted":
            shown = rows.encodings[: config.rows]
            predicted = predict(job.exact.encoder, job.exact.plan(tuned), shown).argmax(dim=1)
            rows = Examples(shown, predicted)
        parts: tuple[Part, ...] = ("ffn_in", "heads")
        progress = job.report.step("quantify")
        found = score_units(job.exact, tuned, rows, config, parts, job.config.seed, progress)
        kept = {"neurons": found["ffn_in"], "heads": found["heads"]}
        job.stages.save("quantify", key, kept, {})
    return Scores(kept["neurons"], kept["heads"])


def search(
    job: Job, dense: Tuned, scores: Scores, costs: Costs, margin: float
) -> tuple[Trial, list[Trial]]:
    """The smallest network that loses less than `margin` points on the validation rows.

    A trial stops as soon as it is good enough, for then more training cannot change the decision,
    and starts with the prompt and head of the last one. The chosen one is trained to its end.
    """
    trials: list[Trial] = []
    enough = dense.validation - margin / 100 + 1e-9  # a loss of the margin itself is too much

    def good_enough(share: float) -> bool:
        kept = localized(job, dense, scores, costs, share)
        latest = trials[-1].tuned if trials else dense
        trials.append(trial(job, dense, scores, costs, share, kept, latest, enough))
        return trials[-1].tuned.validation >= enough

    share = smallest_acceptable(good_enough)
    if share == 1.0:
        everything = torch.arange(job.backbone.config.ffn, dtype=torch.int32)
        whole = Trial(1.0, Kept((everything,) * job.backbone.config.layers), dense, 0.0)
        return whole, [*trials, whole]
    chosen = next(one for one in trials if one.share == share)
    final = trial(job, dense, scores, costs, share, chosen.kept, chosen.tuned)
    return final, [*trials, final]


def trial(
    job: Job,
    dense: Tuned,
    scores: Scores,
    costs: Costs,
    share: float,
    kept: Kept,
    latest: Tuned,
    enough: float | None = None,
) -> Trial:
    """Cut the network to what is kept, make up for the rest, and train again.

    Prompt and head start as in `latest`; what belongs to neurons and heads is cut from `dense`.
    """
    config = job.config
    tuned = cut_network(job, dense, kept, scores, latest)
    units = job.backbone.config.layers * job.backbone.config.ffn
    heads = job.backbone.config.layers * job.backbone.config.heads
    kept_heads = heads if kept.heads is None else sum(map(len, kept.heads))
    part = costs.of(sum(map(len, kept.neurons)), kept_heads) / costs.of(units, heads)
    if config.condense != "tune":
        return Trial(share, kept, _scored(job, tuned, kept), part)
    epochs = config.tuning.condense_epochs or config.tuning.epochs
    name = f"condense-{share:.2f}"
    if enough is not None:  # only a decision is wanted: what is close after this is left alone
        name, epochs = f"trial-{share:.2f}", max(1, epochs // 3)
    return Trial(share, kept, _tune(job, name, tuned, kept, epochs, enough), part)


def _tune(
    job: Job,
    name: str,
    begin: Tuned,
    kept: Kept | None,
    epochs: int,
    enough: float | None = None,
) -> Tuned:
    factor = None if kept is None else job.config.tuning.condense_rate
    rates = job.config.tuning if factor is None else job.config.tuning.scaled(factor)
    key = key_of(job.key, name, epochs, enough, factor, digest_of(begin.tensors, kept))
    done = job.stages.load_tuned(name, key)
    if done is not None:
        job.report.note(f"{name}: kept from an earlier run")
        return done
    config = job.config
    tuned = tune(
        job.tuning,
        begin,
        kept,
        job.train,
        job.validation,
        rates,
        epochs,
        config.seed,
        job.report.step(name),
        metric=config.metric,
        enough=enough,
        checkpoint=job.stages.checkpoint(name, key),
    )
    job.stages.save_tuned(name, key, tuned)
    job.report.note(f"{name}: validation {config.metric} {100 * tuned.validation:.1f} %")
    return tuned


def _scored(job: Job, tuned: Tuned, kept: Kept | None) -> Tuned:
    """With the metric on the validation rows; for what was not trained."""
    plan = job.tuning.plan(tuned, kept)
    predicted = predict(job.tuning.encoder, plan, job.validation.encodings).argmax(dim=1)
    found = evaluate(predicted, job.validation.classes, len(job.labels))
    return dataclasses.replace(tuned, validation=found.value(job.config.metric))
