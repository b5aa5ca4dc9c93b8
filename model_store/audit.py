"""Who changed what, when, and with what result: the entries of the store's audit log.

Knows one entry and its line of JSON. Where the lines lie, and that they last, is the store's.
"""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from pydantic import Field, ValidationError

from model_store.manifest import Frozen

logger = logging.getLogger("taskbone.audit")


def now() -> str:
    """The time, UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class AuditEntry(Frozen):
    """One change that was asked for, done or refused. Never holds a key or a text."""

    at: str = Field(default_factory=now)
    by: str
    """The name of the key that was shown, or `<login name>@command line`."""
    action: str
    """`register`, `activate`, `rollback`, `canary`, `shadow`, `deactivate`, `delete` or `gc`."""
    task: str
    version: int | None = None
    digest: str | None = None
    result: str = "done"
    """`done`, or the type of the error."""
    message: str = ""

    def to_line(self) -> bytes:
        """The entry as one line of the log."""
        return self.model_dump_json().encode() + b"\n"


def entries_of(lines: Iterable[bytes], place: str) -> list[AuditEntry]:
    """The entries of the log's lines. A line that a crash has torn is left out, with a warning."""
    entries = []
    for line in filter(None, lines):
        try:
            entries.append(AuditEntry.model_validate_json(line))
        except ValidationError:
            logger.warning("%s: a line is damaged and is left out: %.80r", place, line)
    return entries
