"""What the replicas of one machine have counted: each writes its numbers into a file of its own,
and whoever is asked adds them all up.

What an ended process has counted stays, in one file for all of them; what it had at the time, its
gauges, goes with it. Knows no names.
"""

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from model_store.durable import locked
from serving.series import Family, Values, combine

MOST_ENDED = 2000
"""Series of one name that are kept of ended processes, beside those that a live one has, too."""

_LOCK = "lock"
_ENDED = "ended.json"


@dataclass(frozen=True)
class Snapshot:
    """The numbers of one process at one time."""

    path: Path
    process: int
    born: float
    """When the process began: the next one with the same number is another."""
    at: float
    """By `time.monotonic`, which is the same in every process of a machine."""
    values: Values

    @property
    def is_live(self) -> bool:
        """Whether its process is still there."""
        try:
            process = psutil.Process(self.process)
            return bool(
                process.create_time() == self.born and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False


class Snapshots:
    """The folder with the files of all processes. Several may use it at once."""

    def __init__(self, folder: Path, families: Mapping[str, Family]) -> None:
        self._folder = folder
        self._families = families
        self._process = os.getpid()
        self._born = psutil.Process().create_time()
        self._path = folder / f"{self._process}-{secrets.token_hex(4)}.json"

    def write(self, values: Values) -> None:
        """Put this process's numbers in the place of its last ones."""
        about = {"process": self._process, "born": self._born, "at": time.monotonic()}
        _write(self._path, about, values)

    def read(self) -> tuple[list[Snapshot], Values]:
        """The last numbers of every live process, and the sum of what ended ones have counted."""
        with locked(self._folder / _LOCK):
            found = [_read(path) for path in sorted(self._folder.glob("*-*.json"))]
            live = [one for one in found if one.is_live]
            dead = [one for one in found if one not in live]
            return live, self._end(dead, live)

    def _end(self, dead: Sequence[Snapshot], live: Sequence[Snapshot]) -> Values:
        """The file of ended processes, with the dead ones' files taken into it."""
        path, files = self._folder / _ENDED, set[str]()
        values: Values = {}
        if path.exists():
            about, values = _parse(path.read_bytes())
            files = set(about["files"])
        # Who was killed here before may have left a file that has been taken in.
        new = [one for one in dead if one.path.name not in files]
        if new:
            counted = [self._counters(one.values) for one in new]
            values = self._bounded(combine([values, *counted], self._families), live)
            _write(path, {"files": [one.path.name for one in dead]}, values)
        for one in dead:
            one.path.unlink()
        return values

    def _counters(self, values: Values) -> Values:
        return {
            name: series for name, series in values.items() if self._families[name].kind != "gauge"
        }

    def _bounded(self, values: Values, live: Sequence[Snapshot]) -> Values:
        """Without the oldest of too many series that no live process has.

        Less of a series that goes on would look as if it had begun anew.
        """
        for name, series in values.items():
            used = {labels for one in live for labels in one.values.get(name, ())}
            unused = [labels for labels in series if labels not in used]
            for labels in unused[: max(0, len(unused) - MOST_ENDED)]:
                del series[labels]
        return values


def _write(path: Path, about: Mapping[str, object], values: Values) -> None:
    """One file, which is never seen half written."""
    told = {name: list(family.items()) for name, family in values.items()}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({**about, "values": told}))
    temporary.replace(path)


def _read(path: Path) -> Snapshot:
    about, values = _parse(path.read_bytes())
    return Snapshot(path, about["process"], about["born"], about["at"], values)


def _parse(data: bytes) -> tuple[dict[str, Any], Values]:
    about = json.loads(data)
    told: dict[str, list[Any]] = about.pop("values")
    return about, {
        name: {tuple(labels): series for labels, series in family} for name, family in told.items()
    }
