"""Changes of the keys in a store: adding, rotating, revoking. Knows no HTTP and no command line."""

from collections.abc import Callable, Iterable
from datetime import timedelta

from pydantic import ValidationError

from model_store.manifest import describe
from serving.errors import KeysError
from serving.keys import (
    DOCUMENT,
    Documents,
    Key,
    KeyFile,
    digest_of,
    id_of,
    new_secret,
    now,
    read_keys,
)
from serving.types import Scope

RESERVED = ("environment", "environment-admin")
"""Names of the keys that environment variables give."""


class KeyBook:
    """The keys of one store. Each method is one change, written before it returns.

    Of several keys of one name the last is the current one; those before it were rotated and hold
    until their grace ends.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def keys(self) -> tuple[Key, ...]:
        """All of them, in the order in which they were made."""
        return read_keys(self._documents.document(DOCUMENT))

    def add(
        self,
        name: str,
        scopes: Iterable[Scope],
        tasks: Iterable[str] = (),
        weight: float = 1.0,
        lifetime: timedelta | None = None,
    ) -> tuple[Key, str]:
        """A new key, and its secret. Raises `KeysError` where the name is taken or unusable."""
        if name in RESERVED:
            raise KeysError(f"the name {name!r} is kept for the environment; choose another")
        made, secret = make_key(name, scopes, tasks, weight, lifetime)

        def change(keys: tuple[Key, ...]) -> Iterable[Key]:
            if any(key.name == name for key in keys):
                raise KeysError(
                    f"there is a key {name!r} already; choose another name, or: "
                    f"taskbone keys rotate {name}"
                )
            return *keys, made

        self._change(change)
        return made, secret

    def rotate(self, name: str, grace: timedelta | None = None) -> tuple[Key, str]:
        """The same key with a new secret; the old one holds for `grace`, or no longer.

        A key that expires gets the time again that it had at first.
        """
        secret = new_secret()

        def change(keys: tuple[Key, ...]) -> Iterable[Key]:
            old = _current(keys, name)
            lifetime = None if old.expires_at is None else old.expires_at - old.created_at
            made = make_key(name, old.scopes, old.tasks or (), old.weight, lifetime, secret)[0]
            if grace is None:
                return *(key for key in keys if key.name != name), made
            return *(_ended(key, name, grace) for key in keys), made

        return self._change(change)[-1], secret

    def revoke(self, name: str) -> None:
        """Remove a key with all its secrets."""

        def change(keys: tuple[Key, ...]) -> Iterable[Key]:
            _current(keys, name)
            return (key for key in keys if key.name != name)

        self._change(change)

    def begin(self, key: Key) -> None:
        """Make the document with this key, unless there has ever been one."""
        first = _to_bytes((key,))
        self._documents.change_document(DOCUMENT, lambda data: first if data is None else data)

    def _change(self, change: Callable[[tuple[Key, ...]], Iterable[Key]]) -> tuple[Key, ...]:
        """Write what `change` makes of the keys, and give it."""
        written: tuple[Key, ...] = ()

        def apply(data: bytes | None) -> bytes:
            nonlocal written
            written = _without_the_past(tuple(change(read_keys(data))))
            return _to_bytes(written)

        self._documents.change_document(DOCUMENT, apply)
        return written


def make_key(
    name: str,
    scopes: Iterable[Scope],
    tasks: Iterable[str] = (),
    weight: float = 1.0,
    lifetime: timedelta | None = None,
    secret: str | None = None,
) -> tuple[Key, str]:
    """A key and its secret, a new one unless it is given. Raises `KeysError`."""
    made = now()
    secret = secret or new_secret()
    try:
        key = Key(
            name=name,
            id=id_of(secret),
            sha256=digest_of(secret),
            scopes=tuple(sorted(set(scopes))),
            tasks=tuple(sorted(set(tasks))) or None,
            weight=weight,
            created_at=made,
            expires_at=made + lifetime if lifetime else None,
        )
    except ValidationError as error:
        raise KeysError(f"the key cannot be made: {describe(error)}") from None
    return key, secret


def _ended(key: Key, name: str, grace: timedelta) -> Key:
    """A key of that name with its end not later than the grace's."""
    if key.name != name:
        return key
    ends = now() + grace
    return key.model_copy(update={"expires_at": min(key.expires_at or ends, ends)})


def _current(keys: tuple[Key, ...], name: str) -> Key:
    found = [key for key in keys if key.name == name]
    if not found:
        known = ", ".join(sorted({key.name for key in keys})) or "there is none"
        raise KeysError(f"no key {name[:80]!r}; keys: {known}")
    return found[-1]


def _without_the_past(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """The keys without those whose grace has ended; current ones stay, expired or not."""
    current = {key.name: key.id for key in keys}
    return tuple(key for key in keys if key.is_live or key.id == current[key.name])


def _to_bytes(keys: tuple[Key, ...]) -> bytes:
    return KeyFile(keys=keys).model_dump_json(indent=1).encode()
