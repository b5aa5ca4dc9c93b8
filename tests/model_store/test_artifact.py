"""Artifacts: what is written is read again, and every fault is refused by its name."""

import contextlib
import dataclasses
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
from model_store.artifact import probabilities
from model_store.backbone import Backbone, load_backbone
from model_store.errors import (
    ArtifactError,
    BackboneMismatchError,
    GoldenMismatchError,
    ManifestError,
    ModelStoreError,
)
from model_store.manifest import METADATA_KEY, Manifest, read_header
from model_store.plan import LinearHead
from tests.overlays import fp32_encoder, random_artifact, random_overlay, small_backbone

WHOLE: dict[str, Any] = {"heads": (2, 1, 3), "scales": True, "norms": True, "delta_rank": 2}
"""Every component that there is."""

ROOT = Path(__file__).parents[2]
TEXTS = ["the film was good", "a", "what is my new bank card ?"]
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
    assert [rows.tolist() for rows in again.neurons] == [rows.tolist() for rows in overlay.neurons]
    assert {rows.dtype for rows in again.neurons} == {torch.uint16}, "half of the file's int32"
    assert artifact.write(again) == artifact.write(overlay)
    assert again.prompt is not None
    assert overlay.prompt is not None
    assert torch.equal(again.prompt, overlay.prompt)
    assert isinstance(again.head, LinearHead)
    assert isinstance(overlay.head, LinearHead)
    assert torch.equal(again.head.weight, overlay.head.weight)


@pytest.mark.parametrize("wanted", [{"heads": 0.5}, {"scales": True}, {"norms": True}, WHOLE])
def test_what_changes_layers_is_read_again(backbone: Backbone, wanted: dict[str, Any]) -> None:
    overlay = random_overlay(backbone, **wanted)
    data = artifact.write(overlay)
    again = _read(data, backbone)
    assert again.manifest == overlay.manifest
    assert (again.heads is None) == ("heads" not in wanted)
    for mine, other in zip(again.heads or (), overlay.heads or (), strict=True):
        assert torch.equal(mine, other)
    assert again.changes.keys() == overlay.changes.keys()
    for name, tensor in overlay.changes.items():
        assert again.changes[name].dtype == tensor.dtype
        assert torch.equal(again.changes[name], tensor), name
    assert again.owns_layers == (wanted != {"scales": True})
    artifact.check_golden(fp32_encoder(backbone), backbone, again)
    assert artifact.write(again) == data


def test_all_components_have_their_tensors(backbone: Backbone) -> None:
    """The names of the format's description, spelt out."""
    manifest, tensors = read_header(random_artifact(backbone, **WHOLE))
    names = {"prompt", "head.weight", "head.bias"}
    for layer in range(3):
        names |= {f"ffn.{layer}.{part}" for part in ("neurons", "scale", "bias")}
        names |= {f"heads.{layer}.kept"}
        for part in ("weight", "bias"):
            names |= {f"norm.{layer}.attention.{part}", f"norm.{layer}.ffn.{part}"}
        for part in ("q", "k", "v", "o", "ffn_in", "ffn_out"):
            names |= {f"delta.{layer}.{part}.down", f"delta.{layer}.{part}.up"}
    assert tensors.keys() == names
    assert manifest.heads_kept == (2, 1, 3)
    kept = manifest.ffn_kept[1]
    assert tensors["heads.1.kept"] == ("I32", (1,))
    assert tensors["ffn.1.scale"] == ("F32", (kept,))
    assert tensors["ffn.1.bias"] == ("F32", (32,))
    assert tensors["delta.1.k.down"] == ("BF16", (2, 32))
    assert tensors["delta.1.k.up"] == ("BF16", (8, 2))
    assert tensors["delta.1.o.down"] == ("BF16", (2, 8))
    assert tensors["delta.1.o.up"] == ("BF16", (32, 2))
    assert tensors["delta.1.ffn_in.up"] == ("BF16", (kept, 2))
    assert tensors["delta.1.ffn_out.down"] == ("BF16", (2, kept))


def test_a_layer_may_have_another_rank_or_no_delta(backbone: Backbone) -> None:
    overlay = random_overlay(backbone, **WHOLE)
    assert overlay.manifest.deltas is not None
    changes = dict(overlay.changes)
    changes["delta.0.o.down"] = torch.cat([changes["delta.0.o.down"]] * 2)
    changes["delta.0.o.up"] = torch.cat([changes["delta.0.o.up"] / 2] * 2, dim=1)
    del changes["delta.1.ffn_in.down"], changes["delta.1.ffn_in.up"]
    record = overlay.manifest.model_dump()
    record["deltas"] |= {"o": (4, 2, 2), "ffn_in": (2, 0, 2)}
    manifest = Manifest.model_validate(record)
    again = _read(
        artifact.write(dataclasses.replace(overlay, manifest=manifest, changes=changes)), backbone
    )
    assert again.changes.keys() == changes.keys()
    encoder = fp32_encoder(backbone)
    given = probabilities(encoder, backbone, again, TEXTS)
    without = {**overlay.changes}
    without["delta.1.ffn_in.up"] = without["delta.1.ffn_in.up"] * 0
    expected = probabilities(
        encoder, backbone, dataclasses.replace(overlay, changes=without), TEXTS
    )
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_the_same_overlay_gives_the_same_bytes(backbone: Backbone) -> None:
    assert random_artifact(backbone) == random_artifact(backbone)
    assert random_artifact(backbone, **WHOLE) == random_artifact(backbone, **WHOLE)


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
        (lambda t: t.pop("delta.1.k.up"), "missing tensor 'delta.1.k.up'"),
        (lambda t: t.pop("ffn.2.bias"), "missing tensor 'ffn.2.bias'"),
        (lambda t: t.pop("norm.0.attention.bias"), "missing tensor 'norm.0.attention.bias'"),
        (lambda t: t.pop("heads.0.kept"), "missing tensor 'heads.0.kept'"),
        (
            lambda t: t.update({"norm.3.ffn.weight": torch.ones(32)}),
            "unknown tensor 'norm.3.ffn.weight'",
        ),
        (
            _set("delta.0.o.down", lambda x: x[:1].contiguous()),
            r"'delta.0.o.down' is BF16 \[1, 16\]; BF16 \[2, 16\] is expected",
        ),
        (_set("delta.0.q.up", lambda x: x.t().contiguous()), r"'delta.0.q.up' is BF16 \[2, 16\]"),
        (_set("delta.2.ffn_in.up", lambda x: x[1:].contiguous()), "'delta.2.ffn_in.up' is BF16"),
        (_set("delta.1.v.down", lambda x: x.float()), "'delta.1.v.down' is F32"),
        (_set("delta.1.v.down", lambda x: _with(x, 7, float("nan"))), "'delta.1.v.down' holds NaN"),
        (_set("ffn.1.scale", lambda x: _with(x, 0, float("-inf"))), "'ffn.1.scale' holds NaN or"),
        (_set("ffn.1.scale", lambda x: x[:-1].contiguous()), "'ffn.1.scale' is F32"),
        (_set("norm.1.ffn.weight", lambda x: x.bfloat16()), "'norm.1.ffn.weight' is BF16"),
        (_set("heads.0.kept", lambda x: _with(x, 1, 4)), "'heads.0.kept' .* outside 0 to 3"),
        (_set("heads.0.kept", lambda x: _with(x, 0, -1)), "'heads.0.kept' .* outside 0 to 3"),
        (_set("heads.2.kept", lambda x: x.flip(0)), "'heads.2.kept' is not sorted"),
        (_set("heads.2.kept", lambda x: _with(x, 1, int(x[0]))), "'heads.2.kept' is not sorted"),
        (_set("heads.2.kept", lambda x: x.long()), "'heads.2.kept' is I64"),
    ],
)
def test_wrong_tensors_of_what_changes_layers_are_named(
    backbone: Backbone, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        _read(_changed(random_artifact(backbone, **WHOLE), tensors=change), backbone)


@pytest.mark.parametrize("name", ["norm.0.ffn.weight", "ffn.0.scale", "delta.0.q.up"])
def test_a_tensor_of_a_component_that_is_not_there_is_unknown(
    backbone: Backbone, name: str
) -> None:
    data = _changed(random_artifact(backbone), lambda t: t.update({name: torch.ones(32)}))
    with pytest.raises(ArtifactError, match=f"unknown tensor '{name}'"):
        _read(data, backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["deltas"].update(qkv=[2, 2]), "deltas.qkv: 2 ranks for 3 layers"),
        (lambda m: m["deltas"].update(ffn_out=[2] * 4), "deltas.ffn_out: 4 ranks for 3 layers"),
        (lambda m: m["deltas"].update(o=[2, -1, 2]), "deltas.o.1"),
        (lambda m: m["deltas"].update(o=[2, 2, 1_025]), "deltas.o.2"),
        (lambda m: m["deltas"].update(q=[2, 2, 2]), "deltas.q: Extra"),
        (lambda m: m["deltas"].pop("o"), "deltas.o: Field required"),
        (lambda m: m.update(heads_kept=[2, 1]), "heads_kept: 2 counts for 3 layers"),
        (lambda m: m.update(heads_kept=[2, 1, -3]), "heads_kept.2"),
        (lambda m: m.pop("heads_kept"), "components: "),
        (lambda m: m.pop("deltas"), "components: "),
        (lambda m: m["components"].remove("heads"), "components: "),
        (lambda m: m["components"].remove("deltas"), "components: "),
        (lambda m: m["components"].append("norms"), "components: "),
        (lambda m: m["components"].append("bitfit"), "components.7"),
    ],
)
def test_wrong_fields_of_what_changes_layers_are_named(
    backbone: Backbone, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        _read(_changed(random_artifact(backbone, **WHOLE), manifest=change), backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(heads_kept=[2, 5, 3]), "heads_kept: 5 exceeds the backbone's 4 heads"),
        (lambda m: m.update(heads_kept=[2, 2, 3]), r"'heads.1.kept' is I32 \[1\]"),
        (lambda m: m["deltas"].update(ffn_in=[2, 0, 2]), "unknown tensor 'delta.1.ffn_in.down'"),
        (lambda m: m["deltas"].update(qkv=[3, 2, 2]), r"'delta.0.[kqv].* \[3, |\[16, 3\]"),
        (lambda m: m["components"].remove("scales"), "unknown tensor 'ffn.0.bias'"),
        (lambda m: m["components"].remove("norms"), "unknown tensor 'norm.0.attention.bias'"),
    ],
)
def test_a_manifest_that_does_not_describe_the_tensors_is_refused(
    backbone: Backbone, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        _read(_changed(random_artifact(backbone, **WHOLE), manifest=change), backbone)


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
        (lambda m: m.update(ffn_kept=[-1] * 900), r"ffn_kept.0: [^;]*$"),
        (lambda m: m.update({f"k{number}": 0 for number in range(900)}), "and 890 more"),
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


@pytest.fixture(scope="module")
def files(backbone: Backbone) -> tuple[bytes, bytes]:
    """The smallest artifact, and one with every component."""
    return random_artifact(backbone), random_artifact(backbone, **WHOLE)


@settings(deadline=None, max_examples=600)
@given(
    position=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    cut=st.booleans(),
    whole=st.integers(0, 1),
)
def test_any_changed_byte_is_refused_or_read(
    backbone: Backbone,
    files: tuple[bytes, bytes],
    position: float,
    value: int,
    cut: bool,
    whole: int,
) -> None:
    """No change of a file ends in anything but a `ModelStoreError` or a whole overlay."""
    data = bytearray(files[whole])
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


@pytest.mark.parametrize("name", ["linear", "verbalizer", "pairs", "recovered"])
def test_committed_examples_of_version_1_still_answer(name: str) -> None:
    data = (CONTRACTS / f"v1-{name}.safetensors").read_bytes()
    manifest, _ = read_header(data)
    backbone = load_backbone(CONTRACTS / manifest.backbone.fingerprint)
    artifact.check_golden(fp32_encoder(backbone), backbone, _read(data, backbone))
    schema = json.loads((ROOT / "docs" / "artifact-manifest.schema.json").read_text())
    jsonschema.validate(json.loads(manifest.to_json()), schema)


@pytest.mark.parametrize("name", ["linear", "verbalizer", "pairs"])
def test_artifacts_of_the_first_release_mean_what_they_did(name: str) -> None:
    data = (CONTRACTS / f"v1-{name}.safetensors").read_bytes()
    manifest, _ = read_header(data)
    overlay = _read(data, load_backbone(CONTRACTS / manifest.backbone.fingerprint))
    assert overlay.heads is None
    assert not overlay.changes
    assert not overlay.owns_layers
    # The first release refuses fields that it does not know, so none may be added for nothing.
    assert artifact.write(overlay) == data
    assert artifact.rename(data, manifest.task) == data


def test_the_committed_example_of_all_components_has_them_all() -> None:
    data = (CONTRACTS / "v1-recovered.safetensors").read_bytes()
    manifest, _ = read_header(data)
    assert set(manifest.components) == {
        "ffn_neurons", "prompt", "head", "heads", "scales", "norms", "deltas"
    }  # fmt: skip
    assert manifest.heads_kept == (2, 0, 3)
    assert manifest.deltas is not None
    assert manifest.deltas.qkv == (2, 2, 2)
    # Its golden inputs notice when one of them is left out.
    backbone = load_backbone(CONTRACTS / manifest.backbone.fingerprint)
    overlay = _read(data, backbone)
    for left_out in ("scale", "norm", "delta"):
        changes = {name: part for name, part in overlay.changes.items() if left_out not in name}
        assert len(changes) < len(overlay.changes)
        with pytest.raises(GoldenMismatchError):
            artifact.check_golden(
                fp32_encoder(backbone), backbone, dataclasses.replace(overlay, changes=changes)
            )
