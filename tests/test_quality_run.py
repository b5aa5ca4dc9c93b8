"""How the quality benchmark computes its parts, and measures what they made. Nothing is trained."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import machine, quality_measured
from benchmarks.quality_measured import Meter, labels_equal, measure
from benchmarks.quality_parts import PARTS, all_parts
from benchmarks.quality_pool import Ended, Work, run
from benchmarks.quality_results import MEASURED, OVERLAYS
from benchmarks.quality_run import parts_of, seconds_left, waits_for
from localization.data import Rows
from model_store.manifest import TextInput
from tests.overlays import random_artifact, small_backbone
from tests.quality_parts import MACHINE, SPEEDS, write_part

ROOT = Path(__file__).parents[1]


class TestRunning:
    def test_longest_first_and_only_the_sets_that_are_asked_for(self) -> None:
        parts = parts_of(["trec6", "imdb"])
        assert parts[0][0] == "imdb"
        assert {part[0] for part in parts} == {"trec6", "imdb"}
        assert set(parts) <= set(all_parts())
        assert {part[1] for part in parts} == set(PARTS)

    def test_who_shares_a_training_waits_for_it(self) -> None:
        assert waits_for(("cb", "search", 0)) == ("cb", "localized", 0)
        assert waits_for(("cb", "chance", 2)) == ("cb", "localized", 2)
        assert waits_for(("cb", "fine_tuned", 2)) == ("cb", "fine_tuned", 0)
        assert waits_for(("cb", "fine_tuned", 0)) is None
        assert waits_for(("cb", "recovered", 1)) is None

    def test_time_left_is_by_what_is_done_of_the_same_kind(self, tmp_path: Path) -> None:
        parts = [("sst2", part, 0) for part in ("localized", "chance")]
        parts += [("rte", part, 0) for part in ("localized", "search")]
        assert seconds_left(tmp_path, parts, parts, 2) is None
        write_part(tmp_path, "sst2", "localized", seconds=100.0)
        write_part(tmp_path, "sst2", "chance", seconds=20.0)
        # A localized like the other one, and a search like any part.
        assert seconds_left(tmp_path, parts, parts[2:], 2) == (100.0 + 60.0) / 2

    def test_commands_run_with_one_thread_and_failures_are_told(self, tmp_path: Path) -> None:
        say = "import os, sys; print(os.environ['OMP_NUM_THREADS']); os.stat(sys.argv[1])"
        good, bad = tmp_path / "good", tmp_path / "bad"
        good.touch()
        works = [
            Work("bad", ("-c", say, str(bad))),
            Work("good", ("-c", say, str(good)), after="bad"),
            Work("killed", ("-c", "import os; os.kill(os.getpid(), 9)"), after="absent"),
        ]
        heard: list[Ended] = []
        seen: list[list[str]] = []

        def tell(running: Sequence[str], ended: Ended | None) -> None:
            seen.append(list(running))
            if ended is not None:
                heard.append(ended)

        ended = run(works, 2, tmp_path / "logs", tell)
        assert heard == ended
        errors = {one.name: one.error for one in ended}
        assert errors["good"] == ""
        assert errors["bad"].startswith("FileNotFoundError:")
        assert errors["killed"] == "ended by signal 9"
        assert (tmp_path / "logs" / "bad.log").read_text().startswith("1\n")
        assert not (tmp_path / "logs" / "good.log").exists()
        assert max(map(len, seen)) == 2
        assert not any({"good", "bad"} <= set(names) for names in seen)

    def test_whatever_ends_the_run_ends_the_commands(self, tmp_path: Path) -> None:
        script = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()))"
        works = [
            Work(name, ("-c", f"{script}; time.sleep(600)", str(tmp_path / name)))
            for name in ("one", "two")
        ]

        def tell(running: Sequence[str], ended: Ended | None) -> None:
            files = [tmp_path / name for name in ("one", "two")]
            if all(file.exists() and file.read_text() for file in files):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(works, 2, tmp_path / "logs", tell)
        for name in ("one", "two"):
            with pytest.raises(ProcessLookupError):
                os.kill(int((tmp_path / name).read_text()), 0)

    def test_a_worker_ends_with_the_process_that_started_it(self, tmp_path: Path) -> None:
        command = [
            sys.executable,
            "-c",
            "from benchmarks.quality_worker import _end_with_the_starter as end; end()",
        ]
        worker = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)
        assert worker.stdin is not None
        assert worker.poll() is None
        worker.stdin.close()
        assert worker.wait() == 1


class TestMeasuring:
    def test_an_overlay_is_timed_and_the_server_gives_its_labels(self, tmp_path: Path) -> None:
        store, backbone = small_backbone(tmp_path)
        texts: tuple[TextInput, ...] = tuple(f"the film was good {'very ' * n}" for n in range(40))
        pairs: tuple[TextInput, ...] = tuple((f"a cat {n}", "the dog") for n in range(20))
        contents = {
            "mood": random_artifact(backbone, "mood", keep=0.2),
            "same": random_artifact(backbone, "same", pairs=True, labels=("no", "yes")),
        }
        rows = {
            "mood": Rows(texts, ("good",) * len(texts)),
            "same": Rows(pairs, ("no",) * len(pairs)),
        }
        speeds = Meter(backbone).speeds(contents["mood"], rows["mood"])
        assert set(speeds) == {"speedup", "speedup_over_prompt"}
        assert min(speeds.values()) > 0
        equal = labels_equal(store, backbone, contents, rows)
        assert set(equal) == {"mood", "same"}
        assert min(equal.values()) >= 95

    def test_what_was_measured_is_kept_under_the_overlays_digest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for part in OVERLAYS:
            file = tmp_path / "overlays" / part / "sst2-0.safetensors"
            file.parent.mkdir(parents=True)
            file.write_bytes(part.encode())
        taken: list[str] = []

        class Fake:
            def __init__(self, backbone: object) -> None:
                pass

            def speeds(self, content: bytes, rows: object) -> dict[str, float]:
                taken.append(content.decode())
                return SPEEDS

        def fake_labels(*given: Any) -> dict[str, float]:
            taken.append("server")
            return dict.fromkeys(given[2], 99.0 + len(taken) % 2)

        monkeypatch.setattr(quality_measured, "Meter", Fake)
        monkeypatch.setattr(quality_measured, "labels_equal", fake_labels)
        monkeypatch.setattr(quality_measured, "add_backbone", lambda store: None)
        monkeypatch.setattr(quality_measured, "test_rows", lambda data, name: None)
        monkeypatch.setattr(machine, "facts", lambda: MACHINE)
        console = Console(quiet=True)
        assert measure(console, tmp_path, None, ["sst2"], False) == {"sst2": {}}
        found = measure(console, tmp_path, tmp_path, ["sst2"], False)
        assert set(found["sst2"]) == set(MEASURED)
        assert found["sst2"]["server_labels_equal"] == 99.0
        assert taken == [*OVERLAYS, *["server"] * len(OVERLAYS)]
        assert measure(console, tmp_path, tmp_path, ["sst2"], False) == found
        assert measure(console, tmp_path, None, ["sst2"], False) == found
        assert len(taken) == 8
        (tmp_path / "overlays" / "fast" / "sst2-0.safetensors").write_bytes(b"new")
        assert "fast_speedup" not in measure(console, tmp_path, None, ["sst2"], False)["sst2"]
        measure(console, tmp_path, tmp_path, ["sst2"], False)
        assert taken[8:] == ["new", "server"]
        measure(console, tmp_path, tmp_path, ["sst2"], True)
        assert len(taken) == 18
