"""The quality benchmark's tables and plots, of made-up results."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality_page import (
    BEGIN,
    DASH,
    END,
    markdown,
    number,
    readme_table,
    sheets,
    with_readme_table,
)
from benchmarks.quality_plots import accuracy_plot, plots, speed_plot, ticks_around
from benchmarks.quality_results import collect
from benchmarks.recipes import CAP, MAX_TOKENS, SETS
from tests.quality_parts import MACHINE, collected, write_all, write_part


class TestPage:
    def test_markdown_holds_every_figure_and_how_it_came_about(self, tmp_path: Path) -> None:
        write_all(tmp_path, list(SETS))
        text = markdown(collected(tmp_path, list(SETS)), [("a.svg", "A plot")])
        for expected in (
            "the command",
            "2026-01-02, commit abc1234",
            "A Processor",
            f"{CAP:,} training rows",
            f"imdb {SETS['imdb']['cap']:,}",
            f"{MAX_TOKENS} tokens",
            "![A plot](a.svg)",
            "| rte | 400 | 85.0 | 84.8 | -0.2 | 84.0 | -1.0 | 80.0 | 80.5 | +0.5 |",
            "| cola | Matthews correlation | 50.0 ± 0.0 | 50.5 ± 0.0 | 50.0 ± 0.0 |",
            "| localized against prompt tuning, points | >= 0 | 0.50 | yes | none |",
        ):
            assert expected in text
        for sheet in sheets(collected(tmp_path, list(SETS))):
            assert f"## {sheet.title}" in text

    def test_what_is_missing_is_a_dash(self, tmp_path: Path) -> None:
        write_part(tmp_path, "sst2", "localized")
        results = collect(tmp_path, ["sst2"], {}, "the command", "2026-01-02", MACHINE)
        text = markdown(results, [])
        assert "| sst2 | 400 | - | - | - | - | - | 80.0 | 80.5 | +0.5 |" in text
        assert "| >= 2 | - | open: 1 of 1 sets missing | - |" in text

    def test_every_row_is_as_wide_as_its_head(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["cb", "cola"])
        for sheet in sheets(collected(tmp_path, ["cb", "cola"])):
            assert {len(row) for row in (*sheet.rows, sheet.foot or sheet.head)} == {
                len(sheet.head)
            }
            assert sheet.rich().row_count == len(sheet.rows) + bool(sheet.foot)

    def test_tables_fit_a_terminal_of_120(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_all(tmp_path, list(SETS))
        quality.show(collected(tmp_path, list(SETS)))
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 120
        assert "banking77" in shown
        assert "…" not in shown

    def test_numbers(self) -> None:
        assert number(None) == DASH
        assert number(1.26) == "1.3"
        assert number(1.26, signed=True) == "+1.3"
        assert number(-0.04, signed=True) == "0.0"
        assert number(12.5, 2) == "12.50"

    def test_the_readme_table_has_means_and_costs(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2", "rte"])
        lines = readme_table(collected(tmp_path, ["sst2", "rte"])).splitlines()
        assert lines[0] == "| set | fine-tuning | recovered | fast | prompt tuning | localized |"
        assert lines[2] == "| sst2 | 85.0 | 84.8 | 84.0 | 80.0 | 80.5 |"
        assert lines[4].startswith("| **mean** | **85.0** |")
        assert "| FFN neurons removed, % | - | 60 | 60 | - | 60 |" in lines
        assert "| times as fast as the whole network | - | 1.90 | 1.90 | - | 1.90 |" in lines

    def test_the_readme_keeps_what_stands_around_the_table(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2"])
        results = collected(tmp_path, ["sst2"])
        text = with_readme_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", results)
        assert text == f"before\n{BEGIN}\n{readme_table(results)}\n{END}\nafter\n"
        assert with_readme_table(text, results) == text
        for broken in ("", f"{END} {BEGIN}", BEGIN):
            with pytest.raises(ValueError, match="quality:begin"):
                with_readme_table(broken, results)


class TestPlots:
    def test_each_value_is_a_marker_with_its_words(self, tmp_path: Path) -> None:
        write_all(tmp_path, ["sst2", "rte"])
        results = collected(tmp_path, ["sst2", "rte"])
        tips = _tips(accuracy_plot(results))
        assert len(tips) == 2 * 5
        assert "rte, fast: 84.0 %" in tips
        tips = _tips(speed_plot(results))
        assert len(tips) == 3 * 4
        assert "mean, training-free: 0.5 points lost, 1.90 times as fast" in tips
        assert "sst2, recovered: 0.2 points lost, 2.40 times as fast" in tips

    def test_missing_values_leave_markers_out_and_empty_plots_away(self, tmp_path: Path) -> None:
        write_part(tmp_path, "sst2", "localized")
        results = collect(tmp_path, ["sst2"], {}, "", "", MACHINE)
        assert list(plots(results)) == ["accuracy.svg"]
        assert _tips(accuracy_plot(results)) == [
            "sst2, prompt tuning: 80.0 %",
            "sst2, localized: 80.5 %",
        ]
        assert plots(collect(tmp_path, ["rte"], {}, "", "", MACHINE)) == {}

    def test_ticks_lie_around_all_values(self) -> None:
        for values in ([80.0], [51.2, 99.9], [0.0, -0.01, 3.2], [1.0, 1.0]):
            ticks = ticks_around(values)
            assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
            assert 2 <= len(ticks) <= 9


def _tips(svg: str) -> list[str]:
    """The words of all markers; the SVG must be well-formed and load nothing."""
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    name = "{http://www.w3.org/2000/svg}title"
    return [item.text or "" for item in ET.fromstring(svg).iter(name)]  # noqa: S314 - our own
