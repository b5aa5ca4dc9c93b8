"""The forward's operations on the CPU in bf16, with weights packed once by oneDNN.

Plain torch re-packs a bf16 weight at every call; here that happens in `pack_linear`, and the
activation is fused into the product. The reference is `model_store.ops.TorchOps`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model_store.backbone import Activation
from model_store.ops import Ffn, Linear, Ops, TorchOps, bucket

ROWS_EXPECTED = 256
"""What oneDNN is told to choose a weight layout for; the layouts differ little above 64 rows."""

NEURONS = 128
"""Neuron counts are filled up to a multiple of this, so that tasks share oneDNN's kernels."""

# oneDNN's name for an activation, and for its algorithm.
_FUSED: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


class OneDnnOps(TorchOps):
    """bf16 on the CPU, for inference alone: nothing here has a gradient."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16, "cpu")

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> Linear:
        """Pack a `[O, I]` weight; an empty one, of a layer without heads, stays as it is."""
        if not weight.numel():
            return Linear(weight, bias, activation)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_EXPECTED)
        return Linear(packed, bias, activation)

    def pack_ffn(
        self, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, activation: Activation
    ) -> Ffn:
        """Pack K neurons; those that fill up to a multiple of `NEURONS` add nothing."""
        spare = max(NEURONS, -(-len(w_in) // NEURONS) * NEURONS) - len(w_in)
        return Ffn(
            self.pack_linear(F.pad(w_in, (0, 0, 0, spare)), F.pad(b_in, (0, spare)), activation),
            self.pack_linear(F.pad(w_out, (0, 0, 0, spare)).t(), b_out),
        )

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """`[n, I] -> [n, O]`, activation fused; n is filled up to a `bucket` meanwhile."""
        assert linear.delta is None, "a packed weight takes no delta: merge it before"
        rows = len(x)
        if not linear.weight.numel():
            return F.linear(x, linear.weight, linear.bias)
        size = bucket(rows)
        if size != rows:
            filled = x.new_empty(size, x.shape[1])
            filled[:rows] = x
            filled[rows:] = 0
            x = filled
        name, algorithm = _FUSED[linear.activation]
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, linear.weight, linear.bias, name, [], algorithm
        )
        return y[:rows]


def fastest_ops(device: str, *, bf16: bool) -> Ops:
    """What serves on `device` (`cpu` or `cuda`): oneDNN's bf16 on the CPU, else plain torch."""
    if device == "cpu" and bf16:
        return OneDnnOps()
    return TorchOps(torch.bfloat16 if bf16 else torch.float32, device)
