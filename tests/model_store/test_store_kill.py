"""A writer that is killed at any moment leaves the old state or the new one, and no work behind.

Each change is made many times over in `kill_at_every_step`, killed at every operation in turn.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from model_store.errors import ConflictError, NotFoundError
from model_store.store import Store
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact
from tests.model_store.kill_at_every_step import CHANGES, FROM_NOTHING, entry

ROOT = Path(__file__).parents[2]
NAMES = [*CHANGES, *(f"{name} from nothing" for name in FROM_NOTHING)]


@dataclass(frozen=True)
class Killed:
    """A change killed again and again: the stores left, and what came next when each was."""

    change: str
    prepared: Path
    folder: Path
    steps: list[str]

    @property
    def stores(self) -> list[Store]:
        """For looking alone: all tests share them."""
        return [Store(self.folder / str(number)) for number in range(1, len(self.steps) + 1)]

    def copies(self, place: Path) -> list[Store]:
        shutil.copytree(self.folder, place / "copies")
        return [Store(place / "copies" / store.root.name) for store in self.stores]


def prepare_store(store: Store) -> None:
    """Have a backbone, a task of four versions, a document and an audit log in a store."""
    for data in (b"first", b"second", b"third", b"fourth"):
        store.publish(example_artifact(data=data))
    store.activate("mood", 2)
    store.set_canary("mood", 3, 50)
    store.set_shadow("mood", 4)
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"old weights")
        store.add_backbone(FINGERPRINT, "old", staging)
    store.put_document("keys.json", b"old keys")
    for message in ("one", "two"):
        store.append_audit(entry(message))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    """Every change by name."""
    place = tmp_path_factory.mktemp("killed")
    prepare_store(Store(place / "prepared"))
    module = "tests.model_store.kill_at_every_step"
    command = [sys.executable, "-m", module, str(place / "prepared"), str(place)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Killed] = {}
    for part in result.stdout.split("# ")[1:]:
        name, *steps = part.splitlines()
        prepared = place / ("nowhere" if "from nothing" in name else "prepared")
        found[name] = Killed(name, prepared, place / name, steps)
    assert list(found) == NAMES
    return found


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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
    if (document := store.document("keys.json")) is not None:
        contents["documents/keys.json"] = document
    return registry | {"contents": contents, "audit": store.audit(10)}


def files(root: Path) -> set[str]:
    """Every file in the store's folders."""
    return {str(path.relative_to(root)) for path in root.glob("*/**/*") if path.is_file()}


def test_there_are_many_kills(killed: dict[str, Killed]) -> None:
    assert sum(len(each.steps) - 1 for each in killed.values()) >= 200
    for each in killed.values():
        assert {"open", "write", "fsync", "fcntl.flock", "end"} <= set(each.steps), each.change


@pytest.mark.parametrize("change", NAMES)
def test_killed_at_every_operation(killed: dict[str, Killed], change: str) -> None:
    found = [state(store.root) for store in killed[change].stores]
    old, new = state(killed[change].prepared), found[-1]
    assert old != new
    assert all(after in (old, new) for after in found)
    # Old up to the one operation that counts and new from there: never back again.
    turn = found.index(new)
    assert found == [old] * turn + [new] * (len(found) - turn)
    assert turn < len(found) - 1, "no child was killed after the change took effect"


@pytest.mark.parametrize("change", NAMES)
def test_the_next_writer_finds_all_in_order(
    killed: dict[str, Killed], change: str, tmp_path: Path
) -> None:
    stores = killed[change].copies(tmp_path)
    for step, store in zip(killed[change].steps, stores, strict=True):
        before = state(store.root)
        info = store.publish(example_artifact("later"))
        store.append_audit(entry("later"))
        after = state(store.root)
        assert info.version == 1
        assert after["backbones"] == before["backbones"]
        assert after["tasks"] == before["tasks"] | {"later": after["tasks"]["later"]}
        assert after["audit"] == [*before["audit"], entry("later")]
        assert files(store.root) == set(after["contents"]), step
        assert list((store.root / "staging").iterdir()) == []


@pytest.mark.parametrize("change", NAMES)
def test_a_killed_change_can_be_made_again(
    killed: dict[str, Killed], change: str, tmp_path: Path
) -> None:
    *stores, last = killed[change].copies(tmp_path)
    new, name = state(last.root), change.removesuffix(" from nothing")
    for store in stores:
        done = state(store.root)["tasks"] == new["tasks"]
        try:
            CHANGES[name](store)
        except (ConflictError, NotFoundError):
            assert done
        if name not in ("roll back", "append audit"):  # which do something each time
            assert state(store.root) == new
