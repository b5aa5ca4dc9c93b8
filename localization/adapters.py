"""What recovery trains besides prompt and head: low-rank deltas, norms, scales of neurons.

Here they start, are cut down with the network, and lose rank where a layer matters little. Their
names and meaning are in `model_store.plan`. Knows nothing of training.

Letters: `H` hidden, `K` kept neurons, `F` FFN width, `a` kept heads, `d` a head's width, `r` rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from localization.selection import Kept
from model_store.backbone import EncoderConfig


def new_deltas(
    config: EncoderConfig, rank: int, *, attention: bool, seed: int
) -> dict[str, Tensor]:
    """Deltas of the whole network that change nothing yet: `down` random, `up` zero (LoRA)."""
    generator = torch.Generator().manual_seed(seed)
    sides = {"ffn_in": (config.hidden, config.ffn), "ffn_out": (config.ffn, config.hidden)}
    if attention:
        sides |= dict.fromkeys(("q", "k", "v", "o"), (config.hidden, config.hidden))
    result = {}
    for layer in range(config.layers):
        for part, (inputs, outputs) in sides.items():
            down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            result[f"delta.{layer}.{part}.down"] = down
            result[f"delta.{layer}.{part}.up"] = torch.zeros(outputs, rank)
    return result


def new_scales(config: EncoderConfig) -> dict[str, Tensor]:
    """Scales of all neurons, and changes of the FFN's output bias, that change nothing yet."""
    result = {}
    for layer in range(config.layers):
        result[f"ffn.{layer}.scale"] = torch.ones(config.ffn)
        result[f"ffn.{layer}.bias"] = torch.zeros(config.hidden)
    return result


def new_norms(config: EncoderConfig, backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's LayerNorms, as the task's own to change."""
    return {
        f"norm.{layer}.{norm}.{part}": backbone[f"layers.{layer}.{norm}_norm.{part}"].float()
        for layer in range(config.layers)
        for norm in ("attention", "ffn")
        for part in ("weight", "bias")
    }


def cut(tensors: Mapping[str, Tensor], kept: Kept, config: EncoderConfig) -> dict[str, Tensor]:
    """`tensors` of the whole network with the rows and columns of what is kept alone."""
    width = config.hidden // config.heads
    columns = torch.arange(config.hidden).view(config.heads, width)
    result = dict(tensors)
    for layer, neurons in enumerate(kept.neurons):
        sides = {f"ffn.{layer}.scale": (0, neurons.long())}
        sides[f"delta.{layer}.ffn_in.up"] = (0, neurons.long())
        sides[f"delta.{layer}.ffn_out.down"] = (1, neurons.long())
        if kept.heads is not None:
            attended = columns[kept.heads[layer].long()].flatten()
            sides |= {f"delta.{layer}.{part}.up": (0, attended) for part in "qkv"}
            sides[f"delta.{layer}.o.down"] = (1, attended)
        for name, (side, rows) in sides.items():
            if name in result:
                result[name] = result[name].index_select(side, rows)
    return without_empty(result)


def without_empty(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the deltas of maps that have no input or no output left."""
    empty = {
        name.rsplit(".", 1)[0]
        for name, tensor in tensors.items()
        if name.startswith("delta.") and not tensor.numel()
    }
    return {name: tensor for name, tensor in tensors.items() if name.rsplit(".", 1)[0] not in empty}


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both changes at once: deltas stand beside one another, biases add up."""
    result = {**first}
    for name, tensor in second.items():
        if name not in first:
            result[name] = tensor
        elif name.endswith(".down"):
            result[name] = torch.cat([first[name], tensor])
        elif name.endswith(".up"):
            result[name] = torch.cat([first[name], tensor], dim=1)
        elif name.startswith("ffn.") and name.endswith(".bias"):
            result[name] = first[name] + tensor
        else:
            raise ValueError(f"two changes of {name!r} cannot be joined")
    return result


def with_ranks(tensors: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[str, Tensor]:
    """Deltas cut to `ranks[l]` in layer l: the closest ones of that rank, by their SVD."""
    result = dict(tensors)
    for name in tensors:
        if not (name.startswith("delta.") and name.endswith(".down")):
            continue
        stem, layer = name.removesuffix(".down"), int(name.split(".")[1])
        down, up = tensors[name], tensors[f"{stem}.up"]
        if len(down) > ranks[layer]:
            u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
            root = s[: ranks[layer]].sqrt()
            result[f"{stem}.up"] = u[:, : ranks[layer]] * root
            result[name] = root[:, None] * v[: ranks[layer]]
    return result


def layer_importance(head_scores: Tensor) -> Tensor:
    """How much each layer matters, `[L]`, from `head_scores [L, A]` (Pruning-Adapter, eq. 2).

    Each layer's scores over their norm, all brought to 0 to 1, and the mean over the layer's heads.
    """
    scaled = head_scores / head_scores.norm(dim=1, keepdim=True).clamp(min=1e-12)
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min()).clamp(min=1e-12)
    importance: Tensor = scaled.mean(dim=1)
    return importance
