"""Waiting for what happens in the background."""

import time
from collections.abc import Callable

PATIENCE_S = 60.0
"""After which what has not happened fails the test."""


def wait_until(happened: Callable[[], bool], state: Callable[[], str] = lambda: "") -> None:
    """Return once it has happened; a failed assertion that tells the `state` if it never does."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < give_up_at, f"it has not happened: {state()}"
        time.sleep(0.01)
