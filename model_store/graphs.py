"""Small batches filled up to a few sizes, so that one CUDA graph serves every batch of a size.

A forward of few rows is over before the CPU has launched its next kernel; a graph launches all of
them at once. It has fixed shapes, so batches are filled up: rows, read rows, sequences, segments
and tiles each to their own power of two. What fills up is inert: sequences without rows, tiles
without rows, and rows that belong to no sequence and no tile. Such rows hold whatever they hold;
each operation works on a row alone or on rows of one sequence or tile, so nothing of them reaches
an answer. On the CPU nothing is recorded, and the same filled-up forward just runs.
"""

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model_store.ops import Layers, Spans, Work

if TYPE_CHECKING:
    from model_store.ops_cuda import CudaGroups

MOST_ROWS = 2048
"""Larger batches keep the GPU busy for longer than their launches take."""

MOST_GRAPHS = 48
"""Recordings kept; the least recently used goes first."""


@dataclass(frozen=True)
class Size:
    """What a recording is made for: everything that a launch's shape depends on."""

    rows: int
    reads: int
    sequences: int
    tiles: int
    read_tiles: int
    segments: int
    tile_rows: int
    read_tile_rows: int
    width: int
    longest: int
    longest_read: int
    narrow: bool


@dataclass(frozen=True)
class _Recording:
    graph: "torch.cuda.CUDAGraph"
    inputs: list[Tensor]
    output: Tensor  # [reads, H]


class Graphs:
    """Runs small batches at one of a few sizes; knows nothing of what the layers compute."""

    def __init__(self, *, recording: bool) -> None:
        self._recording = recording
        self._recordings: OrderedDict[tuple[Size, Layers], _Recording] = OrderedDict()
        self._pool: Any = None

    def replay(self, layers: Layers, x: Tensor, work: Work) -> Tensor:
        """`layers(x, None, work)`, filled up and recorded where the batch is small enough."""
        if len(x) > MOST_ROWS:
            return layers(x, None, work)
        reads = len(work.read_rows)
        size = size_of(x, work)
        x, work = filled(x, work, size)
        if not self._recording:
            return layers(x, None, work)[:reads]
        # Plans' weights are reached through the table, the backbone's are those of `layers`.
        key = size, layers
        recording = self._recordings.pop(key, None) or self._record(layers, x, work)
        self._recordings[key] = recording
        if len(self._recordings) > MOST_GRAPHS:
            self._recordings.popitem(last=False)
        for static, given in zip(recording.inputs, _tensors(x, work), strict=True):
            static.copy_(given, non_blocking=True)
        recording.graph.replay()
        # The next replay writes over the recording's output.
        return recording.output[:reads].clone()

    def _record(self, layers: Layers, x: Tensor, work: Work) -> _Recording:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and tuned before the recording
            for _ in range(2):
                layers(x, None, work)
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = layers(x, None, work)
        return _Recording(graph, _tensors(x, work), output)


def size_of(x: Tensor, work: Work) -> Size:
    """The size that a batch is filled up to."""
    rows, reads = _ours(work.rows), _ours(work.reads)
    return Size(
        _power(len(x), 64),
        _power(len(work.read_rows), 8),
        _power(len(work.spans.key_starts) - 1, 8),
        _power(len(rows.tiles), 4),
        _power(len(reads.tiles), 4),
        _power(len(rows.networks), 1),
        rows.tile_rows,
        reads.tile_rows,
        _power(rows.width, 64),
        _power(work.spans.longest_keys, 64),
        _power(work.read_spans.longest_queries, 1),
        rows.narrow,
    )


def filled(x: Tensor, work: Work, size: Size) -> tuple[Tensor, Work]:
    """The batch with as many inert rows, sequences, segments and tiles as `size` asks for."""
    return _more(x, size.rows), Work(
        _filled_spans(work.spans, size.sequences, size.longest, size.longest),
        _filled_spans(work.read_spans, size.sequences, size.longest_read, size.longest),
        _more(work.read_rows, size.reads),  # row 0, read once more
        _filled_groups(_ours(work.rows), size.tiles, size),
        _filled_groups(_ours(work.reads), size.read_tiles, size),
    )


def _filled_spans(spans: Spans, sequences: int, queries: int, keys: int) -> Spans:
    """Sequences without rows at the end; `queries` and `keys` bound every batch of the size."""
    more = sequences + 1 - len(spans.key_starts)

    def longer(starts: Tensor) -> Tensor:
        return torch.cat([starts, starts[-1:].expand(more)])

    return Spans((), longer(spans.query_starts), longer(spans.key_starts), queries, keys)


def _filled_groups(groups: "CudaGroups", tiles: int, size: Size) -> "CudaGroups":
    table = groups.table
    more = table.new_zeros(len(table), size.segments - table.shape[1], table.shape[2])
    return dataclasses.replace(
        groups,
        tiles=_more(groups.tiles, tiles),
        table=torch.cat([table, more], dim=1),
        width=size.width,
    )


def _more(x: Tensor, rows: int) -> Tensor:
    """`x` with zeros below, up to so many rows."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _tensors(x: Tensor, work: Work) -> list[Tensor]:
    """Everything that differs between batches of one size."""
    rows, reads = _ours(work.rows), _ours(work.reads)
    return [
        x,
        work.spans.query_starts,
        work.spans.key_starts,
        work.read_spans.query_starts,
        work.read_spans.key_starts,
        work.read_rows,
        rows.tiles,
        rows.table,
        reads.tiles,
        reads.table,
    ]


def _power(count: int, least: int) -> int:
    return max(least, 1 << max(0, count - 1).bit_length())


def _ours(groups: object) -> "CudaGroups":
    from model_store.ops_cuda import CudaGroups

    assert isinstance(groups, CudaGroups), "groups of other operations"
    return groups
