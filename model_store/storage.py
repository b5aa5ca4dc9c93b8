"""The seam between what a change of a store means (`store.py`) and where its bytes lie.

Two storages are behind it: a folder (`folder.py`) and an object store (`objects.py`). A storage
knows the registry as the list of what it keeps, and changes it from one state to the next; why, it
does not know.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from model_store.errors import StoreError
from model_store.manifest import VerifiedArtifact, describe
from model_store.registry import BackboneRecord, Registry, StoredFiles, VersionRecord

Token = tuple[int | str, ...]
"""A value to compare with another of the same thing: they differ when it has changed in between."""


@dataclass(frozen=True)
class Leftover:
    """Something that a killed writer has left, and that nothing names. `name` is relative to the
    store's location."""

    name: str
    bytes: int


class Files(Protocol):
    """What a change may put into the storage before the registry names it."""

    def put_version(
        self, task: str, number: int, artifact: VerifiedArtifact, known: VersionRecord | None
    ) -> str | None:
        """Have the bytes of a version there, whole, and give the name that its record keeps.

        With `known`, the version's record, they should be there; what is damaged is put again.
        """
        ...

    def put_backbone(
        self, fingerprint: str, files: Path, known: BackboneRecord | None
    ) -> StoredFiles | None:
        """The same for a backbone's files, which lie in the folder `files` now."""
        ...


Change = Callable[[Registry, Files], Registry]
"""Makes the next registry of one. May be called again when somebody else was faster."""


class Storage(Protocol):
    """Where a store's bytes lie. All methods raise `StoreError` where it cannot be used."""

    @property
    def location(self) -> str:
        """Folder or URL, as it was given."""
        ...

    @property
    def poll_s(self) -> float:
        """How often it is cheap enough to ask for the token."""
        ...

    def token(self) -> Token | None:
        """A value that changes whenever the registry does. Cheap."""
        ...

    def load(self) -> tuple[Token | None, Registry]:
        """The registry, empty for a new store, and a token that is no newer."""
        ...

    def change(self, change: Change) -> tuple[Registry, Registry]:
        """Change the registry in one step that nobody can come between; gives before and after.

        What only the registry of before names is removed.
        """
        ...

    def leftovers(self, before: float) -> tuple[Leftover, ...]:
        """What killed writers have left, and was there before this Unix time."""
        ...

    def collect(self, change: Change, before: float) -> tuple[Registry, Registry]:
        """The same as `change`, and removes those leftovers. What others are writing stays."""
        ...

    def read_version(self, task: str, number: int, record: VersionRecord) -> bytes | None:
        """A version's bytes, unchecked; None where they are missing."""
        ...

    def version_place(self, task: str, number: int, record: VersionRecord) -> str:
        """Where a version's bytes lie, for people."""
        ...

    def backbone_folder(self, fingerprint: str, record: BackboneRecord) -> Path:
        """A folder on this machine with a backbone's files."""
        ...

    def backbone_time(self, fingerprint: str, record: BackboneRecord) -> float:
        """When a backbone was put there, as a Unix time."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A new folder to prepare a backbone's files in; removed at the end if still there."""
        ...

    def append_audit(self, line: bytes) -> None:
        """Add a line to the audit log; it lasts when this returns."""
        ...

    def audit_lines(self, most: int) -> list[bytes]:
        """The last lines of the audit log, the newest last."""
        ...

    def document(self, name: str) -> bytes | None:
        """The content of a document; None where there is none."""
        ...

    def document_token(self, name: str) -> Token | None:
        """A value that changes whenever the document does. Cheap."""
        ...

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a document by what `change` makes of it, nobody between."""
        ...


def encode(registry: Registry) -> bytes:
    """A registry as it is kept; what is not set is not written."""
    return registry.model_dump_json(indent=1, exclude_none=True).encode()


def decode(data: bytes, place: str, remedy: str) -> Registry:
    """The registry that was kept at `place`. Raises `StoreError` where it is damaged."""
    try:
        return Registry.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(f"{place}: the registry is damaged: {describe(error)}{remedy}") from None
