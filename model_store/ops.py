"""The few operations that the forward needs, in plain torch: the reference, with autograd.

`Ops` is what an implementation offers; `ops_onednn.py` has a faster one for the CPU. Nothing else
in the forward chooses by device. Weights go through `pack_linear` once and are opaque afterwards.

Letters: `n` rows, `I` and `O` widths of a linear map, `H` hidden, `a` heads that are kept, `d` a
head's width, `K` kept neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model_store.backbone import Activation


@dataclass(frozen=True)
class Linear:
    """A linear map made ready by `Ops.pack_linear`; `weight` may be in a private layout.

    Only tuning has a `delta [O, I]` beside a frozen weight, in plain torch; serving merges it.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation | None = None
    delta: Tensor | None = None


@dataclass(frozen=True)
class Ffn:
    """A feed-forward network: `inner` [H -> K] with the activation, `outer` [K -> H].

    Only tuning has a `scale [K]` between the two; serving merges it into `outer`.
    """

    inner: Linear
    outer: Linear
    scale: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A LayerNorm's `weight [H]`, `bias [H]` and epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class Run:
    """`count` neighbouring sequences of equal length: `queries` and `keys` rows each."""

    count: int
    queries: int
    keys: int


class Ops(Protocol):
    """What `encoder.Encoder` computes with. Every method is pure: inputs are never written to."""

    dtype: torch.dtype
    """Of activations and weights."""
    device: str

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> Linear:
        """Make `weight [O, I]` and `bias [O]` (in `dtype`, on `device`) ready for `linear`."""
        ...

    def pack_ffn(
        self, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, activation: Activation
    ) -> Ffn:
        """Make `w_in [K, H]`, `b_in [K]`, `w_out [K, H]` and `b_out [H]` ready; K may be 0."""
        ...

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """`[n, I] -> [n, O]`, activation included."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], heads: int) -> Tensor:
        """Softmax attention inside each sequence; q `[nq, ad]`, k and v `[n, ad]` -> `[nq, ad]`.

        `heads` is a, at least 1.
        """
        ...

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        """LayerNorm of `x + residual`, `[n, H]`."""
        ...


class TorchOps:
    """The reference: plain torch on any device, differentiable."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype = dtype
        self.device = device

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None
    ) -> Linear:
        return Linear(weight, bias, activation)

    def pack_ffn(
        self, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, activation: Activation
    ) -> Ffn:
        return Ffn(Linear(w_in, b_in, activation), Linear(w_out.t(), b_out))

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        rows = len(x)
        if self.dtype == torch.bfloat16 and self.device == "cpu":
            x = F.pad(x, (0, 0, 0, bucket(rows) - rows))
        weight = linear.weight if linear.delta is None else linear.weight + linear.delta
        y = F.linear(x, weight, linear.bias)[:rows]
        return y if linear.activation is None else activate(y, linear.activation)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], heads: int) -> Tensor:
        return torch_attention(q, k, v, runs, heads)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        return F.layer_norm(x + residual, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def fast_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 natively, so that bf16 is worth its rounding."""
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def bucket(rows: int) -> int:
    """`rows` rounded up to one of four sizes per doubling, 8 at the least.

    oneDNN compiles a kernel for every new shape of a matrix product, which takes longer (3 to
    10 ms) than most products do, and keeps about 1 MB for each. Rows are independent, so filling up
    changes no result.
    """
    step = max(8, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step


def torch_attention(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], heads: int) -> Tensor:
    """Attention one run at a time: sequences of one length need neither padding nor a mask."""
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # torch's bf16 attention is ten times slower than fp32's in the backward pass on the CPU.
        return torch_attention(q.float(), k.float(), v.float(), runs, heads).to(q.dtype)
    outputs = []
    # `split` rather than slices: its backward pass writes each gradient once.
    query_rows = [run.count * run.queries for run in runs]
    key_rows = [run.count * run.keys for run in runs]
    parts = (torch.split(x, rows) for x, rows in ((q, query_rows), (k, key_rows), (v, key_rows)))
    for run, q_run, k_run, v_run in zip(runs, *parts, strict=True):
        # Each [count, A, rows, H / A].
        out = F.scaled_dot_product_attention(
            q_run.view(run.count, run.queries, heads, -1).transpose(1, 2),
            k_run.view(run.count, run.keys, heads, -1).transpose(1, 2),
            v_run.view(run.count, run.keys, heads, -1).transpose(1, 2),
        )
        outputs.append(out.transpose(1, 2).reshape(run.count * run.queries, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation function by its name in `EncoderConfig`."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    raise ValueError(f"unknown activation {activation!r}")
