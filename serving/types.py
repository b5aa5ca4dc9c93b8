"""The records that pass between the service and those who ask it. No HTTP, no torch, no Ray."""

from dataclasses import dataclass

from model_store.manifest import Measurement, TextInput

__all__ = ["Prediction", "TaskAnswer", "TaskInfo", "TextInput", "Timings"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one input: the best label, its probability, and every label's probability."""

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went, in milliseconds."""

    tokenize_ms: float
    queue_ms: float
    forward_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """One prediction per input, in the order of the inputs, and the version that made them."""

    task: str
    version: int
    predictions: tuple[Prediction, ...]
    timings_ms: Timings


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a caller may know about a task's active version."""

    task: str
    version: int
    digest: str
    description: str
    labels: tuple[str, ...]
    takes_pairs: bool
    kept_share: float
    prompt_tokens: int
    max_tokens: int
    bytes: int
    published_at: str
    metrics: tuple[Measurement, ...]
