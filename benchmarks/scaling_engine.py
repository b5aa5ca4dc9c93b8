"""Measures what a batch costs in the real engine: tokens, sequences, and tasks, warm and cold.

Whole batches through `serving.engine`, from submission to the last answer, of the ready-made tasks
and of tasks drawn by chance; the coefficients of `scaling_costs` are fitted to them.
"""

import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine_models import open_model, random_overlay
from benchmarks.engine_ours import Silent
from benchmarks.scaling_costs import Batch, BatchCost, Fit, as_record, fit
from benchmarks.server_engine import load
from benchmarks.server_works import sentences
from examples.ready_made import add_backbone, prepare
from model_store.artifact import Overlay
from model_store.backbone import Backbone
from model_store.backend import Backend
from model_store.store import Store, VersionInfo
from model_store.tokenization import Encoding
from serving.config import ServeConfig
from serving.engine import Engine
from serving.metrics import Metrics
from serving.plans import PlanCache
from serving.questions import as_input
from serving.service import open_backend
from serving.tasks import LoadedVersion, load_version

KEEP = 0.5
PROMPT_TOKENS = 10
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
TASKS = (1, 2, 4, 8, 11, 22)
DRAWS = 2
"""Different batches of each kind."""
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Tasks:
    """What is served: a backbone, and versions of tasks."""

    backbone: Backbone
    versions: list[LoadedVersion]


@dataclass(frozen=True)
class Measured:
    """What a batch costs, what a task's plan takes, and how long making it warm does."""

    fit: Fit
    ready_bytes: int
    warm_bytes: int
    """Beyond the ready plan, on average."""
    build_s: float
    tokens: float
    """Of a sequence, prompt included, on average."""

    def record(self) -> dict[str, Any]:
        """For the report."""
        return {
            "batch": as_record(self.fit.cost),
            "mean_error": round(self.fit.mean_error, 4),
            "worst_error": round(self.fit.worst_error, 4),
            "ready_bytes": self.ready_bytes,
            "warm_bytes": self.warm_bytes,
            "build_ms": round(1000 * self.build_s, 3),
            "tokens": round(self.tokens, 2),
        }


class ChosenPlans(PlanCache[Any]):
    """Gives each plan warm or as it is, as it is told."""

    def __init__(self, backend: Backend[Any], versions: Sequence[LoadedVersion]) -> None:
        super().__init__(backend, _ENDLESS, Silent())
        self.cold = False
        self.seconds: list[float] = []
        self._ready_plans = {}
        self._warm_plans = {}
        for version in versions:
            digest, overlay = version.servable.digest, version.servable.overlay
            self._ready_plans[digest] = backend.plan(overlay)
            began = time.perf_counter()
            self._warm_plans[digest] = backend.warm(self._ready_plans[digest])
            self.seconds.append(time.perf_counter() - began)

    def get(self, digest: str, overlay: Overlay) -> Any:
        """Without any policy."""
        return (self._ready_plans if self.cold else self._warm_plans)[digest]

    def mean_bytes(self) -> tuple[int, int]:
        """Of a ready plan, and what warmth adds."""
        ready, warm = (
            statistics.mean(sum(plan.parts.values()) for plan in plans.values())
            for plans in (self._ready_plans, self._warm_plans)
        )
        return round(ready), round(warm - ready)


def ready_made(folder: Path) -> Tasks:
    """The ready-made tasks: half of the neurons, deltas, a prompt."""
    store = Store(folder / "ready-made")
    names = prepare(store)
    backbone = add_backbone(store)
    return Tasks(backbone, [load(store, backbone, name) for name in names])


def drawn(folder: Path, count: int = max(TASKS)) -> Tasks:
    """Tasks drawn by chance: half of the neurons, a prompt, no deltas."""
    model = open_model("minilm-l6", folder)
    versions = []
    for number in range(count):
        overlay = random_overlay(model, number, KEEP, prompt_tokens=PROMPT_TOKENS)
        info = VersionInfo(f"task-{number}", 1, f"{number:064d}", "", 0, True)
        versions.append(load_version(model.backbone, overlay, info))
    return Tasks(model.backbone, versions)


def backend_of(tasks: Tasks, threads: int) -> Backend[Any]:
    """As a server would open it on this machine."""
    config = ServeConfig(store=Path("unused"), engine_threads=threads)
    return open_backend(config, tasks.backbone)


def measure(tasks: Tasks, backend: Backend[Any], rounds: int, seed: int = 0) -> Measured:
    """Every kind of batch, all in turn, several times; the median of each."""
    plans = ChosenPlans(backend, tasks.versions)
    engine = Engine(
        backend, plans, Metrics(),
        max_batch_tokens=_ENDLESS, max_queued_tokens=_ENDLESS, max_queue_s=60.0,
    )  # fmt: skip
    works = list(_works(tasks, random.Random(seed)))
    times: list[list[float]] = [[] for _ in works]
    for number in range(-1, rounds):  # the first warms up
        for work, found in zip(works, times, strict=True):
            plans.cold = work.cold
            seconds = _answer(engine, work)
            if number >= 0:
                found.append(seconds)
    engine.close()
    plans.close()
    batches = [work.batch() for work in works]
    fitted = fit(batches, [statistics.median(found) for found in times])
    tokens = sum(one.tokens for one in batches) / sum(one.sequences for one in batches)
    return Measured(fitted, *plans.mean_bytes(), statistics.median(plans.seconds), tokens)


@dataclass(frozen=True)
class _Work:
    """One batch: sentences, each with its task."""

    sentences: list[tuple[LoadedVersion, Encoding]]
    cold: bool

    def batch(self) -> Batch:
        tokens = sum(
            len(encoding.token_ids) + version.info.prompt_tokens
            for version, encoding in self.sentences
        )
        tasks = len({version.info.task for version, _ in self.sentences})
        if self.cold:
            return Batch(tokens, len(self.sentences), 0, tasks, tokens)
        return Batch(tokens, len(self.sentences), tasks, 0, 0)


def _works(tasks: Tasks, chance: random.Random) -> Any:
    texts = sentences(None)
    for count in SEQUENCES:
        for number in TASKS:
            if number > min(count, len(tasks.versions)):
                continue
            for _ in range(DRAWS):
                chosen = chance.sample(tasks.versions, number)
                asked = []
                for place in range(count):
                    version = chosen[place % number]
                    given = as_input(chance.choice(texts), version.info.takes_pairs)
                    asked.append((version, version.texts.encode([given])[0]))
                yield _Work(asked, cold=False)
                yield _Work(asked, cold=True)


def _answer(engine: Engine[Any], work: _Work) -> float:
    """Seconds from submission until all is answered."""
    questions = [(version.servable, [encoding]) for version, encoding in work.sentences]
    began = time.perf_counter()
    answers = engine.submit_all(questions)
    wait(answers)
    seconds = time.perf_counter() - began
    for answer in answers:
        answer.result()
    return seconds


def cost_of(record: dict[str, Any]) -> BatchCost:
    """The coefficients that a report has."""
    names = asdict(BatchCost(0.0))
    return BatchCost(**{name: record["batch"][name[:-2] + "_us"] / 1e6 for name in names})
