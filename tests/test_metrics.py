"""Numbers worked by hand, agreement with scipy, coverage in simulation, and undefined staying undefined."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, permutation_test
from statsmodels.stats.contingency_tables import mcnemar

from medr1.errors import MedR1Error
from medr1.evaluation.metrics import (
    MIN_N,
    bootstrap,
    cluster_bootstrap,
    compare,
    difference_interval,
    flip_rate,
    holm,
    interval,
    judged,
    macro,
    mean_interval,
    paired_change,
    paired_p,
    summarise,
    wilson,
)


def row(id: str, correct: bool, **fields: object) -> dict:
    defaults = {
        "group": id,
        "modality": "CT",
        "question_type": "Disease Diagnosis",
        "chance": 0.25,
        "outcome": "letter",
        "finish": "stop",
        "format_ok": True,
        "tokens": 10,
    }
    return {**defaults, "id": id, "correct": correct, **fields}


def test_wilson_by_hand():
    # n=10, k=8, z=1.959964: z^2=3.841459; centre (0.8+0.192073)/(1.384146)=0.716741
    # half 1.959964/1.384146*sqrt(0.016+0.009604)=1.416010*0.160012=0.226578
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    # k=n: the upper limit is 1 and the lower n/(n+z^2) = 20/23.841459
    assert wilson(20, 20) == pytest.approx((0.838875, 1.0), abs=1e-6)
    assert wilson(0, 0) is None


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 3), (17, 40), (500, 1000), (30, 30)])
def test_wilson_is_scipys(k: int, n: int):
    ci = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((ci.low, ci.high), abs=1e-12)


def test_interval_of_groups_by_hand():
    single = [True, False, True, True]
    assert interval(single, "abcd") == wilson(3, 4)
    # Two rows a group that always agree: 4 groups, 8 rows, mean 1/2. Sums of deviations are +1,+1,-1,-1, so
    # the variance of the mean is 4/64*4/3 = 1/12 and the effective size (1/4)/(1/12) = 3 (not 4: the unbiased
    # variance divides by 3). Few groups: (t_7/t_3 at 97.5 %)^2 = (2.364624/3.182446)^2 = 0.552082.
    values, groups = [1, 1, 1, 1, 0, 0, 0, 0], "aabbccdd"
    assert interval(values, groups) == pytest.approx(wilson(1.5 * 0.552082, 3 * 0.552082), abs=1e-5)
    # All right: no variance to estimate, so five groups count as five.
    assert interval([1] * 10, "aabbccddee") == wilson(5, 5)
    assert interval([1, 0, 1], "aaa") == wilson(2 / 3, 1)
    assert interval([], "") is None


def test_groups_that_agree_up_to_rounding_count_once():
    # every group has one right of three, and 1/3 is no binary fraction: the deviations are 1e-17, not 0
    assert interval([1, 0, 0] * 4, "aaabbbcccddd") == pytest.approx(wilson(4 / 3, 4))


def test_difference_interval_by_hand():
    # n=10, four gained and one lost: (4+1)/12 and (1+1)/12, so the centre is 0.25; the variance is
    # (7/12 - 1/16)/12 = 0.0434028, its root 0.2083333, and 1.959964 of it 0.4083258
    differences = [1, 1, 1, 1, -1, 0, 0, 0, 0, 0]
    assert difference_interval(differences, range(10)) == pytest.approx((-0.158326, 0.658326), abs=1e-6)
    # Each row twice in a group: sums of deviations from 0.3 are 1.4 (four), -2.6 and -0.6 (five), squares 16.4; the
    # variance of the mean 16.4/400*10/9 = 0.0455556; that of a row 0.5-0.09 = 0.41; t (2.093024/2.262157)^2 = 0.856059
    doubled = difference_interval(differences * 2, [*range(10), *range(10)])
    effective = 0.41 / 0.0455556 * 0.856059
    centre = 0.3 * effective / (effective + 2)
    half = 1.959964 * math.sqrt(((0.5 * effective + 2) / (effective + 2) - centre**2) / (effective + 2))
    assert doubled == pytest.approx((centre - half, centre + half), abs=1e-5)
    assert difference_interval([], []) is None
    low, high = difference_interval([0] * 30, range(30))  # nothing changed: still a width
    assert low == pytest.approx(-high)
    assert 0 < high < 0.1


def clustered(rng: np.random.Generator, num: int, sizes: tuple[int, int], gain: float, lose: float, like: float):
    """(+1, 0, -1 a row, its group): `num` groups whose chances vary between groups, the more the smaller `like`."""
    group_N = np.repeat(np.arange(num), rng.integers(sizes[0], sizes[1] + 1, size=num))
    gain_C = rng.beta(gain * like, (1 - gain) * like, size=num)
    lose_C = rng.beta(lose * like, (1 - lose) * like, size=num) * (1 - gain_C) if lose else np.zeros(num)
    draw_N = rng.random(len(group_N))
    up_N = draw_N < gain_C[group_N]
    down_N = ~up_N & (draw_N < (gain_C + lose_C)[group_N])
    return (up_N.astype(int) - down_N).tolist(), group_N.tolist()


def coverage(estimate: Callable, num_simulations: int, *cells: tuple, mean: float) -> float:
    """How often the interval that `estimate` makes of freshly drawn cells holds their true mean."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(num_simulations):
        low, high = estimate([clustered(rng, *cell) for cell in cells])
        covered += low <= mean <= high
    return covered / num_simulations


@pytest.mark.parametrize(
    "cell",
    [
        (20, (1, 5), 0.7, 0, 2),  # groups, their sizes, accuracy, likeness between groups
        (20, (5, 5), 0.5, 0, 2),  # a modality of the phantoms: twenty images, five questions each
        (160, (5, 5), 0.8, 0, 3),
        (30, (1, 12), 0.85, 0, 4),  # patients with one to a dozen images
        (40, (1, 1), 0.9, 0, 4),
    ],
)
def test_interval_covers_in_simulation(cell: tuple):
    assert 0.93 <= coverage(lambda cells: interval(*cells[0]), 2000, cell, mean=cell[2]) <= 0.97


def test_the_interval_of_rows_would_not_cover():
    """Thirty groups of correlated rows, where Wilson's interval of the rows is far too narrow."""
    naive = coverage(lambda cells: wilson(sum(cells[0][0]), len(cells[0][0])), 1000, (30, (1, 5), 0.7, 0, 2), mean=0.7)
    assert naive < 0.92


@pytest.mark.parametrize(
    "cell",
    [
        (20, (5, 5), 0.2, 0.1, 3),
        (20, (5, 5), 0.5, 0.05, 3),
        (160, (5, 5), 0.2, 0.05, 5),
        (40, (1, 5), 0.15, 0.05, 3),
        (200, (1, 1), 0.1, 0.1, 3),
    ],
)
def test_paired_difference_covers_in_simulation(cell: tuple):
    mean = cell[2] - cell[3] * (1 - cell[2])
    assert 0.93 <= coverage(lambda cells: difference_interval(*cells[0]), 1500, cell, mean=mean) <= 0.97


@pytest.mark.parametrize(
    "cell", [(20, (1, 5), 0.7, 0, 2), (40, (1, 1), 0.7, 0, 4), (60, (1, 5), 0.2, 0.1, 3), (40, (1, 3), 0.3, 0.1, 3)]
)
def test_bootstrap_covers_in_simulation(cell: tuple):
    seeds = itertools.count()
    mean = cell[2] - cell[3] * (1 - cell[2])
    covered = coverage(lambda cells: cluster_bootstrap(*cells[0], next(seeds)), 1000, cell, mean=mean)
    assert 0.93 <= covered <= 0.97


def test_macro_interval_covers_in_simulation():
    accuracies = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    cells = [(20, (5, 5), accuracy, 0, 3) for accuracy in accuracies]

    def estimate(drawn: list) -> tuple[float, float]:
        return mean_interval([(sum(values) / len(values), interval(values, groups)) for values, groups in drawn])

    assert 0.93 <= coverage(estimate, 1500, *cells, mean=sum(accuracies) / 8) <= 0.97


def test_bootstrap_of_a_mean_is_the_cluster_bootstrap():
    values, groups = clustered(np.random.default_rng(3), 40, (1, 5), 0.7, 0, 2)
    values_N = np.array(values)
    found = bootstrap(lambda rows: np.array([values_N[rows].mean(), values_N[rows].max()]), groups, seed=0)
    assert found[0] == pytest.approx(cluster_bootstrap(values, groups, seed=1), abs=0.02)
    assert found[1] == (1, 1)
    assert bootstrap(lambda rows: rows, "aa", seed=0) is None


def test_wilson_covers_in_simulation():
    """Exact: the binomial weight of those k whose interval holds p, averaged over p."""
    p_values = np.linspace(0.05, 0.95, 181)
    ks = np.arange(101)
    limits = [wilson(k, 100) for k in ks]
    coverage = [
        sum(binom.pmf(k, 100, p) for k, (low, high) in zip(ks, limits, strict=True) if low <= p <= high)
        for p in p_values
    ]
    assert 0.93 <= np.mean(coverage) <= 0.97


def test_macro_interval_by_hand():
    # distances below 0.3 and 0.4 give sqrt(0.09+0.16)/2 = 0.25; above 0.06 and 0.08 give 0.1/2 = 0.05
    cells = [(0.8, (0.5, 0.86)), (0.6, (0.2, 0.68))]
    assert mean_interval(cells) == pytest.approx((0.45, 0.75))
    # fully correlated: distances add, 0.7/2 below and 0.14/2 above
    assert mean_interval(cells, np.ones((2, 2))) == pytest.approx((0.35, 0.77))
    assert mean_interval([]) is None


def test_bootstrap_resamples_clusters():
    values, clusters = [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
    assert cluster_bootstrap(values, clusters, seed=0) == (0.0, 1.0)  # two clusters: means 0, 1/2, 1 only
    low, high = cluster_bootstrap(values, range(8), seed=0)
    assert 0.1 <= low <= 0.25
    assert 0.75 <= high <= 0.9
    assert cluster_bootstrap(values, range(8), seed=0) == (low, high)
    assert cluster_bootstrap([1, 1, 1], "abc", seed=0) is None
    assert cluster_bootstrap([1, 0], "aa", seed=0) is None
    assert cluster_bootstrap([], [], seed=0) is None


def test_paired_p_by_hand():
    # Sums of groups 2, 1, -1, total 2. Of the eight totals of ±2±1±1, six are 2 or more from 0 (4, 2, 2 and the
    # negatives), two are 0.
    assert paired_p([1, 1, 1, -1, 0], "aabcd") == pytest.approx(6 / 8)
    # 3, 2, 2: only the whole and its negative are as far out
    assert paired_p([1] * 7, "aaabbcc") == pytest.approx(2 / 8)
    assert paired_p([0, 0, 1, -1], "aabb") == 1.0
    assert paired_p([], []) is None


paired_rows = st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(0, 7)), min_size=1, max_size=40)


@settings(deadline=None)
@given(paired_rows)
def test_paired_p_is_the_count_of_all_flips(rows: list[tuple[int, int]]):
    differences, groups = zip(*rows, strict=True)
    sums = [sum(d for d, g in rows if g == group) for group in set(groups)]
    totals = [
        abs(sum(s * f for s, f in zip(sums, flips, strict=True)))
        for flips in itertools.product((1, -1), repeat=len(sums))
    ]
    expected = sum(total >= abs(sum(differences)) for total in totals) / len(totals)
    assert paired_p(differences, groups) == pytest.approx(expected)


@settings(deadline=None)
@given(paired_rows)
def test_paired_p_of_single_rows_is_mcnemars(rows: list[tuple[int, int]]):
    differences = [difference for difference, _ in rows]
    gained, lost = differences.count(1), differences.count(-1)
    expected = mcnemar([[0, gained], [lost, 0]], exact=True).pvalue if gained + lost else 1.0
    assert paired_p(differences, range(len(rows))) == pytest.approx(expected)


def test_paired_p_is_scipys():
    sums = np.array([3, -1, 2, 2, 1, -2, 0, 4])
    rows = [(np.sign(total), group) for group, total in enumerate(sums) for _ in range(abs(total))]
    reference = permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert paired_p(*zip(*[(int(d), g) for d, g in rows], strict=True)) == pytest.approx(reference.pvalue)


def test_paired_p_of_fractions():
    """Answers averaged over three seeds: drawn flips, near what all flips would give, and the same every time."""
    thirds = [1 / 3, -2 / 3, 1, 1 / 3, 2 / 3, -1 / 3, 2 / 3, 1 / 3, 0, 1]
    totals = [
        abs(sum(s * f for s, f in zip(thirds, flips, strict=True))) for flips in itertools.product((1, -1), repeat=10)
    ]
    exact = sum(total >= sum(thirds) - 1e-9 for total in totals) / len(totals)
    assert paired_p(thirds, range(10)) == pytest.approx(exact, abs=0.015)
    assert paired_p(thirds, range(10)) == paired_p(thirds, range(10))
    # two rows of one group that add up to a whole number are whole
    assert paired_p([1 / 3, 2 / 3] * 5, "aabbccddee") == pytest.approx(2 / 2**5)


def test_paired_p_of_many_groups():
    """8,000 groups of one to three rows: the tail as the normal curve has it, with scipy's Fourier convolution."""
    sums = [1] * 3100 + [-1] * 2900 + [2] * 1000 + [-3] * 1000
    rows = [(int(np.sign(total)), group) for group, total in enumerate(sums) for _ in range(abs(total))]
    z = abs(sum(sums)) / math.sqrt(sum(total**2 for total in sums))
    assert paired_p(*zip(*rows, strict=True)) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_holm_by_hand():
    # sorted: 4*0.005 = 0.02, 3*0.01 = 0.03, 2*0.03 = 0.06, 1*0.04 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


def test_summarise_by_hand():
    rows = [
        row("1", True),
        row("2", False, outcome="ambiguous", format_ok=False, chance=0.5),
        row("3", True, modality="OCT", question_type="Lesion Grading", tokens=30),
        row("4", False, modality=None, outcome="truncated", finish="length", format_ok=False, tokens=40),
    ]
    summary = summarise(rows)
    assert (summary["accuracy"], summary["n"], summary["chance"]) == (0.5, 4, (0.25 * 3 + 0.5) / 4)
    assert summary["ci95"] == pytest.approx(list(wilson(2, 4)))
    assert list(summary["by_modality"]) == ["CT", "OCT", "not stated"]
    assert summary["by_modality"]["CT"] == {
        "accuracy": 0.5,
        "ci95": list(wilson(1, 2)),
        "n": 2,
        "chance": 0.375,
    }
    # The row whose file states no modality is in the plain average, and in no part of the macro average.
    assert (summary["macro"]["accuracy"], summary["macro"]["n"], summary["macro"]["chance"]) == (
        0.75,
        2,
        0.3125,
    )
    assert list(summary["by_question_type"]) == ["Disease Diagnosis", "Lesion Grading"]
    assert summary["by_question_type"]["Disease Diagnosis"]["accuracy"] == pytest.approx(1 / 3)
    assert summary["outcomes"] == {"letter": 2, "ambiguous": 1, "truncated": 1}
    assert (summary["unparsed"], summary["truncated"]) == (2, 1)
    assert (summary["format_rate"], summary["mean_tokens"]) == (0.5, 22.5)


def test_summary_of_nothing_is_undefined_not_zero():
    summary = summarise([])
    assert summary["n"] == summary["unparsed"] == 0
    assert [summary[name] for name in ("accuracy", "ci95", "chance", "format_rate", "mean_tokens")] == [None] * 5
    assert summary["macro"] == {"accuracy": None, "ci95": None, "n": 0, "chance": None}
    assert summary["by_modality"] == summary["by_question_type"] == {}


def test_compare_by_hand():
    before = [row(str(i), i < 2, modality="CT" if i < 5 else "OCT") for i in range(10)]
    after = [row(str(i), i != 0, modality="CT" if i < 5 else "OCT") for i in reversed(range(10))]
    change = compare(before, after)
    # Eight gained (2..9), one lost (0). CT: -1, 0, +1, +1, +1 of 5; OCT: +1 five times, nothing to resample.
    assert (change["difference"], change["n"], change["gained"], change["lost"]) == (
        pytest.approx(0.7),
        10,
        8,
        1,
    )
    assert change["by_modality"]["CT"]["difference"] == pytest.approx(0.4)
    # OCT: (5+1)/7 and (0+1)/7, centre 5/7, variance (1 - 25/49)/7 = 0.0699708
    assert change["by_modality"]["OCT"] == {
        "difference": 1.0,
        "ci95": pytest.approx([5 / 7 - 1.959964 * math.sqrt(0.0699708), 1.0], abs=1e-6),
        "n": 5,
        "groups": 5,
        "p": pytest.approx(2 / 2**5),
    }
    assert change["macro"]["difference"] == pytest.approx(0.7)
    low, high = change["by_modality"]["CT"]["ci95"]
    low_oct = change["by_modality"]["OCT"]["ci95"][0]
    assert change["macro"]["ci95"] == pytest.approx(
        [0.7 - math.hypot(0.4 - low, 1 - low_oct) / 2, 0.7 + (high - 0.4) / 2]
    )
    assert change["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert compare(before, after) == change
    assert compare(before, before)["difference"] == 0
    assert compare([], [])["difference"] is None


def test_compare_refuses_other_records():
    with pytest.raises(MedR1Error, match="such as 2"):
        compare([row("1", True), row("2", True)], [row("1", True), row("3", True)])
    with pytest.raises(MedR1Error, match="same data"):
        compare([row("1", True)], [row("1", True), row("1", True)])


def cells_of(values: dict[str, list[float]]) -> list[dict]:
    return [row(f"{name}{i}", value, modality=name) for name, part in values.items() for i, value in enumerate(part)]


def test_change_by_hand():
    before = cells_of({"CT": [0] * 40, "MRI": [0] * 10, "OCT": [1, 0] * 20})
    after = cells_of({"CT": [1] * 40, "MRI": [1] * 10, "OCT": [1, 0] * 19 + [0, 1]})
    micro = paired_change(before, after)
    assert (micro["difference"], micro["n"], micro["groups"]) == (pytest.approx(50 / 90), 90, 90)
    assert micro["p"] == pytest.approx(2 * (1 + 52) / 2**52)  # 51 gained, one lost
    macro = paired_change(before, after, "modality")
    assert (macro["difference"], macro["n"]) == (pytest.approx(2 / 3), 90)
    limits = [difference_interval(d, range(len(d))) for d in ([1] * 40, [1] * 10, [0] * 38 + [-1, 1])]
    below = math.hypot(1 - limits[0][0], 1 - limits[1][0], 0 - limits[2][0]) / 3
    assert macro["ci95"] == pytest.approx([2 / 3 - below, 2 / 3 + limits[2][1] / 3])
    assert macro["p"] == 1 / 10_000  # none of 9,999 flips is as far out
    nothing = paired_change([], [], "modality")
    assert nothing == {"difference": None, "ci95": None, "n": 0, "groups": 0, "p": None}


def test_macro_interval_heeds_shared_groups():
    """Two question types about the same images that are right and wrong together are one type asked twice."""
    right = [True] * 12 + [False] * 8
    types = ("Disease Diagnosis", "Lesion Grading")
    rows = [
        row(f"{name} {i}", value, group=f"{i}", question_type=name) for name in types for i, value in enumerate(right)
    ]
    assert macro(rows, "question_type")["ci95"] == pytest.approx(list(wilson(12, 20)))
    apart = macro([{**item, "group": item["id"]} for item in rows], "question_type")
    half = [(limit - 0.6) / math.sqrt(2) for limit in wilson(12, 20)]  # two independent halves
    assert apart["ci95"] == pytest.approx([0.6 + half[0], 0.6 + half[1]])
    assert (apart["accuracy"], apart["n"], apart["chance"]) == (pytest.approx(0.6), 2, 0.25)
    # One right where the other is wrong: the average is 1/2 for certain, but for the skew of the two intervals.
    mirrored = [{**item, "correct": item["correct"] != (item["question_type"] == types[1])} for item in rows]
    low, high = wilson(12, 20)
    skew = ((0.6 - low) - (high - 0.6)) / 2
    assert macro(mirrored, "question_type")["ci95"] == pytest.approx([0.5 - skew, 0.5 + skew])


def test_matrix_by_hand():
    before = cells_of({"CT": [0] * 40, "MRI": [0] * 10, "OCT": [1, 0] * 20})
    after = cells_of({"CT": [1] * 40, "MRI": [1] * 10, "OCT": [1, 0] * 19 + [0, 1]})
    cells = compare(before, after)["by_modality"]
    ct, mri, oct_cell = judged([cells["CT"], cells["MRI"], cells["OCT"]])
    # forty gained: 2/2^40, the smaller of two cells in the family, since ten records are too few to be in it
    assert ct["p"] == pytest.approx(2 / 2**40)
    assert ct["holm_p"] == pytest.approx(4 / 2**40)
    assert (ct["significant"], ct["difference"], ct["n"]) == (True, 1.0, 40)
    assert (oct_cell["difference"], oct_cell["holm_p"], oct_cell["significant"]) == (0.0, 1.0, False)
    assert mri["n"] == 10 < MIN_N
    assert mri["p"] == pytest.approx(2 / 2**10)
    assert (mri["holm_p"], mri["significant"]) == (None, None)
    assert judged([compare(after, before)["by_modality"]["CT"]])[0]["significant"] is True  # a loss
    assert judged([paired_change([], [])])[0]["significant"] is None
    assert judged([]) == []


def test_matrix_counts_groups_not_rows():
    """Thirty rows gained in three images of ten questions: three draws, not thirty."""
    before, after = ([row(f"{n}", right, group=f"image {n // 10}") for n in range(30)] for right in (False, True))
    (cell,) = judged([paired_change(before, after)])
    assert (cell["n"], cell["groups"]) == (30, 3)
    assert cell["p"] == pytest.approx(2 / 2**3)
    assert cell["significant"] is False


def test_noise_is_not_marked():
    """Five by five cells of answers drawn twice from one coin: a mark in at most about 5 % of matrices."""
    rng = np.random.default_rng(0)

    def rows() -> list[dict]:
        return [row(f"{n}", bool(rng.random() < 0.6), group=f"{n // 2}") for n in range(40)]

    matrices = [judged([paired_change(rows(), rows()) for _ in range(25)]) for _ in range(60)]
    assert sum(any(cell["significant"] for cell in cells) for cells in matrices) <= 6  # 3 expected, 97 % at most 6


def test_flips_by_hand():
    def answer(id: str, options: str, letter: str | None, **fields: object) -> dict:
        return row(id, True, options=list(options.split()), letter=letter, **fields)

    rows = [
        answer("1", "cyst stone", "A"),
        answer("2", "cyst stone", "A"),
        answer("3", "cyst stone", "B"),
        answer("4", "cyst stone", None),
        answer("5", "cyst stone", None),
    ]
    permuted = [
        answer("5", "stone cyst", "A"),  # unreadable before, an option now: flipped
        answer("4", "stone cyst", None),  # unreadable twice: not
        answer("3", "stone cyst", None),  # flipped
        answer("2", "stone cyst", "A"),  # the letter stayed, the text changed: flipped
        answer("1", "stone Cyst", "B"),  # the letter changed, the text stayed: not
    ]
    assert flip_rate(rows, permuted) == {"rate": 0.6, "ci95": list(wilson(3, 5)), "n": 5}
    assert flip_rate(rows, rows)["rate"] == 0
    assert flip_rate([], []) == {"rate": None, "ci95": None, "n": 0}
    grouped = [{**item, "group": "image"} for item in rows]
    assert flip_rate(grouped, permuted)["ci95"] == pytest.approx(list(wilson(0.6, 1)))
    with pytest.raises(MedR1Error, match="same data"):
        flip_rate(rows, rows[:4])
