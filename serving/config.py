"""The server's settings, each with its default, and nowhere else. Knows no torch, Ray or HTTP."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from model_store.manifest import Frozen, describe
from model_store.store import DEFAULT_CACHE, folder_of
from serving.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

Count = Annotated[int, Field(ge=1)]
PositiveBytes = Annotated[int, Field(ge=1)]


def _location(given: object) -> object:
    """A folder as a path, a URL of an object store as it is."""
    return folder_of(given) or given if isinstance(given, str) else given


class ServeConfig(Frozen):
    """How one server runs. Sizes in bytes, lengths in tokens."""

    store: Annotated[Path | str, BeforeValidator(_location)]
    """A folder, or a URL of an object store such as `s3://bucket/prefix`."""
    cache: Path = Path(DEFAULT_CACHE)
    """This machine's folder for the backbones of an object store."""
    backbone: str | None = None
    """Name or fingerprint prefix of the backbone; None: the only one in the store."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where the Open Inference Protocol is spoken over gRPC; 0: nowhere."""
    ray_address: str | None = None
    """A running Ray to serve on, HOST:PORT of its head or auto; None: one of its own."""
    replicas: Count = 1
    """Processes that answer; with `max_replicas`, those at the start."""
    min_replicas: Count = 1
    max_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas come and go with the load, up to so many; 0: their number stays."""
    replicas_per_node: Annotated[int, Field(ge=0)] = 0
    """On a Ray of several nodes: so many on each, also on one that joins later; 0: `replicas`."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 32.0
    """Requests under way for each replica, above which another one is started."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    engine_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of one replica's forward; 0: all cores."""
    max_batch_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one forward; 0: as many as make it efficient here, found by a measurement."""
    max_queued_tokens: Count = 65536
    max_queue_ms: Count = 2000
    """How long a request may wait for its forward; what would wait longer is refused."""
    max_inputs: Count = 128
    """Inputs of one request."""
    max_body_bytes: PositiveBytes = 2 * MIB
    max_artifact_bytes: PositiveBytes = 16 * MIB
    body_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a request's body may take to come."""
    plan_cache_bytes: PositiveBytes = GIB
    auth: bool = True
    """Whether every route but health needs a key; without, only changes do."""
    signature_key: Path | None = None
    """Public key with which every registered artifact must be signed; None: none need be."""
    log_format: Literal["text", "json"] = "text"
    access_log: bool = True
    """Whether each answered request is a line of the log."""
    otlp_endpoint: str | None = None
    """Where spans are sent, as OTLP over HTTP, by its URL without `/v1/traces`; None: nowhere."""

    @property
    def folder(self) -> Path | None:
        """The store's folder; None for one in an object store."""
        return self.store if isinstance(self.store, Path) else None

    @property
    def most_replicas(self) -> int:
        """How many there may be at once."""
        return self.replicas_per_node or self.max_replicas or self.replicas

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.max_replicas and not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"{self.replicas} replicas at the start, {self.min_replicas} at least and "
                f"{self.max_replicas} at most; expected min_replicas <= replicas <= max_replicas"
            )
        if self.grpc_port and self.ray_address:
            raise ValueError("grpc_port: only a server with a Ray of its own speaks gRPC")
        if self.grpc_port == self.port:
            raise ValueError(f"grpc_port: {self.port} is the port of HTTP already")
        return self

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, given: str | None) -> str | None:
        if given is not None:
            url = urlsplit(given)
            if url.scheme not in ("http", "https") or not url.hostname or url.query:
                raise ValueError("expected a URL such as http://collector:4318")
        return given

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
