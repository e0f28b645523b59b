"""Which records a step gets: every one in turn, as often as its weight says, and in balance."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medr1.data.records import MODALITIES, Record
from medr1.errors import MedR1Error
from medr1.training import draws
from medr1.training.draws import LEAST, Draws, draw_order, record_weights


def records(modalities: Sequence[str | None]) -> list[Record]:
    types = ("Disease Diagnosis", "Lesion Grading")
    return [
        Record(
            id=str(number), images=(), question="Which?", options=("CT", "MRI"), answer="B", modality=modality,
            question_type=types[number % 2], source="s", group=str(number),
        )
        for number, modality in enumerate(modalities)
    ]  # fmt: skip


def first(count: int, of: list[Record], seed: int = 0, weights: str = "", balance: str = "off") -> list[int]:
    return list(islice(draw_order(of, record_weights(of, weights), balance, seed), count))


@pytest.fixture
def weigh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names weights "given"."""

    def name(values: Any) -> None:
        monkeypatch.setitem(draws.WEIGHTS, "given", lambda records: values)

    return name


def test_without_weights_each_record_comes_once_a_pass() -> None:
    order = first(30, records(["CT"] * 10))
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [[*range(10)]] * 3
    generator = torch.Generator().manual_seed(0)  # as of the first version
    assert order[:20] == [*torch.randperm(10, generator=generator).tolist(), *torch.randperm(10, generator=generator)]
    assert first(30, records(["CT"] * 10), seed=1) != order


@settings(max_examples=40)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=12).filter(any), st.integers(0, 9))
def test_a_pass_holds_each_record_as_often_as_its_weight_says(weights: list[float], seed: int) -> None:
    expected = np.array(weights) * np.count_nonzero(weights) / sum(weights)
    draws.WEIGHTS["drawn"] = lambda records: weights
    try:
        order = first(60 * len(weights), records(["CT"] * len(weights)), seed, weights="drawn")
    finally:
        del draws.WEIGHTS["drawn"]
    size = np.count_nonzero(weights)
    counts = Counter(order[:size])
    assert all(
        math.floor(share - 1e-9) <= counts[index] <= math.ceil(share + 1e-9) for index, share in enumerate(expected)
    )
    many = np.array([Counter(order)[index] for index in range(len(weights))]) / len(order) * size
    assert many == pytest.approx(expected, abs=0.35)


def test_equal_weights_are_none(weigh: Any) -> None:
    weigh([0.1] * 10)
    assert first(50, records(["CT"] * 10), weights="given") == first(50, records(["CT"] * 10))


def test_strata_take_turns(weigh: Any) -> None:
    of = records(["CT"] * 20 + ["MRI"] * 3 + [None])
    order = first(60, of, balance="modality")
    for start in range(0, 60, 3):
        assert {of[index].modality for index in order[start : start + 3]} == {"CT", "MRI", None}
    rare = [index for index in order if of[index].modality == "MRI"]
    assert [sorted(rare[start : start + 3]) for start in range(0, 18, 3)] == [[20, 21, 22]] * 6
    both = first(80, of, balance="both")
    cells = Counter((of[index].modality, of[index].question_type) for index in both)
    assert set(cells.values()) == {16} and len(cells) == 5
    weigh([0.0] * 20 + [1.0, 2.0, 1.0, 5.0])  # within a stratum weights count, and one without any is left out
    counts = Counter(first(2000, of, balance="modality", weights="given"))
    assert counts[23] == 1000 and [counts[index] for index in (20, 21, 22)] == pytest.approx([250, 500, 250], rel=0.1)


def test_each_modality_of_a_balanced_batch() -> None:
    of = records([modality for place, modality in enumerate(MODALITIES) for _ in range(1 + place)])
    order = first(80, of, balance="modality")
    assert all(len({of[index].modality for index in order[start : start + 8]}) == 8 for start in range(0, 80, 8))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([1.0], "weights 'given' gave 1 for 2 training records; return one for each"),
        ([1.0, -0.5], "weights 'given' gave -0.5 for record 1; return a finite number of at least 0"),
        ([1.0, math.nan], "gave nan for record 1"),
        ([math.inf, 1.0], "gave inf for record 0"),
        ([1.0, "x"], "gave 'x' for record 1"),
        (np.zeros(2), "gave 0 for every training record; return a number above 0 for some"),
        (3.0, "weights 'given' raised TypeError.* on the 2 training records; mend it"),
    ],
)
def test_weights_that_are_none_are_one_line(values: Any, line: str, weigh: Any) -> None:
    weigh(values)
    with pytest.raises(MedR1Error, match=line) as error:
        record_weights(records(["CT", "MRI"]), "given")
    assert "\n" not in str(error.value)


def test_weights_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def rare(records):\n    return [float(r.modality == 'MRI') for r in records]\n")
    monkeypatch.chdir(tmp_path)
    of = records(["CT", "MRI", "CT", "MRI"])
    assert set(first(20, of, weights="mine.py:rare")) == {1, 3}
    assert record_weights(of, "mine.py:rare").dtype == torch.float64
    with pytest.raises(
        MedR1Error, match=r"unknown weights 'rare'; use needs_image or your own as module:function or FILE.py:function"
    ):
        record_weights(of, "rare")


# --- a curriculum --------------------------------------------------------------------------------------------------


def made(of: list[Record], seed: int = 0) -> Draws:
    return Draws(of, lambda: draw_order(of, torch.ones(len(of)), "off", seed), seed)


def test_without_a_wanted_rate_draws_are_the_order() -> None:
    of = records(["CT"] * 7)
    taken = made(of)
    assert taken.take(5) + taken.take(9) == first(14, of)
    assert (taken.drawn, taken.left_aside) == (14, 0)


def test_chances_by_hand() -> None:
    of = records(["CT", "MRI", "CT", "MRI"])  # of question types 0, 1, 0, 1
    known = made(of)
    assert known.chance(0, 0.5) == 1.0  # nothing is known
    known.learn(0, 8, 8)
    # Record 0: cell (8 + 1) / (8 + 2) = 0.9; (8 + 2 * 0.9) / 10 = 0.98. KL(0.5 || 0.98) = 0.5 ln(0.5 / 0.98) +
    # 0.5 ln(0.5 / 0.02) = -0.33647 + 1.60944 = 1.27297; exp(-4 * 1.27297) = 0.0061, below LEAST.
    assert known.chance(0, 0.5) == LEAST
    # Record 2 has not been asked; its cell has 0.9. KL = -0.29389 + 0.80472 = 0.51083; exp(-4 * 0.51083) = 0.1296.
    assert known.chance(2, 0.5) == pytest.approx(0.1296, abs=1e-4)
    assert known.chance(2, 0.9) == pytest.approx(1.0)
    assert known.chance(1, 0.5) == 1.0  # of another cell
    known.learn(0, 4, 8)  # the newest group alone counts
    assert known.chance(0, 0.5) == known.chance(2, 0.5) == 1.0


def test_a_curriculum_draws_near_its_rate_and_loses_none() -> None:
    of = records(["CT"] * 40)
    rates = [0, 2, 4, 6, 8]
    for wanted, most in ((0.1, 0), (0.5, 4), (0.9, 8)):
        known = made(of)
        for index in range(40):
            known.learn(index, rates[index % 5], 8)
        counts = Counter(rates[index % 5] for index in known.take(2000, wanted))
        assert max(counts, key=counts.__getitem__) == most and min(counts.values()) > 0
        assert known.drawn == 2000 + known.left_aside
    ordered = [counts[rate] for rate in rates]
    assert ordered == sorted(ordered)


def test_draws_go_on_from_their_state() -> None:
    of = records([modality for modality in MODALITIES for _ in range(4)])

    def go_on(draws: Draws, rounds: range) -> list[list[int]]:
        taken = []
        for number in rounds:
            taken.append(draws.take(5, 0.5))
            for index in taken[-1]:
                draws.learn(index, (index + number) % 5, 4)
        return taken

    whole = go_on(made(of), range(40))
    stopped, resumed = made(of), made(of)
    assert go_on(stopped, range(23)) == whole[:23]
    resumed.load(json.loads(json.dumps(stopped.state())))
    assert go_on(resumed, range(23, 40)) == whole[23:]
    assert resumed.left_aside > 0
