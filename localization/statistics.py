"""How far measured figures can be trusted, and how alike two neuron sets are. Pure numbers.

Knows counts, class indices and neuron indices; nothing of tensors, networks or where rows come
from.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The normal distribution has 95 % of its mass between -Z_95 and Z_95."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a share; both ends are 0 to 1."""

    low: float
    high: float


def wilson(hits: int, rows: int) -> Interval:
    """The 95 % Wilson score interval of `hits` among `rows`; 0 to 1 where there are no rows."""
    assert 0 <= hits <= rows
    if rows == 0:
        return Interval(0.0, 1.0)
    share, spread = hits / rows, Z_95**2 / rows
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # The ends touch 0 and 1 exactly there; rounding must not push them past, or past the share.
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == rows else min(1.0, centre + half)
    return Interval(low, high)


@dataclass(frozen=True)
class Discordant:
    """On how many rows exactly one of two classifiers is right."""

    first_only: int
    second_only: int


def discordant(first: Sequence[int], second: Sequence[int], classes: Sequence[int]) -> Discordant:
    """Compare two classifiers' class indices with the true ones, row by row.

    Raises `ValueError` where the lengths differ.
    """
    first_only = second_only = 0
    for one, other, true in zip(first, second, classes, strict=True):
        first_only += one == true != other
        second_only += other == true != one
    return Discordant(first_only, second_only)


def mcnemar(counts: Discordant) -> float:
    """McNemar's exact test, two-sided: how likely a split at least this uneven is by chance alone.

    Where the classifiers are equally good, each discordant row is a fair coin. Without discordant
    rows it is 1.
    """
    tosses = counts.first_only + counts.second_only
    fewer = min(counts.first_only, counts.second_only)
    assert fewer >= 0
    # Whole numbers up to the last division: exact for any number of rows.
    term = total = 1
    for number in range(fewer):
        term = term * (tosses - number) // (number + 1)
        total += term
    return min(1.0, 2 * total / (1 << tosses))


def matthews(predicted: Sequence[int], classes: Sequence[int]) -> float:
    """Matthews correlation of predicted and true class indices, for any number of classes (R_K).

    1 is always right, 0 no better than guessing (or one class only), below 0 worse than guessing.
    Raises `ValueError` where the lengths differ.
    """
    hits = sum(one == other for one, other in zip(predicted, classes, strict=True))
    rows, guesses, truths = len(classes), Counter(predicted), Counter(classes)
    covariance = hits * rows - sum(count * truths[name] for name, count in guesses.items())
    guess_variance = rows**2 - sum(count**2 for count in guesses.values())
    true_variance = rows**2 - sum(count**2 for count in truths.values())
    if guess_variance == 0 or true_variance == 0:
        return 0.0
    return covariance / (math.sqrt(guess_variance) * math.sqrt(true_variance))


@dataclass(frozen=True)
class Repeated:
    """A figure measured in several runs that differ in their seed only."""

    runs: int
    mean: float
    deviation: float | None
    """Sample standard deviation (divided by runs - 1); None for a single run."""


def repeated(values: Sequence[float]) -> Repeated:
    """Mean and sample standard deviation of at least one run."""
    assert values
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Repeated(1, mean, None)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Repeated(len(values), mean, math.sqrt(squares / (len(values) - 1)))


@dataclass(frozen=True)
class Overlap:
    """Jaccard index of two tasks' neuron sets: shared neurons by neurons that either keeps.

    None stands where neither keeps a neuron.
    """

    overall: float | None
    chance: float | None
    """What sets of the same sizes, drawn at random in each layer, would give."""
    layers: tuple[float | None, ...]


def overlap(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], width: int) -> Overlap:
    """Compare two neuron sets: the indices kept per layer, of `width` neurons a layer.

    Raises `ValueError` where the numbers of layers differ.
    """
    shared: list[int] = []
    either: list[int] = []
    expected = 0.0
    sizes = 0
    for one, other in zip(map(set, first), map(set, second), strict=True):
        shared.append(len(one & other))
        either.append(len(one | other))
        expected += len(one) * len(other) / width
        sizes += len(one) + len(other)
    return Overlap(
        _share(sum(shared), sum(either)),
        _share(expected, sizes - expected),
        tuple(_share(both, any_) for both, any_ in zip(shared, either, strict=True)),
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
