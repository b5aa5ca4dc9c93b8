"""The training loop: going on after a kill, batches in parts, full fine-tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localization import tuning
from localization.config import TaskConfig, TuningConfig
from localization.data import load_dataset
from localization.fine_tuning import answers_of, fine_tune
from localization.job import Job, prepare
from localization.network import Examples, Tuned
from localization.pipeline import inject
from localization.stages import StageFiles
from localization.tuning import parts_of, tune
from model_store.backbone import Backbone
from model_store.store import Store
from model_store.tokenization import Encoding
from tests.localization.synthetic import Silent, write_rows

TASK: dict[str, Any] = {
    "task": "mood",
    "data": {"train": "train.jsonl", "test": "test.jsonl", "validation_share": 0.2},
    "prompt_tokens": 2,
    "max_tokens": 24,
    "recovery": {"rank": 2, "low_rank": 1},
    "tuning": {"epochs": 4, "precision": "fp32", "patience": 9},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", 200, seed=1)
    write_rows(folder / "test.jsonl", 60, seed=2)
    return folder


def _job(rows: Path, backbone: Backbone, work: Path, **changes: Any) -> Job:
    config = TaskConfig.model_validate_json(json.dumps(TASK | changes))
    return prepare(config, backbone, load_dataset(config.data, rows, 0), work, "cpu", Silent())


class Killed(Exception):
    """Stands for a kill between two epochs: what was saved stays, the rest is gone."""


class DyingCheckpoint:
    """A stage's checkpoint that kills the training after so many epochs."""

    def __init__(self, files: StageFiles, epochs: int) -> None:
        self._real = files.checkpoint("inject", "key")
        self._left = epochs

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self._real.load()

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        self._real.save(tensors, facts)
        self._left -= 1
        if not self._left:
            raise Killed


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_killed_training_goes_on_as_if_it_had_never_stopped(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path, killed_after: int
) -> None:
    job = _job(rows, tiny[1], tmp_path)
    whole = inject(job)
    begin = Tuned({name: torch.zeros_like(part) for name, part in whole.tensors.items()})
    begin = Tuned({**begin.tensors, "prompt": whole.tensors["prompt"]})

    def run(checkpoint: tuning.Checkpoint | None) -> Tuned:
        return tune(
            job.tuning, begin, None, job.train, job.validation, job.config.tuning,
            4, 0, lambda *_: None, checkpoint=checkpoint,
        )  # fmt: skip

    straight = run(None)
    files = StageFiles(tmp_path / "stages")
    with pytest.raises(Killed):
        run(DyingCheckpoint(files, killed_after))
    went_on = run(files.checkpoint("inject", "key"))
    assert went_on.curve == straight.curve
    assert went_on.tensors.keys() == straight.tensors.keys()
    for name, part in straight.tensors.items():
        assert torch.equal(went_on.tensors[name], part), name


def test_a_finished_stage_leaves_no_checkpoint(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    inject(_job(rows, tiny[1], tmp_path))
    assert [file.name for file in tmp_path.glob("*unfinished*")] == []
    assert len(list(tmp_path.glob("inject-*"))) == 1


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=40))
def test_parts_hold_every_row_once_and_few_enough_tokens(lengths: list[int]) -> None:
    encodings = [Encoding([0] * length, [0] * length, 0) for length in lengths]
    parts = list(parts_of(range(len(lengths)), encodings))
    assert [row for part in parts for row in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(lengths[row] for row in part) <= tuning.TOKENS_AT_ONCE


def test_a_batch_in_parts_trains_as_a_whole_one(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(folder: str) -> Tuned:
        return inject(
            _job(rows, tiny[1], tmp_path / folder, tuning={"epochs": 1, "precision": "fp32"})
        )

    whole = trained("whole")
    monkeypatch.setattr(tuning, "TOKENS_AT_ONCE", 40)
    parted = trained("parts")
    for name, part in whole.tensors.items():
        torch.testing.assert_close(parted.tensors[name], part, atol=2e-4, rtol=1e-3)


def test_nothing_is_trained_where_the_cut_network_is_good_enough(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    job = _job(rows, tiny[1], tmp_path)
    tuned = inject(job)
    from localization.adapters import cut
    from localization.selection import Kept

    every = Kept((torch.arange(tiny[1].config.ffn).int(),) * tiny[1].config.layers)
    begin = Tuned(cut(tuned.tensors, every, tiny[1].config))
    again = tune(
        job.tuning, begin, every, job.train, job.validation, job.config.tuning,
        4, 0, lambda *_: None, enough=tuned.validation - 0.01,
    )  # fmt: skip
    assert again.curve == ()
    assert again.validation == pytest.approx(tuned.validation)
    for name, part in begin.tensors.items():
        assert torch.equal(again.tensors[name], part)


def test_fine_tuning_changes_every_weight_and_learns(
    rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path
) -> None:
    backbone = tiny[1]
    before = {name: tensor.clone() for name, tensor in backbone.tensors.items()}
    job = _job(rows, backbone, tmp_path, recovery=None)
    config = TuningConfig(epochs=6, precision="fp32", batch_size=8, patience=9)
    tuned = fine_tune(job, config, 3e-3, 0)
    for name in ("layers.0.qkv.weight", "layers.2.ffn_out.bias", "embeddings.norm.weight"):
        assert not torch.equal(tuned.tensors[f"backbone.{name}"], before[name]), name
        assert torch.equal(backbone.tensors[name], before[name]), "the store's backbone is frozen"
    answers = answers_of(job, tuned, job.examples(job.dataset.test))
    assert answers.evaluation.accuracy > 0.8
    assert answers.evaluation.rows == 60


def test_examples_have_a_length(rows: Path, tiny: tuple[Store, Backbone], tmp_path: Path) -> None:
    job = _job(rows, tiny[1], tmp_path)
    assert len(job.train) == 160
    assert len(Examples(job.train.encodings[:3], job.train.classes[:3])) == 3
