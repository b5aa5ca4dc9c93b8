"""Makes up for what was removed, without training: each layer's output is fitted again.

After neurons and heads are gone, the maps behind them (`W_out` of the FFN, `W_o` of attention) are
fitted by least squares to give what the whole layer gave on some rows, labels not needed. The fit
is kept as a low-rank delta of the least error for its rank (reduced-rank regression), and a change
of the FFN's bias. Kwon et al. (2022) re-fit one scale per neuron in the same place; a delta of rank
r does more and is merged into the slice just the same. Knows nothing of heads or prompts' tuning.

Letters: `n` packed tokens, `I` kept inputs, `H` hidden, `r` rank, `F` FFN width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from localization.network import Network, Tuned
from localization.selection import Kept
from model_store.encoder import Encoder
from model_store.packing import Item, pack
from model_store.plan import Part
from model_store.tokenization import Encoding

RIDGE = 1e-3
"""Pulls the fit towards the backbone's own weights, as a share of the inputs' mean square."""


@dataclass
class _Refit:
    """A gate that fits layer after layer while one forward of the whole network goes by.

    Each layer so sees what the layers before it, already cut and fitted, give it.
    """

    encoder: Encoder
    kept: Kept
    rank: int
    changes: dict[str, Tensor] = field(default_factory=dict)
    _inputs: Tensor | None = None

    def __call__(self, layer: int, part: Part, x: Tensor) -> Tensor:
        if part in ("heads", "ffn_in"):
            self._inputs = x
        elif part == "o" and self.kept.heads is not None:
            width = self.encoder.config.hidden // self.encoder.config.heads
            columns = torch.arange(self.encoder.config.hidden).view(-1, width)
            rows = columns[self.kept.heads[layer].long()].flatten()
            return self._fit(f"delta.{layer}.o", f"layers.{layer}.attention_out", rows, x, None)
        elif part == "ffn_out":
            rows = self.kept.neurons[layer].long()
            name = f"layers.{layer}.ffn_out"
            return self._fit(f"delta.{layer}.ffn_out", name, rows, x, f"ffn.{layer}.bias")
        return x

    def _fit(
        self, name: str, linear: str, rows: Tensor, target: Tensor, shift_name: str | None
    ) -> Tensor:
        """Fit the map `linear` of the kept inputs alone to `target [n, H]`; gives its output."""
        assert self._inputs is not None, "a map's inputs come before its outputs"
        weight = self.encoder.tensors[f"{linear}.weight"]  # attention_out [H, I]; ffn_out [F, H]
        weight = weight.t() if linear.endswith("attention_out") else weight
        bias = self.encoder.tensors[f"{linear}.bias"]
        inputs, weight = self._inputs[:, rows], weight[rows]
        missing = target - (inputs @ weight + bias)
        shift = missing.mean(dim=0) if shift_name is not None else torch.zeros_like(bias)
        centre = inputs.mean(dim=0) if shift_name is not None else torch.zeros_like(inputs[0])
        delta = reduced_rank(inputs - centre, missing - shift, self.rank)
        if shift_name is not None:
            shift = shift - centre @ (delta[1] @ delta[0]).t() if delta else shift
            self.changes[shift_name] = shift
        output = inputs @ weight + bias + shift
        if delta is None:
            return output
        down, up = delta
        self.changes[f"{name}.down"], self.changes[f"{name}.up"] = down, up
        return output + inputs @ down.t() @ up.t()


def reduced_rank(inputs: Tensor, target: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """`down [r, I]` and `up [H, r]` that bring `inputs @ down.T @ up.T` closest to `target`.

    `inputs [n, I]`, `target [n, H]`. None where nothing can be fitted: no inputs, or rank 0.
    Computed in fp64, for the inputs' covariance may be close to singular.
    """
    rank = min(rank, inputs.shape[1], target.shape[1])
    if rank == 0:
        return None
    x, y = inputs.double(), target.double()
    covariance = x.t() @ x
    ridge = RIDGE * covariance.diagonal().mean() + 1e-12
    covariance += ridge * torch.eye(len(covariance), dtype=x.dtype, device=x.device)
    root = torch.linalg.cholesky(covariance)  # [I, I], lower
    whitened = torch.linalg.solve_triangular(root, x.t() @ y, upper=False)  # root.T @ full fit
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)
    left = torch.linalg.solve_triangular(root.t(), u[:, :rank] * s[:rank].sqrt(), upper=True)
    right = s[:rank].sqrt()[:, None] * v[:rank]
    return left.t().to(inputs.dtype), right.t().to(inputs.dtype)


def refit(
    network: Network, tuned: Tuned, kept: Kept, encodings: Sequence[Encoding], rank: int
) -> dict[str, Tensor]:
    """Changes that make up for what is not in `kept`, from the rows `encodings`, labels not used.

    `network` must be in fp32. All rows go through at once: some thousand tokens are enough.
    """
    gate = _Refit(network.encoder, kept, rank)
    plan = dataclasses.replace(network.plan(tuned), gate=gate)
    with torch.no_grad():
        network.encoder.forward(pack([Item(item, 0) for item in encodings], [plan.layout]), [plan])
    return {name: tensor.cpu().contiguous() for name, tensor in gate.changes.items()}
