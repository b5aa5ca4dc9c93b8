"""Reads a Hugging Face checkpoint: which tensor of which family is which tensor of ours.

Families differ here by tables of names and in `EncoderConfig` by values; the encoder itself does
not know them. Reads safetensors only. Knows nothing of the store.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_store.errors import BackboneError, UnsupportedCheckpointError

_BERT_ENCODER = {
    r"embeddings\.word_embeddings\.weight": "embeddings.word",
    r"embeddings\.position_embeddings\.weight": "embeddings.position",
    r"embeddings\.token_type_embeddings\.weight": "embeddings.token_type",
    r"embeddings\.LayerNorm\.(weight|bias)": r"embeddings.norm.\1",
    r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(weight|bias)": r"layers.\1.\2.\3",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)": (
        r"layers.\1.attention_out.\2"
    ),
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(weight|bias)": (
        r"layers.\1.attention_norm.\2"
    ),
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)": r"layers.\1.ffn_in.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)": r"layers.\1.ffn_out.\2",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(weight|bias)": r"layers.\1.ffn_norm.\2",
}
_ROBERTA = _BERT_ENCODER | {
    r"lm_head\.dense\.(weight|bias)": r"mlm.dense.\1",
    r"lm_head\.layer_norm\.(weight|bias)": r"mlm.norm.\1",
    r"lm_head\.decoder\.weight": "mlm.decoder.weight",
    r"lm_head\.decoder\.bias": "mlm.decoder.bias",
    r"lm_head\.bias": "mlm.bias",
}
# Per family: source name -> our name. Every name is a full-match pattern.
_NAMES: dict[str, dict[str, str]] = {
    "bert": _BERT_ENCODER
    | {
        r"cls\.predictions\.transform\.dense\.(weight|bias)": r"mlm.dense.\1",
        r"cls\.predictions\.transform\.LayerNorm\.(weight|bias)": r"mlm.norm.\1",
        r"cls\.predictions\.decoder\.weight": "mlm.decoder.weight",
        r"cls\.predictions\.decoder\.bias": "mlm.decoder.bias",
        r"cls\.predictions\.bias": "mlm.bias",
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": {
        r"embeddings\.word_embeddings\.weight": "embeddings.word",
        r"embeddings\.position_embeddings\.weight": "embeddings.position",
        r"embeddings\.LayerNorm\.(weight|bias)": r"embeddings.norm.\1",
        r"transformer\.layer\.(\d+)\.attention\.q_lin\.(weight|bias)": r"layers.\1.query.\2",
        r"transformer\.layer\.(\d+)\.attention\.k_lin\.(weight|bias)": r"layers.\1.key.\2",
        r"transformer\.layer\.(\d+)\.attention\.v_lin\.(weight|bias)": r"layers.\1.value.\2",
        r"transformer\.layer\.(\d+)\.attention\.out_lin\.(weight|bias)": (
            r"layers.\1.attention_out.\2"
        ),
        r"transformer\.layer\.(\d+)\.sa_layer_norm\.(weight|bias)": r"layers.\1.attention_norm.\2",
        r"transformer\.layer\.(\d+)\.ffn\.lin1\.(weight|bias)": r"layers.\1.ffn_in.\2",
        r"transformer\.layer\.(\d+)\.ffn\.lin2\.(weight|bias)": r"layers.\1.ffn_out.\2",
        r"transformer\.layer\.(\d+)\.output_layer_norm\.(weight|bias)": r"layers.\1.ffn_norm.\2",
        r"vocab_transform\.(weight|bias)": r"mlm.dense.\1",
        r"vocab_layer_norm\.(weight|bias)": r"mlm.norm.\1",
        r"vocab_projector\.(weight|bias)": r"mlm.decoder.\1",
    },
    "electra": _BERT_ENCODER
    | {
        r"embeddings_project\.(weight|bias)": r"embeddings.projection.\1",
        r"generator_predictions\.dense\.(weight|bias)": r"mlm.dense.\1",
        r"generator_predictions\.LayerNorm\.(weight|bias)": r"mlm.norm.\1",
        r"generator_lm_head\.(weight|bias)": r"mlm.decoder.\1",
    },
}
FAMILIES = tuple(_NAMES)

# Parts of such checkpoints that an encoder of classifiers never runs: poolers, the next-sentence
# and the replaced-token heads of pre-training, and index buffers of older versions.
_NOT_USED = re.compile(
    r"pooler\..*|cls\.seq_relationship\..*|discriminator_predictions\..*|embeddings\.position_ids"
)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors checkpoint, whole or sharded, memory-mapped.

    Raises `UnsupportedCheckpointError` for a checkpoint that only has pickled weights.
    """
    index = folder / "model.safetensors.index.json"
    files = _shards(index) if index.exists() else [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = (
            f"only pickled weights ({pickled[0]}), which are never read" if pickled else "nothing"
        )
        raise UnsupportedCheckpointError(
            f"{folder}: {missing[0]} is missing and there is {found} in its place; "
            "convert the checkpoint to safetensors first"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict, has no __iter__
                    tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise BackboneError(f"{file}: not a whole safetensors file: {error}") from None
    return tensors


def _shards(index: Path) -> list[Path]:
    try:
        return sorted(
            {index.parent / name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BackboneError(f"{index}: not an index of safetensors files") from None


def canonical_tensors(
    source: dict[str, Tensor], family: str, expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Rename, fuse and transpose a checkpoint's tensors into ours, fp32, checked with `expected`.

    `query`, `key`, `value` become one `qkv [3H, H]`; `ffn_out.weight` is stored `[F, H]`, a neuron
    a row. A decoder that equals the word embeddings is dropped: it is tied. Raises `BackboneError`
    that names a missing, surplus or wrongly shaped tensor.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in source.items():
        ours = _our_name(name, family)
        if ours is None:
            continue
        if ours in found:
            raise BackboneError(f"tensor {name!r} stands twice, under two names of {ours!r}")
        found[ours] = tensor
    # The MLM bias stands twice in some checkpoints; the decoder's own is the one that is used.
    bias = found.pop("mlm.bias", None)
    if bias is not None:
        found.setdefault("mlm.decoder.bias", bias)
    tied = found.get("mlm.decoder.weight")
    if tied is not None and torch.equal(tied, found.get("embeddings.word", tied[:0])):
        del found["mlm.decoder.weight"]
    result = _fused({name: tensor.to(torch.float32) for name, tensor in found.items()})
    _check_shapes(result, expected)
    return result


def _our_name(name: str, family: str) -> str | None:
    prefix = {"xlm-roberta": "roberta"}.get(family, family)
    short = name.removeprefix(f"{prefix}.")
    # TensorFlow-era checkpoints call a LayerNorm's weight and bias gamma and beta.
    short = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", short)
    short = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", short)
    for pattern, ours in _NAMES[family].items():
        match = re.fullmatch(pattern, short)
        if match:
            return match.expand(ours)
    if _NOT_USED.fullmatch(short):
        return None
    raise BackboneError(
        f"surplus tensor {name!r}: not part of a {family} encoder or its MLM head; "
        "save the encoder (or the masked-language model) alone"
    )


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    result = dict(tensors)
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    for layer in layers:
        for kind in ("weight", "bias"):
            names = [f"layers.{layer}.{part}.{kind}" for part in ("query", "key", "value")]
            for name in names:
                if name not in result:
                    raise BackboneError(f"missing tensor: {name} (in our names)")
            parts = [result.pop(name) for name in names]
            if len({part.shape[1:] for part in parts}) != 1:
                raise BackboneError(f"tensors {names} have different widths")
            result[f"layers.{layer}.qkv.{kind}"] = torch.cat(parts)
        out = f"layers.{layer}.ffn_out.weight"
        if out in result:
            result[out] = result[out].t().contiguous()
    return result


def _check_shapes(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    optional = {"mlm.decoder.weight"}
    missing = sorted(expected.keys() - tensors.keys() - optional)
    if missing:
        raise BackboneError(f"missing tensor: {missing[0]} (in our names), {len(missing)} in all")
    surplus = sorted(tensors.keys() - expected.keys())
    if surplus:
        raise BackboneError(f"surplus tensor: {surplus[0]} does not fit the config")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise BackboneError(
                f"tensor {name} has shape {tuple(tensor.shape)}; the config means {expected[name]}"
            )
        if not torch.isfinite(tensor).all():
            raise BackboneError(f"tensor {name} holds NaN or infinite values")


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`. Raises `BackboneError` where it is missing or not JSON."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise BackboneError(
            f"{folder}: config.json is missing; is this a checkpoint folder?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BackboneError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise BackboneError(f"{file}: a JSON object is expected")
    return config
