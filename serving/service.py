"""What the server does, without HTTP and without Ray: predict, describe, register.

A request: task lookup -> tokens (after this nothing can be the client's fault) -> the engine's
queue -> an answer with its timings.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from model_store import artifact
from model_store.backbone import Backbone, load_backbone
from model_store.backend import Backend, choose
from model_store.errors import ArtifactError, InputError, NotFoundError
from model_store.manifest import TextInput, VerifiedArtifact
from model_store.store import Store, VersionInfo
from model_store.tokenization import Encoding
from serving.calibration import efficient_tokens
from serving.config import ServeConfig
from serving.engine import Engine
from serving.errors import (
    ConfigError,
    EngineError,
    InvalidInputError,
    OverloadedError,
    TooLargeError,
)
from serving.metrics import Metrics
from serving.plans import PlanCache
from serving.tasks import LoadedTask, TaskTable, load_task
from serving.types import PLAIN, Ask, Prediction, TaskAnswer, TaskInfo, Timings

logger = logging.getLogger("taskbone.service")

GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.06, "int8": 0.3}
"""Largest difference of a golden probability from its fp32 value, by the engine's precision."""

MAX_SCORES = 100_000
"""Inputs times labels of one request: each score is a number in the answer."""

MAX_LONG_TEXTS = 16
"""Requests that may wait for their long texts to be tokenized."""

LONG_TEXT = 20_000
"""Characters from which tokenizing would hold up the event loop, and goes to a thread."""


class Service:
    """One replica's work. Its methods are for one event loop's thread."""

    def __init__(
        self, config: ServeConfig, store: Store, backbone: Backbone, metrics: Metrics
    ) -> None:
        self._config = config
        self._store = store
        self._backbone = backbone
        self._metrics = metrics
        self._backend = open_backend(config, backbone)
        self._plans = PlanCache(self._backend, config.plan_cache_bytes, metrics)
        self._engine = Engine(
            self._backend,
            self._plans,
            metrics,
            max_batch_tokens=config.max_batch_tokens or efficient_tokens(self._backend, backbone),
            max_queued_tokens=config.max_queued_tokens,
        )
        self._long_texts = ThreadPoolExecutor(1, "taskbone-long-texts")
        self._long_texts_waiting = 0
        self._tasks = TaskTable(store, backbone, metrics)

    @classmethod
    def open(cls, config: ServeConfig, metrics: Metrics) -> "Service":
        """Load the backbone and every active task, start the engine, and warm up.

        Raises `ConfigError` or a `ModelStoreError` where the store does not fit the settings.
        """
        store = Store(config.store)
        info = store.backbone(config.backbone)
        backbone = load_backbone(store.backbone_path(info.fingerprint), info.name)
        service = cls(config, store, backbone, metrics)
        service.warm_up()
        return service

    def warm_up(self) -> None:
        """Make plans warm, and run every task at the lengths whose first time is slow.

        A task that fails here is reported and stays: its trouble must not stop the others' server.
        """
        for task in self._tasks.all():
            try:
                self._warm_up(task)
            except (EngineError, InputError) as error:
                logger.error("task %s cannot be tried: %s", task.info.task, error)
        self._plans.settle()

    def _warm_up(self, task: LoadedTask) -> None:
        (one,) = task.texts.encode([task.manifest.golden[0].input])
        self._engine.submit(task.servable, [one], observed=False).result()
        for length in self._backend.warm_up_lengths:
            if length > task.info.max_tokens:
                break
            words = one.token_ids * length
            encoding = Encoding(words[:length], [0] * length, min(one.mask, length - 1))
            self._engine.submit(task.servable, [encoding], observed=False).result()

    async def predict(self, task: str, inputs: Sequence[TextInput], ask: Ask = PLAIN) -> TaskAnswer:
        """Answer all inputs. Raises `ServingError`s that say whose fault it is."""
        started = time.perf_counter()
        loaded = self._tasks.get(task)
        encodings = await self._encode(loaded, inputs)
        tokenized = time.perf_counter()
        answer = await asyncio.wrap_future(self._engine.submit(loaded.servable, encodings))
        labels = loaded.info.labels
        predictions = []
        for row in answer.probabilities.tolist():
            best = max(range(len(labels)), key=row.__getitem__)
            predictions.append(
                Prediction(labels[best], row[best], dict(zip(labels, row, strict=True)))
            )
        timings = Timings(
            tokenize_ms=1000 * (tokenized - started),
            queue_ms=1000 * answer.queue_s,
            forward_ms=1000 * answer.forward_s,
            total_ms=1000 * (time.perf_counter() - started),
        )
        self._metrics.timings(task, timings)
        return TaskAnswer(task, loaded.info.version, tuple(predictions), timings)

    def tasks(self) -> list[TaskInfo]:
        """Every task's active version."""
        return [loaded.info for loaded in self._tasks.all()]

    def task(self, name: str) -> TaskInfo:
        """One task's active version. Raises `UnknownTaskError`."""
        return self._tasks.get(name).info

    async def register(self, task: str, data: bytes) -> tuple[TaskInfo, bool]:
        """Check an artifact, run its golden inputs through this engine, publish and activate it.

        Gives whether it is a new version; False: these very bytes were there already. Raises
        `ModelStoreError`s that name what is wrong, with nothing changed.
        """
        verified, candidate = await asyncio.to_thread(self._candidate, task, data)
        await self._check_golden(candidate)
        known = await asyncio.to_thread(self._digests, task)
        version = await asyncio.to_thread(self._store.publish, verified)
        published = load_task(self._backbone, candidate.servable.overlay, version)
        return published.info, verified.digest not in known

    def check(self) -> None:
        """Raise `EngineError` where the engine is dead or stuck."""
        self._engine.check()

    def close(self) -> None:
        """Answer what is queued and stop."""
        self._engine.close()
        self._plans.close()
        self._long_texts.shutdown(wait=False, cancel_futures=True)

    async def _encode(self, loaded: LoadedTask, inputs: Sequence[TextInput]) -> list[Encoding]:
        if not inputs:
            raise InvalidInputError("inputs: at least one input is needed")
        if len(inputs) > self._config.max_inputs:
            raise TooLargeError(
                f"inputs: {len(inputs)} given, one request may have {self._config.max_inputs}"
            )
        if len(inputs) * len(loaded.info.labels) > MAX_SCORES:
            raise TooLargeError(
                f"inputs: {len(inputs)} with {len(loaded.info.labels)} labels each; one answer may "
                f"have {MAX_SCORES} scores"
            )
        size = sum(len(item) if isinstance(item, str) else sum(map(len, item)) for item in inputs)
        try:
            if size < LONG_TEXT:
                return loaded.texts.encode(inputs)
            return await self._encode_in_thread(loaded, inputs)
        except InputError as error:
            raise InvalidInputError(str(error)) from None

    def _candidate(self, task: str, data: bytes) -> tuple[VerifiedArtifact, LoadedTask]:
        """Everything about an artifact that can be checked without running it."""
        config, fingerprint = self._backbone.config, self._backbone.fingerprint
        verified = artifact.verify(data, config, fingerprint)
        if verified.manifest.task != task:
            raise ArtifactError(
                f"the artifact is of task {verified.manifest.task!r}, not of {task[:80]!r}"
            )
        overlay = artifact.read(data, config, fingerprint)
        version = VersionInfo(task, 0, verified.digest, "", len(data), False)
        return verified, load_task(self._backbone, overlay, version)

    async def _encode_in_thread(
        self, loaded: LoadedTask, inputs: Sequence[TextInput]
    ) -> list[Encoding]:
        """Long texts wait for one thread of their own, so that short ones are not held up."""
        if self._long_texts_waiting >= MAX_LONG_TEXTS:
            raise OverloadedError(f"{MAX_LONG_TEXTS} requests with long texts wait already")
        self._long_texts_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._long_texts, loaded.texts.encode, inputs)
        finally:
            self._long_texts_waiting -= 1

    async def _check_golden(self, candidate: LoadedTask) -> None:
        golden = candidate.manifest.golden
        inputs = [item.input for item in golden]
        encodings = await self._encode_in_thread(candidate, inputs)
        answer = await asyncio.wrap_future(
            self._engine.submit(candidate.servable, encodings, observed=False)
        )
        expected = torch.tensor([item.scores for item in golden])
        given = torch.from_numpy(answer.probabilities)
        tolerance = GOLDEN_TOLERANCE[self._backend.precision]
        artifact.compare_golden(candidate.manifest, given, expected, tolerance)

    def _digests(self, task: str) -> set[str]:
        try:
            return {info.digest for info in self._store.versions(task)}
        except NotFoundError:
            return set()


def open_backend(config: ServeConfig, backbone: Backbone) -> "Backend[Any]":
    """The fastest backend for the device and precision asked for."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
