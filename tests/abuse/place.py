"""Where tests of the whole server take place: it runs on a tiny backbone, and has its own store."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from model_store.backbone import Backbone
from model_store.store import Store
from tests.running import Server, free_port, running


@dataclass(frozen=True)
class Place:
    """A running server and what it serves from."""

    server: Server
    store: Store
    backbone: Backbone

    def change(self, method: str, path: str, expected: int = 200, **request: Any) -> dict[str, Any]:
        """One change of what is served, which must succeed."""
        answer = self.server.admin(method, path, **request)
        assert answer.status_code == expected, f"{method} {path}: {answer.text}"
        found: dict[str, Any] = answer.json()
        return found

    def register(self, task: str, data: bytes, query: str = "", expected: int = 201) -> int:
        """Upload a version; its number."""
        path = f"/v1/tasks/{task}/versions{query}"
        number: int = self.change("POST", path, expected, content=data)["version"]
        return number

    def ports(self) -> dict[int, int]:
        """The port at which each replica that answers does so by itself, by its process."""
        return {
            one.pid: port
            for one in self.server.replicas()
            for port in _listening(one)
            if _answers(port)
        }


def _listening(process: psutil.Process) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        found = process.net_connections("tcp")
        return [one.laddr.port for one in found if one.status == psutil.CONN_LISTEN]
    return []


def _answers(port: int) -> bool:
    """Whether the application is there."""
    try:
        found = httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return False
    return found.status_code == 200


@contextmanager
def serve_tiny(folder: Path, tiny: tuple[Store, Backbone], replicas: int) -> Iterator[Place]:
    """Start the server in a folder, from a copy of the tiny store."""
    store, backbone = tiny
    shutil.copytree(store.root, folder / "store")
    port = free_port()
    command = ["-m", "tests.abuse.tiny_server", str(folder / "store"), str(port), str(replicas)]
    with running(command, port, folder / "log") as server:
        yield Place(server, Store(folder / "store"), backbone)
