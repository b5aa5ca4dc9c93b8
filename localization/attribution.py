"""Scores every neuron's and head's part in a task: the pipeline's step `quantify`.

`A_i(x) = h_i * dP(y|x)/dh_i`, h after the activation (Skeleton, section 4.1), for heads the same of
a gate on what attention gives (Pruning-Adapter), and the scores that the papers compare with.
Knows nothing of how much is kept.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from localization.config import AttributionConfig
from localization.fluctuation import fluctuations
from localization.network import Examples, Network, Progress, Tuned
from model_store.backbone import EncoderConfig
from model_store.encoder import Encoder
from model_store.packing import Batch, Item, pack
from model_store.plan import Part

ROWS_AT_ONCE = 16

Scores = Mapping[Part, Tensor]
"""Per part `[L, width]`, larger is more important; `heads` has one score per head."""


class _Recorder:
    """A gate that changes nothing and keeps every activation, to ask for its gradient."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.activations: dict[tuple[Part, int], Tensor] = {}

    def __call__(self, layer: int, part: Part, x: Tensor) -> Tensor:
        if part in self._parts:
            if not x.requires_grad:
                x.requires_grad_()
            self.activations[part, layer] = x
        return x


def score_units(
    network: Network,
    tuned: Tuned,
    examples: Examples,
    config: AttributionConfig,
    parts: Sequence[Part],
    seed: int,
    progress: Progress,
) -> dict[Part, Tensor]:
    """Scores per part, `[L, width]`, summed over the first `config.rows` rows.

    `network` must be in fp32: products of small gradients do not survive fewer bits. Fluctuation is
    of `ffn_in` and `heads` alone.
    """
    encoder = network.encoder
    if config.score == "fluctuation":
        varying = fluctuations(network, tuned, examples, config.rows, progress)
        return {part: varying[part] for part in parts}
    widths = {part: _width(encoder.config, part) for part in parts}
    if config.score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {
            part: torch.rand(encoder.config.layers, width, generator=generator)
            for part, width in widths.items()
        }
    if config.score == "magnitude":
        return {part: _magnitudes(encoder, part) for part in parts}
    total = {part: torch.zeros(encoder.config.layers, width) for part, width in widths.items()}
    count = min(config.rows, len(examples))
    for first in range(0, count, ROWS_AT_ONCE):
        rows = range(first, min(first + ROWS_AT_ONCE, count))
        for part, layers in row_scores(network, tuned, examples, rows, config, parts).items():
            total[part] += torch.stack([per_row.sum(dim=0).cpu() for per_row in layers])
        progress(rows.stop, count, f"{rows.stop} rows")
    return total


def row_scores(
    network: Network,
    tuned: Tuned,
    examples: Examples,
    rows: Sequence[int],
    config: AttributionConfig,
    parts: Sequence[Part] = ("ffn_in",),
) -> dict[Part, list[Tensor]]:
    """Per part and layer each row's scores, `[len(rows), width]`; rows in packed order."""
    recorder = _Recorder(parts)
    plan = dataclasses.replace(network.plan(tuned), gate=recorder)
    batch = pack([Item(examples.encodings[row], 0) for row in rows], [plan.layout])
    (logits,) = network.encoder.forward(batch, [plan])
    classes = examples.classes[[rows[index] for index in batch.order]].to(logits.device)
    if config.score in ("taylor", "fisher"):
        target = F.cross_entropy(logits, classes, reduction="sum")
    else:
        target = logits.softmax(dim=1).gather(1, classes[:, None]).sum()
    recorded = recorder.activations
    gradients = torch.autograd.grad(target, list(recorded.values()))
    result: dict[Part, list[Tensor]] = {part: [] for part in parts}
    for (part, layer), h, gradient in zip(recorded, recorded.values(), gradients, strict=True):
        last = layer == network.encoder.config.layers - 1
        # The last layer's keys and values are of all rows, everything else of read rows alone.
        sequence = _sequences(batch, last and part not in ("k", "v"))
        per_token = _score(h.detach(), gradient, config)
        if part == "heads":  # a head's gate multiplies all its d values
            per_token = per_token.view(len(per_token), network.encoder.config.heads, -1).sum(dim=2)
        if not config.signed and config.score != "fisher":
            per_token = per_token.abs()
        result[part].append(_over_tokens(per_token, sequence, batch.sequences, config))
    return result


def _width(config: EncoderConfig, part: Part) -> int:
    if part == "heads":
        return config.heads
    return config.ffn if part == "ffn_in" else config.hidden


def _score(h: Tensor, gradient: Tensor, config: AttributionConfig) -> Tensor:
    if config.score in ("attribution", "taylor", "fisher"):
        return h * gradient
    if config.score == "activation":
        return h
    if config.score == "gradient":
        return gradient
    raise ValueError(f"unknown score {config.score!r}")


def _magnitudes(encoder: Encoder, part: Part) -> Tensor:
    """Norms of the weights that a unit would take away, `[L, width]`; no data needed."""
    config, result = encoder.config, []
    for layer in range(config.layers):
        name = f"layers.{layer}"
        if part == "ffn_in":
            w_in = encoder.tensors[f"{name}.ffn_in.weight"].float()
            w_out = encoder.tensors[f"{name}.ffn_out.weight"].float()
            norms = w_in.norm(dim=1) * w_out.norm(dim=1)
        elif part == "heads":
            weight = encoder.tensors[f"{name}.attention_out.weight"].float()
            norms = weight.view(config.hidden, config.heads, -1).norm(dim=(0, 2))
        elif part == "o":
            norms = encoder.tensors[f"{name}.attention_out.weight"].float().norm(dim=1)
        elif part == "ffn_out":
            norms = encoder.tensors[f"{name}.ffn_out.weight"].float().norm(dim=0)
        else:
            weight = encoder.tensors[f"{name}.qkv.weight"].float()
            norms = weight.norm(dim=1).view(3, config.hidden)["qkv".index(part)]
        result.append(norms.cpu())
    return torch.stack(result)


def _sequences(batch: Batch, read_rows: bool) -> Tensor:
    """The sequence that each row belongs to: of all packed rows, or of the read rows alone."""
    if read_rows:
        return batch.read_sequence
    lengths = torch.tensor([run.keys for run in batch.runs for _ in range(run.count)])
    return torch.repeat_interleave(torch.arange(batch.sequences), lengths)


def _over_tokens(
    scores: Tensor, sequence: Tensor, sequences: int, config: AttributionConfig
) -> Tensor:
    """`[rows, width] -> [B, width]`"""
    if config.score == "fisher":  # the square of the gate's gradient (Kwon et al. 2022)
        totals = scores.new_zeros(sequences, scores.shape[1])
        return totals.index_add(0, sequence.to(scores.device), scores).square()
    kind = {"sum": "sum", "mean": "mean", "max": "amax"}[config.tokens]
    index = sequence.to(scores.device)[:, None].expand_as(scores)
    return scores.new_zeros(sequences, scores.shape[1]).scatter_reduce(
        0, index, scores, kind, include_self=False
    )
