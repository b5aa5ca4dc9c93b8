"""Every error that `model_store` raises at its callers' or users' faults, under one base class.

Messages say what was given, what was expected and what to do. `serving` maps the classes to HTTP
statuses and the command line prints the message without a traceback.
"""


class ModelStoreError(Exception):
    """Base of all errors of this package."""


class ManifestError(ModelStoreError, ValueError):
    """The manifest is missing, is not JSON, or has a wrong, missing or unknown field."""


class ArtifactError(ModelStoreError, ValueError):
    """The artifact file is damaged, or its tensors do not match its manifest."""


class BackboneMismatchError(ArtifactError):
    """The artifact was made for another backbone."""


class GoldenMismatchError(ArtifactError):
    """The artifact's golden inputs do not give the probabilities that it promises."""


class SignatureError(ModelStoreError, ValueError):
    """An artifact's signature is missing, damaged, by another key, or over other bytes."""


class BackboneError(ModelStoreError, ValueError):
    """A checkpoint cannot be taken into the store, or a stored backbone is damaged."""


class UnsupportedCheckpointError(BackboneError):
    """The checkpoint is of a family, format or variant that Taskbone does not read."""


class InputError(ModelStoreError, ValueError):
    """An input text does not fit the task's template, or is too long for it."""


class StoreError(ModelStoreError):
    """The store folder is damaged, or cannot be read or written."""


class StoreUnreachableError(StoreError):
    """The object store does not answer, or refuses its credentials; it may again later."""


class NotFoundError(StoreError, LookupError):
    """No such backbone, task or version in the store."""


class ConflictError(StoreError):
    """The store's state forbids the change: deleting the active version, rolling back too far, a
    canary of 100 %."""
