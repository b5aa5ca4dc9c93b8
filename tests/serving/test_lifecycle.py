"""Changes of what is served, on several replicas in one process that share a store and a board."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from model_store import artifact
from model_store.backbone import Backbone
from model_store.errors import (
    ArtifactError,
    ConflictError,
    GoldenMismatchError,
    NotFoundError,
)
from model_store.store import Store
from serving import lifecycle as lifecycle_module
from serving.board import Board
from serving.config import ServeConfig
from serving.errors import ForbiddenError, NotReadyError, UnknownTaskError
from serving.metrics import Metrics
from serving.service import Service
from serving.types import Ask, Caller, Operation
from tests.overlays import random_artifact, random_overlay, small_backbone
from tests.waiting import wait_until

OPS = Caller("ops", frozenset(("admin",)))
TEXTS = ["the film was good", "a"]


@dataclasses.dataclass
class Fleet:
    """Replicas, and what they share."""

    store: Store
    backbone: Backbone
    board: Board
    replicas: list[Service]

    def artifact(self, seed: int, task: str = "mood") -> bytes:
        """The bytes of a version that answers in its own way."""
        return random_artifact(self.backbone, task, seed=seed)

    def versions(self, task: str = "mood", **ask: Any) -> list[int]:
        """Which version each replica answers with."""
        return [run(one.predict(task, TEXTS, Ask(**ask))).version for one in self.replicas]

    def add(self) -> Service:
        """One more replica."""
        name = f"replica-{len(self.replicas) + 1}"
        config = ServeConfig.of(store=self.store.root, precision="fp32", device="cpu")
        self.replicas.append(Service.open(config, Metrics(), self.board, name))
        wait_until(lambda: name in self.board.members())
        return self.replicas[-1]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    store, backbone = small_backbone(tmp_path)
    fleet = Fleet(store, backbone, Board(), [])
    store.publish(artifact.verify(fleet.artifact(1), backbone.config, backbone.fingerprint))
    for _ in range(3):
        fleet.add()
    yield fleet
    for replica in fleet.replicas:
        replica.close()


def register(fleet: Fleet, seed: int, replica: int = 0, **options: Any) -> Operation:
    found: Operation = run(
        fleet.replicas[replica].lifecycle.register("mood", fleet.artifact(seed), OPS, **options)
    )
    return found


# --- what each change does ------------------------------------------------------------------------


def test_a_registered_version_answers_on_every_replica_when_the_call_ends(fleet: Fleet) -> None:
    assert fleet.versions() == [1, 1, 1]
    done = register(fleet, 2)
    assert fleet.versions() == [2, 2, 2]
    assert (done.state, done.version, done.created) == ("done", 2, True)
    assert (done.replicas, done.ready, done.by) == (3, 3, "ops")
    assert done.digest == fleet.store.versions("mood")[1].digest
    again = register(fleet, 2, replica=1)
    assert (again.version, again.created, again.ready) == (2, False, 3)
    assert len(fleet.store.versions("mood")) == 2


def test_who_does_not_wait_gets_an_operation_that_never_goes_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly its beginning is noted, that does not take back what it has reached."""
    noted: list[str] = []
    put = Board.put_operation

    def slow(board: Board, operation: Operation, owner: str) -> None:
        if not operation.step:
            time.sleep(0.2)
        noted.append(operation.step or operation.state)
        put(board, operation, owner)

    monkeypatch.setattr(Board, "put_operation", slow)
    operation = run(fleet.replicas[0].lifecycle.activate("mood", 1, OPS, wait=False))

    def state() -> str:
        found: Operation = run(fleet.replicas[1].lifecycle.operation(operation.id))
        return found.state

    wait_until(lambda: state() != "running")
    assert state() == "done"
    assert (noted[0], noted[-1]) == ("running", "done")


def test_who_hangs_up_while_a_change_is_noted_does_not_stop_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Board.put_operation

    def slow(board: Board, operation: Operation, owner: str) -> None:
        time.sleep(0.2)
        put(board, operation, owner)

    monkeypatch.setattr(Board, "put_operation", slow)

    async def hang_up() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await fleet.replicas[0].lifecycle.activate("mood", 1, OPS, wait=False)
        await asyncio.sleep(0.5)

    run(hang_up())
    monkeypatch.setattr(Board, "put_operation", put)
    (operation,) = fleet.board.operations()
    wait_until(lambda: fleet.board.operations()[0].state != "running")
    assert fleet.board.operations()[0].state == "done", operation


def test_a_version_may_be_published_and_activated_later(fleet: Fleet) -> None:
    assert register(fleet, 2, activate=False).version == 2
    assert fleet.versions() == [1, 1, 1]
    assert fleet.versions(version=2) == [2, 2, 2]
    chosen = [fleet.replicas[0].chosen("mood", Ask(version=version)) for version in (1, 2, 9)]
    assert chosen == [1, 2, None]
    done = run(fleet.replicas[2].lifecycle.activate("mood", 2, OPS))
    assert (done.kind, done.ready) == ("activate", 3)
    assert fleet.versions() == [2, 2, 2]
    done = run(fleet.replicas[1].lifecycle.roll_back("mood", OPS))
    assert (done.kind, done.version, done.ready) == ("rollback", 1, 3)
    assert fleet.versions() == [1, 1, 1]
    with pytest.raises(ConflictError, match="no version was active before"):
        run(fleet.replicas[1].lifecycle.roll_back("mood", OPS))
    with pytest.raises(NotFoundError, match="no version 9"):
        run(fleet.replicas[1].lifecycle.activate("mood", 9, OPS))


def test_a_canary_answers_its_share_the_same_on_every_replica(fleet: Fleet) -> None:
    register(fleet, 2, activate=False)
    done = run(fleet.replicas[0].lifecycle.set_canary("mood", 2, 50.0, OPS))
    assert (done.kind, done.version, done.ready) == ("canary", 2, 3)
    info = fleet.replicas[1].task("mood")
    assert (info.version, info.canary and info.canary.version) == (1, 2)
    seen = [tuple(fleet.versions(request_id=f"id-{number}")) for number in range(40)]
    assert set(seen) == {(1, 1, 1), (2, 2, 2)}, "a request id gets one version everywhere"
    one = fleet.replicas[1]
    assert [one.chosen("mood", Ask(f"id-{number}")) for number in range(40)] == [
        versions[1] for versions in seen
    ], "also for a request that is given no answer"
    for version in (1, 2):
        labels = {"task": "mood", "version": str(version)}
        forwards = "taskbone_forward_duration_seconds_count"
        counted = one._metrics.registry.get_sample_value(forwards, labels)
        assert counted == seen.count((version,) * 3), "each under the version that answered"
    run(fleet.replicas[2].lifecycle.clear_canary("mood", OPS))
    assert {tuple(fleet.versions(request_id=f"id-{number}")) for number in range(10)} == {(1, 1, 1)}
    assert fleet.replicas[0].task("mood").canary is None


def test_a_shadow_is_compared_and_not_returned(fleet: Fleet) -> None:
    register(fleet, 2, activate=False)
    run(fleet.replicas[0].lifecycle.set_shadow("mood", 2, OPS))
    replica = fleet.replicas[0]
    metrics: Metrics = replica._metrics

    async def ask() -> set[int]:
        answers = [await replica.predict("mood", TEXTS) for _ in range(5)]
        await asyncio.gather(*replica._shadow._running)
        return {answer.version for answer in answers}

    assert run(ask()) == {1}
    counts = [
        metrics.registry.get_sample_value(
            "taskbone_shadow_inputs_total", {"task": "mood", "result": result}
        )
        or 0
        for result in ("same", "different")
    ]
    assert sum(counts) == 5 * len(TEXTS)
    expected = [
        [one.label for one in run(replica.predict("mood", TEXTS, Ask(version=number))).predictions]
        for number in (1, 2)
    ]
    same = sum(one == two for one, two in zip(*expected, strict=True))
    assert counts[0] == 5 * same
    run(replica.lifecycle.clear_shadow("mood", OPS))
    assert replica.task("mood").shadow is None


def test_deleting_waits_for_what_is_under_way(fleet: Fleet) -> None:
    register(fleet, 2)
    table = fleet.replicas[1]._tasks
    lifecycle = fleet.replicas[0].lifecycle
    with table.using("mood", Ask()):
        operation = run(lifecycle.delete("mood", None, OPS, wait=False))
        wait_until(lambda: run(lifecycle.operation(operation.id)).step == "drain")
        wait_until(lambda: run(lifecycle.operation(operation.id)).ready == 2)
        with pytest.raises(UnknownTaskError):
            fleet.replicas[1].task("mood")
        assert run(lifecycle.operation(operation.id)).state == "running"
    wait_until(lambda: run(lifecycle.operation(operation.id)).state == "done")
    assert fleet.store.task_names() == []
    assert not (fleet.store.root / "tasks" / "mood").exists()


def test_a_deactivated_task_answers_nowhere_until_it_is_brought_back(fleet: Fleet) -> None:
    lifecycle = fleet.replicas[0].lifecycle
    register(fleet, 2)
    with fleet.replicas[1]._tasks.using("mood", Ask()):
        operation = run(lifecycle.deactivate("mood", OPS, wait=False))
        wait_until(lambda: run(lifecycle.operation(operation.id)).ready == 2)
        assert run(lifecycle.operation(operation.id)).state == "running"
    wait_until(lambda: run(lifecycle.operation(operation.id)).state == "done")
    for replica in fleet.replicas:
        with pytest.raises(UnknownTaskError):
            run(replica.predict("mood", TEXTS))
    with pytest.raises(NotFoundError, match="no active version"):
        run(lifecycle.deactivate("mood", OPS))
    run(lifecycle.roll_back("mood", OPS))
    assert fleet.versions() == [2, 2, 2]


def test_the_active_version_is_not_deleted_and_another_is(fleet: Fleet) -> None:
    register(fleet, 2)
    lifecycle = fleet.replicas[0].lifecycle
    assert fleet.versions(version=1) == [1, 1, 1]
    with pytest.raises(ConflictError, match="version 2 is active"):
        run(lifecycle.delete("mood", 2, OPS))
    run(lifecycle.delete("mood", 1, OPS))
    for replica in fleet.replicas:
        with pytest.raises(NotFoundError, match="no version 1"):
            run(replica.predict("mood", TEXTS, Ask(version=1)))
    digests = [digest for one in fleet.replicas for digest in one._tasks.digests()]
    assert len(set(digests)) == 1, "what was deleted is gone from memory, too"


# --- who learns of it -----------------------------------------------------------------------------


def test_what_was_changed_without_the_server_is_taken_up(fleet: Fleet) -> None:
    backbone = fleet.backbone
    data = fleet.artifact(2)
    fleet.store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))
    wait_until(lambda: fleet.versions() == [2, 2, 2])
    fleet.store.roll_back("mood")
    wait_until(lambda: fleet.versions() == [1, 1, 1])


def test_a_later_replica_knows_everything(fleet: Fleet) -> None:
    register(fleet, 2)
    register(fleet, 3, activate=False)
    run(fleet.replicas[0].lifecycle.set_canary("mood", 3, 30.0, OPS))
    late = fleet.add()
    assert late.task("mood") == fleet.replicas[0].task("mood")
    assert fleet.versions(request_id="some") in ([2] * 4, [3] * 4)
    assert register(fleet, 4).ready == 4


def test_an_operation_can_be_followed_from_any_replica(fleet: Fleet) -> None:
    operation = register(fleet, 2, wait=False)
    assert operation.state == "running"

    def find() -> Operation:
        found: Operation = run(fleet.replicas[2].lifecycle.operation(operation.id))
        return found

    wait_until(lambda: find().state != "running")
    found = find()
    assert (found.state, found.version, found.ready) == ("done", 2, 3)
    assert [one.id for one in run(fleet.replicas[1].lifecycle.operations())] == [operation.id]
    with pytest.raises(NotFoundError, match="no operation 'nothing'"):
        run(fleet.replicas[0].lifecycle.operation("nothing"))


def test_a_replica_that_ends_holds_nobody_up(fleet: Fleet) -> None:
    fleet.replicas.pop().close()
    assert register(fleet, 2).replicas == 2
    assert fleet.versions() == [2, 2]


# --- what goes wrong ------------------------------------------------------------------------------


def broken_golden(fleet: Fleet, seed: int) -> bytes:
    """An artifact that promises other answers than it gives."""
    overlay = random_overlay(fleet.backbone, "mood", seed=seed)
    golden = tuple(
        one.model_copy(update={"scores": one.scores[::-1]}) for one in overlay.manifest.golden
    )
    manifest = overlay.manifest.model_copy(update={"golden": golden})
    return artifact.write(dataclasses.replace(overlay, manifest=manifest))


def test_golden_inputs_that_disagree_leave_everything_as_it_was(fleet: Fleet) -> None:
    token = fleet.store.state_token()
    data = broken_golden(fleet, 2)
    with pytest.raises(GoldenMismatchError, match=r"golden input \d gives 'bad' 0.*promises 'bad'"):
        run(fleet.replicas[0].lifecycle.register("mood", data, OPS))
    assert fleet.store.state_token() == token
    assert fleet.versions() == [1, 1, 1]
    [operation] = run(fleet.replicas[1].lifecycle.operations())
    assert (operation.state, operation.error_type) == ("failed", "golden_mismatch")
    assert "promises" in operation.error


def test_a_version_that_one_replica_refuses_is_served_by_none(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one replica computes in another precision than the rest."""
    picky = fleet.replicas[2]._loader
    finish = picky._finish_trial

    def refuse(version: Any, trial: Any) -> None:
        finish(version, trial)
        if version.info.version == 2:
            raise GoldenMismatchError("gives something else here")

    monkeypatch.setattr(picky, "_finish_trial", refuse)
    with pytest.raises(ArtifactError, match="replica replica-3: gives something else here"):
        register(fleet, 2)
    assert fleet.versions() == [1, 1, 1]
    assert [info.version for info in fleet.store.versions("mood")] == [1]
    monkeypatch.undo()
    assert register(fleet, 2).version == 3, "numbers are never given out twice"


def test_a_replica_that_does_not_follow_fails_the_operation(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle_module, "WITHIN_S", 0.5)
    stuck = threading.Event()

    def hang(wanted: object) -> Iterator[Any]:
        stuck.wait(60)
        return iter(())

    monkeypatch.setattr(fleet.replicas[1]._loader, "load", hang)
    try:
        with pytest.raises(NotReadyError, match="'stage': ready on 2 of 3 replicas"):
            register(fleet, 2)
    finally:
        stuck.set()
    assert [info.version for info in fleet.store.versions("mood")] == [1]
    assert fleet.versions() == [1, 1, 1]


def test_a_key_for_other_tasks_changes_nothing(fleet: Fleet) -> None:
    other = Caller("team", frozenset(("admin",)), frozenset(("other",)))
    lifecycle = fleet.replicas[0].lifecycle
    with pytest.raises(ForbiddenError, match="'team' is not for the task 'mood'"):
        run(lifecycle.register("mood", fleet.artifact(2), other))
    with pytest.raises(ForbiddenError):
        run(lifecycle.delete("mood", None, other))
    assert fleet.versions() == [1, 1, 1]


def test_everything_stands_in_the_audit_log(fleet: Fleet) -> None:
    lifecycle = fleet.replicas[0].lifecycle
    register(fleet, 2)
    with pytest.raises(ConflictError):
        run(lifecycle.delete("mood", 2, OPS))
    run(lifecycle.roll_back("mood", OPS))
    entries = [
        (entry.by, entry.action, entry.task, entry.version, entry.result)
        for entry in fleet.store.audit(10)
    ]
    assert entries == [
        ("ops", "register", "mood", 2, "done"),
        ("ops", "delete", "mood", 2, "conflict"),
        ("ops", "rollback", "mood", 1, "done"),
    ]
    assert fleet.store.audit(10)[0].digest == fleet.store.versions("mood")[1].digest


# --- all at once ----------------------------------------------------------------------------------


def test_changes_from_everywhere_at_once_leave_one_truth(fleet: Fleet) -> None:
    """Requests go on meanwhile, and each answer is one version's own."""
    wanted = {
        number: [
            list(one.scores.values())
            for one in run(fleet.replicas[0].predict("mood", TEXTS)).predictions
        ]
        for number in [register(fleet, seed).version for seed in (2, 3, 4)][-1:]
    }
    for number in (1, 2, 3):
        answer = run(fleet.replicas[0].predict("mood", TEXTS, Ask(version=number)))
        wanted[number] = [list(one.scores.values()) for one in answer.predictions]
    done = threading.Event()
    wrong: list[Any] = []

    def ask(replica: Service) -> None:
        while not done.is_set():
            answer = run(replica.predict("mood", TEXTS))
            if [list(one.scores.values()) for one in answer.predictions] != wanted[answer.version]:
                wrong.append(answer)

    def change(work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        for _ in range(3):
            with suppress(ConflictError):  # a canary that is the active version by then
                run(work())

    askers = [threading.Thread(target=ask, args=[one]) for one in fleet.replicas]
    changes: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: fleet.replicas[0].lifecycle.activate("mood", 1, OPS),
        lambda: fleet.replicas[1].lifecycle.activate("mood", 2, OPS),
        lambda: fleet.replicas[2].lifecycle.register("mood", fleet.artifact(3), OPS),
        lambda: fleet.replicas[0].lifecycle.set_canary("mood", 4, 40.0, OPS),
    ]
    workers = [threading.Thread(target=change, args=[one]) for one in changes]
    for thread in (*askers, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    for thread in askers:
        thread.join()
    assert wrong == []
    assert len({repr(replica.task("mood")) for replica in fleet.replicas}) == 1


def test_one_that_fails_says_at_which_step(fleet: Fleet) -> None:
    lifecycle = fleet.replicas[0].lifecycle
    begun = run(lifecycle.register("mood", fleet.artifact(2)[:-40], OPS, wait=False))

    def failed() -> Operation:
        found: Operation = run(lifecycle.operation(begun.id))
        return found

    wait_until(lambda: failed().state == "failed")
    assert (failed().step, failed().error_type) == ("verify", "invalid_artifact")
    assert "not a whole safetensors file" in failed().error
