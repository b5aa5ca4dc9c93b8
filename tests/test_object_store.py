"""Servers and commands over one store in an object store, as if each were on another machine."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_store.backbone import Backbone
from model_store.errors import StoreUnreachableError
from model_store.store import Store, open_store
from serving.board import Board
from serving.config import ServeConfig
from serving.errors import ConfigError
from serving.local_key import prepare
from serving.metrics import Metrics
from serving.service import Service
from serving.types import ANYBODY
from tests.cli.running import fail, succeed
from tests.overlays import random_artifact
from tests.s3 import S3, running_s3
from tests.waiting import wait_until

pytest.importorskip("s3fs")

TEXTS = ["the film was good", "a"]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def store(
    s3: S3, tiny: tuple[Store, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    """A store with one backbone, which the commands use too."""
    monkeypatch.setenv("TASKBONE_CACHE", str(tmp_path / "cache"))
    for name in ("TASKBONE_TOKEN", "TASKBONE_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    store = open_store(s3.location())
    monkeypatch.setenv("TASKBONE_STORE", store.location)
    folder, backbone = tiny
    with store.staging() as staging:
        for file in folder.backbone_path(backbone.fingerprint).iterdir():
            shutil.copy(file, staging)
        store.add_backbone(backbone.fingerprint, "tiny", staging)
    return store


def open_server(store: Store, cache: Path) -> Service:
    config = ServeConfig.of(store=store.location, cache=cache, precision="fp32", device="cpu")
    return Service.open(config, Metrics(), Board())


def predict(service: Service) -> list[dict[str, float]]:
    answer = asyncio.run(service.predict("mood", TEXTS))
    return [prediction.scores for prediction in answer.predictions]


def test_servers_on_two_machines_serve_the_same(
    s3: S3, store: Store, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    first, second = (random_artifact(tiny[1], "mood", seed=seed) for seed in (1, 2))
    here, there = (open_server(store, tmp_path / name) for name in ("here", "there"))
    try:
        asyncio.run(here.lifecycle.register("mood", first, ANYBODY))
        wait_until(lambda: [info.version for info in there.tasks()] == [1])
        assert predict(here) == predict(there)
        before = predict(here)
        asyncio.run(there.lifecycle.register("mood", second, ANYBODY))
        wait_until(lambda: here.task("mood").version == 2)
        assert predict(here) == predict(there) != before
        asyncio.run(here.lifecycle.roll_back("mood", ANYBODY))
        wait_until(lambda: there.task("mood").version == 1)
        assert predict(there) == before
        with s3.checked_keys():  # the store is away
            assert predict(there) == before
            with pytest.raises(StoreUnreachableError, match="credentials"):
                asyncio.run(there.versions("mood"))
        entries = asyncio.run(there.lifecycle.audit(10))
        assert [entry.action for entry in entries] == ["register", "register", "rollback"]
    finally:
        here.close()
        there.close()
    # A server that starts later has what the others had.
    later = open_server(store, tmp_path / "later")
    assert predict(later) == before
    later.close()


def test_commands(store: Store, tiny: tuple[Store, Backbone], tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.safetensors")
        files[-1].write_bytes(random_artifact(tiny[1], "mood", seed=seed))
    assert succeed("store", "publish", files[0]) == "mood: version 1 (active)\n"
    assert succeed("store", "publish", files[1]) == "mood: version 2 (active)\n"
    succeed("store", "roll-back", "mood")
    assert f"Backbones in {store.location}" in " ".join(succeed("store", "list").split())
    assert "good" in succeed("store", "verify")
    succeed("store", "delete", "mood", "--version", "2", "--yes")
    entries = json.loads(succeed("store", "audit", "--json"))
    assert [entry["action"] for entry in entries] == ["register", "register", "rollback", "delete"]
    assert "bucket does not exist" in fail("store", "list", "--store", "s3://nowhere/x")


def test_a_server_is_started_on_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[ServeConfig] = []

    def run(config: ServeConfig, **_: Any) -> None:
        configs.append(config)

    monkeypatch.setattr("serving.private_ray.run", run)
    succeed("serve")
    (config,) = configs
    assert config.store == store.location
    assert config.folder is None
    assert config.cache == tmp_path / "cache"


def test_keys_lie_in_it_and_no_token_beside_it(store: Store) -> None:
    config = ServeConfig.of(store=store.location)
    with pytest.raises(ConfigError, match=r"the store s3://.* has none; make a key with"):
        prepare(config, store, {})
    made = json.loads(succeed("keys", "add", "shop", "--scope", "predict", "--json"))
    assert prepare(config, store, {}) is None
    assert prepare(config, store, {"TASKBONE_TOKEN": made["key"]}) == made["key"]
    assert "shop" in succeed("keys", "list")
    succeed("keys", "revoke", "shop")
    with pytest.raises(ConfigError, match=r"all are revoked"):
        prepare(config, store, {})
