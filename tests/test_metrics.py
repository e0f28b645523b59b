"""Numbers worked by hand, agreement with scipy, coverage in simulation, and undefined staying undefined."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from medr1.errors import MedR1Error
from medr1.evaluation.intervals import DIFFERENCE, Interval, interval
from medr1.evaluation.metrics import (
    MIN_N,
    compare,
    flip_rate,
    holm,
    judged,
    macro,
    paired_change,
    paired_p,
    summarise,
)


def exact(k: int, n: int) -> Interval:
    """Of k right among n single rows."""
    ci = interval([1] * k + [0] * (n - k), range(n))
    assert ci
    return ci


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


def test_paired_p_by_hand():
    # Sums of groups 2, 1, -1, total 2. Of the eight totals of ±2±1±1, six are 2 or more from 0 (4, 2, 2 and the
    # negatives), two are 0.
    assert paired_p([1, 1, 1, -1, 0], "aabcd") == pytest.approx(6 / 8)
    # 3, 2, 2: only the whole and its negative are as far out
    assert paired_p([1] * 7, "aaabbcc") == pytest.approx(2 / 8)
    assert paired_p([0, 0, 1, -1], "aabb") == 1.0
    assert paired_p([], []) is None


paired_rows = st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.integers(0, 7)), min_size=1, max_size=40)


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
    drawn = np.random.default_rng(0).random(40) / 20
    assert holm(drawn.tolist()) == multipletests(drawn, method="holm")[1].tolist()


def test_summarise_by_hand():
    rows = [
        row("1", True),
        row("2", False, outcome="ambiguous", format_ok=False, chance=0.5),
        row("3", True, modality="OCT", question_type="Lesion Grading", tokens=30),
        row("4", False, modality=None, outcome="truncated", finish="length", format_ok=False, tokens=40),
    ]
    summary = summarise(rows)
    assert (summary["accuracy"], summary["n"], summary["chance"]) == (0.5, 4, (0.25 * 3 + 0.5) / 4)
    assert summary["ci95"] == pytest.approx(list(exact(2, 4)))
    assert list(summary["by_modality"]) == ["CT", "OCT", "not stated"]
    assert summary["by_modality"]["CT"] == {
        "accuracy": 0.5,
        "ci95": list(exact(1, 2)),
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
    # OCT: five that all gained and one more that lost: (sum of five exponentials less one) over the sum of all six is
    # 2 Beta(5, 1) - 1
    assert change["by_modality"]["OCT"] == {
        "difference": 1.0,
        "ci95": pytest.approx([2 * 0.025 ** (1 / 5) - 1, 1.0], abs=1e-6),
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
    limits = [interval(d, range(len(d)), DIFFERENCE) for d in ([1] * 40, [1] * 10, [0] * 38 + [-1, 1])]
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
    assert macro(rows, "question_type")["ci95"] == pytest.approx(list(exact(12, 20)))
    apart = macro([{**item, "group": item["id"]} for item in rows], "question_type")
    half = [(limit - 0.6) / math.sqrt(2) for limit in exact(12, 20)]  # two independent halves
    assert apart["ci95"] == pytest.approx([0.6 + half[0], 0.6 + half[1]])
    assert (apart["accuracy"], apart["n"], apart["chance"]) == (pytest.approx(0.6), 2, 0.25)
    # One right where the other is wrong: the average is 1/2 for certain, but for the skew of the two intervals.
    mirrored = [{**item, "correct": item["correct"] != (item["question_type"] == types[1])} for item in rows]
    low, high = exact(12, 20)
    skew = ((0.6 - low) - (high - 0.6)) / 2
    assert macro(mirrored, "question_type")["ci95"] == pytest.approx([0.5 - skew, 0.5 + skew])


def test_macro_interval_of_shared_groups_without_a_mistake():
    """Five types of the same thirty images, all right: what one image more could show is in all five at once."""
    types = ("Modality Recognition", "Anatomy Identification", "Disease Diagnosis", "Lesion Grading")
    rows = [row(f"{name} {i}", True, group=f"{i}", question_type=name) for name in types for i in range(30)]
    assert macro(rows, "question_type")["ci95"] == pytest.approx(list(exact(30, 30)))
    # Half of the second type's images are the first's: a cosine of 15 / 30, of intervals that reach as far down.
    halves = [{**item, "group": f"{item['group']} {at // 45}"} for at, item in enumerate(rows[:60])]
    below = (1 - exact(30, 30)[0]) / 2 * math.sqrt(1 + 1 + 2 * 15 / 30)
    assert macro(halves, "question_type")["ci95"] == pytest.approx([1 - below, 1.0])
    again = [{**item, "correct": False} for item in rows[:60]]  # nor does a change from all wrong to all right
    assert paired_change(again, rows[:60], "question_type")["ci95"] == pytest.approx(
        list(interval([1.0] * 30, range(30), DIFFERENCE) or ())
    )


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
    assert flip_rate(rows, permuted) == {"rate": 0.6, "ci95": list(exact(3, 5)), "n": 5}
    assert flip_rate(rows, rows)["rate"] == 0
    assert flip_rate([], []) == {"rate": None, "ci95": None, "n": 0}
    grouped = [{**item, "group": "image"} for item in rows]
    assert flip_rate(grouped, permuted)["ci95"] == pytest.approx([0.6 * 0.025, 1 - 0.4 * 0.025])
    with pytest.raises(MedR1Error, match="same data"):
        flip_rate(rows, rows[:4])
