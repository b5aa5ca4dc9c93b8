"""The ready-made overlays: what is promised of them, and that they answer as they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quality import MAX_LOSS, dense_accuracy
from examples.demo import QUESTIONS
from examples.ready_made import BACKBONE, OVERLAYS, add_backbone, checkpoint_folder, prepare
from localization.config import read_task_file
from model_store import artifact
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.manifest import Manifest, read_header
from model_store.ops import TorchOps
from model_store.packing import Item, Layout, pack
from model_store.store import Store
from model_store.tokenization import InputEncoder
from serving.ops_onednn import OneDnnOps
from tests.reference import transformers_hidden, unpacked

ROOT = Path(__file__).parents[1]
FILES = sorted(OVERLAYS.glob("*.safetensors"))
TEXTS = ["A warm and clever film.", "what?", "Please send me a new card. " * 30]


def _manifests() -> list[Manifest]:
    return [read_header(file.read_bytes())[0] for file in FILES]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return add_backbone(Store(tmp_path_factory.mktemp("store")))


def _localized(manifest: Manifest) -> float:
    return next(
        item.value
        for item in manifest.metrics
        if (item.network, item.split, item.metric) == ("localized", "test", "accuracy")
    )


def test_there_are_six_small_ones_with_their_task_files() -> None:
    assert len(FILES) >= 6
    for file, manifest in zip(FILES, _manifests(), strict=True):
        assert file.stem == manifest.task
        assert file.stat().st_size <= 300_000
        task = read_task_file(ROOT / "examples" / "tasks" / f"{file.stem}.yaml")
        assert task.task == manifest.task
        settings = manifest.provenance.settings
        assert settings["tuning"] == task.tuning.model_dump(mode="json")
        assert settings["search"] == task.search.model_dump(mode="json")
        assert manifest.backbone.name == BACKBONE
        assert file.stem in QUESTIONS, "the demo asks every ready-made task"


def test_they_keep_the_accuracy_and_not_the_neurons() -> None:
    manifests = _manifests()
    for manifest in manifests:
        lost = 100 * (dense_accuracy(manifest) - _localized(manifest))
        assert lost <= MAX_LOSS, f"{manifest.task} lost {lost:.2f} points"
    kept = [manifest.kept_share for manifest in manifests]
    assert sum(kept) / len(kept) <= 0.6


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.stem))
def test_golden_inputs_hold_in_fp32_and_in_the_servers_precision(
    file: Path, minilm: Backbone
) -> None:
    overlay = artifact.read(file.read_bytes(), minilm.config, minilm.fingerprint)
    encoder = Encoder(minilm.config, minilm.tensors, TorchOps())
    artifact.check_golden(encoder, minilm, overlay)
    packed = Encoder(minilm.config, minilm.tensors, OneDnnOps())
    inputs = [item.input for item in overlay.manifest.golden]
    given = artifact.probabilities(packed, minilm, overlay, inputs)
    expected = torch.tensor([item.scores for item in overlay.manifest.golden])
    artifact.compare_golden(overlay.manifest, given, expected, 0.06)


def test_preparing_again_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = prepare(store)
    token = store.state_token()
    assert prepare(store) == names
    assert store.state_token() == token


def test_minilm_equals_transformers(minilm: Backbone) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(checkpoint_folder(), dtype=torch.float32).eval()
    encodings = InputEncoder(minilm.tokenizer, minilm.config, ["{text}"], 512).encode(
        [*TEXTS, "the film " * 600]
    )
    assert len(encodings[-1].token_ids) == 512
    encoder = Encoder(minilm.config, minilm.tensors, TorchOps())
    batch = pack([Item(encoding, 0) for encoding in encodings], [Layout(0, "cls")])
    overlay = artifact.read(FILES[0].read_bytes(), minilm.config, minilm.fingerprint)
    plan = overlay.plan(encoder)
    whole = tuple(encoder.ffn(layer) for layer in range(minilm.config.layers))
    plan = type(plan)("cls", plan.head, whole)
    with torch.no_grad():
        ours = unpacked(encoder.hidden_states(batch, [plan]), batch)
        theirs = transformers_hidden(model, encodings)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def test_the_quality_benchmark_measures_what_the_manifest_says() -> None:
    folder = os.environ.get("TASKBONE_DATASETS")
    if not folder:
        pytest.skip("TASKBONE_DATASETS does not name the folder of the data sets")
    command = [sys.executable, "-m", "benchmarks.quality", "--data", folder, "--tasks", "trec6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])["tasks"]["trec6"]
    manifest = next(manifest for manifest in _manifests() if manifest.task == "trec6")
    assert row["localized"] == pytest.approx(100 * _localized(manifest), abs=0.26)
    assert row["dense"] == pytest.approx(100 * dense_accuracy(manifest), abs=0.01)
    assert row["rows"] == 400
