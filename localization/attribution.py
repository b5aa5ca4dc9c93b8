"""Scores every feed-forward neuron's part in a task: the pipeline's step `quantify`.

`A_i(x) = h_i * dP(y|x)/dh_i`, h after the activation (Skeleton, section 4.1), and the scores that
the paper compares it with. Knows nothing of how many neurons are kept.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from localization.config import AttributionConfig
from localization.tuning import Examples, Network, Progress, Tuned
from model_store.encoder import Encoder
from model_store.ops import Linear, TorchOps
from model_store.packing import Batch, Item, pack

ROWS_AT_ONCE = 16


class _RecordingOps(TorchOps):
    """Plain torch that keeps every activation h of the feed-forward networks, to ask for dP/dh."""

    def __init__(self, device: str) -> None:
        super().__init__(torch.float32, device)
        self.activations: list[Tensor] = []

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        y = super().linear(x, linear)
        if linear.activation is not None:
            if not y.requires_grad:
                y.requires_grad_()
            self.activations.append(y)
        return y


def score_neurons(
    network: Network,
    tuned: Tuned,
    examples: Examples,
    config: AttributionConfig,
    seed: int,
    progress: Progress,
) -> Tensor:
    """Scores `[L, F]`, larger is more important, summed over the first `config.rows` rows.

    `network` must be in fp32: products of small gradients do not survive fewer bits.
    """
    encoder = network.encoder
    if config.score == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(encoder.config.layers, encoder.config.ffn, generator=generator)
    total = torch.zeros(encoder.config.layers, encoder.config.ffn)
    count = min(config.rows, len(examples))
    for first in range(0, count, ROWS_AT_ONCE):
        rows = range(first, min(first + ROWS_AT_ONCE, count))
        total += torch.stack(
            [
                per_row.sum(dim=0).cpu()
                for per_row in row_scores(network, tuned, examples, rows, config)
            ]
        )
        progress(rows.stop, count, f"{rows.stop} rows")
    return total


def row_scores(
    network: Network,
    tuned: Tuned,
    examples: Examples,
    rows: Sequence[int],
    config: AttributionConfig,
) -> list[Tensor]:
    """Per layer the scores of each row, `[len(rows), F]`, tokens reduced; rows in packed order."""
    ops = _RecordingOps(network.encoder.ops.device)
    recording = dataclasses.replace(
        network, encoder=Encoder(network.encoder.config, network.encoder.tensors, ops)
    )
    plan = recording.plan(tuned)
    batch = pack([Item(examples.encodings[row], 0) for row in rows], [plan.layout])
    (logits,) = recording.encoder.forward(batch, [plan])
    classes = examples.classes[[rows[index] for index in batch.order]].to(logits.device)
    chosen = logits.softmax(dim=1).gather(1, classes[:, None]).sum()
    gradients = torch.autograd.grad(chosen, ops.activations)
    result = []
    for layer, (h, gradient) in enumerate(zip(ops.activations, gradients, strict=True)):
        per_token = _score(h.detach(), gradient, config)
        last = layer == network.encoder.config.layers - 1
        result.append(_over_tokens(per_token, _sequences(batch, last), batch.sequences, config))
    return result


def _score(h: Tensor, gradient: Tensor, config: AttributionConfig) -> Tensor:
    if config.score == "attribution":
        score = h * gradient
    elif config.score == "activation":
        score = h
    elif config.score == "gradient":
        score = gradient
    else:
        raise ValueError(f"unknown score {config.score!r}")
    return score if config.signed else score.abs()


def _sequences(batch: Batch, last_layer: bool) -> Tensor:
    """The sequence that each row belongs to; the last layer has read rows alone."""
    if last_layer:
        return batch.read_sequence
    lengths = torch.tensor([run.keys for run in batch.runs for _ in range(run.count)])
    return torch.repeat_interleave(torch.arange(batch.sequences), lengths)


def _over_tokens(
    scores: Tensor, sequence: Tensor, sequences: int, config: AttributionConfig
) -> Tensor:
    """`[rows, F] -> [B, F]`"""
    kind = {"sum": "sum", "mean": "mean", "max": "amax"}[config.tokens]
    index = sequence.to(scores.device)[:, None].expand_as(scores)
    return scores.new_zeros(sequences, scores.shape[1]).scatter_reduce(
        0, index, scores, kind, include_self=False
    )
