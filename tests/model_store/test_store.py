"""The store as its users see it: what each call changes, and what it says of wrong things."""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model_store.errors import ConflictError, NotFoundError, StoreError
from model_store.store import BackboneInfo, Store, VersionInfo
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact

FIRST, SECOND, THIRD = (example_artifact(data=name) for name in (b"first", b"second", b"third"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def tree(store: Store) -> dict[str, bytes]:
    """Every file under the store's root with its content, but for the lock."""
    files = (path for path in store.root.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(store.root)): path.read_bytes() for path in files}


def add_backbone(store: Store, fingerprint: str = FINGERPRINT, name: str = "tiny") -> BackboneInfo:
    with store.staging() as staging:
        (staging / "model.safetensors").write_bytes(b"weights")
        (staging / "tokenizer.json").write_bytes(b"{}")
        return store.add_backbone(fingerprint, name, staging)


class TestReadingAnEmptyStore:
    def test_makes_nothing(self, store: Store) -> None:
        assert store.tasks() == {}
        assert store.backbones() == []
        assert store.state_token() is None
        assert not store.root.exists()

    def test_says_that_there_is_nothing(self, store: Store) -> None:
        with pytest.raises(NotFoundError, match=r"no task 'mood' in the store; it has: nothing"):
            store.versions("mood")
        with pytest.raises(
            NotFoundError, match=r"no backbone 'tiny' in the store; it has: nothing"
        ):
            store.backbone_path("tiny")


class TestPublish:
    def test_gives_numbers_from_one_and_activates(self, store: Store) -> None:
        first, second = store.publish(FIRST), store.publish(SECOND)
        assert (first.version, second.version) == (1, 2)
        assert first.active
        assert second.active
        assert [info.active for info in store.versions("mood")] == [False, True]
        assert store.tasks() == {"mood": second}

    def test_describes_the_version(self, store: Store) -> None:
        info = store.publish(FIRST)
        assert info.task == "mood"
        assert info.digest == hashlib.sha256(b"first").hexdigest()
        assert info.bytes == len(b"first")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", info.published_at)

    def test_without_activation_leaves_the_active_version(self, store: Store) -> None:
        store.publish(FIRST)
        assert not store.publish(SECOND, activate=False).active
        assert store.tasks()["mood"].version == 1
        assert len(store.versions("mood")) == 2

    def test_first_version_may_stay_inactive(self, store: Store) -> None:
        store.publish(FIRST, activate=False)
        assert store.tasks() == {}
        with pytest.raises(NotFoundError, match=r"'mood' has no active version; .* one of: 1"):
            store.read("mood")
        assert store.read("mood", 1)[1] == b"first"

    def test_the_same_bytes_again_change_nothing(self, store: Store) -> None:
        info = store.publish(FIRST)
        before, token = tree(store), store.state_token()
        assert store.publish(FIRST) == info
        assert tree(store) == before
        assert store.state_token() == token

    def test_the_bytes_of_an_older_version_activate_it(self, store: Store) -> None:
        store.publish(FIRST)
        store.publish(SECOND)
        again = store.publish(FIRST)
        assert (again.version, again.active) == (1, True)
        assert len(store.versions("mood")) == 2

    def test_the_same_bytes_repair_a_damaged_or_missing_file(self, store: Store) -> None:
        store.publish(FIRST)
        path = store.root / "tasks" / "mood" / "1.safetensors"
        for damage in (lambda: path.write_bytes(b"fir"), path.unlink):
            damage()
            store.publish(FIRST)
            assert store.read("mood")[1] == b"first"

    def test_the_same_bytes_for_two_tasks_are_two_versions(self, store: Store) -> None:
        store.publish(example_artifact("one"))
        store.publish(example_artifact("two"))
        assert list(store.tasks()) == ["one", "two"]

    def test_leaves_no_temporary(self, store: Store) -> None:
        store.publish(FIRST)
        assert sorted(tree(store)) == ["registry.json", "tasks/mood/1.safetensors"]

    def test_a_digest_that_does_not_fit_is_found_before_anything_changes(
        self, store: Store
    ) -> None:
        store.publish(FIRST)
        before = tree(store)
        wrong = SECOND.model_copy(update={"digest": THIRD.digest})
        with pytest.raises(StoreError, match=r"2\.safetensors: what was written reads back"):
            store.publish(wrong)
        assert tree(store) == before


class TestActivateAndRollBack:
    def test_activate_moves_back_and_forth(self, store: Store) -> None:
        for artifact in (FIRST, SECOND, THIRD):
            store.publish(artifact)
        assert store.activate("mood", 1).active
        assert store.tasks()["mood"].version == 1

    def test_roll_back_goes_one_version_further_each_time(self, store: Store) -> None:
        for artifact in (FIRST, SECOND, THIRD):
            store.publish(artifact)
        assert store.roll_back("mood").version == 2
        assert store.roll_back("mood").version == 1
        with pytest.raises(ConflictError, match=r"none to roll back to; activate one of: 1, 2, 3"):
            store.roll_back("mood")

    def test_a_deactivated_task_keeps_its_versions_and_comes_back(self, store: Store) -> None:
        for artifact in (FIRST, SECOND):
            store.publish(artifact)
        store.set_shadow("mood", 1)
        store.deactivate("mood")
        assert store.tasks() == {}
        assert [(info.active, info.shadow) for info in store.versions("mood")] == [
            (False, False),
            (False, False),
        ]
        with pytest.raises(NotFoundError, match=r"no active version; .* one of: 1, 2"):
            store.deactivate("mood")
        assert store.roll_back("mood").version == 2
        assert store.roll_back("mood").version == 1

    def test_all_versions_of_all_tasks_are_listed_at_once(self, store: Store) -> None:
        assert store.all_versions() == []
        for artifact in (FIRST, SECOND):
            store.publish(artifact)
        assert store.all_versions() == store.versions("mood")

    def test_roll_back_follows_activation_not_numbers(self, store: Store) -> None:
        for artifact in (FIRST, SECOND, THIRD):
            store.publish(artifact)
        store.activate("mood", 1)
        assert store.roll_back("mood").version == 3

    def test_activating_the_active_version_changes_nothing(self, store: Store) -> None:
        store.publish(FIRST)
        token = store.state_token()
        store.activate("mood", 1)
        assert store.state_token() == token
        with pytest.raises(ConflictError):
            store.roll_back("mood")

    @pytest.mark.parametrize("number", [0, 2, -1])
    def test_unknown_version(self, store: Store, number: int) -> None:
        store.publish(FIRST)
        with pytest.raises(NotFoundError, match=rf"'mood' has no version {number}; it has: 1"):
            store.activate("mood", number)


class TestCanaryAndShadow:
    @pytest.fixture(autouse=True)
    def three_versions(self, store: Store) -> None:
        for artifact in (FIRST, SECOND, THIRD):
            store.publish(artifact)

    def roles(self, store: Store) -> tuple[int | None, float | None, int | None]:
        """The version and share of the canary, and the shadow's version."""
        record = store.registry().task("mood")
        canary = record.canary
        if canary is None:
            return None, None, record.shadow
        return canary.version, canary.percent, record.shadow

    def test_they_are_set_shown_and_cleared(self, store: Store) -> None:
        assert store.set_canary("mood", 1, 12.5).canary == 12.5
        assert store.set_shadow("mood", 2).shadow
        infos = store.versions("mood")
        assert [(info.active, info.canary, info.shadow) for info in infos] == [
            (False, 12.5, False),
            (False, None, True),
            (True, None, False),
        ]
        assert store.set_canary("mood", 2, 50).canary == 50
        cleared = store.clear_canary("mood"), store.clear_shadow("mood")
        assert [info and info.version for info in cleared] == [2, 2]
        assert self.roles(store) == (None, None, None)
        assert (store.clear_canary("mood"), store.clear_shadow("mood")) == (None, None)
        assert store.tasks()["mood"].version == 3

    def test_activation_ends_what_becomes_active_and_nothing_else(self, store: Store) -> None:
        store.set_canary("mood", 1, 10)
        store.set_shadow("mood", 2)
        store.activate("mood", 2)
        assert self.roles(store) == (1, 10, None)
        store.activate("mood", 1)
        assert self.roles(store) == (None, None, None)

    def test_rolling_back_ends_what_becomes_active(self, store: Store) -> None:
        store.set_canary("mood", 2, 10)
        store.set_shadow("mood", 1)
        store.roll_back("mood")
        assert self.roles(store) == (None, None, 1)

    def test_publishing_ends_neither(self, store: Store) -> None:
        store.set_canary("mood", 2, 10)
        store.set_shadow("mood", 1)
        store.publish(example_artifact(data=b"fourth"))
        assert self.roles(store) == (2, 10, 1)

    def test_deletion_ends_them(self, store: Store) -> None:
        store.set_canary("mood", 1, 10)
        store.set_shadow("mood", 2)
        store.delete("mood", 1)
        assert self.roles(store) == (None, None, 2)
        store.delete("mood")
        store.publish(FIRST)
        assert self.roles(store) == (None, None, None)

    def test_the_active_version_can_be_neither(self, store: Store) -> None:
        changes: list[Callable[[str, int], object]] = [
            store.set_shadow,
            lambda task, version: store.set_canary(task, version, 10),
        ]
        for change in changes:
            with pytest.raises(ConflictError, match=r"version 3 cannot be a .*: it is the active"):
                change("mood", 3)
            with pytest.raises(NotFoundError, match=r"no version 4; it has: 1, 2, 3"):
                change("mood", 4)
            with pytest.raises(NotFoundError, match=r"no task 'mod'"):
                change("mod", 1)
        store.publish(example_artifact("quiet"), activate=False)
        with pytest.raises(ConflictError, match=r"cannot be a shadow: no version is active"):
            store.set_shadow("quiet", 1)
        for clear in (store.clear_canary, store.clear_shadow):
            with pytest.raises(NotFoundError, match=r"no task 'mod'"):
                clear("mod")

    @pytest.mark.parametrize("percent", [0, 100, -1, 1e9, float("nan"), float("inf")])
    def test_a_share_is_between_nothing_and_all(self, store: Store, percent: float) -> None:
        with pytest.raises(ConflictError, match=r"expected more than 0 and less than 100"):
            store.set_canary("mood", 1, percent)
        assert self.roles(store) == (None, None, None)

    def test_a_registry_without_them_names_neither(self, store: Store) -> None:
        store.set_canary("mood", 1, 10)
        store.set_shadow("mood", 1)
        path = store.root / "registry.json"
        assert {"canary", "shadow"} <= json.loads(path.read_bytes())["tasks"]["mood"].keys()
        store.clear_canary("mood")
        store.clear_shadow("mood")
        assert not {"canary", "shadow"} & json.loads(path.read_bytes())["tasks"]["mood"].keys()


class TestDelete:
    def test_a_version(self, store: Store) -> None:
        store.publish(FIRST)
        store.publish(SECOND)
        store.delete("mood", 1)
        assert [info.version for info in store.versions("mood")] == [2]
        assert sorted(tree(store)) == ["registry.json", "tasks/mood/2.safetensors"]
        with pytest.raises(ConflictError):  # the deleted one has left the history, too
            store.roll_back("mood")

    def test_the_active_version_is_refused(self, store: Store) -> None:
        store.publish(FIRST)
        with pytest.raises(ConflictError, match=r"version 1 is active .* delete the whole task"):
            store.delete("mood", 1)
        assert store.read("mood")[1] == b"first"

    def test_a_whole_task(self, store: Store) -> None:
        store.publish(FIRST)
        store.publish(SECOND)
        store.publish(example_artifact("other"))
        store.delete("mood")
        assert list(store.tasks()) == ["other"]
        assert not (store.root / "tasks" / "mood").exists()
        with pytest.raises(NotFoundError, match="no task 'mood' in the store; it has: other"):
            store.delete("mood")

    def test_numbers_are_never_given_out_twice(self, store: Store) -> None:
        store.publish(FIRST)
        store.publish(SECOND, activate=False)
        store.delete("mood", 2)
        assert store.publish(SECOND).version == 3
        store.delete("mood")
        assert store.publish(FIRST).version == 4

    def test_unknown_names_are_listed(self, store: Store) -> None:
        store.publish(FIRST)
        with pytest.raises(NotFoundError, match="no task 'mod' in the store; it has: mood"):
            store.delete("mod")
        with pytest.raises(NotFoundError, match="'mood' has no version 7; it has: 1"):
            store.delete("mood", 7)


class TestRead:
    def test_gives_the_active_version_or_the_one_asked_for(self, store: Store) -> None:
        store.publish(FIRST)
        second = store.publish(SECOND)
        assert store.read("mood") == (second, b"second")
        info, data = store.read("mood", 1)
        assert (info.version, info.active, data) == (1, False, b"first")

    @pytest.mark.parametrize(
        "damaged", [b"firs", b"First", b"", b"first" * 2], ids=["cut", "bit", "empty", "longer"]
    )
    def test_a_damaged_file_is_named(self, store: Store, damaged: bytes) -> None:
        store.publish(FIRST)
        path = store.root / "tasks" / "mood" / "1.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=rf"{path}: .* damaged: {len(damaged)} bytes"):
            store.read("mood")

    def test_a_missing_file_is_named(self, store: Store) -> None:
        store.publish(FIRST)
        path = store.root / "tasks" / "mood" / "1.safetensors"
        path.unlink()
        with pytest.raises(StoreError, match=rf"{path}: .* missing; publish the same file again"):
            store.read("mood")

    @pytest.mark.parametrize(
        "name", ["../../etc/passwd", "/etc/passwd", "mood/../mood", "", ".", "..", "MOOD", "mood\n"]
    )
    def test_no_name_leads_out_of_the_store(self, store: Store, name: str) -> None:
        store.publish(FIRST)
        for call in (store.read, store.versions, store.roll_back, store.delete):
            with pytest.raises(NotFoundError, match="no task"):
                call(name)

    def test_long_names_and_long_lists_are_cut(self, store: Store) -> None:
        for number in range(25):
            store.publish(example_artifact(f"task{number:02}"))
        with pytest.raises(NotFoundError) as caught:
            store.read("x" * 100_000)
        assert "task19 and 5 more" in str(caught.value)
        assert len(str(caught.value)) < 400


class TestStateToken:
    def test_changes_with_every_change_and_only_then(self, store: Store) -> None:
        seen = [store.state_token()]
        changes: list[Callable[[], object]] = [
            lambda: store.publish(FIRST),
            lambda: store.publish(SECOND),
            *(lambda: store.activate("mood", 1), lambda: store.activate("mood", 2)) * 10,
            lambda: store.roll_back("mood"),
            lambda: store.delete("mood", 2),
            lambda: store.delete("mood"),
        ]
        for change in changes:
            change()
            token = store.state_token()
            store.tasks()
            assert store.state_token() == token
            seen.append(token)
        assert len(set(seen)) == len(changes) + 1

    def test_grows_in_time_even_where_the_clock_stands_still(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("model_store.folder.time.time_ns", lambda: 1_700_000_000_000_000_000)
        store.publish(FIRST)
        store.publish(SECOND)
        times = []
        for number in (1, 2, 1):
            store.activate("mood", number)
            token = store.state_token()
            assert token is not None
            times.append(token[1])
        assert times == sorted(set(times))


class TestBackbones:
    def test_adds_once(self, store: Store) -> None:
        info = add_backbone(store)
        assert info == BackboneInfo("tiny", FINGERPRINT, len(b"weights{}"))
        assert store.backbones() == [info]
        path = store.root / "backbones" / FINGERPRINT
        assert (path / "model.safetensors").read_bytes() == b"weights"
        before, token = tree(store), store.state_token()
        assert add_backbone(store) == info
        assert tree(store) == before
        assert store.state_token() == token

    def test_is_found_by_name_and_by_start_of_fingerprint(self, store: Store) -> None:
        add_backbone(store)
        path = store.root / "backbones" / FINGERPRINT
        assert store.backbone_path("tiny") == path
        assert store.backbone_path("abab") == path
        assert store.backbone_path(FINGERPRINT) == path

    def test_unknown_and_ambiguous_names_list_what_there_is(self, store: Store) -> None:
        add_backbone(store)
        add_backbone(store, "abac" * 16, "other")
        for name, problem in (("big", "no backbone"), ("aba", "several"), ("", "no backbone")):
            with pytest.raises(NotFoundError, match=rf"{problem}.*tiny \(abab.*other \(abac"):
                store.backbone_path(name)

    def test_the_same_backbone_takes_its_newest_name(self, store: Store) -> None:
        add_backbone(store)
        add_backbone(store, name="renamed")
        assert [info.name for info in store.backbones()] == ["renamed"]

    def test_a_name_belongs_to_one_backbone(self, store: Store) -> None:
        add_backbone(store)
        before = tree(store)
        with pytest.raises(ConflictError, match=r"'tiny' is taken by backbone abab.*another name"):
            add_backbone(store, "cd" * 32)
        assert tree(store) == before

    def test_a_missing_folder_is_named_and_put_back(self, store: Store) -> None:
        add_backbone(store)
        shutil.rmtree(store.root / "backbones" / FINGERPRINT)
        with pytest.raises(StoreError, match=rf"{FINGERPRINT}: .* missing; add it again"):
            store.backbone_path("tiny")
        add_backbone(store)
        assert store.backbone_path("tiny").is_dir()

    def test_staging_is_removed_after_an_error(self, store: Store) -> None:
        def fail() -> None:
            with store.staging() as staging:
                (staging / "half").write_bytes(b"x")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert list((store.root / "staging").iterdir()) == []

    def test_a_living_writers_staging_is_not_swept(self, store: Store) -> None:
        with store.staging() as staging:
            (staging / "model.safetensors").write_bytes(b"weights")
            Store(store.root).publish(FIRST)
            info = store.add_backbone(FINGERPRINT, "tiny", staging)
        assert store.backbones() == [info]


class TestSweeping:
    def test_the_next_writer_removes_leftovers_and_nothing_else(self, store: Store) -> None:
        store.publish(FIRST)
        add_backbone(store)
        before = tree(store)
        strange = ["notes.txt", "tasks/readme.txt", "tasks/mood/notes.txt", "backbones/.keep"]
        leftovers = [
            "staging/temporary",
            "staging/folder/model.safetensors",
            "tasks/mood/2.safetensors",
            "tasks/never/1.safetensors",
            f"backbones/{'cd' * 32}/model.safetensors",
        ]
        for name in strange + leftovers:
            path = store.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        store.activate("mood", 1)
        assert tree(store) == before | dict.fromkeys(strange, b"x")
        assert not (store.root / "tasks" / "never").exists()


def test_infos_are_immutable(store: Store) -> None:
    info: VersionInfo = store.publish(FIRST)
    with pytest.raises(AttributeError):
        info.version = 7  # type: ignore[misc]


class TestTheRegistryInMemory:
    def test_is_read_again_only_when_it_has_changed(self, store: Store) -> None:
        other = Store(store.root)
        store.publish(FIRST)
        before = store.registry()
        assert store.registry() is before
        assert store.read("mood")[1] == b"first"
        assert store.registry() is before
        other.publish(SECOND)
        assert store.read("mood")[1] == b"second"
        assert store.registry() is not before

    def test_is_not_sent_along(self, store: Store) -> None:
        store.publish(FIRST)
        known = store.registry()
        sent = copy.copy(store)  # by the same method as pickle, which Ray uses
        assert sent.location == store.location
        assert sent.registry() == known
        assert sent.registry() is not known
