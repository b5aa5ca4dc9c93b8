"""The secret that all nodes of a cluster share, and without which Ray answers nobody."""

import os
from pathlib import Path

from serving.errors import ConfigError

VARIABLE = "RAY_AUTH_TOKEN"
_SHORTEST = 16
_MAKE = "make one with: openssl rand -hex 32"


def ray_token(file: Path | None) -> str:
    """The secret, from the environment or from a file. `ConfigError` where there is none."""
    given = {}
    if from_environment := os.environ.get(VARIABLE):
        given[f"the environment variable {VARIABLE}"] = from_environment
    if file is not None:
        try:
            given[f"the file {file}"] = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"the file {file} cannot be read: {error}") from error
    if len(set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(given)} hold two different secrets; give one of them")
    if not given:
        raise ConfigError(
            f"the nodes of a cluster need a secret that they share: set {VARIABLE}, or give "
            f"--ray-token-file ({_MAKE})"
        )
    source, token = next(iter(given.items()))
    if len(token) < _SHORTEST or not token.isascii() or not token.isalnum():
        raise ConfigError(
            f"{source} holds no usable secret: {len(token)} characters; expected {_SHORTEST} or "
            f"more letters and digits ({_MAKE})"
        )
    return token


def variables(token: str) -> dict[str, str]:
    """What has Ray ask for the secret, and show it."""
    return {"RAY_AUTH_MODE": "token", VARIABLE: token}
