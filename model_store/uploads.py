"""What a change of a store uploads to an object store, and what the objects are called.

The rule by which an upload that a killed writer left is told from one that will be named soon is
here; `objects.py` removes by it.
"""

import hashlib
from pathlib import Path
from uuid import uuid4

from model_store.bucket import Bucket
from model_store.durable import sha256
from model_store.errors import StoreError
from model_store.manifest import VerifiedArtifact
from model_store.registry import BackboneRecord, StoredFiles, VersionRecord

GRACE = 1000
"""So many changes after it was uploaded, an object that no registry has named may be removed."""


class Uploads:
    """What one change has uploaded. Is a `storage.Files`.

    A name is never used twice, and begins with the generation that its change started from. After
    more than `GRACE` generations a change uploads again under a new name rather than name an old
    one, and so it does where the upload is older than `uploads_from` of the registry that it would
    change: so an object that is older, and that the newest registry does not name, will not be.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.generation = 0
        self.uploads_from = 0
        self.names: set[str] = set()
        self._last: tuple[int, str] | None = None

    def put_version(
        self, task: str, number: int, artifact: VerifiedArtifact, known: VersionRecord | None
    ) -> str:
        """Upload a version's bytes, unless they are there, whole."""
        if sha256(artifact.data) != artifact.digest:
            raise StoreError(f"task {task!r}: the bytes to publish do not have the digest given")
        if known is not None and known.file is not None:
            there = self._bucket.get(version_name(task, known.file))
            if there is not None and sha256(there) == artifact.digest:
                return known.file
        mark, new = self._mark()
        if new:
            self._put(version_name(task, mark), artifact.data)
        return mark

    def put_backbone(
        self, fingerprint: str, files: Path, known: BackboneRecord | None
    ) -> StoredFiles:
        """Upload a backbone's files, unless they are there, whole."""
        digests = {file.name: digest_of(file) for file in sorted(files.iterdir())}
        there = known.stored if known else None
        if there and there.digests == digests and self._is_whole(fingerprint, there):
            return there
        mark, new = self._mark()
        stored = StoredFiles(folder=mark, digests=digests)
        for file in files.iterdir() if new else ():
            name = file_name(fingerprint, stored, file.name)
            self.names.add(name)
            self._bucket.upload(name, file)
        return stored

    def _put(self, name: str, data: bytes) -> None:
        self.names.add(name)
        self._bucket.put(name, data)

    def _mark(self) -> tuple[str, bool]:
        """A mark for this change's upload, and whether it is new."""
        oldest = max(self.generation - GRACE, self.uploads_from)
        if self._last is not None and self._last[0] >= oldest:
            return self._last[1], False
        mark = f"{self.generation:010}-{uuid4().hex}"
        self._last = self.generation, mark
        return mark, True

    def _is_whole(self, fingerprint: str, stored: StoredFiles) -> bool:
        for file, digest in stored.digests.items():
            data = self._bucket.get(file_name(fingerprint, stored, file))
            if data is None or sha256(data) != digest:
                return False
        return True


def version_name(task: str, mark: str | None) -> str:
    if mark is None:
        raise StoreError(f"task {task!r}: the registry does not say which object a version is")
    return f"tasks/{task}/{mark}.safetensors"


def file_name(fingerprint: str, stored: StoredFiles, file: str) -> str:
    return f"backbones/{fingerprint}/{stored.folder}/{file}"


def stored_files(record: BackboneRecord) -> StoredFiles:
    if record.stored is None:
        raise StoreError(f"backbone {record.name!r}: the registry does not say where its files are")
    return record.stored


def digest_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
