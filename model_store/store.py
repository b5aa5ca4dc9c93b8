"""A store of backbones and of published versions of tasks: what it holds, and what changes mean.

A change is one step from a registry to the next (`registry.py`); where the bytes lie, and how the
step is made so that no crash and no other writer can spoil it, is the storage's (`storage.py`).
Knows no torch, and nothing of an artifact but its bytes, digest and task name.
"""

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from model_store.audit import AuditEntry, entries_of
from model_store.durable import sha256
from model_store.errors import NotFoundError, StoreError
from model_store.folder import FolderStorage
from model_store.manifest import VerifiedArtifact
from model_store.objects import ObjectStorage
from model_store.registry import BackboneRecord, Registry, VersionRecord
from model_store.storage import Files, Leftover, Storage, Token

__all__ = ["BackboneInfo", "Store", "Token", "VersionInfo", "folder_of", "open_store"]

STORE_VARIABLE = "TASKBONE_STORE"
CACHE_VARIABLE = "TASKBONE_CACHE"
DEFAULT_CACHE = "~/.cache/taskbone"
_DOCUMENT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REMEDY = "; publish the same file again to put it back, or delete this version"


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
    """A store in a folder, which need not exist before the first write, or in another storage.

    Every call asks whether the registry has changed, and reads it again only then. May be used by
    many threads and processes at once. Every method raises `StoreError` when the storage cannot be
    read or written, or is damaged.
    """

    def __init__(self, storage: Path | Storage) -> None:
        self._storage = FolderStorage(storage) if isinstance(storage, Path) else storage
        self._known: tuple[Token | None, Registry] = (None, Registry())

    def __reduce__(self) -> tuple[type["Store"], tuple[Storage]]:
        return Store, (self._storage,)  # without the registry, which can have megabytes

    @property
    def location(self) -> str:
        """Where it is: a folder, or a URL. `open_store` takes it."""
        return self._storage.location

    @property
    def root(self) -> Path:
        """The store's folder. Raises `StoreError` for one in an object store."""
        if self.folder is None:
            raise StoreError(f"the store {self.location} is no folder; one in a folder is needed")
        return self.folder

    @property
    def folder(self) -> Path | None:
        """The store's folder; None for one in an object store."""
        return self._storage.root if isinstance(self._storage, FolderStorage) else None

    def absolute(self) -> "Store":
        """The same store, so named that processes elsewhere find it."""
        return self if self.folder is None else Store(self.folder.absolute())

    # --- reading ----------------------------------------------------------------------------

    @property
    def poll_s(self) -> float:
        """How often it is cheap enough to ask for the token."""
        return self._storage.poll_s

    def state_token(self) -> Token | None:
        """A value that changes whenever the registry does; costs a `stat` or a request."""
        return self._storage.token()

    def registry(self) -> Registry:
        """All that the store says of its backbones, tasks and versions."""
        return self._load()[1]

    def _load(self) -> tuple[Token | None, Registry]:
        """The registry, and a token that is no newer."""
        token, known = self.state_token(), self._known
        if token is None or token != known[0]:
            known = self._known = self._storage.load()
        return known

    def tasks(self) -> dict[str, VersionInfo]:
        """The active version of every task that has one, in order of task names."""
        registry = self.registry()
        return {
            task: version_info(registry, task, record.active)
            for task, record in sorted(registry.tasks.items())
            if record.active is not None
        }

    def task_names(self) -> list[str]:
        """Every task that has versions, active or not, in alphabetical order."""
        return sorted(name for name, task in self.registry().tasks.items() if task.versions)

    def versions(self, task: str) -> list[VersionInfo]:
        """All versions of a task, oldest first. Raises `NotFoundError` that lists the tasks."""
        registry = self.registry()
        return [
            version_info(registry, task, number) for number in sorted(registry.task(task).versions)
        ]

    def all_versions(self) -> list[VersionInfo]:
        """All versions of all tasks, in order of names and numbers."""
        registry = self.registry()
        return [
            version_info(registry, task, number)
            for task, record in sorted(registry.tasks.items())
            for number in sorted(record.versions)
        ]

    def read(self, task: str, version: int | None = None) -> tuple[VersionInfo, bytes]:
        """The bytes of a version (default: the active one), checked against its digest.

        Raises `NotFoundError` for an unknown task or version, or a task without active version.
        """
        while True:
            token, registry = self._load()
            number = registry.active(task) if version is None else version
            info, record = version_info(registry, task, number), registry.version(task, number)
            place = self._storage.version_place(task, number, record)
            data = self._storage.read_version(task, number, record)
            if data is None:
                if self.state_token() != token:
                    continue  # deleted between our two reads: look again
                raise StoreError(f"{place}: the file of this version is missing{_REMEDY}")
            digest = sha256(data)
            if digest != info.digest:
                raise StoreError(
                    f"{place}: the file of this version is damaged: {len(data)} bytes with SHA-256 "
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
        registry = self.registry()
        if name_or_fingerprint_prefix is not None:
            fingerprint = registry.fingerprint_of(name_or_fingerprint_prefix)
        elif len(registry.backbones) == 1:
            (fingerprint,) = registry.backbones
        elif not registry.backbones:
            raise NotFoundError(
                f"no backbone in the store {self.location}; add one with "
                "`taskbone store add-backbone <folder or Hugging Face id>`"
            )
        else:
            names = ", ".join(sorted(record.name for record in registry.backbones.values()))
            raise NotFoundError(
                f"several backbones in the store {self.location} ({names}); name one"
            )
        record = registry.backbones[fingerprint]
        return BackboneInfo(record.name, fingerprint, record.bytes)

    def backbone_path(self, name_or_fingerprint_prefix: str) -> Path:
        """A folder on this machine with a backbone's files, named like its fingerprint.

        Raises `NotFoundError` that lists the backbones.
        """
        while True:
            token, registry = self._load()
            fingerprint = registry.fingerprint_of(name_or_fingerprint_prefix)
            try:
                return self._storage.backbone_folder(fingerprint, registry.backbones[fingerprint])
            except StoreError:
                if self.state_token() == token:
                    raise  # else it was replaced between our two reads: look again

    def backbone_time(self, fingerprint: str) -> float:
        """When a backbone was put into the store, as a Unix time."""
        return self._storage.backbone_time(fingerprint, self.registry().backbones[fingerprint])

    def leftovers(self, before: float) -> tuple[Leftover, ...]:
        """What killed writers have left, and was there before this Unix time."""
        return self._storage.leftovers(before)

    def audit(self, limit: int) -> list[AuditEntry]:
        """The last `limit` entries of the audit log, the newest last."""
        return entries_of(self._storage.audit_lines(limit), f"the audit log of {self.location}")

    def document(self, name: str) -> bytes | None:
        """The content of a small document; None where there is none of this name."""
        return self._storage.document(_checked(name))

    def document_token(self, name: str) -> Token | None:
        """A value that changes whenever the document does; costs a `stat` or a request."""
        return self._storage.document_token(_checked(name))

    # --- writing ----------------------------------------------------------------------------

    def publish(self, artifact: VerifiedArtifact, *, activate: bool = True) -> VersionInfo:
        """Store an artifact as its task's next version, and make it the active one.

        Publishing the same bytes again gives the version they have already, and puts its file
        back in order if that is missing or damaged.
        """
        task, digest = artifact.manifest.task, artifact.digest

        def change(before: Registry, files: Files) -> Registry:
            number = before.number_of(task, digest)
            if number is None:
                number = before.next_version(task)
                version = VersionRecord(
                    digest=digest,
                    published_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    bytes=len(artifact.data),
                    file=files.put_version(task, number, artifact, None),
                )
                after = before.with_version(task, number, version)
            else:
                known = before.version(task, number)
                file = files.put_version(task, number, artifact, known)
                after = before.with_file(task, number, file)
            return after.with_active(task, number) if activate else after

        _, after = self._storage.change(change)
        number = after.number_of(task, digest)
        assert number is not None
        return version_info(after, task, number)

    def activate(self, task: str, version: int) -> VersionInfo:
        """Make a version the active one. Raises `NotFoundError` that lists what there is."""
        _, after = self._change(lambda before: before.with_active(task, version))
        return version_info(after, task, version)

    def deactivate(self, task: str) -> None:
        """Have no version of a task be active; all are kept. Raises `NotFoundError` where none is.

        `roll_back` makes the version active again that was so before.
        """
        self._change(lambda before: before.without_active(task))

    def roll_back(self, task: str) -> VersionInfo:
        """Make the version active that was so before. Raises `ConflictError` where none was.

        The version rolled back from leaves the history: a second call goes one version further.
        """
        _, after = self._change(lambda before: before.rolled_back(task))
        return version_info(after, task, after.active(task))

    def set_canary(self, task: str, version: int, percent: float) -> VersionInfo:
        """Have a version answer `percent` of the task's requests in place of the active one.

        Raises `ConflictError` for the active version, and unless `percent` is between 0 and 100.
        Whatever makes the version active, or deletes it, ends this.
        """
        _, after = self._change(lambda before: before.with_canary(task, version, percent))
        return version_info(after, task, version)

    def clear_canary(self, task: str) -> VersionInfo | None:
        """End the task's canary. Gives the version that was it; None where there was none."""
        before, after = self._change(lambda before: before.without_canary(task))
        canary = before.task(task).canary
        return None if canary is None else version_info(after, task, canary.version)

    def set_shadow(self, task: str, version: int) -> VersionInfo:
        """Have a version answer too, only to be compared. Raises `ConflictError` for the active."""
        _, after = self._change(lambda before: before.with_shadow(task, version))
        return version_info(after, task, version)

    def clear_shadow(self, task: str) -> VersionInfo | None:
        """End the task's shadow. Gives the version that was it; None where there was none."""
        before, after = self._change(lambda before: before.without_shadow(task))
        shadow = before.task(task).shadow
        return None if shadow is None else version_info(after, task, shadow)

    def delete(self, task: str, version: int | None = None) -> None:
        """Delete a version, or with `version` None the task with all its versions.

        Their numbers are not given out again. Raises `ConflictError` for the active version and
        `NotFoundError` for one that is not there.
        """
        if version is None:
            self._change(lambda before: before.without_task(task))
        else:
            self._change(lambda before: before.without_version(task, version))

    def collect(
        self, change: Callable[[Registry], Registry], before: float
    ) -> tuple[Registry, Registry]:
        """Delete in one step what `change` leaves out, and leftovers from before this Unix time.

        Gives what there was, and what there is. What is to go `garbage.py` says.
        """
        return self._storage.collect(lambda registry, _: change(registry), before)

    def add_backbone(self, fingerprint: str, name: str, files: Path) -> BackboneInfo:
        """Take the folder `files` (one that `staging` has given) into the store as a backbone.

        A backbone that is there already takes the new name, and files that differ are replaced:
        this repairs a damaged one. Raises `ConflictError` when another has that name.
        """
        size = sum(file.stat().st_size for file in files.iterdir())
        plain = BackboneRecord(name=name, bytes=size)

        def change(before: Registry, storage: Files) -> Registry:
            before.with_backbone(fingerprint, plain)  # raises before anything is put there
            stored = storage.put_backbone(fingerprint, files, before.backbones.get(fingerprint))
            record = plain.model_copy(update={"stored": stored})
            return before.with_backbone(fingerprint, record)

        self._storage.change(change)
        return BackboneInfo(name, fingerprint, size)

    def staging(self) -> AbstractContextManager[Path]:
        """A new folder to prepare a backbone's files in; removed at the end if still there."""
        return self._storage.staging()

    def append_audit(self, entry: AuditEntry) -> None:
        """Add an entry to the audit log; it lasts when this returns."""
        self._storage.append_audit(entry.to_line())

    def put_document(self, name: str, data: bytes) -> None:
        """Replace a small document, or make it: old or new after a crash at any moment."""
        self.change_document(name, lambda _: data)

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a document by what `change` makes of it, None where there was none.

        Nobody comes between; `change` may be called again when somebody else was faster.
        """
        self._storage.change_document(_checked(name), change)

    def _change(self, change: Callable[[Registry], Registry]) -> tuple[Registry, Registry]:
        return self._storage.change(lambda before, _: change(before))


def open_store(location: str | Path, cache: Path | None = None) -> Store:
    """The store in a folder, or below a URL of an object store, as in `s3://bucket/prefix`.

    `cache` is this machine's folder for the backbones of object stores; None: what the environment
    variable `TASKBONE_CACHE` names, or `~/.cache/taskbone`.
    """
    folder = location if isinstance(location, Path) else folder_of(location)
    if folder is not None:
        return Store(folder)
    cache = cache or Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE)
    return Store(ObjectStorage(str(location), cache.expanduser()))


def folder_of(location: str) -> Path | None:
    """The folder that a location names; None for a URL of an object store."""
    if "://" in location and not location.startswith("file://"):
        return None
    return Path(location.removeprefix("file://")).expanduser()


def _checked(name: str) -> str:
    assert _DOCUMENT_NAME.fullmatch(name), name
    return name


def version_info(registry: Registry, task: str, number: int) -> VersionInfo:
    """What a registry says of one version. Raises `NotFoundError`."""
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
