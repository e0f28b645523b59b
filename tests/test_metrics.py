"""Numbers worked by hand, agreement with scipy, coverage in simulation, and undefined staying undefined."""

import numpy as np
import pytest
from scipy.stats import binomtest

from medr1.errors import MedR1Error
from medr1.metrics import cluster_bootstrap, compare, interval, mcnemar, mean_interval, summarise, wilson


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


def test_interval_covers_in_simulation():
    """Thirty groups of one to five correlated rows, where Wilson's interval of the rows is far too narrow."""
    rng = np.random.default_rng(1)
    covered = naive = 0
    for _ in range(1000):
        sizes = rng.integers(1, 6, size=30)
        probabilities = rng.beta(1.4, 0.6, size=30)  # mean 0.7
        values = [float(v) for p, s in zip(probabilities, sizes, strict=True) for v in rng.random(s) < p]
        groups = np.repeat(np.arange(30), sizes).tolist()
        low, high = interval(values, groups)
        covered += low <= 0.7 <= high
        low, high = wilson(sum(values), len(values))
        naive += low <= 0.7 <= high
    assert 0.93 <= covered / 1000 <= 0.97
    assert naive / 1000 < 0.92


def test_wilson_covers_in_simulation():
    """Exact: the binomial weight of those k whose interval holds p, averaged over p."""
    from scipy.stats import binom

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


def test_mcnemar_by_hand():
    # five gained, one lost: 2 * (C(6,0)+C(6,1)) / 2^6 = 14/64
    before = [False] * 5 + [True] + [True] * 4
    after = [True] * 5 + [False] + [True] * 4
    assert mcnemar(before, after) == pytest.approx(14 / 64)
    assert mcnemar([True, False], [True, False]) == 1.0


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
    assert change["by_modality"]["OCT"] == {"difference": 1.0, "ci95": None, "n": 5}
    assert change["macro"]["difference"] == pytest.approx(0.7)
    low, high = change["by_modality"]["CT"]["ci95"]
    assert change["macro"]["ci95"] == pytest.approx([(low + 1) / 2, (high + 1) / 2])
    assert change["mcnemar_p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert compare(before, after) == change
    assert compare(before, before)["difference"] == 0
    assert compare([], [])["difference"] is None


def test_compare_refuses_other_records():
    with pytest.raises(MedR1Error, match="such as 2"):
        compare([row("1", True), row("2", True)], [row("1", True), row("3", True)])
    with pytest.raises(MedR1Error, match="same data"):
        compare([row("1", True)], [row("1", True), row("1", True)])
