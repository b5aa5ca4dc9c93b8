"""Which neurons a task keeps and shares: against a slow reference; what the route tells whom."""

import asyncio
import base64
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.store import Store, VersionInfo
from serving.board import Board
from serving.config import ServeConfig
from serving.errors import UnknownTaskError
from serving.metrics import Metrics
from serving.neurons import NeuronMaps
from serving.service import Service
from serving.tasks import LoadedVersion, load_version
from serving.types import Caller, NeuronMap
from tests.overlays import random_overlay, small_backbone
from tests.serving.conftest import Served
from tests.serving.test_api import error_of

Kept = list[set[int]]
"""The kept neurons of each layer."""


def loaded(backbone: Backbone, overlay: Overlay, digest: str, number: int = 1) -> LoadedVersion:
    info = VersionInfo(overlay.manifest.task, number, digest, "", 0, True)
    return load_version(backbone, overlay, info)


def kept_by(overlay: Overlay) -> Kept:
    return [set(rows.tolist()) for rows in overlay.neurons]


def unpacked(bitmap: bytes) -> set[int]:
    """Neurons by the documented order of bits."""
    return {
        8 * place + bit for place, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1
    }


def in_common(one: Kept, two: Kept) -> int:
    return sum(len(mine & theirs) for mine, theirs in zip(one, two, strict=True))


@given(shares=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=4))
def test_maps_and_overlaps_are_those_of_sets(
    tiny: tuple[Store, Backbone], shares: list[float]
) -> None:
    backbone = tiny[1]
    overlays = [
        random_overlay(backbone, f"task{seed}", seed=seed, keep=share)
        for seed, share in enumerate(shares)
    ]
    versions = [loaded(backbone, one, one.manifest.task) for one in overlays]
    found = NeuronMaps(backbone.config).describe(versions[0], versions[1:])
    mine = kept_by(overlays[0])
    assert [unpacked(layer.neurons) for layer in found.layers] == mine
    assert [layer.kept for layer in found.layers] == list(map(len, mine))
    assert (found.ffn_width, found.heads) == (48, 4)
    assert [one.task for one in found.overlaps] == [one.manifest.task for one in overlays[1:]]
    for overlap, other in zip(found.overlaps, overlays[1:], strict=True):
        theirs = kept_by(other)
        shared, union = in_common(mine, theirs), sum(map(len, map(set.union, mine, theirs)))
        assert (overlap.shared, overlap.kept) == (shared, sum(map(len, theirs)))
        assert overlap.jaccard == pytest.approx(shared / union if union else 0, abs=1e-4)
        chance = sum(len(a) * len(b) / 48 for a, b in zip(mine, theirs, strict=True))
        assert overlap.by_chance == pytest.approx(chance, abs=0.06)


def test_a_width_that_is_no_multiple_of_eight(tmp_path: Path) -> None:
    _, backbone = small_backbone(tmp_path, intermediate_size=43)
    overlay = random_overlay(backbone, keep=1.0)
    found = NeuronMaps(backbone.config).describe(loaded(backbone, overlay, "one"), [])
    assert {len(layer.neurons) for layer in found.layers} == {6}
    assert all(unpacked(layer.neurons) == set(range(43)) for layer in found.layers)


def test_heads_are_those_that_are_kept(tiny: tuple[Store, Backbone]) -> None:
    backbone = tiny[1]
    some = random_overlay(backbone, heads=[0, 1, 3])
    maps = NeuronMaps(backbone.config)
    assert some.heads is not None
    assert [layer.heads for layer in maps.describe(loaded(backbone, some, "some"), []).layers] == [
        tuple(rows.tolist()) for rows in some.heads
    ]
    every = maps.describe(loaded(backbone, random_overlay(backbone), "every"), [])
    assert [layer.heads for layer in every.layers] == [(0, 1, 2, 3)] * 3


def test_a_version_is_made_into_bits_once_and_forgotten_when_it_is_gone(
    tiny: tuple[Store, Backbone],
) -> None:
    backbone = tiny[1]
    one, two, three = (
        loaded(backbone, random_overlay(backbone, name, seed=seed), name)
        for seed, name in enumerate(("one", "two", "three"))
    )
    maps = NeuronMaps(backbone.config)
    first = maps.describe(one, [two])
    empty = dataclasses.replace(one.servable.overlay, neurons=())
    blind = dataclasses.replace(one, servable=dataclasses.replace(one.servable, overlay=empty))
    assert maps.describe(blind, [two]) == first, "its bits are known by its digest"
    maps.describe(two, [three])
    assert {layer.neurons for layer in maps.describe(blind, [two]).layers} == {bytes(6)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store, backbone = small_backbone(tmp_path_factory.mktemp("neurons"))
    for seed, task in enumerate(("mood", "same", "spam")):
        data = artifact.write(random_overlay(backbone, task, seed=seed, pairs=task == "same"))
        store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))
    config = ServeConfig.of(store=store.root, precision="fp32", device="cpu")
    service = Service.open(config, Metrics(), Board())
    yield service
    service.close()


def test_the_service_compares_with_what_the_key_is_for(service: Service) -> None:
    def others(caller: Caller) -> list[str]:
        found: NeuronMap = asyncio.run(service.neurons("mood", caller))
        assert (found.task, found.version) == ("mood", 1)
        return [one.task for one in found.overlaps]

    assert others(Caller()) == ["same", "spam"]
    assert others(Caller(tasks=frozenset(("mood", "spam")))) == ["spam"]
    with pytest.raises(UnknownTaskError, match="no task 'nothing'"):
        asyncio.run(service.neurons("nothing", Caller()))


# --- the route ------------------------------------------------------------------------------------


def test_the_route_gives_bits_in_base64(served: Served) -> None:
    body = served.ask("GET", "/v1/tasks/parity/neurons").json()
    (layer,) = body.pop("layers")
    assert unpacked(base64.b64decode(layer["neurons"])) == {0, 2, 11}
    assert (layer["kept"], layer["heads"]) == (3, [0, 1])
    assert body.pop("overlaps") == [
        {"task": "pairs", "version": 1, "kept": 3, "shared": 3, "by_chance": 0.8, "jaccard": 1.0}
    ]
    digest = served.service.task("parity").digest
    assert body == {"task": "parity", "version": 1, "digest": digest, "ffn_width": 12, "heads": 2}


def test_a_key_for_one_task_learns_of_no_other(
    served: Served, as_caller: Callable[..., Served]
) -> None:
    mine = as_caller(served, name="web", tasks=frozenset(["parity"]))
    assert mine.ask("GET", "/v1/tasks/parity/neurons").json()["overlaps"] == []
    error_of(mine.ask("GET", "/v1/tasks/pairs/neurons"), 403)
    error_of(served.ask("GET", "/v1/tasks/nothing/neurons"), 404)
    error_of(served.ask("GET", "/v1/tasks/parity/neurons?layer=1"), 422)
