"""A store's bytes in one folder, local or shared, safe against any crash.

Every change is made beside the old state, on the same file system, and becomes visible by one
rename of the registry file; readers need no lock and see the old state or the new one. Writers
exclude each other by a lock on a file, over threads and processes, and each sweeps what a killed
one has left.

    registry.json                      what there is (`registry.py`); all else is found through it
    backbones/<fingerprint>/           one folder for each backbone
    tasks/<task>/<version>.safetensors one file for each version, never changed
    audit.jsonl                        who changed what, one line each; only ever appended to
    documents/<name>                   small documents of the server, such as its keys
    staging/                           what is being written
    lock                               held by the one who writes
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model_store.durable import (
    append_line,
    bytes_in,
    holds,
    is_locked,
    last_lines,
    locked,
    make_folder,
    new_locked_folder,
    put_file,
    sha256,
    sweep_staging,
    sync,
)
from model_store.errors import StoreError
from model_store.manifest import VerifiedArtifact
from model_store.registry import BackboneRecord, Registry, VersionRecord
from model_store.storage import Change, Leftover, Token, decode, encode

_SUFFIX = ".safetensors"
_RESTORE = "; restore the store's folder from a copy, or use another folder"


class FolderStorage:
    """A store's bytes in folder `root`, which need not exist before the first write.

    Holds no state of its own. May be used by many threads and processes at once. Is a
    `storage.Storage` and, while a change is made, its `storage.Files`.
    """

    poll_s = 0.25

    def __init__(self, root: Path) -> None:
        self.root = root
        self._registry_path = root / "registry.json"
        self._backbones = root / "backbones"
        self._tasks = root / "tasks"
        self._staging = root / "staging"
        self._documents = root / "documents"
        self._audit_path = root / "audit.jsonl"

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.root)

    # --- reading ----------------------------------------------------------------------------

    def token(self) -> Token | None:
        """A value that changes whenever the registry does, at the price of one `stat`."""
        return self._token(self._registry_path)

    def load(self) -> tuple[Token | None, Registry]:
        """The registry, and its token from before it was read."""
        token = self.token()
        with self._explained("read"):
            try:
                data = self._registry_path.read_bytes()
            except FileNotFoundError:
                # An empty registry over full folders would have the next writer sweep them all.
                if not (_has_entries(self._tasks) or _has_entries(self._backbones)):
                    return None, Registry()
                if self._registry_path.exists():
                    return self.load()  # made between our two looks
                raise StoreError(
                    f"{self._registry_path}: the registry is missing, but the folders beside it "
                    f"are not empty{_RESTORE}"
                ) from None
        return token, decode(data, str(self._registry_path), _RESTORE)

    def read_version(self, task: str, number: int, record: VersionRecord) -> bytes | None:
        """A version's bytes, unchecked; None where the file is missing."""
        with self._explained("read"):
            try:
                return self._version_path(task, number).read_bytes()
            except FileNotFoundError:
                return None

    def version_place(self, task: str, number: int, record: VersionRecord) -> str:
        """The path of a version's file."""
        return str(self._version_path(task, number))

    def backbone_folder(self, fingerprint: str, record: BackboneRecord) -> Path:
        """The folder of a backbone."""
        path = self._backbones / fingerprint
        with self._explained("read"):
            if not path.is_dir():
                raise StoreError(f"{path}: the folder of this backbone is missing; add it again")
        return path

    def backbone_time(self, fingerprint: str, record: BackboneRecord) -> float:
        """When a backbone's folder was filled."""
        with self._explained("read"):
            return self.backbone_folder(fingerprint, record).stat().st_mtime

    def leftovers(self, before: float) -> tuple[Leftover, ...]:
        """What killed writers have left; any writer removes it, as soon as it has the lock."""
        registry, found = self.load()[1], []
        with self._explained("read"):
            staged = self._staging.iterdir() if self._staging.is_dir() else ()
            unlocked = (path for path in staged if not (path.is_dir() and is_locked(path)))
            for path in sorted([*unlocked, *self._unnamed(registry)]):
                with suppress(
                    FileNotFoundError
                ):  # a writer has just removed it, or given it a name
                    if path.stat().st_mtime < before:
                        found.append(Leftover(str(path.relative_to(self.root)), bytes_in(path)))
        return tuple(found)

    def audit_lines(self, most: int) -> list[bytes]:
        """The last lines of the audit log, the newest last."""
        with self._explained("read"):
            try:
                return last_lines(self._audit_path, most)
            except FileNotFoundError:
                return []

    def document(self, name: str) -> bytes | None:
        """The content of a document; None where there is none."""
        with self._explained("read"):
            try:
                return (self._documents / name).read_bytes()
            except FileNotFoundError:
                return None

    def document_token(self, name: str) -> Token | None:
        """A value that changes whenever the document does, at the price of one `stat`."""
        return self._token(self._documents / name)

    # --- writing ----------------------------------------------------------------------------

    def change(self, change: Change) -> tuple[Registry, Registry]:
        """Write the registry that `change` makes, and remove what it names no longer."""
        with self._writing() as before:
            after = change(before, self)
            if after != before:
                self._put(self._registry_path, encode(after))
                if _names(before) - _names(after):
                    self._sweep(after)
            return before, after

    def collect(self, change: Change, before: float) -> tuple[Registry, Registry]:
        """The same: every change removes what killed writers have left."""
        return self.change(change)

    def put_version(
        self, task: str, number: int, artifact: VerifiedArtifact, known: VersionRecord | None
    ) -> None:
        """Write a version's file unless it is there, whole."""
        path = self._version_path(task, number)
        if not holds(path, artifact.digest):
            make_folder(path.parent)
            put_file(path, artifact.data, artifact.digest, self._staging)

    def put_backbone(self, fingerprint: str, files: Path, known: BackboneRecord | None) -> None:
        """Move a backbone's files to their place; of one that is there, only those that differ."""
        path = self._backbones / fingerprint
        for file in files.iterdir():
            sync(file)
        sync(files)
        if not path.is_dir():
            files.rename(path)
            sync(self._backbones)
            return
        for file in files.iterdir():
            if not holds(path / file.name, sha256(file.read_bytes())):
                file.replace(path / file.name)
        sync(path)

    def append_audit(self, line: bytes) -> None:
        """Add a line to the audit log."""
        with self._explained("write"), self._locked():
            append_line(self._audit_path, line)

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a document by what `change` makes of it."""
        with self._writing():
            make_folder(self._documents)
            self._put(self._documents / name, change(self.document(name)))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder inside the store; no other writer sweeps it while its maker lives."""
        with self._writing():
            folder, descriptor = new_locked_folder(self._staging)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    # --- the parts --------------------------------------------------------------------------

    def _version_path(self, task: str, number: int) -> Path:
        # Only for tasks of a registry: its model lets no name through that could leave the folder.
        return self._tasks / task / f"{number}{_SUFFIX}"

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
            token, registry = self.load()
            if token is None:
                self._put(self._registry_path, encode(registry))
            self._sweep(registry)
            yield registry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with locked(self.root / "lock"):
            yield

    def _sweep(self, registry: Registry) -> None:
        """Remove what the registry does not name. Only under the lock; leaves strange files be."""
        sweep_staging(self._staging)
        for path in list(self._unnamed(registry)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for folder in filter(Path.is_dir, self._tasks.iterdir()):
            record = registry.tasks.get(folder.name)
            if not (record and record.versions) and not any(folder.iterdir()):
                folder.rmdir()

    def _unnamed(self, registry: Registry) -> Iterator[Path]:
        """Files of versions and folders of backbones that a registry does not name."""
        for file in self._tasks.glob(f"*/*{_SUFFIX}"):
            record = registry.tasks.get(file.parent.name)
            if file.stem.isdecimal() and not (record and int(file.stem) in record.versions):
                yield file
        for folder in self._backbones.glob("[0-9a-f]" * 64):
            if folder.name not in registry.backbones:
                yield folder

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


def _names(registry: Registry) -> set[str]:
    """What a registry keeps: backbones and versions."""
    versions = {
        f"{task}/{number}" for task, known in registry.tasks.items() for number in known.versions
    }
    return versions | registry.backbones.keys()
