"""Cuts a tuned network to what is kept, and makes up for the rest as far as nothing is trained.

The result is where condensing starts, or the end where `condense` trains nothing. Knows nothing of
how what is kept was chosen.
"""

import random

from localization.adapters import cut, joined, layer_importance, new_scales, with_ranks
from localization.closed_form import with_closed_form_head
from localization.job import Job
from localization.network import Examples, Tuned
from localization.refit import refit
from localization.selection import Kept, Scores
from model_store.tokenization import Encoding

WARM = ("prompt", "head.weight", "head.bias")
"""What is taken from the latest network that was tuned; the rest is cut from the whole one."""


def cut_network(
    job: Job, dense: Tuned, kept: Kept, scores: Scores, latest: Tuned | None = None
) -> Tuned:
    """`dense` without what is not in `kept`.

    Prompt and head are those of `latest`, where there is one. Deltas get the ranks that their
    layers deserve; `refit` and a head by least squares follow where the task asks for them.
    """
    config = job.config
    tensors = dict(dense.tensors)
    if latest is not None:
        tensors |= {name: latest.tensors[name] for name in tensors if name in WARM}
    if config.scales and config.recovery is None:
        tensors |= new_scales(job.backbone.config)
    tensors = cut(tensors, kept, job.backbone.config)
    if config.recovery is not None:
        important = layer_importance(scores.heads).argsort(descending=True)
        ranks = [config.recovery.low_rank] * len(important)
        for layer in important[: -(-len(important) // 3)].tolist():
            ranks[layer] = config.recovery.rank
        tensors = with_ranks(tensors, ranks)
    if config.refit is not None:
        rows = _some_rows(job.train, config.refit.tokens, config.seed)
        tensors = joined(tensors, refit(job.exact, dense, kept, rows, config.refit.rank))
    result = Tuned(tensors)
    if config.condense == "closed_form":
        classes = len(job.labels)
        return with_closed_form_head(job.tuning, result, kept, job.train, classes)
    return result


def _some_rows(examples: Examples, tokens: int, seed: int) -> list[Encoding]:
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311 - not for secrets
    rows, count = [], 0
    for row in order:
        rows.append(examples.encodings[row])
        count += len(examples.encodings[row].token_ids)
        if count >= tokens:
            break
    return rows
