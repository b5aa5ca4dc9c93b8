"""Whole objects below one URL of an object store, through fsspec; its errors as `StoreError`s.

Knows nothing of what is stored. Relies on three things: what was written is seen by the next read
and listing everywhere, an object is there whole or not at all, and of several who create an object
one succeeds (`mode="create"`; on S3 that is `If-None-Match: *`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from model_store.errors import StoreError, StoreUnreachableError

_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")
"""S3's words for an object that another has created, or is creating."""


class Bucket:
    """The objects below `location`, as in `s3://bucket/some/prefix`. Names are relative to it.

    May be used by many threads; what has been pickled opens connections of its own.
    """

    def __init__(self, location: str) -> None:
        self.location = location if location.endswith("://") else location.rstrip("/")

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str]]:
        return Bucket, (self.location,)

    def names(self, folder: str) -> list[str]:
        """All objects whose name starts with `folder/`, in alphabetical order."""
        with self._explained("read"):
            filesystem, root = self._opened
            found = filesystem.find(f"{root}/{folder}")
            return sorted(str(path).removeprefix(f"{root}/") for path in found)

    def folders(self, folder: str) -> list[str]:
        """The names that follow `folder/` up to the next slash, in alphabetical order."""
        with self._explained("read"):
            filesystem, root = self._opened
            try:
                found = filesystem.ls(f"{root}/{folder}", detail=False)
            except FileNotFoundError:
                self.names(folder)  # raises where it is the bucket that is missing
                return []
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def get(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        with self._explained("read"):
            filesystem, root = self._opened
            try:
                return bytes(filesystem.cat_file(f"{root}/{name}"))
            except FileNotFoundError:
                return None

    def get_all(self, names: Sequence[str]) -> list[bytes]:
        """The contents of objects that are there, read at once."""
        with self._explained("read"):
            filesystem, root = self._opened
            paths = [f"{root}/{name}" for name in names]
            found = filesystem.cat(paths) if paths else {}
            return [bytes(found[path]) for path in paths]

    def facts(self, name: str) -> tuple[int, float] | None:
        """Size of an object, and when it was written, as a Unix time by the object store's clock;
        None where there is no object."""
        with self._explained("read"):
            filesystem, root = self._opened
            try:
                size, written = (
                    filesystem.size(f"{root}/{name}"),
                    filesystem.modified(f"{root}/{name}"),
                )
            except FileNotFoundError:
                return None
            return int(size), float(written.timestamp())

    def put(self, name: str, data: bytes) -> None:
        """Write an object whose name nobody else uses."""
        with self._explained("write"):
            filesystem, root = self._opened
            filesystem.pipe_file(f"{root}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless it is there.

        False: it is there, or another is creating it, or an answer was lost and it is this one.
        """
        with self._explained("write"):
            filesystem, root = self._opened
            try:
                filesystem.pipe_file(f"{root}/{name}", data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _code(error) in _TAKEN:
                    return False
                raise
            return True

    def upload(self, name: str, file: Path) -> None:
        """Write an object whose name nobody else uses from a file."""
        with self._explained("write"):
            filesystem, root = self._opened
            filesystem.put_file(str(file), f"{root}/{name}")

    def download(self, name: str, file: Path) -> bool:
        """Write an object's content to a new file; False where there is no object."""
        with self._explained("read"):
            filesystem, root = self._opened
            try:
                filesystem.get_file(f"{root}/{name}", str(file))
            except FileNotFoundError:
                return False
            return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already are no error."""
        with self._explained("write"):
            filesystem, root = self._opened
            for name in names:
                with suppress(FileNotFoundError):
                    filesystem.rm_file(f"{root}/{name}")

    def check(self) -> None:
        """Raise `StoreError` where the same object can be created twice: changes would be lost."""
        name = f"probe-{uuid4().hex}"
        try:
            twice = self.create(name, b"") and self.create(name, b"")
        finally:
            self.remove([name])
        if twice:
            raise StoreError(
                f"the store {self.location}: this object store overwrites an object that was to be "
                "created; one that knows conditional writes (If-None-Match) is needed"
            )

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, and what this location is called there."""
        from fsspec.core import url_to_fs

        try:
            filesystem, path = url_to_fs(self.location, use_listings_cache=False)
        except ImportError as error:
            raise StoreError(
                f"the store {self.location} needs another package: {error}; for s3:// install it "
                "with: pip install 'taskbone[object-store]'"
            ) from None
        except ValueError as error:
            raise StoreError(
                f"the store {self.location} cannot be opened: {error}; expected a folder or a URL "
                "such as s3://bucket/prefix"
            ) from None
        if not path.strip("/"):
            raise StoreError(
                f"the store {self.location} names no bucket; expected a URL such as "
                "s3://bucket/prefix"
            )
        return filesystem, path

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - every protocol's library has its own errors
            reason = f"{type(error).__name__}: {error}"
            raise StoreUnreachableError(
                f"cannot {doing} the store {self.location}: {reason}; needed are a bucket that is "
                f"there, and credentials that may {doing} it, where the protocol's library looks "
                "for them (for s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
            ) from None  # which would be pages of the library's inner calls


def _code(error: OSError) -> str | None:
    """The object store's own word for an error, where its library tells."""
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code if isinstance(code, str) else None
