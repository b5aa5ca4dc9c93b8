"""The server's settings and its token."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import TOKEN_FILE, ServeConfig, server_token
from serving.errors import ConfigError


def test_by_default_the_server_is_for_this_machine_and_needs_the_token(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path)
    assert config.host == "127.0.0.1"
    assert config.auth is True


def test_a_config_is_never_altered(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path)
    with pytest.raises(ValidationError):
        config.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", 0),
        ("port", 65536),
        ("replicas", 0),
        ("device", "tpu"),
        ("precision", "fp8"),
        ("engine_threads", -1),
        ("max_batch_tokens", -1),
        ("max_body_bytes", 0),
        ("colour", "red"),
    ],
)
def test_a_wrong_or_unknown_setting_is_named(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        ServeConfig.of(store=tmp_path, **{setting: value})


def test_the_token_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path / "new" / "store")
    first = server_token(config, {})
    assert first is not None
    assert len(first) >= 43
    assert server_token(config, {}) == first
    file = config.store / TOKEN_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in config.store.iterdir()] == [TOKEN_FILE]


def test_two_stores_have_two_tokens(tmp_path: Path) -> None:
    tokens = {server_token(ServeConfig(store=tmp_path / name), {}) for name in ("a", "b")}
    assert len(tokens) == 2


def test_servers_that_start_at_once_agree_on_one_token(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path)
    with ThreadPoolExecutor(16) as threads:
        tokens = set(threads.map(lambda _: server_token(config, {}), range(64)))
    assert len(tokens) == 1


def test_the_permissions_of_a_kept_token_are_mended(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path)
    server_token(config, {})
    (tmp_path / TOKEN_FILE).chmod(0o644)
    server_token(config, {})
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600


def test_the_environment_overrides_the_kept_token_and_writes_nothing(tmp_path: Path) -> None:
    given = "from-the-environment"
    assert server_token(ServeConfig(store=tmp_path), {"TASKBONE_TOKEN": given}) == given
    assert list(tmp_path.iterdir()) == []


def test_without_auth_there_is_no_token(tmp_path: Path) -> None:
    config = ServeConfig(store=tmp_path, auth=False)
    assert server_token(config, {"TASKBONE_TOKEN": "from-the-environment"}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "token", ["short", "has a space in its middle", "line\nbreak-in-the-token"]
)
def test_a_token_that_cannot_be_used_is_refused_without_being_shown(
    tmp_path: Path, token: str
) -> None:
    with pytest.raises(ConfigError, match="TASKBONE_TOKEN") as caught:
        server_token(ServeConfig(store=tmp_path), {"TASKBONE_TOKEN": token})
    assert token not in str(caught.value)


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).touch()
    with pytest.raises(ConfigError, match="no usable token"):
        server_token(ServeConfig(store=tmp_path), {})


def test_a_token_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).mkdir()
    with pytest.raises(ConfigError, match=str(tmp_path / TOKEN_FILE)):
        server_token(ServeConfig(store=tmp_path), {})
