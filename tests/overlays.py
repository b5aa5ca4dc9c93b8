"""Overlays of random numbers on small backbones, for tests of everything that handles overlays."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from model_store import artifact
from model_store.artifact import Overlay, probabilities
from model_store.backbone import Backbone, import_checkpoint, load_backbone
from model_store.encoder import Encoder, LinearHead
from model_store.manifest import Golden, Manifest, TextInput
from model_store.ops import TorchOps
from model_store.store import Store
from tests.reference import small_checkpoint

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


def random_overlay(
    backbone: Backbone,
    task: str = "mood",
    *,
    seed: int = 0,
    labels: tuple[str, ...] = ("bad", "fair", "good"),
    prompt_tokens: int = 3,
    keep: float = 0.5,
    pairs: bool = False,
    **changes: Any,
) -> Overlay:
    """Random numbers with right golden inputs; `changes` go into the manifest."""
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
        "components": ("ffn_neurons", "prompt", "head")
        if prompt_tokens
        else ("ffn_neurons", "head"),
        "ffn_kept": tuple(map(len, neurons)),
        "ffn_width": config.ffn,
        "provenance": {
            "command": "made for a test",
            "created": "2026-01-01T00:00:00Z",
            "seed": seed,
        },
        "golden": blank,
    }
    manifest = Manifest.model_validate(record | changes)
    overlay = Overlay(manifest, neurons, prompt, head if manifest.head.kind == "linear" else None)
    scores = probabilities(fp32_encoder(backbone), backbone, overlay, inputs)
    golden = tuple(
        Golden(input=item, scores=tuple(row.tolist()))
        for item, row in zip(inputs, scores, strict=True)
    )
    return dataclasses.replace(
        overlay, manifest=overlay.manifest.model_copy(update={"golden": golden})
    )


def random_artifact(backbone: Backbone, task: str = "mood", **settings: Any) -> bytes:
    """`random_overlay` as an artifact file's bytes."""
    return artifact.write(random_overlay(backbone, task, **settings))
