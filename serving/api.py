"""All routes of all protocols as one application, its OpenAPI document, and which protocol speaks
where. Knows no handler's work: that is in `serving/protocols/`.

Handlers raise; `serving/app.py` turns every error into an answer with `error_answer`.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.config import ServeConfig
from serving.guard import scope_of
from serving.metrics import Metrics
from serving.protocols import (
    changes,
    faults,
    monitoring,
    native,
    oip,
    page,
    repository,
    site,
    tei,
    vllm,
)
from serving.protocols.core import Service
from serving.protocols.exchange import EXCHANGE, Exchange
from serving.protocols.faults import status_of
from serving.protocols.shapes import shape_of

__all__ = [
    "EXCHANGE",
    "Api",
    "Exchange",
    "Service",
    "build_api",
    "error_answer",
    "status_of",
]

TITLE = "Taskbone"
DESCRIPTION = """\
One frozen encoder answers for many tasks at once.

Every route but those of `/health` needs a key in the header `Authorization: Bearer <key>`, with the
scope that the route names: `predict`, `metrics`, or `admin` for what changes what is served. The
live page at `/` has no data in it and needs none.
`taskbone serve` prints the key for this machine when it starts; `taskbone keys` makes others. A
browser may open `/docs` and `/openapi.json` with `?token=<key>` once.

The native routes tell every error, whatever its cause, in the same body:
`{"error": {"type": "...", "message": "...", "request_id": "..."}}`; the routes of other protocols
have error bodies of their own. Every answer carries the header `x-request-id`: the caller's own, if
it sent one of at most 64 letters, digits and `._-`, else a new one.
"""


def error_answer(error: Exception, request_id: str, path: str) -> Response:
    """The answer to an error, in the words of the protocol that the path belongs to."""
    return faults.error_answer(error, request_id, shape_of(path))


class _LeanRoute(APIRoute):
    """A route that is documented like any other, and whose handler takes the bare request.

    What FastAPI puts around a handler serves its dependencies, of which there are none, and turns
    errors into answers, which `serving/app.py` does.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **documented: Any) -> None:
        super().__init__(path, endpoint, **documented)
        self.allowed = set(self.methods or ())
        """The methods of all routes of this path."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response: Response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

        self.app = app

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say which methods there are."""
        if scope["method"] not in (self.methods or ()):
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(self.allowed))})
        await self.app(scope, receive, send)


class Api(FastAPI):
    """The application, whose OpenAPI document also says which key each route needs."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made once."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                # The documentation page's files read 3.0 and not 3.1.
                openapi_version="3.0.3",
                description=self.description,
                routes=self.routes,
            )
            schemes = {"key": {"type": "http", "scheme": "bearer"}}
            document.setdefault("components", {})["securitySchemes"] = schemes
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    scope = scope_of(method.upper(), path)
                    operation["security"] = [{"key": []}] if scope else []
                    if scope:
                        said = operation.get("description", "")
                        operation["description"] = f"Needs a key with the scope `{scope}`. {said}"
            self.openapi_schema = _as_3_0(document)
        return self.openapi_schema


def _as_3_0(part: Any) -> Any:
    """A part of a document, with what only OpenAPI 3.1 can say put in 3.0's words."""
    if isinstance(part, list):
        return [_as_3_0(item) for item in part]
    if not isinstance(part, dict):
        return part
    said = {name: _as_3_0(value) for name, value in part.items()}
    if "const" in said:
        said["enum"] = [said.pop("const")]
    if said.get("type") == "null":
        return {"enum": [None], "nullable": True}
    return said


def build_api(service: Service, metrics: Metrics, config: ServeConfig) -> Api:
    """All routes. Errors are raised to the caller, which answers them with `error_answer`."""
    api = Api(
        title=TITLE,
        description=DESCRIPTION,
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    api.router.route_class = _LeanRoute
    # Routes are tried in order: the busiest come first.
    native.add_routes(api, service, config)
    changes.add_routes(api, service, metrics, config)
    oip.add_routes(api, service, config)
    repository.add_routes(api, service, config)
    vllm.add_routes(api, service, config)
    tei.add_routes(api, service, config)
    monitoring.add_routes(api, metrics, config)
    site.add_routes(api, service)
    page.add_routes(api)
    routes = [route for route in api.routes if isinstance(route, _LeanRoute)]
    for route in routes:
        same = [one for one in routes if one.path == route.path]
        route.allowed = {name for one in same for name in one.methods or ()}
    return api
