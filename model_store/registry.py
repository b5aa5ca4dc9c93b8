"""What a store holds, as one immutable record, and the changes that may be made to it.

Pure: every change takes a registry and returns another. Knows no files (`store.py` reads and
writes them) and nothing of what an artifact is beyond its digest and size.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from model_store.errors import ConflictError, NotFoundError
from model_store.manifest import Fingerprint, Frozen, TaskName

Number = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]
BackboneName = Annotated[str, Field(min_length=1, max_length=200)]


ObjectName = Annotated[str, Field(pattern=r"^[0-9]{10}-[0-9a-f]{32}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class VersionRecord(Frozen):
    """One published artifact. `published_at` is UTC in ISO 8601.

    `file` is its object's name in an object store; in a folder the version's number names it.
    """

    digest: Fingerprint
    published_at: str
    bytes: Bytes
    file: ObjectName | None = None


class Canary(Frozen):
    """A version that answers `percent` of a task's requests in place of the active one."""

    version: Number
    percent: Annotated[float, Field(gt=0, lt=100)]


class TaskRecord(Frozen):
    """The versions of one task. A deleted task stays as a record without versions: numbers are
    never given out twice.

    `history` holds the versions that were active before, the latest last, each once. `shadow` is
    a version that answers too, only to be compared. Both it and a canary stand beside the active
    version, and so are never that one.
    """

    next_version: Number = 1
    active: Number | None = None
    history: tuple[Number, ...] = ()
    versions: dict[Number, VersionRecord] = {}
    canary: Canary | None = None
    shadow: Number | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        named = list(self.history) if self.active is None else [*self.history, self.active]
        if len(set(named)) != len(named):
            raise ValueError(f"history: {list(self.history)} repeats a version or the active one")
        missing = set(named) - set(self.versions)
        if missing:
            raise ValueError(
                f"versions: {sorted(missing)} named as active or before, but not there"
            )
        canary = self.canary.version if self.canary else None
        for name, number in (("canary", canary), ("shadow", self.shadow)):
            if number is not None and not self.may_stand_beside(number):
                raise ValueError(f"{name}: version {number} is active, or not there")
        if self.versions and max(self.versions) >= self.next_version:
            raise ValueError(f"next_version: {self.next_version} is taken already")
        return self

    def may_stand_beside(self, number: int) -> bool:
        """Whether a version can be a canary or a shadow: it is there, and another is active."""
        return number in self.versions and self.active not in (None, number)


class StoredFiles(Frozen):
    """Where a backbone's files lie in an object store, and the SHA-256 of each by its name."""

    folder: ObjectName
    digests: dict[FileName, Fingerprint]


class BackboneRecord(Frozen):
    """One backbone: the name that people use for it, and the size of its folder.

    `stored` is for object stores; in a folder the fingerprint names the place.
    """

    name: BackboneName
    bytes: Bytes
    stored: StoredFiles | None = None


class Registry(Frozen):
    """Everything that the store's registry file says."""

    format_version: Literal[1] = 1
    generation: Annotated[int, Field(ge=0)] = 0
    """How many changes were written before this state: replicas say by it how far they are."""
    backbones: dict[Fingerprint, BackboneRecord] = {}
    tasks: dict[TaskName, TaskRecord] = {}
    uploads_from: Annotated[int, Field(ge=1)] | None = None
    """In an object store: uploads of changes that began before this one of its generations, and
    that are not named here, never will be. None: nobody has collected any yet."""

    @model_validator(mode="after")
    def _names_backbones_once(self) -> Self:
        names = [record.name for record in self.backbones.values()]
        if len(set(names)) != len(names):
            raise ValueError(f"backbones: a name stands twice in {sorted(names)}")
        return self

    def task(self, task: str) -> TaskRecord:
        """The record of a task that has versions. Raises `NotFoundError` that lists the tasks."""
        record = self.tasks.get(task)
        if record is None or not record.versions:
            there = (name for name, known in self.tasks.items() if known.versions)
            raise NotFoundError(f"no task {task[:80]!r} in the store; it has: {listed(there)}")
        return record

    def version(self, task: str, number: int) -> VersionRecord:
        """The record of one version. Raises `NotFoundError` that lists the task's versions."""
        versions = self.task(task).versions
        if number not in versions:
            raise NotFoundError(
                f"task {task!r} has no version {number}; it has: {listed(map(str, versions))}"
            )
        return versions[number]

    def active(self, task: str) -> int:
        """The number of the active version. Raises `NotFoundError` for a task without one."""
        record = self.task(task)
        if record.active is None:
            raise NotFoundError(
                f"task {task!r} has no active version; activate one of: "
                f"{listed(map(str, record.versions))}"
            )
        return record.active

    def next_version(self, task: str) -> int:
        """The number that the task's next new version gets."""
        return self.tasks.get(task, TaskRecord()).next_version

    def number_of(self, task: str, digest: str) -> int | None:
        """The number under which a task's artifact of this digest is published already."""
        record = self.tasks.get(task, TaskRecord())
        found = (number for number, known in record.versions.items() if known.digest == digest)
        return next(found, None)

    def with_version(self, task: str, number: int, version: VersionRecord) -> "Registry":
        """Publish: add a version under the task's next number."""
        record = self.tasks.get(task, TaskRecord())
        assert number == record.next_version, (task, number, record.next_version)
        versions = {**record.versions, number: version}
        return self._with_task(task, record, next_version=number + 1, versions=versions)

    def with_file(self, task: str, number: int, file: str | None) -> "Registry":
        """Put a version's bytes under another name."""
        version = self.version(task, number).model_copy(update={"file": file})
        record = self.task(task)
        return self._with_task(task, record, versions={**record.versions, number: version})

    def with_active(self, task: str, number: int) -> "Registry":
        """Activate a version; the one active before becomes the latest of the history."""
        self.version(task, number)
        record = self.task(task)
        if record.active == number:
            return self
        before = () if record.active is None else (record.active,)
        history = (*(past for past in record.history if past != number), *before)
        return self._with_task(task, record, active=number, history=history)

    def rolled_back(self, task: str) -> "Registry":
        """Activate the version that was active before. The one left is not kept in the history, so
        that rolling back again goes further back. Raises `ConflictError` where there is none."""
        record = self.task(task)
        if not record.history:
            raise ConflictError(
                f"task {task!r}: no version was active before, so there is none to roll back to; "
                f"activate one of: {listed(map(str, record.versions))}"
            )
        *history, active = record.history
        return self._with_task(task, record, active=active, history=tuple(history))

    def without_active(self, task: str) -> "Registry":
        """Have no version answer; the one that did becomes the latest of the history, so that
        rolling back brings it back. Raises `NotFoundError` where none is active."""
        active, record = self.active(task), self.task(task)
        return self._with_task(task, record, active=None, history=(*record.history, active))

    def with_canary(self, task: str, number: int, percent: float) -> "Registry":
        """Have a version answer a share of the requests. Raises `ConflictError` for the active one,
        and for a share that is none."""
        if not 0 < percent < 100:
            raise ConflictError(
                f"task {task!r}: a canary of {percent} % was asked for; expected more than 0 and "
                "less than 100; for all requests activate the version, for none clear the canary"
            )
        record = self._beside(task, number, "canary")
        return self._with_task(task, record, canary=Canary(version=number, percent=percent))

    def with_shadow(self, task: str, number: int) -> "Registry":
        """Have a version answer besides the active one, only to be compared with it."""
        return self._with_task(task, self._beside(task, number, "shadow"), shadow=number)

    def without_canary(self, task: str) -> "Registry":
        """Have the active version answer all requests again."""
        return self._with_task(task, self.task(task), canary=None)

    def without_shadow(self, task: str) -> "Registry":
        """Compare the active version with none."""
        return self._with_task(task, self.task(task), shadow=None)

    def without_task(self, task: str) -> "Registry":
        """Delete all versions of a task; its next number stays."""
        return self._with_task(task, TaskRecord(next_version=self.task(task).next_version))

    def without_version(self, task: str, number: int) -> "Registry":
        """Delete one version. Raises `ConflictError` for the active one."""
        return self.without({task: (number,)})

    def without(
        self, versions: Mapping[str, Collection[int]], backbones: Collection[str] = ()
    ) -> "Registry":
        """Delete versions of several tasks and backbones in one step. Raises `ConflictError` for an
        active version, and `NotFoundError` for one that is not there."""
        tasks = {task: self._record_without(task, numbers) for task, numbers in versions.items()}
        kept = {known: record for known, record in self.backbones.items() if known not in backbones}
        return self._changed(backbones=kept, tasks={**self.tasks, **tasks})

    def with_uploads_from(self, generation: int) -> "Registry":
        """Have what was uploaded for a change that began before this generation be named no more,
        unless it is named already."""
        changes = {"uploads_from": generation, "generation": self.generation + 1}
        return self.model_copy(update=changes)

    def with_backbone(self, fingerprint: str, backbone: BackboneRecord) -> "Registry":
        """Add a backbone, or rename a known one. Raises `ConflictError` for another's name."""
        for known, record in self.backbones.items():
            if record.name == backbone.name and known != fingerprint:
                raise ConflictError(
                    f"the name {backbone.name!r} is taken by backbone {known[:12]}, and this one "
                    f"is {fingerprint[:12]}; give it another name"
                )
        backbones = {**self.backbones, fingerprint: backbone}
        return self._changed(backbones=backbones)

    def fingerprint_of(self, text: str) -> str:
        """The one backbone whose name is `text` or whose fingerprint starts with it.

        Raises `NotFoundError` that lists the backbones when there is none, or several.
        """
        named = [known for known, record in self.backbones.items() if record.name == text]
        found = named or [known for known in self.backbones if text and known.startswith(text)]
        if len(found) != 1:
            there = listed(
                f"{record.name} ({known[:12]})" for known, record in self.backbones.items()
            )
            problem = "several backbones match" if found else "no backbone"
            raise NotFoundError(f"{problem} {text[:80]!r} in the store; it has: {there}")
        return found[0]

    def _beside(self, task: str, number: int, role: str) -> TaskRecord:
        self.version(task, number)
        record = self.task(task)
        if not record.may_stand_beside(number):
            reason = "no version is active" if record.active is None else "it is the active version"
            raise ConflictError(
                f"task {task!r}: version {number} cannot be a {role}: {reason}; "
                "a canary or a shadow stands beside another version that is active"
            )
        return record

    def _record_without(self, task: str, numbers: Collection[int]) -> TaskRecord:
        record = self.task(task)
        for number in numbers:
            self.version(task, number)
            if record.active == number:
                raise ConflictError(
                    f"task {task!r}: version {number} is active and is not deleted; activate "
                    f"another version first, or delete the whole task"
                )
        history = tuple(past for past in record.history if past not in numbers)
        versions = {known: kept for known, kept in record.versions.items() if known not in numbers}
        return _changed_record(record, history=history, versions=versions)

    def _with_task(self, task: str, record: TaskRecord, **changes: object) -> "Registry":
        return self._changed(tasks={**self.tasks, task: _changed_record(record, **changes)})

    def _changed(
        self,
        backbones: dict[str, BackboneRecord] | None = None,
        tasks: dict[str, TaskRecord] | None = None,
    ) -> "Registry":
        """The next generation, or this one where nothing differs."""
        there = Registry(
            generation=self.generation + 1,
            backbones=self.backbones if backbones is None else backbones,
            tasks=self.tasks if tasks is None else tasks,
            uploads_from=self.uploads_from,
        )
        same = there.backbones == self.backbones and there.tasks == self.tasks
        return self if same else there


def _changed_record(record: TaskRecord, **changes: object) -> TaskRecord:
    """A task's record changed; a canary or shadow that the change leaves no place is gone."""
    fields: dict[str, Any] = dict(record) | changes
    bare = TaskRecord(**fields | {"canary": None, "shadow": None})
    canary, shadow = fields["canary"], fields["shadow"]
    if canary and not bare.may_stand_beside(canary.version):
        canary = None
    if shadow and not bare.may_stand_beside(shadow):
        shadow = None
    return TaskRecord(**fields | {"canary": canary, "shadow": shadow})


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for an error message: at most `most`, in the order given, or `nothing`."""
    given = list(names)
    shown = ", ".join(given[:most]) or "nothing"
    return shown if len(given) <= most else f"{shown} and {len(given) - most} more"
