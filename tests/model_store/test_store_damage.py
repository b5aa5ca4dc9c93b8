"""A damaged store, one that is none, one without rights to it: errors name what is wrong."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_store.errors import StoreError
from model_store.store import Store
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact

FIRST, SECOND, THIRD = (example_artifact(data=name) for name in (b"first", b"second", b"third"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def tree(store: Store) -> dict[str, bytes]:
    """Every file under the store's root with its content, but for the lock."""
    files = (path for path in store.root.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(store.root)): path.read_bytes() for path in files}


class TestDamagedStore:
    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("", "Invalid JSON"),
            ('{"format_version": 1, "tasks": {', "Invalid JSON"),
            ("[]", "should be an object"),
            ('{"format_version": 2}', "format_version: Input should be 1"),
            ('{"surprise": 1}', "surprise: Extra inputs"),
            ('{"tasks": {"../up": {}}}', "should match pattern"),
            ('{"tasks": {"mood": {"active": 1}}}', "versions: .1. named as active"),
            ('{"tasks": {"mood": {"history": [1, 1]}}}', "repeats a version"),
            ('{"tasks": {"mood": {"shadow": 1}}}', "shadow: version 1 is active, or not there"),
            ('{"tasks": {"mood": {"canary": {"version": 1, "percent": 0}}}}', "greater than 0"),
            ('{"backbones": {"../up": {"name": "x", "bytes": 1}}}', "should match pattern"),
            (
                '{"tasks": {"mood": {"versions": {"1": {"digest": "'
                + FINGERPRINT
                + '", "published_at": "", "bytes": 1}}}}}',
                "next_version: 1 is taken",
            ),
            (
                '{"backbones": {"'
                + "a" * 64
                + '": {"name": "x", "bytes": 1}, "'
                + "b" * 64
                + '": {"name": "x", "bytes": 1}}}',
                "backbones: a name stands twice",
            ),
        ],
    )
    def test_a_damaged_registry_is_named_and_kept(
        self, store: Store, content: str, problem: str
    ) -> None:
        store.publish(FIRST)
        (store.root / "registry.json").write_text(content)
        before = tree(store)
        for call in (store.tasks, store.backbones, lambda: store.publish(SECOND)):
            with pytest.raises(StoreError, match=rf"registry\.json: .* damaged: .*{problem}"):
                call()
        assert tree(store) == before

    def test_a_missing_registry_does_not_make_a_new_store_of_a_full_one(self, store: Store) -> None:
        store.publish(FIRST)
        (store.root / "registry.json").unlink()
        before = tree(store)
        for call in (store.tasks, lambda: store.publish(SECOND)):
            with pytest.raises(StoreError, match=r"registry is missing, but .* not empty"):
                call()
        assert tree(store) == before

    def test_root_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        store = Store(tmp_path / "file")
        with pytest.raises(StoreError, match=r"cannot read the store .*file.*Not a directory"):
            store.tasks()
        with pytest.raises(StoreError, match=r"cannot write the store .*file.*File exists"):
            store.publish(FIRST)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users of the machine can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def ordinary_user() -> Iterator[Callable[[], None]]:
    """Gives a function after which this process has no rights to what it has made so far.

    File modes do not bind root, so root becomes somebody else; others need no change.
    """
    user = os.geteuid()
    yield lambda: os.seteuid(65534) if user == 0 else None
    os.seteuid(user)


class TestRights:
    def test_a_read_only_store_can_be_read(
        self, open_folder: Path, ordinary_user: Callable[[], None]
    ) -> None:
        store = Store(open_folder / "store")
        info = store.publish(FIRST)
        for path in (store.root, *store.root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        ordinary_user()
        assert store.tasks() == {"mood": info}
        assert store.read("mood")[1] == b"first"
        with pytest.raises(StoreError, match=r"cannot write the store .*: Permission denied"):
            store.publish(SECOND)
        os.seteuid(os.getuid())
        for path in (store.root, *store.root.rglob("*")):
            path.chmod(0o755)

    def test_a_closed_store_is_named(
        self, open_folder: Path, ordinary_user: Callable[[], None]
    ) -> None:
        store = Store(open_folder / "store")
        store.publish(FIRST)
        store.root.chmod(0o000)
        ordinary_user()
        calls: list[Callable[[], object]] = [
            store.tasks,
            store.state_token,
            lambda: store.read("mood"),
        ]
        for call in calls:
            with pytest.raises(StoreError, match=r"cannot read the store .*: Permission denied"):
                call()
        with pytest.raises(StoreError, match=r"cannot write the store .*: Permission denied"):
            store.publish(SECOND)
        os.seteuid(os.getuid())
        store.root.chmod(0o755)
        assert store.read("mood")[1] == b"first"
