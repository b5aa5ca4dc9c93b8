"""Any sequence of changes to a store leaves what a plain dictionary model says it must."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from model_store.bucket import Bucket
from model_store.errors import ConflictError, NotFoundError
from model_store.store import Store, open_store
from tests.model_store.example_artifacts import example_artifact

TASKS = st.sampled_from(["mood", "topic"])
CONTENTS = st.binary(max_size=2)
NUMBERS = st.integers(min_value=1, max_value=5)


@dataclass
class Task:
    """What a task should be: content by version, and versions in order of activation."""

    versions: dict[int, bytes] = field(default_factory=dict)
    activations: list[int] = field(default_factory=list)
    given_out: int = 0
    resting: bool = False

    @property
    def active(self) -> int | None:
        return self.activations[-1] if self.activations and not self.resting else None

    def activate(self, number: int) -> None:
        if number != self.active:
            self.activations = [past for past in self.activations if past != number] + [number]
        self.resting = False


class StoreMachine(RuleBasedStateMachine):
    """Each rule does the same to a store and to the model; `agrees` compares with a fresh store."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.expected: dict[str, Task] = {"mood": Task(), "topic": Task()}

    @property
    def store(self) -> Store:
        return Store(self.root / "store")

    def files(self) -> int:
        """How many files there are with versions."""
        return len(list(self.store.root.glob("tasks/*/*.safetensors")))

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(task=TASKS, content=CONTENTS, activate=st.booleans())
    def publish(self, task: str, content: bytes, activate: bool) -> None:
        info = self.store.publish(example_artifact(task, content), activate=activate)
        expected = self.expected[task]
        known = [number for number, old in expected.versions.items() if old == content]
        if not known:
            expected.given_out += 1
            expected.versions[expected.given_out] = content
            known = [expected.given_out]
        if activate:
            expected.activate(known[0])
        assert info.version == known[0]
        assert info.active == (expected.active == info.version)

    @rule(task=TASKS, number=NUMBERS)
    def activate(self, task: str, number: int) -> None:
        expected = self.expected[task]
        if number in expected.versions:
            assert self.store.activate(task, number).active
            expected.activate(number)
        else:
            with pytest.raises(NotFoundError):
                self.store.activate(task, number)

    @rule(task=TASKS)
    def roll_back(self, task: str) -> None:
        expected = self.expected[task]
        if len(expected.activations) > 1 or (expected.activations and expected.resting):
            if not expected.resting:
                expected.activations.pop()
            expected.resting = False
            assert self.store.roll_back(task).version == expected.active
        else:
            with pytest.raises(ConflictError if expected.versions else NotFoundError):
                self.store.roll_back(task)

    @rule(task=TASKS)
    def deactivate(self, task: str) -> None:
        expected = self.expected[task]
        if expected.active is None:
            with pytest.raises(NotFoundError):
                self.store.deactivate(task)
        else:
            self.store.deactivate(task)
            expected.resting = True

    @rule(task=TASKS, number=NUMBERS)
    def delete_version(self, task: str, number: int) -> None:
        expected = self.expected[task]
        if number not in expected.versions:
            with pytest.raises(NotFoundError):
                self.store.delete(task, number)
        elif number == expected.active:
            with pytest.raises(ConflictError):
                self.store.delete(task, number)
        else:
            self.store.delete(task, number)
            del expected.versions[number]
            expected.activations = [past for past in expected.activations if past != number]
            expected.resting = expected.resting and bool(expected.activations)

    @rule(task=TASKS)
    def delete_task(self, task: str) -> None:
        expected = self.expected[task]
        if expected.versions:
            self.store.delete(task)
            expected.versions, expected.activations, expected.resting = {}, [], False
        else:
            with pytest.raises(NotFoundError):
                self.store.delete(task)

    @invariant()
    def agrees(self) -> None:
        store = self.store
        actives = {task: info.version for task, info in store.tasks().items()}
        assert actives == {
            name: task.active for name, task in self.expected.items() if task.active is not None
        }
        assert self.files() == sum(len(task.versions) for task in self.expected.values())
        for name, task in self.expected.items():
            if task.versions:
                infos = store.versions(name)
                assert [info.version for info in infos] == sorted(task.versions)
                for number, content in task.versions.items():
                    assert store.read(name, number)[1] == content


class ObjectStoreMachine(StoreMachine):
    """The same laws for a store in an object store: one in this process's memory."""

    @property
    def store(self) -> Store:
        return open_store(f"memory:/{self.root}/store", self.root / "cache")

    def files(self) -> int:
        return len(Bucket(self.store.location).names("tasks"))

    def teardown(self) -> None:
        bucket = Bucket(self.store.location)
        bucket.remove(bucket.names("tasks") + bucket.names("registry"))
        super().teardown()


ANY_SEQUENCE = settings(max_examples=40, stateful_step_count=25, deadline=None)
StoreMachine.TestCase.settings = ANY_SEQUENCE
TestAnySequence = StoreMachine.TestCase
ObjectStoreMachine.TestCase.settings = ANY_SEQUENCE
TestAnySequenceInAnObjectStore = ObjectStoreMachine.TestCase
