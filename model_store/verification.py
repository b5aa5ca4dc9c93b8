"""Everything that can be checked of an artifact file, a version or a backbone, in one call each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_store import artifact
from model_store.backbone import Backbone, fingerprint_of, load_backbone
from model_store.encoder import Encoder
from model_store.errors import (
    ArtifactError,
    BackboneError,
    ModelStoreError,
    SignatureError,
    StoreError,
)
from model_store.manifest import VerifiedArtifact, read_header
from model_store.ops import TorchOps
from model_store.store import Store


@dataclass(frozen=True)
class Finding:
    """What a check of one thing in the store has found; `problem` None says that it is good."""

    name: str
    problem: str | None


def check_file(file: Path, store: Store) -> VerifiedArtifact:
    """All that must hold before an artifact is published: format, tensors, backbone, golden inputs.

    Raises the errors of `artifact.verify` and `artifact.check_golden`, naming the file.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        return check_artifact(data, store)
    except ModelStoreError as error:
        raise type(error)(f"{file}: {error}") from error


def check_signatures(files: Sequence[Path], signed: Sequence[Path], public_key: Path) -> None:
    """Raise `SignatureError` unless each file has its valid signature, in the same order."""
    from model_store.signatures import verify

    if len(files) != len(signed):
        raise SignatureError(
            f"{len(files)} files and {len(signed)} signatures; with --signature-key every file "
            "needs one: give --signature once for each"
        )
    for file, signature in zip(files, signed, strict=True):
        try:
            verify(file.read_bytes(), signature.read_bytes(), public_key)
        except OSError as error:
            raise SignatureError(f"{error.filename}: cannot be read: {error.strerror}") from None
        except SignatureError as error:
            raise SignatureError(f"{signature}: {error}") from error


def check_artifact(data: bytes, store: Store, task: str | None = None) -> VerifiedArtifact:
    """The same of an artifact's bytes; with `task` also that it is for this task."""
    manifest = read_header(data)[0]
    if task is not None and manifest.task != task:
        raise ArtifactError(f"the artifact is for task {manifest.task!r}, not for {task!r}")
    fingerprint = manifest.backbone.fingerprint
    backbone = load_backbone(store.backbone_path(fingerprint))
    verified = artifact.verify(data, backbone.config, fingerprint)
    overlay = artifact.read(data, backbone.config, fingerprint)
    artifact.check_golden(_encoder(backbone), backbone, overlay)
    return verified


def check_store(store: Store) -> Iterator[Finding]:
    """Check every backbone and every version, each as far as `check_artifact` does."""
    for backbone in store.backbones():
        problem = _problem_of_backbone(store, backbone.fingerprint)
        yield Finding(f"backbone {backbone.name}", problem)
    for task in store.task_names():
        for info in store.versions(task):
            yield Finding(f"{task} version {info.version}", _problem_of(store, task, info.version))


def _problem_of_backbone(store: Store, fingerprint: str) -> str | None:
    try:
        path = store.backbone_path(fingerprint)
        found = fingerprint_of(load_backbone(path).tensors)
    except (StoreError, BackboneError) as error:
        return str(error)
    if found == fingerprint:
        return None
    return f"{path}: the tensors are damaged: their fingerprint is {found[:12]}; add it again"


def _problem_of(store: Store, task: str, version: int) -> str | None:
    try:
        check_artifact(store.read(task, version)[1], store, task)
    except ModelStoreError as error:
        return str(error)
    return None


def _encoder(backbone: Backbone) -> Encoder:
    return Encoder(backbone.config, backbone.tensors, TorchOps())
