"""What is kept under a budget: neurons and heads chosen together, by score and by cost.

Costs are measured where a speed is asked for, and counted in multiplications elsewhere. Nothing is
trained here; cut networks are tried on the validation rows.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from localization.adapters import cut
from localization.costs import measure_costs, speedup
from localization.job import Job
from localization.network import Tuned, predict
from localization.selection import Costs, Kept, select, select_within
from model_store.backbone import EncoderConfig

LEAST_SHARE = 0.05
"""Of the units' cost; a speed-up that needs less is out of reach."""

CLOSE = 0.99
"""A speed-up is reached when this much of it is: timings vary by about that."""

CORRECTIONS = 3
"""Of the share of the units' cost, to meet a speed-up."""

HEAD_RATES = (2.0, 4.0, 8.0, 16.0, 32.0)
"""How many times a head's score counts against neurons' scores."""


@dataclass(frozen=True)
class Scores:
    """What `quantify` finds: larger is more important."""

    neurons: Tensor  # [L, F]
    heads: Tensor  # [L, A]


def cost_model(job: Job) -> Costs:
    """What a unit costs: measured where a speed is asked for, by multiplications elsewhere."""
    if job.config.budget.speedup is not None:
        return measure_costs(job.served, job.validation.encodings)
    config, lengths = job.backbone.config, [len(row.token_ids) for row in job.validation.encodings]
    return multiplications(config, sum(lengths) / len(lengths))


def multiplications(config: EncoderConfig, tokens: float) -> Costs:
    """Multiplications per token: of one neuron, of one head at `tokens` a sequence."""
    width = config.hidden // config.heads
    return Costs(0.0, 2.0 * config.hidden, 4.0 * config.hidden * width + 2.0 * tokens * width)


def localized(job: Job, dense: Tuned, scores: Scores, costs: Costs, share: float) -> Kept:
    """What is kept when neurons and heads together may cost `share` of what all of them do.

    First-order scores say little about many heads going at once, so they and the neurons' scores
    have no common unit. Several exchange rates are tried, and the cut network with the smallest
    loss on the validation rows is taken; nothing is trained for that.
    """
    if not job.config.cuts_heads:
        return Kept(select(scores.neurons, share, job.config.attribution.scope))
    whole = costs.of(scores.neurons.numel(), scores.heads.numel())
    budget = costs.fixed + share * (whole - costs.fixed)
    candidates = [
        select_within(scores.neurons, rate * scores.heads, costs, budget) for rate in HEAD_RATES
    ]
    progress = job.report.step("neurons or heads")
    losses = []
    for number, kept in enumerate(candidates, 1):
        tuned = Tuned(cut(dense.tensors, kept, job.backbone.config))
        plan = job.tuning.plan(tuned, kept)
        given = predict(job.tuning.encoder, plan, job.validation.encodings)
        losses.append(float(F.nll_loss(given.clamp_min(1e-9).log(), job.validation.classes)))
        progress(number, len(candidates), f"loss {losses[-1]:.2f}")
    return candidates[losses.index(min(losses))]


def budgeted(job: Job, dense: Tuned, scores: Scores, costs: Costs) -> tuple[float, Kept]:
    """What is kept under `keep` or `speedup`, and the share of the units' cost that it has.

    Costs are a model. A speed-up is measured on the cut network, and the share corrected by what
    was measured, until the largest one is found that is fast enough.
    """
    budget, config = job.config.budget, job.backbone.config
    if budget.keep is not None:
        return budget.keep, localized(job, dense, scores, costs, budget.keep)
    assert budget.speedup is not None, "a margin is searched for"
    whole = costs.of(config.layers * config.ffn, config.layers * config.heads)
    share = (whole / budget.speedup - costs.fixed) / (whole - costs.fixed)
    best: tuple[float, Kept] | None = None
    for _ in range(CORRECTIONS):
        share = min(1.0, max(LEAST_SHARE, share))
        kept = localized(job, dense, scores, costs, share)
        reached = speedup(job.served, kept, job.validation.encodings)
        job.report.note(f"{share:.2f} of the units' cost: {reached:.2f} times as fast")
        if reached >= CLOSE * budget.speedup and (best is None or share > best[0]):
            best = share, kept
        # The forward's time is close to a straight line in the share of what is kept.
        slope = max(0.1, (1 - 1 / reached) / (1 - share)) if share < 1 else 1.0
        wanted = 1 - (1 - 1 / budget.speedup) / slope
        if best is not None and abs(wanted - share) < 0.01:
            break
        share = min(wanted, share) - 0.005 if best is None else wanted
    if best is None:
        job.report.note(f"a speed-up of {budget.speedup} is out of reach here")
        return share, kept
    return best
