"""Builds every batch: sequences of several tasks laid end to end, real tokens only.

Sequences are grouped by task into segments, and sorted by length inside a segment, so that equal
lengths stand together. Knows nothing of weights; works on numbers alone.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_store.ops import Run, Spans
from model_store.tokenization import Encoding

Read = Literal["cls", "mask", "mean"]

Record = TypeVar("Record", "Batch", Spans)


@dataclass(frozen=True)
class Item:
    """One sequence to pack: its tokens, and which segment (task) of the batch it belongs to."""

    encoding: Encoding
    segment: int


@dataclass(frozen=True)
class Layout:
    """What packing must know of a segment's task."""

    prompt_tokens: int
    """P"""
    read: Read


@dataclass(frozen=True)
class Segment:
    """A run of packed sequences of one task; half-open ranges."""

    rows: slice
    """Packed tokens."""
    reads: slice
    """Rows of `Batch.read_rows`."""
    sequences: slice
    prompt_rows: slice
    """Rows of the task's prompt in the concatenation that `Batch.source` indexes."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences: M text tokens, N packed tokens (text and prompts), B sequences, S segments.

    `source [N]` says where packed token i comes from in the concatenation of the M text rows and
    each segment's P prompt rows: every prompt is computed once, however many sequences share it.
    It is None where no segment has a prompt, and packed order is text order.
    """

    token_ids: Tensor  # [M] int64
    token_types: Tensor  # [M] int64
    positions: Tensor  # [M] int64, without the backbone's offset
    source: Tensor | None  # [N] int64
    read_rows: Tensor  # [R] int64: packed rows that the heads read
    read_sequence: Tensor  # [R] int64: the sequence that each read row belongs to
    segments: tuple[Segment, ...]
    spans: Spans  # all rows as queries
    read_spans: Spans  # read rows alone as queries
    order: tuple[int, ...]  # order[i] is the index, in the caller's items, of packed sequence i

    @property
    def sequences(self) -> int:
        """B"""
        return len(self.order)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Lengths of the sequences."""
        return self.spans.runs

    def to(self, device: str) -> "Batch":
        """The batch with its tensors on `device`."""
        return self if device == "cpu" else _moved(self, device)


def pack(items: Sequence[Item], layouts: Sequence[Layout]) -> Batch:
    """Pack at least one item; `layouts[s]` describes segment s. Every segment must have an item."""
    order = sorted(
        range(len(items)), key=lambda i: (items[i].segment, len(items[i].encoding.token_ids))
    )
    by_segment: list[list[Encoding]] = [[] for _ in layouts]
    for index in order:
        by_segment[items[index].segment].append(items[index].encoding)
    assert all(by_segment), f"segment without items in {[len(group) for group in by_segment]}"

    text_tokens = sum(len(item.encoding.token_ids) for item in items)
    has_prompt = any(layout.prompt_tokens for layout in layouts)
    segments: list[Segment] = []
    positions: list[NDArray[np.int64]] = []
    sources: list[NDArray[np.int64]] = []
    reads: list[NDArray[np.int64]] = []
    read_counts: list[int] = []
    lengths: list[tuple[int, int]] = []
    text_row = row = read = sequence = 0
    prompt_row = text_tokens
    for layout, encodings in zip(layouts, by_segment, strict=True):
        first_row, first_read, first_sequence = row, read, sequence
        prompt = np.arange(prompt_row, prompt_row + layout.prompt_tokens)
        for encoding in encodings:
            count = len(encoding.token_ids)
            text = np.arange(text_row, text_row + count)
            sources.append(np.concatenate([text[:1], prompt, text[1:]]))
            # The prompt stands after the first token: every later token moves on by P.
            position = np.arange(count) + layout.prompt_tokens
            position[0] = 0
            positions.append(position)
            rows = _read_rows(layout, encoding) + row
            reads.append(rows)
            read_counts.append(len(rows))
            lengths.append((len(rows), count + layout.prompt_tokens))
            text_row += count
            row += count + layout.prompt_tokens
            read += len(rows)
            sequence += 1
        segments.append(
            Segment(
                slice(first_row, row),
                slice(first_read, read),
                slice(first_sequence, sequence),
                slice(prompt_row, prompt_row + layout.prompt_tokens),
            )
        )
        prompt_row += layout.prompt_tokens
    packed = [encoding for group in by_segment for encoding in group]
    return Batch(
        torch.tensor([token for encoding in packed for token in encoding.token_ids]),
        torch.tensor([kind for encoding in packed for kind in encoding.token_types]),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(np.concatenate(sources)) if has_prompt else None,
        torch.from_numpy(np.concatenate(reads)),
        torch.from_numpy(np.repeat(np.arange(sequence), read_counts)),
        tuple(segments),
        _spans([(keys, keys) for _, keys in lengths]),
        _spans(lengths),
        tuple(order),
    )


def _moved(record: Record, device: str) -> Record:
    """A record with all tensors in it, and in the records in it, on `device`."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = value.to(device, non_blocking=True)
        elif isinstance(value, Spans):
            changed[field.name] = _moved(value, device)
    return dataclasses.replace(record, **changed)


def _read_rows(layout: Layout, encoding: Encoding) -> NDArray[np.int64]:
    """Rows of one sequence, counted from its first packed row, that its head reads."""
    if layout.read == "cls":
        return np.zeros(1, dtype=np.int64)
    if layout.read == "mask":
        return np.array([encoding.mask + layout.prompt_tokens], dtype=np.int64)
    if layout.read == "mean":  # all text tokens, the soft prompt left out
        rows = np.arange(len(encoding.token_ids), dtype=np.int64) + layout.prompt_tokens
        rows[0] = 0
        return rows
    raise ValueError(f"unknown read position {layout.read!r}")


def _spans(lengths: Sequence[tuple[int, int]]) -> Spans:
    """Sequences of so many queries and keys each."""
    counts = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    queries, keys = (max(column) for column in zip(*lengths, strict=True))
    return Spans(
        _runs(lengths), starts[:, 0].contiguous(), starts[:, 1].contiguous(), queries, keys
    )


def _runs(lengths: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    """Neighbouring sequences of equal (queries, keys) as one run."""
    runs: list[Run] = []
    for queries, keys in lengths:
        if runs and (runs[-1].queries, runs[-1].keys) == (queries, keys):
            runs[-1] = Run(runs[-1].count + 1, queries, keys)
        else:
            runs.append(Run(1, queries, keys))
    return tuple(runs)
