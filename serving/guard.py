"""Who may go on: which scope a route needs, and whether the caller's key has it.

Knows methods, paths and headers; no framework, no handlers and no models. What is not named here
needs more and not less: an unknown way to change something is for admins.
"""

import hashlib
import hmac
import re
from urllib.parse import parse_qs

from serving.errors import ForbiddenError, UnauthorizedError
from serving.keys import Key, KeyRing
from serving.page import PATHS as PAGE
from serving.types import ANYBODY, Caller, Scope

COOKIE = "taskbone_docs"
READING = ("GET", "HEAD", "OPTIONS")
Headers = dict[bytes, bytes]

_OPEN = "/health/"
_OPEN_TOO = ("/v2/health/live", "/v2/health/ready")
_ADMIN_READS = ("/v1/audit", "/v1/operations")
_CHANGES = ("/v1/", "/v2/repository/")
_NO_CHANGE = re.compile(
    r"/v1/predict|/v1/tasks/[^/\n]+/predict|/v1/tasks/[^/\n]+/versions/[^/\n]+/predict"
    r"|/v2/repository/index"
)
_COOKIE = re.compile(rb"(?:^|; ?)" + COOKIE.encode() + rb"=(([0-9a-f]{12})\.[0-9a-f]{64})(?:;|$)")
_ADMIN_IS_OFF = (
    "no key of this server has the scope 'admin', so nothing that it serves can be changed over "
    "HTTP; make one on its machine with: taskbone keys add NAME --scope admin"
)


def scope_of(method: str, path: str) -> Scope | None:
    """What a key needs for a route; None: no key is needed.

    Prefixes, and not exact paths, where more is needed: what the router makes of a path's end,
    of a line feed for one, must not decide who may enter.
    """
    if path.startswith(_OPEN) or path in _OPEN_TOO:
        return None
    if path in PAGE and method in ("GET", "HEAD"):
        return None
    if path.startswith("/metrics"):
        return "metrics"
    if method in READING and path.startswith("/v1/stats"):
        return "metrics"
    if method in READING:
        return "admin" if path.startswith(_ADMIN_READS) else "predict"
    if path.startswith(_CHANGES) and not _NO_CHANGE.fullmatch(path):
        return "admin"
    return "predict"


class Guard:
    """Lets in who shows a key of the right scope; and a browser, by a cookie, to the documentation.

    With `auth` off, predictions and metrics are for everyone; changes still need an admin key.
    """

    def __init__(self, keys: KeyRing, *, auth: bool) -> None:
        self._keys = keys
        self._auth = auth

    def admit(
        self,
        method: str,
        path: str,
        headers: Headers,
        query: bytes,
        extra: list[tuple[bytes, bytes]],
    ) -> Caller:
        """Who asks. Raises `UnauthorizedError`, `ForbiddenError`; `extra`: the answer's headers."""
        scope = scope_of(method, path)
        if scope is None:
            return ANYBODY
        if not self._auth:
            if method not in ("GET", "HEAD"):
                _refuse_foreign_page(headers)
            if scope != "admin":
                return ANYBODY
            if not self._keys.opens("admin"):
                raise ForbiddenError(_ADMIN_IS_OFF)
        try:
            caller = self._keys.caller(headers.get(b"authorization", b""))
        except UnauthorizedError:
            key = None
            if method == "GET" and _is_documentation(path):
                key = self._key_of_cookie(headers) or self._key_of_address(query, extra)
            if key is None:
                raise
            caller = key.caller
        if scope not in caller.scopes:
            self._refuse(caller, scope)
        return caller

    def _key_of_address(self, query: bytes, extra: list[tuple[bytes, bytes]]) -> Key | None:
        """The key in `?token=`, with which a browser comes once, to get its cookie."""
        given = parse_qs(query.decode("latin-1")).get("token")
        if not given:
            return None
        key = self._keys.key(b"Bearer " + given[0].encode())
        if "predict" in key.scopes:
            cookie = f"{COOKIE}={_cookie_of(key)}; HttpOnly; SameSite=Strict; Path=/"
            extra.append((b"set-cookie", cookie.encode()))
            extra.append((b"referrer-policy", b"no-referrer"))
        return key

    def _key_of_cookie(self, headers: Headers) -> Key | None:
        found = _COOKIE.search(headers.get(b"cookie", b""))
        key = self._keys.find(found[2].decode()) if found else None
        if found is None or key is None or not key.is_live:
            return None
        return key if hmac.compare_digest(found[1], _cookie_of(key).encode()) else None

    def _refuse(self, caller: Caller, scope: Scope) -> None:
        if scope == "admin" and not self._keys.opens("admin"):
            raise ForbiddenError(_ADMIN_IS_OFF)
        raise ForbiddenError(
            f"the key {caller.name!r} has the scopes {', '.join(sorted(caller.scopes))}; this "
            f"route needs {scope!r}"
        )


def _cookie_of(key: Key) -> str:
    """What a browser keeps: made from the key's hash, which no client has, and of no other use.

    Who reads it may read the documentation, as long as the key holds.
    """
    proof = hmac.new(key.sha256.encode(), b"taskbone documentation", hashlib.sha256).hexdigest()
    return f"{key.id}.{proof}"


def _is_documentation(path: str) -> bool:
    return path in ("/docs", "/openapi.json") or path.startswith("/docs/")


def _refuse_foreign_page(headers: Headers) -> None:
    """Without keys, a page of another site in the user's browser must not reach the server."""
    origin = headers.get(b"origin")
    if origin is None:
        return
    if origin.partition(b"://")[2] != headers.get(b"host"):
        raise ForbiddenError(
            f"the request comes from a page of {origin.decode('latin-1')[:200]!r}; only this "
            "server's own pages may send requests while it runs without a token"
        )
