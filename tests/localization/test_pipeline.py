"""The whole of `taskbone localize` on a task that can be learned."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from localization import runs
from localization.config import TaskConfig, read_task_file
from localization.data import load_dataset
from localization.errors import ConfigError
from localization.job import prepare
from localization.network import Network, start
from localization.pipeline import localize
from localization.results import Localized
from localization.runs import evaluate_file, localize_file
from localization.tuning import tune
from model_store import artifact
from model_store.backbone import Backbone
from model_store.encoder import Encoder
from model_store.errors import NotFoundError
from model_store.ops import TorchOps
from model_store.store import Store
from tests.localization.synthetic import Silent, write_rows
from tests.overlays import fp32_encoder, small_backbone

MEASURED = ["validation dense", "test dense", "validation localized", "test localized"]

TASK: dict[str, Any] = {
    "task": "mood",
    "data": {"train": "train.jsonl", "test": "test.jsonl"},
    "prompt_tokens": 4,
    "max_tokens": 24,
    "tuning": {"epochs": 12, "condense_epochs": 4, "head_learning_rate": 0.05, "precision": "fp32"},
    "budget": {"margin": 5.0},
    "golden": ["the film was good", "bad news"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", 300, seed=1)
    write_rows(folder / "test.jsonl", 80, seed=2)
    return folder


def _localize(
    rows: Path, backbone: Backbone, work: Path, report: Silent | None = None, **changes: Any
) -> Localized:
    config = TaskConfig.model_validate(TASK | changes)
    dataset = load_dataset(config.data, rows, config.seed)
    return localize(config, backbone, dataset, work, "test", "cpu", report or Silent())


@pytest.fixture(scope="module")
def localized(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path_factory: pytest.TempPathFactory
) -> Localized:
    return _localize(rows, tiny[1], tmp_path_factory.mktemp("work"))


def test_the_task_is_learned_and_neurons_are_gone(localized: Localized) -> None:
    assert localized.test["dense"].evaluation.accuracy > 0.8
    assert localized.test["localized"].evaluation.accuracy > 0.75
    assert localized.overlay.manifest.kept_share < 1
    assert 1 <= len(localized.trials) <= 6
    assert localized.trials[-1] is localized.chosen
    assert localized.network == "localized"


def test_the_chosen_ratio_is_the_smallest_within_the_margin(localized: Localized) -> None:
    *tried, chosen = localized.trials
    acceptable = [
        trial.share
        for trial in tried
        if 100 * (localized.dense.validation - trial.tuned.validation) < 5.0
    ]
    assert chosen.share == min(acceptable, default=1.0)
    assert localized.overlay.manifest.provenance.settings["chosen_share"] == chosen.share


def test_a_trial_stops_as_soon_as_it_is_good_enough(localized: Localized) -> None:
    epochs = TASK["tuning"]["condense_epochs"]
    for trial in localized.trials[:-1]:
        enough = localized.dense.validation - 0.05
        good = [value >= enough for value in trial.tuned.curve]
        assert not any(good[:-1]), "a good epoch was not the last one"
        assert len(good) <= epochs
    spent = sum(len(trial.tuned.curve) * trial.cost for trial in localized.trials)
    assert localized.trainings == pytest.approx(spent / len(localized.dense.curve))


def test_the_manifest_holds_what_was_measured(
    localized: Localized, tiny: tuple[Store, Backbone]
) -> None:
    overlay, backbone = localized.overlay, tiny[1]
    data = artifact.write(overlay)
    again = artifact.read(data, backbone.config, backbone.fingerprint)
    artifact.check_golden(fp32_encoder(backbone), backbone, again)
    figures = {
        (item.network, item.split): item
        for item in overlay.manifest.metrics
        if item.metric == "accuracy"
    }
    assert set(figures) == {
        (network, split) for network in ("dense", "localized") for split in ("validation", "test")
    }
    assert figures["localized", "test"].rows == 80
    assert figures["localized", "test"].value == pytest.approx(
        localized.test["localized"].evaluation.accuracy, abs=1e-6
    )


def test_the_same_seed_gives_the_same_overlay(
    localized: Localized, rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    again = _localize(rows, tiny[1], tmp_path).overlay
    for mine, other in zip(again.neurons, localized.overlay.neurons, strict=True):
        assert torch.equal(mine, other)
    assert again.prompt is not None
    assert localized.overlay.prompt is not None
    torch.testing.assert_close(again.prompt, localized.overlay.prompt)


def test_an_interrupted_run_goes_on_where_it_was(
    localized: Localized, rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _localize(rows, tiny[1], tmp_path, Silent(stop_at="quantify"))
    report = Silent()
    result = _localize(rows, tiny[1], tmp_path, report)
    assert "inject" not in report.steps
    assert report.steps[0] == "quantify"
    for mine, other in zip(result.overlay.neurons, localized.overlay.neurons, strict=True):
        assert torch.equal(mine, other)
    third = Silent()
    _localize(rows, tiny[1], tmp_path, third)
    assert third.steps == MEASURED
    changed = Silent()
    _localize(rows, tiny[1], tmp_path, changed, seed=7)
    assert "inject" in changed.steps, "another seed must not find the old stages"


def test_a_damaged_stage_is_computed_again(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    budget = {"keep": 0.5}
    _localize(rows, tiny[1], tmp_path, budget=budget)
    for file in tmp_path.glob("inject-*"):
        file.write_bytes(file.read_bytes()[:50])
    report = Silent()
    _localize(rows, tiny[1], tmp_path, report, budget=budget)
    assert report.steps == ["inject", *MEASURED]


def test_another_set_of_neurons_is_another_stage(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localization.selection.MULTIPLE", 1)
    _localize(rows, tiny[1], tmp_path, budget={"keep": 0.496})
    report = Silent()
    _localize(rows, tiny[1], tmp_path, report, budget={"keep": 0.504})
    assert "condense-0.50" in report.steps


def test_a_verbalizer_answers_with_the_mlm_head(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "template": ("{text} . it is {mask} .",),
        "verbalizer": {"good": "good", "bad": "bad"},
        "prompt_tokens": 8,
        "tuning": {"epochs": 10, "prompt_learning_rate": 0.3, "precision": "fp32"},
        "budget": {"keep": 0.7},
    }
    result = _localize(rows, tiny[1], tmp_path, **changes)
    manifest = result.overlay.manifest
    assert manifest.head.kind == "verbalizer"
    assert manifest.read == "mask"
    assert result.overlay.head is None
    # A random network has no language to draw on, so only the mechanism is tested, not the skill.
    begun = start(Network(fp32_encoder(tiny[1]), "mask", None), 2, 8, 0).prompt
    assert begun is not None
    assert result.dense.prompt is not None
    assert not torch.equal(result.dense.prompt, begun)
    data = artifact.write(result.overlay)
    again = artifact.read(data, tiny[1].config, tiny[1].fingerprint)
    artifact.check_golden(fp32_encoder(tiny[1]), tiny[1], again)


def test_tuning_never_changes_the_backbone(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    backbone = tiny[1]
    before = {name: tensor.clone() for name, tensor in backbone.tensors.items()}
    network = Network(Encoder(backbone.config, backbone.tensors, TorchOps()), "mean", None)
    config = TaskConfig.model_validate(TASK)
    dataset = load_dataset(config.data, rows, 0)
    train = prepare(config, backbone, dataset, tmp_path, "cpu", Silent()).train
    tuned = tune(
        network, start(network, 2, 4, 0), None, train, train, config.tuning, 1, 0, lambda *_: None
    )
    assert tuned.prompt is not None
    assert not torch.equal(tuned.prompt, start(network, 2, 4, 0).prompt)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.tensors.items())


def test_tuning_stops_early_and_keeps_the_best_epoch(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    tuning = TASK["tuning"] | {"epochs": 40, "patience": 2}
    result = _localize(rows, tiny[1], tmp_path, tuning=tuning, budget={"keep": 1.0})
    curve = result.dense.curve
    assert len(curve) < 40
    assert result.dense.validation == max(curve)
    assert max(curve) not in curve[-2:]


def test_pairs(tiny: tuple[Store, Backbone], tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 120, seed=1, pairs=True)
    data = {"train": "train.jsonl", "text": ("text1", "text2")}
    golden = [("the film", "good"), ("the film", "bad")]
    result = _localize(
        tmp_path, tiny[1], tmp_path / "w", data=data, golden=golden, budget={"keep": 0.7}
    )
    assert result.overlay.manifest.takes_pairs
    assert result.test == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 500}, "exceed the"),
        (
            {"template": ["{text} {mask}"], "verbalizer": {"good": "zzz", "bad": "bad"}},
            "not one token",
        ),
        ({"template": ["{text} {mask}"], "verbalizer": {"good": "good"}}, "the rows' labels"),
        (
            {"template": ["{text} {mask}"], "verbalizer": {"good": "😀", "bad": "x"}},
            "not one token",
        ),
        ({"template": ["{text} {mask}"], "verbalizer": {"good": "a", "bad": "a"}}, "same word"),
    ],
)
def test_what_does_not_fit_is_named(
    rows: Path,
    tiny: tuple[Store, Backbone],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        _localize(rows, tiny[1], tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "not YAML"),
        ("- a", "a mapping"),
        ("task: mood", "data: Field required"),
        ("task: mood\ndata: {train: x}\nprompt_token: 3", "prompt_token"),
        ("task: mood\ndata: {train: x}\nread: mask", "needs a template"),
        ("task: mood\ndata: {train: x}\ntemplate: ['{text1} {text2}']", "two columns"),
        ("task: mood\ndata: {train: x}\ninject: none", "inject: none leaves"),
        ("task: mood\ndata: {train: x}\ninject: closed_form", "set prompt_tokens to 0"),
        ("task: mood\ndata: {train: x}\ncondense: closed_form", "needs a budget"),
        ("task: mood\ndata: {train: x}\nbudget: {keep: 0.5, margin: 1}", "margin and keep"),
        ("task: mood\ndata: {train: x}\nbudget: {speedup: 0.5}", "budget.speedup"),
        ("task: mood\ndata: {train: x}\nrefit: {rank: 4}", "refit: fits what texts give"),
        ("task: mood\ndata: {train: x}\ngolden: []", "golden"),
        ("task: mood\ndata: {train: x}\nseed: 1\nseed: 2", "'seed' stands twice"),
        ("task: mood\ndata: {train: x}\nseed: 99999999999999999999", "seed"),
        ("task: mood\ndata: {train: x}\ndescription: 2024-13-45", "not YAML"),
        ("task: " + "[" * 5000, "not YAML"),
    ],
)
def test_a_wrong_task_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_task_file(file)


def test_the_command_publishes_and_evaluate_agrees(rows: Path, tmp_path: Path) -> None:
    store, backbone = small_backbone(tmp_path)
    file = tmp_path / "mood.yaml"
    import yaml

    file.write_text(yaml.safe_dump(TASK | {"budget": {"keep": 0.6}}))
    out = io.StringIO()
    result = localize_file(
        file,
        store=store,
        data=rows,
        work_dir=tmp_path / "runs",
        output=tmp_path / "mood.safetensors",
        publish=True,
        device="cpu",
        console=Console(file=out, width=100),
    )
    shown = out.getvalue()
    assert "localized (chosen)" in shown
    assert "Published as version 1 of task mood" in shown
    version, labels, figures = evaluate_file(
        rows / "test.jsonl",
        store=store,
        task="mood",
        version=None,
        text=(),
        label=None,
        device="cpu",
    )
    assert version == 1
    assert labels == ("bad", "good")
    assert figures.accuracy == result.test["localized"].evaluation.accuracy
    assert backbone.fingerprint == store.backbones()[0].fingerprint


def test_a_store_without_backbone_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="add-backbone"):
        runs.open_backbone(Store(tmp_path / "empty"), None)
    assert dataclasses.is_dataclass(Localized)
