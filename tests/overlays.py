"""Overlays of random numbers on small backbones, for tests of everything that handles overlays."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_store import artifact
from model_store.artifact import Overlay, probabilities
from model_store.backbone import Backbone, EncoderConfig, import_checkpoint, load_backbone
from model_store.encoder import Encoder
from model_store.manifest import Golden, Manifest, TextInput
from model_store.ops import TorchOps
from model_store.plan import LinearHead
from model_store.store import Store
from tests.reference import small_checkpoint

PARTS = ("q", "k", "v", "o", "ffn_in", "ffn_out")
"""The linear maps that may have a delta."""

GOLDEN = ("the film was very good", "my bank card is lost")


def small_backbone(folder: Path, family: str = "bert", **changes: Any) -> tuple[Store, Backbone]:
    """A store in `folder` with one small random backbone."""
    checkpoint = small_checkpoint(folder / "checkpoint", family, **changes)
    store = Store(folder / "store")
    info = import_checkpoint(str(checkpoint.folder), store, "tiny")
    return store, load_backbone(store.backbone_path(info.fingerprint), "tiny")


def fp32_encoder(backbone: Backbone) -> Encoder:
    """The reference encoder."""
    return Encoder(backbone.config, backbone.tensors, TorchOps())


def random_changes(
    config: EncoderConfig,
    neurons: Sequence[Tensor],
    heads: Sequence[Tensor] | None,
    generator: torch.Generator,
    *,
    scales: bool = False,
    norms: bool = False,
    delta_rank: int = 0,
    parts: Sequence[str] = PARTS,
) -> dict[str, Tensor]:
    """Changes of a network with only these neurons and heads, by artifact tensor name."""

    def near(centre: float, *shape: int, spread: float = 0.2) -> Tensor:
        return centre + spread * torch.randn(*shape, generator=generator)

    result = {}
    for layer in range(config.layers):
        kept = len(neurons[layer])
        if scales:
            result[f"ffn.{layer}.scale"] = near(1, kept)
            result[f"ffn.{layer}.bias"] = near(0, config.hidden)
        for norm in ("attention", "ffn") if norms else ():
            result[f"norm.{layer}.{norm}.weight"] = near(1, config.hidden)
            result[f"norm.{layer}.{norm}.bias"] = near(0, config.hidden)
        count = config.heads if heads is None else len(heads[layer])
        attended = count * config.hidden // config.heads
        sides = dict.fromkeys("qkv", (config.hidden, attended)) | {
            "o": (attended, config.hidden),
            "ffn_in": (config.hidden, kept),
            "ffn_out": (kept, config.hidden),
        }
        for part in parts if delta_rank else ():
            inputs, outputs = sides[part]
            down = near(0, delta_rank, inputs, spread=max(1, inputs) ** -0.5)
            result[f"delta.{layer}.{part}.down"] = down.bfloat16()
            result[f"delta.{layer}.{part}.up"] = near(0, outputs, delta_rank).bfloat16()
    return result


def random_overlay(
    backbone: Backbone,
    task: str = "mood",
    *,
    seed: int = 0,
    labels: tuple[str, ...] = ("bad", "fair", "good"),
    prompt_tokens: int = 3,
    keep: float = 0.5,
    pairs: bool = False,
    heads: float | Sequence[int] | None = None,
    scales: bool = False,
    norms: bool = False,
    delta_rank: int = 0,
    **changes: Any,
) -> Overlay:
    """Random numbers with right golden inputs; `changes` go into the manifest.

    `heads` is the share of every layer's that are kept, or their number in each layer.
    """
    generator = torch.Generator().manual_seed(seed)
    config = backbone.config
    neurons = tuple(
        (torch.rand(config.ffn, generator=generator) < keep).nonzero()[:, 0].int()
        for _ in range(config.layers)
    )
    head = LinearHead(
        torch.randn(len(labels), config.hidden, generator=generator),
        torch.randn(len(labels), generator=generator),
    )
    prompt = None
    if prompt_tokens:
        prompt = torch.randn(prompt_tokens, config.embedding, generator=generator)
    kept_heads = None if heads is None else _random_heads(config, heads, generator)
    inside = random_changes(
        config, neurons, kept_heads, generator, scales=scales, norms=norms, delta_rank=delta_rank
    )
    inputs: tuple[TextInput, ...] = ((GOLDEN[0], GOLDEN[1]),) if pairs else GOLDEN
    blank = tuple(Golden(input=item, scores=(0.0,) * len(labels)) for item in inputs)
    record: dict[str, Any] = {
        "task": task,
        "labels": labels,
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "template": ("{text1}", "{text2}") if pairs else ("{text}",),
        "max_tokens": 32,
        "prompt": {"tokens": prompt_tokens},
        "read": "mean",
        "head": {"kind": "linear"},
        "components": _components(prompt_tokens, heads, scales, norms, delta_rank),
        "ffn_kept": tuple(map(len, neurons)),
        "ffn_width": config.ffn,
        "heads_kept": None if kept_heads is None else tuple(map(len, kept_heads)),
        "deltas": dict.fromkeys(("qkv", "o", "ffn_in", "ffn_out"), (delta_rank,) * config.layers)
        if delta_rank
        else None,
        "provenance": {
            "command": "made for a test",
            "created": "2026-01-01T00:00:00Z",
            "seed": seed,
        },
        "golden": blank,
    }
    manifest = Manifest.model_validate(record | changes)
    own_head = head if manifest.head.kind == "linear" else None
    overlay = Overlay(manifest, neurons, prompt, own_head, kept_heads, inside)
    scores = probabilities(fp32_encoder(backbone), backbone, overlay, inputs)
    golden = tuple(
        Golden(input=item, scores=tuple(row.tolist()))
        for item, row in zip(inputs, scores, strict=True)
    )
    return dataclasses.replace(
        overlay, manifest=overlay.manifest.model_copy(update={"golden": golden})
    )


def _random_heads(
    config: EncoderConfig, heads: float | Sequence[int], generator: torch.Generator
) -> tuple[Tensor, ...]:
    counts = [round(heads * config.heads)] * config.layers if isinstance(heads, float) else heads
    return tuple(
        torch.randperm(config.heads, generator=generator)[:count].sort().values.int()
        for count in counts
    )


def _components(
    prompt_tokens: int,
    heads: float | Sequence[int] | None,
    scales: bool,
    norms: bool,
    delta_rank: int,
) -> tuple[str, ...]:
    there = {
        "ffn_neurons": True,
        "prompt": prompt_tokens > 0,
        "head": True,
        "heads": heads is not None,
        "scales": scales,
        "norms": norms,
        "deltas": delta_rank > 0,
    }
    return tuple(name for name, given in there.items() if given)


def random_artifact(backbone: Backbone, task: str = "mood", **settings: Any) -> bytes:
    """`random_overlay` as an artifact file's bytes."""
    return artifact.write(random_overlay(backbone, task, **settings))
