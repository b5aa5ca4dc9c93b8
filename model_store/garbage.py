"""What a store holds that nothing needs: old versions, unused backbones, what killed writers left.

Decides what that is, of a registry alone; the store deletes it in one change. In doubt a thing is
needed: what is young may be under way, and what cannot be read may be anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf

from model_store.manifest import read_header
from model_store.registry import Registry, TaskRecord, VersionRecord
from model_store.storage import Leftover
from model_store.store import BackboneInfo, Store, VersionInfo, version_info

UNDER_WAY_S = 3600.0
"""So long after it was published or written, a thing counts as one that is under way."""


@dataclass(frozen=True)
class Rule:
    """What is garbage.

    `keep`: so many of the newest versions of each task are not. `before`: what was published or
    written since this Unix time is not. `backbones`: whether one that no version is for is.
    """

    keep: int
    before: float
    backbones: bool = False


@dataclass(frozen=True)
class Garbage:
    """What is to be deleted, or was."""

    versions: tuple[VersionInfo, ...]
    backbones: tuple[BackboneInfo, ...]
    leftovers: tuple[Leftover, ...]

    @property
    def bytes(self) -> int:
        """Of all of it."""
        groups = (self.versions, self.backbones, self.leftovers)
        return sum(item.bytes for group in groups for item in group)


def look(store: Store, rule: Rule) -> Garbage:
    """What `collect` would delete now. Changes nothing."""
    registry = store.registry()
    after = _Cleaner(store, rule).clean(registry)
    return Garbage(*_difference(registry, after), store.leftovers(rule.before))


def collect(store: Store, rule: Rule) -> Garbage:
    """Delete it, in one step that no crash leaves half done; gives what was deleted.

    Decided anew of the registry that is changed, so that whatever others do meanwhile counts.
    Raises `StoreError` where unused backbones are looked for and a version cannot be read.
    """
    leftovers = store.leftovers(rule.before)
    before, after = store.collect(_Cleaner(store, rule).clean, rule.before)
    left = set(store.leftovers(rule.before)) if leftovers else set()
    gone = tuple(item for item in leftovers if item not in left)
    return Garbage(*_difference(before, after), gone)


class _Cleaner:
    """What must be known besides the registry, looked up before anybody is kept waiting."""

    def __init__(self, store: Store, rule: Rule) -> None:
        self._rule = rule
        self._backbone_of: dict[str, str] = {}
        self._put_at: dict[str, float] = {}
        if rule.backbones:
            self._put_at = {
                info.fingerprint: store.backbone_time(info.fingerprint)
                for info in store.backbones()
            }
            for info in store.all_versions():
                manifest = read_header(store.read(info.task, info.version)[1])[0]
                self._backbone_of[info.digest] = manifest.backbone.fingerprint

    def clean(self, registry: Registry) -> Registry:
        """The registry without what nothing needs."""
        versions = {
            task: unneeded
            for task, record in registry.tasks.items()
            if (unneeded := self._unneeded(record))
        }
        after = registry.without(versions)
        if self._rule.backbones:
            after = registry.without(versions, self._unused(after))
        return after

    def _unneeded(self, record: TaskRecord) -> set[int]:
        newest = sorted(record.versions, reverse=True)[: self._rule.keep]
        canary = record.canary.version if record.canary else None
        # The end of the history is what rolling back would go to.
        needed = {record.active, canary, record.shadow, *record.history[-1:], *newest}
        return {
            number
            for number, version in record.versions.items()
            if number not in needed and _published(version) < self._rule.before
        }

    def _unused(self, registry: Registry) -> set[str]:
        digests = {
            version.digest
            for record in registry.tasks.values()
            for version in record.versions.values()
        }
        if digests - self._backbone_of.keys():
            return set()  # published while we looked: for which backbone, is not known
        used = {self._backbone_of[digest] for digest in digests}
        return {
            fingerprint
            for fingerprint in registry.backbones
            if fingerprint not in used and self._put_at.get(fingerprint, inf) < self._rule.before
        }


def _published(version: VersionRecord) -> float:
    try:
        return datetime.fromisoformat(version.published_at).timestamp()
    except ValueError:
        return inf


def _difference(
    before: Registry, after: Registry
) -> tuple[tuple[VersionInfo, ...], tuple[BackboneInfo, ...]]:
    def kept(task: str) -> Mapping[int, VersionRecord]:
        return after.tasks.get(task, TaskRecord()).versions

    versions = tuple(
        version_info(before, task, number)
        for task, record in sorted(before.tasks.items())
        for number in sorted(record.versions)
        if number not in kept(task)
    )
    backbones = tuple(
        BackboneInfo(record.name, fingerprint, record.bytes)
        for fingerprint, record in before.backbones.items()
        if fingerprint not in after.backbones
    )
    return versions, backbones
