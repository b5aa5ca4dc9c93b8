"""Keys: who may ask for what. Records without secrets; the ring that knows callers by a header.

Knows no HTTP framework and no Ray. The keys lie in one document of the store, `keys.json`, which
`serving/key_book.py` changes; a ring reads it again when it changes, so that a rotation or a
revocation holds everywhere within `LOOK_EVERY_S`, without a restart.

A secret is `tb_<id>_<256 random bits>`, shown once and never kept: the document has its SHA-256.
That is enough, and a slow password hash would be wrong: slow hashes make guessing dear where
secrets are short, and nobody guesses 256 random bits; but every request would pay for one.
"""

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Literal, Protocol, Self

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from model_store.errors import ModelStoreError
from model_store.manifest import TASK_NAME_PATTERN, Frozen, describe
from serving.errors import KeysError, UnauthorizedError
from serving.types import Caller, Scope

DOCUMENT = "keys.json"
LOOK_EVERY_S = 0.5
"""How often a ring looks whether the document has changed."""

_ID_BYTES = 6
_SECRET = re.compile(rf"tb_([0-9a-f]{{{2 * _ID_BYTES}}})_[A-Za-z0-9_-]{{43}}")
_NO_DIGEST = "0" * 64
"""Compared with when there is no such key: an unknown id takes as long as a wrong secret."""
_MOST_SEEN = 1024
_LONGEST_SEEN = 512
_HOW = (
    "send the header 'Authorization: Bearer <key>'; on the server's machine, `taskbone keys add` "
    "makes keys, and the file 'token' of its store has the one that the first start has made"
)
_log = logging.getLogger("taskbone.keys")


class Documents(Protocol):
    """Small named documents; `model_store.store.Store` keeps them."""

    def document(self, name: str) -> bytes | None:
        """The document as it is, None where there is none."""
        ...

    def change_document(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace it by what `change` makes of it; nobody comes between. May try more than once."""
        ...

    def document_token(self, name: str) -> Hashable:
        """A value that changes whenever the document does, cheaper to get than the document."""
        ...


class Key(Frozen):
    """A key, without its secret."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    id: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * _ID_BYTES}}}$")]
    """What the secret begins with; it finds the key, and proves nothing."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole secret, with its beginning."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    tasks: (
        Annotated[tuple[Annotated[str, Field(pattern=TASK_NAME_PATTERN)], ...], Field(min_length=1)]
        | None
    ) = None
    """The tasks that it is for; None: all."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None

    @property
    def caller(self) -> Caller:
        """What a request with this key may do."""
        tasks = None if self.tasks is None else frozenset(self.tasks)
        return Caller(self.name, frozenset(self.scopes), tasks, self.weight)

    @property
    def ends(self) -> float:
        """When it stops to open anything, in seconds since 1970."""
        return float("inf") if self.expires_at is None else self.expires_at.timestamp()

    @property
    def is_live(self) -> bool:
        """Whether it has not expired."""
        return self.ends > time.time()

    def matches(self, digest: str) -> bool:
        """Whether this is the SHA-256 of its secret; takes the same time for any."""
        return hmac.compare_digest(self.sha256, digest)


class KeyFile(Frozen):
    """The document."""

    format_version: Literal[1] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same id")
        return self


def new_secret() -> str:
    """A secret that nobody has: its id, and 256 random bits."""
    return f"tb_{secrets.token_hex(_ID_BYTES)}_{secrets.token_urlsafe(32)}"


def id_of(secret: str) -> str:
    """The id by which a secret's key is found.

    Of one that is not in our form, as an environment variable may give it, the beginning of its
    hash: to look that up says nothing about any other secret.
    """
    found = _SECRET.fullmatch(secret)
    return found[1] if found else digest_of(secret)[: 2 * _ID_BYTES]


def digest_of(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def now() -> datetime:
    """The time, as records have it: UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def read_keys(data: bytes | None) -> tuple[Key, ...]:
    """The keys of the document; none where there is none. `KeysError` where it is damaged."""
    if data is None:
        return ()
    try:
        return KeyFile.model_validate_json(data).keys
    except ValidationError as error:
        raise KeysError(
            f"the store's {DOCUMENT} is damaged: {describe(error)}; restore it from a copy, or "
            "remove it and make new keys with: taskbone keys add"
        ) from None


class KeyRing:
    """The keys that open this server. For any number of threads.

    `fixed` are keys that no document has: those of the environment.
    """

    def __init__(self, documents: Documents | None, fixed: Iterable[Key] = ()) -> None:
        self._documents = documents
        self._fixed = tuple(fixed)
        self._token: Hashable = object()
        self._table = _Table(self._fixed)
        self._closed = threading.Event()
        self.refresh()

    def caller(self, authorization: bytes) -> Caller:
        """Who sends this header. Raises `UnauthorizedError`; the message names no key."""
        table = self._table
        caller, ends = table.seen.get(authorization, (None, 0.0))
        if caller is None or ends <= time.time():
            key = self.key(authorization)
            caller = key.caller
            table.remember(authorization, caller, key.ends)
        return caller

    def key(self, authorization: bytes) -> Key:
        """The key in this header. Raises `UnauthorizedError`."""
        scheme, _, rest = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            raise UnauthorizedError(f"the request carries no key; {_HOW}")
        secret = rest.strip().decode("latin-1")
        key = self.find(id_of(secret))
        right = hmac.compare_digest(key.sha256 if key else _NO_DIGEST, digest_of(secret))
        if key is None or not right:
            raise UnauthorizedError(f"the request carries a key that is not known here; {_HOW}")
        if not key.is_live:
            raise UnauthorizedError(
                f"the key {key.name!r} expired at {key.expires_at}; get a new one with: "
                f"taskbone keys rotate {key.name}"
            )
        return key

    def find(self, id: str) -> Key | None:  # noqa: A002 - the record's word
        """The key of this id, expired or not. Proves nothing."""
        return self._table.by_id.get(id)

    def opens(self, scope: Scope) -> bool:
        """Whether any key opens this scope now."""
        return any(scope in key.scopes and key.is_live for key in self._table.by_id.values())

    def refresh(self) -> None:
        """Read the document again if it has changed. Raises what reading it raises."""
        if self._documents is None:
            return
        token = self._documents.document_token(DOCUMENT)
        if token == self._token:
            return
        # A new table, so that nothing that was found in the old one is remembered. The environment
        # wins over a document that has the same key.
        self._table = _Table((*read_keys(self._documents.document(DOCUMENT)), *self._fixed))
        # The token of before the read: a change in between is then seen at the next look.
        self._token = token

    def watch(self) -> Self:
        """From now on, see changes by oneself. A thread, since a store may be far away."""
        threading.Thread(target=self._watch, name="taskbone-keys", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        complaint = ""
        while not self._closed.wait(LOOK_EVERY_S):
            try:
                self.refresh()
            except (KeysError, ModelStoreError, OSError) as error:
                # The keys that were known go on to hold while someone repairs the store.
                if str(error) != complaint:
                    _log.error("the keys cannot be read; those known still hold: %s", error)
                complaint = str(error)
            else:
                complaint = ""


class _Table:
    """The keys of one state of the document, and the headers that were found right with them."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.by_id = {key.id: key for key in keys}
        # To find a header here takes no time that tells of a secret: a dictionary compares bytes
        # only where their hashes are equal, and Python's are keyed anew in every process.
        self.seen: dict[bytes, tuple[Caller, float]] = {}

    def remember(self, authorization: bytes, caller: Caller, ends: float) -> None:
        """Spare the next request with this very header the hash."""
        if len(authorization) > _LONGEST_SEEN:
            return
        if len(self.seen) >= _MOST_SEEN:
            self.seen.clear()
        self.seen[authorization] = (caller, ends)
