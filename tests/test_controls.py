"""The controls by hand, and the text-only prior against the figures known of the public splits."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_vlms import tiny_vlm

from medr1.data.datasets import load_records
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.controls import (
    CONDITIONS,
    as_shown,
    blank_image,
    group_disjoint,
    image_disjoint,
    permuted,
    shuffled_partners,
    text_only_prior,
)
from medr1.evaluation.metrics import flip_rate
from medr1.evaluation.run import evaluate
from medr1.evaluation.scoring import score


def record(id: str, options: tuple[str, ...] = ("x", "y"), answer: str = "A", **fields: object) -> Record:
    defaults = {
        "images": (Path(f"{id}.png"),),
        "question": "Which?",
        "modality": "CT",
        "question_type": "Disease Diagnosis",
        "source": "made",
        "group": id,
    }
    return Record(id=id, options=options, answer=answer, **{**defaults, **fields})


def test_prior_by_hand():
    train = [
        record("1", ("cyst", "tumour")),  # cyst right 2 of 3 times, tumour 1 of 2, stone 0 of 1
        record("2", ("Cyst.", "stone")),
        record("3", ("tumour", " cyst")),
    ]
    test = [
        record("4", ("cyst", "tumour", "stone"), "A"),  # 2/3 > 1/2 > 0: right
        record("5", ("stone", "tumour"), "A"),  # wrong
        record("6", ("stone", "new", "newer"), "B"),  # three tied at 0: one third
        record("7", ("Tumour", "tumour", "stone"), "A"),  # tied, and both say the gold text: right
    ]
    table = text_only_prior(train, test)
    assert table["accuracy"] == pytest.approx((1 + 0 + 1 / 3 + 1) / 4)
    assert table["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 2 / 3) / 4)
    assert table["n"] == table["by_modality"]["CT"]["n"] == 4


def test_prior_without_training_records_is_chance():
    test = [record("1", ("a", "b", "c")), record("2", ("a", "b"), "B")]
    assert text_only_prior([], test)["accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def published(shared: Path, folder: str, name: str) -> tuple[list[Record], list[Record]]:
    """Train and test as the public split files divide them (not anew by group, as `load_parts` would)."""
    splits = shared / "data" / "medr1_splits" / folder
    if not splits.is_dir():
        pytest.skip(f"needs the public split files in {shared.name}/data/medr1_splits")
    train, test = (
        load_records(splits / part / f"{name}_{part}.json", check_images=False, image_root=splits)
        for part in ("train", "test")
    )
    return train, test


@pytest.mark.parametrize(
    ("folder", "name", "percent", "disjoint_percent", "num_shared"),
    [
        ("modality", "OCT (Optical Coherence Tomography", 100.0, 100.0, 253),
        ("modality", "Dermoscopy", 95.1, 95.1, 241),
        ("modality", "Microscopy Images", 98.6, 98.3, 308),
        ("question_type", "Lesion Grading", 96.1, 96.1, 0),
    ],
)
def test_prior_on_the_public_splits(
    shared: Path, folder: str, name: str, percent: float, disjoint_percent: float, num_shared: int
):
    """The known defect: these test parts can be answered from option texts alone, and not since images are shared."""
    train, test = published(shared, folder, name)
    assert 100 * text_only_prior(train, test)["accuracy"] == pytest.approx(percent, abs=1)
    disjoint = image_disjoint(train, test)
    assert len(test) - len(disjoint) == num_shared
    assert 100 * text_only_prior(train, disjoint)["accuracy"] == pytest.approx(disjoint_percent, abs=1)


def test_disjoint_subsets_by_hand():
    train = [record("1", images=(Path("a"), Path("b")), group="patient 1"), record("2", group="patient 2")]
    test = [
        record("3", images=(Path("c"), Path("b")), group="patient 3"),  # its second image is in training
        record("4", group="patient 2"),
        record("5", group="patient 3"),
        record("6", images=(), group="patient 4"),
    ]
    assert [item.id for item in image_disjoint(train, test)] == ["4", "5", "6"]
    assert [item.id for item in group_disjoint(train, test)] == ["3", "5", "6"]


def test_blank_image_keeps_size_and_mean():
    image = Image.new("RGB", (4, 2), (10, 20, 30))
    image.paste((110, 20, 31), (0, 0, 2, 2))
    blank = blank_image(image)
    assert (blank.size, blank.mode) == ((4, 2), "RGB")
    assert blank.getcolors() == [(8, (60, 20, 30))]  # the mean 30.5 rounds to even


def test_partners_share_modality_and_number_of_images_but_not_the_group():
    records = [record(str(i), group=str(i // 2), modality=("CT", "OCT")[i % 2]) for i in range(40)]
    records += [record(f"two{i}", images=(Path(f"a{i}"), Path(f"b{i}"))) for i in range(4)]
    partners = shuffled_partners(records, seed=0)
    assert partners.keys() == {record.id for record in records}
    for item in records:
        partner = partners[item.id]
        assert partner.modality == item.modality
        assert len(partner.images) == len(item.images)
        assert partner.group != item.group
    assert partners == shuffled_partners(records[::-1], seed=0)
    assert partners != shuffled_partners(records, seed=1)


def test_partners_share_no_group_and_no_content(tmp_path: Path):
    """Twelve pictures, each also as a byte copy and as a BMP, all under groups of their own, and three of a second."""
    names = []
    for number in range(12):
        picture = Image.effect_noise((8, 6), 40).convert("RGB")
        picture.save(tmp_path / f"{number}.png")
        picture.save(tmp_path / f"{number}.bmp")
        shutil.copy(tmp_path / f"{number}.png", tmp_path / f"{number}-copy.png")
        names += [f"{number}.png", f"{number}.bmp", f"{number}-copy.png"]
    records = [record(name, images=(tmp_path / name,)) for name in names]
    records += [record(f"p{n}", images=(Path(f"p{n}"),), group=f"q{n}", groups=(f"q{n}", "0.png")) for n in range(3)]
    for seed in range(10):
        partners = shuffled_partners(records, seed)
        for item in records:
            assert not {item.group, *item.groups} & {partners[item.id].group, *partners[item.id].groups}
            if partners[item.id].id in names:
                assert re.match(r"\d*", partners[item.id].id)[0] != re.match(r"\d*", item.id)[0]
    with pytest.raises(MedR1Error, match=r"record 0\.png: no other group of CT"):
        shuffled_partners(records[:3], seed=0)


def test_partners_are_drawn_evenly():
    records = [record(str(i)) for i in range(4)]
    drawn = Counter(shuffled_partners(records, seed)["0"].id for seed in range(600))
    assert drawn.keys() == {"1", "2", "3"}
    assert all(150 < count < 250 for count in drawn.values())


def test_no_partner_is_an_error_that_names_the_record():
    with pytest.raises(MedR1Error, match="record 1: no other group of CT"):
        shuffled_partners([record("1", group="g"), record("2", group="g")], seed=0)
    with pytest.raises(MedR1Error, match="record 3"):
        shuffled_partners([record("3", images=()), record("4", images=())], seed=0)


def test_partners_of_another_modality():
    records = [record(str(i), group=str(i // 2), modality=("CT", "OCT", "MRI")[i % 3]) for i in range(30)]
    partners = shuffled_partners(records, seed=0, other_modality=True)
    for item in records:
        assert partners[item.id].modality != item.modality
        assert partners[item.id].group != item.group
    assert partners == shuffled_partners(records[::-1], seed=0, other_modality=True)
    drawn = Counter(shuffled_partners(records, seed, other_modality=True)["0"].modality for seed in range(300))
    assert drawn.keys() == {"OCT", "MRI"}
    assert all(110 < count < 190 for count in drawn.values())

    ct = [item for item in records if item.modality == "CT"]
    with pytest.raises(MedR1Error, match="record 0: no other group of a modality other than CT has 1 images"):
        shuffled_partners(ct, seed=0, other_modality=True)
    assert {item.modality for item in shuffled_partners(ct, 0, records, other_modality=True).values()} == {"OCT", "MRI"}
    with pytest.raises(MedR1Error, match="record 99: no other group of a modality other than unstated modality"):
        shuffled_partners([record("99", modality=None), *records], seed=0, other_modality=True)


@given(st.integers(2, 26), st.data())
def test_permuted_options_all_move_and_stay_what_they_are(num_options: int, data: st.DataObject):
    options = tuple(f"option {number}" for number in range(num_options))
    item = record("1", options, data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:num_options])))
    moved = permuted(item, data.draw(st.integers(0, 100)))
    assert sorted(moved.options) == sorted(options)
    assert all(new != old for new, old in zip(moved.options, options, strict=True))
    assert moved.gold == item.gold
    assert moved.model_copy(update={"options": options, "answer": item.answer}) == item


def test_permuted_orders_are_drawn_evenly():
    item = record("1", ("a", "b", "c", "d"))
    orders = Counter(permuted(item, seed).options for seed in range(900))
    assert len(orders) == 9  # derangements of four
    assert all(60 < count < 140 for count in orders.values())
    assert permuted(item, 3) == permuted(item, 3)


def test_conditions_refuse_what_they_cannot_do():
    with pytest.raises(MedR1Error, match="'dark' is unknown; choose image, blank, shuffled, shuffled_other"):
        as_shown([record("1")], "dark", seed=0)
    for condition in ("blank", "no_image"):
        with pytest.raises(MedR1Error, match=f"record 1: no image .* leave the {condition} control out"):
            as_shown([record("1", images=())], condition, seed=0)


def test_every_condition_with_a_real_model(tmp_path: Path):
    """Rows say what was shown; they score again, resume, and are never taken for those of another condition."""
    vlm = tiny_vlm("qwen2_vl")
    records = []
    for number in range(4):
        image = tmp_path / f"{number}.png"
        Image.new("RGB", (56, 56), (60 * number, 0, 90)).save(image)
        modality = ("CT", "OCT")[number % 2]
        options = ("Cyst", "Tumour", "Stone", "Scar")[: number + 1] if number else ("Cyst", "Tumour")
        records.append(record(str(number), options, images=(image,), modality=modality))
    rows = {}
    for condition in CONDITIONS:
        out = tmp_path / f"{condition}.jsonl"
        request = {"mode": "think", "out": out, "max_new_tokens": 4, "condition": condition}
        rows[condition] = evaluate(vlm, records, **request)
        assert [row["id"] for row in rows[condition]] == ["0", "1", "2", "3"]
        assert score(rows[condition]) == rows[condition] == evaluate(vlm, records, **request)
        assert len(read_jsonl(out)) == 4
    assert len({row["key"] for part in rows.values() for row in part}) == 4 * len(CONDITIONS)

    assert [row["reply"] for row in rows["repeat"]] == [row["reply"] for row in rows["image"]]
    assert flip_rate(rows["image"], rows["repeat"])["rate"] == 0
    assert all(row["images"] == [] for row in rows["no_image"])
    for shown, asked in zip(rows["image"], rows["permuted"], strict=True):
        assert shown["images"] == asked["images"]
        assert sorted(shown["options"]) == sorted(asked["options"])
        assert shown["gold"] == "A" != asked["gold"]
        assert asked["options"]["ABCD".index(asked["gold"])] == "Cyst"
    for condition, same_modality in (("shuffled", True), ("shuffled_other", False)):
        for number, row in enumerate(rows[condition]):
            shown = int(Path(row["images"][0]).stem)
            assert shown != number
            assert (shown % 2 == number % 2) == same_modality

    ct = [records[0], records[2]]  # one modality: another's images come from the donors
    out = tmp_path / "ct.jsonl"
    donated = evaluate(vlm, ct, mode="think", out=out, max_new_tokens=4, condition="shuffled_other", donors=records)
    assert donated[0]["images"] == rows["shuffled_other"][0]["images"]
