"""The one table from errors to HTTP statuses and the `type` that clients read. No framework."""

from dataclasses import dataclass

from model_store import errors as store_errors
from serving import errors


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error is answered: HTTP status and the `type` in the body."""

    code: int
    type: str


STATUSES: dict[type[Exception], Status] = {
    errors.KeysError: Status(500, "internal_error"),
    errors.UnauthorizedError: Status(401, "unauthorized"),
    errors.ForbiddenError: Status(403, "forbidden"),
    errors.UnknownTaskError: Status(404, "unknown_task"),
    errors.BodyTimeoutError: Status(408, "body_timeout"),
    errors.TooLargeError: Status(413, "too_large"),
    errors.InvalidInputError: Status(422, "invalid_input"),
    errors.EngineError: Status(500, "engine_error"),
    errors.RateLimitedError: Status(429, "rate_limited"),
    errors.OverloadedError: Status(503, "overloaded"),
    errors.DeadlineError: Status(504, "deadline_exceeded"),
    errors.NotReadyError: Status(503, "not_ready"),
    errors.ServingError: Status(500, "internal_error"),
    store_errors.InputError: Status(422, "invalid_input"),
    store_errors.ManifestError: Status(422, "invalid_artifact"),
    store_errors.ArtifactError: Status(422, "invalid_artifact"),
    store_errors.BackboneMismatchError: Status(422, "wrong_backbone"),
    store_errors.GoldenMismatchError: Status(422, "golden_mismatch"),
    store_errors.SignatureError: Status(422, "invalid_signature"),
    store_errors.BackboneError: Status(500, "backbone_error"),
    store_errors.NotFoundError: Status(404, "not_found"),
    store_errors.ConflictError: Status(409, "conflict"),
    store_errors.StoreError: Status(500, "store_error"),
    store_errors.ModelStoreError: Status(500, "internal_error"),
    Exception: Status(500, "internal_error"),
}
"""The nearest class in an error's ancestry decides."""


def status_of(error: Exception) -> Status:
    """How an error of ours is answered."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
