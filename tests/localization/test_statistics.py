"""Statistics: values worked out by hand or in exact fractions, and laws over any counts."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localization.statistics import (
    Discordant,
    Interval,
    discordant,
    matthews,
    mcnemar,
    overlap,
    repeated,
    wilson,
)

counts = st.integers(1, 5000).flatmap(
    lambda rows: st.tuples(st.integers(0, rows), st.just(rows)),
)
answers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


class TestWilson:
    @pytest.mark.parametrize(
        ("hits", "rows", "low", "high"),
        [
            # 8 of 10: (0.8 + 0.19207 -+ 1.96 * sqrt(0.016 + 0.009604)) / 1.38415.
            (8, 10, 0.4902, 0.9433),
            # At the ends, z^2 / (n + z^2) and its complement.
            (0, 10, 0.0, 0.2775),
            (10, 10, 0.7225, 1.0),
        ],
    )
    def test_values_by_hand(self, hits: int, rows: int, low: float, high: float) -> None:
        found = wilson(hits, rows)
        assert found.low == pytest.approx(low, abs=5e-5)
        assert found.high == pytest.approx(high, abs=5e-5)

    def test_no_rows_say_nothing(self) -> None:
        assert wilson(0, 0) == Interval(0.0, 1.0)

    @given(counts)
    def test_it_holds_the_share_and_stays_between_0_and_1(self, count: tuple[int, int]) -> None:
        hits, rows = count
        found = wilson(hits, rows)
        assert 0 <= found.low <= hits / rows <= found.high <= 1
        assert found.high - found.low > 0

    @given(counts)
    def test_its_ends_are_just_z_deviations_from_the_share(self, count: tuple[int, int]) -> None:
        hits, rows = count
        for end in (wilson(hits, rows).low, wilson(hits, rows).high):
            deviation = math.sqrt(end * (1 - end) / rows)
            assert abs(hits / rows - end) == pytest.approx(1.96 * deviation, rel=1e-4, abs=1e-7)

    @given(counts)
    def test_misses_have_the_mirrored_interval(self, count: tuple[int, int]) -> None:
        hits, rows = count
        found, mirrored = wilson(hits, rows), wilson(rows - hits, rows)
        assert mirrored.low == pytest.approx(1 - found.high, abs=1e-12)
        assert mirrored.high == pytest.approx(1 - found.low, abs=1e-12)

    @given(counts)
    def test_more_rows_narrow_it(self, count: tuple[int, int]) -> None:
        hits, rows = count
        few, many = wilson(hits, rows), wilson(4 * hits, 4 * rows)
        assert many.high - many.low < few.high - few.low


class TestMcNemar:
    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            (0, 0, 1.0),
            (1, 0, 1.0),
            (5, 0, 2 / 32),
            (0, 6, 2 / 64),
            (3, 3, 1.0),
            (1, 9, 2 * (1 + 10) / 1024),
            (12, 5, 2 * (1 + 17 + 136 + 680 + 2380 + 6188) / 2**17),
        ],
    )
    def test_values_by_hand(self, first: int, second: int, expected: float) -> None:
        assert mcnemar(Discordant(first, second)) == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize(("first", "second"), [(2450, 2550), (3000, 3200), (4000, 1000)])
    def test_exact_for_thousands_of_rows(self, first: int, second: int) -> None:
        tosses = first + second
        tail = sum(math.comb(tosses, number) for number in range(min(first, second) + 1))
        found = mcnemar(Discordant(first, second))
        assert found == float(Fraction(2 * tail, 2**tosses))
        # The normal approximation with continuity correction agrees where it is good at all.
        approximate = math.erfc((abs(first - second) - 1) / math.sqrt(2 * tosses))
        if approximate > 1e-3:
            assert found == pytest.approx(approximate, rel=0.01)

    def test_beyond_the_smallest_float_it_is_zero(self) -> None:
        assert mcnemar(Discordant(0, 5000)) == 0.0

    @given(st.integers(0, 300), st.integers(0, 300))
    def test_symmetric_and_a_probability(self, first: int, second: int) -> None:
        value = mcnemar(Discordant(first, second))
        assert 0 < value <= 1
        assert value == mcnemar(Discordant(second, first))

    @given(st.integers(0, 200), st.integers(0, 200))
    def test_a_more_uneven_split_is_less_likely(self, fewer: int, gap: int) -> None:
        # The number of discordant rows stays the same: one row changes sides.
        even = Discordant(fewer + 1, fewer + 1 + gap)
        uneven = Discordant(fewer, fewer + 2 + gap)
        assert mcnemar(uneven) <= mcnemar(even)

    def test_discordant_rows_are_counted(self) -> None:
        # Right: both, first, second, second, none.
        found = discordant([0, 1, 0, 0, 2], [0, 0, 1, 2, 2], [0, 1, 1, 2, 0])
        assert found == Discordant(first_only=1, second_only=2)

    def test_discordant_rows_of_different_lengths(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            discordant([0, 1], [0, 1], [0])


class TestMatthews:
    def test_two_classes_by_hand(self) -> None:
        # TP 6, TN 3, FP 1, FN 2: (6 * 3 - 1 * 2) / sqrt(7 * 8 * 4 * 5).
        predicted = [1] * 6 + [0] * 3 + [1] * 1 + [0] * 2
        classes = [1] * 6 + [0] * 3 + [0] * 1 + [1] * 2
        assert matthews(predicted, classes) == pytest.approx(16 / math.sqrt(1120))

    def test_three_classes_by_hand(self) -> None:
        # [[2, 1, 0], [0, 2, 0], [1, 0, 4]]: 8 hits of 10; 3, 3, 4 predicted, 3, 2, 5 true.
        predicted = [0, 0, 1, 1, 1, 0, 2, 2, 2, 2]
        classes = [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
        by_hand = (80 - (9 + 6 + 20)) / math.sqrt((100 - 34) * (100 - 38))
        assert matthews(predicted, classes) == pytest.approx(by_hand)

    def test_one_class_only_is_no_better_than_guessing(self) -> None:
        assert matthews([0, 0, 0], [0, 1, 2]) == 0.0
        assert matthews([0, 1, 2], [1, 1, 1]) == 0.0
        assert matthews([], []) == 0.0

    def test_always_wrong_on_two_classes(self) -> None:
        assert matthews([0, 1, 1], [1, 0, 0]) == pytest.approx(-1)

    @given(answers)
    def test_bounds_and_symmetry(self, rows: list[tuple[int, int]]) -> None:
        predicted, classes = [row[0] for row in rows], [row[1] for row in rows]
        value = matthews(predicted, classes)
        assert -1 - 1e-12 <= value <= 1 + 1e-12
        assert value == pytest.approx(matthews(classes, predicted))

    @given(answers, st.permutations(range(5)))
    def test_names_of_classes_do_not_matter(
        self, rows: list[tuple[int, int]], names: list[int]
    ) -> None:
        predicted, classes = [row[0] for row in rows], [row[1] for row in rows]
        renamed = matthews([names[one] for one in predicted], [names[one] for one in classes])
        assert renamed == pytest.approx(matthews(predicted, classes))

    @given(st.lists(st.integers(0, 4), min_size=2).filter(lambda rows: len(set(rows)) > 1))
    def test_always_right_is_one(self, classes: list[int]) -> None:
        assert matthews(classes, classes) == pytest.approx(1)


class TestRepeated:
    def test_by_hand(self) -> None:
        found = repeated([0.80, 0.82, 0.84, 0.86])
        assert found.runs == 4
        assert found.mean == pytest.approx(0.83)
        # Squares 9 + 1 + 1 + 9 = 20 (1e-4), by 3.
        assert found.deviation == pytest.approx(math.sqrt(20e-4 / 3))

    def test_one_run_has_no_deviation(self) -> None:
        assert repeated([0.8]).deviation is None

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.floats(-5, 5))
    def test_moving_all_runs_moves_the_mean_only(self, values: list[float], by: float) -> None:
        before, after = repeated(values), repeated([value + by for value in values])
        assert after.mean == pytest.approx(before.mean + by, abs=1e-9)
        assert after.deviation == pytest.approx(before.deviation, abs=1e-9)
        assert min(values) - 1e-12 <= before.mean <= max(values) + 1e-12


neuron_sets = st.lists(st.sets(st.integers(0, 31)), min_size=3, max_size=3).map(
    lambda layers: [sorted(layer) for layer in layers]
)


class TestOverlap:
    def test_by_hand(self) -> None:
        found = overlap([[0, 1, 2], [], []], [[2, 3], [5], []], width=8)
        assert found.layers == (1 / 4, 0.0, None)
        assert found.overall == pytest.approx(1 / 5)
        # Expected to be shared: 3 * 2 / 8 in the first layer, of 6 kept in all.
        assert found.chance == pytest.approx(0.75 / (6 - 0.75))

    def test_nothing_kept_anywhere(self) -> None:
        assert overlap([[]], [[]], width=4).overall is None

    def test_different_depths_cannot_be_compared(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            overlap([[0]], [[0], [1]], width=4)

    @given(neuron_sets, neuron_sets)
    def test_bounds_and_symmetry(self, first: list[list[int]], second: list[list[int]]) -> None:
        found = overlap(first, second, width=32)
        assert found == overlap(second, first, width=32)
        for value in (found.overall, found.chance, *found.layers):
            assert value is None or 0 <= value <= 1

    @given(neuron_sets)
    def test_a_set_is_itself(self, neurons: list[list[int]]) -> None:
        assert all(value in (None, 1.0) for value in overlap(neurons, neurons, width=32).layers)

    def test_everything_kept_overlaps_fully_also_by_chance(self) -> None:
        whole = [list(range(16))] * 2
        assert overlap(whole, whole, width=16).chance == pytest.approx(1)
