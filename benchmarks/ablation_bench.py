"""A data set made ready for the ablation: jobs by recipe, accuracies, scores, short re-tunings.

Every finished figure is one JSON file in the work folder, named after what it was computed from, so
that a run goes on where it was. Accuracies are on the test rows, in points (per cent). Knows
nothing of what is compared, nor of tables.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_parts import Quiet
from benchmarks.recipes import settings
from localization.adapters import cut, new_scales
from localization.attribution import score_units
from localization.config import AttributionConfig, TaskConfig, TuningConfig
from localization.data import load_dataset
from localization.evaluation import evaluate
from localization.job import Job, prepare
from localization.modules import GatedNetwork
from localization.network import Examples, Network, Tuned, no_progress, predict
from localization.selection import Kept
from localization.stages import digest_of, key_of
from localization.tuning import tune
from model_store.backbone import Backbone
from model_store.plan import Gate, Part

Figures = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is tried, and on how much."""

    keeps: tuple[float, ...] = (0.65, 0.5, 0.35, 0.2)
    """Shares of neurons kept where scores are compared."""
    low_keep: float = 0.35
    half_keep: float = 0.5
    module_keep: float = 0.7
    row_counts: tuple[int, ...] = (1, 5, 20, 50, 200)
    few_rows: int = 16
    """The handful of labelled rows that a user might have."""
    random_seeds: int = 3
    ranks: tuple[int, ...] = (2, 8)
    refit_rank: int = 24
    refit_tokens: int = 8_000
    cap: int = 1_000
    """Rows taken of a training file, 15 % for validation included."""
    max_tokens: int = 64
    epochs: int = 3
    condense_epochs: int = 2


@dataclass(frozen=True)
class Subject:
    """A data set under one recipe."""

    job: Job
    test: Examples

    def accuracy(
        self,
        tuned: Tuned,
        kept: Kept | None = None,
        gate: Gate | None = None,
        rows: Examples | None = None,
    ) -> float:
        """Points on the test rows (or `rows`), of the whole network or of what is kept of it."""
        rows = rows or self.test
        plan = dataclasses.replace(self.job.tuning.plan(tuned, kept), gate=gate)
        given = predict(self.job.tuning.encoder, plan, rows.encodings).argmax(dim=1)
        return 100 * evaluate(given, rows.classes, len(self.job.labels)).accuracy

    @property
    def everything(self) -> Kept:
        """All neurons."""
        config = self.job.backbone.config
        return Kept((torch.arange(config.ffn, dtype=torch.int32),) * config.layers)

    def cut(self, tuned: Tuned, kept: Kept) -> Tuned:
        """`tuned` for what is kept."""
        return Tuned(cut(tuned.tensors, kept, self.job.backbone.config))


@dataclass(frozen=True)
class Bench:
    """One data set, and where its finished figures are."""

    name: str
    backbone: Backbone
    data: Path
    work: Path
    grid: Grid
    _scores: dict[str, dict[Part, Tensor]] = field(default_factory=dict)

    def subject(self, recipe: str, **changes: Any) -> Subject:
        """The set under a recipe of the quality benchmark, made smaller; `changes` go last."""
        wanted = settings(self.name, recipe, 0)
        wanted["max_tokens"] = self.grid.max_tokens
        wanted["data"]["max_train_rows"] = self.grid.cap
        if recipe != "training_free":
            wanted["tuning"] |= {
                "epochs": self.grid.epochs,
                "condense_epochs": self.grid.condense_epochs,
            }
        # Through JSON, as a task file would come: lists become tuples.
        config = TaskConfig.model_validate_json(json.dumps(wanted | changes))
        dataset = load_dataset(config.data, self.data, config.seed)
        folder = self.work / "stages" / self.name
        job = prepare(config, self.backbone, dataset, folder, "cpu", Quiet())
        return Subject(job, job.examples(dataset.test))

    def cell(self, subject: Subject, name: str, compute: Callable[[], Figures]) -> Figures:
        """Figures called `name`, from their file where it is there; shown when they are new."""
        key = key_of(subject.job.key, subject.job.config.model_dump(mode="json"))
        file = self.work / "cells" / self.name / f"{_file_name(name)}-{key}.json"
        if file.is_file():
            found: Figures = json.loads(file.read_text())
            return found
        started = time.perf_counter()
        figures = compute()
        seconds = time.perf_counter() - started
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(figures))
        temporary.replace(file)
        print(f"{self.name}: {name}: {_short(figures)} ({seconds:.0f} s)", file=sys.stderr)
        return figures

    def scores(
        self,
        subject: Subject,
        tuned: Tuned,
        config: AttributionConfig,
        parts: Sequence[Part] = ("ffn_in",),
        seed: int = 0,
        rows: Examples | None = None,
    ) -> dict[Part, Tensor]:
        """Scores per part `[L, width]`, by the training rows or `rows`; computed once."""
        job = subject.job
        rows = rows or job.train
        if config.labels == "predicted":
            shown = rows.encodings[: config.rows]
            given = predict(job.exact.encoder, job.exact.plan(tuned), shown).argmax(dim=1)
            rows = Examples(shown, given)
        asked = config.model_dump(exclude={"scope"}), parts, seed, digest_of(tuned.tensors, None)
        key = key_of(*asked, rows.classes.tolist(), [row.token_ids for row in rows.encodings])
        if key not in self._scores:
            self._scores[key] = score_units(
                job.exact, tuned, rows, config, parts, seed, no_progress
            )
        return self._scores[key]

    def condensed(
        self,
        subject: Subject,
        begin: Tuned,
        kept: Kept,
        gate: Gate | None = None,
        epochs: int | None = None,
        slower: bool = True,
    ) -> Figures:
        """Accuracy `before` and `after` tuning what is kept, and the validation `curve` in between.

        Prompt and head are tuned and, unless a gate prunes, a scale for each neuron; `slower`: at
        the recipe's learning rates after removal, else at those before. The curve begins before the
        first epoch.
        """
        job = subject.job
        tuning = after_removal(job.config.tuning) if slower else job.config.tuning
        network: Network = job.tuning
        tensors = dict(begin.tensors)
        if gate is None:
            tensors |= new_scales(job.backbone.config)
        else:
            network = GatedNetwork(network.encoder, network.read, network.verbalizer, gate)
        start = subject.cut(Tuned(tensors), kept)
        found = tune(
            network,
            start,
            kept,
            job.train,
            job.validation,
            tuning,
            epochs or self.grid.condense_epochs,
            job.config.seed,
            no_progress,
            metric=job.config.metric,
        )
        first = subject.accuracy(start, kept, gate, job.validation)
        return {
            "before": subject.accuracy(start, kept, gate),
            "after": subject.accuracy(found, kept, gate),
            "curve": [first, *(100 * value for value in found.curve)],
            "seconds": found.seconds,
        }


def after_removal(config: TuningConfig) -> TuningConfig:
    """The settings with the learning rates that follow removal."""
    return config.scaled(config.condense_rate)


def _file_name(name: str) -> str:
    """Letters that every file system takes; a hash keeps names apart that so become one."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in name)
    return f"{plain[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _short(figures: Figures) -> str:
    shown = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.1f}" for name, value in shown.items())
