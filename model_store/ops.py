"""The few operations that the forward needs, in plain torch: the reference, with autograd.

`Ops` is what an implementation offers; `ops_onednn.py` has a faster one for the CPU, `ops_cuda.py`
one for GPUs. Nothing else in the forward chooses by device. Weights go through `pack_linear` once
and are opaque afterwards.

What differs between the tasks of one batch is computed by *segments*: `Groups` are the segments'
rows and what each task has there, made ready once per forward.

Letters: `n` rows, `S` segments, `I` and `O` widths of a linear map, `H` hidden, `A` heads, `a`
heads that are kept, `d` a head's width, `F` FFN width, `K` kept neurons, `r` rank, `L` layers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

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
class LowRank:
    """A low-rank change beside a linear map: adds `x @ down.T @ up.T`."""

    down: Tensor  # [r, I]
    up: Tensor  # [O, r]


@dataclass(frozen=True)
class Ffn:
    """A feed-forward network: `inner` [H -> K] with the activation, `outer` [K -> H].

    With `neurons`, `inner` and `outer` are the backbone's own, all F neurons of them, and only the
    listed ones count: nothing is copied for the task. `scale` stands between the two, the deltas
    beside them; where slices are the task's own, serving has merged all three into those.
    """

    inner: Linear
    outer: Linear
    scale: Tensor | None = None  # [K]
    neurons: Tensor | None = None  # [K] int32, or int16 where F allows it
    inner_delta: LowRank | None = None  # H -> K
    outer_delta: LowRank | None = None  # K -> H


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


@dataclass(frozen=True)
class Spans:
    """Where each packed sequence has its query rows and its key rows."""

    runs: tuple[Run, ...]
    """The same as counts, neighbours of equal lengths together; empty where rows are filled up."""
    query_starts: Tensor  # [B + 1] int32
    key_starts: Tensor  # [B + 1] int32
    longest_queries: int
    longest_keys: int


Projection = Literal["qkv", "q", "kv", "o"]
"""A linear map of attention; the last layer has `q` and `kv` in the place of `qkv`."""

NormName = Literal["attention", "ffn"]


@dataclass(frozen=True)
class Adapter:
    """One layer's changes of one task, beside attention and norms that it shares with others."""

    deltas: Mapping[Projection, LowRank] = field(default_factory=dict)
    norms: Mapping[NormName, Norm] = field(default_factory=dict)
    heads: Tensor | None = None  # [A] in the ops' precision: 1 for a kept head, 0 for a removed one


class Network(Protocol):
    """A task's own part of the layers; `plan.Plan` is one."""

    @property
    def ffn(self) -> tuple[Ffn, ...]:
        """L"""
        ...

    @property
    def adapters(self) -> tuple[Adapter, ...] | None:
        """L"""
        ...

    @property
    def table(self) -> Tensor | None:
        """What `Ops.tabulate` made of both."""
        ...


@dataclass(frozen=True)
class Groups:
    """Segments of rows and each one's network, made by `Ops.group`; others may add to it."""

    ranges: tuple[slice, ...]  # S
    networks: tuple[Network, ...]  # S
    adapted: bool
    """Whether any task has changes beside the shared attention and norms."""


@dataclass(frozen=True)
class Work:
    """What the layers must know of one batch besides activations."""

    spans: Spans
    read_spans: Spans  # read rows alone as queries
    read_rows: Tensor  # [R] int64
    rows: Groups
    reads: Groups  # the segments' ranges in the read rows


Layers = Callable[[Tensor, Tensor | None, Work], Tensor]
"""All layers: hidden states `[N, H]` and perhaps their first `qkv` -> the read rows `[R, H]`."""


class Ops(Protocol):
    """What `encoder.Encoder` computes with. Every method is pure: inputs are never written to."""

    dtype: torch.dtype
    """Of activations and weights."""
    device: str
    shares_layers: bool
    """Whether all tasks share the backbone's layers, their changes beside them: `Adapter`, `Ffn`.

    Else a task that changes more than the FFN has layers of its own, and its changes merged in.
    """

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

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, heads: int) -> Tensor:
        """Softmax attention inside each sequence; q `[nq, ad]`, k and v `[n, ad]` -> `[nq, ad]`.

        `heads` is a, at least 1.
        """
        ...

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        """LayerNorm of `x + residual`, `[n, H]`."""
        ...

    def tabulate(self, ffn: Sequence[Ffn], adapters: Sequence[Adapter] | None) -> Tensor | None:
        """What `group` wants to know of a network, so that a plan can keep it."""
        ...

    def group(
        self, ranges: Sequence[slice], networks: Sequence[Network], like: Groups | None = None
    ) -> Groups:
        """The segments' rows, which follow one another, and the network of each.

        `like`: groups of the same networks, for which work has been done already.
        """
        ...

    def ffn(self, layer: int, x: Tensor, groups: Groups) -> Tensor:
        """Each segment's rows through its own task's neurons, `[n, H] -> [n, H]`."""
        ...

    def adapt(
        self, layer: int, projection: Projection, x: Tensor, y: Tensor, groups: Groups
    ) -> Tensor:
        """`y [n, O]`, a projection of `x [n, I]`, with each segment's delta added."""
        ...

    def keep_heads(self, layer: int, x: Tensor, groups: Groups) -> Tensor:
        """`x [n, H]`, what attention gives, with each segment's removed heads zero."""
        ...

    def add_own_norm(
        self, layer: int, name: NormName, x: Tensor, residual: Tensor, norm: Norm, groups: Groups
    ) -> Tensor:
        """`add_norm`, where segments may have a norm of their own in the place of `norm`."""
        ...

    def classify(
        self, x: Tensor, ranges: Sequence[slice], heads: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Each range of `x [n, I]` through its own weight `[C, I]` and bias `[C]`, in fp32."""
        ...

    def launch(self, layers: Layers, x: Tensor, qkv: Tensor | None, work: Work) -> Tensor:
        """`layers(x, qkv, work)`, perhaps recorded once and then replayed for batches like it.

        Equal `layers` must compute the same.
        """
        ...


class TorchOps:
    """The reference: plain torch on any device, differentiable, one segment at a time."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        *,
        shares_layers: bool = False,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.shares_layers = shares_layers

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

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, heads: int) -> Tensor:
        return torch_attention(q, k, v, spans.runs, heads)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        return F.layer_norm(x + residual, norm.weight.shape, norm.weight, norm.bias, norm.eps)

    def tabulate(self, ffn: Sequence[Ffn], adapters: Sequence[Adapter] | None) -> Tensor | None:
        return None

    def group(
        self, ranges: Sequence[slice], networks: Sequence[Network], like: Groups | None = None
    ) -> Groups:
        adapted = any(network.adapters is not None for network in networks)
        return Groups(tuple(ranges), tuple(networks), adapted)

    def ffn(self, layer: int, x: Tensor, groups: Groups) -> Tensor:
        pairs = zip(groups.ranges, groups.networks, strict=True)
        return _joined([one_ffn(self, x[rows], network.ffn[layer]) for rows, network in pairs])

    def adapt(
        self, layer: int, projection: Projection, x: Tensor, y: Tensor, groups: Groups
    ) -> Tensor:
        outputs = []
        for rows, network in zip(groups.ranges, groups.networks, strict=True):
            deltas = {} if network.adapters is None else network.adapters[layer].deltas
            outputs.append(_with_low_rank(y[rows], x[rows], deltas.get(projection)))
        return _joined(outputs)

    def keep_heads(self, layer: int, x: Tensor, groups: Groups) -> Tensor:
        outputs = []
        for rows, network in zip(groups.ranges, groups.networks, strict=True):
            kept = None if network.adapters is None else network.adapters[layer].heads
            outputs.append(
                x[rows]
                if kept is None
                else (x[rows].view(len(x[rows]), len(kept), -1) * kept[:, None]).flatten(1)
            )
        return _joined(outputs)

    def add_own_norm(
        self, layer: int, name: NormName, x: Tensor, residual: Tensor, norm: Norm, groups: Groups
    ) -> Tensor:
        outputs = []
        for rows, network in zip(groups.ranges, groups.networks, strict=True):
            norms = {} if network.adapters is None else network.adapters[layer].norms
            outputs.append(self.add_norm(x[rows], residual[rows], norms.get(name, norm)))
        return _joined(outputs)

    def classify(
        self, x: Tensor, ranges: Sequence[slice], heads: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        return [
            F.linear(x[rows].float(), weight, bias)
            for rows, (weight, bias) in zip(ranges, heads, strict=True)
        ]

    def launch(self, layers: Layers, x: Tensor, qkv: Tensor | None, work: Work) -> Tensor:
        return layers(x, qkv, work)


def inner_of(ops: Ops, x: Tensor, ffn: Ffn) -> Tensor:
    """One task's neurons after activation and scale, `[n, H] -> [n, K]`."""
    linear = ffn.inner
    if ffn.neurons is not None:
        rows = ffn.neurons.long()
        bias = None if linear.bias is None else linear.bias[rows]
        linear = Linear(linear.weight[rows], bias, linear.activation)
    if ffn.inner_delta is not None:
        linear = dataclasses.replace(linear, delta=ffn.inner_delta.up @ ffn.inner_delta.down)
    inner = ops.linear(x, linear)
    return inner if ffn.scale is None else inner * ffn.scale.to(inner.dtype)


def outer_of(ops: Ops, inner: Tensor, ffn: Ffn) -> Tensor:
    """What one task's neurons give, `[n, K] -> [n, H]`."""
    linear = ffn.outer
    if ffn.neurons is not None:
        linear = Linear(linear.weight[:, ffn.neurons.long()], linear.bias)
    return _with_low_rank(ops.linear(inner, linear), inner, ffn.outer_delta)


def one_ffn(ops: Ops, x: Tensor, ffn: Ffn) -> Tensor:
    """One task's whole feed-forward network, `[n, H] -> [n, H]`."""
    return outer_of(ops, inner_of(ops, x, ffn), ffn)


def _with_low_rank(y: Tensor, x: Tensor, delta: LowRank | None) -> Tensor:
    return y if delta is None else y + F.linear(F.linear(x, delta.down), delta.up)


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))


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
