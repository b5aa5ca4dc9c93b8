"""Computes one part of the quality benchmark in a process of its own; `quality_run` starts it.

python -m benchmarks.quality_worker DATA WORK SET PART SEED
"""

import os
import sys
import threading
from pathlib import Path

import torch

from benchmarks.quality_parts import compute
from examples.ready_made import BACKBONE
from localization.errors import LocalizationError
from localization.runs import open_backbone
from model_store.errors import ModelStoreError
from model_store.store import Store


def main() -> None:
    """The command."""
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    torch.set_num_threads(1)
    data, work, name, part, seed = sys.argv[1:]
    try:
        backbone = open_backbone(Store(Path(work) / "store"), BACKBONE)
        compute(backbone, Path(data), Path(work), name, part, int(seed))
    except (LocalizationError, ModelStoreError) as error:
        raise SystemExit(str(error)) from None


def _end_with_the_starter() -> None:
    """Standard input ends when the process that started this one does, however that comes."""
    # A plain read: a buffered one would hold a lock that the interpreter wants at its end.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
