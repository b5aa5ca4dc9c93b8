"""The application around a fake service, and a way to ask it without a network."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from serving.app import build_app
from serving.config import ServeConfig
from serving.keys import KeyRing
from serving.local_key import environment_keys
from serving.metrics import Metrics
from serving.protocols.exchange import Exchange
from serving.types import Caller
from tests.serving.fake_service import FakeService, open_fake_service

TOKEN = "a-token-for-the-tests"
"""Opens everything."""

PREDICT_TOKEN = "one-for-predictions-and-metrics"
KEYS = {"TASKBONE_TOKEN": PREDICT_TOKEN, "TASKBONE_ADMIN_TOKEN": TOKEN}


@dataclass(frozen=True)
class Served:
    """An application, and what stands behind it."""

    app: ASGIApp
    service: FakeService
    metrics: Metrics
    config: ServeConfig

    def ask(
        self, method: str, path: str, *, token: str | None = TOKEN, **request: Any
    ) -> httpx.Response:
        """One request, with the key that opens everything unless another or none is given."""
        headers = dict(request.pop("headers", {}))
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        return asyncio.run(self._ask(method, path, headers, request))

    def predict(self, inputs: object, task: str = "parity") -> httpx.Response:
        """One predict request."""
        return self.ask("POST", f"/v1/tasks/{task}/predict", json={"inputs": inputs})

    def count(self, name: str, **labels: str) -> float:
        """The sum of the metric's series that have these labels, whatever others they have."""
        return sum(
            sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def _ask(
        self, method: str, path: str, headers: dict[str, str], request: dict[str, Any]
    ) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, headers=headers, **request)


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Served]:
    """Makes an application; settings go into its config. `keys`: others than the usual two."""

    def make(keys: KeyRing | None = None, **settings: Any) -> Served:
        config = ServeConfig.of(store=tmp_path, **settings)
        metrics = Metrics()
        service = open_fake_service(config, metrics)
        keys = keys or KeyRing(None, environment_keys(KEYS))
        return Served(build_app(service, metrics, config, keys), service, metrics, config)

    return make


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """The application with the default settings."""
    return serve()


class _Scope(dict[str, Any]):
    """An ASGI scope whose exchange gets its caller as soon as it is there."""

    def __init__(self, scope: dict[str, Any], caller: Caller) -> None:
        super().__init__(scope)
        self._caller = caller

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Exchange):
            value.caller = self._caller
        return value


@pytest.fixture
def as_caller() -> Callable[..., Served]:
    """Gives the same application, asked with a key of the given properties."""

    def make(served: Served, **caller: Any) -> Served:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await served.app(_Scope(scope, Caller(**caller)), receive, send)

        return Served(app, served.service, served.metrics, served.config)

    return make
