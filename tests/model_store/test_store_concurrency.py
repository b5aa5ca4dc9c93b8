"""Many writers and readers at once, in threads and in processes: nothing is lost or half there."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_store.errors import NotFoundError
from model_store.store import Store, VersionInfo
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact

ROOT = Path(__file__).parents[2]
WRITERS, EACH = 4, 8

PUBLISH_MANY = """
import sys
from pathlib import Path
from model_store.store import Store
from tests.model_store.example_artifacts import example_artifact
root, writer, each = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(each):
    task = "shared" if number % 2 else f"own{writer}"
    print(Store(root).publish(example_artifact(task, f"{writer}-{number}".encode())).version)
"""


def check_nothing_lost(store: Store, shared: list[VersionInfo]) -> None:
    """Half of what each writer published is in the task that all share, half in its own."""
    assert [info.version for info in shared] == list(range(1, WRITERS * EACH // 2 + 1))
    contents = {store.read("shared", info.version)[1].decode() for info in shared}
    assert contents == {
        f"{writer}-{number}" for writer in range(WRITERS) for number in range(1, EACH, 2)
    }
    for writer in range(WRITERS):
        own = [info.version for info in store.versions(f"own{writer}")]
        assert own == list(range(1, EACH // 2 + 1))
    assert list((store.root / "staging").iterdir()) == []


def test_processes_lose_no_version_and_reuse_no_number(tmp_path: Path) -> None:
    root = tmp_path / "store"
    command = [sys.executable, "-c", PUBLISH_MANY, str(root)]
    writers = [
        subprocess.Popen([*command, str(writer), str(EACH)], cwd=ROOT, stdout=subprocess.PIPE)
        for writer in range(WRITERS)
    ]
    outputs = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * WRITERS
    assert [len(output.split()) for output in outputs] == [EACH] * WRITERS
    store = Store(root)
    check_nothing_lost(store, store.versions("shared"))


def test_threads_lose_no_version_and_reuse_no_number(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def publish_many(writer: int) -> None:
        for number in range(EACH):
            task = "shared" if number % 2 else f"own{writer}"
            store.publish(example_artifact(task, f"{writer}-{number}".encode()))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(publish_many, range(WRITERS)))
    check_nothing_lost(store, store.versions("shared"))


def test_the_same_bytes_from_many_threads_are_one_version(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with ThreadPoolExecutor(WRITERS) as pool:
        infos = list(pool.map(store.publish, [example_artifact()] * 16))
    assert {info.version for info in infos} == {1}
    assert len(store.versions("mood")) == 1


def test_many_threads_add_backbones_beside_each_other(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def add(number: int) -> None:
        with store.staging() as staging:
            (staging / "model.safetensors").write_bytes(str(number).encode())
            store.add_backbone(f"{number:064x}", f"backbone{number}", staging)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(add, [*range(8), *range(8)]))
    assert len(store.backbones()) == 8
    for number in range(8):
        file = store.backbone_path(f"backbone{number}") / "model.safetensors"
        assert file.read_bytes() == str(number).encode()


def test_readers_see_whole_states_while_writers_write(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.publish(example_artifact(data=b"0"))
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 25):
                info = store.publish(example_artifact(data=str(number).encode()))
                store.delete("mood", info.version - 1)
        finally:
            done.set()

    def read() -> list[int]:
        seen = []
        while not done.is_set():
            info, data = store.read("mood")
            assert data == str(info.version - 1).encode()
            assert info.active
            seen.append(info.version)
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        pool.submit(write).result()
        for reader in readers:
            seen = reader.result()
            assert seen == sorted(seen)
    assert [info.version for info in store.versions("mood")] == [25]


def test_a_reader_that_is_overtaken_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    store.publish(example_artifact(data=b"old"))
    store.publish(example_artifact(data=b"new"), activate=False)

    def overtake(change: Callable[[], object]) -> None:
        plain = Path.read_bytes

        def read_bytes(path: Path) -> bytes:
            if path.suffix == ".safetensors":
                monkeypatch.setattr(Path, "read_bytes", plain)
                change()
            return plain(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    def replace() -> None:
        store.activate("mood", 2)
        store.delete("mood", 1)

    overtake(replace)
    assert store.read("mood")[1] == b"new"
    overtake(lambda: store.delete("mood"))
    with pytest.raises(NotFoundError):
        store.read("mood")


def test_a_reader_of_a_store_being_made_sees_it_empty_or_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    plain = Path.is_dir

    def is_dir(path: Path) -> bool:
        monkeypatch.setattr(Path, "is_dir", plain)
        store.publish(example_artifact())
        return plain(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert list(store.tasks()) == ["mood"]
    assert FINGERPRINT not in [info.fingerprint for info in store.backbones()]
