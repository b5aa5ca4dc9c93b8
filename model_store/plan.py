"""What the forward runs for one task: an overlay's slices, made ready, and changes beside them.

A task may change the backbone: low-rank deltas, its own LayerNorms, scales of neurons. Serving has
these *merged* into the slices that the plan gathers anyway (`merged`), so that they cost nothing;
tuning keeps them *beside* frozen slices (`beside`), where they have gradients of their own size.
Where all tasks of a batch share the backbone's layers (`Ops.shares_layers`), serving keeps them
beside, too (`adapter`, `ffn_beside`), and copies no weight. All three give the same answers.
`Changes` holds them by their names in an artifact:

    delta.{l}.{part}.down [r, I] and .up [O, r]    part: q, k, v, o, ffn_in, ffn_out
    norm.{l}.attention.weight/bias [H], norm.{l}.ffn.weight/bias [H]
    ffn.{l}.scale [K], ffn.{l}.bias [H]            the neurons' scales; added to the output's bias

Letters: `H` hidden, `K` kept neurons, `P` prompt length, `E` embedding width, `C` classes,
`r` rank, `a` kept heads, `d` a head's width, `I` and `O` widths of a linear map.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from model_store.ops import Adapter, Ffn, Linear, LowRank, Norm, NormName, Projection
from model_store.packing import Layout, Read

Part = Literal["q", "k", "v", "heads", "o", "ffn_in", "ffn_out"]
"""An activation inside a layer: outputs of the linear maps, and `heads`, what attention gives."""

Gate = Callable[[int, Part, Tensor], Tensor]
"""Called with layer, part and activation `[n, width]`; what it returns takes its place."""

Changes = Mapping[str, Tensor]
"""What a task changes in its layers, by artifact tensor name; see the top of this file."""

UNCHANGED: Changes = MappingProxyType({})


@dataclass(frozen=True)
class Layer:
    """One encoder layer's attention and norms, made ready by `Ops`; its FFN is in the `Plan`."""

    projections: tuple[Linear, ...]  # (qkv,) H -> 3ad; in the last layer (q, kv)
    attention_out: Linear  # ad -> H
    heads: int  # a
    attention_norm: Norm
    ffn_norm: Norm


@dataclass(frozen=True)
class PromptCache:
    """A prompt's rows as they enter layer 0: the same for every request of the task."""

    hidden: Tensor  # [P, H]
    qkv: Tensor  # [P, 3ad]


@dataclass(frozen=True)
class LinearHead:
    """`logits = read @ weight.T + bias`, in fp32."""

    weight: Tensor  # [C, H]
    bias: Tensor  # [C]


@dataclass(frozen=True)
class VerbalizerHead:
    """The MLM decoder's rows of the label tokens, in fp32."""

    weight: Tensor  # [C, E]
    bias: Tensor  # [C]


@dataclass(frozen=True)
class Plan:
    """An overlay made ready to run: per-layer slices, prompt, head.

    `layers` is None for a task that shares the backbone's attention and norms with others; what it
    changes there is then in `adapters`. Tasks with layers of their own share no work, so each is a
    batch by itself.

    `gate` sees and replaces activations; only localization and tests give one. A gate of ones has
    the attribution as its gradient, and a gate of 0 and 1 is the pruned network.
    """

    read: Read
    head: LinearHead | VerbalizerHead
    ffn: tuple[Ffn, ...]
    prompt: Tensor | None = None  # [P, E]
    prompt_cache: PromptCache | None = None
    layers: tuple[Layer, ...] | None = None
    adapters: tuple[Adapter, ...] | None = None
    table: Tensor | None = None  # made by `Ops.tabulate`
    gate: Gate | None = None

    @property
    def layout(self) -> Layout:
        """What `packing.pack` must know of this plan."""
        return Layout(0 if self.prompt is None else len(self.prompt), self.read)


def own_bytes(plan: Plan) -> int:
    """Memory of what a plan holds for itself: the backbone's weights that it reads are not its own.

    A tensor that stands in two places is counted once.
    """
    tensors = [plan.prompt, plan.head.weight, plan.head.bias, plan.table]
    if plan.prompt_cache is not None:
        tensors += [plan.prompt_cache.hidden, plan.prompt_cache.qkv]
    maps: list[Linear | Norm] = []
    deltas: list[LowRank | None] = []
    for ffn in plan.ffn:
        maps += [] if ffn.neurons is not None else [ffn.inner, ffn.outer]
        tensors += [ffn.neurons, ffn.scale]
        if ffn.neurons is not None and ffn.scale is not None:  # whose bias is then shifted, too
            tensors.append(ffn.outer.bias)
        deltas += [ffn.inner_delta, ffn.outer_delta]
    for layer in plan.layers or ():
        maps += [*layer.projections, layer.attention_out, layer.attention_norm, layer.ffn_norm]
    for one in plan.adapters or ():
        maps += one.norms.values()
        deltas += one.deltas.values()
        tensors.append(one.heads)
    tensors += [part.weight for part in maps] + [part.bias for part in maps]
    tensors += [side for delta in deltas if delta is not None for side in (delta.down, delta.up)]
    known = {id(tensor): tensor for tensor in tensors if tensor is not None}
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in known.values())


def owns_layers(changes: Changes) -> bool:
    """Whether the changes reach further than the FFN, so that a plan needs layers of its own."""
    return any(
        name.startswith("norm.") or (name.startswith("delta.") and ".ffn_" not in name)
        for name in changes
    )


def merged(weight: Tensor, changes: Changes, name: str) -> Tensor:
    """`weight [O, I]` with the delta called `name` added, in fp32 until the last rounding."""
    down, up = changes.get(f"{name}.down"), changes.get(f"{name}.up")
    if down is None or up is None:
        return weight
    product = up.to(weight.device).float() @ down.to(weight.device).float()
    return (weight.float() + product).to(weight.dtype)


def norm_with(norm: Norm, changes: Changes, name: str) -> Norm:
    """The norm, or the task's own called `name`, in the same precision."""
    weight, bias = changes.get(f"{name}.weight"), changes.get(f"{name}.bias")
    if weight is None or bias is None:
        return norm
    return Norm(weight.to(norm.weight), bias.to(norm.bias), norm.eps)


def adapter(
    changes: Changes, number: int, heads: Tensor | None, norm: Norm, count: int, *, last: bool
) -> Adapter:
    """Layer `number`'s changes of attention and norms beside shared layers of `count` heads.

    Deltas of a task with removed heads have the kept heads `[a]` alone; here they get zeros at
    the others. Everything takes the precision, the device and the epsilon of `norm`.
    """
    deltas: dict[Projection, LowRank] = {}
    hidden = len(norm.weight)
    rows = slice(None) if heads is None else _head_rows(heads, hidden // count)
    name = f"delta.{number}"
    if f"{name}.q.down" in changes:
        downs = [changes[f"{name}.{part}.down"].to(norm.weight) for part in "qkv"]
        ups = [
            _spread(changes[f"{name}.{part}.up"], rows, hidden).to(norm.weight) for part in "qkv"
        ]
        if last:
            deltas["q"] = LowRank(downs[0], ups[0])
            deltas["kv"] = LowRank(torch.cat(downs[1:]), _diagonal(ups[1:]))
        else:
            deltas["qkv"] = LowRank(torch.cat(downs), _diagonal(ups))
    if f"{name}.o.down" in changes:
        down = _spread(changes[f"{name}.o.down"].t(), rows, hidden).t()
        deltas["o"] = LowRank(
            down.to(norm.weight).contiguous(), changes[f"{name}.o.up"].to(norm.weight)
        )
    names: tuple[NormName, ...] = ("attention", "ffn")
    norms = {
        which: norm_with(norm, changes, f"norm.{number}.{which}")
        for which in names
        if f"norm.{number}.{which}.weight" in changes
    }
    kept = None
    if heads is not None:
        kept = norm.weight.new_zeros(count)
        kept[heads.long()] = 1
    return Adapter(deltas, norms, kept)


def ffn_beside(whole: Ffn, neurons: Tensor, changes: Changes, number: int) -> Ffn:
    """The backbone's `whole` network of layer `number` cut down to `neurons [K]` without a copy."""
    like = whole.inner.weight
    shift, scale = changes.get(f"ffn.{number}.bias"), changes.get(f"ffn.{number}.scale")
    outer = whole.outer
    if shift is not None and outer.bias is not None:
        outer = Linear(outer.weight, (outer.bias.float() + shift.to(like.device)).to(like.dtype))
    narrow = torch.int16 if len(like) <= torch.iinfo(torch.int16).max else torch.int32
    return Ffn(
        whole.inner,
        outer,
        None if scale is None else scale.to(like),
        neurons.to(device=like.device, dtype=narrow),
        _low_rank(changes, f"delta.{number}.ffn_in", like),
        _low_rank(changes, f"delta.{number}.ffn_out", like),
    )


def _low_rank(changes: Changes, name: str, like: Tensor) -> LowRank | None:
    if f"{name}.down" not in changes:
        return None
    down, up = changes[f"{name}.down"].to(like), changes[f"{name}.up"].to(like)
    return LowRank(down.contiguous(), up.contiguous())


def _head_rows(heads: Tensor, width: int) -> Tensor:
    """Rows of the kept heads `[a]` among those of all: `[ad]`."""
    return (heads.long()[:, None] * width + torch.arange(width)).flatten()


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The blocks along the diagonal of a matrix of zeros."""
    result: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return result


def _spread(rows: Tensor, places: Tensor | slice, count: int) -> Tensor:
    """`rows [n, r]` at their `places` among `count` rows, zeros elsewhere."""
    result = rows.new_zeros(count, rows.shape[1])
    result[places] = rows
    return result


def beside(plan: Plan, changes: Changes) -> Plan:
    """`plan`, made without changes, with them beside its frozen weights: differentiable.

    A plan must have layers of its own where the changes reach further than the FFN; what it has
    cached of its prompt, which went through unchanged layers, it then loses.
    """
    assert plan.layers is not None or not owns_layers(changes), "changes without layers to change"
    ffn = tuple(_ffn_beside(ffn, changes, number) for number, ffn in enumerate(plan.ffn))
    if plan.layers is None:
        return dataclasses.replace(plan, ffn=ffn)
    layers = tuple(
        _layer_beside(layer, changes, f"{number}") for number, layer in enumerate(plan.layers)
    )
    return dataclasses.replace(plan, ffn=ffn, layers=layers, prompt_cache=None)


def _ffn_beside(ffn: Ffn, changes: Changes, number: int) -> Ffn:
    name = f"delta.{number}"
    inner = _linear_beside(ffn.inner, changes, (f"{name}.ffn_in",))
    outer = _linear_beside(ffn.outer, changes, (f"{name}.ffn_out",))
    shift, scale = changes.get(f"ffn.{number}.bias"), changes.get(f"ffn.{number}.scale")
    if shift is not None and outer.bias is not None:
        outer = dataclasses.replace(outer, bias=outer.bias + shift.to(outer.bias))
    if scale is not None:
        scale = scale.to(outer.weight)
    return Ffn(inner, outer, scale)


def _layer_beside(layer: Layer, changes: Changes, number: str) -> Layer:
    name = f"delta.{number}"
    parts: tuple[tuple[str, ...], ...] = ((f"{name}.q", f"{name}.k", f"{name}.v"),)
    if len(layer.projections) == 2:  # the last layer
        parts = ((f"{name}.q",), (f"{name}.k", f"{name}.v"))
    return Layer(
        tuple(
            _linear_beside(linear, changes, names)
            for linear, names in zip(layer.projections, parts, strict=True)
        ),
        _linear_beside(layer.attention_out, changes, (f"{name}.o",)),
        layer.heads,
        norm_with(layer.attention_norm, changes, f"norm.{number}.attention"),
        norm_with(layer.ffn_norm, changes, f"norm.{number}.ffn"),
    )


def _linear_beside(linear: Linear, changes: Changes, names: tuple[str, ...]) -> Linear:
    """The linear map with the deltas of its parts, which stand below one another in it."""
    if f"{names[0]}.down" not in changes:
        return linear
    # The product has the weight's size, and one product of that size is faster than two thin ones.
    delta = torch.cat([changes[f"{name}.up"] @ changes[f"{name}.down"] for name in names])
    return dataclasses.replace(linear, delta=delta.to(linear.weight))
