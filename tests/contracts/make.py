"""Makes the examples of the current format version: `python -m tests.contracts.make`.

Makes those that are missing, on the backbone that is there: a file that a release could write is
never made again. A new component gets a new example.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone, load_backbone
from tests.overlays import random_overlay, small_backbone

HERE = Path(__file__).parent

EXAMPLES: dict[str, Callable[[Backbone], Overlay]] = {
    "linear": random_overlay,
    "verbalizer": lambda backbone: random_overlay(
        backbone,
        "verbalized",
        template=("{text} is {mask} .",),
        read="mask",
        head={"kind": "verbalizer", "words": ("bad", "not", "good"), "token_ids": (17, 14, 16)},
        components=("ffn_neurons", "prompt"),
    ),
    "pairs": lambda backbone: random_overlay(
        backbone, "pairs", pairs=True, prompt_tokens=0, read="cls"
    ),
    "recovered": lambda backbone: random_overlay(
        backbone, "recovered", heads=(2, 0, 3), scales=True, norms=True, delta_rank=2
    ),
}


def main() -> None:
    """Write the small backbone and one artifact of each kind, but for what is there."""
    backbone = _backbone()
    for name, make in EXAMPLES.items():
        file = HERE / f"v1-{name}.safetensors"
        if not file.exists():
            file.write_bytes(artifact.write(make(backbone)))


def _backbone() -> Backbone:
    there = [folder for folder in HERE.iterdir() if len(folder.name) == 64]
    if not there:
        with tempfile.TemporaryDirectory() as folder:
            store, made = small_backbone(Path(folder))
            there = [HERE / made.fingerprint]
            shutil.copytree(store.backbone_path("tiny"), there[0])
    return load_backbone(there[0], "tiny")


if __name__ == "__main__":
    main()
