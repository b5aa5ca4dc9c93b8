"""A server that takes signed artifacts alone, without HTTP and without Ray."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model_store import artifact
from model_store.errors import SignatureError
from serving.board import Board
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.service import Service
from serving.types import Caller
from tests.overlays import random_artifact, small_backbone
from tests.signing import Signer, make_signer

OPS = Caller("ops", frozenset(("admin",)))


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return make_signer(tmp_path / "signer")


Make = Callable[[int], bytes]
"""Makes an artifact of the task `mood` from a seed."""


@pytest.fixture
def place(tmp_path: Path, signer: Signer) -> Iterator[tuple[Service, Make]]:
    """With one unsigned version, which somebody with rights on the folder has put there."""
    store, backbone = small_backbone(tmp_path)

    def make(seed: int) -> bytes:
        return random_artifact(backbone, "mood", seed=seed)

    data = make(1)
    store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))
    config = ServeConfig.of(
        store=store.root, precision="fp32", device="cpu", signature_key=signer.public
    )
    service = Service.open(config, Metrics(), Board(), "replica")
    yield service, make
    service.close()


def register(service: Service, data: bytes, signature: bytes | None) -> int | None:
    work = service.lifecycle.register("mood", data, OPS, signature=signature)
    return asyncio.run(work).version


def test_a_signed_artifact_is_taken(place: tuple[Service, Make], signer: Signer) -> None:
    service, make = place
    data = make(2)
    assert register(service, data, signer.sign(data)) == 2
    assert service.task("mood").version == 2


@pytest.mark.parametrize("kind", ["none", "of another key", "of another artifact", "known bytes"])
def test_any_other_changes_nothing_and_is_noted(
    place: tuple[Service, Make], signer: Signer, tmp_path: Path, kind: str
) -> None:
    service, make = place
    first, data = make(1), make(2)
    signature = {
        "none": None,
        "of another key": make_signer(tmp_path / "other").sign(data),
        "of another artifact": signer.sign(first),
        "known bytes": None,
    }[kind]
    with pytest.raises(SignatureError):
        register(service, first if kind == "known bytes" else data, signature)
    assert len(asyncio.run(service.versions("mood"))) == 1
    (entry,) = asyncio.run(service.lifecycle.audit(10))
    assert (entry.by, entry.action, entry.result) == ("ops", "register", "invalid_signature")
