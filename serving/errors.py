"""Every error that `serving` raises, under one base class. Knows no HTTP.

Messages say what was given, what was expected and what to do; they are shown to the client as they
are. The statuses are in one table in `serving/statuses.py`.
"""


class ServingError(Exception):
    """Base of all errors of this package."""


class ConfigError(ServingError, ValueError):
    """The server cannot start as it was asked to: a wrong setting, a taken port, a bad token."""


class KeysError(ServingError, ValueError):
    """The keys cannot be read, or not be changed as asked."""


class UnauthorizedError(ServingError):
    """The request carries no key, or one that is not known or has expired."""


class ForbiddenError(ServingError):
    """The caller's key does not open this, or the request comes from another site's page."""


class UnknownTaskError(ServingError, LookupError):
    """No task of this name has an active version."""


class InvalidInputError(ServingError, ValueError):
    """The body is not what the route takes, or the inputs are of the wrong kind for the task."""


class TooLargeError(ServingError, ValueError):
    """The body, the number of inputs or the number of tokens is over the limit."""


class BodyTimeoutError(ServingError):
    """The body came too slowly."""


class OverloadedError(ServingError):
    """The queue is full; the same request may be sent again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """The caller's key has more waiting than its share while others wait, too."""


class DeadlineError(ServingError):
    """The caller's deadline passed before the answer was there, or certainly would."""


class NotReadyError(OverloadedError):
    """The server is starting, stopping or unhealthy."""


class EngineError(ServingError):
    """The engine failed on this batch, or its thread is dead or stuck. Not the caller's fault."""


class BoardError(ServingError):
    """The board that the replicas share cannot be reached."""
