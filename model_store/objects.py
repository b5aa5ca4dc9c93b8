"""A store's bytes in an object store, for servers on many machines.

Readers and writers need no lock. A change uploads what is new under names that nobody else uses,
then creates the next generation of the registry (`generations.py`), or starts again where somebody
else has. Backbones are downloaded once into a cache folder of this machine, each file checked
against its digest. The decisions are in `docs/decisions/0014-object-stores.md`.

    registry/<generation>                     what there is; the newest counts
    tasks/<task>/<mark>.safetensors           one object for each version, never changed
    backbones/<fingerprint>/<mark>/<file>     a backbone's files, never changed
    documents/<name>/<generation>             small documents of the server, such as its keys
    audit/<day>/<time>-<mark>                 who changed what, an object for each entry
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from uuid import uuid4

from model_store import uploads
from model_store.bucket import Bucket
from model_store.durable import locked, new_locked_folder, sha256, sweep_staging, sync
from model_store.errors import StoreError
from model_store.generations import TRIES, Generations, pause
from model_store.registry import BackboneRecord, Registry, StoredFiles, VersionRecord
from model_store.storage import Change, Leftover, Token, decode, encode
from model_store.uploads import Uploads, digest_of, file_name, stored_files, version_name

SWEEP_EVERY = 100
"""So many changes from one look for what killed writers have left to the next."""

_MARK = re.compile(r"/(\d{10})-[0-9a-f]{32}[./]")
_RESTORE = "; restore the bucket from a copy, or use another prefix"


class ObjectStorage:
    """A store's bytes below the URL `location`, which may be empty before the first write.

    `cache` is a folder of this machine for backbones. Is a `storage.Storage`.
    """

    poll_s = 2.0

    def __init__(self, location: str, cache: Path) -> None:
        self._bucket = Bucket(location)
        self._cache = cache
        self._registry = Generations(self._bucket, "registry")

    @property
    def location(self) -> str:
        """The URL."""
        return self._bucket.location

    # --- reading ----------------------------------------------------------------------------

    def token(self) -> Token | None:
        """The newest generation of the registry. One request."""
        return _token(self._registry.newest())

    def load(self) -> tuple[Token | None, Registry]:
        """The newest registry, and its generation."""
        number, registry = self._read()
        return _token(number), registry

    def read_version(self, task: str, number: int, record: VersionRecord) -> bytes | None:
        """A version's bytes, unchecked; None where the object is missing."""
        return self._bucket.get(version_name(task, record.file))

    def version_place(self, task: str, number: int, record: VersionRecord) -> str:
        """The URL of a version's object."""
        return f"{self.location}/{version_name(task, record.file)}"

    def backbone_folder(self, fingerprint: str, record: BackboneRecord) -> Path:
        """A backbone's files, downloaded unless this machine has them."""
        stored = stored_files(record)
        # What is in the files names the folder, so that a backbone that was repaired is new.
        content = sha256(json.dumps(stored.digests, sort_keys=True).encode())[:16]
        path = self._cache / "backbones" / content / fingerprint
        if not _is_complete(path, record):
            with self._caching():
                if not _is_complete(path, record):
                    self._download(fingerprint, stored, path)
        return path

    def backbone_time(self, fingerprint: str, record: BackboneRecord) -> float:
        """When a backbone's first file was uploaded; endlessly late where it is missing."""
        stored = stored_files(record)
        facts = self._bucket.facts(file_name(fingerprint, stored, min(stored.digests)))
        return facts[1] if facts else inf

    def audit_lines(self, most: int) -> list[bytes]:
        """The last entries of the audit log by their writers' clocks, the newest last."""
        names: list[str] = []
        for day in reversed(self._bucket.folders("audit")):
            names = [*self._bucket.names(f"audit/{day}"), *names]
            if len(names) >= most:
                break
        return self._bucket.get_all(names[-most:])

    def document(self, name: str) -> bytes | None:
        """The content of a document; None where there is none."""
        return self._document(name).read()[1]

    def document_token(self, name: str) -> Token | None:
        """The newest generation of a document. One request."""
        return _token(self._document(name).newest())

    # --- writing ----------------------------------------------------------------------------

    def change(self, change: Change) -> tuple[Registry, Registry]:
        """Create the next generation of the registry, and remove what it names no longer."""
        return self._change(change)

    def _change(self, change: Callable[[Registry, Uploads], Registry]) -> tuple[Registry, Registry]:
        files = Uploads(self._bucket)
        for attempt in range(TRIES):
            number, before = self._read()
            if not number:  # an empty one first: what is uploaded then belongs to a store
                self._bucket.check()
                self._registry.append(1, encode(before))
                continue
            files.generation, files.uploads_from = number, before.uploads_from or 0
            after = change(before, files)
            if after == before:
                self._bucket.remove(sorted(files.names - _names(after)))
                return before, after
            if self._registry.append(number + 1, encode(after)):
                self._bucket.remove(sorted((_names(before) | files.names) - _names(after)))
                # Only now: nobody can change what this generation does not know of.
                if not (number + 1) % SWEEP_EVERY or after.uploads_from != before.uploads_from:
                    self._sweep(number + 1, after)
                return before, after
            pause(attempt)
        raise StoreError(
            f"the store {self.location}: others made changes in each of {TRIES} moments that this "
            "one took; try again when less is changed at once"
        )

    def leftovers(self, before: float) -> tuple[Leftover, ...]:
        """Uploads that no registry names, but for those of killed writers that are newer."""
        found = ((name, facts) for name, _, facts in self._unnamed() if facts[1] < before)
        return tuple(Leftover(name, size) for name, (size, _) in found)

    def collect(self, change: Change, before: float) -> tuple[Registry, Registry]:
        """The same as `change`, and has what was uploaded before be named no more.

        The clock only decides what is left alone. That nobody misses what is removed follows from
        the generations: a writer that sleeps meanwhile finds its next one taken, sees in it that
        its upload is too old to be named, and uploads again.
        """
        unnamed = list(self._unnamed())
        if not any(written < before for _, _, (_, written) in unnamed):
            return self.change(change)
        young = [generation for _, generation, (_, written) in unnamed if written >= before]

        def collecting(registry: Registry, files: Uploads) -> Registry:
            after = change(registry, files)
            newest = min([files.generation + 1, *young])
            if newest <= (registry.uploads_from or 0):
                return after
            return after.with_uploads_from(newest)

        return self._change(collecting)

    def append_audit(self, line: bytes) -> None:
        """Add an entry to the audit log."""
        day, time = datetime.now(UTC).strftime("%Y-%m-%d %H-%M-%S.%f").split()
        self._bucket.put(f"audit/{day}/{time}-{uuid4().hex}", line.rstrip(b"\n"))

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Create the next generation of a document."""
        document = self._document(name)
        for attempt in range(TRIES):
            number, before = document.read()
            after = change(before)
            if after == before or document.append(number + 1, after):
                return
            pause(attempt)
        raise StoreError(f"{self.location}/documents/{name}: too many change it at once")

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder of this machine to prepare a backbone's files in."""
        with self._caching() as staging:
            folder, descriptor = new_locked_folder(staging)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    # --- the parts --------------------------------------------------------------------------

    def _read(self) -> tuple[int, Registry]:
        number, data = self._registry.read()
        place = f"{self.location}/registry"
        if data is not None:
            return number, decode(data, f"{place}/{number:010}", _RESTORE)
        # An empty registry beside full folders would have the next sweep remove them all.
        if self._bucket.names("tasks") or self._bucket.names("backbones"):
            if self._registry.newest():
                return self._read()  # made between our looks
            raise StoreError(
                f"{place}: the registry is missing, but there are tasks or backbones{_RESTORE}"
            )
        return 0, Registry()

    def _document(self, name: str) -> Generations:
        return Generations(self._bucket, f"documents/{name}")

    def _sweep(self, generation: int, registry: Registry) -> None:
        """Remove what killed writers have left; see `Uploads` for why nobody can miss it."""
        oldest = max(generation - uploads.GRACE, registry.uploads_from or 0)
        self._bucket.remove(
            name for name, began in self._marked(_names(registry)) if began < oldest
        )

    def _marked(self, named: Container[str]) -> Iterator[tuple[str, int]]:
        """The uploads that are not `named`, each with the generation that its change began from."""
        for name in (*self._bucket.names("tasks"), *self._bucket.names("backbones")):
            mark = _MARK.search(name)
            if mark and name not in named:
                yield name, int(mark[1])

    def _unnamed(self) -> Iterator[tuple[str, int, tuple[int, float]]]:
        """The same of the newest registry, with size and time of each."""
        for name, began in self._marked(_names(self.load()[1])):
            if facts := self._bucket.facts(name):
                yield name, began, facts

    @contextmanager
    def _caching(self) -> Iterator[Path]:
        """Exclude others from the cache, remove leftovers, and give its folder for staging."""
        staging = self._cache / "staging"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            with locked(self._cache / "lock"):
                sweep_staging(staging)
                yield staging
        except OSError as error:
            raise StoreError(
                f"cannot use the cache {self._cache}: {error.filename or ''}: "
                f"{error.strerror or error}; name another folder with TASKBONE_CACHE"
            ) from error

    def _download(self, fingerprint: str, stored: StoredFiles, path: Path) -> None:
        folder, descriptor = new_locked_folder(self._cache / "staging")
        try:
            for file, digest in stored.digests.items():
                name = file_name(fingerprint, stored, file)
                if not self._bucket.download(name, folder / file):
                    raise StoreError(
                        f"{self.location}/{name}: the object is missing; add the backbone again"
                    )
                if digest_of(folder / file) != digest:
                    raise StoreError(
                        f"{self.location}/{name}: the object is damaged, or was so on its way; try "
                        "again, or add the backbone again"
                    )
                sync(folder / file)
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _token(number: int) -> Token | None:
    return (number,) if number else None


def _names(registry: Registry) -> set[str]:
    """The objects that a registry names."""
    versions = {
        version_name(task, version.file)
        for task, record in registry.tasks.items()
        for version in record.versions.values()
    }
    return versions | {
        file_name(fingerprint, stored_files(record), file)
        for fingerprint, record in registry.backbones.items()
        for file in stored_files(record).digests
    }


def _is_complete(path: Path, record: BackboneRecord) -> bool:
    """Whether a folder of the cache has all bytes: it was checked before it got its name."""
    return path.is_dir() and sum(file.stat().st_size for file in path.iterdir()) == record.bytes
