"""Every error that `localization` raises at a user's fault, under one base class."""


class LocalizationError(Exception):
    """Base of all errors of this package."""


class ConfigError(LocalizationError, ValueError):
    """The task file is not YAML, or has a wrong, missing or unknown field."""


class DataError(LocalizationError, ValueError):
    """A data file cannot be read, or a row does not have what the task file says."""
