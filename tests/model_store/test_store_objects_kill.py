"""A writer of an object store that is killed before any of its requests: old state or new one."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from model_store import objects, uploads
from model_store.bucket import Bucket
from model_store.store import Store, open_store
from tests.model_store.example_artifacts import example_artifact
from tests.model_store.kill_at_every_request import CHANGES, MOST
from tests.model_store.kill_at_every_step import entry
from tests.model_store.test_store_kill import prepare_store
from tests.s3 import S3, running_s3

pytest.importorskip("s3fs")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def killed(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Store]]:
    """For each change the stores that killed writers left, the last by one who was not killed."""
    cache = tmp_path_factory.mktemp("cache")
    source, target = s3.location(), s3.location()
    prepare_store(open_store(source, cache))
    places = {name: f"{target}-{name.replace(' ', '-')}" for name in CHANGES}
    for place in places.values():
        for number in range(1, MOST + 1):
            s3.copy(source, f"{place}-{number}")
    command = [sys.executable, "-m", "tests.model_store.kill_at_every_request", target, str(cache)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, list[Store]] = {"nothing": [open_store(source, cache)]}
    for part in result.stdout.split("# ")[1:]:
        name, *steps = part.splitlines()
        assert steps[-1] == "end"
        found[name] = [
            open_store(f"{places[name]}-{number}", cache) for number in range(1, len(steps) + 1)
        ]
    assert list(found) == ["nothing", *CHANGES]
    return found


def state(store: Store) -> dict[str, Any]:
    """All that a store says, with every content, but for times and names of objects."""
    registry = store.registry()
    backbones = {
        record.name: {file.name: file.read_bytes() for file in store.backbone_path(key).iterdir()}
        for key, record in registry.backbones.items()
    }
    tasks = {
        task: (
            *(record.next_version, record.active, record.history, record.canary, record.shadow),
            {number: store.read(task, number)[1] for number in record.versions},
        )
        for task, record in registry.tasks.items()
    }
    document = store.document("keys.json")
    return {"backbones": backbones, "tasks": tasks, "document": document, "audit": store.audit(9)}


@pytest.mark.parametrize("change", list(CHANGES))
def test_killed_before_every_request(killed: dict[str, list[Store]], change: str) -> None:
    (nothing,) = killed["nothing"]
    old, found = state(nothing), [state(store) for store in killed[change]]
    new = found[-1]
    assert old != new
    turn = found.index(new)
    assert turn > 0
    assert found == [old] * turn + [new] * (len(found) - turn)

    # Some changes later nothing is left of the killed one.
    store = killed[change][max(turn - 1, 0)]
    before = state(store)
    store.append_audit(entry("later"))
    with mock.patch.object(uploads, "GRACE", 1), mock.patch.object(objects, "SWEEP_EVERY", 1):
        for number in (1, 2, 3):
            assert store.publish(example_artifact("later", str(number).encode())).version == number
    after = state(store)
    assert after["audit"] == [*before["audit"], entry("later")]
    assert {task: after["tasks"][task] for task in before["tasks"]} == before["tasks"]
    bucket = Bucket(store.location)
    assert len(bucket.names("tasks")) == sum(len(known[-1]) for known in after["tasks"].values())
    assert len(bucket.names("backbones")) == sum(map(len, after["backbones"].values()))
