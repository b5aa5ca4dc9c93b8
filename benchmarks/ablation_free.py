"""The training-free ablations (Yang et al. 2023): which rows score, what makes up, other domains.

The head comes from least squares on all labelled rows and stays as it is after removal. What makes
up for the removed neurons: nothing, one scale per kept neuron (Kwon et al. 2022), or the low-rank
refit of `localization.refit`. Both need rows without labels.

Letters: `n` packed tokens, `K` kept neurons, `H` hidden.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.ablation_bench import Bench, Figures, Subject
from localization.adapters import joined
from localization.closed_form import with_closed_form_head
from localization.config import AttributionConfig
from localization.errors import DataError
from localization.network import Examples, Network, Tuned
from localization.pipeline import inject
from localization.refit import RIDGE, refit
from localization.selection import Kept, select
from model_store.encoder import Encoder
from model_store.packing import Item, pack
from model_store.plan import Part
from model_store.tokenization import Encoding

SAME_TASK = ("sst2", "imdb")
"""Two domains of one task, with the same labels."""


@dataclass
class _Rescale:
    """A gate that fits each layer's scales while one forward of the whole network goes by.

    Each layer so sees what the layers before it, already cut and rescaled, give it.
    """

    encoder: Encoder
    kept: Kept
    changes: dict[str, Tensor] = field(default_factory=dict)
    _inner: Tensor | None = None

    def __call__(self, layer: int, part: Part, x: Tensor) -> Tensor:
        if part == "ffn_in":
            self._inner = x
        if part != "ffn_out":
            return x
        assert self._inner is not None, "the neurons come before the FFN's output"
        rows = self.kept.neurons[layer].long()
        h = self._inner[:, rows].double()
        weight = self.encoder.tensors[f"layers.{layer}.ffn_out.weight"][rows].double()
        bias = self.encoder.tensors[f"layers.{layer}.ffn_out.bias"].double()
        scale = 1 + scale_changes(h, weight, x.double() - bias - h @ weight)
        self.changes[f"ffn.{layer}.scale"] = scale.to(x.dtype)
        return ((h * scale) @ weight + bias).to(x.dtype)


def scale_changes(h: Tensor, weight: Tensor, missing: Tensor) -> Tensor:
    """What to add to the neurons' scales `[K]` so that `h * scale @ weight` gains `missing`.

    `h [n, K]`, `weight [K, H]`, `missing [n, H]`; least squares, pulled towards no change.
    """
    gram = (h.t() @ h) * (weight @ weight.t())
    ridge = RIDGE * gram.diagonal().mean() + 1e-12
    gram = gram + ridge * torch.eye(len(gram), dtype=h.dtype)
    wanted = ((h.t() @ missing) * weight).sum(dim=1)
    found: Tensor = torch.linalg.solve(gram, wanted)
    return found


def rescaled(
    network: Network, tuned: Tuned, kept: Kept, encodings: Sequence[Encoding]
) -> dict[str, Tensor]:
    """Scales of the kept neurons that bring each layer's output closest to the whole network's."""
    gate = _Rescale(network.encoder, kept)
    plan = dataclasses.replace(network.plan(tuned), gate=gate)
    with torch.no_grad():
        network.encoder.forward(pack([Item(item, 0) for item in encodings], [plan.layout]), [plan])
    return gate.changes


def training_free(bench: Bench) -> Figures:
    """Which rows score: labelled, a handful, unlabelled; by the paper's score; and chance."""
    grid = bench.grid
    subject = bench.subject("training_free")
    dense = inject(subject.job)
    few = grid.few_rows
    kinds = {
        "labelled": AttributionConfig(),
        f"{few} labelled": AttributionConfig(rows=few),
        "unlabelled": AttributionConfig(labels="predicted"),
        "unlabelled, by fluctuation": AttributionConfig(score="fluctuation"),
        "labelled, by the paper's score": AttributionConfig(tokens="max", signed=True, rows=20),
        "none: random": AttributionConfig(score="random"),
    }

    def run(config: AttributionConfig) -> Figures:
        # Who has a handful of rows has no others to fit on, either.
        rows = _first(subject.job.train, few) if config.rows == few else subject.job.train
        started = time.perf_counter()
        kept = Kept(
            select(bench.scores(subject, dense, config)["ffn_in"], grid.half_keep, "global")
        )
        seconds = time.perf_counter() - started
        return {**_made_up(bench, subject, dense, kept, rows), "score_seconds": seconds}

    result: Figures = {}
    for name, config in kinds.items():
        cell = f"training-free {name}, keep {grid.half_keep}, rank {grid.refit_rank}"
        result[name] = bench.cell(subject, cell, partial(run, config))
    result["head"] = bench.cell(subject, "training-free head", partial(_head, subject))
    return result


def _head(subject: Subject) -> Figures:
    """The head by itself: accuracy of the whole network, and the seconds that it takes."""
    started = time.perf_counter()
    dense = inject(subject.job)
    seconds = time.perf_counter() - started
    return {"dense": subject.accuracy(dense), "seconds": seconds}


def _made_up(
    bench: Bench,
    subject: Subject,
    dense: Tuned,
    kept: Kept,
    rows: Examples,
    test: Examples | None = None,
) -> Figures:
    """Accuracy with nothing, scales or deltas making up; with deltas also after a new head."""
    job, encodings = subject.job, _some(rows, bench.grid.refit_tokens)
    begin = subject.cut(dense, kept)
    result = {"cut": subject.accuracy(begin, kept, rows=test)}
    started = time.perf_counter()
    scales = rescaled(job.exact, dense, kept, encodings)
    result["scales_seconds"] = time.perf_counter() - started
    tuned = Tuned({**begin.tensors, **scales})
    result["scales"] = subject.accuracy(tuned, kept, rows=test)
    started = time.perf_counter()
    changes = refit(job.exact, dense, kept, encodings, bench.grid.refit_rank)
    result["refit_seconds"] = time.perf_counter() - started
    tuned = Tuned(joined(begin.tensors, changes))
    result["refit"] = subject.accuracy(tuned, kept, rows=test)
    if test is None:
        again = with_closed_form_head(job.exact, tuned, kept, job.train, len(job.labels))
        result["refit_and_head"] = subject.accuracy(again, kept)
    return result


def domains(bench: Bench) -> Figures:
    """Rows of another domain of the same task choose neurons and fit them; own rows beside it.

    Both ways between the two domains, by the domain whose test rows count.
    """
    first, second = (
        dataclasses.replace(bench, name=name).subject("training_free") for name in SAME_TASK
    )
    if first.job.labels != second.job.labels:
        raise DataError(f"{' and '.join(SAME_TASK)} do not have the same labels")
    return {
        SAME_TASK[0]: _from_elsewhere(bench, first, second),
        SAME_TASK[1]: _from_elsewhere(bench, second, first),
    }


def _from_elsewhere(bench: Bench, here: Subject, there: Subject) -> Figures:
    keep = bench.grid.half_keep

    def run(head: Subject, rows: Subject, labels: bool) -> Figures:
        dense = inject(head.job)
        config = AttributionConfig(labels="given" if labels else "predicted")
        found = bench.scores(head, dense, config, rows=rows.job.train)
        kept = Kept(select(found["ffn_in"], keep, "global"))
        figures = {"dense": head.accuracy(dense, rows=here.test)}
        return figures | _made_up(bench, head, dense, kept, rows.job.train, here.test)

    variants = {
        "own rows": (here, here, True),
        "other domain's rows": (here, there, True),
        "other domain's rows, unlabelled": (here, there, False),
        "other domain's rows, and head": (there, there, True),
    }
    cell = partial(bench.cell, here)
    return {
        name: cell(f"domains {name}, {there.job.key}, keep {keep}", partial(run, *how))
        for name, how in variants.items()
    }


def _first(examples: Examples, count: int) -> Examples:
    return Examples(examples.encodings[:count], examples.classes[:count])


def _some(examples: Examples, tokens: int) -> list[Encoding]:
    """The first rows that have so many tokens together; training rows are in random order."""
    rows, count = [], 0
    for row in examples.encodings:
        rows.append(row)
        count += len(row.token_ids)
        if count >= tokens:
            break
    return rows
