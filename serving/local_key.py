"""The keys that need no command: those of the environment, and the one that a first start makes.

`TASKBONE_TOKEN` is a key for predictions and metrics, `TASKBONE_ADMIN_TOKEN` one for everything.
Where neither is set and the store has never had a key, the start makes the key `local` and writes
its secret to the file `token` in the store's folder, readable by its owner alone, so that
`taskbone predict` and curl on the same machine need nothing else; a store in an object store has no
such file, and needs a key made before. That file is the local user's
copy: the server compares with the hash in `keys.json`, and without the file the key still works.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from serving.config import ServeConfig
from serving.errors import ConfigError, UnauthorizedError
from serving.key_book import KeyBook, make_key
from serving.keys import DOCUMENT, Documents, Key, KeyRing, digest_of, new_secret
from serving.types import Scope

TOKEN_FILE = "token"  # noqa: S105 - a name
TOKEN_VARIABLE = "TASKBONE_TOKEN"  # noqa: S105 - a name
ADMIN_TOKEN_VARIABLE = "TASKBONE_ADMIN_TOKEN"  # noqa: S105 - a name
LOCAL = "local"
_LOCAL_SCOPES: tuple[Scope, ...] = ("predict", "metrics")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,256}=*")
_HOW = (
    "make a key with: taskbone keys add NAME --scope predict; or set "
    f"{TOKEN_VARIABLE}; or let everyone in with --no-auth"
)


def environment_keys(environment: Mapping[str, str] = os.environ) -> tuple[Key, ...]:
    """The keys that the environment gives. `ConfigError` for one too weak to be used."""
    scopes: dict[str, tuple[str, tuple[Scope, ...]]] = {
        TOKEN_VARIABLE: ("environment", _LOCAL_SCOPES),
        ADMIN_TOKEN_VARIABLE: ("environment-admin", ("predict", "metrics", "admin")),
    }
    keys = []
    for variable, (name, opened) in scopes.items():
        if given := environment.get(variable):
            secret = _checked(given, f"the environment variable {variable}")
            keys.append(make_key(name, opened, secret=secret)[0])
    if len({key.id for key in keys}) < len(keys):
        raise ConfigError(
            f"{TOKEN_VARIABLE} and {ADMIN_TOKEN_VARIABLE} are the same; the second opens more, so "
            "it must be another (make one with: openssl rand -hex 32)"
        )
    return tuple(keys)


def prepare(
    config: ServeConfig, documents: Documents, environment: Mapping[str, str] = os.environ
) -> str | None:
    """See to it that some key opens the server, and give one that this machine's user may see.

    None where there is none to show: the document has hashes alone. Makes the key `local` where
    there has never been a key. Raises `ConfigError` where nobody could ask this server anything.
    """
    fixed = environment_keys(environment)
    if not config.auth:
        return None
    if not fixed and documents.document(DOCUMENT) is None:
        if config.folder is None:
            raise ConfigError(
                f"no key opens this server: the store {config.store} has none; {_HOW}"
            )
        _make_local(config.folder, documents)
    ring = KeyRing(documents, fixed)
    if not (ring.opens("predict") or ring.opens("admin") or ring.opens("metrics")):
        raise ConfigError(f"no key opens this server: all are revoked or expired; {_HOW}")
    shown = local_token(config.folder, environment)
    try:
        if shown and "predict" in ring.caller(b"Bearer " + shown.encode()).scopes:
            return shown
    except UnauthorizedError:
        pass  # a copy of a key that was revoked
    return None


def local_token(folder: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """What a user of this machine shows: from the environment, else from the store's file, where
    the store has a folder."""
    if given := environment.get(TOKEN_VARIABLE):
        return _checked(given, f"the environment variable {TOKEN_VARIABLE}")
    if folder is None:
        return None
    path = folder / TOKEN_FILE
    try:
        return _checked(path.read_text(encoding="ascii").strip(), f"the file {path}")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise _unusable(path, error) from error


def replace_local_copy(folder: Path | None, gone: tuple[Key, ...], secret: str | None) -> bool:
    """Where the file `token` is a copy of one of these keys, put another in its place, or none.

    Gives whether it was one.
    """
    if folder is None:
        return False
    path = folder / TOKEN_FILE
    try:
        digest = digest_of(path.read_text(encoding="ascii").strip())
    except (OSError, UnicodeError):
        return False
    if not any(key.matches(digest) for key in gone):
        return False
    path.unlink()
    if secret is not None:
        _make_token_file(path, secret)
    return True


def _make_local(folder: Path, documents: Documents) -> None:
    """The key `local`. Two servers that start at once make the same one, from one file.

    So does the start after one that was killed between the file and the document.
    """
    path = folder / TOKEN_FILE
    try:
        _make_token_file(path, new_secret())
        path.chmod(0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    secret = local_token(folder, {})
    KeyBook(documents).begin(make_key(LOCAL, _LOCAL_SCOPES, secret=secret)[0])


def _make_token_file(path: Path, secret: str) -> None:
    """Write a secret to a file, unless there is one: the first to come decides."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp makes the file with mode 0600, so the token is never readable by others, and the hard
    # link gives it its name only when it is complete.
    handle, temporary = tempfile.mkstemp(prefix=".token-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secret + "\n")
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()


def _unusable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"the token file {path} cannot be used: {error}; make it readable, remove it, "
        f"or set {TOKEN_VARIABLE}"
    )


def _checked(token: str, source: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{source} holds no usable token: {len(token)} characters given; expected 16 to 256 of "
            "letters, digits and ._~+/- (make one with: openssl rand -hex 32)"
        )
    return token
