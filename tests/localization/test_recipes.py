"""Whole localizations by every kind of recipe, on a task that can be learned."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from localization.config import TaskConfig
from localization.data import load_dataset
from localization.errors import ConfigError
from localization.job import prepare
from localization.pipeline import localize, with_searched_rates
from localization.results import Localized
from localization.runs import localize_file
from model_store import artifact
from model_store.backbone import Backbone
from model_store.store import Store
from tests.localization.synthetic import Silent, write_rows
from tests.overlays import fp32_encoder, small_backbone

TASK: dict[str, Any] = {
    "task": "mood",
    "data": {"train": "train.jsonl", "test": "test.jsonl", "validation_share": 0.2},
    "prompt_tokens": 0,
    "max_tokens": 24,
    "tuning": {"epochs": 8, "condense_epochs": 2, "precision": "fp32", "batch_size": 8},
    "golden": ["the film was good", "bad news"],
}
FREE = {"inject": "closed_form", "condense": "closed_form"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", 240, seed=1)
    write_rows(folder / "test.jsonl", 80, seed=2)
    return folder


def _localize(rows: Path, backbone: Backbone, work: Path, **changes: Any) -> Localized:
    config = TaskConfig.model_validate_json(json.dumps(TASK | changes))
    dataset = load_dataset(config.data, rows, config.seed)
    return localize(config, backbone, dataset, work, "test", "cpu", Silent())


def _holds(result: Localized, backbone: Backbone) -> None:
    """The artifact can be written, read, and gives its golden answers."""
    again = artifact.read(artifact.write(result.overlay), backbone.config, backbone.fingerprint)
    artifact.check_golden(fp32_encoder(backbone), backbone, again)


@pytest.mark.parametrize(
    ("changes", "components"),
    [
        ({"recovery": {}, "budget": {"keep": 0.5}}, {"heads", "scales", "norms", "deltas"}),
        (
            {"recovery": {"rank": 4, "low_rank": 2}, "budget": {"keep": 0.5, "heads": False}},
            {"scales", "norms", "deltas"},
        ),
        (
            {"recovery": {"attention": False}, "budget": {"keep": 0.5}, "refit": {"rank": 4}},
            {"scales", "deltas"},
        ),
        ({"scales": True, "prompt_tokens": 3, "budget": {"keep": 0.5}}, {"scales", "prompt"}),
        ({"recovery": {}, "budget": {"speedup": 1.2}}, {"heads", "scales", "norms", "deltas"}),
    ],
    ids=["recovered", "all heads", "ffn only", "scales", "speedup"],
)
def test_every_recipe_gives_an_overlay_that_holds(
    rows: Path,
    tiny: tuple[Store, Backbone],
    tmp_path: Path,
    changes: dict[str, Any],
    components: set[str],
) -> None:
    result = _localize(rows, tiny[1], tmp_path, **changes)
    manifest = result.overlay.manifest
    assert set(manifest.components) == components | {"ffn_neurons", "head"}
    assert result.network == ("recovered" if "deltas" in components else "localized")
    if "keep" in changes["budget"] and "heads" not in components:
        assert manifest.kept_share <= 0.5
    _holds(result, tiny[1])
    if "recovery" in changes and "deltas" in components:
        assert result.test["dense"].evaluation.accuracy > 0.8


def test_ranks_follow_importance(rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path) -> None:
    recovery = {"rank": 4, "low_rank": 2}
    result = _localize(
        rows, tiny[1], tmp_path, recovery=recovery, budget={"keep": 0.6, "heads": False}
    )
    deltas = result.overlay.manifest.deltas
    assert deltas is not None
    # One layer of three is the most important third.
    assert sorted(deltas.qkv) == [2, 2, 4]
    assert deltas.qkv == deltas.o


@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_without_training_nothing_is_trained(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path, labels: str
) -> None:
    result = _localize(
        rows,
        tiny[1],
        tmp_path,
        **FREE,
        budget={"keep": 0.6, "heads": False},
        refit={"rank": 8},
        attribution={"labels": labels, "rows": 30},
    )
    assert result.dense.curve == ()
    assert result.chosen.tuned.curve == ()
    assert result.trainings == 0
    assert result.test["dense"].evaluation.accuracy > 0.6
    _holds(result, tiny[1])


def test_scores_from_before_training_do_not_lower_what_is_compared_with(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    """With `inject: none` the dense network is trained all the same: the margin is against it."""
    scored = {"attribution": {"score": "magnitude"}, "budget": {"margin": 5.0}}
    before = _localize(rows, tiny[1], tmp_path / "a", inject="none", **scored)
    after = _localize(rows, tiny[1], tmp_path / "b", inject="tune", **scored)
    assert before.dense.curve != ()
    assert before.dense.validation == after.dense.validation > 0.6
    lost = before.dense.validation - before.chosen.tuned.validation
    assert lost < 0.05 + 1e-9 or before.chosen.share == 1.0


def test_a_head_that_is_fitted_again_may_read_an_earlier_layer(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    """Fluctuation, refit and a new head, half of the work: the artifact holds what is kept."""
    changes = FREE | {"refit": {"rank": 4}, "attribution": {"score": "fluctuation"}}
    result = _localize(rows, tiny[1], tmp_path, **changes, budget={"keep": 0.5, "heads": True})
    assert result.trainings == 0
    assert result.overlay.manifest.kept_share < 1
    assert result.overlay.manifest.heads_kept is not None
    _holds(result, tiny[1])


def test_another_score_trains_nothing_again(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    kept = [
        _localize(
            rows, tiny[1], tmp_path, attribution={"score": score}, budget={"keep": 0.5}
        ).chosen.kept.neurons
        for score in ("attribution", "magnitude")
    ]
    assert len(list(tmp_path.glob("inject-*"))) == 1
    assert len(list(tmp_path.glob("quantify-*"))) == 2
    assert any(not a.equal(b) for a, b in zip(*kept, strict=True))


def test_another_number_of_repeats_trains_nothing_again(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    _localize(rows, tiny[1], tmp_path, budget={"keep": 0.5})
    files = {file.name for file in tmp_path.glob("inject-*")}
    _localize(rows, tiny[1], tmp_path, budget={"keep": 0.7}, repeats=2, description="other")
    assert {file.name for file in tmp_path.glob("inject-*")} == files


def test_an_existing_head_is_taken_as_it_is(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    whole = _localize(rows, tiny[1], tmp_path / "a", prompt_tokens=2, budget={"keep": 1.0})
    file = tmp_path / "whole.safetensors"
    file.write_bytes(artifact.write(whole.overlay))
    changes = {"inject": "existing", "existing": str(file), "condense": "none"}
    result = _localize(rows, tiny[1], tmp_path / "b", **changes, budget={"keep": 0.7})
    assert result.overlay.manifest.kept_share <= 0.7
    assert result.test["dense"].evaluation.accuracy == whole.test["localized"].evaluation.accuracy
    _holds(result, tiny[1])
    file.write_bytes(artifact.write(result.overlay))
    with pytest.raises(ConfigError, match="does not keep the whole network"):
        _localize(rows, tiny[1], tmp_path / "c", **changes, budget={"keep": 0.5})
    missing = changes | {"existing": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match="No such file"):
        _localize(rows, tiny[1], tmp_path / "d", **missing, budget={"keep": 0.5})


def test_a_short_search_takes_the_settings_that_are_best(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    search = {"minutes": 5, "factors": [1.0, 1000.0], "prompt_tokens": [0, 2]}
    # The file's own rates are far too small, which a search finds out.
    rates = {"head_learning_rate": 1e-5, "prompt_learning_rate": 1e-5}
    tuning = TASK["tuning"] | rates | {"search": search}
    config = TaskConfig.model_validate_json(json.dumps(TASK | {"tuning": tuning}))
    job = prepare(config, tiny[1], load_dataset(config.data, rows, 0), tmp_path, "cpu", Silent())
    chosen = with_searched_rates(job)
    assert chosen.config.tuning.head_learning_rate == pytest.approx(1e-2)
    assert chosen.key != job.key
    again = with_searched_rates(job)
    assert again.config == chosen.config


def test_repeats_show_mean_and_spread_and_write_a_page(rows: Path, tmp_path: Path) -> None:
    store, _ = small_backbone(tmp_path)
    file = tmp_path / "mood.yaml"
    file.write_text(json.dumps(TASK | {"budget": {"keep": 0.5}, "repeats": 2, "seed": 3}))
    out = io.StringIO()
    for number in (1, 2):
        result = localize_file(
            file,
            store=store,
            data=rows,
            work_dir=tmp_path / "runs",
            output=tmp_path / f"mood{number}.safetensors",
            publish=True,
            device="cpu",
            console=Console(file=out, width=100),
        )
    assert "2 runs with different seeds" in out.getvalue()
    assert result.overlay.manifest.provenance.seed in (3, 4)
    page = (tmp_path / "mood2.html").read_text()
    assert "McNemar" in page
    for score in ("attribution", "taylor", "activation", "magnitude", "random"):
        assert score in page
