"""What all tests of the command share."""

from pathlib import Path

import pytest

from model_store.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that every command of a test uses: made by none yet."""
    monkeypatch.setenv("TASKBONE_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("TASKBONE_TOKEN", raising=False)
    monkeypatch.delenv("TASKBONE_ADMIN_TOKEN", raising=False)
    monkeypatch.delenv("TASKBONE_URL", raising=False)
    return Store(tmp_path / "store")
