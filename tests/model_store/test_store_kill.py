"""A writer that is killed at any moment leaves the old state or the new one, and no work behind.

Each change is made many times over in `kill_at_every_step`, killed at every operation in turn.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_store.store import Store
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact
from tests.model_store.kill_at_every_step import CHANGES

ROOT = Path(__file__).parents[2]
NEEDS_A_TASK = ["activate", "roll back", "delete version", "delete task"]


def prepare(root: Path) -> None:
    """A store with one backbone, and a task of two versions, the second active."""
    store = Store(root)
    store.publish(example_artifact(data=b"first"))
    store.publish(example_artifact(data=b"second"))
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"old weights")
        store.add_backbone(FINGERPRINT, "old", staging)


def state(root: Path) -> dict[str, Any]:
    """All that a store says, with every content, but for times of publication."""
    store = Store(root)
    store.tasks()  # a damaged registry raises
    path = root / "registry.json"
    registry: dict[str, Any] = (
        json.loads(path.read_bytes()) if path.exists() else {"backbones": {}, "tasks": {}}
    )
    for name in ("format_version", "generation"):
        registry.pop(name, None)
    contents: dict[str, bytes] = {}
    for task, record in registry["tasks"].items():
        for number, version in record["versions"].items():
            version.pop("published_at")
            contents[f"tasks/{task}/{number}.safetensors"] = store.read(task, int(number))[1]
    for fingerprint in registry["backbones"]:
        for file in store.backbone_path(fingerprint).iterdir():
            contents[str(file.relative_to(root))] = file.read_bytes()
    return registry | {"contents": contents}


def files(root: Path) -> set[str]:
    """Every file in the store's folders."""
    return {str(path.relative_to(root)) for path in root.glob("*/**/*") if path.is_file()}


def kill(change: str, prepared: Path, folder: Path) -> list[str]:
    folder.mkdir()
    module = "tests.model_store.kill_at_every_step"
    command = [sys.executable, "-m", module, change, str(prepared), str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("change", "full"),
    [(change, True) for change in CHANGES]
    + [(change, False) for change in CHANGES if change not in NEEDS_A_TASK],
)
def test_killed_at_every_operation(tmp_path: Path, change: str, full: bool) -> None:
    prepared, killed = tmp_path / "prepared", tmp_path / "killed"
    if full:
        prepare(prepared)
    steps = kill(change, prepared, killed)
    assert {"open", "write", "fsync", "os.rename", "fcntl.flock", "end"} <= set(steps)
    old, new = state(prepared), state(killed / str(len(steps)))
    assert old != new
    found = [state(killed / str(number)) for number in range(1, len(steps) + 1)]
    assert all(after in (old, new) for after in found)
    # Old up to the rename of the registry and new from there: never back again.
    turn = found.index(new)
    assert found == [old] * turn + [new] * (len(steps) - turn)
    assert turn < len(steps) - 1, "no child was killed after the change took effect"

    for number in range(1, len(steps) + 1):
        store = Store(killed / str(number))
        before = state(store.root)
        info = store.publish(example_artifact("later"))
        after = state(store.root)
        assert info.version == 1
        assert after["backbones"] == before["backbones"]
        assert after["tasks"] == before["tasks"] | {"later": after["tasks"]["later"]}
        assert files(store.root) == set(after["contents"]), steps[number - 1]
        assert list((store.root / "staging").iterdir()) == []


def test_a_killed_publish_can_be_made_again(tmp_path: Path) -> None:
    prepared, killed = tmp_path / "prepared", tmp_path / "killed"
    prepare(prepared)
    steps = kill("publish", prepared, killed)
    for number in range(1, len(steps) + 1):
        store = Store(killed / str(number))
        info = store.publish(example_artifact(data=b"published"))
        assert (info.version, info.active) == (3, True)
        assert [known.version for known in store.versions("mood")] == [1, 2, 3]
        assert store.read("mood")[1] == b"published"
