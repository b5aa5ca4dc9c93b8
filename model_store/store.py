"""The store: one folder of backbones and of published versions of tasks, safe against any crash.

Every change is made beside the old state, on the same file system, and becomes visible by one
rename of the registry file; readers need no lock and see the old state or the new one. Writers
exclude each other by a lock on a file, over threads and processes, and each sweeps what a killed
one has left. Knows no torch, and nothing of an artifact but its bytes, digest and task name.

    registry.json                      what there is (`registry.py`); all else is found through it
    backbones/<fingerprint>/           one folder for each backbone
    tasks/<task>/<version>.safetensors one file for each version, never changed
    audit.jsonl                        who changed what, one line each; only ever appended to
    documents/<name>                   small documents of the server, such as its keys
    staging/                           what is being written
    lock                               held by the one who writes
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from pydantic import ValidationError

from model_store.audit import AuditEntry, entries_of
from model_store.durable import (
    append_line,
    holds,
    is_locked,
    last_lines,
    make_folder,
    put_file,
    sha256,
    sync,
)
from model_store.errors import NotFoundError, StoreError
from model_store.manifest import VerifiedArtifact, describe
from model_store.registry import BackboneRecord, Registry, VersionRecord

Token = tuple[int | str, ...]
"""A value to compare with another of the same thing: they differ when it has changed in between."""

_SUFFIX = ".safetensors"
_DOCUMENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REMEDY = "; publish the same file again to put it back, or delete this version"
_RESTORE = "; restore the store's folder from a copy, or use another folder"


@dataclass(frozen=True)
class BackboneInfo:
    """A backbone in the store. `bytes` is the size of all its files."""

    name: str
    fingerprint: str
    bytes: int


@dataclass(frozen=True)
class VersionInfo:
    """A published version. `digest` is the SHA-256 of its file, `published_at` UTC in ISO 8601.

    `canary` is the percentage of the task's requests that it answers in place of the active one.
    """

    task: str
    version: int
    digest: str
    published_at: str
    bytes: int
    active: bool
    canary: float | None = None
    shadow: bool = False


class Store:
    """A store in folder `root`, which need not exist before the first write.

    Holds no state of its own: every call reads the registry. May be used by many threads and
    processes at once. Every method raises `StoreError` when the folder cannot be read or written,
    or is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._registry_path = self.root / "registry.json"
        self._backbones = self.root / "backbones"
        self._tasks = self.root / "tasks"
        self._staging = self.root / "staging"
        self._documents = self.root / "documents"
        self._audit_path = self.root / "audit.jsonl"

    # --- reading ----------------------------------------------------------------------------

    def state_token(self) -> Token | None:
        """A value that changes whenever the registry does, at the price of one `stat`."""
        return self._token(self._registry_path)

    def registry(self) -> Registry:
        """All that the store says of its backbones, tasks and versions."""
        with self._explained("read"):
            try:
                data = self._registry_path.read_bytes()
            except FileNotFoundError:
                # An empty registry over full folders would have the next writer sweep them all.
                if not (_has_entries(self._tasks) or _has_entries(self._backbones)):
                    return Registry()
                if self._registry_path.exists():
                    return self.registry()  # made between our two looks
                raise StoreError(
                    f"{self._registry_path}: the registry is missing, but the folders beside it "
                    f"are not empty{_RESTORE}"
                ) from None
        try:
            return Registry.model_validate_json(data)
        except ValidationError as error:
            raise StoreError(
                f"{self._registry_path}: the registry is damaged: {describe(error)}{_RESTORE}"
            ) from None

    def tasks(self) -> dict[str, VersionInfo]:
        """The active version of every task that has one, in order of task names."""
        registry = self.registry()
        return {
            task: _info(registry, task, record.active)
            for task, record in sorted(registry.tasks.items())
            if record.active is not None
        }

    def task_names(self) -> list[str]:
        """Every task that has versions, active or not, in alphabetical order."""
        return sorted(name for name, task in self.registry().tasks.items() if task.versions)

    def versions(self, task: str) -> list[VersionInfo]:
        """All versions of a task, oldest first. Raises `NotFoundError` that lists the tasks."""
        registry = self.registry()
        return [_info(registry, task, number) for number in sorted(registry.task(task).versions)]

    def read(self, task: str, version: int | None = None) -> tuple[VersionInfo, bytes]:
        """The bytes of a version (default: the active one), checked against its digest.

        Raises `NotFoundError` for an unknown task or version, or a task without active version.
        """
        while True:
            token, registry = self.state_token(), self.registry()
            number = registry.active(task) if version is None else version
            info = _info(registry, task, number)
            path = self._version_path(task, number)
            with self._explained("read"):
                try:
                    data = path.read_bytes()
                except FileNotFoundError:
                    if self.state_token() != token:
                        continue  # deleted between our two reads: look again
                    raise StoreError(
                        f"{path}: the file of this version is missing{_REMEDY}"
                    ) from None
            digest = sha256(data)
            if digest != info.digest:
                raise StoreError(
                    f"{path}: the file of this version is damaged: {len(data)} bytes with SHA-256 "
                    f"{digest[:12]}..., published were {info.bytes} with {info.digest[:12]}..."
                    f"{_REMEDY}"
                )
            return info, data

    def backbones(self) -> list[BackboneInfo]:
        """All backbones, in order of names."""
        records = self.registry().backbones.items()
        infos = (BackboneInfo(record.name, known, record.bytes) for known, record in records)
        return sorted(infos, key=lambda info: info.name)

    def backbone(self, name_or_fingerprint_prefix: str | None) -> BackboneInfo:
        """The named backbone, or with None the only one there is.

        Raises `NotFoundError` that lists the backbones, or says how to add the first.
        """
        known = self.backbones()
        if name_or_fingerprint_prefix is not None:
            fingerprint = self.backbone_path(name_or_fingerprint_prefix).name
            return next(info for info in known if info.fingerprint == fingerprint)
        if len(known) == 1:
            return known[0]
        if not known:
            raise NotFoundError(
                f"no backbone in the store {self.root}; add one with "
                "`taskbone store add-backbone <folder or Hugging Face id>`"
            )
        names = ", ".join(info.name for info in known)
        raise NotFoundError(f"several backbones in the store {self.root} ({names}); name one")

    def backbone_path(self, name_or_fingerprint_prefix: str) -> Path:
        """The folder of a backbone. Raises `NotFoundError` that lists the backbones."""
        path = self._backbones / self.registry().fingerprint_of(name_or_fingerprint_prefix)
        with self._explained("read"):
            if not path.is_dir():
                raise StoreError(f"{path}: the folder of this backbone is missing; add it again")
        return path

    def audit(self, limit: int) -> list[AuditEntry]:
        """The last `limit` entries of the audit log, the newest last."""
        with self._explained("read"):
            try:
                lines = last_lines(self._audit_path, limit)
            except FileNotFoundError:
                return []
        return entries_of(lines, str(self._audit_path))

    def document(self, name: str) -> bytes | None:
        """The content of a document; None where there is none of this name."""
        with self._explained("read"):
            try:
                return self._document_path(name).read_bytes()
            except FileNotFoundError:
                return None

    def document_token(self, name: str) -> Token | None:
        """A value that changes whenever the document does, at the price of one `stat`."""
        return self._token(self._document_path(name))

    # --- writing ----------------------------------------------------------------------------

    def publish(self, artifact: VerifiedArtifact, *, activate: bool = True) -> VersionInfo:
        """Store an artifact as its task's next version, and make it the active one.

        Publishing the same bytes again gives the version they have already, and puts its file
        back in order if that is missing or damaged.
        """
        task = artifact.manifest.task
        with self._writing() as before:
            registry = before
            number = before.number_of(task, artifact.digest)
            if number is None:
                number = before.next_version(task)
                record = VersionRecord(
                    digest=artifact.digest,
                    published_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    bytes=len(artifact.data),
                )
                registry = before.with_version(task, number, record)
            path = self._version_path(task, number)
            if not holds(path, artifact.digest):
                make_folder(path.parent)
                put_file(path, artifact.data, artifact.digest, self._staging)
            if activate:
                registry = registry.with_active(task, number)
            self._write_registry(registry)
            return _info(registry, task, number)

    def activate(self, task: str, version: int) -> VersionInfo:
        """Make a version the active one. Raises `NotFoundError` that lists what there is."""
        with self._writing() as before:
            registry = before.with_active(task, version)
            self._write_registry(registry)
            return _info(registry, task, version)

    def roll_back(self, task: str) -> VersionInfo:
        """Make the version active that was so before. Raises `ConflictError` where none was.

        The version rolled back from leaves the history: a second call goes one version further.
        """
        with self._writing() as before:
            registry = before.rolled_back(task)
            self._write_registry(registry)
            return _info(registry, task, registry.active(task))

    def set_canary(self, task: str, version: int, percent: float) -> VersionInfo:
        """Have a version answer `percent` of the task's requests in place of the active one.

        Raises `ConflictError` for the active version, and unless `percent` is between 0 and 100.
        Whatever makes the version active, or deletes it, ends this.
        """
        with self._writing() as before:
            registry = before.with_canary(task, version, percent)
            self._write_registry(registry)
            return _info(registry, task, version)

    def clear_canary(self, task: str) -> VersionInfo | None:
        """End the task's canary. Gives the version that was it; None where there was none."""
        with self._writing() as before:
            canary = before.task(task).canary
            if canary is None:
                return None
            registry = before.without_canary(task)
            self._write_registry(registry)
            return _info(registry, task, canary.version)

    def set_shadow(self, task: str, version: int) -> VersionInfo:
        """Have a version answer too, only to be compared. Raises `ConflictError` for the active."""
        with self._writing() as before:
            registry = before.with_shadow(task, version)
            self._write_registry(registry)
            return _info(registry, task, version)

    def clear_shadow(self, task: str) -> VersionInfo | None:
        """End the task's shadow. Gives the version that was it; None where there was none."""
        with self._writing() as before:
            shadow = before.task(task).shadow
            if shadow is None:
                return None
            registry = before.without_shadow(task)
            self._write_registry(registry)
            return _info(registry, task, shadow)

    def delete(self, task: str, version: int | None = None) -> None:
        """Delete a version, or with `version` None the task with all its versions.

        Their numbers are not given out again. Raises `ConflictError` for the active version and
        `NotFoundError` for one that is not there.
        """
        with self._writing() as before:
            if version is None:
                registry = before.without_task(task)
            else:
                registry = before.without_version(task, version)
            self._write_registry(registry)
            self._sweep(registry)

    def add_backbone(self, fingerprint: str, name: str, files: Path) -> BackboneInfo:
        """Move the folder `files` (one that `staging` has given) into the store as a backbone.

        A backbone that is there already takes the new name, and files that differ are replaced one
        by one: this repairs a damaged one. Raises `ConflictError` when another has that name.
        """
        with self._writing() as before:
            path = self._backbones / fingerprint
            size = sum(file.stat().st_size for file in files.iterdir())
            registry = before.with_backbone(fingerprint, BackboneRecord(name=name, bytes=size))
            for file in files.iterdir():
                sync(file)
            sync(files)
            if path.is_dir():
                for file in files.iterdir():
                    if not holds(path / file.name, sha256(file.read_bytes())):
                        file.replace(path / file.name)
                sync(path)
            else:
                files.rename(path)
                sync(self._backbones)
            self._write_registry(registry)
            return BackboneInfo(name, fingerprint, size)

    def append_audit(self, entry: AuditEntry) -> None:
        """Add an entry to the audit log; it has reached the disk when this returns."""
        with self._explained("write"), self._locked():
            append_line(self._audit_path, entry.to_line())

    def put_document(self, name: str, data: bytes) -> None:
        """Replace a small document, or make it: old or new after a crash at any moment."""
        self.change_document(name, lambda _: data)

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a document by what `change` makes of it, None where there was none; nobody comes
        between."""
        path = self._document_path(name)
        with self._writing():
            make_folder(self._documents)
            self._put(path, change(self.document(name)))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder inside the store to prepare files in; removed at the end if still there.

        The folder is locked as long as its maker lives, so that no other writer sweeps it.
        """
        with self._writing():
            folder = self._staging / uuid4().hex
            folder.mkdir()
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    # --- the parts --------------------------------------------------------------------------

    def _version_path(self, task: str, version: int) -> Path:
        # Only for tasks of a registry: its model lets no name through that could leave the folder.
        return self._tasks / task / f"{version}{_SUFFIX}"

    def _document_path(self, name: str) -> Path:
        assert _DOCUMENT_NAME.fullmatch(name), name
        return self._documents / name

    def _token(self, path: Path) -> Token | None:
        with self._explained("read"):
            try:
                status = path.stat()
            except FileNotFoundError:
                return None
            return status.st_ino, status.st_mtime_ns, status.st_size

    @contextmanager
    def _writing(self) -> Iterator[Registry]:
        """Exclude all other writers, sweep, and give the registry as it is."""
        with self._explained("write"), self._locked():
            for folder in (self._staging, self._tasks, self._backbones):
                make_folder(folder)
            registry = self.registry()
            if not self._registry_path.exists():
                self._write_registry(registry)
            self._sweep(registry)
            yield registry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # unlocks

    def _sweep(self, registry: Registry) -> None:
        """Remove what the registry does not name. Only under the lock; leaves strange files be."""
        for entry in self._staging.iterdir():
            if not entry.is_dir():
                entry.unlink(missing_ok=True)
            elif not is_locked(entry):
                shutil.rmtree(entry)
        for folder in filter(Path.is_dir, self._tasks.iterdir()):
            record = registry.tasks.get(folder.name)
            for file in folder.glob(f"*{_SUFFIX}"):
                if file.stem.isdecimal() and not (record and int(file.stem) in record.versions):
                    file.unlink()
            if not (record and record.versions) and not any(folder.iterdir()):
                folder.rmdir()
        for folder in self._backbones.iterdir():
            if len(folder.name) == 64 and folder.name not in registry.backbones:
                shutil.rmtree(folder)

    def _write_registry(self, registry: Registry) -> None:
        # What is not set is not written, so that older versions read whatever they know.
        self._put(
            self._registry_path, registry.model_dump_json(indent=1, exclude_none=True).encode()
        )

    def _put(self, path: Path, data: bytes) -> None:
        digest = sha256(data)
        if holds(path, digest):
            return
        token = self._token(path)
        # Two changes within one tick of the clock must not have the same token.
        stamp = time.time_ns() if token is None else max(time.time_ns(), int(token[1]) + 1)
        put_file(path, data, digest, self._staging, stamp)

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = error.filename or self.root
            raise StoreError(
                f"cannot {doing} the store {self.root}: {place}: {error.strerror or error}; "
                f"a folder with the rights to {doing} it is needed"
            ) from error


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _info(registry: Registry, task: str, number: int) -> VersionInfo:
    record, version = registry.task(task), registry.version(task, number)
    canary = record.canary
    return VersionInfo(
        task=task,
        version=number,
        digest=version.digest,
        published_at=version.published_at,
        bytes=version.bytes,
        active=record.active == number,
        canary=canary.percent if canary and canary.version == number else None,
        shadow=record.shadow == number,
    )
