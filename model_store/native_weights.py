"""A backbone's weights in the layouts that the native forward reads, by name.

`native/forward.cpp` says what each is. Made once from the backbone's tensors; knows nothing of
where they are kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model_store.backbone import EncoderConfig

Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""Number formats of all backends; the native forward has no fp16."""

COLUMNS = 64
"""Outputs that are computed together; widths in memory are multiples of it."""
LANES = 16

Named = tuple[str, Tensor]


@dataclass(frozen=True)
class Widths:
    """Sizes in memory, filled up from a backbone's own."""

    heads: int
    head: int
    """d"""
    head_padded: int
    """dp"""
    attention: int
    """AD"""
    hidden: int
    """Hp"""
    embedding: int
    """Ep"""

    @classmethod
    def of(cls, config: EncoderConfig) -> "Widths":
        """Those of a backbone."""
        head = config.hidden // config.heads
        padded = multiple(head, 32)
        attention = multiple(config.heads * padded, COLUMNS)
        hidden, embedding = multiple(config.hidden, COLUMNS), multiple(config.embedding, COLUMNS)
        return cls(config.heads, head, padded, attention, hidden, embedding)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows `[a d, ...]` of heads with each head's width filled up: `[a dp, ...]`."""
        heads = rows.reshape(len(rows) // self.head, self.head, *rows.shape[1:])
        return tall(heads.transpose(0, 1), self.head_padded).transpose(0, 1).flatten(0, 1)


def low_precision(precision: Precision) -> torch.dtype:
    """What weights are kept in where they are not bytes."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def weights(
    config: EncoderConfig, tensors: Mapping[str, Tensor], precision: Precision
) -> Iterator[Named]:
    """Everything that `native._Model` points to, one after the other; tensors as in `shapes`."""
    widths, low = Widths.of(config), low_precision(precision)
    yield "words", wide(tensors["embeddings.word"], widths.embedding).to(low)
    yield "positions", wide(tensors["embeddings.position"].float(), widths.embedding)
    yield from _norm("embedding_norm", tensors, "embeddings.norm", widths.embedding)
    if config.token_types:
        yield "types", wide(tensors["embeddings.token_type"].float(), widths.embedding)
    if config.embedding != config.hidden:
        weight = wide(tensors["embeddings.projection.weight"].float(), widths.embedding)
        yield "projection.panels", panels(weight, low, COLUMNS)
        bias = tensors["embeddings.projection.bias"].float()
        yield "projection.bias", wide(bias, widths.hidden)
    for number in range(config.layers):
        layer = _Layer(f"layers.{number}", tensors, config, widths, precision)
        for name, tensor in layer.weights():
            yield f"{number}.{name}", tensor


@dataclass(frozen=True)
class _Layer:
    name: str
    tensors: Mapping[str, Tensor]
    config: EncoderConfig
    widths: Widths
    precision: Precision

    def weights(self) -> Iterator[Named]:
        yield from self._attention()
        yield from self._ffn()
        for norm in ("attention_norm", "ffn_norm"):
            yield from _norm(norm, self.tensors, f"{self.name}.{norm}", self.widths.hidden)

    def _attention(self) -> Iterator[Named]:
        widths = self.widths
        weight, bias = (
            self._own(f"qkv.{part}").view(3, self.config.hidden, -1) for part in ("weight", "bias")
        )
        weight = torch.stack([tall(widths.spread(part), widths.attention) for part in weight])
        bias = torch.stack([tall(widths.spread(part), widths.attention) for part in bias])
        yield from self._linear("qkv", wide(weight.flatten(0, 1), widths.hidden), bias.flatten())
        weight = widths.spread(self._own("attention_out.weight").t()).t()
        weight = tall(wide(weight, widths.attention), widths.hidden)
        yield from self._linear("out", weight, wide(self._own("attention_out.bias"), widths.hidden))
        if self.precision == "int8":
            rows, _ = quantised(weight)
            by_head = rows[:, : widths.heads * widths.head_padded].view(
                widths.hidden, widths.heads, -1
            )
            yield "out.sums_of_heads", by_head.sum(2, dtype=torch.int32).t().contiguous()

    def _ffn(self) -> Iterator[Named]:
        hidden = self.widths.hidden
        w_in, w_out = (
            wide(self._own("ffn_in.weight"), hidden),
            wide(self._own("ffn_out.weight"), hidden),
        )
        yield "b_in", self._own("ffn_in.bias").contiguous()
        yield "b_out", wide(self._own("ffn_out.bias"), hidden)
        if self.precision == "int8":
            w_in, scales = quantised(w_in)
            yield "in_scales", scales
            yield "in_sums", w_in.sum(1, dtype=torch.int32)
            columns, scales = quantised(w_out.t())
            w_out = columns.t()
            yield "out_scales", scales
        else:
            low = low_precision(self.precision)
            w_in, w_out = w_in.to(low), w_out.to(low)
        yield "w_in", w_in.contiguous()
        # 64 outputs of all neurons stand together, so that gathering reads whole cache lines.
        yield "w_out", w_out.view(-1, hidden // 64, 64).transpose(0, 1).contiguous()

    def _linear(self, name: str, weight: Tensor, bias: Tensor) -> Iterator[Named]:
        """`weight [O, I]` and `bias [O]`, both widths filled up already."""
        yield f"{name}.bias", bias.contiguous()
        if self.precision != "int8":
            yield f"{name}.panels", panels(weight, low_precision(self.precision), COLUMNS)
            return
        rows, scales = quantised(weight)
        yield f"{name}.panels", panels(rows, torch.int8, COLUMNS)
        yield f"{name}.scales", scales
        yield f"{name}.sums", rows.sum(1, dtype=torch.int32)

    def _own(self, name: str) -> Tensor:
        return self.tensors[f"{self.name}.{name}"].float()


def _norm(name: str, tensors: Mapping[str, Tensor], source: str, width: int) -> Iterator[Named]:
    for part in ("weight", "bias"):
        yield f"{name}.{part}", wide(tensors[f"{source}.{part}"].float(), width)


def multiple(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step


def wide(x: Tensor, width: int) -> Tensor:
    """`x [..., n]` filled up with zeros to `[..., width]`, contiguous."""
    return F.pad(x, (0, width - x.shape[-1])).contiguous()


def tall(x: Tensor, height: int) -> Tensor:
    """`x [n, ...]` filled up with zeros to `[height, ...]`."""
    more = x.new_zeros(height - len(x), *x.shape[1:])
    return torch.cat([x, more]) if len(more) else x


def panels(weight: Tensor, dtype: torch.dtype, outputs: int) -> Tensor:
    """`weight [O, I]` in panels: `[O / 16, units, 16, elements of a unit]`; see `native/product.h`.

    O is filled up to a multiple of `outputs`, I to whole units.
    """
    per_unit = 4 // dtype.itemsize
    weight = wide(tall(weight, multiple(len(weight), outputs)), multiple(weight.shape[1], per_unit))
    shape = len(weight) // LANES, LANES, weight.shape[1] // per_unit, per_unit
    units = weight.to(dtype).view(shape)
    return units.transpose(1, 2).contiguous()


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [O, I]` as int8 with a factor for each output `[O]`."""
    scales = weight.abs().amax(1).clamp_min(1e-30) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales
