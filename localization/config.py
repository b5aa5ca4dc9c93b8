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
Metric = Literal["accuracy", "macro_f1", "matthews"]

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


class RateSearch(Frozen):
    """A short search for learning rates and prompt length, before the training proper.

    Each candidate is trained for a third of the epochs; the best on the validation rows goes on.
    """

    minutes: Annotated[float, Field(gt=0)]
    """No new candidate is begun after this time; the task file's own settings come first."""
    factors: Annotated[tuple[Annotated[float, Field(gt=0, le=1_000)], ...], Field(min_length=1)] = (
        1.0,
        0.3,
        3.0,
    )
    """On all learning rates together."""
    prompt_tokens: tuple[Annotated[int, Field(ge=0, le=512)], ...] = ()
    """Prompt lengths tried; none: only the task file's."""


class TuningConfig(Frozen):
    """How a prompt and a head are tuned on the frozen backbone."""

    epochs: Positive = 10
    condense_epochs: Positive | None = None
    """Epochs after neurons are removed; None takes `epochs`."""
    batch_size: Positive = 32
    prompt_learning_rate: Rate = 5e-3
    head_learning_rate: Rate = 1e-2
    """Of a head beside a prompt; with recovery, `delta_learning_rate` is the head's, too."""
    delta_learning_rate: Rate = 2e-3
    """Of deltas and norms; scales take half of it."""
    condense_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rates after neurons are removed, as a share of those before."""
    backbone_learning_rate: Rate = 1e-4
    """Of full fine-tuning, the yardstick; no overlay changes the backbone."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    patience: Positive = 3
    """Epochs without a better validation accuracy before tuning stops early."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor multiplies it natively, fp32 elsewhere."""

    search: RateSearch | None = None
    """None: the rates and the prompt length are taken as they stand."""

    def scaled(self, factor: float) -> "TuningConfig":
        """The same with all learning rates of an overlay times `factor`."""
        rates = ("prompt_learning_rate", "head_learning_rate", "delta_learning_rate")
        return self.model_copy(update={name: factor * getattr(self, name) for name in rates})


class AttributionConfig(Frozen):
    """How neurons and heads are scored; the defaults are what measured best, not the paper's.

    The paper's: `tokens: max, signed: true, rows: 20`.
    """

    score: Literal[
        "attribution",
        "activation",
        "gradient",
        "taylor",
        "fisher",
        "fluctuation",
        "magnitude",
        "random",
    ] = "attribution"
    """fluctuation looks neither at labels nor at `tokens` and `signed`: it finds what matters to a
    layer's output rather than to the task, and so suits `refit`."""
    rows: Positive = 200
    tokens: Literal["sum", "mean", "max"] = "sum"
    signed: bool = False
    scope: Literal["global", "layer"] = "global"
    labels: Literal["given", "predicted"] = "given"
    """predicted: the network's own answer stands for the label, so that rows need none."""


class BudgetConfig(Frozen):
    """How much is kept; exactly one of the three. None at all is `margin: 1.0`."""

    margin: Annotated[float, Field(gt=0, lt=100)] | None = None
    """The smallest network that loses less than this against the dense one, in points (per cent)
    of the metric on the validation rows. It is searched for."""
    keep: Share | None = None
    """This share of the neurons; with `heads`, of the work that neurons and heads make together."""
    speedup: Annotated[float, Field(ge=1, le=20)] | None = None
    """A forward this many times as fast as the dense network's, by costs measured here."""
    heads: bool | None = None
    """Whether attention heads may go, too. A task without all heads shares no batch with others.
    None: they may where recovery trains the attention, or where a speed is asked for."""

    @property
    def resolved_margin(self) -> float | None:
        """The margin, the default filled in; None where another budget is given."""
        if self.keep is None and self.speedup is None:
            return 1.0 if self.margin is None else self.margin
        return None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in ("margin", "keep", "speedup") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"budget: {' and '.join(given)} are given; one says how much is kept")
        return self


class RecoveryConfig(Frozen):
    """Low-rank deltas that make up for what is removed, and let the task change its layers.

    Deltas on queries, keys, values, output projection and both FFN maps, LayerNorms, and a scale
    for each neuron: trained on the whole network, cut with it, and trained on.
    """

    rank: Annotated[int, Field(ge=1, le=256)] = 8
    """In the third of the layers that matter most to the task (Pruning-Adapter)."""
    low_rank: Annotated[int, Field(ge=1, le=256)] = 8
    """In the other layers."""
    attention: bool = True
    """Deltas on attention, too. Without them, and with all heads, tasks share batches."""


class RefitConfig(Frozen):
    """Fitting the layers' outputs again after units are removed, without training.

    Only without a prompt: its vectors give activations unlike any text's, which spoil the means.
    """

    rank: Annotated[int, Field(ge=0, le=1_024)] = 24
    """Of the deltas that the fit is kept as; 0: no fit at all."""
    tokens: Positive = 8_000
    """Tokens of training rows, without their labels, that the fit is made on."""


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
    metric: Metric = "accuracy"
    """What the best epoch and the margin are chosen by."""
    inject: Literal["tune", "closed_form", "existing", "none"] = "tune"
    """What comes before scoring. tune: training (the paper's step 1). closed_form: a linear head by
    least squares, in seconds. existing: prompt and head of the artifact `existing`. none:
    training, but scores from before it (the paper's ablation); only with a verbalizer, or with
    scores that need no head."""
    existing: str | None = None
    """An artifact of this task that keeps the whole network (`budget: {keep: 1.0}` makes one);
    relative to the same folder as the data."""
    condense: Literal["tune", "closed_form", "none"] = "tune"
    """What comes after removal: training, a linear head by least squares, or the head as it is.
    Where neither `inject` nor `condense` is tune, nothing is trained at all."""
    tuning: TuningConfig = TuningConfig()
    attribution: AttributionConfig = AttributionConfig()
    budget: BudgetConfig = BudgetConfig()
    recovery: RecoveryConfig | None = None
    """None: prompt and head alone are trained."""
    refit: RefitConfig | None = None
    """None: no fit. A fit adds deltas to the overlay."""
    scales: bool = False
    """After removal, train a scale for each kept neuron and the FFN's output bias, too."""
    golden: Annotated[tuple[TextInput, ...], Field(min_length=1, max_length=MAX_GOLDEN)] | None = (
        None
    )
    """Inputs that every server checks before it serves the task. None takes built-in sentences."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    """Runs with seeds from `seed` on. The one that is best on the validation rows is taken, and
    mean and spread are shown."""

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
    def cuts_heads(self) -> bool:
        """Whether heads may go; see `BudgetConfig.heads`."""
        if self.budget.heads is not None:
            return self.budget.heads
        trained = self.recovery is not None and self.recovery.attention
        return trained or self.budget.speedup is not None

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
        headless = ("activation", "fluctuation", "magnitude", "random")
        needs_head = self.attribution.score not in headless
        if self.inject == "none" and self.verbalizer is None and needs_head:
            raise ValueError("inject: none leaves a linear head of zeros, which scores nothing")
        if self.verbalizer is not None and "closed_form" in (self.inject, self.condense):
            raise ValueError("inject, condense: closed_form makes a linear head, not a verbalizer")
        if self.inject == "closed_form" and self.prompt_tokens:
            raise ValueError("inject: closed_form tunes no prompt; set prompt_tokens to 0")
        if self.refit is not None and self.prompt_tokens:
            raise ValueError("refit: fits what texts give, not prompts; set prompt_tokens to 0")
        if self.condense != "tune" and self.budget.resolved_margin is not None:
            raise ValueError(f"condense: {self.condense} needs a budget of keep or speedup")
        if (self.inject == "existing") != (self.existing is not None):
            raise ValueError("existing: an artifact is named exactly where inject is existing")
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
