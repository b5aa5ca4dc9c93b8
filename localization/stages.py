"""Keeps finished stages of a localization on disk, so that an interrupted run goes on where it was.

A stage's file name holds the hash of everything that it was computed from: a changed setting, data
row or backbone gives another name, and the stage is computed again.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from localization.tuning import Tuned


def key_of(*inputs: object) -> str:
    """A short hash of JSON-like inputs."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StageFiles:
    """The folder of one task's stages. A file that is damaged counts as not there."""

    folder: Path

    def load_tuned(self, name: str, key: str) -> Tuned | None:
        """A finished tuning stage, or None."""
        loaded = self._load(name, key)
        if loaded is None:
            return None
        tensors, facts = loaded
        return Tuned(
            tensors.get("prompt"),
            tensors.get("weight"),
            tensors.get("bias"),
            facts["validation_accuracy"],
            tuple(facts["curve"]),
        )

    def save_tuned(self, name: str, key: str, tuned: Tuned) -> None:
        """Keep a finished tuning stage."""
        named = {"prompt": tuned.prompt, "weight": tuned.weight, "bias": tuned.bias}
        tensors = {part: tensor for part, tensor in named.items() if tensor is not None}
        facts = {"validation_accuracy": tuned.validation_accuracy, "curve": tuned.curve}
        self._save(name, key, tensors, facts)

    def load_scores(self, name: str, key: str) -> Tensor | None:
        """Finished scores `[L, F]`, or None."""
        loaded = self._load(name, key)
        return None if loaded is None else loaded[0]["scores"]

    def save_scores(self, name: str, key: str, scores: Tensor) -> None:
        """Keep finished scores."""
        self._save(name, key, {"scores": scores}, {})

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key}.safetensors"

    def _load(self, name: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._path(name, key)
        try:
            with safe_open(path, framework="pt") as opened:
                facts = json.loads((opened.metadata() or {})["facts"])
                # Cloned, for the file may be removed while the run goes on.
                return {part: opened.get_tensor(part).clone() for part in opened.keys()}, facts  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _save(
        self, name: str, key: str, tensors: dict[str, Tensor], facts: dict[str, object]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, key)
        temporary = path.with_suffix(".part")
        safetensors.torch.save_file(tensors, temporary, {"facts": json.dumps(facts)})
        os.replace(temporary, path)  # noqa: PTH105 - the atomic call by its name
