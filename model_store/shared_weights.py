"""Weights that all processes of a machine read from one file: in memory once, made once.

The first process that wants them makes them, others wait for it. Knows files; of the weights only
who makes them. The folder belongs to this user alone, so that what is in it can be believed.
"""

import ctypes
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model_store import native_weights
from model_store.backbone import EncoderConfig
from model_store.durable import locked, own_folder, sync
from model_store.native_weights import Named, Precision

_ALIGNMENT = 64
_FOOTER = 8
_MADV_HUGEPAGE = 14
_TYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int32)}

logger = logging.getLogger("taskbone.weights")


@dataclass(frozen=True)
class SharedWeights:
    """Where the processes of this machine share a backbone's weights."""

    folder: Path
    fingerprint: str
    tensors: Callable[[], Mapping[str, Tensor]]
    """The backbone's, read anew: what packing has read of them is then no part of this process."""

    def packed(self, config: EncoderConfig, precision: Precision) -> dict[str, Tensor] | None:
        """What `native_weights.weights` gives, mapped; None where the folder has no room."""
        made_by = hashlib.blake2b(Path(native_weights.__file__).read_bytes(), digest_size=6)
        name = f"{self.fingerprint}-{precision}-{made_by.hexdigest()}.weights"
        try:
            own_folder(self.folder)
            return shared(
                self.folder / name,
                lambda: native_weights.weights(config, self.tensors(), precision),
            )
        except OSError as error:
            logger.warning("weights cannot be shared, this process has its own: %s", error)
            return None


def shared(path: Path, make: Callable[[], Iterable[Named]]) -> dict[str, Tensor]:
    """The tensors in file `path`, which is made if it is not there; nobody may write to them."""
    found = _map(path)
    if found is None:
        with locked(path.with_suffix(".lock")):
            found = _map(path)
            if found is None:
                _write(path, make())
                found = _map(path)
    assert found is not None, "a file that was just written is whole"
    return found


def _write(path: Path, named: Iterable[Named]) -> None:
    """Tensors one after the other, where they are, and how long that is: then give it its name."""
    temporary = path.with_suffix(".new")
    places: dict[str, tuple[int, str, list[int]]] = {}
    with temporary.open("wb") as file:
        for name, tensor in named:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            places[name] = file.tell(), str(tensor.dtype), list(tensor.shape)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        index = json.dumps(places).encode()
        file.write(index + len(index).to_bytes(_FOOTER, "little"))
    sync(temporary)
    temporary.replace(path)


def _map(path: Path) -> dict[str, Tensor] | None:
    """None where there is no file, or not a whole one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(-_FOOTER, os.SEEK_END)
            length = int.from_bytes(file.read(), "little")
            file.seek(-_FOOTER - length, os.SEEK_END)
            places = json.loads(file.read(length))
    except (OSError, ValueError):
        return None
    # Not `shared`: whoever wrote to it by mistake would have the page for himself.
    memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    _advise(memory)
    found = {}
    for name, (start, kind, shape) in places.items():
        dtype = _TYPES[kind]
        end = start + math.prod(shape) * dtype.itemsize
        found[name] = memory[start:end].view(dtype).view(shape)
    return found


def _advise(memory: Tensor) -> None:
    """Huge pages, where this file system has them: weights are read end to end."""
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), _MADV_HUGEPAGE
    )
