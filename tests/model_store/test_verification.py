"""Complete checks of files and stores, called and through the commands that make them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import TENSORS_FILE, Backbone, import_checkpoint, load_backbone
from model_store.errors import (
    ArtifactError,
    GoldenMismatchError,
    ManifestError,
    NotFoundError,
)
from model_store.manifest import BackboneReference
from model_store.store import Store
from model_store.verification import check_artifact, check_file, check_store
from taskbone import cli
from tests.model_store.example_artifacts import example_manifest
from tests.overlays import random_artifact, random_overlay
from tests.reference import small_checkpoint
from tests.signing import make_signer


@dataclass(frozen=True)
class Stage:
    """A store with a small backbone."""

    store: Store
    backbone: Backbone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "bert").folder


@pytest.fixture
def stage(tmp_path: Path, checkpoint: Path) -> Stage:
    store = Store(tmp_path / "store")
    info = import_checkpoint(str(checkpoint), store)
    return Stage(store, load_backbone(store.backbone_path(info.fingerprint), info.name))


def promising(made: Overlay, scores: tuple[float, ...]) -> Overlay:
    """The overlay with other probabilities for its first golden input."""
    first, *others = made.manifest.golden
    golden = (first.model_copy(update={"scores": scores}), *others)
    return replace(made, manifest=made.manifest.model_copy(update={"golden": golden}))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def run(store: Store, *arguments: str | Path) -> Result:
    words = [*map(str, arguments), "--store", str(store.root)]
    return CliRunner().invoke(cli, ["store", *words])


class TestCheckFile:
    def test_a_good_file(self, stage: Stage, tmp_path: Path) -> None:
        data = random_artifact(stage.backbone)
        checked = check_file(written(tmp_path, "mood.safetensors", data), stage.store)
        assert checked.data == data
        assert checked.manifest.task == "mood"

    def test_each_problem_names_the_file(self, stage: Stage, tmp_path: Path) -> None:
        good = random_overlay(stage.backbone)
        data = artifact.write(good)
        other = example_manifest()
        cases = [
            (b"", ManifestError, "not an artifact"),
            (data[:-4], ArtifactError, ""),
            (
                artifact.write(promising(good, (1.0, 0.0, 0.0))),
                GoldenMismatchError,
                "golden input 0",
            ),
            (artifact.write(replace(good, manifest=other)), NotFoundError, "no backbone 'abab"),
        ]
        for content, kind, message in cases:
            file = written(tmp_path, "given.safetensors", content)
            with pytest.raises(kind, match=f"{file}: .*{message}"):
                check_file(file, stage.store)

    def test_a_missing_file(self, stage: Stage, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"none\.safetensors: cannot be read: No such file"):
            check_file(tmp_path / "none.safetensors", stage.store)

    def test_another_task_than_the_one_wanted(self, stage: Stage) -> None:
        with pytest.raises(ArtifactError, match="for task 'mood', not for 'topic'"):
            check_artifact(random_artifact(stage.backbone), stage.store, "topic")

    def test_a_backbone_of_another_width(self, stage: Stage, tmp_path: Path) -> None:
        wide = small_checkpoint(tmp_path / "wide", "bert", intermediate_size=52).folder
        reference = BackboneReference(
            name="wide", fingerprint=import_checkpoint(str(wide), stage.store).fingerprint
        )
        good = random_overlay(stage.backbone)
        moved = good.manifest.model_copy(update={"backbone": reference})
        with pytest.raises(ArtifactError, match="width 48; the backbone has 3 of width 52"):
            check_artifact(artifact.write(replace(good, manifest=moved)), stage.store)


class TestCommands:
    def test_add_backbone(self, tmp_path: Path, checkpoint: Path) -> None:
        store = Store(tmp_path / "new")
        result = run(store, "add-backbone", checkpoint, "--name", "small", "--json")
        assert result.exit_code == 0, result.output
        (info,) = store.backbones()
        assert json.loads(result.stdout) == vars(info)
        assert info.name == "small"
        assert "Backbone tiny: " in run(store, "add-backbone", checkpoint).stdout

    def test_publish_several_and_again(self, stage: Stage, tmp_path: Path) -> None:
        files = [
            written(tmp_path, f"{task}.safetensors", random_artifact(stage.backbone, task))
            for task in ("mood", "topic")
        ]
        for _ in range(2):
            result = run(stage.store, "publish", *files)
            assert result.stdout == "mood: version 1 (active)\ntopic: version 1 (active)\n"
        assert list(stage.store.tasks()) == ["mood", "topic"]

    def test_publish_without_activation(self, stage: Stage, tmp_path: Path) -> None:
        file = written(tmp_path, "mood.safetensors", random_artifact(stage.backbone))
        result = run(stage.store, "publish", file, "--no-activate", "--json")
        assert [info["active"] for info in json.loads(result.stdout)] == [False]
        assert stage.store.tasks() == {}

    def test_nothing_is_published_when_one_file_is_bad(self, stage: Stage, tmp_path: Path) -> None:
        good = written(tmp_path, "good.safetensors", random_artifact(stage.backbone))
        bad = written(tmp_path, "bad.safetensors", b"bad")
        result = run(stage.store, "publish", good, bad)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {bad}: not an artifact")
        assert stage.store.task_names() == []


class TestSignedFiles:
    @pytest.fixture
    def files(self, stage: Stage, tmp_path: Path) -> list[Path]:
        """An artifact, its signature, and the key to check it with."""
        signer = make_signer(tmp_path / "signer")
        data = random_artifact(stage.backbone, "mood")
        signature = written(tmp_path, "mood.sig", signer.sign(data))
        return [written(tmp_path, "mood.safetensors", data), signature, signer.public]

    def test_a_signed_one_is_published(self, stage: Stage, files: list[Path]) -> None:
        artifact, signature, key = files
        options = ("--signature", signature, "--signature-key", key)
        result = run(stage.store, "publish", artifact, *options)
        assert result.exit_code == 0, result.output
        assert stage.store.tasks()["mood"].version == 1

    def test_with_a_key_an_unsigned_one_is_not(
        self, stage: Stage, files: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        artifact, _, key = files
        monkeypatch.setenv("TASKBONE_SIGNATURE_KEY", str(key))
        result = run(stage.store, "publish", artifact)
        assert result.exit_code == 1
        assert "1 files and 0 signatures" in result.stderr
        assert stage.store.tasks() == {}

    def test_nothing_is_published_when_one_signature_is_bad(
        self, stage: Stage, files: list[Path], tmp_path: Path
    ) -> None:
        artifact, signature, key = files
        other = written(tmp_path, "other.safetensors", random_artifact(stage.backbone, "other"))
        for second in (signature, tmp_path / "missing.sig"):
            signed = ("--signature", signature, "--signature", second)
            result = run(stage.store, "publish", artifact, other, *signed, "--signature-key", key)
            assert result.exit_code == 1
            assert str(second) in result.stderr
            assert stage.store.tasks() == {}

    def test_a_signature_without_a_key_is_not_taken_for_checked(
        self, stage: Stage, files: list[Path]
    ) -> None:
        artifact, signature, _ = files
        result = run(stage.store, "publish", artifact, "--signature", signature)
        assert result.exit_code == 2
        assert stage.store.tasks() == {}


class TestCheckStore:
    @pytest.fixture
    def full(self, stage: Stage) -> Stage:
        stage.store.publish(check_artifact(random_artifact(stage.backbone), stage.store))
        return stage

    def test_a_good_store(self, full: Stage) -> None:
        assert [(finding.name, finding.problem) for finding in check_store(full.store)] == [
            ("backbone tiny", None),
            ("mood version 1", None),
        ]
        result = run(full.store, "verify")
        assert (result.exit_code, result.stdout) == (
            0,
            "backbone tiny: good\nmood version 1: good\n",
        )

    def test_a_damaged_version(self, full: Stage) -> None:
        path = full.store.root / "tasks" / "mood" / "1.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        result = run(full.store, "verify", "--json")
        assert result.exit_code == 1
        backbone, version = json.loads(result.stdout)
        assert backbone["problem"] is None
        assert "1.safetensors: the file of this version is damaged" in version["problem"]

    def test_a_damaged_backbone(self, full: Stage) -> None:
        path = full.store.backbone_path("tiny") / TENSORS_FILE
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x40
        path.write_bytes(data)
        backbone, version = check_store(full.store)
        assert backbone.problem is not None
        assert "the tensors are damaged: their fingerprint is" in backbone.problem
        assert version.problem is None or "golden" in version.problem

    def test_a_missing_backbone(self, full: Stage) -> None:
        (full.store.backbone_path("tiny") / TENSORS_FILE).unlink()
        for finding in check_store(full.store):
            assert finding.problem is not None
            assert "the stored backbone is damaged" in finding.problem
