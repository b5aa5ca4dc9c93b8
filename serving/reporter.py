"""Has the replicas of a machine know what this one has counted, and adds up what all have: how many
there are, which of them answer, and how much memory they take, too.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from serving.processes import memory_bytes
from serving.series import Family, Values, combine
from serving.snapshots import Snapshot, Snapshots

REPLICAS = "taskbone_replicas"
READY = "taskbone_replicas_ready"
MEMORY = "taskbone_process_memory_bytes"

WRITE_S = 1.0
"""How old another replica's numbers may be."""
STALE_S = 5.0
"""A replica that has not written for so long does not answer either."""
MEASURE_S = 10.0
"""How old the memory's size may be: to go through a process's pages takes some milliseconds."""

logger = logging.getLogger("taskbone.metrics")


class Set(Protocol):
    """Sets a gauge."""

    def __call__(self, name: str, value: float, *labels: str) -> None: ...


class Reporter:
    """Writes from `start` to `close`; any thread may ask for the total."""

    def __init__(
        self,
        values: Callable[[], Values],
        gauge: Set,
        families: Mapping[str, Family],
        folder: Path | None,
    ) -> None:
        """`values` gives a copy of what was counted; `folder` is where the replicas of this machine
        write, None for a process alone."""
        self._values = values
        self._gauge = gauge
        self._families = families
        self._snapshots = None if folder is None else Snapshots(folder, families)
        self._writing = threading.Lock()
        self._check: Callable[[], None] | None = None
        self._measured_at = float("-inf")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="taskbone-metrics", daemon=True)

    def start(self, check: Callable[[], None]) -> None:
        """Write once a second. `check` raises where this replica does not answer."""
        self._check = check
        if self._snapshots is not None:
            self._thread.start()

    def close(self) -> None:
        """Write a last time."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._check = None
        with suppress(OSError):  # the folder has gone before, and with it all who would read it
            self._write()

    def total(self) -> Values:
        """What all replicas have: this one as it is now, others as of their last writing.

        What was shown once, the others see from then on, so that no counter ever goes back.
        """
        values = self._write()
        if self._snapshots is None:
            return values
        live, ended = self._snapshots.read()
        return combine([ended, *map(_as_it_stands, live)], self._families)

    def _run(self) -> None:
        complaint = ""
        while not self._closing.wait(WRITE_S):
            try:
                self._write()
                complaint = ""
            except Exception as error:
                if str(error) != complaint:
                    complaint = str(error)
                    logger.exception("the metrics cannot be written")

    def _write(self) -> Values:
        with self._writing:
            self._look()
            values = self._values()
            if self._snapshots is not None:
                self._snapshots.write(values)
            return values

    def _look(self) -> None:
        self._gauge(REPLICAS, 1)
        self._gauge(READY, self._is_ready())
        now = time.monotonic()
        if now - self._measured_at > MEASURE_S:
            self._measured_at = now
            self._gauge(MEMORY, memory_bytes())

    def _is_ready(self) -> bool:
        if self._check is None:
            return False
        try:
            self._check()
        except Exception:  # noqa: BLE001 - whoever asks for a prediction is told why
            return False
        return True


def _as_it_stands(snapshot: Snapshot) -> Values:
    if time.monotonic() - snapshot.at > STALE_S:
        return {**snapshot.values, READY: {(): [0]}}
    return snapshot.values
