"""Checkpoints in and backbones out: every family, every fault, and pages shared by processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store.backbone import fingerprint_of, import_checkpoint, load_backbone
from model_store.errors import BackboneError, NotFoundError, UnsupportedCheckpointError
from model_store.store import Store
from tests.reference import FAMILIES, save_tokenizer, small_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "checkpoint", "bert").folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _files(store: Store) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.is_file() and path.name != "lock")


def _refuse(source: Path | str, store: Store, message: str) -> BackboneError:
    """Importing must fail with this message and leave no file behind."""
    before = _files(store)
    with pytest.raises(BackboneError, match=message) as caught:
        import_checkpoint(str(source), store)
    assert _files(store) == before
    assert store.backbones() == []
    return caught.value


@pytest.mark.parametrize("mlm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_in_once(tmp_path: Path, store: Store, family: str, mlm: bool) -> None:
    folder = small_checkpoint(tmp_path / "checkpoint", family, mlm=mlm).folder
    first = import_checkpoint(str(folder), store)
    again = import_checkpoint(str(folder), store)
    assert first.fingerprint == again.fingerprint
    assert [info.fingerprint for info in store.backbones()] == [first.fingerprint]
    backbone = load_backbone(store.backbone_path("checkpoint"))
    assert backbone.config.family == family
    assert backbone.config.has_mlm is mlm
    assert fingerprint_of(backbone.tensors) == first.fingerprint


def test_the_fingerprint_depends_on_the_tensors(tmp_path: Path, store: Store) -> None:
    one = import_checkpoint(str(small_checkpoint(tmp_path / "a", "bert", seed=1).folder), store)
    two = import_checkpoint(str(small_checkpoint(tmp_path / "b", "bert", seed=2).folder), store)
    assert one.fingerprint != two.fingerprint


def test_an_untied_decoder_is_kept(tmp_path: Path, store: Store) -> None:
    folder = small_checkpoint(tmp_path / "c", "bert", tie_word_embeddings=False).folder
    tensors = load_file(folder / "model.safetensors")
    assert "cls.predictions.decoder.weight" in tensors
    import_checkpoint(str(folder), store)
    backbone = load_backbone(store.backbone_path("c"))
    assert not backbone.config.tied_decoder
    assert torch.equal(
        backbone.tensors["mlm.decoder.weight"], tensors["cls.predictions.decoder.weight"]
    )


def _change(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def _reconfigure(checkpoint: Path, **changes: object) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_older_names_and_halves_are_understood(checkpoint: Path, store: Store) -> None:
    plain = import_checkpoint(str(checkpoint), Store(store.root.parent / "other"))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "LayerNorm" in name:
                old = name.replace(".weight", ".gamma").replace(".bias", ".beta")
                tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(66)[None]
        tensors["bert.pooler.dense.weight"] = torch.zeros(32, 32)

    _change(checkpoint, rename)
    assert import_checkpoint(str(checkpoint), store).fingerprint == plain.fingerprint
    half = {name: t.half() for name, t in load_file(checkpoint / "model.safetensors").items()}
    half.pop("bert.embeddings.position_ids")
    save_file(half, checkpoint / "model.safetensors")
    halved = import_checkpoint(str(checkpoint), store, "half")
    tensors = load_backbone(store.backbone_path(halved.fingerprint)).tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_a_sharded_checkpoint_is_the_same_backbone(checkpoint: Path, store: Store) -> None:
    whole = import_checkpoint(str(checkpoint), Store(store.root.parent / "other"))
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, checkpoint / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (checkpoint / "model.safetensors").unlink()
    assert import_checkpoint(str(checkpoint), store).fingerprint == whole.fingerprint


def test_a_hub_id_is_found_in_the_hubs_cache(
    checkpoint: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own library finds the snapshot, as it does after a download."""
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--org--small"
    shutil.copytree(checkpoint, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    info = import_checkpoint("org/small", store)
    assert info.name == "org/small"
    with pytest.raises(BackboneError, match="'org/absent' is no folder here"):
        import_checkpoint("org/absent", store)


def test_a_pickled_checkpoint_is_refused(checkpoint: Path, store: Store) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"never opened")
    error = _refuse(checkpoint, store, "never read")
    assert isinstance(error, UnsupportedCheckpointError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "swish"}, "activation 'swish' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_size": 33}, "do not divide|shape"),
        ({"num_hidden_layers": 4}, "missing tensor: layers.3"),
        ({"num_hidden_layers": 2}, "surplus tensor: layers.2"),
        ({"vocab_size": "many"}, "vocab"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    checkpoint: Path, store: Store, changes: dict[str, object], message: str
) -> None:
    _reconfigure(checkpoint, **changes)
    _refuse(checkpoint, store, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"),
            "missing tensor: layers.1.ffn_out",
        ),
        (lambda t: t.pop("bert.encoder.layer.0.attention.self.key.weight"), "missing tensor"),
        (lambda t: t.update({"classifier.weight": torch.zeros(2, 32)}), "'classifier.weight'"),
        (
            lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.zeros(9, 32)}),
            "shape",
        ),
        (lambda t: t["bert.encoder.layer.0.output.dense.bias"].fill_(float("nan")), "NaN"),
    ],
)
def test_missing_surplus_and_broken_tensors_are_named(
    checkpoint: Path,
    store: Store,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    _change(checkpoint, change)
    _refuse(checkpoint, store, message)


def test_a_truncated_file_is_named(checkpoint: Path, store: Store) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _refuse(checkpoint, store, "not a whole safetensors file")


def test_no_config_no_tokenizer_no_folder(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    _refuse(checkpoint, store, "no tokenizer")
    save_tokenizer(checkpoint)
    (checkpoint / "config.json").unlink()
    _refuse(checkpoint, store, "config.json is missing")
    _refuse(tmp_path / "no such folder", store, "neither a folder nor")
    with pytest.raises(NotFoundError):
        store.backbone_path("tiny")


def test_adding_again_repairs_and_corrects(checkpoint: Path, store: Store) -> None:
    path = store.backbone_path(import_checkpoint(str(checkpoint), store).fingerprint)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(b"damaged")
    (path / "backbone.json").unlink()
    _reconfigure(checkpoint, num_attention_heads=2)
    import_checkpoint(str(checkpoint), store)
    assert (path / "model.safetensors").read_bytes() == whole
    assert load_backbone(path).config.heads == 2


def test_a_tokenizer_of_another_model_is_named(checkpoint: Path, store: Store) -> None:
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["zebra"] = 500
    file.write_text(json.dumps(tokenizer))
    _refuse(checkpoint, store, "a token 500, the embedding table 120")


def test_an_untied_decoder_must_be_there(checkpoint: Path, store: Store) -> None:
    _reconfigure(checkpoint, tie_word_embeddings=False)
    _refuse(checkpoint, store, "missing tensor: mlm.decoder.weight")


def test_a_damaged_backbone_in_the_store_is_named(checkpoint: Path, store: Store) -> None:
    path = store.backbone_path(import_checkpoint(str(checkpoint), store).fingerprint)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BackboneError, match="damaged"):
        load_backbone(path)


SHARING = """
import sys
from pathlib import Path
from model_store.backbone import load_backbone

backbone = load_backbone(Path(sys.argv[1]))
total = sum(float(tensor.sum()) for tensor in backbone.tensors.values())  # touches every page
print("ready", flush=True)
sys.stdin.readline()
fields = {}
inside = False
for line in open("/proc/self/smaps"):
    if "-" in line.split(" ")[0]:
        inside = line.rstrip().endswith("model.safetensors")
    elif inside and line.startswith(("Rss:", "Pss:", "Private_Dirty:")):
        name, value = line.split()[:2]
        fields[name] = fields.get(name, 0) + int(value)
print(fields["Rss:"], fields["Pss:"], fields["Private_Dirty:"])
"""


def test_two_processes_share_the_pages_of_a_backbone(tmp_path: Path, store: Store) -> None:
    folder = small_checkpoint(
        tmp_path / "larger", "bert", hidden_size=256, intermediate_size=1024
    ).folder
    path = store.backbone_path(import_checkpoint(str(folder), store).fingerprint)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    process = processes[0]
    answer, _ = process.communicate("\n", timeout=60)
    processes[1].communicate("\n", timeout=60)
    resident, proportional, dirty = map(int, answer.split())
    size = (path / "model.safetensors").stat().st_size / 1024
    assert resident >= 0.95 * size, "every page was touched"
    assert dirty == 0, "no page was copied"
    assert proportional <= 0.55 * resident, "the other process holds the same pages"
