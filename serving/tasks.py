"""The versions that this process answers with, and how many requests each has under way.

Knows nothing of where versions come from: `serving.reconciler` puts them here as the store says.
"""

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.manifest import Manifest
from model_store.store import VersionInfo
from model_store.tokenization import InputEncoder
from serving.engine import Servable
from serving.errors import NotReadyError, UnknownTaskError
from serving.types import Ask, CanaryInfo, TaskInfo

MOST_OTHERS = 32
"""Versions without a part in their task that are kept for those who ask for them by number."""

_BUCKETS = 10_000


@dataclass(eq=False)
class LoadedVersion:
    """A version that can answer. The table alone counts `in_flight`."""

    info: TaskInfo
    servable: Servable
    texts: InputEncoder
    in_flight: int = 0

    @property
    def manifest(self) -> Manifest:
        """The version's manifest."""
        return self.servable.overlay.manifest

    @property
    def key(self) -> tuple[str, int]:
        """Task and version; numbers are never given out twice."""
        return self.info.task, self.info.version


@dataclass(frozen=True)
class ServedTask:
    """What answers for a task: the active version, for a share of the requests the canary."""

    active: LoadedVersion
    canary: LoadedVersion | None = None
    canary_percent: float = 0.0
    shadow: LoadedVersion | None = None
    """Answers too, for comparison; nobody gets its answers."""

    @property
    def info(self) -> TaskInfo:
        """What callers may know."""
        if self.canary is None and self.shadow is None:
            return self.active.info
        canary = shadow = None
        if self.canary is not None:
            canary = CanaryInfo(self.canary.info.version, self.canary_percent)
        if self.shadow is not None:
            shadow = self.shadow.info.version
        return replace(self.active.info, canary=canary, shadow=shadow)

    @property
    def versions(self) -> Iterator[LoadedVersion]:
        """Every version with a part in it."""
        return (one for one in (self.active, self.canary, self.shadow) if one is not None)

    def choose(self, request_id: str) -> LoadedVersion:
        """Active or canary; the same request id always gets the same."""
        if self.canary is None:
            return self.active
        seed = f"{self.active.info.task}/{request_id}".encode()
        share = zlib.crc32(seed) % _BUCKETS / _BUCKETS
        return self.canary if 100 * share < self.canary_percent else self.active


class TaskTable:
    """All that is served, as one state of the store says. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: Mapping[str, ServedTask] = {}
        self._generation = -1
        # Versions asked for by number, the last one asked last.
        self._others: OrderedDict[tuple[str, int], LoadedVersion] = OrderedDict()
        # Versions that serve no new request, with the generation that has taken them out.
        self._leaving: list[tuple[int, LoadedVersion]] = []

    @property
    def generation(self) -> int:
        """The store's state that new requests are answered by."""
        return self._generation

    @property
    def drained(self) -> int:
        """The newest state of which no request that an earlier one let in is under way."""
        with self._lock:
            waiting = [when for when, one in self._leaving if one.in_flight]
            return min(waiting, default=self._generation + 1) - 1

    def replace(self, tasks: Mapping[str, ServedTask], generation: int) -> None:
        """Answer new requests by another state, from one moment to the next."""
        kept = {id(one) for served in tasks.values() for one in served.versions}
        with self._lock:
            before = [one for served in self._tasks.values() for one in served.versions]
            gone = {id(one): one for one in before if id(one) not in kept}
            self._leaving += [(generation, one) for one in gone.values()]
            self._tasks = tasks
            self._generation = generation

    def take_left(self) -> list[LoadedVersion]:
        """Versions that have left, and whose last request has been answered; each given once."""
        with self._lock:
            left = [one for _, one in self._leaving if not one.in_flight]
            self._leaving = [(when, one) for when, one in self._leaving if one.in_flight]
            return left

    def get(self, task: str) -> ServedTask:
        """What serves a task. Raises `UnknownTaskError` that lists what there is."""
        served = self._tasks.get(task)
        if served is None:
            known = ", ".join(sorted(self._tasks)[:20]) or "none is loaded"
            raise UnknownTaskError(f"no task {task[:80]!r}; tasks: {known}")
        return served

    def find(self, task: str) -> ServedTask | None:
        """What serves a task, if anything does."""
        return self._tasks.get(task)

    def all(self) -> list[ServedTask]:
        """Everything that is served, in order of names."""
        tasks = self._tasks
        return [tasks[name] for name in sorted(tasks)]

    def has(self, task: str, number: int) -> bool:
        """Whether a version can be asked by its number now."""
        with self._lock:
            return self._numbered(task, number) is not None

    def add_other(self, version: LoadedVersion) -> None:
        """Keep a version that is asked for by its number."""
        with self._lock:
            self._others[version.key] = version
            if len(self._others) > MOST_OTHERS:
                _, oldest = self._others.popitem(last=False)
                self._leaving.append((self._generation, oldest))

    def drop_others(self, exists: Callable[[str, int], bool]) -> None:
        """Let go of versions that have been deleted."""
        with self._lock:
            for key in [key for key in self._others if not exists(*key)]:
                self._leaving.append((self._generation, self._others.pop(key)))

    def digests(self) -> set[str]:
        """Of every version that can still be asked."""
        with self._lock:
            others = [*self._others.values(), *(one for _, one in self._leaving)]
            served = [one for task in self._tasks.values() for one in task.versions]
            return {one.info.digest for one in (*others, *served)}

    def chosen(self, task: str, ask: Ask) -> int | None:
        """The version that answers such a request, None where there is none of that number.

        Raises `UnknownTaskError`.
        """
        served = self.get(task)
        if ask.version is None:
            return served.choose(ask.request_id).info.version
        return ask.version if self.has(task, ask.version) else None

    @contextmanager
    def using(self, task: str, ask: Ask) -> Iterator[tuple[LoadedVersion, ServedTask | None]]:
        """The version that answers a request, counted as under way inside; and what serves the
        task, None where the caller has named the version."""
        with self._lock:
            served = self.get(task) if ask.version is None else None
            chosen = (
                self._numbered(task, ask.version or 0)
                if served is None
                else served.choose(ask.request_id)
            )
            if chosen is None:
                raise NotReadyError(f"version {ask.version} of task {task!r} was not kept loaded")
            chosen.in_flight += 1
        try:
            yield chosen, served
        finally:
            self.release(chosen)

    def hold(self, version: LoadedVersion) -> None:
        """Another request of this version is under way, until `release`."""
        with self._lock:
            version.in_flight += 1

    def release(self, version: LoadedVersion) -> None:
        """A request of this version has been answered."""
        with self._lock:
            version.in_flight -= 1

    def _numbered(self, task: str, number: int) -> LoadedVersion | None:
        served = self._tasks.get(task)
        for one in () if served is None else served.versions:
            if one.info.version == number:
                return one
        other = self._others.get((task, number))
        if other is not None:
            self._others.move_to_end((task, number))
        return other


def describe(manifest: Manifest, version: VersionInfo) -> TaskInfo:
    """What a caller may know about a version."""
    return TaskInfo(
        task=manifest.task,
        version=version.version,
        digest=version.digest,
        description=manifest.description,
        labels=manifest.labels,
        takes_pairs=manifest.takes_pairs,
        kept_share=round(manifest.kept_share, 4),
        prompt_tokens=manifest.prompt.tokens,
        max_tokens=manifest.max_tokens,
        bytes=version.bytes,
        published_at=version.published_at,
        metrics=manifest.metrics,
    )


def load_version(backbone: Backbone, overlay: Overlay, version: VersionInfo) -> LoadedVersion:
    """A version made ready for requests."""
    manifest = overlay.manifest
    texts = InputEncoder(
        backbone.tokenizer, backbone.config, manifest.template, manifest.max_tokens
    )
    servable = Servable(manifest.task, version.digest, overlay)
    return LoadedVersion(describe(manifest, version), servable, texts)
