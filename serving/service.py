"""One replica's work, without HTTP and without Ray: predict and describe; changes of what is served
are `Service.lifecycle`.

A request: task lookup -> tokens (after this nothing can be the client's fault) -> the engine's
queue -> an answer with its timings.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch

from model_store.backbone import Backbone, load_backbone
from model_store.backend import Backend, choose
from model_store.errors import InputError
from model_store.manifest import BackboneReference, TextInput
from model_store.shared_weights import SharedWeights
from model_store.store import Store, VersionInfo, open_store
from model_store.tokenization import Encoding
from serving.board import Board
from serving.calibration import efficient_tokens
from serving.config import ServeConfig
from serving.engine import Engine, EngineAnswer
from serving.errors import (
    ConfigError,
    InvalidInputError,
    OverloadedError,
    ServingError,
    TooLargeError,
)
from serving.lifecycle import Lifecycle
from serving.loader import Loader
from serving.metrics import Metrics
from serving.neurons import NeuronMaps
from serving.plans import PlanCache
from serving.reconciler import Reconciler
from serving.shadow import Shadow
from serving.tasks import LoadedVersion, TaskTable
from serving.types import (
    PLAIN,
    Ask,
    Caller,
    NeuronMap,
    Prediction,
    Stages,
    TaskAnswer,
    TaskInfo,
    Timings,
)

logger = logging.getLogger("taskbone.service")

MAX_SCORES = 100_000
"""Inputs times labels of one request: each score is a number in the answer."""

MAX_LONG_TEXTS = 16
"""Requests that may wait for their long texts to be tokenized."""

LONG_TEXT = 20_000
"""Characters from which tokenizing would hold up the event loop, and goes to a thread."""


class Service:
    """One replica's work. Its methods are for one event loop's thread."""

    def __init__(
        self,
        config: ServeConfig,
        store: Store,
        backbone: Backbone,
        metrics: Metrics,
        board: Board,
        replica_id: str,
        on_death: Callable[[], None] = lambda: None,
        shared: SharedWeights | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self.backbone = BackboneReference(name=backbone.name, fingerprint=backbone.fingerprint)
        self._metrics = metrics
        self._backend = open_backend(config, backbone, shared)
        size = sum(tensor.nbytes for tensor in backbone.tensors.values())
        metrics.backbone(self.backbone, size)
        metrics.build(installed("taskbone"), device_of(config), self._backend.precision)
        self._plans = PlanCache(self._backend, config.plan_cache_bytes, metrics)
        self._engine = Engine(
            self._backend,
            self._plans,
            metrics,
            max_batch_tokens=config.max_batch_tokens or efficient_tokens(self._backend, backbone),
            max_queued_tokens=config.max_queued_tokens,
            on_death=on_death,
            max_queue_s=config.max_queue_ms / 1000,
        )
        self._long_texts = ThreadPoolExecutor(1, "taskbone-long-texts")
        self._long_texts_waiting = 0
        self._tasks = TaskTable()
        self._neurons = NeuronMaps(backbone.config)
        # The backend has made its own of the tensors, whose pages would stay in memory beside it.
        described = dataclasses.replace(backbone, tensors={})
        self._loader = Loader(store, described, self._backend, self._plans, self._engine)
        self._shadow = Shadow(self._engine, self._tasks, metrics)
        self._reconciler = Reconciler(store, self._loader, self._tasks, board, replica_id, metrics)
        self.lifecycle = Lifecycle(
            store, self._loader, board, replica_id, metrics, config.signature_key
        )

    @classmethod
    def open(
        cls,
        config: ServeConfig,
        metrics: Metrics,
        board: Board,
        replica_id: str = "replica",
        on_death: Callable[[], None] = lambda: None,
        weights_folder: Path | None = None,
    ) -> "Service":
        """Load the backbone and every active task, start the engine, and warm up.

        `on_death` is called when the engine's thread has ended by anything but `close`. In
        `weights_folder` the replicas of this machine share the backbone as the forward reads it.
        Raises `ConfigError` or a `ModelStoreError` where the store does not fit the settings.
        """
        store = open_store(config.store, config.cache)
        info = store.backbone(config.backbone)
        path = store.backbone_path(info.fingerprint)
        backbone = load_backbone(path, info.name)
        shared = None
        if weights_folder is not None:
            shared = SharedWeights(
                weights_folder, info.fingerprint, lambda: load_backbone(path).tensors
            )
        service = cls(config, store, backbone, metrics, board, replica_id, on_death, shared)
        service._reconciler.start()
        return service

    async def predict(self, task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        """Answer all inputs. Raises `ServingError`s that say whose fault it is."""
        started = time.perf_counter()
        await self._admit(task, inputs, ask)
        with self._tasks.using(task, ask) as (version, served):
            encodings = await self._encode(version, inputs, ask)
            stages = _tokenized(version, encodings, started, ask)
            answer = await asyncio.wrap_future(
                self._engine.submit(
                    version.servable,
                    encodings,
                    key=ask.caller.name,
                    weight=ask.caller.weight,
                    deadline=ask.deadline,
                )
            )
        if served is not None and served.shadow is not None:
            self._shadow.compare(version, served.shadow, inputs, answer)
        return self._answer(version, stages, answer)

    async def predict_many(
        self, tasks: Sequence[str], inputs: Sequence[TextInput], ask: Ask = PLAIN
    ) -> list[TaskAnswer | ServingError]:
        """The same inputs for many tasks, in shared batches: for each its answer, or what is wrong
        with these inputs for this task.

        Raises what concerns the call as a whole: an unknown task, too much, no room in the queue.
        """
        started = time.perf_counter()
        for task in tasks:
            await self._admit(task, inputs, ask)
        with ExitStack() as held:
            used = [held.enter_context(self._tasks.using(task, ask))[0] for task in tasks]
            encoded = [await self._encode_or_error(version, inputs, ask) for version in used]
            questions = [
                (version, encodings, _tokenized(version, encodings, started, ask))
                for version, encodings in zip(used, encoded, strict=True)
                if not isinstance(encodings, ServingError)
            ]
            futures = self._engine.submit_all(
                [(version.servable, encodings) for version, encodings, _ in questions],
                key=ask.caller.name,
                weight=ask.caller.weight,
                deadline=ask.deadline,
            )
            found = await asyncio.gather(*map(asyncio.wrap_future, futures))
        answers = iter(
            self._answer(version, stages, answer)
            for (version, _, stages), answer in zip(questions, found, strict=True)
        )
        return [one if isinstance(one, ServingError) else next(answers) for one in encoded]

    async def _encode_or_error(
        self, version: LoadedVersion, inputs: Sequence[TextInput], ask: Ask
    ) -> list[Encoding] | ServingError:
        try:
            return await self._encode(version, inputs, ask)
        except InvalidInputError as error:
            return error

    def tasks(self) -> list[TaskInfo]:
        """Every task that is served."""
        return [served.info for served in self._tasks.all()]

    def task(self, name: str) -> TaskInfo:
        """What serves one task. Raises `UnknownTaskError`."""
        return self._tasks.get(name).info

    def chosen(self, task: str, ask: Ask) -> int | None:
        """The version that answers such a request now; None where there is none of that number.

        Raises `UnknownTaskError`.
        """
        return self._tasks.chosen(task, ask)

    async def version(self, task: str, number: int) -> TaskInfo:
        """One version of a task, active or not. Raises `NotFoundError`."""
        await self._load_other(task, number)
        with self._tasks.using(task, Ask(version=number)) as (version, _):
            return version.info

    async def neurons(self, task: str, caller: Caller) -> NeuronMap:
        """What a task's active version keeps, and its overlap with the other tasks that the
        caller's key is for. Raises `UnknownTaskError`."""
        active = self._tasks.get(task).active
        others = [
            served.active
            for served in self._tasks.all()
            if served.active.info.task != task and caller.may(served.active.info.task)
        ]
        return await asyncio.to_thread(self._neurons.describe, active, others)

    async def versions(self, task: str) -> list[VersionInfo]:
        """Every version of a task, oldest first. Raises `NotFoundError`."""
        return await asyncio.to_thread(self._store.versions, task)

    async def all_versions(self) -> list[VersionInfo]:
        """Every version of every task."""
        return await asyncio.to_thread(self._store.all_versions)

    def check(self) -> None:
        """Raise `EngineError` where the engine is dead or stuck."""
        self._engine.check()

    def close(self) -> None:
        """Answer what is queued and stop."""
        self.lifecycle.close()
        self._reconciler.close()
        self._engine.close()
        self._plans.close()
        self._long_texts.shutdown(wait=False, cancel_futures=True)

    async def _admit(self, task: str, inputs: Sequence[TextInput], ask: Ask) -> None:
        """Raise unless the caller may ask so much of this task."""
        ask.caller.check(task)
        if not inputs:
            raise InvalidInputError("inputs: at least one input is needed")
        if len(inputs) > self._config.max_inputs:
            raise TooLargeError(
                f"inputs: {len(inputs)} given, one request may have {self._config.max_inputs}"
            )
        # Before the work of tokenizing, which would be for nothing.
        if refusal := self._engine.saturated(ask.caller.name, ask.caller.weight):
            raise refusal
        if ask.version is not None:
            await self._load_other(task, ask.version)

    async def _load_other(self, task: str, number: int) -> None:
        """Have a version at hand that has no part in its task."""
        if self._tasks.has(task, number):
            return
        ((_, found),) = await asyncio.to_thread(lambda: list(self._loader.load([(task, number)])))
        if isinstance(found, Exception):
            raise found
        self._tasks.add_other(found)

    def _answer(
        self,
        version: LoadedVersion,
        stages: Stages,
        answer: EngineAnswer,
    ) -> TaskAnswer:
        labels = version.info.labels
        predictions = []
        for row in answer.probabilities.tolist():
            best = max(range(len(labels)), key=row.__getitem__)
            predictions.append(
                Prediction(labels[best], row[best], dict(zip(labels, row, strict=True)))
            )
        timings = Timings(
            tokenize_ms=1000 * (stages.tokenized - stages.started),
            queue_ms=1000 * answer.queue_s,
            forward_ms=1000 * answer.forward_s,
            total_ms=1000 * (time.perf_counter() - stages.started),
        )
        info = version.info
        self._metrics.timings(info.task, info.version, timings)
        stages.batches = answer.batches
        return TaskAnswer(info.task, info.version, tuple(predictions), timings, stages.tokens)

    async def _encode(
        self, version: LoadedVersion, inputs: Sequence[TextInput], ask: Ask
    ) -> list[Encoding]:
        if len(inputs) * len(version.info.labels) > MAX_SCORES:
            raise TooLargeError(
                f"inputs: {len(inputs)} with {len(version.info.labels)} labels each; one answer "
                f"may have {MAX_SCORES} scores"
            )
        size = sum(len(item) if isinstance(item, str) else sum(map(len, item)) for item in inputs)
        try:
            if size < LONG_TEXT:
                return version.texts.encode(inputs, ask.truncate)
            return await self._encode_in_thread(version, inputs, ask.truncate)
        except InputError as error:
            raise InvalidInputError(str(error)) from None

    async def _encode_in_thread(
        self, version: LoadedVersion, inputs: Sequence[TextInput], truncate: bool
    ) -> list[Encoding]:
        """Long texts wait for one thread of their own, so that short ones are not held up."""
        if self._long_texts_waiting >= MAX_LONG_TEXTS:
            raise OverloadedError(f"{MAX_LONG_TEXTS} requests with long texts wait already")
        self._long_texts_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._long_texts, version.texts.encode, inputs, truncate
            )
        finally:
            self._long_texts_waiting -= 1


def device_of(config: ServeConfig) -> str:
    """The device asked for: `cpu` or `cuda`."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_backend(
    config: ServeConfig, backbone: Backbone, shared: SharedWeights | None = None
) -> "Backend[Any]":
    """The fastest backend for the device and precision asked for."""
    device = device_of(config)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, and torch sees no CUDA device")
    precision = None if config.precision == "auto" else config.precision
    try:
        return choose(
            backbone.config,
            backbone.tensors,
            device=device,
            precision=precision,
            threads=config.threads,
            shared=shared,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _tokenized(
    version: LoadedVersion, encodings: Sequence[Encoding], started: float, ask: Ask
) -> Stages:
    """A request whose texts have just become tokens; noted where it is traced."""
    info, count = version.info, len(encodings)
    tokens = sum(len(one.token_ids) for one in encodings) + info.prompt_tokens * count
    stages = Stages(info.task, info.version, started, time.perf_counter(), count, tokens)
    if ask.stages is not None:
        ask.stages.append(stages)
    return stages
