"""The service without HTTP: right answers, registration in every outcome, a changing store."""

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model_store import artifact
from model_store.artifact import Overlay, probabilities
from model_store.backbone import Backbone
from model_store.errors import (
    ArtifactError,
    BackboneMismatchError,
    GoldenMismatchError,
    NotFoundError,
    StoreError,
)
from model_store.manifest import METADATA_KEY, TextInput
from model_store.native import builds
from model_store.plan import LinearHead
from model_store.store import Store
from serving.board import Board
from serving.config import ServeConfig
from serving.errors import (
    ForbiddenError,
    InvalidInputError,
    OverloadedError,
    TooLargeError,
    UnknownTaskError,
)
from serving.metrics import Metrics
from serving.service import Service
from serving.types import ANYBODY, Ask, Caller, TaskAnswer
from tests.overlays import fp32_encoder, random_artifact, random_overlay, small_backbone
from tests.waiting import wait_until

TEXTS: list[TextInput] = ["the film was good", "a", "what is my new bank card ?"]


@pytest.fixture
def place(tmp_path: Path) -> tuple[Store, Backbone]:
    """A store with two tasks, one of them on pairs."""
    store, backbone = small_backbone(tmp_path)
    _publish(store, backbone, random_overlay(backbone, "mood"))
    _publish(store, backbone, random_overlay(backbone, "same", pairs=True, labels=("no", "yes")))
    return store, backbone


def _publish(store: Store, backbone: Backbone, overlay: Overlay) -> None:
    data = artifact.write(overlay)
    store.publish(artifact.verify(data, backbone.config, backbone.fingerprint))


def _open(store: Store, **settings: object) -> Service:
    config = ServeConfig.of(store=store.root, precision="fp32", device="cpu", **settings)
    return Service.open(config, Metrics(), Board())


@pytest.fixture
def service(place: tuple[Store, Backbone]) -> Iterator[Service]:
    service = _open(place[0], max_inputs=8)
    yield service
    service.close()


def _predict(service: Service, task: str, inputs: list[TextInput]) -> list[list[float]]:
    answer = asyncio.run(service.predict(task, inputs))
    for prediction in answer.predictions:
        assert prediction.scores[prediction.label] == prediction.score
        assert prediction.score == max(prediction.scores.values())
    return [list(prediction.scores.values()) for prediction in answer.predictions]


def _register(service: Service, task: str, data: bytes) -> tuple[int, bool]:
    done = asyncio.run(service.lifecycle.register(task, data, ANYBODY))
    assert done.version is not None
    return done.version, done.created


def test_answers_are_those_of_the_reference(
    service: Service, place: tuple[Store, Backbone]
) -> None:
    backbone = place[1]
    overlay = random_overlay(backbone, "mood")
    expected = probabilities(fp32_encoder(backbone), backbone, overlay, TEXTS)
    torch.testing.assert_close(torch.tensor(_predict(service, "mood", TEXTS)), expected)
    pairs: list[TextInput] = [("a cat", "the dog"), ("bad news", "good news")]
    overlay = random_overlay(backbone, "same", pairs=True, labels=("no", "yes"))
    expected = probabilities(fp32_encoder(backbone), backbone, overlay, pairs)
    torch.testing.assert_close(torch.tensor(_predict(service, "same", pairs)), expected)


def test_many_requests_at_once_get_their_own_answers(service: Service) -> None:
    alone = [_predict(service, "mood", [text])[0] for text in TEXTS]

    async def ask() -> list[list[float]]:
        answers = await asyncio.gather(
            *(service.predict("mood", [text]) for text in TEXTS * 20),
            *(service.predict("same", [("a cat", "a dog")]) for _ in range(20)),
        )
        return [list(answer.predictions[0].scores.values()) for answer in answers[: 20 * 3]]

    together = asyncio.run(ask())
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone * 20))


def test_texts_that_may_not_be_cut_are_refused_alone_and_among_many(service: Service) -> None:
    texts: list[TextInput] = ["a", "good " * 100]
    ask = Ask(truncate=False)
    assert len(asyncio.run(service.predict("mood", texts)).predictions) == 2
    with pytest.raises(InvalidInputError, match=r"inputs\[1\]: 10\d tokens"):
        asyncio.run(service.predict("mood", texts, ask))
    (refused,) = asyncio.run(service.predict_many(["mood"], texts, ask))
    assert isinstance(refused, InvalidInputError)
    assert len(asyncio.run(service.predict("mood", ["a"], ask)).predictions) == 1


def test_an_answer_says_what_it_weighed(service: Service) -> None:
    one, two = (asyncio.run(service.predict("mood", ["a good cat"] * n)).tokens for n in (1, 2))
    prompt = service.task("mood").prompt_tokens
    assert two == 2 * one
    assert one >= prompt + 5  # three words between the first token and the last


def test_timings_add_up(service: Service) -> None:
    timings = asyncio.run(service.predict("mood", TEXTS)).timings_ms
    parts = timings.tokenize_ms + timings.queue_ms + timings.forward_ms
    assert 0 < timings.forward_ms < timings.total_ms
    assert parts <= timings.total_ms


def test_what_is_the_callers_fault_says_so(service: Service) -> None:
    with pytest.raises(UnknownTaskError, match="no task 'absent'; tasks: mood, same"):
        _predict(service, "absent", TEXTS)
    with pytest.raises(InvalidInputError, match=r"inputs\[0\]: a pair was given"):
        _predict(service, "mood", [("a", "b")])
    with pytest.raises(InvalidInputError, match="at least one"):
        _predict(service, "mood", [])
    with pytest.raises(TooLargeError, match="9 given, one request may have 8"):
        _predict(service, "mood", ["a"] * 9)


WHOLE: dict[str, Any] = {"heads": (2, 0, 3), "scales": True, "norms": True, "delta_rank": 2}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_task_with_every_component_is_registered_and_answered(
    place: tuple[Store, Backbone], precision: str
) -> None:
    store, backbone = place
    if precision == "int8" and builds() in ([], ["avx2"]):
        pytest.skip("no native forward for int8 was built for this processor")
    service = Service.open(
        ServeConfig.of(store=store.root, precision=precision, device="cpu"), Metrics(), Board()
    )
    overlay = random_overlay(backbone, "recovered", seed=2, **WHOLE)
    try:
        shared = _predict(service, "mood", TEXTS)
        assert _register(service, "recovered", artifact.write(overlay)) == (1, True)
        expected = probabilities(fp32_encoder(backbone), backbone, overlay, TEXTS)
        tolerance = 1e-5 if precision == "fp32" else 0.06

        async def ask() -> list[list[float]]:
            names = ["recovered", "mood"] * 5
            answers = await asyncio.gather(*(service.predict(name, TEXTS) for name in names))
            return [list(item.scores.values()) for answer in answers for item in answer.predictions]

        given = torch.tensor(asyncio.run(ask())).view(5, 2, len(TEXTS), -1)
        for row in given:
            torch.testing.assert_close(row[0], expected, atol=tolerance, rtol=0)
            torch.testing.assert_close(row[1], torch.tensor(shared), atol=tolerance, rtol=0)
    finally:
        service.close()


def test_a_task_with_every_component_promises_its_golden_answers(
    service: Service, place: tuple[Store, Backbone]
) -> None:
    store, backbone = place
    overlay = random_overlay(backbone, "recovered", seed=2, **WHOLE)
    changes = {
        name: part * 1.5 if name.endswith(".up") else part for name, part in overlay.changes.items()
    }
    token = store.state_token()
    with pytest.raises(GoldenMismatchError, match="golden input"):
        _register(
            service, "recovered", artifact.write(dataclasses.replace(overlay, changes=changes))
        )
    assert store.state_token() == token


def test_a_refused_artifact_changes_nothing(
    service: Service, place: tuple[Store, Backbone], tmp_path: Path
) -> None:
    store, backbone = place
    token = store.state_token()
    good = random_artifact(backbone, "mood", seed=3)
    with pytest.raises(ArtifactError, match="of task 'mood', not of 'other'"):
        _register(service, "other", good)
    content = safetensors.torch.load(good)
    size = int.from_bytes(good[:8], "little")
    metadata = json.loads(good[8 : 8 + size])["__metadata__"]
    content["head.bias"] = content["head.bias"] + torch.tensor([4.0, 0.0, -4.0])
    with pytest.raises(GoldenMismatchError, match="golden input"):
        _register(service, "mood", safetensors.torch.save(content, metadata))
    content["prompt"][0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="NaN"):
        _register(service, "mood", safetensors.torch.save(content, metadata))
    _, foreign = small_backbone(tmp_path / "foreign", seed=5)
    with pytest.raises(BackboneMismatchError):
        _register(service, "mood", random_artifact(foreign, "mood"))
    assert METADATA_KEY in metadata
    assert store.state_token() == token
    assert service.task("mood").version == 1


def _tasks(service: Service, state: str) -> float | None:
    return service._metrics.registry.get_sample_value("taskbone_tasks", {"state": state})


def test_a_damaged_version_leaves_the_known_one_in_its_place(
    service: Service, place: tuple[Store, Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    store, backbone = place
    before = _predict(service, "mood", TEXTS)
    _publish(store, backbone, random_overlay(backbone, "mood", seed=9))
    (store.root / "tasks" / "mood" / "2.safetensors").write_bytes(b"damaged")
    wait_until(lambda: "task mood, version 2 cannot be served" in caplog.text)
    wait_until(lambda: _tasks(service, "failed") == 1)
    assert _tasks(service, "active") == 2, "the one before answers"
    assert _predict(service, "mood", TEXTS) == before


def test_a_version_that_could_not_be_read_is_tried_again(
    service: Service, place: tuple[Store, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, backbone = place
    read = Store.read
    failures = [StoreError("too many open files")]

    def fail_once(self: Store, *arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(self, *arguments)

    monkeypatch.setattr(Store, "read", fail_once)
    monkeypatch.setattr("serving.reconciler.READ_AGAIN_S", 0.0)
    _publish(store, backbone, random_overlay(backbone, "mood", seed=9))
    wait_until(lambda: service.task("mood").version == 2)
    assert failures == []


def test_a_task_that_fails_its_trial_stops_no_server(
    place: tuple[Store, Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    store, backbone = place
    overlay = random_overlay(backbone, "huge")
    assert overlay.head is not None
    head = LinearHead(overlay.head.weight.sign() * 3e38, overlay.head.bias)
    _publish(store, backbone, dataclasses.replace(overlay, head=head))
    service = _open(store)
    try:
        assert "task huge, version 1 cannot be served" in caplog.text
        assert (_tasks(service, "active"), _tasks(service, "failed")) == (2, 1)
        assert len(_predict(service, "mood", TEXTS)) == 3
    finally:
        service.close()


def test_a_damaged_registry_stops_no_answer(
    service: Service, place: tuple[Store, Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    before = _predict(service, "mood", TEXTS)
    registry = place[0].root / "registry.json"
    whole = registry.read_text()
    registry.write_text(whole[:20])
    wait_until(lambda: "serving what was loaded" in caplog.text)
    assert _predict(service, "mood", TEXTS) == before
    registry.write_text(whole)
    place[0].delete("same")
    wait_until(lambda: [info.task for info in service.tasks()] == ["mood"])
    assert caplog.text.count("serving what was loaded") == 1


def test_a_task_of_another_backbone_is_not_served(
    place: tuple[Store, Backbone], tmp_path: Path
) -> None:
    store, backbone = place
    foreign_store, foreign = small_backbone(tmp_path / "foreign", seed=5)
    folder = foreign_store.backbone_path(foreign.fingerprint)
    with store.staging() as staging:
        for file in folder.iterdir():
            (staging / file.name).write_bytes(file.read_bytes())
        store.add_backbone(foreign.fingerprint, "foreign", staging)
    _publish(store, foreign, random_overlay(foreign, "elsewhere"))
    with pytest.raises(NotFoundError, match="several backbones"):
        _open(store)
    service = _open(store, backbone="tiny")
    try:
        assert [info.task for info in service.tasks()] == ["mood", "same"]
    finally:
        service.close()
    assert backbone.fingerprint != foreign.fingerprint


def test_a_store_without_tasks_can_be_served(tmp_path: Path) -> None:
    store, backbone = small_backbone(tmp_path)
    service = _open(store)
    try:
        assert service.tasks() == []
        assert _register(service, "mood", random_artifact(backbone, "mood")) == (1, True)
        assert len(_predict(service, "mood", TEXTS)) == 3
    finally:
        service.close()


def test_a_store_without_backbone_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="add-backbone"):
        _open(Store(tmp_path / "empty"))


def test_a_caller_that_leaves_frees_its_place(service: Service) -> None:
    async def leave() -> None:
        asking = asyncio.create_task(service.predict("mood", TEXTS))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(leave())
    assert len(_predict(service, "mood", TEXTS)) == 3


# --- many tasks at once ---------------------------------------------------------------------------


def test_one_text_for_many_tasks_gets_what_each_task_gives(
    service: Service, place: tuple[Store, Backbone]
) -> None:
    _register(service, "tone", random_artifact(place[1], "tone", seed=4))
    alone = {name: _predict(service, name, TEXTS) for name in ("mood", "tone")}
    batches = "taskbone_batch_tasks_count"
    before = service._metrics.registry.get_sample_value(batches) or 0.0
    mood, same, tone = asyncio.run(service.predict_many(["mood", "same", "tone"], TEXTS))
    assert isinstance(same, InvalidInputError), "this task takes pairs"
    for answer in (mood, tone):
        assert isinstance(answer, TaskAnswer)
        given = [list(one.scores.values()) for one in answer.predictions]
        assert given == alone[answer.task]
    assert service._metrics.registry.get_sample_value(batches) == before + 1, "one batch for all"
    with pytest.raises(UnknownTaskError, match="absent"):
        asyncio.run(service.predict_many(["mood", "absent"], TEXTS))


def test_a_key_for_one_task_asks_no_other(service: Service) -> None:
    caller = Caller("team", tasks=frozenset(("same",)))
    with pytest.raises(ForbiddenError, match="'team' is not for the task 'mood'"):
        asyncio.run(service.predict("mood", TEXTS, Ask(caller=caller)))
    with pytest.raises(ForbiddenError):
        asyncio.run(service.predict_many(["same", "mood"], TEXTS, Ask(caller=caller)))


def test_a_full_queue_refuses_before_any_work(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        service._engine, "saturated", lambda key, weight: OverloadedError(f"no room for {key}")
    )
    monkeypatch.setattr(service, "_encode", None)
    with pytest.raises(OverloadedError, match="no room for team"):
        asyncio.run(service.predict("mood", TEXTS, Ask(caller=Caller("team"))))
    with pytest.raises(OverloadedError, match="no room for team"):
        asyncio.run(service.predict_many(["mood"], TEXTS, Ask(caller=Caller("team"))))
