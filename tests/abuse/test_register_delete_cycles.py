"""Tasks that come and go a thousand times leave nothing behind: no memory, no file, no thread.

Long form: 1,000 cycles instead of 60.
"""

import dataclasses
import json
from collections.abc import Iterator

import psutil
import pytest

from model_store import artifact
from model_store.backbone import Backbone
from model_store.store import Store
from tests.abuse.place import Place, serve_tiny
from tests.abuse.variants import TEXTS
from tests.overlays import random_overlay
from tests.soak import report, soak

CYCLES = 1_000 if soak() else 60
WARM_UP = 100 if soak() else 20
TASKS = 7
"""Names, again and again."""


@pytest.fixture
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny: tuple[Store, Backbone]
) -> Iterator[Place]:
    """A server for itself alone, so that its memory is this test's doing."""
    with serve_tiny(tmp_path_factory.mktemp("cycles"), tiny, replicas=1) as made:
        yield made


def cycle(place: Place, number: int) -> None:
    """A task comes as two versions nobody has seen before, answers, and goes."""
    task = f"task-{number % TASKS}"
    overlay = random_overlay(place.backbone, task, seed=number)
    for note in ("first", "second"):
        manifest = overlay.manifest.model_copy(update={"description": f"{note} of {number}"})
        place.register(task, artifact.write(dataclasses.replace(overlay, manifest=manifest)))
    for text in TEXTS:
        assert place.server.predict(task, text).status_code == 200
    place.change("DELETE", f"/v1/tasks/{task}")
    assert place.server.predict(task, TEXTS[0]).status_code == 404


def test_tasks_that_come_and_go_leave_nothing(place: Place) -> None:
    (replica,) = place.server.replicas()
    for number in range(WARM_UP):
        cycle(place, number)
    before, threads = memory(replica), replica.num_threads()
    for number in range(WARM_UP, CYCLES):
        cycle(place, number)
    grown = memory(replica) / before - 1
    report(
        f"{CYCLES:,} cycles of register, replace, predict and delete",
        f"resident memory grew {100 * grown:.1f} % from {before / 1e6:.0f} MB after {WARM_UP}; "
        f"{replica.num_threads() - threads} more threads, {len(left(place))} files left",
    )
    assert grown < 0.03
    assert replica.num_threads() <= threads
    assert left(place) == []
    registry = json.loads((place.store.root / "registry.json").read_bytes())
    assert [name for name, task in registry["tasks"].items() if task["versions"]] == []
    assert sum(task["next_version"] - 1 for task in registry["tasks"].values()) == 2 * CYCLES
    assert len(place.store.audit(10 * CYCLES)) == 3 * CYCLES


def memory(process: psutil.Process) -> int:
    """What it holds."""
    found: int = process.memory_info().rss
    return found


def left(place: Place) -> list[str]:
    """Files of tasks, and unfinished ones."""
    folders = (place.store.root / "tasks", place.store.root / "staging")
    return [str(path) for folder in folders for path in folder.rglob("*")]
