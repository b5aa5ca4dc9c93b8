"""The ablation benchmark on a tiny backbone and two small sets: every part, table and file."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation, ablation_bench
from benchmarks.ablation import PARTS, Part, compute, introduction, run, write
from benchmarks.ablation_bench import Bench, Figures, Grid
from benchmarks.ablation_deltas import variants
from benchmarks.ablation_free import rescaled, scale_changes
from benchmarks.ablation_parts import OURS, SCORES, localized
from benchmarks.ablation_tables import Sheet, by_kind, sheets
from localization.errors import DataError
from localization.modules import PARTS as MODULES
from localization.selection import Kept
from model_store.backbone import load_backbone
from tests.localization.synthetic import write_rows
from tests.overlays import small_backbone

GRID = Grid(
    keeps=(1.0, 0.5),
    low_keep=0.5,
    half_keep=0.5,
    module_keep=0.7,
    row_counts=(1, 5),
    few_rows=4,
    random_seeds=2,
    ranks=(2,),
    refit_rank=2,
    refit_tokens=200,
    cap=80,
    max_tokens=16,
    epochs=2,
    condense_epochs=1,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone of 64 neurons a layer, and rows of two sets with the same labels."""
    folder = tmp_path_factory.mktemp("ablation")
    small_backbone(folder, intermediate_size=64, num_hidden_layers=2)
    for seed, name in enumerate(("sst2", "imdb")):
        (folder / "data" / name).mkdir(parents=True)
        write_rows(folder / "data" / name / "train.jsonl", 100, seed=2 * seed)
        write_rows(folder / "data" / name / "test.jsonl", 40, seed=2 * seed + 1)
    return folder


@pytest.fixture(scope="module")
def backbone(place: Path) -> Path:
    (path,) = (place / "store" / "backbones").iterdir()
    return path


@pytest.fixture(scope="module")
def results(place: Path, backbone: Path) -> dict[str, dict[str, Figures]]:
    """Every part on one set, computed here; one thread, as in the processes of `run`."""
    asked = [Part("sst2", part, backbone, place / "data", place / "work", GRID) for part in PARTS]
    return {"sst2": {part.part: compute(part)[2] for part in asked}}


@pytest.fixture
def bench(place: Path, backbone: Path) -> Bench:
    return Bench("sst2", load_backbone(backbone, "tiny"), place / "data", place / "work", GRID)


def _numbers(figures: Any) -> Iterator[float]:
    if isinstance(figures, dict):
        for value in figures.values():
            yield from _numbers(value)
    elif isinstance(figures, list):
        for value in figures:
            yield from _numbers(value)
    else:
        yield figures


def test_every_part_has_all_its_figures(results: dict[str, dict[str, Figures]]) -> None:
    found = results["sst2"]
    assert list(found) == list(PARTS)
    assert set(found["scores"]) == {*SCORES, "random 0", "random 1"}
    assert set(found["modules"]) == set(MODULES)
    assert set(found["scope"]) == {"global", "layer"}
    assert set(found["deltas"]) == {"none: a prompt and scales", *variants(GRID.ranks)}
    assert all(torch.isfinite(torch.tensor(list(_numbers(found)))))


def test_keeping_everything_gives_the_whole_network(
    results: dict[str, dict[str, Figures]],
) -> None:
    found = results["sst2"]
    assert {row["1.0"] for row in found["scores"].values()} == {found["base"]["dense"]}
    assert found["base"]["test_rows"] == 40


def test_parts_agree_where_they_measure_the_same(results: dict[str, dict[str, Figures]]) -> None:
    found = results["sst2"]
    same = found["scope"]["global"]["0.5"]
    assert found["scores"][OURS]["0.5"] == same["before"]
    assert found["scores"][OURS]["after"] == same["after"]
    assert found["deltas"]["none: a prompt and scales"]["after"] == same["after"]
    assert found["injection"]["with"]["before"] == same["before"]
    assert (
        found["domains"]["sst2"]["own rows"]["refit"] == found["training_free"]["labelled"]["refit"]
    )


def test_curves_begin_before_the_first_epoch(results: dict[str, dict[str, Figures]]) -> None:
    for row in results["sst2"]["injection"].values():
        assert len(row["curve"]) == GRID.epochs + 1


def test_modules_lose_what_was_asked(results: dict[str, dict[str, Figures]]) -> None:
    for row in results["sst2"]["modules"].values():
        assert row["pruned"] == pytest.approx(30, abs=0.5)


def test_ranks_have_the_weights_of_their_size(results: dict[str, dict[str, Figures]]) -> None:
    by_name = {name: row["parameters"] for name, row in results["sst2"]["deltas"].items()}
    # Four maps of 32 x 32, and two of 32 x (kept neurons, 64 in both layers together), rank 2.
    assert by_name["rank 2"] == 2 * (2 * 4 * (32 + 32) + 2 * 2 * 32 + 2 * 64)
    assert by_name["rank 8, FFN alone"] < by_name["rank 8, without norms"]
    assert by_name["rank 8 in the top third, 4 elsewhere"] < by_name["rank 8, without norms"]


def test_a_finished_figure_is_not_computed_again(
    results: dict[str, dict[str, Figures]],
    place: Path,
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("computed again")

    for name in ("tune", "score_units", "predict"):
        monkeypatch.setattr(ablation_bench, name, never)
    for part in PARTS:
        asked = Part("sst2", part, backbone, place / "data", place / "work", GRID)
        assert compute(asked) == ("sst2", part, results["sst2"][part])


def test_another_setting_is_another_figure(bench: Bench) -> None:
    subject, other = bench.subject("localized"), bench.subject("localized", seed=1)
    assert bench.cell(subject, "a figure", lambda: {"value": 1.0}) == {"value": 1.0}
    assert bench.cell(subject, "a figure", lambda: {"value": 2.0}) == {"value": 1.0}
    assert bench.cell(other, "a figure", lambda: {"value": 2.0}) == {"value": 2.0}
    assert bench.cell(subject, "a-figure", lambda: {"value": 3.0}) == {"value": 3.0}


def test_files_and_tables(
    results: dict[str, dict[str, Figures]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = write(results, GRID, tmp_path)
    assert json.loads((tmp_path / "ablation.json").read_text()) == json.loads(json.dumps(record))
    page = (tmp_path / "ablation.md").read_text()
    shown = capsys.readouterr().out
    tables = sheets(results, GRID)
    assert len(tables) == len(PARTS) - 1  # the whole network stands in every table
    for sheet in tables:
        assert f"## {sheet.title}\n" in page
        assert sheet.title in shown
        assert {len(row) for row in sheet.rows} == {len(sheet.head)}
    drawings = sorted(tmp_path.glob("*.svg"))
    # An ellipsis would stand where a line's name was too long to tell it from the others.
    assert not any("\u2026" in drawing.read_text() for drawing in drawings)
    assert len(drawings) == 4
    for drawing in drawings:
        assert ET.parse(drawing).getroot().tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
        assert f"({drawing.name})" in page
    assert "sst2 40" in introduction(results, GRID)


def test_a_table_in_markdown() -> None:
    sheet = Sheet("Title", "Note.", ("set", "kind", "a"), [("x", "y", "1.0")])
    assert sheet.markdown().splitlines()[4:] == [
        "| set | kind | a |",
        "| --- | --- | ---: |",
        "| x | y | 1.0 |",
    ]


def test_random_seeds_are_one_row() -> None:
    figures = {"a": {"0.5": 1.0}, "random 0": {"0.5": 2.0}, "random 1": {"0.5": 4.0}}
    assert by_kind(figures) == {"a": {"0.5": 1.0}, "random, mean of 2": {"0.5": 3.0}}


def test_scales_are_the_least_squares_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    true = torch.tensor([0.5, -0.2, 0.0, 2.0, 1.0], dtype=torch.float64)
    found = scale_changes(h, weight, (h * true) @ weight)
    torch.testing.assert_close(found, true, atol=0.02, rtol=0.02)


def test_scales_change_nothing_where_nothing_is_removed(bench: Bench) -> None:
    subject, dense = localized(bench)
    rows = subject.job.train.encodings[:20]
    whole = rescaled(subject.job.exact, dense, subject.everything, rows)
    for tensor in whole.values():
        torch.testing.assert_close(tensor, torch.ones(64), atol=1e-4, rtol=0)
    half = Kept((torch.arange(0, 64, 2, dtype=torch.int32),) * 2)
    changed = rescaled(subject.job.exact, dense, half, rows)
    assert {name: len(tensor) for name, tensor in changed.items()} == {
        "ffn.0.scale": 32,
        "ffn.1.scale": 32,
    }


def test_parts_in_processes_of_their_own(
    place: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {part: PARTS[part] for part in ("base", "rows")}
    monkeypatch.setattr(ablation, "PARTS", some)
    found = run(backbone, place / "data", place / "pool", ["sst2"], GRID, 2)
    assert list(found["sst2"]) == list(some)
    assert found["sst2"]["base"]["test_rows"] == 40


def test_what_goes_wrong_in_a_process_is_told(place: Path, backbone: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        run(backbone, place / "nowhere", place / "pool", ["sst2"], GRID, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "sst3"], "no data set 'sst3'"),
        (["--sets", "trec6"], "train.jsonl is missing"),
        (["--sets", "sst2", "--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["ablation", "--data", str(place / "data"), "--out", str(place / "out"), *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        ablation.main()
    assert message in capsys.readouterr().err
