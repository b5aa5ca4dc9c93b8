"""A task file and its rows to an overlay: the algorithm of the Skeleton paper, step by step.

    inject     tune a prompt (and a head) on the whole frozen network
    quantify   score every feed-forward neuron's part in the task
    search     over the share of neurons kept; each trial
      localize   keeps the best-scored neurons
      condense   tunes the prompt (and the head) again on them

Every finished step is kept in the work folder (see `stages.py`). Knows nothing of the store.
"""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from localization.attribution import score_neurons
from localization.config import TaskConfig
from localization.data import Dataset, Rows
from localization.errors import ConfigError
from localization.evaluation import Evaluation, evaluate
from localization.selection import STEP, select, smallest_acceptable
from localization.stages import StageFiles, key_of
from localization.tuning import Examples, Network, Progress, Tuned, predict, start, tune
from model_store.artifact import Overlay, probabilities
from model_store.backbone import Backbone
from model_store.encoder import Encoder, LinearHead
from model_store.manifest import (
    MAX_LABELS,
    BackboneReference,
    Golden,
    Manifest,
    Measurement,
    Prompt,
    Provenance,
)
from model_store.manifest import LinearHead as LinearHeadRecord
from model_store.manifest import VerbalizerHead as VerbalizerRecord
from model_store.ops import TorchOps, fast_bf16
from model_store.tokenization import InputEncoder

NetworkName = Literal["dense", "localized"]


class Reporter(Protocol):
    """Where progress goes; `localization.console` draws it."""

    def step(self, name: str) -> Progress:
        """A new step begins; the result is called as it goes on."""
        ...

    def note(self, text: str) -> None:
        """A line for the reader."""
        ...


@dataclass(frozen=True)
class Trial:
    """One keep ratio tried: its neurons, and what condensing on them gave."""

    keep: float
    neurons: tuple[Tensor, ...]
    tuned: Tuned


@dataclass(frozen=True)
class Localized:
    """The result: the overlay, and the figures that people compare."""

    overlay: Overlay
    dense: Tuned
    trials: tuple[Trial, ...]
    test: dict[NetworkName, Evaluation]
    """Empty where the task has no test rows."""


@dataclass(frozen=True)
class Job:
    """Everything that the steps share."""

    config: TaskConfig
    backbone: Backbone
    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    tuning: Network
    """In the precision that tuning runs in."""
    exact: Network
    """In fp32: scores and final figures."""
    stages: StageFiles
    key: str
    report: Reporter


def localize(
    config: TaskConfig,
    backbone: Backbone,
    dataset: Dataset,
    work: Path,
    command: str,
    device: str,
    report: Reporter,
) -> Localized:
    """Find the overlay of a task. Raises `ConfigError` where task, backbone and rows do not fit."""
    job = _prepare(config, backbone, dataset, work, device, report)
    dense = _tune(job, "inject", _start(job), None, config.tuning.epochs)
    scores = _quantify(job, dense if config.inject else _start(job))
    trials: list[Trial] = []

    def good_enough(keep: float) -> bool:
        trials.append(_trial(job, keep, scores, dense))
        lost = 100 * (dense.validation_accuracy - trials[-1].tuned.validation_accuracy)
        return lost < config.search.margin

    if config.search.keep is not None:
        good_enough(config.search.keep)
        chosen = trials[-1]
    else:
        keep = smallest_acceptable(good_enough)
        tried = {trial.keep: trial for trial in trials}
        everything = torch.arange(backbone.config.ffn, dtype=torch.int32)
        whole = Trial(1.0, (everything,) * backbone.config.layers, dense)
        chosen = tried.get(keep, whole)
        if chosen is whole:
            trials.append(whole)
    return _finish(job, dataset, dense, chosen, tuple(trials), command)


def _prepare(
    config: TaskConfig,
    backbone: Backbone,
    dataset: Dataset,
    work: Path,
    device: str,
    report: Reporter,
) -> Job:
    if config.max_tokens + config.prompt_tokens > backbone.config.max_tokens:
        raise ConfigError(
            f"max_tokens {config.max_tokens} and prompt_tokens {config.prompt_tokens} exceed the "
            f"{backbone.config.max_tokens} tokens of backbone {backbone.name!r}"
        )
    if len(dataset.labels) > MAX_LABELS:
        raise ConfigError(f"{len(dataset.labels)} labels; a task may have {MAX_LABELS}")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the work folder {work} cannot be made: {error.strerror}") from None
    wanted = config.tuning.precision
    bf16 = wanted == "bf16" or (wanted == "auto" and fast_bf16(device))
    exact = _network(config, backbone, dataset.labels, torch.float32, device)
    tuning = exact
    if bf16:
        tuning = _network(config, backbone, dataset.labels, torch.bfloat16, device)
    # The hash of what every step depends on. Search and golden inputs come after the steps.
    settings = config.model_dump(mode="json", exclude={"search", "golden", "description"})
    key = key_of(settings, backbone.fingerprint, dataset.sha256, bf16)
    return Job(
        config,
        backbone,
        dataset.labels,
        _examples(config, backbone, dataset.labels, dataset.train),
        _examples(config, backbone, dataset.labels, dataset.validation),
        tuning,
        exact,
        StageFiles(work),
        key,
        report,
    )


def _network(
    config: TaskConfig,
    backbone: Backbone,
    labels: Sequence[str],
    dtype: torch.dtype,
    device: str,
) -> Network:
    encoder = Encoder(backbone.config, backbone.tensors, TorchOps(dtype, device))
    record = _head_record(config, backbone, labels)
    verbalizer = None
    if isinstance(record, VerbalizerRecord):
        verbalizer = encoder.verbalizer(torch.tensor(record.token_ids))
    return Network(encoder, config.resolved_read, verbalizer)


def _head_record(
    config: TaskConfig, backbone: Backbone, labels: Sequence[str]
) -> LinearHeadRecord | VerbalizerRecord:
    if config.verbalizer is None:
        return LinearHeadRecord()
    if not backbone.config.has_mlm:
        raise ConfigError(f"verbalizer: backbone {backbone.name!r} has no MLM head; leave it out")
    if sorted(config.verbalizer) != sorted(labels):
        raise ConfigError(
            f"verbalizer: names {sorted(config.verbalizer)}, the rows' labels are {sorted(labels)}"
        )
    words = tuple(config.verbalizer[label] for label in labels)
    tokens = tuple(_token(backbone, word) for word in words)
    if len(set(tokens)) != len(tokens):
        raise ConfigError(f"verbalizer: two labels have the same word among {words}")
    return VerbalizerRecord(words=words, token_ids=tokens)


def _token(backbone: Backbone, word: str) -> int:
    """The one token of a label word in the middle of a sentence."""
    # Special tokens are among them: a word that the vocabulary lacks would become [UNK].
    special = backbone.tokenizer.get_added_tokens_decoder()
    # Byte-level vocabularies (RoBERTa) hold the space before a word in its token.
    for text in (f" {word}", word):
        tokens = backbone.tokenizer.encode(text, add_special_tokens=False).ids
        if len(tokens) == 1 and not (tokens[0] in special and special[tokens[0]].special):
            return tokens[0]
    raise ConfigError(
        f"verbalizer: {word!r} is not one token of backbone {backbone.name!r}; choose another word"
    )


def _examples(
    config: TaskConfig, backbone: Backbone, labels: Sequence[str], rows: Rows
) -> Examples:
    encoder = InputEncoder(
        backbone.tokenizer, backbone.config, config.resolved_template, config.max_tokens
    )
    numbers = {label: number for number, label in enumerate(labels)}
    classes = torch.tensor([numbers[label] for label in rows.labels], dtype=torch.long)
    return Examples(encoder.encode(rows.inputs), classes)


def _start(job: Job) -> Tuned:
    return start(job.tuning, len(job.labels), job.config.prompt_tokens, job.config.seed)


def _tune(
    job: Job, name: str, begin: Tuned, neurons: Sequence[Tensor] | None, epochs: int
) -> Tuned:
    kept = None if neurons is None else [rows.tolist() for rows in neurons]
    key = key_of(job.key, name, epochs, kept)
    done = job.stages.load_tuned(name, key)
    if done is not None:
        job.report.note(f"{name}: kept from an earlier run")
        return done
    tuned = tune(
        job.tuning,
        begin,
        neurons,
        job.train,
        job.validation,
        job.config.tuning,
        epochs,
        job.config.seed,
        job.report.step(name),
    )
    job.stages.save_tuned(name, key, tuned)
    job.report.note(f"{name}: validation accuracy {100 * tuned.validation_accuracy:.1f} %")
    return tuned


def _quantify(job: Job, tuned: Tuned) -> Tensor:
    key = key_of(job.key, "quantify")
    scores = job.stages.load_scores("quantify", key)
    if scores is None:
        progress = job.report.step("quantify")
        settings = job.config.attribution
        scores = score_neurons(job.exact, tuned, job.train, settings, job.config.seed, progress)
        job.stages.save_scores("quantify", key, scores)
    return scores


def _trial(job: Job, keep: float, scores: Tensor, dense: Tuned) -> Trial:
    neurons = select(scores, keep, job.config.attribution.scope)
    epochs = job.config.tuning.condense_epochs or job.config.tuning.epochs
    tuned = _tune(job, f"condense-{keep:.2f}", dense, neurons, epochs)
    return Trial(keep, neurons, tuned)


def _finish(
    job: Job,
    dataset: Dataset,
    dense: Tuned,
    chosen: Trial,
    trials: tuple[Trial, ...],
    command: str,
) -> Localized:
    everything = torch.arange(job.backbone.config.ffn, dtype=torch.int32)
    whole = (everything,) * job.backbone.config.layers
    measured: list[Measurement] = []
    test: dict[NetworkName, Evaluation] = {}
    results: tuple[tuple[NetworkName, Tuned, Sequence[Tensor]], ...] = (
        ("dense", dense, whole),
        ("localized", chosen.tuned, chosen.neurons),
    )
    for network, tuned, neurons in results:
        progress = job.report.step(f"test {network}")
        figures = _measure(job, tuned, neurons, job.validation, progress)
        measured += _measurements(network, "validation", figures)
        if len(dataset.test):
            rows = _examples(job.config, job.backbone, job.labels, dataset.test)
            test[network] = _measure(job, tuned, neurons, rows, progress)
            measured += _measurements(network, "test", test[network])
    overlay = _overlay(job, dataset, chosen, tuple(measured), command)
    return Localized(overlay, dense, trials, test)


def _measure(
    job: Job,
    tuned: Tuned,
    neurons: Sequence[Tensor],
    examples: Examples,
    progress: Progress,
) -> Evaluation:
    plan = job.exact.plan(tuned, neurons)
    scores = predict(job.exact.encoder, plan, examples.encodings, progress)
    return evaluate(scores.argmax(dim=1), examples.classes, len(job.labels))


def _measurements(
    network: NetworkName,
    split: Literal["validation", "test"],
    figures: Evaluation,
) -> list[Measurement]:
    values: list[tuple[Literal["accuracy", "macro_f1"], float]] = [
        ("accuracy", figures.accuracy),
        ("macro_f1", figures.macro_f1),
    ]
    return [
        Measurement(
            network=network, split=split, metric=metric, value=round(value, 6), rows=figures.rows
        )
        for metric, value in values
    ]


def _overlay(
    job: Job,
    dataset: Dataset,
    chosen: Trial,
    measured: tuple[Measurement, ...],
    command: str,
) -> Overlay:
    config, backbone, tuned = job.config, job.backbone, chosen.tuned
    head = None
    if tuned.weight is not None and tuned.bias is not None:
        head = LinearHead(tuned.weight, tuned.bias)
    prompt_tokens = 0 if tuned.prompt is None else len(tuned.prompt)
    components = ["ffn_neurons", *["prompt"] * bool(prompt_tokens), *["head"] * (head is not None)]
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
            "head": _head_record(config, backbone, job.labels),
            "components": components,
            "ffn_kept": [len(rows) for rows in chosen.neurons],
            "ffn_width": backbone.config.ffn,
            "metrics": measured,
            "provenance": Provenance(
                command=command,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seed=config.seed,
                data_sha256=dataset.sha256,
                settings=settings | {"searched_keep": chosen.keep, "search_step": STEP},
                versions={name: version(name) for name in ("taskbone", "torch", "tokenizers")},
                hardware=f"{platform.machine()}, {torch.get_num_threads()} threads",
            ),
            "golden": blank,
        }
    )
    overlay = Overlay(manifest, chosen.neurons, tuned.prompt, head)
    scores = probabilities(job.exact.encoder, backbone, overlay, config.resolved_golden)
    golden = tuple(
        Golden(input=item, scores=tuple(round(float(score), 6) for score in row))
        for item, row in zip(config.resolved_golden, scores, strict=True)
    )
    return dataclasses.replace(overlay, manifest=manifest.model_copy(update={"golden": golden}))
