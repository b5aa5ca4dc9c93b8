"""The server's settings."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.config import ServeConfig
from serving.errors import ConfigError


def test_by_default_the_server_is_for_this_machine_and_needs_keys(tmp_path: Path) -> None:
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


def test_the_number_of_replicas_must_lie_between_fewest_and_most(tmp_path: Path) -> None:
    assert ServeConfig.of(store=tmp_path, replicas=3).most_replicas == 3
    config = ServeConfig.of(store=tmp_path, replicas=2, min_replicas=2, max_replicas=4)
    assert config.most_replicas == 4
    with pytest.raises(ConfigError, match="min_replicas <= replicas <= max_replicas"):
        ServeConfig.of(store=tmp_path, replicas=3, max_replicas=2)
    with pytest.raises(ConfigError, match="min_replicas <= replicas <= max_replicas"):
        ServeConfig.of(store=tmp_path, min_replicas=2, max_replicas=4)


def test_a_store_is_a_folder_or_a_url(tmp_path: Path) -> None:
    for given in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        config = ServeConfig.of(store=given)
        assert config.store == config.folder == tmp_path
    config = ServeConfig(store="s3://bucket/prefix")
    assert (config.store, config.folder) == ("s3://bucket/prefix", None)
