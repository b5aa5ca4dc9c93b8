"""The keys of the environment, and the one that a first start makes."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_store.store import Store
from serving.config import ServeConfig
from serving.errors import ConfigError
from serving.key_book import KeyBook
from serving.keys import DOCUMENT, KeyRing
from serving.local_key import TOKEN_FILE, environment_keys, local_token, prepare
from serving.types import Caller

GIVEN = "from-the-environment"


def start(folder: Path, environment: dict[str, str] | None = None, **settings: bool) -> str | None:
    """What a server's start does about its keys."""
    config = ServeConfig.of(store=folder, **settings)
    return prepare(config, Store(folder), environment or {})


def caller(folder: Path, secret: str) -> Caller:
    return KeyRing(Store(folder)).caller(f"Bearer {secret}".encode())


def test_a_first_start_makes_a_key_readable_by_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "store"
    first = start(folder)
    assert first is not None
    assert caller(folder, first) == Caller("local", frozenset(("predict", "metrics")))
    assert start(folder) == first
    assert stat.S_IMODE((folder / TOKEN_FILE).stat().st_mode) == 0o600
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if first.encode() in path.read_bytes()] == [TOKEN_FILE]


def test_two_stores_have_two_keys(tmp_path: Path) -> None:
    assert start(tmp_path / "a") != start(tmp_path / "b")


def test_servers_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        shown = set(threads.map(lambda _: start(tmp_path), range(64)))
    assert len(shown) == 1
    assert len(KeyBook(Store(tmp_path)).keys()) == 1


def test_a_start_that_was_killed_before_the_document_is_completed(tmp_path: Path) -> None:
    first = start(tmp_path)
    (tmp_path / "documents" / DOCUMENT).unlink()
    assert start(tmp_path) == first


def test_the_permissions_of_an_older_file_are_mended(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).write_text("a-token-of-its-own\n")
    (tmp_path / TOKEN_FILE).chmod(0o644)
    assert start(tmp_path) == "a-token-of-its-own"
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600


def test_without_the_file_the_key_still_works(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert first
    (tmp_path / TOKEN_FILE).unlink()
    assert start(tmp_path) is None
    assert caller(tmp_path, first).name == "local"
    assert not (tmp_path / TOKEN_FILE).exists()


def test_a_revoked_key_does_not_come_back(tmp_path: Path) -> None:
    assert start(tmp_path)
    book = KeyBook(Store(tmp_path))
    book.revoke("local")
    with pytest.raises(ConfigError, match="taskbone keys add"):
        start(tmp_path)
    book.add("other", ["predict"])
    assert start(tmp_path) is None


def test_where_there_are_keys_none_is_made(tmp_path: Path) -> None:
    KeyBook(Store(tmp_path)).add("mine", ["admin"])
    assert start(tmp_path) is None
    assert not (tmp_path / TOKEN_FILE).exists()


def test_the_environment_gives_two_keys_and_writes_nothing(tmp_path: Path) -> None:
    environment = {"TASKBONE_TOKEN": GIVEN, "TASKBONE_ADMIN_TOKEN": "another-for-admins"}
    assert start(tmp_path, environment) == GIVEN
    assert start(tmp_path, {"TASKBONE_ADMIN_TOKEN": "another-for-admins"}) is None
    assert list(tmp_path.iterdir()) == []
    ring = KeyRing(None, environment_keys(environment))
    plain, admin = (ring.caller(f"Bearer {secret}".encode()) for secret in environment.values())
    assert plain == Caller("environment", frozenset(("predict", "metrics")))
    assert admin == Caller("environment-admin", frozenset(("predict", "metrics", "admin")))


def test_without_auth_no_key_is_made_or_shown(tmp_path: Path) -> None:
    assert start(tmp_path, {"TASKBONE_TOKEN": GIVEN}, auth=False) is None
    assert start(tmp_path, auth=False) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["TASKBONE_TOKEN", "TASKBONE_ADMIN_TOKEN"])
@pytest.mark.parametrize(
    "token", ["short", "has a space in its middle", "line\nbreak-in-the-token"]
)
def test_a_token_that_cannot_be_used_is_refused_without_being_shown(
    variable: str, token: str
) -> None:
    with pytest.raises(ConfigError, match=variable) as caught:
        environment_keys({variable: token})
    assert token not in str(caught.value)


def test_one_secret_is_not_for_both() -> None:
    with pytest.raises(ConfigError, match="the same"):
        environment_keys({"TASKBONE_TOKEN": GIVEN, "TASKBONE_ADMIN_TOKEN": GIVEN})


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).touch()
    with pytest.raises(ConfigError, match="no usable token"):
        start(tmp_path)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).mkdir()
    with pytest.raises(ConfigError, match=str(tmp_path / TOKEN_FILE)):
        start(tmp_path)


def test_who_is_on_the_same_machine_needs_no_option(tmp_path: Path) -> None:
    assert local_token(tmp_path, {}) is None
    first = start(tmp_path)
    assert local_token(tmp_path, {}) == first
    assert local_token(tmp_path, {"TASKBONE_TOKEN": GIVEN}) == GIVEN
