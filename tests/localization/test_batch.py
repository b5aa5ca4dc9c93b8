"""Many task files one after another, and the view of many at once."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from localization import board
from localization.batch import (
    TABLE_HEADS,
    Assignment,
    Figures,
    Outcome,
    localize_assignment,
    read_assignments,
    table_rows,
)
from localization.board import Board, News, Sender
from localization.errors import ConfigError
from model_store.manifest import read_header
from model_store.store import Store
from tests.cli.command_page import as_promised
from tests.cli.running import run
from tests.localization.synthetic import Silent

TASK: dict[str, Any] = {
    "data": {"train": "train.jsonl", "test": "test.jsonl"},
    "prompt_tokens": 2,
    "max_tokens": 24,
    "tuning": {"epochs": 2, "head_learning_rate": 0.05, "precision": "fp32"},
    "budget": {"keep": 0.5},
}


def write_task(folder: Path, name: str, **changes: Any) -> Path:
    """A task file for the rows of `folder`, named after its task."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"task": name} | TASK | changes))
    return file


def assignments_of(place: Path, *files: Path) -> tuple[list[Assignment], list[Outcome]]:
    return read_assignments(
        files,
        store=Store(Path("store")),
        data=None,
        work_dir=None,
        output=None,
        publish=True,
        device="cpu",
    )


class TestInTurn:
    def test_a_failed_task_does_not_stop_the_others(self, place: Path) -> None:
        write_task(place, "one")
        write_task(place, "absent", data={"train": "absent.jsonl"})
        (place / "broken.yaml").write_text("task: [")
        write_task(place, "two", seed=3)
        files = ["one.yaml", "absent.yaml", "broken.yaml", "two.yaml"]
        result = run("localize", *files)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == (
            "Error: 2 of 4 tasks failed: absent.yaml, broken.yaml"
        )
        assert "Traceback" not in result.output
        assert sorted(Store(place / "store").tasks()) == ["one", "two"]
        lines = result.stdout.splitlines()
        (reason,) = (line for line in lines if line.startswith("absent.yaml: failed: "))
        assert reason.endswith("absent.jsonl: no such file")
        assert any(line.startswith("broken.yaml: failed: not YAML") for line in lines)
        table = lines[[line.split() for line in lines].index(" ".join(TABLE_HEADS).split()) :]
        order = [line.split()[0] for line in table if line[2:3].isalpha()]
        assert order == ["task", "one", "absent", "broken.yaml", "two"]
        assert [line.split()[-1] for line in table if "two" in line] == ["done"]

    def test_json_says_how_each_ended(self, place: Path) -> None:
        result = run("localize", write_task(place, "one"), "absent.yaml", "--json")
        assert result.exit_code == 1
        good, bad = json.loads(result.stdout)
        as_promised("localize", json.dumps([good]))
        assert (good["failure"], good["version"]) == (None, 1)
        assert Path(good["artifact"]).stat().st_size == good["bytes"]
        assert Path(good["report"]).is_file()
        assert bad.keys() == {"file", "task", "failure"}
        assert "absent.yaml" in result.stderr
        # Its stages are finished, so that it takes no time.
        (alone,) = as_promised("localize", run("localize", "one.yaml", "--json").stdout)
        assert (alone["task"], alone["accuracy"]) == ("one", good["accuracy"])

    def test_all_good_is_a_success(self, place: Path) -> None:
        result = run("localize", write_task(place, "one"), write_task(place, "two"), "--no-publish")
        assert result.exit_code == 0, result.output
        assert Store(place / "store").tasks() == {}
        assert (place / "runs" / "two" / "two.safetensors").is_file()


class TestAssignments:
    def test_a_task_in_two_files_is_refused_before_anything_starts(self, place: Path) -> None:
        one = write_task(place, "one")
        again = place / "again.yaml"
        again.write_text(one.read_text())
        with pytest.raises(ConfigError, match=r"'one' stands in 2 task files .*again\.yaml"):
            assignments_of(place, one, write_task(place, "two"), again)
        assert not (place / "runs").exists()

    def test_paths_hold_in_another_folder(self, place: Path) -> None:
        write_task(place, "one")
        [assignment], failed = assignments_of(place, Path("one.yaml"))
        assert failed == []
        assert assignment.file == Path("one.yaml")
        assert (assignment.path, assignment.work_dir) == (place / "one.yaml", place / "runs")
        assert assignment.store.root == place / "store"
        assert assignment.output == place / "runs" / "one" / "one.safetensors"

    def test_a_backbone_that_is_not_there_fails_its_file_alone(self, place: Path) -> None:
        good, bad = write_task(place, "one"), write_task(place, "two", backbone="absent")
        assignments, [failed] = assignments_of(place, bad, good)
        assert [assignment.task for assignment in assignments] == ["one"]
        assert failed.file == bad
        assert "no backbone 'absent'" in failed.failure

    def test_the_figures_are_those_of_the_artifact(self, place: Path) -> None:
        [assignment], _ = assignments_of(place, write_task(place, "one"))
        outcome = localize_assignment(assignment, Console(file=io.StringIO()), Silent())
        assert outcome.figures is not None
        info, data = Store(place / "store").read("one")
        manifest, _ = read_header(data)
        assert outcome.figures.bytes == info.bytes
        assert outcome.figures.kept == manifest.kept_share < 1
        for split in ("validation", "test"):
            accuracies = {
                item.network: item.value
                for item in manifest.metrics
                if (item.split, item.metric) == (split, "accuracy")
            }
            dense, final = getattr(outcome.figures, split)
            assert accuracies.pop("dense") == dense
            assert list(accuracies.values()) == [final]

    def test_a_fault_of_ours_is_one_line_too(
        self, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fault(*_: object, **__: object) -> None:
            raise TypeError("not\nthis")

        monkeypatch.setattr("localization.runs.localize_file", fault)
        [assignment], _ = assignments_of(place, write_task(place, "one"))
        outcome = localize_assignment(assignment, Console(file=io.StringIO()))
        assert outcome.failure == "TypeError: not this; run this file alone to see where"


def test_the_table_has_a_cell_for_every_head() -> None:
    place = Path("runs/a/a.safetensors")
    figures = Figures(0.4, (0.9, 0.891), (None, None), 43_210, 90, place, 3)
    done = Outcome(Path("a.yaml"), "a", figures)
    failed = Outcome(Path("b.yaml"), "b", failure="because")
    rows = list(table_rows([done, failed]))
    assert {len(row) for row in rows} == {len(TABLE_HEADS)}
    assert rows[0] == ("a", "40", "90.0 / 89.1", "- / -", "43", "1.5", "done")
    assert rows[1][-1] == "failed: because"


class TestSender:
    def test_progress_is_sent_a_few_times_a_second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        sent: list[News] = []
        sender = Sender("one", sent.append)
        update = sender.step("inject")
        for done in range(1000):
            now[0] += 0.01
            update(done, 1000, "epoch 1")
        sender.note("so far")
        progress = [news for news in sent if news.total]
        assert 20 < len(progress) <= 10 / board.PAUSE_S
        assert [news.step for news in sent if not news.total] == ["reading", "inject", "inject"]
        assert sent[-1].note == "so far"


def shown(tasks: list[str], terminal: bool, height: int = 20) -> tuple[Board, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, width=100, height=height, force_terminal=terminal, color_system=None
    )
    return Board(console, tasks), out


class TestBoard:
    def test_without_a_terminal_a_line_for_each_step(self) -> None:
        view, out = shown(["one", "two"], terminal=False)
        with view:
            for done in range(5):
                view.show(News("one", "inject", done, 5))
            view.show(News("two", "inject"))
            view.show(News("one", "inject", note="inject: [90 %]"))
            view.show(News("one", "quantify"))
            view.end(Outcome(Path("two.yaml"), "two", failure="[b]no rows"))
            view.end(Outcome(Path("one.yaml"), "one"))
        assert out.getvalue().splitlines() == [
            *("one: inject", "two: inject", "one: inject: [90 %]", "one: quantify"),
            *("two.yaml: failed: [b]no rows", "one: done"),
        ]

    def test_on_a_terminal_a_bar_for_each_task(self) -> None:
        view, out = shown(["one", "two", "three"], terminal=True)
        with view:
            view.show(News("one", "inject", 3, 5, "epoch [2]"))
            view.show(News("two", "inject"))
            view.end(Outcome(Path("two.yaml"), "two", failure="no rows"))
            view.show(News("one", "quantify", 1, 5, "rows [7]"))
        text = out.getvalue()
        assert "two.yaml: failed: no rows" in text
        last = text[text.rindex("one") :].replace("\x1b[2K", "").split("\n")
        assert "quantify" in last[0]
        assert "rows [7]" in last[0]
        assert "failed" in last[1]
        assert "waiting" in last[2]

    def test_more_tasks_than_lines_leave_room_for_those_that_run(self) -> None:
        tasks = [f"task{number}" for number in range(30)]
        view, out = shown(tasks, terminal=True, height=10)
        with view:
            view.show(News("task28", "inject"))
            view.show(News("task29", "inject"))
            view.end(Outcome(Path("task28.yaml"), "task28"))
        text = out.getvalue()
        assert "task28: done" in text
        assert "task29" in text[text.rindex("task28: done") :]
        assert "task0" not in text
