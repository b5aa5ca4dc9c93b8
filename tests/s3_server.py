"""An S3 server for tests: moto's, over real HTTP, with faults to order. Prints its port.

Answers one request at a time, because moto looks whether an object is there and writes it in two
steps, which real object stores do in one.
"""

import json
import threading
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

ACCOUNT = "123456789012"
CONFLICT = (
    b"<Error><Code>ConditionalRequestConflict</Code><Message>another is at it</Message></Error>"
)


class Silent(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Nothing."""


class Server:
    """The application. PUT /faults sets the faults, POST /copy copies what is below a prefix."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._faults: list[dict[str, Any]] = []

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with self._lock:
            path = unquote(environ["PATH_INFO"])
            if path in ("/faults", "/copy"):
                size = int(environ["CONTENT_LENGTH"])
                self._order(path, json.loads(environ["wsgi.input"].read(size)))
                start("200 OK", [("Content-Length", "0")])
                return [b""]
            kind = self._fault(environ["REQUEST_METHOD"], path)
            if kind == "conflict":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start("409 Conflict", [("Content-Length", str(len(CONFLICT)))])
                return [CONFLICT]
            if kind == "unconditional":
                environ.pop("HTTP_IF_NONE_MATCH", None)
            if kind == "lose answer":
                list(self._s3(environ, lambda *_: None))
                start("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            return list(self._s3(environ, start))

    def _order(self, path: str, order: Any) -> None:
        if path == "/faults":
            self._faults = order
            return
        backend = s3_backends[ACCOUNT]["aws"]
        keys = backend.list_objects(
            backend.get_bucket(order["bucket"]), order["source"], None, None, None
        )[0]
        for key in keys:
            target = order["target"] + key.name.removeprefix(order["source"])
            backend.copy_object(key, order["bucket"], target)

    def _fault(self, method: str, path: str) -> str | None:
        for fault in self._faults:
            if fault["times"] > 0 and fault["method"] == method and fault["path"] in path:
                fault["times"] -= 1
                return str(fault["kind"])
        return None


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Server(), threaded=True, request_handler=Silent)
    print(server.server_port, flush=True)  # noqa: T201 - the parent reads it
    server.serve_forever()
