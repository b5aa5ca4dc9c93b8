"""From a version in the store to one that answers: read, checked, its plan made, and tried on its
golden inputs through the very engine that will serve it.

For threads that may wait; never the event loop's.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

import torch

from model_store import artifact
from model_store.backbone import Backbone
from model_store.backend import Backend
from model_store.errors import ArtifactError, ModelStoreError
from model_store.manifest import VerifiedArtifact
from model_store.store import Store, VersionInfo
from model_store.tokenization import Encoding
from serving.engine import Engine, EngineAnswer
from serving.errors import EngineError, OverloadedError, ServingError
from serving.plans import PlanCache
from serving.tasks import LoadedVersion, load_version

GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.06, "int8": 0.3}
"""Largest difference of a golden probability from its fp32 value, by the engine's precision."""

AT_ONCE = 64
"""Versions whose golden inputs wait for the engine together."""

TRIAL_KEY = "taskbone"
"""The server's own trials share the queue as one caller of this name would."""

TRIED_WITHIN_S = 30.0


class Loader:
    """Loads versions for one engine."""

    def __init__(
        self,
        store: Store,
        backbone: Backbone,
        backend: Backend[Any],
        plans: PlanCache[Any],
        engine: Engine[Any],
    ) -> None:
        self._store = store
        self._backbone = backbone
        self._backend = backend
        self._plans = plans
        self._engine = engine

    def check(self, task: str, data: bytes) -> VerifiedArtifact:
        """All that can be checked of an artifact without running it."""
        verified = artifact.verify(data, self._backbone.config, self._backbone.fingerprint)
        if verified.manifest.task != task:
            raise ArtifactError(
                f"the artifact is of task {verified.manifest.task!r}, not of {task[:80]!r}"
            )
        return verified

    def candidate(self, verified: VerifiedArtifact) -> LoadedVersion:
        """A version that is not in the store yet, tried; raises what is wrong with it."""
        info = VersionInfo(
            verified.manifest.task, 0, verified.digest, "", len(verified.data), False
        )
        version = self._parse(verified.data, info)
        self._finish_trial(version, self._begin_trial(version))
        return version

    def load(
        self, wanted: Sequence[tuple[str, int]]
    ) -> Iterator[tuple[tuple[str, int], LoadedVersion | Exception]]:
        """Versions of the store, tried, or why one cannot be served; in any order."""
        remaining = iter(wanted)
        while keys := list(islice(remaining, AT_ONCE)):
            begun: list[tuple[LoadedVersion, Future[EngineAnswer]]] = []
            for task, number in keys:
                try:
                    info, data = self._store.read(task, number)
                    version = self._parse(data, info)
                    begun.append((version, self._begin_trial(version)))
                except (ModelStoreError, ServingError) as error:
                    yield (task, number), error
            for version, trial in begun:
                try:
                    self._finish_trial(version, trial)
                except (ModelStoreError, ServingError) as error:
                    yield version.key, error
                else:
                    yield version.key, version

    def unload(self, version: LoadedVersion) -> None:
        """Free what a version takes beyond itself."""
        self._plans.forget(version.info.digest)

    def settle(self) -> None:
        """Wait until the plans that are to be warm are."""
        self._plans.settle()

    def _parse(self, data: bytes, info: VersionInfo) -> LoadedVersion:
        overlay = artifact.read(data, self._backbone.config, self._backbone.fingerprint)
        return load_version(self._backbone, overlay, info)

    def _begin_trial(self, version: LoadedVersion) -> "Future[EngineAnswer]":
        inputs = [item.input for item in version.manifest.golden]
        return self._submit(version, version.texts.encode(inputs))

    def _finish_trial(self, version: LoadedVersion, trial: "Future[EngineAnswer]") -> None:
        """Raise unless the golden inputs give what the artifact promises."""
        golden = version.manifest.golden
        expected = torch.tensor([item.scores for item in golden])
        given = torch.from_numpy(self._answer(version, trial).probabilities)
        tolerance = GOLDEN_TOLERANCE[self._backend.precision]
        artifact.compare_golden(version.manifest, given, expected, tolerance)
        self._run_first_lengths(version)

    def _answer(self, version: LoadedVersion, trial: "Future[EngineAnswer]") -> EngineAnswer:
        """The trial's answer; begun again where the engine had to refuse it after all."""
        give_up_at = time.monotonic() + TRIED_WITHIN_S
        while True:
            try:
                return _answer(trial)
            except OverloadedError:
                if time.monotonic() > give_up_at:
                    raise
            trial = self._begin_trial(version)

    def _run_first_lengths(self, version: LoadedVersion) -> None:
        """Where a length's first time is slow, have it behind us."""
        (one,) = version.texts.encode([version.manifest.golden[0].input])
        for length in self._backend.warm_up_lengths:
            if length > version.info.max_tokens:
                break
            words = one.token_ids * length
            encoding = Encoding(words[:length], [0] * length, min(one.mask, length - 1))
            _answer(self._submit(version, [encoding]))

    def _submit(
        self, version: LoadedVersion, encodings: Sequence[Encoding]
    ) -> "Future[EngineAnswer]":
        """Queue a trial; where the queue is full, as soon as there is room."""
        give_up_at = time.monotonic() + TRIED_WITHIN_S
        while True:
            try:
                return self._engine.submit(
                    version.servable, encodings, key=TRIAL_KEY, observed=False
                )
            except OverloadedError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)


def _answer(trial: "Future[EngineAnswer]") -> EngineAnswer:
    try:
        return trial.result(TRIED_WITHIN_S)
    except TimeoutError:
        trial.cancel()
        raise EngineError(f"the engine gave no answer within {TRIED_WITHIN_S:.0f} s") from None
