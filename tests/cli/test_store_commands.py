"""`taskbone store`: what its commands print and change.

Those that compute, `publish` and `verify`, are in `tests/model_store/test_verification.py`.
"""

import json
import os
from pathlib import Path

import pytest

from model_store.store import Store
from tests.cli.running import fail, run, succeed
from tests.model_store.example_artifacts import FINGERPRINT, example_artifact, example_file


class TestStoreCommands:
    def test_empty_store(self, store: Store) -> None:
        assert "is empty. Begin with: taskbone store add-backbone" in succeed("store", "list")
        assert json.loads(succeed("store", "list", "--json")) == {"backbones": [], "tasks": []}
        assert not store.root.exists()

    def test_list(self, store: Store) -> None:
        with store.staging() as staging:
            (staging / "model.safetensors").write_bytes(b"x" * 1500)
            store.add_backbone(FINGERPRINT, "tiny", staging)
        store.publish(example_artifact("mood"))
        store.publish(example_artifact("mood", b"second"))
        store.publish(example_artifact("quiet"), activate=False)
        output = succeed("store", "list")
        lines = [line.split() for line in output.splitlines()]
        assert ["tiny", FINGERPRINT[:12], "1.5", "kB"] in lines
        assert [line[:3] for line in lines if line[:1] == ["mood"]] == [["mood", "2", "2"]]
        assert ["quiet", "1", "none"] in lines
        found = json.loads(succeed("store", "list", "--json"))
        assert [info["name"] for info in found["backbones"]] == ["tiny"]
        assert [(info["task"], info["version"], info["active"]) for info in found["tasks"]] == [
            ("mood", 1, False),
            ("mood", 2, True),
            ("quiet", 1, False),
        ]

    def test_store_option_comes_before_the_environment(self, store: Store, tmp_path: Path) -> None:
        Store(tmp_path / "other").publish(example_artifact("elsewhere"))
        assert "elsewhere" in succeed("store", "list", "--store", tmp_path / "other")

    def test_home_folder_is_the_default(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("TASKBONE_STORE", raising=False)
        Store(tmp_path / ".taskbone").publish(example_artifact("homely"))
        assert "homely" in succeed("store", "list")

    def test_show(self, store: Store) -> None:
        store.publish(example_file(note="old"))
        store.publish(example_file(note="a task about moods"))
        output = succeed("store", "show", "mood")
        for part in ("a task about moods", "bad, good", "{text}", "tiny (abababababab)", "37.5%"):
            assert part in output
        assert "old" in succeed("store", "show", "mood", "--version", "1")
        found = json.loads(succeed("store", "show", "mood", "--json"))
        assert found["version"] == 2
        assert found["manifest"]["labels"] == ["bad", "good"]
        assert [info["version"] for info in found["versions"]] == [1, 2]

    def test_show_prints_no_control_characters(self, store: Store) -> None:
        store.publish(example_file(note="red \x1b[31malert\x07"))
        assert not {"\x1b", "\x07"} & set(succeed("store", "show", "mood"))

    def test_activate_and_roll_back(self, store: Store) -> None:
        for data in (b"1", b"2", b"3"):
            store.publish(example_artifact(data=data))
        assert succeed("store", "activate", "mood", "1") == "mood: version 1 is active\n"
        assert json.loads(succeed("store", "roll-back", "mood", "--json"))["version"] == 3
        assert store.tasks()["mood"].version == 3

    def test_delete(self, store: Store) -> None:
        store.publish(example_artifact(data=b"1"))
        store.publish(example_artifact(data=b"2"))
        output = succeed("store", "delete", "mood", "--version", "1", "--yes")
        assert output == "Deleted 'mood' version 1.\n"
        assert [info.version for info in store.versions("mood")] == [2]
        assert run("store", "delete", "mood", text="n\n").exit_code == 130
        assert store.task_names() == ["mood"]
        succeed("store", "delete", "mood", text="y\n")
        assert store.task_names() == []

    def test_show_tells_canary_and_shadow(self, store: Store) -> None:
        for note in ("first", "second"):
            store.publish(example_file(note=note))
        store.set_canary("mood", 1, 12.5)
        store.set_shadow("mood", 1)
        output = " ".join(succeed("store", "show", "mood").split())
        assert "canary 12.5 %, shadow 1 " in output

    def test_changes_are_noted_in_the_audit_log(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("getpass.getuser", lambda: "maria")
        digests = [store.publish(example_artifact(data=data)).digest for data in (b"1", b"2")]
        succeed("store", "activate", "mood", "1")
        succeed("store", "roll-back", "mood")
        fail("store", "activate", "mood", "9")
        succeed("store", "delete", "mood", "--version", "1", "--yes")
        found = json.loads(succeed("store", "audit", "--json"))
        assert {entry["by"] for entry in found} == {"maria@command line"}
        noted = [(e["action"], e["version"], e["digest"], e["result"]) for e in found]
        assert noted == [
            ("activate", 1, digests[0], "done"),
            ("rollback", 2, digests[1], "done"),
            ("activate", 9, None, "NotFoundError"),
            ("delete", 1, None, "done"),
        ]
        assert "it has: 1, 2" in found[2]["message"]
        shown = succeed("store", "audit", "--limit", "2")
        assert shown.count("maria@command line") == 2
        assert "NotFoundError: task 'mood' has no version 9" in " ".join(shown.split())

    def test_a_user_without_a_name_is_noted_by_number(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def getuser() -> str:
            raise OSError("no such user")

        monkeypatch.setattr("getpass.getuser", getuser)
        store.publish(example_artifact())
        succeed("store", "activate", "mood", "1")
        assert store.audit(1)[0].by == f"user {os.getuid()}@command line"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["show", "mod"], "no task 'mod' in the store; it has: mood"),
            (["show", "mood", "--version", "9"], "task 'mood' has no version 9; it has: 1"),
            (["activate", "mood", "9"], "task 'mood' has no version 9; it has: 1"),
            (["roll-back", "mood"], "none to roll back to; activate one of: 1"),
            (["delete", "mood", "--version", "1", "--yes"], "version 1 is active"),
            (["publish", "/nowhere.safetensors"], "/nowhere.safetensors: cannot be read: No such"),
            (["add-backbone", "/nowhere"], "/nowhere"),
        ],
    )
    def test_errors_say_what_there_is(
        self, store: Store, arguments: list[str], message: str
    ) -> None:
        store.publish(example_artifact())
        assert message in fail("store", *arguments)

    def test_damaged_registry(self, store: Store) -> None:
        store.publish(example_artifact())
        (store.root / "registry.json").write_text("{")
        assert "registry.json: the registry is damaged" in fail("store", "list")
