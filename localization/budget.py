"""What is kept under a budget: neurons and heads chosen together, by score and by cost.

Costs are measured where a speed is asked for, and counted in multiplications elsewhere. Nothing is
trained here; cut networks are tried on the validation rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from localization.costs import measure_costs, speedup
from localization.cutting import cut_network
from localization.job import Job
from localization.network import Tuned, predict
from localization.selection import Costs, Kept, Scores, select, select_within
from model_store.backbone import EncoderConfig

LEAST_SHARE = 0.05
"""Of the units' cost; a speed-up that needs less is out of reach."""

CLOSE = 0.99
"""A speed-up is reached when this much of it is: timings vary by about that."""

CORRECTIONS = 3
"""Of the share of the units' cost, to meet a speed-up."""

HEAD_RATES = (2.0, 4.0, 8.0, 16.0, 32.0)
"""How many times a head's score counts against neurons' scores."""

FLUCTUATION_RATES = (0.5, 0.25, 1.0)
"""The same where the scores are shares of a layer's fluctuation."""

TILTS = (1.0, 0.3)
"""How much a unit counts against one of the layer before, where the head is fitted again.

Such a head may as well read what an earlier layer gives.
"""


class Exchange(NamedTuple):
    """How units are weighed against each other: see `TILTS` and `HEAD_RATES`."""

    tilt: float
    rate: float


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
    """What is kept when neurons and heads together may cost `share` of what all of them do."""
    exchange = best_exchange(job, dense, scores, costs, share)
    return kept_at(job, scores, costs, share, exchange)


def kept_at(job: Job, scores: Scores, costs: Costs, share: float, exchange: Exchange) -> Kept:
    """The units worth most for what they cost, at an exchange rate between heads and layers."""
    if not job.config.cuts_heads:
        return Kept(select(scores.neurons, share, job.config.attribution.scope))
    whole = costs.of(scores.neurons.numel(), scores.heads.numel())
    budget = costs.fixed + share * (whole - costs.fixed)
    worth = exchange.tilt ** torch.arange(len(scores.heads))[:, None]
    heads = exchange.rate * scores.heads
    return select_within(scores.neurons * worth, heads * worth, costs, budget)


def best_exchange(job: Job, dense: Tuned, scores: Scores, costs: Costs, share: float) -> Exchange:
    """The rates at which the cut network has the smallest loss on the validation rows.

    First-order scores say little about many units going at once: heads' and neurons' scores have no
    common unit, and layers make up for one another. Nothing is trained for the choice.
    """
    rates: tuple[float, ...] = HEAD_RATES
    if job.config.attribution.score == "fluctuation":
        rates = FLUCTUATION_RATES
    tilts = TILTS if job.config.condense == "closed_form" else TILTS[:1]
    if not job.config.cuts_heads:
        return Exchange(tilts[0], rates[0])
    progress = job.report.step("neurons or heads")
    losses: dict[Exchange, float] = {}

    def loss(exchange: Exchange) -> float:
        if exchange not in losses:
            kept = kept_at(job, scores, costs, share, exchange)
            plan = job.tuning.plan(cut_network(job, dense, kept, scores), kept)
            given = predict(job.tuning.encoder, plan, job.validation.encodings)
            found = F.nll_loss(given.clamp_min(1e-9).log(), job.validation.classes)
            losses[exchange] = float(found)
            progress(len(losses), len(tilts) + len(rates) - 1, f"loss {losses[exchange]:.2f}")
        return losses[exchange]

    best = min((Exchange(tilt, rates[0]) for tilt in tilts), key=loss)
    return min((Exchange(best.tilt, rate) for rate in rates), key=loss)


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
    exchange = best_exchange(job, dense, scores, costs, min(1.0, max(LEAST_SHARE, share)))
    best: tuple[float, Kept] | None = None
    for _ in range(CORRECTIONS):
        share = min(1.0, max(LEAST_SHARE, share))
        kept = kept_at(job, scores, costs, share, exchange)
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
