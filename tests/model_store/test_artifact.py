"""Artifacts: what is written is read again, and every fault is refused by its name."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_store import artifact
from model_store.backbone import Backbone, load_backbone
from model_store.encoder import LinearHead
from model_store.errors import (
    ArtifactError,
    BackboneMismatchError,
    GoldenMismatchError,
    ManifestError,
    ModelStoreError,
)
from model_store.manifest import METADATA_KEY, Manifest, read_header
from tests.overlays import fp32_encoder, random_artifact, random_overlay, small_backbone

ROOT = Path(__file__).parents[2]
CONTRACTS = ROOT / "tests" / "contracts"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return small_backbone(tmp_path_factory.mktemp("tiny"))[1]


def _read(data: bytes, backbone: Backbone) -> artifact.Overlay:
    return artifact.read(data, backbone.config, backbone.fingerprint)


def _changed(
    data: bytes,
    tensors: Callable[[dict[str, Tensor]], object] | None = None,
    manifest: Callable[[dict[str, Any]], object] | None = None,
) -> bytes:
    """The artifact with its tensors or its manifest changed by a function."""
    content = safetensors.torch.load(data)
    if tensors is not None:
        tensors(content)
    size = int.from_bytes(data[:8], "little")
    record = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][METADATA_KEY])
    if manifest is not None:
        manifest(record)
    return safetensors.torch.save(content, {METADATA_KEY: json.dumps(record)})


def test_what_is_written_is_read_again(backbone: Backbone) -> None:
    overlay = random_overlay(backbone)
    again = _read(artifact.write(overlay), backbone)
    assert again.manifest == overlay.manifest
    assert all(torch.equal(a, b) for a, b in zip(again.neurons, overlay.neurons, strict=True))
    assert again.prompt is not None
    assert overlay.prompt is not None
    assert torch.equal(again.prompt, overlay.prompt)
    assert isinstance(again.head, LinearHead)
    assert isinstance(overlay.head, LinearHead)
    assert torch.equal(again.head.weight, overlay.head.weight)


def test_the_same_overlay_gives_the_same_bytes(backbone: Backbone) -> None:
    assert random_artifact(backbone) == random_artifact(backbone)


def test_verify_gives_the_digest_of_the_bytes(backbone: Backbone) -> None:
    data = random_artifact(backbone)
    verified = artifact.verify(data, backbone.config, backbone.fingerprint)
    assert verified.digest == hashlib.sha256(data).hexdigest()
    assert verified.manifest.task == "mood"


def test_rename_changes_the_task_alone(backbone: Backbone) -> None:
    data = random_artifact(backbone)
    renamed = _read(artifact.rename(data, "other"), backbone)
    before = _read(data, backbone)
    assert renamed.manifest == before.manifest.model_copy(update={"task": "other"})
    with pytest.raises(ManifestError, match="task"):
        artifact.rename(data, "../up")


def test_golden_inputs_are_checked(backbone: Backbone) -> None:
    encoder = fp32_encoder(backbone)
    artifact.check_golden(encoder, backbone, random_overlay(backbone))

    def lie(record: dict[str, Any]) -> None:
        record["golden"][1]["scores"] = [0.0, 0.0, 1.0]

    wrong = _read(_changed(random_artifact(backbone), manifest=lie), backbone)
    with pytest.raises(GoldenMismatchError, match="golden input 1"):
        artifact.check_golden(encoder, backbone, wrong)


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def _with(tensor: Tensor, index: int, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("prompt"), "missing tensor 'prompt'"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensor 'extra'"),
        (_set("ffn.1.neurons", lambda x: x.flip(0)), "'ffn.1.neurons' is not sorted"),
        (_set("ffn.1.neurons", lambda x: _with(x, 1, int(x[0]))), "'ffn.1.neurons' is not sorted"),
        (_set("ffn.0.neurons", lambda x: _with(x, len(x) - 1, 48)), "index outside 0 to 47"),
        (_set("ffn.0.neurons", lambda x: _with(x, 0, -1)), "index outside 0 to 47"),
        (_set("ffn.2.neurons", lambda x: x.long()), "'ffn.2.neurons' is I64"),
        (_set("ffn.2.neurons", lambda x: x[1:]), "'ffn.2.neurons' is I32"),
        (_set("prompt", lambda x: _with(x, 5, float("nan"))), "'prompt' holds NaN"),
        (_set("head.bias", lambda x: _with(x, 0, float("inf"))), "'head.bias' holds NaN or inf"),
        (_set("head.weight", lambda x: x[:, :-1].contiguous()), "'head.weight' is F32 \\[3, 31\\]"),
        (_set("prompt", lambda x: x.half()), "'prompt' is F16"),
    ],
)
def test_wrong_tensors_are_named(
    backbone: Backbone, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        _read(_changed(random_artifact(backbone), tensors=change), backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("labels"), "labels"),
        (lambda m: m.update(labels=["a", "a", "b"]), "named once"),
        (lambda m: m.update(task="Bad Name"), "task"),
        (lambda m: m.update(template=["{txt}"]), "unknown field {txt}"),
        (lambda m: m.update(template=["no field"]), "needs {text} once"),
        (lambda m: m.update(read="mask"), "needs a template with {mask}"),
        (lambda m: m.update(components=["ffn_neurons"]), "components"),
        (lambda m: m.update(golden=[]), "golden"),
        (lambda m: m["golden"][0].update(scores=[1.0]), "golden.0.scores"),
        (lambda m: m["golden"][0].update(input=["a", "b"]), "takes one text"),
        (lambda m: m.update(ffn_kept=[60, 1, 1]), "exceeds ffn_width"),
        (lambda m: m["head"].update(kind="odd"), "head"),
        (lambda m: m.update(max_tokens="32"), "max_tokens"),
        (lambda m: m.update(labels=["", "a", "b"]), "labels.0"),
        (lambda m: m["golden"][0].update(input="!" * 10_001), "golden.0.input"),
        (lambda m: m.update(ffn_kept=[-1] * 900), "and 890 more"),
    ],
)
def test_wrong_manifest_fields_are_named(
    backbone: Backbone, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        _read(_changed(random_artifact(backbone), manifest=change), backbone)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m["backbone"].update(fingerprint="0" * 64),
            BackboneMismatchError,
            "localize the task again",
        ),
        (lambda m: m.update(max_tokens=500), ArtifactError, "exceed the backbone's longest"),
        (lambda m: m.update(ffn_width=64), ArtifactError, "the backbone has 3 of width 48"),
    ],
)
def test_an_overlay_that_does_not_fit_the_backbone_is_refused(
    backbone: Backbone,
    change: Callable[[dict[str, Any]], object],
    error: type[ArtifactError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        _read(_changed(random_artifact(backbone), manifest=change), backbone)


@pytest.mark.parametrize(
    "data",
    [b"", b"short", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", (2**62).to_bytes(8, "little") * 4],
)
def test_what_is_no_artifact_is_refused(backbone: Backbone, data: bytes) -> None:
    with pytest.raises(ManifestError, match="not an artifact"):
        _read(data, backbone)


def test_a_key_that_stands_twice_is_refused(backbone: Backbone) -> None:
    manifest = random_overlay(backbone).manifest.to_json()
    with pytest.raises(ManifestError, match="'task' stands twice"):
        Manifest.from_json(manifest[:-1] + ', "task": "other"}')


def test_a_shape_that_is_no_number_is_refused(backbone: Backbone) -> None:
    data = random_artifact(backbone)
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"shape":[3,32]', b'"shape":[1e999]', 1)
    with pytest.raises(ManifestError, match="damaged"):
        _read(len(header).to_bytes(8, "little") + header + data[8 + size :], backbone)


def test_a_safetensors_file_without_manifest_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ManifestError, match=METADATA_KEY):
        _read(safetensors.torch.save({"x": torch.zeros(1)}), backbone)


@settings(deadline=None, max_examples=300)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_any_changed_byte_is_refused_or_read(
    backbone: Backbone, position: float, value: int, cut: bool
) -> None:
    """No change of a file ends in anything but a `ModelStoreError` or a whole overlay."""
    data = bytearray(random_artifact(backbone))
    index = int(position * len(data))
    changed = (
        bytes(data[:index]) if cut else bytes(data[:index] + bytes([value]) + data[index + 1 :])
    )
    overlay = None
    with contextlib.suppress(ModelStoreError):
        overlay = _read(changed, backbone)
    if overlay is not None:
        assert len(overlay.neurons) == backbone.config.layers
        assert read_header(changed)[0] == overlay.manifest
    assert overlay is None or not cut


def test_the_schema_is_the_manifests_own() -> None:
    schema = json.loads((ROOT / "docs" / "artifact-manifest.schema.json").read_text())
    assert schema == Manifest.model_json_schema(), "out of date: run `make schema`"


@pytest.mark.parametrize("name", ["linear", "verbalizer", "pairs"])
def test_committed_examples_of_version_1_still_answer(name: str) -> None:
    data = (CONTRACTS / f"v1-{name}.safetensors").read_bytes()
    manifest, _ = read_header(data)
    backbone = load_backbone(CONTRACTS / manifest.backbone.fingerprint)
    artifact.check_golden(fp32_encoder(backbone), backbone, _read(data, backbone))
    schema = json.loads((ROOT / "docs" / "artifact-manifest.schema.json").read_text())
    jsonschema.validate(json.loads(manifest.to_json()), schema)
