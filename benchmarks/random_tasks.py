"""Stores with tasks drawn by chance: as many as are wanted, on MiniLM-L6 or a random BERT-base.

Their golden answers are what the native forward gives in fp32, so that any server serves them.
"""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.engine_models import Model, open_model, random_overlay
from model_store import artifact
from model_store.backend import Backend, choose
from model_store.manifest import Golden
from model_store.packing import Item
from model_store.store import Store
from model_store.tokenization import InputEncoder


def random_store(folder: Path, model_name: str, tasks: int, keep: float = 0.5) -> Store:
    """A store in `folder` with a backbone and the tasks `task-0`, `task-1`, ..."""
    model = open_model(model_name, folder)
    store = Store(folder / "store")
    known = set(store.task_names())
    backbone = model.backbone
    reference = choose(backbone.config, backbone.tensors, device="cpu", precision="fp32", threads=1)
    for number in range(tasks):
        if f"task-{number}" not in known:
            data = _with_golden(model, number, keep, reference)
            store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))
    return store


def _with_golden(model: Model, number: int, keep: float, reference: Backend[Any]) -> bytes:
    overlay = random_overlay(model, number, keep)
    manifest = overlay.manifest
    texts = InputEncoder(
        model.backbone.tokenizer, model.config, manifest.template, manifest.max_tokens
    )
    text = manifest.golden[0].input
    (encoding,) = texts.encode([text])
    (scores,) = reference.answer([Item(encoding, 0)], [reference.plan(overlay)])
    golden = (Golden(input=text, scores=tuple(scores.tolist())),)
    changed = manifest.model_copy(update={"golden": golden})
    return artifact.write(dataclasses.replace(overlay, manifest=changed))
