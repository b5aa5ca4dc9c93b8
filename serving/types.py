"""The records that pass between the service and those who ask it. No HTTP, no torch, no Ray."""

from dataclasses import dataclass
from typing import Literal

from model_store.manifest import Measurement, TextInput
from serving.errors import ForbiddenError

__all__ = [
    "ANYBODY",
    "PLAIN",
    "Ask",
    "Batch",
    "Caller",
    "CanaryInfo",
    "LayerNeurons",
    "NeuronMap",
    "NeuronOverlap",
    "Operation",
    "Prediction",
    "Scope",
    "Stages",
    "TaskAnswer",
    "TaskInfo",
    "TextInput",
    "Timings",
]

Scope = Literal["predict", "admin", "metrics"]
SCOPES: frozenset[Scope] = frozenset(("predict", "admin", "metrics"))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the name of the key that was shown, and what it opens. Never the key itself."""

    name: str = "anonymous"
    scopes: frozenset[Scope] = frozenset(("predict", "metrics"))
    tasks: frozenset[str] | None = None
    """The tasks that the key is for; None: all."""
    weight: float = 1.0
    """The share of the queue and of the turns that it gets against other keys."""

    def may(self, task: str) -> bool:
        """Whether the key is for this task."""
        return self.tasks is None or task in self.tasks

    def check(self, task: str) -> None:
        """Raise `ForbiddenError` unless the key is for this task, whether or not there is one."""
        if self.tasks is not None and task not in self.tasks:
            raise ForbiddenError(
                f"the key {self.name!r} is not for the task {task[:80]!r}; it is for: "
                + (", ".join(sorted(self.tasks)[:20]) or "no task")
            )


ANYBODY = Caller()
"""Who shows no key, where none is needed."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Batch:
    """One forward of the engine over all that it answered. Times in seconds, `started` by the
    engine's clock. One record for all of its requests: equal is what is the same."""

    started: float
    forward_s: float
    requests: int
    sequences: int
    tokens: int
    tasks: int


@dataclass(slots=True)
class Stages:
    """How far a request to one task has come. Times by `time.perf_counter`."""

    task: str
    version: int
    started: float
    tokenized: float
    sequences: int
    tokens: int
    """Of all sequences, prompts included."""
    batches: tuple[Batch, ...] = ()
    """Those that answered some of its sequences; none until all are answered."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller says with a predict request besides task and inputs."""

    request_id: str = ""
    """Decides, with the task, whether a canary answers: the same id gets the same version."""
    caller: Caller = ANYBODY
    deadline: float | None = None
    """By `time.perf_counter`; after it nobody waits for the answer any more."""
    truncate: bool = True
    """Cut inputs that are too long for the task; else they are refused."""
    version: int | None = None
    """The version that shall answer; None: the one that serves the task."""
    stages: list[Stages] | None = None
    """Where to note what the answer took; None: nobody asks."""


PLAIN = Ask()
"""Nothing said but task and inputs."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A change of what is served, from its acceptance to its end on every replica."""

    id: str
    kind: str
    """`register`, `activate`, `rollback`, `canary`, `shadow`, `deactivate` or `delete`."""
    task: str
    version: int | None
    digest: str | None
    by: str
    """The name of the key that asked for it."""
    started_at: str
    """UTC in ISO 8601."""
    state: Literal["running", "done", "failed"] = "running"
    step: str = ""
    """What is being done: `verify`, `stage`, `publish`, `serve`, `drain`."""
    replicas: int = 0
    ready: int = 0
    """How many of the live `replicas` have done the step."""
    created: bool = False
    """Whether a new version came into being; False: these very bytes were there already."""
    error_type: str = ""
    error: str = ""


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
    tokens: int
    """How many the inputs had, with the template and the prompt: what the request weighed."""


@dataclass(frozen=True, slots=True)
class CanaryInfo:
    """A version that answers `percent` of a task's requests."""

    version: int
    percent: float


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
    canary: CanaryInfo | None = None
    shadow: int | None = None
    """The version whose answers are compared with those given."""


@dataclass(frozen=True, slots=True)
class LayerNeurons:
    """What a version keeps of one layer."""

    kept: int
    """How many feed-forward neurons."""
    neurons: bytes
    """Which: neuron n is bit n % 8, the lowest first, of byte n // 8."""
    heads: tuple[int, ...]
    """Which attention heads, ascending."""


@dataclass(frozen=True, slots=True)
class NeuronOverlap:
    """How much of two tasks' feed-forward neurons is the same, over all layers."""

    task: str
    version: int
    """The other task's active version."""
    kept: int
    """Neurons that the other task keeps."""
    shared: int
    """Neurons that both keep."""
    by_chance: float
    """What two random choices with as many neurons in each layer would share on average."""
    jaccard: float
    """`shared` divided by the neurons that at least one of them keeps, 0 to 1."""


@dataclass(frozen=True, slots=True)
class NeuronMap:
    """What a task's active version keeps of the backbone, and its overlap with other tasks."""

    task: str
    version: int
    digest: str
    ffn_width: int
    """Feed-forward neurons of a layer of the backbone."""
    heads: int
    """Attention heads of a layer of the backbone."""
    layers: tuple[LayerNeurons, ...]
    overlaps: tuple[NeuronOverlap, ...]
