"""What an answer costs: the time of one batch and the work around it, as formulas with measured
coefficients, and what follows from them for any number of tasks. Pure arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """What is in one batch; a task is cold where its plan is not warm."""

    tokens: float
    sequences: float
    warm_tasks: float
    cold_tasks: float
    cold_tokens: float
    """Of the sequences of cold tasks."""

    def terms(self) -> tuple[float, ...]:
        """In the order of the coefficients of `BatchCost`."""
        return (
            1.0, self.tokens, self.sequences, self.warm_tasks, self.cold_tasks, self.cold_tokens,
        )  # fmt: skip


@dataclass(frozen=True)
class BatchCost:
    """Seconds of one batch: a constant, and so many for each of what is in it."""

    fixed_s: float
    token_s: float = 0.0
    sequence_s: float = 0.0
    warm_task_s: float = 0.0
    cold_task_s: float = 0.0
    cold_token_s: float = 0.0
    """What a cold task's token takes beyond any token's."""

    def seconds(self, batch: Batch) -> float:
        """Of this batch."""
        return sum(a * b for a, b in zip(self.coefficients(), batch.terms(), strict=True))

    def coefficients(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class RequestCost:
    """Seconds of a core that one request takes around the forward, and what it waits besides."""

    loop_s: float
    """Of the replica's event loop: HTTP, JSON, tokens."""
    door_s: float = 0.0
    """Of HAProxy."""
    client_s: float = 0.0
    """Of the client; 0 where it has a machine of its own."""
    wait_s: float = 0.0
    """In sockets and until sleeping threads are awake; takes no core."""
    input_s: float = 0.0
    """Of the event loop, for each input beyond the first."""

    def loop_of(self, inputs: int) -> float:
        """Of the event loop, for a request of so many inputs."""
        return self.loop_s + (inputs - 1) * self.input_s


@dataclass(frozen=True)
class Fit:
    """Coefficients, and how far they are from what they were fitted to."""

    cost: BatchCost
    mean_error: float
    """Of the relative deviations, without their signs."""
    worst_error: float


def fit(batches: Sequence[Batch], seconds: Sequence[float]) -> Fit:
    """The coefficients whose relative errors have the least squares, none of them negative.

    A coefficient that would be negative is left out, the most negative one first: what costs time
    does not save any.
    """
    measured = np.array(seconds)
    terms = np.array([batch.terms() for batch in batches])
    # What no batch has varies with nothing.
    used = [column for column in range(terms.shape[1]) if terms[:, column].any()]
    found = np.zeros(terms.shape[1])
    while True:
        weighted = terms[:, used] / measured[:, None]
        solved = np.linalg.lstsq(weighted, np.ones(len(measured)), rcond=None)[0]
        if (solved >= 0).all():
            break
        del used[int(solved.argmin())]
    found[used] = solved
    errors = np.abs(terms @ found / measured - 1)
    return Fit(BatchCost(*map(float, found)), float(errors.mean()), float(errors.max()))


def popularity(tasks: int, skew: float) -> Numbers:
    """Each task's share of the requests by Zipf's law `[tasks]`: task k has 1 / (k + 1) ** skew."""
    weights = 1 / np.arange(1, tasks + 1) ** skew
    shares: Numbers = weights / weights.sum()
    return shares


def expected_batch(
    shares: Numbers, warm: int, sequences: int, tokens: float, turn: int = 1
) -> Batch:
    """What is in a batch on average, when the `warm` most asked tasks are warm.

    `turn`: sequences that are drawn together, as a request has several of one task.
    """
    draws = sequences / turn
    present = 1 - (1 - shares) ** draws
    return Batch(
        sequences * tokens,
        sequences,
        float(present[:warm].sum()),
        float(present[warm:].sum()),
        float(shares[warm:].sum()) * sequences * tokens,
    )


@dataclass(frozen=True)
class Work:
    """What is asked: tasks by Zipf's law, and requests that are all alike."""

    tasks: int
    skew: float
    tokens: float
    """Of one sequence, prompt included."""
    inputs: int = 1
    """Sequences of one request, all of one task."""


@dataclass(frozen=True)
class Replica:
    """What one replica has."""

    batch_tokens: int
    warm: int
    """Plans that it can keep warm."""
    threads: int
    """Of its engine."""


@dataclass(frozen=True)
class Capacity:
    """The most that one replica answers, and what sets it."""

    requests_per_s: float
    batch_s: float
    sequences: int
    """Of a full batch."""
    core_s: float
    """Of one request, engine and all around it."""
    limit: str
    """`engine` or `event loop`."""


def capacity(cost: BatchCost, around: RequestCost, work: Work, replica: Replica) -> Capacity:
    """Of a replica that has as many cores as it keeps busy.

    The engine and the event loop are different threads: the slower one sets the rate.
    """
    shares = popularity(work.tasks, work.skew)
    sequences = max(1, int(replica.batch_tokens // work.tokens))
    batch = expected_batch(shares, replica.warm, sequences, work.tokens, work.inputs)
    batch_s = cost.seconds(batch)
    engine = sequences / batch_s / work.inputs
    loop_s = around.loop_of(work.inputs)
    loop = 1 / loop_s if loop_s else float("inf")
    core_s = replica.threads * batch_s / sequences * work.inputs + loop_s + around.door_s
    limit = "engine" if engine <= loop else "event loop"
    return Capacity(min(engine, loop), batch_s, sequences, core_s, limit)


def hit_share(shares: Numbers, warm: int) -> float:
    """Share of the requests whose task is warm when the most asked ones are."""
    return float(shares[:warm].sum())


def mean_wait_of_md1(rate: float, service_s: float) -> float:
    """Mean wait of Poisson arrivals before one server that takes always the same time."""
    load = rate * service_s
    assert load < 1, load
    return load * service_s / (2 * (1 - load))


def as_record(cost: Any) -> dict[str, float]:
    """A cost's coefficients in microseconds, for a report."""
    return {
        field.name.removesuffix("_s") + "_us": round(1e6 * getattr(cost, field.name), 3)
        for field in fields(cost)
    }
