"""Intervals against exact ones, by their properties for any groups, and in simulation."""

import itertools
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, t
from statsmodels.stats.contingency_tables import mcnemar

import medr1
from medr1.errors import MedR1Error
from medr1.evaluation.intervals import (
    DIFFERENCE,
    bootstrap,
    freedom,
    interval,
    jackknife_interval,
    mean_interval,
    worth,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import coverage

LARGE = [0] * 40 + list(range(1, 10))
"""One group of 40 rows and nine of one."""


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (1, 3), (17, 40), (30, 30), (149, 150), (500, 1000)])
def test_single_rows_are_clopper_and_pearsons(k: int, n: int):
    exact = binomtest(k, n).proportion_ci(method="exact")
    assert interval([1] * k + [0] * (n - k), range(n)) == pytest.approx((exact.low, exact.high), abs=1e-7)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=40))
def test_a_difference_leaves_0_out_where_mcnemars_exact_test_rejects(differences: list[int]):
    gained, lost = differences.count(1), differences.count(-1)
    p = mcnemar([[0, gained], [lost, 0]], exact=True).pvalue if gained + lost else 1.0
    low, high = interval(differences, range(len(differences)), DIFFERENCE)
    assert (low > 0 or high < 0) == (p < 0.05)


def test_by_hand():
    # One group: E / (E + E'), two exponentials, is uniform; rows half right move half of it.
    assert interval([1, 1, 1], "aaa") == pytest.approx((0.025, 1))
    assert interval([1, 0], "aa") == pytest.approx((0.0125, 0.9875))
    # Two equal groups, all wrong, and the right one added: Beta(1, 2), whose upper 2.5 % begin at 1 - 0.025 ** (1 / 2)
    assert interval([0] * 10, [0, 1] * 5) == pytest.approx((0, 1 - 0.025**0.5))
    assert interval([], []) is None
    # A group of 3 and one of 1, all right; the added one is as large as a row's group is on average, 10 / 4. With
    # r = 2.5 low / (1 - low), P(r E0 >= 3 E1 + E2) = E exp(-(3 E1 + E2) / r) = 1 / ((1 + 3 / r) (1 + 1 / r))
    low, _ = interval([1, 1, 1, 1], "aaab")
    ratio = 2.5 * low / (1 - low)
    assert 1 / ((1 + 3 / ratio) * (1 + 1 / ratio)) == pytest.approx(0.025, abs=1e-6)


def test_values_are_checked():
    with pytest.raises(MedR1Error, match="2 values and 1 groups"):
        interval([1, 0], "a")
    with pytest.raises(MedR1Error, match="not between 0 and 1"):
        interval([1, 1.5], "ab")
    with pytest.raises(MedR1Error, match="not between 0 and 1"):
        interval([1, float("nan")], "ab")
    assert interval([1 + 1e-12, 1], "ab")[1] == 1  # rounding of who computed it


def test_one_large_group_is_not_forty_rows():
    """It was the interval of 49 independent rows."""
    values = [1.0] * 20 + [0.0] * 20 + [1.0] * 5 + [0.0] * 4
    low, high = medr1.interval(values, LARGE)
    alone = medr1.interval(values, range(49))
    assert high - low > 2.5 * (alone[1] - alone[0])
    assert worth(np.array([40, *[1] * 9])) == pytest.approx(49**2 / 1609)


def test_one_more_right_answer_does_not_lower_the_limit():
    """150 of 150 right in 30 groups of 5 was from 88.6 %, 149 from 96.1 %."""
    groups = [row // 5 for row in range(150)]
    limits = [interval([1] * (150 - wrong) + [0] * wrong, groups) for wrong in range(12)]
    assert all(better[0] > worse[0] for better, worse in itertools.pairwise(limits))
    assert limits[0][1] == 1 > limits[1][1]


scores = st.one_of(st.sampled_from([0.0, 1.0]), st.integers(0, 8).map(lambda eighths: eighths / 8))
grouped = st.lists(st.tuples(scores, st.integers(0, 6)), min_size=1, max_size=30)


@settings(max_examples=60)
@given(grouped, st.data())
def test_a_higher_value_never_lowers_a_limit(rows: list[tuple[float, int]], data: st.DataObject):
    values, groups = map(list, zip(*rows, strict=True))
    before = interval(values, groups)
    raised = [max(value, data.draw(scores)) for value in values]
    after = interval(raised, groups)
    assert after[0] >= before[0] - 1e-8
    assert after[1] >= before[1] - 1e-8


@settings(max_examples=60)
@given(grouped, st.randoms(use_true_random=False))
def test_names_order_and_sides_do_not_count(rows: list[tuple[float, int]], draw):
    values, groups = zip(*rows, strict=True)
    low, high = interval(values, groups)
    shuffled = draw.sample(rows, len(rows))
    assert interval([value for value, _ in shuffled], [f"patient {-group}" for _, group in shuffled]) == (low, high)
    assert interval([1 - value for value in values], groups) == pytest.approx((1 - high, 1 - low), abs=1e-8)
    doubled = interval([2 * value - 1 for value in values], groups, DIFFERENCE)
    assert doubled == pytest.approx((2 * low - 1, 2 * high - 1), abs=1e-7)
    mean = float(sum(map(Fraction, values)) / len(values))
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    assert high - low > 0.01  # a width, whatever agrees


def test_rows_of_a_group_that_repeat_each_other_add_nothing():
    right = [1, 0, 1, 1, 0, 1, 1, 1]
    repeated = [value for value in right for _ in range(7)]
    assert interval(repeated, [row // 7 for row in range(56)]) == pytest.approx(interval(right, range(8)))


def test_many_groups_are_rounded_and_quick():
    values = np.random.default_rng(0).random(3000)
    few = interval(values[:2000], range(2000))
    assert interval([*values[:2000], 0.5], range(2001)) == pytest.approx(few, abs=1e-3)


@pytest.mark.parametrize("regime", coverage.REGIMES)
def test_covers_in_simulation(regime: str):
    """A part of benchmarks/coverage.py: every regime, at the accuracies and correlations where others fell short."""
    sizes = coverage.REGIMES[regime]
    for accuracy, correlation in ((0.3, 0.3), (0.9, 0.9), (0.99, 0.1)):
        assert coverage.cell(sizes, accuracy, correlation, num=200, num_widths=1)["coverage"] >= 0.94


def test_the_table_stands_in_the_documentation():
    folder = Path(__file__).parents[1]
    assert (folder / "benchmarks/coverage.md").read_text() in (folder / "docs/statistics.md").read_text()


def test_is_not_uselessly_wide():
    """Beside an interval that knows accuracy and correlation; at few groups that hardly agree honesty costs more."""
    for correlation in coverage.CORRELATIONS:
        found = coverage.cell(coverage.REGIMES["100 of 5"], 0.3, correlation, num=10, num_widths=10)
        assert found["width"] < 1.25


def test_other_statistics_cover_in_simulation():
    for name, covered in coverage.other_statistics(num=100).items():
        assert covered >= 0.89, name  # 0.92 and more, but for 100 draws


def test_macro_interval_by_hand():
    # distances below 0.3 and 0.4 give sqrt(0.09+0.16)/2 = 0.25; above 0.06 and 0.08 give 0.1/2 = 0.05
    cells = [(0.8, (0.5, 0.86)), (0.6, (0.2, 0.68))]
    assert mean_interval(cells) == pytest.approx((0.45, 0.75))
    # fully correlated: distances add, 0.7/2 below and 0.14/2 above
    assert mean_interval(cells, np.ones((2, 2))) == pytest.approx((0.35, 0.77))
    assert mean_interval([]) is None


def test_unbounded_by_hand():
    # Single rows 0, 1, 2, 5: the jackknife is Student's interval, mean 2, variance 14/3, error sqrt(14/12)
    half = t.ppf(0.975, 3) * (14 / 12) ** 0.5
    assert jackknife_interval([0, 1, 2, 5], "abcd") == pytest.approx((2 - half, 2 + half))
    assert jackknife_interval([0.1] * 49, LARGE) is None  # what the nine say of the one cannot be told
    assert jackknife_interval([], []) is None
    assert (freedom(np.ones(7)), freedom(np.array([24] * 6 + [1] * 60))) == (6, pytest.approx(3516**2 / 1990716 - 1))


def test_bootstrap_of_a_mean():
    rng = np.random.default_rng(3)
    values, groups = rng.random(200) < 0.7, np.repeat(np.arange(40), 5).tolist()
    means, tail = bootstrap(lambda rows: np.array([values[rows].mean(), 1.0]), groups, seed=0)
    assert means.shape == (1000, 2)
    assert np.quantile(means[:, 0], [tail, 1 - tail]) == pytest.approx(interval(values, groups), abs=0.03)
    assert 0.015 < tail < 0.025
    assert bootstrap(lambda rows: rows, "aa", seed=0) is None
