"""File operations that a crash cannot leave half done, and the small checks that go with them.

Knows nothing of what is stored. A name that `put_file` has returned for survives a power cut.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from model_store.errors import StoreError


def put_file(
    path: Path, data: bytes, digest: str, staging: Path, mtime_ns: int | None = None
) -> None:
    """Make `path` hold `data`, whose SHA-256 is `digest`; `path` is never seen half written.

    Writes into the folder `staging` on the same file system, syncs, reads back, renames, syncs.
    Raises `StoreError` when what is read back has another digest.
    """
    temporary = staging / uuid4().hex
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        if mtime_ns is not None:
            os.utime(file.fileno(), ns=(mtime_ns, mtime_ns))
        os.fsync(file.fileno())
    if not holds(temporary, digest):
        temporary.unlink()
        raise StoreError(f"{path}: what was written reads back differently; is the disk sound?")
    temporary.replace(path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder in an existing one, unless it is there."""
    if not folder.is_dir():
        folder.mkdir()
        sync(folder.parent)


def own_folder(folder: Path) -> None:
    """Make a folder that nobody else may enter. Raises `OSError` where there is another's."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} must belong to this user alone (mode 700)")


def sync(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(data: bytes) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def holds(path: Path, digest: str) -> bool:
    """Whether `path` is a file whose content has this SHA-256."""
    return path.is_file() and sha256(path.read_bytes()) == digest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file, made where it is missing, over threads and processes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # unlocks


def new_locked_folder(staging: Path) -> tuple[Path, int]:
    """A new folder in `staging` that `sweep_staging` leaves alone while its maker lives.

    Gives the descriptor of the lock, too, to be closed at the end.
    """
    folder = staging / uuid4().hex
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return folder, descriptor


def sweep_staging(staging: Path) -> None:
    """Remove what killed writers have left. For one at a time, and nobody may be writing files."""
    for entry in staging.iterdir():
        if not entry.is_dir():
            entry.unlink(missing_ok=True)
        elif not is_locked(entry):
            shutil.rmtree(entry)


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the folder's lock, or has just removed the folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def bytes_in(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, made where it is missing. What a crash has torn before is closed off.

    For one writer at a time: the caller holds the lock.
    """
    new = not path.exists()
    with path.open("ab") as file:
        if _is_torn(path):
            file.write(b"\n")
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def last_lines(path: Path, most: int) -> list[bytes]:
    """The last lines of a file, without their ends, read from its end."""
    block, data = 1 << 16, b""
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END)
        while left and data.count(b"\n") <= most:
            size = min(block, left)
            left = file.seek(left - size)
            data = file.read(size) + data
            block *= 2
    return data.removesuffix(b"\n").split(b"\n")[-most:]


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
