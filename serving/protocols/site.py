"""What is not of any protocol: health, and the documentation's pages."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from swagger_ui_bundle import swagger_ui_path

from serving.errors import EngineError, NotReadyError
from serving.protocols.core import Service
from serving.protocols.exchange import answer
from serving.protocols.routes import Health, RouteText, add_route, answers

_HEALTH = TypeAdapter(Health)
_DOCUMENT = TypeAdapter(dict[str, Any])
_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}

LIVE = RouteText(
    "GET", "/health/live", "operation", "Is the process alive", answers(200, Health, "It is.")
)
READY = RouteText(
    "GET",
    "/health/ready",
    "operation",
    "Are predictions answered",
    answers(200, Health, "They are.", 503),
)


def check_ready(service: Service) -> None:
    """Raise `NotReadyError` unless predictions are answered."""
    try:
        service.check()
    except EngineError as error:
        raise NotReadyError(f"the engine does not run: {error}") from error


def add_routes(api: FastAPI, service: Service) -> None:
    """All of them."""

    async def live(request: Request) -> Response:
        return answer(_HEALTH, Health(status="live"))

    async def ready(request: Request) -> Response:
        check_ready(service)
        return answer(_HEALTH, Health(status="ready"))

    add_route(api, LIVE, live)
    add_route(api, READY, ready)
    _add_pages(api)


def _add_pages(api: FastAPI) -> None:
    async def document(request: Request) -> Response:
        return answer(_DOCUMENT, api.openapi())

    async def docs(request: Request) -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=api.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
        )

    async def docs_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _FILES:
            raise HTTPException(404)
        return FileResponse(Path(str(swagger_ui_path)) / name, media_type=_FILES[name])

    api.add_route("/openapi.json", document, ["GET"], include_in_schema=False)
    api.add_route("/docs", docs, ["GET"], include_in_schema=False)
    api.add_route("/docs/{name}", docs_file, ["GET"], include_in_schema=False)
