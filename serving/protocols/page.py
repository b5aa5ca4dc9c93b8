"""The live page at `/`: static files, read once, the same for everybody and without any data.

Knows no service: what the page shows it asks from the other routes, with the key that its user
gives.
"""

import hashlib
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.page import FILES, INDEX, read

_HEADERS = {
    # A browser that shows the page lets nothing else in: no inline script or style, no other
    # origin, no frame around it, and no text that is turned into elements.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time, and sent again only when a newer Taskbone has another.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, name: str, content_type: str) -> "_File":
        content = read(name)
        return cls(content, content_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')

    def answer(self, request: Request) -> Response:
        headers = _HEADERS | {"etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers | {"content-type": self.content_type})


def add_routes(api: FastAPI) -> None:
    """`/`, and the files that it names."""
    index = _File.read(INDEX, "text/html; charset=utf-8")
    files = {name: _File.read(name, content_type) for name, content_type in FILES.items()}

    async def page(request: Request) -> Response:
        return index.answer(request)

    async def page_file(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found.answer(request)

    api.add_route("/", page, ["GET"], include_in_schema=False)
    api.add_route("/page/{name}", page_file, ["GET"], include_in_schema=False)
