"""What a localization found, as the report page says it: plain numbers and texts.

Knows nothing of tensors, nor of how figures are got or shown. Shares and accuracies are 0 to 1;
costs are in trainings, where 1 is what tuning the dense network took.
"""

from dataclasses import dataclass

from localization.statistics import Discordant, Overlap, Repeated


@dataclass(frozen=True)
class NetworkResult:
    """One network's answers to the rows that it was measured on. Shares are 0 to 1."""

    hits: int
    rows: int
    macro_f1: float
    matthews: float
    neurons_kept: float
    """Share of the feed-forward neurons."""
    heads_kept: float
    """Share of the attention heads."""
    artifact_bytes: int | None = None
    speed_up: float | None = None
    """How many times as fast as the dense network."""
    against_dense: Discordant | None = None
    """Rows that only the dense network (first) and only this one (second) gets right."""
    repeated: Repeated | None = None
    """Accuracy over several seeds."""

    @property
    def accuracy(self) -> float:
        """Share of the rows that it gets right; at least one row is there."""
        return self.hits / self.rows


@dataclass(frozen=True)
class Splits:
    """How many rows each split has."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class KeepCurve:
    """One way of scoring neurons: accuracy at each share kept, both 0 to 1, by rising share."""

    method: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class KeepCurves:
    """Accuracy against the share of neurons kept, on the rows that `split` names."""

    split: str
    dense: float | None
    curves: tuple[KeepCurve, ...]


@dataclass(frozen=True)
class Kept:
    """Which units of each layer are kept: their indices, below `width`."""

    width: int
    layers: tuple[tuple[int, ...], ...]

    @property
    def share(self) -> float:
        """Share kept over all layers, 0 to 1."""
        return sum(map(len, self.layers)) / (self.width * len(self.layers))


@dataclass(frozen=True)
class TaskOverlap:
    """How alike this task's neurons and another task's are."""

    task: str
    overlap: Overlap


@dataclass(frozen=True)
class TrainingCurve:
    """Validation accuracy (0 to 1) after each epoch of one tuning run."""

    name: str
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Mistake:
    """A row answered wrongly: one text or a pair, and the wrong class's probability (0 to 1)."""

    texts: tuple[str, ...]
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class TrialResult:
    """One trial of the search. `asked` says what was tried, such as "keep 40 %"."""

    asked: str
    neurons_kept: float
    heads_kept: float
    validation_accuracy: float
    accepted: bool
    cost: float
    """In trainings: 1 is what tuning the dense network took."""


@dataclass(frozen=True)
class Report:
    """All that the page says. What is empty or None is left out, or said to be missing."""

    task: str
    description: str
    backbone: str
    labels: tuple[str, ...]
    created: str
    command: str
    hardware: str
    versions: tuple[tuple[str, str], ...]
    splits: Splits
    budget: str
    """What was asked for, in words."""
    spent: float | None
    """In trainings: 1 is what tuning the dense network took."""
    dense: NetworkResult
    """Measured, as all networks, on the test rows; on the validation rows where there are none."""
    localized: NetworkResult | None = None
    recovered: NetworkResult | None = None
    keep_curves: KeepCurves | None = None
    neurons: Kept | None = None
    """The feed-forward neurons kept; None: all."""
    heads: Kept | None = None
    """The attention heads kept; None: all."""
    overlaps: tuple[TaskOverlap, ...] = ()
    trainings: tuple[TrainingCurve, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Rows of each true class (outer) by predicted class (inner), in the order of `labels`."""
    mistakes: tuple[Mistake, ...] = ()
    trials: tuple[TrialResult, ...] = ()

    @property
    def networks(self) -> tuple[tuple[str, NetworkResult], ...]:
        """The networks measured, by name, dense first."""
        named = (
            ("dense", self.dense),
            ("localized", self.localized),
            ("recovered", self.recovered),
        )
        return tuple((name, result) for name, result in named if result is not None)

    @property
    def measured_on(self) -> str:
        """Which rows the networks' figures are of."""
        return "test" if self.splits.test else "validation"
