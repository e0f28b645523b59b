"""Nothing is on both sides, whatever the groups, and the split depends on records and seed alone."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medr1.data.datasets import load_records
from medr1.data.records import Record
from medr1.data.splits import split_by_group
from medr1.errors import MedR1Error


def record(number: int, group: str, image: str, modality: str | None = "CT") -> Record:
    return Record(
        id=f"r{number:03}",
        images=(Path(image),),
        question="Which?",
        options=("a", "b"),
        answer="A",
        modality=modality,
        question_type=None,
        source="s",
        group=group,
    )


def assert_apart(train: list[Record], test: list[Record]) -> None:
    assert not {r.group for r in train} & {r.group for r in test}
    assert not {i for r in train for i in r.images} & {i for r in test for i in r.images}


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 25), st.sampled_from(["CT", "MRI", None])), max_size=40),
    seed=st.integers(0, 5),
    fraction=st.floats(0.05, 0.95),
)
def test_sides_share_nothing(rows: list, seed: int, fraction: float) -> None:
    records = [record(n, f"g{group}", f"i{image}", modality) for n, (group, image, modality) in enumerate(rows)]
    try:
        train, test = split_by_group(records, fraction, seed)
    except MedR1Error as error:
        assert "side of the split is empty" in str(error)
        return
    assert_apart(train, test)
    assert sorted([*train, *test], key=lambda r: r.id) == records
    shuffled = random.Random(seed).sample(records, len(records))
    assert split_by_group(shuffled, fraction, seed) == (train, test)


def test_chains_of_shared_images_and_groups_stay_together() -> None:
    # g0 and g1 share image a, g1 and g2 share image b: one cluster of four. The others stand alone.
    chain = [record(0, "g0", "a"), record(1, "g1", "a"), record(2, "g1", "b"), record(3, "g2", "b")]
    alone = [record(n, f"h{n}", f"x{n}") for n in range(4, 20)]
    for seed in range(20):
        _, test = split_by_group(chain + alone, 0.5, seed)
        assert len({r in test for r in chain}) == 1
        assert abs(len(test) - 10) <= 2  # half of 20, as near as the cluster of four allows


def test_seeds_differ_and_modalities_are_drawn_alone() -> None:
    records = [record(n, f"g{n}", f"i{n}", "CT" if n % 2 else "MRI") for n in range(200)]
    _, test = split_by_group(records, 0.2, 0)
    assert Counter(r.modality for r in test) == {"CT": 20, "MRI": 20}
    assert split_by_group(records, 0.2, 1)[1] != test
    only_ct = [r for r in records if r.modality == "CT"]
    assert split_by_group(only_ct, 0.2, 0)[1] == [r for r in test if r.modality == "CT"]


def test_real_data(shared: Path) -> None:
    records = load_records(shared / "data" / "real")
    train, test = split_by_group(records, 0.2, 0)
    assert_apart(train, test)
    assert len(train) + len(test) == len(records)
    total, held = (Counter(r.modality for r in part) for part in (records, test))
    assert all(abs(held[modality] / total[modality] - 0.2) < 0.01 for modality in total)


def test_errors() -> None:
    one = [record(0, "g", "a"), record(1, "g", "b")]
    with pytest.raises(MedR1Error, match="the test side of the split is empty: 2 records in 1 separate groups"):
        split_by_group(one, 0.2, 0)
    with pytest.raises(MedR1Error, match="the train side of the split is empty"):
        split_by_group(one, 0.9, 0)
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(MedR1Error, match="give a number between 0 and 1"):
            split_by_group(one, fraction, 0)
