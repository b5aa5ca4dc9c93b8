"""The forward's operations on a GPU: one sequence of launches a layer for the whole mixed batch.

All tasks share the backbone's layers, so projections are one product over all rows; attention is
torch's for sequences of any lengths; what differs between tasks runs in the kernels of
`triton_ffn.py`, which find it in a table of addresses that `group` brings to the device once per
forward. Small batches are replayed as CUDA graphs (`graphs.py`). The reference is
`model_store.ops.TorchOps(shares_layers=True)`; on the CPU everything here runs in Triton's
interpreter, but for CUDA's attention and graphs.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from model_store import triton_ffn as kernels
from model_store.backbone import Activation
from model_store.graphs import Graphs
from model_store.ops import (
    Adapter,
    Ffn,
    Groups,
    Layers,
    Linear,
    LowRank,
    Network,
    Norm,
    NormName,
    Projection,
    Spans,
    TorchOps,
    Work,
    torch_attention,
)

ROW_TILES = (128, 64, 32, 16)
"""Rows of a tile: one of these serves a whole batch."""

TILE_OVERHEAD = 32
"""Rows' worth of time that a tile costs besides its rows: it reads weights for itself."""

SLOTS: dict[str, int] = {"ffn_in": 0, "ffn_out": 1, "qkv": 2, "q": 3, "kv": 4, "o": 5}
"""Where a delta stands in a table; `with_delta` in `triton_ffn.py` knows the first two."""

NORMS: tuple[NormName, ...] = ("attention", "ffn")

# Splitting a sequence's keys over blocks would make its sums depend on its batch; torch 2.12 and
# later can be told not to.
WHOLE_KEYS: dict[str, Any] = (
    {"num_splits": 1} if "num_splits" in inspect.signature(varlen_attn).parameters else {}
)


@dataclass(frozen=True)
class CudaGroups(Groups):
    """Segments as the kernels see them; everything on the device."""

    tiles: Tensor  # [T, 3] int32: segment, first row, end
    table: Tensor  # [L, S, FIELDS] int64
    segments: Tensor | None  # [n] int32: each row's segment, where a task has adapters
    heads: Tensor | None  # [S, L, A], where a task has removed heads
    tile_rows: int
    width: int  # the largest K, filled up to a multiple of the kernels' block
    narrow: bool  # whether neuron numbers are int16, as all tasks of one backbone have them
    ranks: tuple[int, ...]  # for each slot the largest rank, filled up; 0: nobody has a delta there


class CudaOps(TorchOps):
    """fp16, bf16 or fp32 on a GPU, for inference alone: nothing here has a gradient."""

    def __init__(self, dtype: torch.dtype, device: str = "cuda", *, graphs: bool = True) -> None:
        """`graphs`: whether small batches are filled up and, on CUDA, replayed from a recording."""
        super().__init__(dtype, device, shares_layers=True)
        # Without attention for sequences of any lengths a recording would fit one batch alone.
        usable = graphs and (device == "cpu" or dtype != torch.float32)
        self._graphs = Graphs(recording=device != "cpu") if usable else None

    # -- Getting ready ----------------------------------------------------------------------------

    def pack_ffn(
        self, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, activation: Activation
    ) -> Ffn:
        """Slices, or the whole backbone, as the kernels read them: neurons are contiguous rows."""
        return Ffn(
            Linear(w_in.contiguous(), b_in.contiguous(), activation),
            Linear(w_out.contiguous().t(), b_out.contiguous()),
        )

    def tabulate(self, ffn: Sequence[Ffn], adapters: Sequence[Adapter] | None) -> Tensor:
        """Addresses and counts, `[L, FIELDS]` int64 on the CPU; the plan keeps what they are of."""
        rows = [
            _fields(one, Adapter() if adapters is None else adapters[layer])
            for layer, one in enumerate(ffn)
        ]
        return torch.tensor(rows, dtype=torch.int64)

    def group(
        self, ranges: Sequence[slice], networks: Sequence[Network], like: Groups | None = None
    ) -> CudaGroups:
        if like is not None:
            return self._regrouped(ranges, _ours(like))
        tables = [
            self.tabulate(network.ffn, network.adapters) if network.table is None else network.table
            for network in networks
        ]
        table = torch.stack(tables, dim=1)  # [L, S, FIELDS]
        adapted = any(network.adapters is not None for network in networks)
        most = table.amax(dim=(0, 1)).tolist()
        made = CudaGroups(
            tuple(ranges),
            tuple(networks),
            adapted,
            torch.empty(0),
            self._moved(table),
            torch.empty(0) if adapted else None,
            self._kept_heads(networks) if adapted else None,
            0,
            -(-most[kernels.KEPT.value] // kernels.BLOCK.value) * kernels.BLOCK.value,
            _narrow(networks),
            tuple(_filled(most[kernels.DELTAS.value + 3 * slot + 2]) for slot in SLOTS.values()),
        )
        return self._regrouped(ranges, made)

    def _regrouped(self, ranges: Sequence[slice], like: CudaGroups) -> CudaGroups:
        """The same networks over other rows."""
        sizes = np.array([rows.stop - rows.start for rows in ranges])
        tile_rows = tile_rows_for(sizes)
        segments = None
        if like.segments is not None:
            numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
            segments = self._moved(torch.from_numpy(numbers))
        tiles = self._moved(torch.from_numpy(tiles_of(sizes, tile_rows)))
        return dataclasses.replace(
            like, ranges=tuple(ranges), tiles=tiles, segments=segments, tile_rows=tile_rows
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _kept_heads(self, networks: Sequence[Network]) -> Tensor | None:
        kept = [
            None if network.adapters is None else [layer.heads for layer in network.adapters]
            for network in networks
        ]
        known = [heads for layers in kept if layers for heads in layers if heads is not None]
        if not known:
            return None
        every = torch.ones_like(known[0])
        layers = len(networks[0].ffn)
        return torch.stack(
            [
                torch.stack(
                    [every if heads is None else heads for heads in task or [None] * layers]
                )
                for task in kept
            ]
        )

    # -- Computing --------------------------------------------------------------------------------

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, heads: int) -> Tensor:
        if q.is_cuda and q.dtype != torch.float32:
            attended = varlen_attn(
                q.view(len(q), heads, -1),
                k.view(len(k), heads, -1),
                v.view(len(v), heads, -1),
                spans.query_starts,
                spans.key_starts,
                spans.longest_queries,
                spans.longest_keys,
                **WHOLE_KEYS,
            )
            assert isinstance(attended, Tensor)
            return attended.flatten(1)
        if spans.runs:
            return torch_attention(q, k, v, spans.runs, heads)
        return filled_attention(q, k, v, spans, heads)

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        return self._normed(x, residual, norm, None, 0, 0)

    def add_own_norm(
        self, layer: int, name: NormName, x: Tensor, residual: Tensor, norm: Norm, groups: Groups
    ) -> Tensor:
        return self._normed(x, residual, norm, _ours(groups), layer, NORMS.index(name))

    def _normed(
        self,
        x: Tensor,
        residual: Tensor,
        norm: Norm,
        groups: CudaGroups | None,
        layer: int,
        which: int,
    ) -> Tensor:
        own = groups is not None and groups.segments is not None
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        hidden = x.shape[1]
        kernels.add_norm[(len(x),)](
            x.contiguous(),
            residual.contiguous(),
            norm.weight,
            norm.bias,
            y,
            groups.segments if groups is not None and own else norm.weight,
            groups.table[layer] if groups is not None and own else norm.weight,
            norm.eps,
            OWN=own,
            WHICH=which,
            H=hidden,
            WIDTH=1 << (hidden - 1).bit_length(),
            FIELDS=kernels.FIELDS,
            **kernels.OPTIONS,
        )
        return y

    def ffn(self, layer: int, x: Tensor, groups: Groups) -> Tensor:
        """The gathered, grouped network: two launches, and one for each kind of delta."""
        ours = _ours(groups)
        first = ours.networks[0].ffn[layer]
        hidden, tiles = x.shape[1], len(ours.tiles)
        x = x.contiguous()
        inner = x.new_empty(len(x), ours.width)
        common = {"BM": ours.tile_rows, "NARROW": ours.narrow, "H": hidden}
        common |= {"FIELDS": kernels.FIELDS, **kernels.OPTIONS}
        crowd = 1 << min(8, tiles.bit_length())  # few tiles want narrow blocks of neurons
        low = self._shrunk(layer, "ffn_in", x, ours, hidden)
        kernels.inner(lambda meta: (tiles, -(-max(1, ours.width) // meta["BN"])))(
            x,
            x if low is None else low,
            inner,
            ours.tiles,
            ours.table[layer],
            ours.width,
            crowd,
            RANK=ours.ranks[SLOTS["ffn_in"]],
            ACTIVATION=first.inner.activation,
            **common,
        )
        low = self._shrunk(layer, "ffn_out", inner, ours, None)
        y = torch.empty_like(x)
        kernels.outer(lambda meta: (tiles, -(-hidden // meta["BN"])))(
            inner,
            inner if low is None else low,
            y,
            ours.tiles,
            ours.table[layer],
            ours.width,
            crowd,
            RANK=ours.ranks[SLOTS["ffn_out"]],
            **common,
        )
        return y

    def adapt(
        self, layer: int, projection: Projection, x: Tensor, y: Tensor, groups: Groups
    ) -> Tensor:
        ours = _ours(groups)
        low = self._shrunk(layer, projection, x, ours, x.shape[1])
        if low is None:
            return y
        z = torch.empty_like(y, memory_format=torch.contiguous_format)
        outputs = y.shape[1]
        kernels.expand[(len(ours.tiles), -(-outputs // 64))](
            y,
            low,
            z,
            ours.tiles,
            ours.table[layer],
            outputs,
            y.stride(0),
            SLOT=SLOTS[projection],
            RANK=ours.ranks[SLOTS[projection]],
            FIELDS=kernels.FIELDS,
            BM=ours.tile_rows,
            BN=64,
            **kernels.OPTIONS,
        )
        return z

    def _shrunk(
        self, layer: int, delta: str, x: Tensor, groups: CudaGroups, inputs: int | None
    ) -> Tensor | None:
        """A delta's first product `[n, RANK]`; None where nobody has it. `inputs` None: K each."""
        rank = groups.ranks[SLOTS[delta]]
        if not rank:
            return None
        low = x.new_empty(len(x), rank)
        kernels.shrink[(len(groups.tiles),)](
            x,
            low,
            groups.tiles,
            groups.table[layer],
            0 if inputs is None else inputs,
            x.stride(0),
            KEPT_WIDE=inputs is None,
            SLOT=SLOTS[delta],
            RANK=rank,
            FIELDS=kernels.FIELDS,
            BM=groups.tile_rows,
            BK=32 if kernels.INTERPRETED.value else 64,
            **kernels.OPTIONS,
        )
        return low

    def keep_heads(self, layer: int, x: Tensor, groups: Groups) -> Tensor:
        ours = _ours(groups)
        if ours.heads is None or ours.segments is None:
            return x
        kept = ours.heads[:, layer][ours.segments]  # [n, A]
        return (x.view(*kept.shape, -1) * kept[..., None]).flatten(1)

    def classify(
        self, x: Tensor, ranges: Sequence[slice], heads: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """One product of all vectors and all heads; what belongs together is a block of it."""
        weight = torch.cat([weight for weight, _ in heads])
        logits = F.linear(x.float(), weight, torch.cat([bias for _, bias in heads]))
        classes = [len(bias) for _, bias in heads]
        columns = torch.split(logits, classes, dim=1)
        return [part[rows] for rows, part in zip(ranges, columns, strict=True)]

    def launch(self, layers: Layers, x: Tensor, qkv: Tensor | None, work: Work) -> Tensor:
        # What tasks have beside attention is rare: it stays out of the recordings.
        plain = not _ours(work.rows).adapted and not any(_ours(work.rows).ranks)
        if self._graphs is None or qkv is not None or not plain:
            return layers(x, qkv, work)
        return self._graphs.replay(layers, x, work)


def tiles_of(sizes: NDArray[np.int64], tile_rows: int) -> NDArray[np.int32]:
    """Segments of so many rows cut into tiles: `[T, 3]` of segment, first row, end."""
    counts = -(-sizes // tile_rows)
    segment = np.repeat(np.arange(len(sizes)), counts)
    ends = np.cumsum(sizes)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = (ends - sizes)[segment] + within * tile_rows
    last = np.minimum(first + tile_rows, ends[segment])
    return np.stack([segment, first, last], axis=1).astype(np.int32)


def tile_rows_for(sizes: NDArray[np.int64]) -> int:
    """Rows of a tile that suit segments of so many rows: few tiles, and not much of them empty."""
    costs = [int((-(-sizes // rows)).sum()) * (rows + TILE_OVERHEAD) for rows in ROW_TILES]
    return ROW_TILES[costs.index(min(costs))]


def filled_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, heads: int) -> Tensor:
    """Attention by `spans`' starts; rows beyond the last sequence stay zero. For the CPU."""
    result = q.new_zeros(q.shape)
    starts = zip(spans.query_starts.tolist(), spans.key_starts.tolist(), strict=True)
    places = list(starts)
    for (q_start, k_start), (q_end, k_end) in pairwise(places):
        if q_end > q_start:
            one, many = q[q_start:q_end], slice(k_start, k_end)
            by_head = [x.view(len(x), heads, -1).transpose(0, 1) for x in (one, k[many], v[many])]
            out = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2])
            result[q_start:q_end] = out.transpose(0, 1).flatten(1)
    return result


def _fields(ffn: Ffn, adapter: Adapter) -> list[int]:
    """One layer's row of a table, in the order of the columns in `triton_ffn.py`."""
    inner_bias, outer_bias = ffn.inner.bias, ffn.outer.bias
    assert inner_bias is not None, "a network without a bias"
    assert outer_bias is not None, "a network without a bias"
    listed = 0 if ffn.neurons is None else len(ffn.neurons)
    kept = len(inner_bias) if ffn.neurons is None else listed
    row = [
        ffn.inner.weight.data_ptr(),
        inner_bias.data_ptr(),
        ffn.outer.weight.data_ptr(),
        outer_bias.data_ptr(),
        kept,
        0 if ffn.neurons is None else ffn.neurons.data_ptr(),
        listed,
        0 if ffn.scale is None else ffn.scale.data_ptr(),
        0 if ffn.scale is None else kept,
    ]
    deltas: dict[str, LowRank | None] = {"ffn_in": ffn.inner_delta, "ffn_out": ffn.outer_delta}
    deltas.update(adapter.deltas.items())
    for name in SLOTS:
        delta = deltas.get(name)
        row += [0] * 3 if delta is None else _delta_fields(delta)
    for which in NORMS:
        norm = adapter.norms.get(which)
        row += [0] * 2 if norm is None else [norm.weight.data_ptr(), norm.bias.data_ptr()]
    return row


def _delta_fields(delta: LowRank) -> list[int]:
    assert delta.down.is_contiguous() and delta.up.is_contiguous(), "a delta with gaps"  # noqa: PT018
    return [delta.down.data_ptr(), delta.up.data_ptr(), len(delta.down)]


def _filled(rank: int) -> int:
    """The next rank that a kernel is made for: 0 or a power of two from 16 on."""
    return 0 if not rank else max(16, 1 << (rank - 1).bit_length())


def _narrow(networks: Sequence[Network]) -> bool:
    """Whether neuron numbers are int16; also where nobody lists any, so that batches are alike."""
    lists = (network.ffn[0].neurons for network in networks)
    return all(numbers is None or numbers.dtype == torch.int16 for numbers in lists)


def _ours(groups: Groups) -> CudaGroups:
    assert isinstance(groups, CudaGroups), "groups of other operations"
    return groups
