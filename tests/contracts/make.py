"""Makes the examples of the current format version: `python -m tests.contracts.make`.

Run once per format version; the files are never made again afterwards.
"""

import shutil
import tempfile
from pathlib import Path

from model_store import artifact
from tests.overlays import random_overlay, small_backbone

HERE = Path(__file__).parent


def main() -> None:
    """Write one small backbone, and a linear and a verbalizer artifact on it."""
    existing = sorted(HERE.glob("v1-*"))
    if existing:
        raise SystemExit(f"{existing[0].name} exists: examples of a version are made once")
    with tempfile.TemporaryDirectory() as folder:
        store, backbone = small_backbone(Path(folder))
        shutil.copytree(store.backbone_path("tiny"), HERE / backbone.fingerprint)
        linear = random_overlay(backbone)
        verbalizer = random_overlay(
            backbone,
            "verbalized",
            template=("{text} is {mask} .",),
            read="mask",
            head={"kind": "verbalizer", "words": ("bad", "not", "good"), "token_ids": (17, 14, 16)},
            components=("ffn_neurons", "prompt"),
        )
        pairs = random_overlay(backbone, "pairs", pairs=True, prompt_tokens=0, read="cls")
        for name, overlay in (("linear", linear), ("verbalizer", verbalizer), ("pairs", pairs)):
            (HERE / f"v1-{name}.safetensors").write_bytes(artifact.write(overlay))


if __name__ == "__main__":
    main()
