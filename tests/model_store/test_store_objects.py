"""A store in an object store, over HTTP against moto's S3: what users and other writers see."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_store import generations, objects, uploads
from model_store.audit import AuditEntry
from model_store.bucket import Bucket
from model_store.errors import ConflictError, NotFoundError, StoreError
from model_store.store import BackboneInfo, Store, open_store
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact
from tests.s3 import BUCKET, S3, running_s3

pytest.importorskip("s3fs")

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (example_artifact(data=data) for data in (b"first", b"second"))
WRITERS, EACH = 3, 6

PUBLISH_MANY = """
import sys
from pathlib import Path
from model_store.store import open_store
from tests.model_store.example_artifacts import example_artifact
location, cache, writer, each = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for number in range(each):
    task = "shared" if number % 2 else f"own{writer}"
    artifact = example_artifact(task, f"{writer}-{number}".encode())
    print(open_store(location, cache).publish(artifact).version)
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def store(s3: S3, tmp_path: Path) -> Store:
    return open_store(s3.location(), tmp_path / "cache")


def elsewhere(store: Store, tmp_path: Path) -> Store:
    """The same store as another machine sees it."""
    return open_store(store.location, tmp_path / "cache elsewhere")


def names(store: Store) -> list[str]:
    return Bucket(store.location).names("")


def add_backbone(store: Store, name: str = "tiny", weights: bytes = b"weights") -> BackboneInfo:
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(weights)
        (staging / "tokenizer.json").write_bytes(b"{}")
        return store.add_backbone(FINGERPRINT, name, staging)


class TestChanges:
    def test_an_empty_place_is_an_empty_store_and_stays_empty(self, store: Store) -> None:
        assert store.state_token() is None
        assert store.tasks() == {}
        assert store.backbones() == []
        assert store.audit(5) == []
        assert store.document("keys.json") is None
        assert store.document_token("keys.json") is None
        with pytest.raises(NotFoundError, match=r"no task 'mood' in the store; it has: nothing"):
            store.read("mood")
        with pytest.raises(NotFoundError, match=r"no backbone in the store s3://"):
            store.backbone(None)
        assert names(store) == []

    def test_another_machine_sees_every_change(self, store: Store, tmp_path: Path) -> None:
        other = elsewhere(store, tmp_path)
        first, second = store.publish(FIRST), other.publish(SECOND)
        assert (first.version, second.version) == (1, 2)
        assert store.read("mood") == (second, b"second")
        assert other.read("mood", 1)[1] == b"first"
        store.activate("mood", 1)
        other.set_canary("mood", 2, 12.5)
        store.set_shadow("mood", 2)
        (info,) = [info for info in other.versions("mood") if info.version == 2]
        assert (info.canary, info.shadow) == (12.5, True)
        other.roll_back("mood")
        assert store.tasks()["mood"].version == 2
        store.delete("mood", 1)
        with pytest.raises(ConflictError, match=r"version 2 is active"):
            other.delete("mood", 2)
        assert [info.version for info in other.versions("mood")] == [2]
        other.delete("mood")
        assert store.task_names() == []
        assert other.publish(FIRST).version == 3

    def test_what_is_deleted_leaves_no_object(self, store: Store) -> None:
        store.publish(FIRST)
        store.publish(SECOND)
        store.delete("mood", 1)
        assert len([name for name in names(store) if name.startswith("tasks/")]) == 1
        store.delete("mood")
        assert all(name.startswith("registry/") for name in names(store))

    def test_the_token_changes_with_every_change_and_only_then(self, store: Store) -> None:
        tokens = [store.state_token()]
        changes: list[Callable[[], object]] = [
            lambda: store.publish(FIRST),
            lambda: store.publish(SECOND),
            lambda: store.activate("mood", 1),
        ]
        for change in changes:
            change()
            tokens.append(store.state_token())
            change()
            assert store.state_token() == tokens[-1]
        assert len(set(tokens)) == 4

    def test_the_same_bytes_again_repair_a_damaged_or_missing_object(self, store: Store) -> None:
        store.publish(FIRST)
        bucket = Bucket(store.location)
        (name,) = bucket.names("tasks")
        bucket.put(name, b"fir")
        with pytest.raises(StoreError, match=rf"{name}: .* damaged: 3 bytes .*publish the same"):
            store.read("mood")
        assert store.publish(FIRST).version == 1
        assert store.read("mood")[1] == b"first"
        (name,) = bucket.names("tasks")
        bucket.remove([name])
        with pytest.raises(StoreError, match=rf"{name}: the file of this version is missing"):
            store.read("mood")
        store.publish(FIRST)
        assert store.read("mood")[1] == b"first"
        assert len(bucket.names("tasks")) == 1

    def test_old_generations_are_removed(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generations, "KEPT", 3)
        store.publish(FIRST)
        store.publish(SECOND)
        for number in (1, 2) * 4:
            store.activate("mood", number)
            store.put_document("keys.json", str(number).encode())
        found = names(store)
        assert sum(name.startswith("registry/") for name in found) == 4
        assert sum(name.startswith("documents/keys.json/") for name in found) == 4
        assert store.read("mood")[1] == b"second"
        assert store.document("keys.json") == b"2"

    def test_a_digest_that_does_not_fit_changes_nothing(self, store: Store) -> None:
        store.publish(FIRST)
        before = names(store)
        with pytest.raises(StoreError, match=r"do not have the digest given"):
            store.publish(SECOND.model_copy(update={"digest": "0" * 64}))
        assert names(store) == before


class TestAuditAndDocuments:
    def test_entries_come_back_in_order_the_newest_last(self, store: Store, tmp_path: Path) -> None:
        other = elsewhere(store, tmp_path)
        entries = []
        for number in range(1, 6):
            entry = AuditEntry(by="someone", action="delete", task="mood", version=number)
            (store if number % 2 else other).append_audit(entry)
            entries.append(entry)
        assert store.audit(2) == entries[-2:]
        assert other.audit(100) == entries

    def test_earlier_days_are_looked_at_where_needed(self, store: Store) -> None:
        bucket = Bucket(store.location)
        for day in (1, 2, 3):
            for hour in (1, 2):
                entry = AuditEntry(by="x", action="delete", task=f"day{day}", version=hour)
                bucket.put(f"audit/2026-01-0{day}/0{hour}-00-00.000000-ab", entry.to_line())
        found = [(entry.task, entry.version) for entry in store.audit(3)]
        assert found == [("day2", 2), ("day3", 1), ("day3", 2)]

    def test_documents(self, store: Store, tmp_path: Path) -> None:
        other = elsewhere(store, tmp_path)
        tokens = []
        for content in (b"one", b"\ntwo\n", b"one"):
            store.put_document("keys.json", content)
            assert other.document("keys.json") == content
            tokens.append(other.document_token("keys.json"))
        assert len(set(tokens)) == 3
        other.put_document("keys.json", b"one")
        assert store.document_token("keys.json") == tokens[-1]
        assert store.state_token() is None


class TestBackbones:
    def test_is_downloaded_once_for_each_machine(self, store: Store, tmp_path: Path) -> None:
        info = add_backbone(store)
        other = elsewhere(store, tmp_path)
        assert other.backbone("tiny") == info
        folder = other.backbone_path("tiny")
        assert folder.name == FINGERPRINT
        assert (folder / "model.safetensors").read_bytes() == b"weights"
        bucket = Bucket(store.location)
        bucket.remove(bucket.names("backbones"))
        assert elsewhere(store, tmp_path).backbone_path("abab") == folder
        with pytest.raises(StoreError, match=r"the object is missing; add the backbone again"):
            store.backbone_path("tiny")
        add_backbone(store)
        assert (store.backbone_path("tiny") / "tokenizer.json").read_bytes() == b"{}"

    def test_a_damaged_object_is_not_taken(self, store: Store, tmp_path: Path) -> None:
        add_backbone(store)
        bucket = Bucket(store.location)
        bucket.put(bucket.names("backbones")[0], b"weightz")
        with pytest.raises(StoreError, match=r"model\.safetensors: the object is damaged"):
            store.backbone_path("tiny")
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [
            tmp_path / "cache" / "lock"
        ]
        add_backbone(store)
        assert (store.backbone_path("tiny") / "model.safetensors").read_bytes() == b"weights"

    def test_a_cache_that_is_cut_off_is_filled_again(self, store: Store) -> None:
        add_backbone(store)
        file = store.backbone_path("tiny") / "model.safetensors"
        file.write_bytes(b"wei")
        assert (store.backbone_path("tiny") / "model.safetensors").read_bytes() == b"weights"

    def test_other_weights_for_the_same_name_are_refused(self, store: Store) -> None:
        add_backbone(store)
        before = names(store)
        with store.staging() as staging:
            (staging / "model.safetensors").write_bytes(b"x")
            with pytest.raises(ConflictError, match=r"'tiny' is taken by backbone abab"):
                store.add_backbone("cd" * 32, "tiny", staging)
        assert names(store) == before

    def test_adding_it_again_uploads_nothing_and_renames(self, store: Store) -> None:
        add_backbone(store)
        before = [name for name in names(store) if name.startswith("backbones/")]
        add_backbone(store, "renamed")
        assert [name for name in names(store) if name.startswith("backbones/")] == before
        assert store.backbone(None).name == "renamed"

    def test_what_differs_replaces_it_and_is_downloaded_anew(self, store: Store) -> None:
        add_backbone(store)
        old = store.backbone_path("tiny")
        add_backbone(store, weights=b"more weights")
        new = store.backbone_path("tiny")
        assert (new / "model.safetensors").read_bytes() == b"more weights"
        assert (old / "model.safetensors").read_bytes() == b"weights"  # for who reads it still
        assert len([name for name in names(store) if name.startswith("backbones/")]) == 2

    def test_a_cache_that_cannot_be_written_is_named(self, store: Store, tmp_path: Path) -> None:
        add_backbone(store)
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(StoreError, match=r"cannot use the cache .*cache.*TASKBONE_CACHE"):
            store.backbone_path("tiny")


class TestManyWriters:
    def test_processes_lose_no_version_and_reuse_no_number(
        self, store: Store, tmp_path: Path
    ) -> None:
        command = [sys.executable, "-c", PUBLISH_MANY, store.location, str(tmp_path / "cache")]
        writers = [
            subprocess.Popen([*command, str(writer), str(EACH)], cwd=ROOT, stdout=subprocess.PIPE)
            for writer in range(WRITERS)
        ]
        outputs = [writer.communicate()[0] for writer in writers]
        assert [writer.returncode for writer in writers] == [0] * WRITERS
        assert [len(output.split()) for output in outputs] == [EACH] * WRITERS
        shared = store.versions("shared")
        assert [info.version for info in shared] == list(range(1, WRITERS * EACH // 2 + 1))
        contents = {store.read("shared", info.version)[1].decode() for info in shared}
        assert contents == {
            f"{writer}-{number}" for writer in range(WRITERS) for number in range(1, EACH, 2)
        }
        for writer in range(WRITERS):
            own = [info.version for info in store.versions(f"own{writer}")]
            assert own == list(range(1, EACH // 2 + 1))
        uploaded = [name for name in names(store) if name.startswith("tasks/")]
        assert len(uploaded) == WRITERS * EACH


class TestFaults:
    def test_a_change_whose_answer_was_lost_is_known_as_ones_own(
        self, s3: S3, store: Store
    ) -> None:
        store.publish(FIRST)
        store.publish(SECOND)
        store.activate("mood", 1)
        before = store.state_token()
        with s3.fault("lose answer", "PUT", "/registry/"):
            store.roll_back("mood")
        assert before == (4,)
        assert store.state_token() == (5,)  # once, not twice
        assert store.tasks()["mood"].version == 2

    def test_an_upload_whose_answer_was_lost_is_repeated(self, s3: S3, store: Store) -> None:
        with s3.fault("lose answer", "PUT", "/tasks/"):
            store.publish(FIRST)
        assert store.read("mood")[1] == b"first"
        assert len([name for name in names(store) if name.startswith("tasks/")]) == 1

    def test_a_conflict_with_one_who_gave_up_is_tried_again(self, s3: S3, store: Store) -> None:
        store.publish(FIRST)
        with s3.fault("conflict", "PUT", "/registry/", times=2):
            store.publish(SECOND)
        assert store.read("mood")[1] == b"second"
        assert store.state_token() == (3,)

    def test_an_object_store_that_overwrites_is_refused(self, s3: S3, store: Store) -> None:
        with (
            s3.fault("unconditional", "PUT", "probe-", times=9),
            pytest.raises(StoreError, match=r"overwrites an object .*If-None-Match"),
        ):
            store.publish(FIRST)
        assert names(store) == []

    def test_a_missing_bucket_is_named(self, s3: S3, tmp_path: Path) -> None:
        store = open_store("s3://nowhere/store", tmp_path)
        for call in (store.tasks, store.state_token, lambda: store.read("mood")):
            with pytest.raises(StoreError, match=r"cannot read the store s3://nowhere/.*bucket"):
                call()
        with pytest.raises(StoreError, match=r"s3://nowhere/store: .*bucket does not exist"):
            store.publish(FIRST)
        with pytest.raises(StoreError, match=r"cannot write the store s3://nowhere/"):
            store.append_audit(AuditEntry(by="x", action="delete", task="mood"))

    def test_wrong_credentials_are_named(self, s3: S3, store: Store) -> None:
        store.publish(FIRST)
        with s3.checked_keys():
            for call in (store.tasks, store.state_token, lambda: store.publish(SECOND)):
                with pytest.raises(
                    StoreError, match=r"PermissionError: The AWS Access Key .*AWS_ACCESS_KEY_ID"
                ):
                    call()
        assert store.read("mood")[1] == b"first"

    def test_missing_credentials_are_named(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from s3fs import S3FileSystem

        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        S3FileSystem.clear_instance_cache()
        with pytest.raises(StoreError, match=r"Unable to locate credentials; .*AWS_ACCESS_KEY_ID"):
            store.tasks()
        S3FileSystem.clear_instance_cache()

    def test_a_damaged_or_missing_registry_is_named_and_kept(self, store: Store) -> None:
        store.publish(FIRST)
        bucket = Bucket(store.location)
        bucket.put("registry/0000000003", b"word\n{")
        before = names(store)
        for call in (store.tasks, lambda: store.publish(SECOND)):
            with pytest.raises(StoreError, match=r"registry/0000000003: .* damaged: .*Invalid"):
                call()
        assert names(store) == before
        bucket.remove(bucket.names("registry"))
        for call in (store.tasks, lambda: store.publish(SECOND)):
            with pytest.raises(StoreError, match=r"the registry is missing, but there are tasks"):
                call()

    @pytest.mark.parametrize(
        ("location", "problem"),
        [
            ("nosuch://bucket/store", "cannot be opened: Protocol not known: nosuch"),
            ("s3://", "names no bucket"),
        ],
    )
    def test_a_location_that_is_none_is_named(self, location: str, problem: str) -> None:
        with pytest.raises(StoreError, match=problem):
            open_store(location, Path("/nowhere")).tasks()


class TestSweeping:
    def test_what_a_killed_writer_left_goes_when_it_is_old(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(uploads, "GRACE", 4)
        monkeypatch.setattr(objects, "SWEEP_EVERY", 1)
        store.publish(FIRST)
        bucket = Bucket(store.location)
        mark = "0000000003-" + "ab" * 16
        leftovers = [
            f"tasks/mood/{mark}.safetensors",
            f"backbones/{FINGERPRINT}/{mark}/config.json",
        ]
        strange = ["notes.txt", "tasks/notes.txt", "tasks/mood/1.safetensors", "backbones/x/y/z"]
        for name in leftovers + strange:
            bucket.put(name, b"x")
        store.publish(SECOND)
        for number in (1, 2, 1, 2):
            assert set(leftovers) <= set(names(store))
            store.activate("mood", number)
        assert store.state_token() == (7,)
        store.activate("mood", 1)
        assert not set(leftovers) & set(names(store))
        assert set(strange) <= set(names(store))
        assert store.read("mood")[1] == b"first"


def test_a_folder_is_a_folder_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    locations = (tmp_path / "store", f"{tmp_path}/store", f"file://{tmp_path}/store", "~/store")
    assert {open_store(location).root for location in locations} == {tmp_path / "store"}
    with pytest.raises(StoreError, match=r"s3://models/x is no folder"):
        open_store(f"s3://{BUCKET}/x", tmp_path).root  # noqa: B018 - it raises


def test_the_cache_is_where_the_environment_says(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backbone(store)
    monkeypatch.setenv("TASKBONE_CACHE", str(tmp_path / "named"))
    assert (tmp_path / "named") in open_store(store.location).backbone_path("tiny").parents
