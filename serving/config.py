"""The server's settings, each with its default, and nowhere else. Knows no torch, no Ray, no HTTP.

The environment is read here alone: `TASKBONE_TOKEN` overrides the token kept in the store folder.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from model_store.manifest import Frozen, describe
from serving.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

TOKEN_FILE = "token"  # noqa: S105 - a name
TOKEN_VARIABLE = "TASKBONE_TOKEN"  # noqa: S105 - a name
METRICS_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Where `prometheus_client` looks for the folder that several processes share."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,256}=*")

Count = Annotated[int, Field(ge=1)]
PositiveBytes = Annotated[int, Field(ge=1)]


class ServeConfig(Frozen):
    """How one server runs. Sizes in bytes, lengths in tokens."""

    store: Path
    backbone: str | None = None
    """Name or fingerprint prefix of the backbone; None: the only one in the store."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    replicas: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    engine_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of one replica's forward; 0: all cores."""
    max_batch_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one forward; 0: as many as make it efficient here, found by a measurement."""
    max_queued_tokens: Count = 65536
    max_inputs: Count = 128
    """Inputs of one request."""
    max_body_bytes: PositiveBytes = 2 * MIB
    max_artifact_bytes: PositiveBytes = 16 * MIB
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a request's body may take to come."""
    plan_cache_bytes: PositiveBytes = GIB
    auth: bool = True
    """Whether every route but health needs the token."""

    @property
    def threads(self) -> int:
        """`engine_threads`, the 0 filled in."""
        return self.engine_threads or len(os.sched_getaffinity(0))

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """A config from settings; a wrong or unknown one is a `ConfigError` that names it."""
        try:
            return cls(**settings)
        except ValidationError as error:
            raise ConfigError(f"server settings: {describe(error)}") from None


def server_token(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that clients must show, or None when `config.auth` is off.

    From `TASKBONE_TOKEN`, else from the file `token` in the store folder, made at the first start
    and readable by its owner alone. Raises `ConfigError` for a token too weak or unreadable.
    """
    if not config.auth:
        return None
    if given := environment.get(TOKEN_VARIABLE):
        return _checked(given, f"the environment variable {TOKEN_VARIABLE}")
    path = config.store / TOKEN_FILE
    try:
        _make_token_file(path)
        token = path.read_text(encoding="ascii").strip()
        path.chmod(0o600)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"the token file {path} cannot be used: {error}; make it readable, remove it, "
            f"or set {TOKEN_VARIABLE}"
        ) from error
    return _checked(token, f"the file {path}")


def _make_token_file(path: Path) -> None:
    """Write a new token unless there is one; two servers starting at once both keep the first."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp makes the file with mode 0600, so the token is never readable by others, and the hard
    # link gives it its name only when it is complete.
    handle, temporary = tempfile.mkstemp(prefix=".token-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        Path(path).hardlink_to(temporary)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink()


def _checked(token: str, source: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{source} holds no usable token: {len(token)} characters given; expected 16 to 256 of "
            "letters, digits and ._~+/- (make one with: openssl rand -hex 32)"
        )
    return token
