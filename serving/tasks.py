"""The tasks that this process serves: the store's active versions, read again whenever they change.

The store is the only truth. Every lookup compares one `stat` of its registry, so that whatever any
replica or command publishes is served by all from their next request on, without messages.
"""

import logging
import math
import time
from dataclasses import dataclass
from typing import Protocol

from model_store import artifact
from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.errors import BackboneMismatchError, ModelStoreError, StoreError
from model_store.manifest import Manifest
from model_store.store import Store, Token, VersionInfo
from model_store.tokenization import InputEncoder
from serving.engine import Servable
from serving.errors import UnknownTaskError
from serving.types import TaskInfo

logger = logging.getLogger("taskbone.tasks")


READ_AGAIN_S = 1.0
"""How long after a version could not be read it is tried again."""


class TaskObserver(Protocol):
    """What the table tells of its tasks; `serving.metrics.Metrics` is one."""

    def prepare(self, task: str) -> None:
        """A task is there for the first time."""
        ...

    def tasks(self, count: int) -> None:
        """So many tasks are loaded."""
        ...


@dataclass(frozen=True)
class LoadedTask:
    """A task's active version, ready for requests."""

    info: TaskInfo
    servable: Servable
    texts: InputEncoder

    @property
    def manifest(self) -> Manifest:
        """The version's manifest."""
        return self.servable.overlay.manifest


class TaskTable:
    """All loaded tasks by name. For one thread: the event loop's."""

    def __init__(self, store: Store, backbone: Backbone, observer: TaskObserver) -> None:
        self._store = store
        self._backbone = backbone
        self._observer = observer
        self._token: Token | None = None
        self._tasks: dict[str, LoadedTask] = {}
        # Versions that cannot be served, so that each is reported once.
        self._refused: set[str] = set()
        self._complaint = ""
        self._read_again_at = math.inf

    def get(self, name: str) -> LoadedTask:
        """The active version of a task. Raises `UnknownTaskError` that lists what there is."""
        self._refresh()
        loaded = self._tasks.get(name)
        if loaded is None:
            known = ", ".join(sorted(self._tasks)[:20]) or "none is loaded"
            raise UnknownTaskError(f"no task {name[:80]!r}; tasks: {known}")
        return loaded

    def all(self) -> list[LoadedTask]:
        """Every loaded task, in order of names."""
        self._refresh()
        return [self._tasks[name] for name in sorted(self._tasks)]

    def _refresh(self) -> None:
        try:
            token = self._store.state_token()
            if token == self._token and time.monotonic() < self._read_again_at:
                return
            active = self._store.tasks()
        except StoreError as error:
            # What was loaded goes on being served while someone repairs the store.
            if not self._tasks:
                raise
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.error("the store cannot be read; serving what was loaded: %s", error)
            return
        self._complaint = ""
        self._read_again_at = math.inf
        tasks: dict[str, LoadedTask] = {}
        for name, info in active.items():
            known = self._tasks.get(name)
            loaded = known if known and _same(known, info) else self._load(name, info, known)
            if loaded is not None:
                tasks[name] = loaded
        for name in tasks.keys() - self._tasks.keys():
            self._observer.prepare(name)
        self._observer.tasks(len(tasks))
        self._tasks = tasks
        # The token of before the read: a change in between is then seen at the next lookup.
        self._token = token

    def _load(self, name: str, info: VersionInfo, known: LoadedTask | None) -> LoadedTask | None:
        """A version from the store; one that cannot be served leaves the known one in its place."""
        try:
            info, data = self._store.read(name)
            overlay = artifact.read(data, self._backbone.config, self._backbone.fingerprint)
            return load_task(self._backbone, overlay, info)
        except BackboneMismatchError:
            return None  # another server's task: a store may hold several backbones
        except ModelStoreError as error:
            if isinstance(error, StoreError):  # reading failed; perhaps not the next time
                self._read_again_at = time.monotonic() + READ_AGAIN_S
            if info.digest not in self._refused:
                self._refused.add(info.digest)
                logger.error("task %s, version %d cannot be served: %s", name, info.version, error)
            return known


def load_task(backbone: Backbone, overlay: Overlay, version: VersionInfo) -> LoadedTask:
    """A version made ready for requests."""
    manifest = overlay.manifest
    info = TaskInfo(
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
    texts = InputEncoder(
        backbone.tokenizer, backbone.config, manifest.template, manifest.max_tokens
    )
    return LoadedTask(info, Servable(manifest.task, version.digest, overlay), texts)


def _same(known: LoadedTask, info: VersionInfo) -> bool:
    return (known.info.version, known.info.digest) == (info.version, info.digest)
