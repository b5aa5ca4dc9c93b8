"""The one table from errors to HTTP statuses and the `type` that clients read. No framework."""

from dataclasses import dataclass

from model_store import errors as store_errors
from serving import errors


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error is answered: HTTP status and the `type` in the body."""

    code: int
    type: str
    hidden: bool = False
    """Whether its message is for the log alone: it is about the server and not the request."""


STATUSES: dict[type[Exception], Status] = {
    errors.KeysError: Status(500, "internal_error", hidden=True),
    errors.UnauthorizedError: Status(401, "unauthorized"),
    errors.ForbiddenError: Status(403, "forbidden"),
    errors.UnknownTaskError: Status(404, "unknown_task"),
    errors.BodyTimeoutError: Status(408, "body_timeout"),
    errors.TooLargeError: Status(413, "too_large"),
    errors.InvalidInputError: Status(422, "invalid_input"),
    errors.EngineError: Status(500, "engine_error", hidden=True),
    errors.RateLimitedError: Status(429, "rate_limited"),
    errors.OverloadedError: Status(503, "overloaded"),
    errors.DeadlineError: Status(504, "deadline_exceeded"),
    errors.NotReadyError: Status(503, "not_ready"),
    errors.ServingError: Status(500, "internal_error", hidden=True),
    store_errors.InputError: Status(422, "invalid_input"),
    store_errors.ManifestError: Status(422, "invalid_artifact"),
    store_errors.ArtifactError: Status(422, "invalid_artifact"),
    store_errors.BackboneMismatchError: Status(422, "wrong_backbone"),
    store_errors.GoldenMismatchError: Status(422, "golden_mismatch"),
    store_errors.SignatureError: Status(422, "invalid_signature"),
    store_errors.BackboneError: Status(500, "backbone_error", hidden=True),
    store_errors.NotFoundError: Status(404, "not_found"),
    store_errors.ConflictError: Status(409, "conflict"),
    store_errors.StoreUnreachableError: Status(503, "store_unreachable", hidden=True),
    store_errors.StoreError: Status(500, "store_error", hidden=True),
    store_errors.ModelStoreError: Status(500, "internal_error", hidden=True),
    Exception: Status(500, "internal_error", hidden=True),
}
"""The nearest class in an error's ancestry decides."""

REJECTIONS = (401, 403, 408, 413, 429, 503, 504)
"""Statuses of requests that are turned away, or given up for want of time."""


def retry_after_s(error: Exception) -> int | None:
    """Seconds after which the same request may be sent again; None where that would not help."""
    if isinstance(error, errors.OverloadedError):
        return error.retry_after_s
    return 1 if isinstance(error, store_errors.StoreUnreachableError) else None


def status_of(error: Exception) -> Status:
    """How an error of ours is answered."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
