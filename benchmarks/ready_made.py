"""Makes the ready-made overlays from what the quality benchmark has trained.

    python -m benchmarks.ready_made --work runs/quality

Each overlay of the recipe `recovered` gets the description and the golden inputs of its task file
in `examples/tasks/`, and goes to `examples/overlays/`. Nothing is trained: a task file that does
not say what the overlay was made with is refused. `taskbone localize` on the task file makes the
same overlay anew.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from benchmarks.recipes import SETS
from examples.ready_made import OVERLAYS, add_backbone
from localization.config import TaskConfig, read_task_file
from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.manifest import Golden
from model_store.ops import TorchOps
from model_store.store import Store

SETTINGS = ("data", "prompt_tokens", "recovery", "budget", "tuning", "metric", "seed")
"""What a task file and an overlay must agree on."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="work folder of the benchmark")
    arguments = parser.parse_args()
    backbone = add_backbone(Store(arguments.work / "store"))
    tasks = OVERLAYS.parent / "tasks"
    for name in SETS:
        file = arguments.work / "overlays" / "recovered" / f"{name}-0.safetensors"
        overlay = artifact.read(file.read_bytes(), backbone.config, backbone.fingerprint)
        config = read_task_file(tasks / f"{name}.yaml")
        written = artifact.write(ready_made(overlay, config, backbone))
        artifact.verify(written, backbone.config, backbone.fingerprint)
        (OVERLAYS / f"{name}.safetensors").write_bytes(written)
        print(f"{name}: {len(written) / 1000:.0f} KB")


def ready_made(overlay: Overlay, config: TaskConfig, backbone: Backbone) -> Overlay:
    """The overlay with the task file's words and golden inputs."""
    settings = overlay.manifest.provenance.settings
    known = {name: settings[name] for name in TaskConfig.model_fields if name in settings}
    made_with = TaskConfig.model_validate_json(json.dumps(known | {"task": config.task}))
    for name in SETTINGS:
        if getattr(made_with, name) != getattr(config, name):
            raise SystemExit(
                f"{config.task}: the overlay was made with {name} {getattr(made_with, name)!r}, "
                f"its task file says {getattr(config, name)!r}"
            )
    encoder = Encoder(backbone.config, backbone.tensors, TorchOps())
    inputs = config.resolved_golden
    scores = artifact.probabilities(encoder, backbone, overlay, inputs)
    golden = tuple(
        Golden(input=item, scores=tuple(round(float(score), 6) for score in row))
        for item, row in zip(inputs, scores, strict=True)
    )
    # Settings that came later stand at their defaults, as they did when the overlay was made.
    complete = settings | {name: made_with.model_dump(mode="json")[name] for name in SETTINGS}
    provenance = overlay.manifest.provenance.model_copy(update={"settings": complete})
    manifest = overlay.manifest.model_copy(
        update={
            "description": config.description,
            "golden": golden,
            "provenance": provenance,
        }
    )
    return dataclasses.replace(overlay, manifest=manifest)


if __name__ == "__main__":
    main()
