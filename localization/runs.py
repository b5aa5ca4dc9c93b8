"""One run of `taskbone localize` or `taskbone evaluate`: between files and the store, and the
pipeline."""

import os
import shlex
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from localization.config import DataConfig, read_task_file
from localization.console import ConsoleReporter, repeats_table, summary_table
from localization.data import load_dataset, load_rows
from localization.errors import ConfigError, DataError
from localization.evaluation import Evaluation, evaluate
from localization.job import Reporter
from localization.page.report import render
from localization.pipeline import localize
from localization.results import Localized
from localization.summary import summarize
from model_store import artifact
from model_store.backbone import Backbone, load_backbone
from model_store.backend import answer_all, choose
from model_store.errors import ModelStoreError
from model_store.manifest import read_header
from model_store.store import Store
from model_store.tokenization import InputEncoder


def localize_file(
    task_file: Path,
    *,
    store: Store,
    data: Path | None,
    work_dir: Path | None,
    output: Path | None,
    publish: bool,
    device: str,
    console: Console,
    report: Reporter | None = None,
) -> Localized:
    """Localize the task of a task file; write the artifact to `output`, publish it where asked.

    A page with everything that was found is written beside the artifact.

    `data` is the folder that the task file's data paths are relative to; None: the task file's own.
    `report`: where progress goes; None: bars on the console.
    """
    config = read_task_file(task_file)
    root = data or task_file.parent
    if config.existing is not None:
        config = config.model_copy(update={"existing": str((root / config.existing).absolute())})
    backbone = open_backbone(store, config.backbone)
    target = output or Path("runs") / config.task / f"{config.task}.safetensors"
    try:  # before the work, not after it
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {target.parent} cannot be made: {error.strerror}") from None
    command = shlex.join(["taskbone", "localize", task_file.name])
    work = (work_dir or Path("runs")) / config.task
    results = []
    with nullcontext(report) if report is not None else ConsoleReporter.on(console) as reporter:
        for seed in range(config.seed, config.seed + config.repeats):
            one = config.model_copy(update={"seed": seed})
            dataset = load_dataset(one.data, root, seed)
            reporter.note(
                f"[bold]{one.task}[/] on {escape(backbone.name)}: {len(dataset.labels)} classes, "
                f"{len(dataset.train)} rows to tune on, {len(dataset.validation)} to validate, "
                f"{len(dataset.test)} to test"
            )
            results.append(
                localize(one, backbone, dataset, work, command, resolve_device(device), reporter)
            )
        result = max(results, key=lambda item: item.chosen.tuned.validation)
        written = artifact.write(result.overlay)
        verified = artifact.verify(written, backbone.config, backbone.fingerprint)
        page = render(summarize(result, other_neurons(store, backbone), len(written), results))
    _write(target, written)
    _write(target.with_suffix(".html"), page.encode())
    console.print(summary_table(result))
    if len(results) > 1:
        console.print(repeats_table(results))
    console.print(f"Artifact: {target} ({len(written) / 1000:.0f} KB)")
    console.print(f"Report: {target.with_suffix('.html')}")
    if publish:
        info = store.publish(verified)
        console.print(
            f"Published as version {info.version} of task {info.task} in {store.location}"
        )
    return result


def other_neurons(store: Store, backbone: Backbone) -> dict[str, tuple[Tensor, ...]]:
    """The kept neurons of every active task on the same backbone, by task."""
    result = {}
    for task in store.task_names():
        try:
            _, content = store.read(task, None)
            overlay = artifact.read(content, backbone.config, backbone.fingerprint)
        except ModelStoreError:  # of another backbone, or not active: nothing to compare with
            continue
        result[task] = overlay.neurons
    return result


def _write(target: Path, content: bytes) -> None:
    temporary = target.with_name(f".{target.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, target)  # noqa: PTH105 - the atomic call by its name


def evaluate_file(
    file: Path,
    *,
    store: Store,
    task: str,
    version: int | None,
    text: tuple[str, ...],
    label: str | None,
    device: str,
) -> tuple[int, tuple[str, ...], Evaluation]:
    """Measure a published version on a file's rows; gives (version, labels, figures).

    `text` and `label` name the columns; empty or None: `text`, or `text1` and `text2`, and `label`.
    """
    info, content = store.read(task, version)
    manifest, _ = read_header(content)
    backbone = open_backbone(store, manifest.backbone.fingerprint)
    overlay = artifact.read(content, backbone.config, backbone.fingerprint)
    columns = text or (("text1", "text2") if manifest.takes_pairs else ("text",))
    if len(columns) != 1 + manifest.takes_pairs:
        expected = "two text columns" if manifest.takes_pairs else "one text column"
        raise DataError(f"task {task!r} takes {expected}; {len(columns)} were named")
    names = columns[0] if len(columns) == 1 else (columns[0], columns[1])
    config = DataConfig(train=str(file.resolve()), text=names, label=label or "label")
    rows = load_rows(config.train, config, file.parent, split="test")
    numbers = {name: number for number, name in enumerate(manifest.labels)}
    unknown = sorted(set(rows.labels) - set(numbers))
    if unknown:
        raise DataError(
            f"{file}: label {unknown[0]!r} is not of task {task!r}; its labels: "
            f"{', '.join(manifest.labels)}"
        )
    # As a server on this machine answers: the same operations in the same precision.
    backend = choose(
        backbone.config,
        backbone.tensors,
        device=resolve_device(device),
        precision=None,
        threads=torch.get_num_threads(),
    )
    texts = InputEncoder(
        backbone.tokenizer, backbone.config, manifest.template, manifest.max_tokens
    )
    predicted = answer_all(backend, overlay, texts.encode(rows.inputs)).argmax(dim=1)
    classes = torch.tensor([numbers[name] for name in rows.labels])
    return info.version, manifest.labels, evaluate(predicted, classes, len(manifest.labels))


def open_backbone(store: Store, name: str | None) -> Backbone:
    """The named backbone, or the only one there is. Raises `NotFoundError` that lists them."""
    info = store.backbone(name)
    return load_backbone(store.backbone_path(info.fingerprint), info.name)


def resolve_device(device: str) -> str:
    """`auto` as `cuda` where there is one, `cpu` elsewhere."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, and torch sees no CUDA device")
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
