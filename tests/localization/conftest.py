"""What the tests of many task files share."""

from pathlib import Path

import pytest

from tests.localization.synthetic import write_rows
from tests.overlays import small_backbone


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: rows, and a store with a backbone in `store`."""
    small_backbone(tmp_path)
    write_rows(tmp_path / "train.jsonl", 100, seed=1)
    write_rows(tmp_path / "test.jsonl", 30, seed=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKBONE_STORE", str(tmp_path / "store"))
    return tmp_path
