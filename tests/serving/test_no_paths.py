"""Nothing that a client sends becomes a path or an address: Python's own audit events tell.

The real service and store, without a network. One thing has to become a path, the name of a task
that an admin's checked artifact is of; so this is also shown to be seen.
"""

import asyncio
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from model_store import artifact
from serving.app import build_app
from serving.board import Board
from serving.config import ServeConfig
from serving.keys import KeyRing
from serving.local_key import environment_keys
from serving.metrics import Metrics
from serving.service import Service
from tests.overlays import random_artifact, small_backbone
from tests.serving.conftest import KEYS, TOKEN
from tests.serving.test_guard import OPERATIONS

MARK = "zz-mark"
NAMES = [
    MARK,
    f"../../{MARK}",
    f"http://127.0.0.1:9/{MARK}",
    f"{MARK}\x00.safetensors",
]
TENSOR = {"name": MARK, "shape": [1], "datatype": "BYTES", "data": [MARK]}
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None and MARK in repr(arguments):
        _seen.append(f"{event} {arguments!r}"[:300])


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the interpreter, and the calls that it has no event for, are told of the mark."""
    global _seen  # noqa: PLW0603 - a hook cannot be taken out again, only be told to look away
    found: list[str] = []
    _seen = found
    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "access", "readlink"):
            patch.setattr(os, name, _telling(name, getattr(os, name)))
        try:
            yield found
        finally:
            _seen = None


def _telling(name: str, call: Any) -> Any:
    def told(*arguments: Any, **options: Any) -> Any:
        _hook(f"os.{name}", arguments)
        return call(*arguments, **options)

    return told


sys.addaudithook(_hook)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[Any, Path, Any]]:
    """The application, its store's folder, and what makes an artifact of a task."""
    store, backbone = small_backbone(tmp_path)

    def make(task: str) -> bytes:
        return random_artifact(backbone, task, seed=1)

    data = make("mood")
    store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))
    config = ServeConfig.of(store=store.root, precision="fp32", device="cpu")
    metrics = Metrics()
    service = Service.open(config, metrics, Board(), "replica")
    keys = KeyRing(None, environment_keys(KEYS))
    yield build_app(service, metrics, config, keys), store.root, make
    service.close()


def bodies(name: str) -> list[dict[str, Any]]:
    """Bodies that carry the name wherever some route takes a text."""
    return [
        {"content": name.encode()},
        {"json": {"tasks": [name], "inputs": name}},
        {"json": {"model": name, "input": name, "user": name}},
        {"json": {"inputs": [TENSOR], "id": name, "parameters": {"version": name, "url": name}}},
        {"json": {"version": name, "percent": name, "inputs": name}},
    ]


async def ask_everything(app: Any) -> int:
    """Every documented route with every name in every place; gives how often was asked."""
    asked = 0
    async with client_of(app) as client:
        for name, (method, template) in itertools.product(NAMES, OPERATIONS):
            told = name.replace("\x00", "")
            headers = dict.fromkeys(("x-request-id", "x-task", "x-forwarded-host", "referer"), told)
            headers |= {"x-taskbone-signature": told, "x-deadline-ms": told}
            path = "/".join(
                quote(name, safe="") if part.startswith("{") else part
                for part in template.split("/")
            )
            for body in bodies(name) if method in ("POST", "PUT") else [{}]:
                for query in ("", f"?task={quote(name)}&limit={quote(name)}"):
                    more = headers if query else {}
                    answer = await client.request(method, path + query, headers=more, **body)
                    assert answer.status_code < 500, (method, path, answer.text)
                    asked += 1
    return asked


def client_of(app: Any) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {TOKEN}"}
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers)


def test_nothing_that_a_client_sends_becomes_a_path_or_an_address(
    place: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, folder, _ = place
    with watched(monkeypatch) as found:
        assert asyncio.run(ask_everything(app)) > 500
    assert found == []
    assert [path for path in folder.rglob("*") if MARK in path.name] == []


def test_a_checked_artifacts_task_is_the_one_name_that_does(
    place: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, folder, make = place

    async def upload() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post(f"/v1/tasks/{MARK}/versions", content=make(MARK))

    with watched(monkeypatch) as found:
        answer = asyncio.run(upload())
    assert answer.status_code == 201, answer.text
    assert any(str(folder / "tasks" / MARK) in one for one in found)
