"""Scores neurons and heads by how much their part in a layer's output varies from token to token.

What hardly varies can be made up for by a constant, whatever the task (FLAP, An et al. 2024). The
score of a neuron is its variance times the squared norm of its row of `W_out`; the score of a head
is the variance of what `W_o` makes of it. Both are shares of their layer's sum, so that no layer
counts more because its numbers are larger. One forward, no labels and no gradient.

Letters: `n` packed tokens, `L` layers, `A` heads, `d` width of a head, `F` FFN width, `H` hidden.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localization.network import Examples, Network, Progress, Tuned
from model_store.packing import Item, pack
from model_store.plan import Part

ROWS_AT_ONCE = 64


@dataclass
class _Moments:
    """A gate that changes nothing and adds up first and second moments of what goes through.

    Of neurons each one's, of a head's `d` values also their products with each other.
    """

    heads: int
    count: dict[tuple[Part, int], int] = field(default_factory=dict)
    first: dict[tuple[Part, int], Tensor] = field(default_factory=dict)
    second: dict[tuple[Part, int], Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, part: Part, x: Tensor) -> Tensor:
        if part in ("ffn_in", "heads"):
            values = x.double()
            if part == "heads":
                values = values.view(len(x), self.heads, -1)
                squares = torch.einsum("nai,naj->aij", values, values)
            else:
                squares = values.square().sum(dim=0)
            key = (part, layer)
            self.count[key] = self.count.get(key, 0) + len(x)
            self.first[key] = self.first.get(key, 0) + values.sum(dim=0)
            self.second[key] = self.second.get(key, 0) + squares
        return x


def fluctuations(
    network: Network, tuned: Tuned, examples: Examples, rows: int, progress: Progress
) -> dict[Part, Tensor]:
    """Scores of `ffn_in [L, F]` and `heads [L, A]` over the first `rows` rows; larger varies more.

    `network` must be in fp32.
    """
    encoder = network.encoder
    config = encoder.config
    moments = _Moments(config.heads)
    plan = dataclasses.replace(network.plan(tuned), gate=moments)
    encodings = examples.encodings[:rows]
    with torch.no_grad():
        for begin in range(0, len(encodings), ROWS_AT_ONCE):
            some = encodings[begin : begin + ROWS_AT_ONCE]
            encoder.forward(pack([Item(item, 0) for item in some], [plan.layout]), [plan])
            progress(begin + len(some), len(encodings), f"{begin + len(some)} rows")
    found: dict[Part, list[Tensor]] = {"ffn_in": [], "heads": []}
    for layer in range(config.layers):
        for part, scores in found.items():
            mean = moments.first[part, layer] / moments.count[part, layer]
            square = moments.second[part, layer] / moments.count[part, layer]
            if part == "ffn_in":
                weight = encoder.tensors[f"layers.{layer}.ffn_out.weight"].double()  # [F, H]
                varying = (square - mean.square()) * weight.square().sum(dim=1)
            else:
                weight = encoder.tensors[f"layers.{layer}.attention_out.weight"].double()
                weight = weight.view(config.hidden, config.heads, -1).transpose(0, 1)  # [A, H, d]
                covariance = square - mean[:, :, None] * mean[:, None, :]
                varying = ((weight @ covariance) * weight).sum(dim=(1, 2))
            varying = varying.clamp_min(0)
            scores.append((varying / varying.sum().clamp_min(1e-30)).float().cpu())
    return {part: torch.stack(layers) for part, layers in found.items()}
