"""What nothing needs, in both kinds of store, and that just that is deleted."""

import os
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from model_store.bucket import Bucket
from model_store.errors import StoreError
from model_store.garbage import Rule, collect, look
from model_store.registry import Registry, TaskRecord, VersionRecord
from model_store.store import Store, open_store
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact, example_file
from tests.s3 import S3, running_s3

OLD = "2026-01-01T00:00:00+00:00"
ALL = Rule(keep=0, before=inf)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    pytest.importorskip("s3fs")
    with running_s3() as server:
        yield server


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(tmp_path / "store")
    s3: S3 = request.getfixturevalue("s3")
    return open_store(s3.location(), tmp_path / "cache")


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def publish(store: Store, count: int, task: str = "mood") -> None:
    for number in range(count):
        store.publish(example_artifact(task, f"{task} {number}".encode()))


def add_backbone(store: Store, name: str, fingerprint: str = FINGERPRINT) -> None:
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"weights of " + name.encode())
        store.add_backbone(fingerprint, name, staging)


def numbers(store: Store, task: str = "mood") -> list[int]:
    return [info.version for info in store.versions(task)]


class TestVersions:
    def test_the_newest_stay(self, store: Store) -> None:
        publish(store, 5)
        publish(store, 2, "other")
        found = look(store, Rule(keep=3, before=inf))
        assert [(info.task, info.version) for info in found.versions] == [("mood", 1), ("mood", 2)]
        assert numbers(store) == [1, 2, 3, 4, 5]
        assert collect(store, Rule(keep=3, before=inf)) == found
        assert numbers(store) == [3, 4, 5]
        assert numbers(store, "other") == [1, 2]
        assert store.read("mood", 3)[1] == b"mood 2"
        assert collect(store, Rule(keep=3, before=inf)).versions == ()

    def test_what_is_needed_stays_however_old(self, store: Store) -> None:
        publish(store, 6)
        store.activate("mood", 2)  # history: 1, 3, 4, 5, 6
        store.activate("mood", 1)  # history: 3, 4, 5, 6, 2
        store.set_canary("mood", 3, 5)
        store.set_shadow("mood", 4)
        assert [info.version for info in collect(store, ALL).versions] == [5, 6]
        assert numbers(store) == [1, 2, 3, 4]
        versions = {info.version: info for info in store.versions("mood")}
        assert (versions[1].active, versions[3].canary, versions[4].shadow) == (True, 5, True)
        assert store.roll_back("mood").version == 2

    def test_a_task_that_does_not_answer_keeps_what_rolling_back_needs(self, store: Store) -> None:
        publish(store, 3)
        store.deactivate("mood")
        collect(store, ALL)
        assert numbers(store) == [3]
        assert store.roll_back("mood").version == 3

    def test_what_was_just_published_may_be_under_way(self, store: Store) -> None:
        store.publish(example_artifact(data=b"active"))
        store.publish(example_artifact(data=b"about to be a canary"), activate=False)
        assert look(store, Rule(keep=0, before=time.time() - 3600)).versions == ()
        assert [info.version for info in look(store, ALL).versions] == [2]

    def test_numbers_are_not_given_out_again(self, store: Store) -> None:
        publish(store, 2)
        store.publish(example_artifact(data=b"third"), activate=False)
        collect(store, ALL)
        assert store.publish(example_artifact(data=b"fourth")).version == 4

    def test_bytes_are_of_all(self, store: Store) -> None:
        publish(store, 4)
        found = collect(store, Rule(keep=1, before=inf))
        assert found.bytes == 2 * len(b"mood 0")

    def test_an_empty_store(self, store: Store) -> None:
        assert look(store, ALL).bytes == 0

    def test_of_many_one_change(self, store: Store) -> None:
        publish(store, 4)
        publish(store, 4, "other")
        before = store.registry().generation
        collect(store, Rule(keep=1, before=inf))
        assert store.registry().generation == before + 1


def test_a_time_that_cannot_be_read_is_no_reason_to_delete() -> None:
    def version(published_at: str) -> VersionRecord:
        return VersionRecord(digest="ab" * 32, published_at=published_at, bytes=1)

    record = TaskRecord(
        next_version=4, active=3, versions={1: version("then"), 2: version(OLD), 3: version(OLD)}
    )

    class Fixed(Store):
        def registry(self) -> Registry:
            return Registry(tasks={"mood": record})

        def leftovers(self, before: float) -> tuple[()]:
            return ()

    found = look(Fixed(Path("/nowhere")), Rule(keep=0, before=time.time()))
    assert [info.version for info in found.versions] == [2]


class TestBackbones:
    def test_only_where_it_is_asked_for_and_no_version_is_for_it(self, store: Store) -> None:
        add_backbone(store, "used")
        add_backbone(store, "unused", "cd" * 32)
        store.publish(example_file())
        assert collect(store, ALL).backbones == ()
        found = collect(store, Rule(keep=0, before=inf, backbones=True))
        assert [info.name for info in found.backbones] == ["unused"]
        assert [info.name for info in store.backbones()] == ["used"]
        assert store.backbone_path("used").is_dir()
        if store.folder is not None:
            assert [path.name for path in (store.root / "backbones").iterdir()] == [FINGERPRINT]
        else:
            names = Bucket(store.location).names("backbones")
            assert {name.split("/")[1] for name in names} == {FINGERPRINT}

    def test_one_whose_last_version_goes_with_it(self, store: Store) -> None:
        add_backbone(store, "used")
        store.publish(example_file())
        store.delete("mood")
        found = collect(store, Rule(keep=0, before=inf, backbones=True))
        assert [info.name for info in found.backbones] == ["used"]

    def test_one_that_was_just_added_may_be_under_way(self, store: Store) -> None:
        add_backbone(store, "new")
        rule = Rule(keep=0, before=time.time() - 3600, backbones=True)
        assert look(store, rule).backbones == ()

    def test_a_version_that_cannot_be_read_may_be_for_any(self, store: Store) -> None:
        add_backbone(store, "used")
        info = store.publish(example_file())
        if store.folder is not None:
            (store.root / "tasks" / "mood" / f"{info.version}.safetensors").write_bytes(b"?")
        else:
            bucket = Bucket(store.location)
            bucket.remove(bucket.names("tasks"))
        with pytest.raises(StoreError, match="publish the same file again"):
            collect(store, Rule(keep=0, before=inf, backbones=True))
        assert [info.name for info in store.backbones()] == ["used"]

    def test_published_while_it_looked(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        add_backbone(store, "used")
        plain = store.collect

        def publish_first(*arguments: object) -> object:
            Store(store._storage).publish(example_file())
            return plain(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "collect", publish_first)
        found = collect(store, Rule(keep=0, before=inf, backbones=True))
        assert found.backbones == ()
        assert [info.name for info in store.backbones()] == ["used"]


class TestLeftoversInAFolder:
    def test_what_killed_writers_left(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        publish(store, 2)
        (store.root / "staging" / "half").write_bytes(b"12345")
        (store.root / "staging" / "folder").mkdir()
        (store.root / "staging" / "folder" / "model").write_bytes(b"123")
        (store.root / "tasks" / "mood" / "3.safetensors").write_bytes(b"unnamed")
        found = look(store, ALL)
        assert [(item.name, item.bytes) for item in found.leftovers] == [
            *(("staging/folder", 3), ("staging/half", 5), ("tasks/mood/3.safetensors", 7)),
        ]
        assert look(store, Rule(keep=0, before=time.time() - 3600)).leftovers == ()
        assert collect(store, Rule(keep=9, before=inf)).leftovers == found.leftovers
        assert list((store.root / "staging").iterdir()) == []
        assert not (store.root / "tasks" / "mood" / "3.safetensors").exists()
        assert numbers(store) == [1, 2]

    def test_what_others_are_preparing_stays(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        publish(store, 1)
        with store.staging() as folder:
            (folder / "model.safetensors").write_bytes(b"weights")
            assert collect(store, ALL).leftovers == ()
            store.add_backbone(FINGERPRINT, "prepared", folder)
        assert [info.name for info in store.backbones()] == ["prepared"]


class TestLeftoversOfObjects:
    @pytest.fixture
    def store(self, s3: S3, tmp_path: Path) -> Store:
        return open_store(s3.location(), tmp_path)

    def leave(self, store: Store, task: str = "mood", generation: int = 1) -> str:
        name = f"tasks/{task}/{generation:010}-{'0' * 32}.safetensors"
        Bucket(store.location).put(name, b"uploaded")
        return name

    def test_uploads_of_killed_writers(self, store: Store) -> None:
        publish(store, 2)
        name = self.leave(store)
        (leftover,) = look(store, ALL).leftovers
        assert (leftover.name, leftover.bytes) == (name, 8)
        assert name in Bucket(store.location).names("tasks")
        assert collect(store, Rule(keep=9, before=inf)).leftovers == (leftover,)
        assert name not in Bucket(store.location).names("tasks")
        assert [store.read("mood", number)[1] for number in (1, 2)] == [b"mood 0", b"mood 1"]

    def test_those_of_the_last_hour_stay_with_what_is_as_new(self, store: Store) -> None:
        publish(store, 3)
        name = self.leave(store, generation=2)
        assert collect(store, Rule(keep=9, before=time.time() - 3600)).leftovers == ()
        assert name in Bucket(store.location).names("tasks")

    def test_nothing_left_is_no_change(self, store: Store) -> None:
        publish(store, 2)
        before = store.state_token()
        assert collect(store, Rule(keep=9, before=inf)).leftovers == ()
        assert store.state_token() == before

    def test_a_writer_that_was_asleep_uploads_again(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has uploaded; before it can name what it has uploaded, all of that is collected."""
        publish(store, 1)
        plain, slept = Bucket.put, list[str]()

        def put(bucket: Bucket, name: str, data: bytes) -> None:
            plain(bucket, name, data)
            if not slept:
                slept.append(name)
                other = open_store(store.location)
                assert collect(other, Rule(keep=9, before=inf)).leftovers[0].name == name

        monkeypatch.setattr(Bucket, "put", put)
        assert store.publish(example_artifact(data=b"slowly")).version == 2
        assert store.read("mood", 2)[1] == b"slowly"
        assert slept[0] not in Bucket(store.location).names("tasks")
