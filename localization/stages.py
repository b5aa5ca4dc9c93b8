"""Keeps finished stages of a localization on disk, so that an interrupted run goes on where it was.

A stage's file name holds the hash of everything that it was computed from: a changed setting, data
row or backbone gives another name, and the stage is computed again.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from localization.network import Tuned
from localization.selection import Kept


def key_of(*inputs: object) -> str:
    """A short hash of JSON-like inputs."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(tensors: Mapping[str, Tensor], kept: Kept | None) -> str:
    """A hash of where a training starts: its tensors, and what is kept of the network."""
    hashed = hashlib.sha256()
    parts = dict(tensors)
    if kept is not None:
        parts |= {f"neurons.{layer}": rows for layer, rows in enumerate(kept.neurons)}
        parts |= {f"heads.{layer}": rows for layer, rows in enumerate(kept.heads or ())}
    for name in sorted(parts):
        hashed.update(f"{name}{tuple(parts[name].shape)}".encode())
        hashed.update(parts[name].detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


@dataclass(frozen=True)
class StageFiles:
    """The folder of one task's stages. A file that is damaged counts as not there."""

    folder: Path

    def load_tuned(self, name: str, key: str) -> Tuned | None:
        """A finished tuning stage, or None."""
        opened = self.open(name, key)
        if opened is None:
            return None
        tensors, facts = opened
        return Tuned(tensors, facts["validation"], tuple(facts["curve"]), facts["seconds"])

    def save_tuned(self, name: str, key: str, tuned: Tuned) -> None:
        """Keep a finished tuning stage."""
        facts = {
            "validation": tuned.validation,
            "curve": tuned.curve,
            "seconds": tuned.seconds,
        }
        self.save(name, key, tuned.tensors, facts)
        self._path(f"{name}.unfinished", key).unlink(missing_ok=True)

    def checkpoint(self, name: str, key: str) -> "StageCheckpoint":
        """Where a training of that name is kept while it goes on."""
        return StageCheckpoint(self, f"{name}.unfinished", key)

    def load(self, name: str, key: str) -> dict[str, Tensor] | None:
        """Kept tensors, or None."""
        opened = self.open(name, key)
        return None if opened is None else opened[0]

    def open(self, name: str, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Kept tensors and facts, or None."""
        path = self._path(name, key)
        try:
            with safe_open(path, framework="pt") as opened:
                facts = json.loads((opened.metadata() or {})["facts"])
                # Cloned, for the file may be removed while the run goes on.
                return {part: opened.get_tensor(part).clone() for part in opened.keys()}, facts  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key}.safetensors"

    def save(
        self, name: str, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]
    ) -> None:
        """Keep tensors, and facts beside them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, key)
        temporary = path.with_suffix(".part")
        contiguous = {part: tensor.contiguous() for part, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, temporary, {"facts": json.dumps(facts)})
        os.replace(temporary, path)  # noqa: PTH105 - the atomic call by its name


@dataclass(frozen=True)
class StageCheckpoint:
    """A training that is not finished, kept after every epoch."""

    files: StageFiles
    name: str
    key: str

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was saved last, or None."""
        return self.files.open(self.name, self.key)

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Keep tensors, and facts that are JSON."""
        self.files.save(self.name, self.key, tensors, facts)
