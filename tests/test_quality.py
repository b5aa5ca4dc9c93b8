"""The quality benchmark on made-up parts: what it collects, its targets, and the command."""

import json
import signal
from pathlib import Path

import pytest

from benchmarks import machine, quality
from benchmarks.quality_page import BEGIN, END, markdown, readme_table
from benchmarks.quality_parts import part_file
from benchmarks.quality_plots import plots
from benchmarks.quality_pool import Ended
from benchmarks.quality_results import TARGETS, PartError, Results
from benchmarks.recipes import SEARCHED, SEEDS, SETS
from tests.quality_parts import collected, write_all, write_part

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "results"


class TestCollecting:
    def test_a_set_with_one_seed_has_its_figures_and_no_deviation(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2"])
        results = collected(tmp_path, ["sst2"])
        row = results["tasks"]["sst2"]
        assert row["dense"] == 80.0
        assert row["localized_minus_dense"] == 0.5
        assert row["recovered_minus_fine_tuned"] == -0.25
        assert row["fast_minus_fine_tuned"] == -1.0
        assert row["attribution_minus_random"] == 7.0
        assert row["training_free_loss"] == 0.5
        assert row["search_time"] is None, "only some sets are searched"
        assert row["fast_kilobytes"] == 300.4
        assert row["recovered_heads_removed"] == 25.0
        assert row["rows"] == 400
        assert row["localized_speedup_over_prompt"] == 2.4
        assert results["deviations"]["sst2"] == {}

    def test_searched_sets_have_their_time(self, tmp_path: Path) -> None:
        for name in SEARCHED:
            write_all(tmp_path, [name])
            assert collected(tmp_path, [name])["tasks"][name]["search_time"] == 1.25

    def test_seeds_give_mean_and_sample_deviation(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["cb"])
        for seed, value in enumerate((70.0, 72.0, 77.0)):
            write_part(tmp_path, "cb", "localized", seed, result=value)
        results = collected(tmp_path, ["cb"])
        assert SEEDS["cb"] == 3
        assert results["tasks"]["cb"]["localized"] == 73.0
        assert results["deviations"]["cb"]["localized"] == pytest.approx(3.606)
        assert results["tasks"]["cb"]["localized_minus_dense"] == -7.0
        assert results["deviations"]["cb"]["localized_minus_dense"] == pytest.approx(3.606)

    def test_a_difference_is_of_seeds_that_have_both_sides(self, tmp_path: Path) -> None:
        write_part(tmp_path, "trec6", "recovered", 0, result=90.0)
        write_part(tmp_path, "trec6", "recovered", 1, result=96.0)
        write_part(tmp_path, "trec6", "fine_tuned", 1, result=95.0)
        row = collected(tmp_path, ["trec6"])["tasks"]["trec6"]
        assert (row["recovered"], row["fine_tuned"]) == (93.0, 95.0)
        assert row["recovered_minus_fine_tuned"] == 1.0

    def test_other_metrics_are_of_their_sets_alone(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["cola", "sms_spam", "sst2"])
        tasks = collected(tmp_path, ["cola", "sms_spam", "sst2"])["tasks"]
        assert tasks["cola"]["localized_matthews"] == 50.5
        assert tasks["cola"]["dense_matthews"] == 50.0
        assert tasks["sms_spam"]["fine_tuned_macro_f1"] == 84.0
        assert not [measure for measure in tasks["sst2"] if "f1" in measure or "matth" in measure]

    def test_means_are_over_the_sets_that_have_the_measure(self, tmp_path: Path) -> None:
        write_part(tmp_path, "sst2", "localized", dense=80.0)
        write_part(tmp_path, "agnews", "localized", dense=90.0)
        results = collected(tmp_path, ["agnews", "sst2", "rte"])
        assert results["means"]["dense"] == 85.0
        assert results["means"]["fine_tuned"] is None
        assert results["tasks"]["rte"]["dense"] is None
        assert results["incomplete"]["localized_minus_dense"] == ["rte"]

    @pytest.mark.parametrize("text", ['{"dense": 1', "[]", '{"dense": 80.0}', '{"dense": null}'])
    def test_a_damaged_part_is_named(self, tmp_path: Path, text: str) -> None:
        write_all(tmp_path, ["sst2"])
        part_file(tmp_path, "sst2", "localized", 0).write_text(text)
        with pytest.raises(PartError, match=r"sst2-localized-0\.json: no.*remove it"):
            collected(tmp_path, ["sst2"])


class TestTargets:
    def test_all_are_met_where_all_parts_are_at_them(self, tmp_path: Path) -> None:
        write_all(tmp_path, list(SETS))
        results = collected(tmp_path, list(SETS))
        assert {name: met for name, (_, _, met) in results["targets"].items()} == {
            target.measure: True for target in TARGETS
        }
        assert results["targets"]["fast_minus_fine_tuned"] == (-1.0, -1.0, True)
        assert not any(results["below"].values())

    def test_one_point_too_few_misses(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2", "rte"])
        write_part(tmp_path, "rte", "fast", result=83.9)
        write_part(tmp_path, "rte", "search", search_time=2.0)
        results = collected(tmp_path, ["sst2", "rte"], rte={"server_labels_equal": 99.5})
        targets = results["targets"]
        assert targets["fast_minus_fine_tuned"] == (-1.0, -1.05, False)
        assert targets["search_time"] == (1.5, 2.0, False)
        assert targets["server_labels_equal"] == (100.0, 99.75, False)
        assert targets["recovered_minus_fine_tuned"][2]

    def test_a_set_far_below_is_listed(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2", "rte", "mrpc"])
        write_part(tmp_path, "rte", "recovered", result=82.4)  # 2.6 below fine-tuning
        write_part(tmp_path, "mrpc", "recovered", result=82.5)  # 2.5: two points below -0.5
        write_part(tmp_path, "sst2", "training_free", result=75.0)
        below = collected(tmp_path, ["sst2", "rte", "mrpc"])["below"]
        assert below["recovered_minus_fine_tuned"] == {"rte": -2.6}
        assert below["training_free_loss"] == {"sst2": 3.5}
        assert below["localized_minus_dense"] == {}

    def test_what_is_not_complete_is_not_met(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2"])
        results = collected(tmp_path, ["sst2", "rte"])
        assert results["targets"]["localized_minus_dense"] == (0.0, 0.5, False)
        assert collected(tmp_path, ["rte"])["targets"]["search_time"] == (1.5, None, False)

    def test_a_set_that_is_not_searched_does_not_lack_its_search(self, tmp_path: Path) -> None:
        other = next(name for name in SETS if name not in SEARCHED)
        write_all(tmp_path, [SEARCHED[0], other])
        results = collected(tmp_path, [SEARCHED[0], other])
        assert results["tasks"][other]["search_time"] is None
        assert results["targets"]["search_time"] == (1.5, 1.25, True)
        assert collected(tmp_path / "empty", list(SETS))["incomplete"]["search_time"] == [
            name for name in SETS if name in SEARCHED
        ]


class TestCommand:
    def test_collecting_writes_everything_and_ends_with_the_json(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_all(tmp_path / "work", ["sst2", "cb"])
        readme = tmp_path / "README.md"
        readme.write_text(f"# A project\n{BEGIN}\n{END}\n")
        words = ["--collect-only", "--work", str(tmp_path / "work"), "--sets", "sst2,cb"]
        words += ["--out", str(tmp_path / "out"), "--readme", str(readme)]
        assert _main(words) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert line == json.loads((tmp_path / "out" / "quality.json").read_text())
        assert list(line["tasks"]) == ["sst2", "cb"]
        assert line["targets"]["search_time"] == [1.5, None, False], "neither set is searched"
        assert line["targets"]["fast_speedup_over_prompt"] == [2.0, None, False]
        assert line["means"]["fine_tuned"] == 85.0
        assert line["machine"] == machine.facts()
        assert "--sets sst2,cb" in (tmp_path / "out" / "quality.md").read_text()
        assert (tmp_path / "out" / "accuracy.svg").is_file()
        assert readme_table(line) in readme.read_text()

    def test_a_readme_without_a_place_is_an_error_and_nothing_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "README.md").write_text("# A project\n")
        words = ["--collect-only", "--work", str(tmp_path), "--out", str(tmp_path / "out")]
        assert _main([*words, "--readme", str(tmp_path / "README.md")]) == 1
        assert "no table to write" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--sets", "sst3"], "no set 'sst3'; there are agnews"),
            ([], "--data is needed to compute parts"),
            (["--jobs", "0", "--collect-only"], "--jobs 0: at least 1"),
            (["--collect-only", "--measure-again"], "--measure-again needs --data"),
        ],
    )
    def test_wrong_arguments_are_named(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            _main(["--out", "nowhere", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_a_set_that_the_data_lack_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "sst2").mkdir()
        for file in ("train.jsonl", "test.jsonl"):
            (tmp_path / "sst2" / file).touch()
        assert quality.lacking(tmp_path, ["sst2"]) is None
        with pytest.raises(SystemExit):
            _main(["--data", str(tmp_path), "--out", "nowhere", "--sets", "sst2,rte"])
        assert "--data lacks set 'rte'" in capsys.readouterr().err

    def test_failed_parts_are_reported_and_the_rest_is_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "sst2").mkdir()
        for file in ("train.jsonl", "test.jsonl"):
            (tmp_path / "sst2" / file).touch()
        failed = [Ended("sst2-fast-0", 1.0, "DataError: a row [bad] is odd")]
        monkeypatch.setattr(quality, "run_parts", lambda *given: failed)
        monkeypatch.setattr(quality, "add_backbone", lambda store: None)
        words = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--sets", "sst2"]
        assert _main([*words, "--out", str(tmp_path / "out")]) == 1
        heard = capsys.readouterr()
        assert "sst2-fast-0 failed: DataError: a row [bad] is odd" in heard.err
        assert json.loads(heard.out.splitlines()[-1])["tasks"]["sst2"]["fast"] is None
        assert (tmp_path / "out" / "quality.md").is_file()


def _main(words: list[str]) -> int:
    """The command, with this process's signal handlers put back."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        return quality.main(words)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


class TestCommitted:
    """What stands in `docs/results` and in the README is what `quality.json` says."""

    def results(self) -> Results:
        if not (DOCS / "quality.json").is_file():
            pytest.skip("docs/results/quality.json has not been made")
        found: Results = json.loads((DOCS / "quality.json").read_text())
        return found

    def test_the_readme_table(self) -> None:
        results, text = self.results(), (ROOT / "README.md").read_text()
        if BEGIN not in text:
            pytest.skip(f"README.md has no {BEGIN}")
        assert text.partition(BEGIN)[2].partition(END)[0].strip() == readme_table(results)

    def test_page_and_plots(self) -> None:
        results = self.results()
        drawn = plots(results)
        for name, (_, svg) in drawn.items():
            assert (DOCS / name).read_text() == svg
        shown = [(name, caption) for name, (caption, _) in drawn.items()]
        assert (DOCS / "quality.md").read_text() == markdown(results, shown)
