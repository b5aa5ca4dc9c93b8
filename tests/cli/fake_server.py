"""A made-up server for the commands that ask one: answers as it is told, keeps what was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, Any], tuple[int, bytes]]
"""Makes status and body of a path and the JSON that came."""


class FakeServer:
    """Answers on a free port what `answer(path, body)` gives; keeps what was asked."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, Any, str | None]] = []
        self.answer = answer
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in pieces would wait for the client's acknowledgement

            def reply(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                body = json.loads(data) if data else None
                fake.asked.append((self.path, body, self.headers.get("authorization")))
                status, answer = fake.answer(self.path, body)
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = reply

            def log_message(self, *_: object) -> None:
                """Keep the tests' output clean."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True  # connections that are kept would keep them
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fails(self, status: int, kind: str, message: str) -> None:
        """Answer with this error from now on, but for the list of tasks."""
        tasks = {"tasks": [{"task": "mood"}, {"task": "topic"}]}
        self.answer = lambda path, _: (
            (200, json.dumps(tasks).encode())
            if path == "/v1/tasks"
            else error(status, kind, message)
        )


def error(status: int, kind: str, message: str) -> tuple[int, bytes]:
    """A native error."""
    body = {"error": {"type": kind, "message": message, "request_id": "1"}}
    return status, json.dumps(body).encode()


@contextmanager
def fake_server(answer: Answer) -> Iterator[FakeServer]:
    """One that answers while the block runs."""
    fake = FakeServer(answer)
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.server.shutdown()
        fake.server.server_close()
        thread.join()
