"""Computes the quality benchmark's parts: one recipe on one data set with one seed each.

A part's figures are one JSON file in the work folder, so that the table can be made in pieces;
the trainings inside are kept as a localization's stages. Accuracies are in points (per cent).
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipes import DENSE_PROMPT, FINE_TUNING_RATES, SEARCHED, SEEDS, SETS, settings
from localization.adapters import cut
from localization.config import BudgetConfig, TaskConfig
from localization.costs import ROWS, plan_of, time_forwards
from localization.data import load_dataset
from localization.evaluation import evaluate
from localization.fine_tuning import answers_of, fine_tune
from localization.job import Job, Reporter, prepare
from localization.network import Progress, Tuned, predict
from localization.pipeline import inject, localize, quantify
from localization.results import Answers, Localized
from localization.selection import Kept, select
from model_store import artifact
from model_store.backbone import Backbone

Figures = dict[str, Any]

RANDOM_KEEP = 0.35
"""Share of the neurons at which attribution is compared with chance, before anything is tuned."""


class Quiet:
    """A reporter that shows nothing: the benchmark draws its own progress."""

    def step(self, name: str) -> Progress:
        return lambda done, total, text: None

    def note(self, text: str) -> None:
        pass


def all_parts() -> list[tuple[str, str, int]]:
    """(set, part, seed), what takes longest first."""
    slow = ["imdb", "rte", "mrpc", "qnli", "agnews"]
    names = slow + [name for name in SETS if name not in slow]
    first = [
        (name, part, 0) for name in names for part in PARTS if part != "search" or name in SEARCHED
    ]
    more = [
        (name, part, seed)
        for name in SEEDS
        for seed in range(1, SEEDS[name])
        for part in ("localized", "recovered", "fine_tuned")
    ]
    return first + more


def part_file(work: Path, name: str, part: str, seed: int) -> Path:
    """Where a part's figures are."""
    return work / "parts" / f"{name}-{part}-{seed}.json"


def compute(backbone: Backbone, data: Path, work: Path, name: str, part: str, seed: int) -> Figures:
    """A part's figures; from its file where it is there."""
    file = part_file(work, name, part, seed)
    if file.is_file():
        found: Figures = json.loads(file.read_text())
        return found
    started = time.perf_counter()
    figures = PARTS[part](backbone, data, work, name, part, seed)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(figures, indent=1))
    temporary.replace(file)
    return figures


def _config(name: str, recipe: str, seed: int) -> TaskConfig:
    # Through JSON, as a task file would come: lists become tuples.
    return TaskConfig.model_validate_json(json.dumps(settings(name, recipe, seed)))


def _job(backbone: Backbone, data: Path, work: Path, config: TaskConfig) -> Job:
    dataset = load_dataset(config.data, data, config.seed)
    report: Reporter = Quiet()
    return prepare(config, backbone, dataset, work / "stages" / config.task, "cpu", report)


def _points(name: str, answers: Answers) -> Figures:
    found = answers.evaluation
    return {
        name: 100 * found.accuracy,
        f"{name}_macro_f1": 100 * found.macro_f1,
        f"{name}_matthews": 100 * found.matthews,
        f"{name}_rows": found.rows,
    }


def _localize(backbone: Backbone, data: Path, work: Path, config: TaskConfig) -> Localized:
    dataset = load_dataset(config.data, data, config.seed)
    folder = work / "stages" / config.task
    return localize(config, backbone, dataset, folder, "benchmarks.quality", "cpu", Quiet())


def _overlay(
    backbone: Backbone, data: Path, work: Path, name: str, part: str, seed: int
) -> Figures:
    """An overlay by a recipe: dense beside it, its size, what the training took."""
    config = _config(name, part, seed)
    if part == "fast" and config.budget.speedup is not None:
        slower = prompt_cost(_job(backbone, data, work, config))
        wanted = max(1.0, config.budget.speedup / slower)
        config = config.model_copy(update={"budget": BudgetConfig(speedup=wanted)})
    result = _localize(backbone, data, work, config)
    written = artifact.write(result.overlay)
    target = work / "overlays" / part / f"{name}-{seed}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(written)
    manifest = result.overlay.manifest
    heads = backbone.config.heads * backbone.config.layers
    return {
        **_points("dense", result.test["dense"]),
        **_points("result", result.test[result.network]),
        "ffn_removed": 100 * (1 - manifest.kept_share),
        "heads_removed": 100 * (1 - sum(manifest.heads_kept or (heads,)) / heads),
        "kilobytes": len(written) / 1000,
        "inject_seconds": result.dense.seconds,
        "after_seconds": sum(one.tuned.seconds for one in result.trials),
        "trainings": result.trainings,
    }


def prompt_cost(job: Job) -> float:
    """How many times as long the whole network takes with the dense prompt as without one."""
    config = job.backbone.config
    every = torch.arange(config.ffn, dtype=torch.int32)
    plain = plan_of(job.served, Kept((every,) * config.layers))
    prompt = torch.zeros(DENSE_PROMPT, config.embedding)
    plans = {
        "plain": plain,
        "prompt": dataclasses.replace(
            plain, prompt=prompt, prompt_cache=job.served.prompt_cache(prompt)
        ),
    }
    rows = [job.validation.encodings[index % len(job.validation)] for index in range(ROWS)]
    seconds = time_forwards(job.served, plans, rows)
    return seconds["prompt"] / seconds["plain"]


def _search(backbone: Backbone, data: Path, work: Path, name: str, part: str, seed: int) -> Figures:
    """A search for the smallest network within a margin, in time of one tuning."""
    config = _config(name, "localized", seed)
    config = config.model_copy(update={"budget": BudgetConfig(margin=1.0)})
    result = _localize(backbone, data, work, config)
    spent = sum(one.tuned.seconds for one in result.trials if one.tuned is not result.dense)
    return {
        **_points("dense", result.test["dense"]),
        **_points("result", result.test[result.network]),
        "ffn_removed": 100 * (1 - result.overlay.manifest.kept_share),
        "trials": len(result.trials),
        "trainings": result.trainings,
        "search_time": spent / result.dense.seconds,
    }


def _fine_tuned(
    backbone: Backbone, data: Path, work: Path, name: str, part: str, seed: int
) -> Figures:
    """Full fine-tuning at the learning rate that is best on the validation rows after an epoch.

    Further seeds take the first one's rate.
    """
    config = _config(name, "recovered", seed)
    job = _job(backbone, data, work, config)
    rates: tuple[float, ...] = FINE_TUNING_RATES
    if seed:
        rates = (compute(backbone, data, work, name, part, 0)["rate"],)
    short = config.tuning.model_copy(update={"epochs": 1})
    tried = {
        rate: fine_tune(job, short, rate, seed).validation if len(rates) > 1 else 0.0
        for rate in rates
    }
    rate = max(tried, key=lambda one: tried[one])
    tuned = fine_tune(job, config.tuning, rate, seed)
    answers = answers_of(job, tuned, job.examples(job.dataset.test))
    return {**_points("result", answers), "rate": rate, "tuning_seconds": tuned.seconds}


def _chance(backbone: Backbone, data: Path, work: Path, name: str, part: str, seed: int) -> Figures:
    """Attribution and chance at the same size, before anything is tuned again."""
    job = _job(backbone, data, work, _config(name, "localized", seed))
    dense = inject(job)
    scores = {"attribution": quantify(job, dense).neurons}
    layers, width = scores["attribution"].shape
    for number in range(3):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        scores[f"random {number}"] = torch.rand(layers, width, generator=generator)
    test = job.examples(job.dataset.test)
    accuracy = {}
    for kind, values in scores.items():
        kept = Kept(select(values, RANDOM_KEEP, "global"))
        tuned = Tuned(cut(dense.tensors, kept, backbone.config))
        plan = job.tuning.plan(tuned, kept)
        given = predict(job.tuning.encoder, plan, test.encodings).argmax(dim=1)
        accuracy[kind] = 100 * evaluate(given, test.classes, len(job.labels)).accuracy
    chance = [value for kind, value in accuracy.items() if kind != "attribution"]
    return {"attribution": accuracy["attribution"], "random": sum(chance) / len(chance)}


PARTS: dict[str, Callable[[Backbone, Path, Path, str, str, int], Figures]] = {
    "recovered": _overlay,
    "fast": _overlay,
    "localized": _overlay,
    "chance": _chance,
    "training_free": _overlay,
    "fine_tuned": _fine_tuned,
    "search": _search,
}
