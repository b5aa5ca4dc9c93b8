"""The task file: what a user writes in YAML, with every default. Knows no torch."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from localization.errors import ConfigError
from model_store.manifest import (
    MAX_GOLDEN,
    Frozen,
    Share,
    TaskName,
    TextInput,
    check_template,
    describe,
)

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, lt=10)]

# Inputs of our own, so that an artifact never carries a row of anybody's training data.
DEFAULT_GOLDEN: tuple[str, ...] = (
    "The lake was calm and the picnic turned out better than anyone had hoped.",
    "Please tell me how to change the address on my account.",
    "A long, dull evening that nobody in the room will want to repeat.",
    "Who painted the ceiling of the old town hall, and in which year?",
)


class DataConfig(Frozen):
    """Where the rows are: files (.jsonl, .csv, .tsv, .parquet) or a Hugging Face data set id.

    Paths are relative to the folder that the task file lies in, or to `--data`.
    """

    train: str
    test: str | None = None
    text: str | tuple[str, str] = "text"
    """Column of the text, or the two columns of a pair."""
    label: str = "label"
    max_train_rows: Positive | None = None
    """A random sample of so many training rows; None takes all."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1


class TuningConfig(Frozen):
    """How a prompt and a head are tuned on the frozen backbone."""

    epochs: Positive = 10
    condense_epochs: Positive | None = None
    """Epochs after neurons are removed; None takes `epochs`."""
    batch_size: Positive = 32
    prompt_learning_rate: Rate = 5e-3
    head_learning_rate: Rate = 1e-2
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    patience: Positive = 3
    """Epochs without a better validation accuracy before tuning stops early."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor multiplies it natively, fp32 elsewhere."""


class AttributionConfig(Frozen):
    """How neurons are scored; the defaults are what measured best, not the paper's choice.

    The paper's: `tokens: max, signed: true, rows: 20`.
    """

    score: Literal["attribution", "activation", "gradient", "random"] = "attribution"
    rows: Positive = 200
    tokens: Literal["sum", "mean", "max"] = "sum"
    signed: bool = False
    scope: Literal["global", "layer"] = "global"


class SearchConfig(Frozen):
    """Which share of the neurons is kept: the smallest that costs less than `margin`, or `keep`."""

    margin: Annotated[float, Field(gt=0, lt=100)] = 1.0
    """Allowed loss of validation accuracy, in points (per cent), against the dense network."""
    keep: Share | None = None
    """Take this share without searching."""


class TaskConfig(Frozen):
    """A task file."""

    task: TaskName
    description: str = ""
    backbone: str | None = None
    """Name or fingerprint (or its beginning) in the store; None takes the only one there is."""
    data: DataConfig
    template: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    """None: the text alone, or the pair as two segments."""
    read: Literal["cls", "mask", "mean"] | None = None
    """None: `mask` with a verbalizer, `mean` otherwise."""
    verbalizer: dict[str, str] | None = None
    """Label -> word. The MLM head then answers at `{mask}`; without it a linear head is tuned."""
    prompt_tokens: Annotated[int, Field(ge=0, le=512)] = 10
    max_tokens: Annotated[int, Field(ge=8)] = 128
    inject: bool = True
    """Tune the prompt before neurons are scored (the paper's step 1). Off only with a verbalizer or
    scores that need no head: a linear head that has not been tuned says nothing about neurons."""
    tuning: TuningConfig = TuningConfig()
    attribution: AttributionConfig = AttributionConfig()
    search: SearchConfig = SearchConfig()
    golden: Annotated[tuple[TextInput, ...], Field(min_length=1, max_length=MAX_GOLDEN)] | None = (
        None
    )
    """Inputs that every server checks before it serves the task. None takes built-in sentences."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def takes_pairs(self) -> bool:
        """Whether a row has two texts."""
        return not isinstance(self.data.text, str)

    @property
    def resolved_template(self) -> tuple[str, ...]:
        """The template, the default filled in."""
        if self.template is not None:
            return self.template
        return ("{text1}", "{text2}") if self.takes_pairs else ("{text}",)

    @property
    def resolved_read(self) -> Literal["cls", "mask", "mean"]:
        """The read position, the default filled in."""
        return self.read or ("mask" if self.verbalizer else "mean")

    @property
    def resolved_golden(self) -> tuple[TextInput, ...]:
        """The golden inputs, the default filled in."""
        if self.golden is not None:
            return self.golden
        if self.takes_pairs:
            return tuple(pairwise(DEFAULT_GOLDEN))
        return DEFAULT_GOLDEN

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        template = self.resolved_template
        check_template(template)
        if any("{text1}" in part for part in template) != self.takes_pairs:
            raise ValueError("template: {text1} and {text2} need two columns in data.text")
        has_mask = any("{mask}" in part for part in template)
        if self.verbalizer is not None and not has_mask:
            raise ValueError("verbalizer: needs a template with {mask}")
        if self.resolved_read == "mask" and not has_mask:
            raise ValueError("read: 'mask' needs a template with {mask}")
        if self.verbalizer is not None and self.resolved_read != "mask":
            raise ValueError("verbalizer: reads 'mask'")
        if not self.prompt_tokens and self.verbalizer is not None:
            raise ValueError("prompt_tokens: 0 with a verbalizer leaves nothing to tune")
        needs_head = self.attribution.score in ("attribution", "gradient")
        if not self.inject and self.verbalizer is None and needs_head:
            raise ValueError("inject: must be on for this score with a linear head")
        if not all(isinstance(item, str) != self.takes_pairs for item in self.resolved_golden):
            raise ValueError("golden: every input must be like the data's rows, texts or pairs")
        return self


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing a key that stands twice: which of the two was meant?"""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def read_task_file(file: Path) -> TaskConfig:
    """Read and check a task file. Raises `ConfigError` that names every wrong field."""
    try:
        raw = yaml.load(file.read_text(), Loader=_Loader)  # noqa: S506 - a safe loader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: a mapping of fields is expected")
    try:
        return TaskConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{file}: {describe(error)}") from None
