"""What a localization found, written down: figures on rows, the manifest, the overlay.

Figures are measured as a server on this machine would answer: from the overlay itself, in the
serving precision. Knows nothing of how the overlay was found.
"""

import dataclasses
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor

from localization.evaluation import Evaluation, evaluate
from localization.job import Job, head_record
from localization.network import Examples, Tuned
from localization.selection import STEP, Kept
from model_store.artifact import Overlay, probabilities
from model_store.backend import answer_all
from model_store.manifest import (
    BackboneReference,
    DeltaRanks,
    Golden,
    Manifest,
    Measurement,
    Prompt,
    Provenance,
)
from model_store.plan import LinearHead

NetworkName = Literal["dense", "localized", "recovered"]


@dataclass(frozen=True)
class Trial:
    """One size tried: what it keeps, and what training on it gave."""

    share: float
    """Of the units' cost, as asked for."""
    kept: Kept
    tuned: Tuned
    cost: float
    """Of one forward, as a share of the whole network's."""


@dataclass(frozen=True)
class Answers:
    """A network's answers to the test rows, and what they are worth."""

    probabilities: Tensor  # [B, C] fp32
    evaluation: Evaluation


@dataclass(frozen=True)
class Localized:
    """The result: the overlay, and the figures that people compare."""

    job: Job
    overlay: Overlay
    dense: Tuned
    dense_overlay: Overlay
    """The whole network with what `dense` holds; measured, and not written anywhere."""
    chosen: Trial
    trials: tuple[Trial, ...]
    """All that were tried, in order; the chosen one is the last."""
    trainings: float
    """What was spent on training after `inject`, in trainings of the whole network."""
    validation: dict[NetworkName, Answers]
    test: dict[NetworkName, Answers]
    """Empty where the task has no test rows."""

    @property
    def network(self) -> NetworkName:
        """What the overlay is called in its figures."""
        return "localized" if self.overlay.manifest.deltas is None else "recovered"


def finish(
    job: Job, dense: Tuned, chosen: Trial, trials: tuple[Trial, ...], command: str
) -> Localized:
    """Measure the dense and the chosen network, and put the overlay together."""
    config = job.backbone.config
    whole = Kept((torch.arange(config.ffn, dtype=torch.int32),) * config.layers)
    overlay = overlay_of(job, chosen, command)
    dense_overlay = overlay_of(job, Trial(1.0, whole, dense, 1.0), command)
    final: NetworkName = "localized" if overlay.manifest.deltas is None else "recovered"
    networks: dict[NetworkName, Overlay] = {"dense": dense_overlay, final: overlay}
    test_rows = job.examples(job.dataset.test) if len(job.dataset.test) else None
    measured: list[Measurement] = []
    validation: dict[NetworkName, Answers] = {}
    test: dict[NetworkName, Answers] = {}
    for name, network in networks.items():
        validation[name] = answer(job, name, network, job.validation, "validation")
        measured += _measurements(name, "validation", validation[name].evaluation)
        if test_rows is not None:
            test[name] = answer(job, name, network, test_rows, "test")
            measured += _measurements(name, "test", test[name].evaluation)
    manifest = overlay.manifest.model_copy(update={"metrics": tuple(measured)})
    overlay = dataclasses.replace(overlay, manifest=_with_golden(job, overlay, manifest))
    spent = sum(len(one.tuned.curve) * one.cost for one in trials if one.tuned is not dense)
    trainings = spent / max(1, len(dense.curve))
    return Localized(
        job, overlay, dense, dense_overlay, chosen, trials, trainings, validation, test
    )


def answer(job: Job, name: str, overlay: Overlay, examples: Examples, rows: str) -> Answers:
    """The overlay's answers to `examples`, as a server here gives them."""
    progress = job.report.step(f"{rows} {name}")
    given = answer_all(job.backend, overlay, examples.encodings, progress)
    found = evaluate(given.argmax(dim=1), examples.classes, len(job.labels))
    return Answers(given, found)


def overlay_of(job: Job, chosen: Trial, command: str) -> Overlay:
    """The overlay with its manifest, figures and golden scores still blank."""
    config, backbone, tuned, kept = job.config, job.backbone, chosen.tuned, chosen.kept
    head = None
    if "head.weight" in tuned.tensors:
        head = LinearHead(tuned.tensors["head.weight"], tuned.tensors["head.bias"])
    # Deltas are small corrections: bf16 holds them well enough, in half the bytes.
    changes = {
        name: tensor.to(torch.bfloat16 if name.startswith("delta.") else torch.float32)
        for name, tensor in _complete(tuned, kept, backbone.config.hidden).items()
    }
    ranks = _ranks(changes, backbone.config.layers)
    prompt_tokens = 0 if tuned.prompt is None else len(tuned.prompt)
    present = {
        "ffn_neurons": True,
        "prompt": prompt_tokens > 0,
        "head": head is not None,
        "heads": kept.heads is not None,
        "scales": any(name.startswith("ffn.") for name in changes),
        "norms": any(name.startswith("norm.") for name in changes),
        "deltas": ranks is not None,
    }
    settings = config.model_dump(mode="json", exclude={"golden", "description", "task"})
    blank = tuple(
        Golden(input=item, scores=(0.0,) * len(job.labels)) for item in config.resolved_golden
    )
    manifest = Manifest.model_validate(
        {
            "task": config.task,
            "description": config.description,
            "labels": job.labels,
            "backbone": BackboneReference(name=backbone.name, fingerprint=backbone.fingerprint),
            "template": config.resolved_template,
            "max_tokens": config.max_tokens,
            "prompt": Prompt(tokens=prompt_tokens),
            "read": config.resolved_read,
            "head": head_record(config, backbone, job.labels),
            "components": [name for name, there in present.items() if there],
            "ffn_kept": [len(rows) for rows in kept.neurons],
            "ffn_width": backbone.config.ffn,
            "heads_kept": None if kept.heads is None else [len(rows) for rows in kept.heads],
            "deltas": ranks,
            "provenance": Provenance(
                command=command,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seed=config.seed,
                data_sha256=job.dataset.sha256,
                settings=settings | {"chosen_share": chosen.share, "search_step": STEP},
                versions={name: version(name) for name in ("taskbone", "torch", "tokenizers")},
                hardware=f"{platform.machine()}, {torch.get_num_threads()} threads",
            ),
            "golden": blank,
        }
    )
    return Overlay(manifest, kept.neurons, tuned.prompt, head, kept.heads, changes)


def _complete(tuned: Tuned, kept: Kept, hidden: int) -> dict[str, Tensor]:
    """The changes; where there are scales or shifts at all, every layer has both."""
    changes = tuned.changes
    if any(name.startswith("ffn.") for name in changes):
        for layer, neurons in enumerate(kept.neurons):
            changes.setdefault(f"ffn.{layer}.scale", torch.ones(len(neurons)))
            changes.setdefault(f"ffn.{layer}.bias", torch.zeros(hidden))
    return changes


def _ranks(changes: dict[str, Tensor], layers: int) -> DeltaRanks | None:
    def of(part: str) -> tuple[int, ...]:
        downs = (changes.get(f"delta.{layer}.{part}.down") for layer in range(layers))
        return tuple(0 if down is None else len(down) for down in downs)

    ranks = DeltaRanks(qkv=of("q"), o=of("o"), ffn_in=of("ffn_in"), ffn_out=of("ffn_out"))
    return ranks if any(any(layer) for _, layer in ranks) else None


def _measurements(
    network: NetworkName, split: Literal["validation", "test"], figures: Evaluation
) -> list[Measurement]:
    values: list[tuple[Literal["accuracy", "macro_f1", "matthews"], float]] = [
        ("accuracy", figures.accuracy),
        ("macro_f1", figures.macro_f1),
        ("matthews", figures.matthews),
    ]
    return [
        Measurement(
            network=network, split=split, metric=metric, value=round(value, 6), rows=figures.rows
        )
        for metric, value in values
    ]


def _with_golden(job: Job, overlay: Overlay, manifest: Manifest) -> Manifest:
    inputs = job.config.resolved_golden
    scores = probabilities(job.exact.encoder, job.backbone, overlay, inputs)
    golden = tuple(
        Golden(input=item, scores=tuple(round(float(score), 6) for score in row))
        for item, row in zip(inputs, scores, strict=True)
    )
    return manifest.model_copy(update={"golden": golden})
