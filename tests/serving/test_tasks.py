"""The table of what is served: who answers which request, and who has left when."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.backbone import Backbone
from model_store.store import VersionInfo
from serving import tasks as tasks_module
from serving.errors import NotReadyError, UnknownTaskError
from serving.tasks import LoadedVersion, ServedTask, TaskTable, load_version
from serving.types import PLAIN, Ask
from tests.overlays import random_overlay, small_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return small_backbone(Path(tmp_path_factory.mktemp("backbone")))[1]


@pytest.fixture
def versions(backbone: Backbone) -> list[LoadedVersion]:
    return [version(backbone, number) for number in range(1, 4)]


def version(backbone: Backbone, number: int, task: str = "mood") -> LoadedVersion:
    info = VersionInfo(task, number, f"{number:064x}", "", 10, active=number == 1)
    return load_version(backbone, random_overlay(backbone, task), info)


def test_a_canary_gets_its_share_and_the_same_id_the_same_version(
    versions: list[LoadedVersion],
) -> None:
    served = ServedTask(versions[0], versions[1], canary_percent=20.0)
    chosen = {f"id-{number}": served.choose(f"id-{number}") for number in range(5000)}
    share = sum(one is versions[1] for one in chosen.values()) / len(chosen)
    assert 0.17 < share < 0.23
    assert all(served.choose(name) is one for name, one in chosen.items())
    more = ServedTask(versions[0], versions[1], canary_percent=40.0)
    stay = [more.choose(name) for name, one in chosen.items() if one is versions[1]]
    assert set(map(id, stay)) == {id(versions[1])}, "who had the canary keeps it as it grows"


@given(percent=st.floats(0.01, 99.99), request_id=st.text(max_size=64))
def test_without_a_canary_the_active_version_answers(percent: float, request_id: str) -> None:
    active = object()
    served = ServedTask(active, None, percent)  # type: ignore[arg-type]
    assert served.choose(request_id) is active


def test_what_leaves_is_free_once_its_last_request_is_answered(
    versions: list[LoadedVersion],
) -> None:
    table = TaskTable()
    table.replace({"mood": ServedTask(versions[0])}, 4)
    assert (table.generation, table.drained) == (4, 4)
    with table.using("mood", PLAIN) as (first, _):
        table.replace({"mood": ServedTask(versions[1])}, 5)
        with table.using("mood", PLAIN) as (second, _):
            assert (first, second) == (versions[0], versions[1])
        assert (table.generation, table.drained) == (5, 4)
        assert table.take_left() == []
        table.replace({}, 6)
        assert table.take_left() == [versions[1]]
        assert table.drained == 4
    assert table.drained == 6
    assert table.take_left() == [versions[0]]
    assert table.take_left() == []
    with pytest.raises(UnknownTaskError):
        table.get("mood")


def test_a_version_that_stays_does_not_leave(versions: list[LoadedVersion]) -> None:
    table = TaskTable()
    table.replace({"mood": ServedTask(versions[0], versions[1], 5.0)}, 1)
    table.replace({"mood": ServedTask(versions[1], None, 0.0, versions[0])}, 2)
    assert table.take_left() == []
    assert table.get("mood").info.shadow == 1


def test_a_version_is_asked_by_its_number(
    versions: list[LoadedVersion], monkeypatch: pytest.MonkeyPatch, backbone: Backbone
) -> None:
    table = TaskTable()
    table.replace({"mood": ServedTask(versions[0])}, 1)
    assert table.has("mood", 1)
    assert not table.has("mood", 2)
    with pytest.raises(NotReadyError), table.using("mood", Ask(version=2)):
        pass
    monkeypatch.setattr(tasks_module, "MOST_OTHERS", 2)
    for other in (versions[1], versions[2], version(backbone, 1, "other")):
        table.add_other(other)
    assert not table.has("mood", 2), "the one asked longest ago makes room"
    with table.using("mood", Ask(version=3)) as (chosen, served):
        assert chosen is versions[2]
        assert served is None
        table.drop_others(lambda task, number: task == "mood" and number < 3)
        assert versions[2].info.digest in table.digests()
    assert {one.key for one in table.take_left()} == {("mood", 2), ("mood", 3), ("other", 1)}
    assert table.digests() == {versions[0].info.digest}
