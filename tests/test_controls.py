"""The controls by hand, and the text-only prior against the figures known of the public splits."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from medr1.controls import blank_image, shuffled_partners, text_only_prior
from medr1.errors import MedR1Error
from medr1.records import Record


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


@pytest.mark.parametrize(
    ("folder", "name", "percent"),
    [
        ("modality", "OCT (Optical Coherence Tomography", 100.0),
        ("modality", "Dermoscopy", 95.1),
        ("modality", "Microscopy Images", 98.6),
        ("question_type", "Lesion Grading", 96.1),
    ],
)
def test_prior_on_the_public_splits(shared: Path, folder: str, name: str, percent: float):
    """The known defect: these test parts can be answered from option texts alone."""
    from medr1.datasets import load_records

    splits = shared / "data" / "medr1_splits" / folder
    if not splits.is_dir():
        pytest.skip(f"needs the public split files in {shared.name}/data/medr1_splits")
    train = load_records(splits / "train" / f"{name}_train.json", check_images=False)
    test = load_records(splits / "test" / f"{name}_test.json", check_images=False)
    assert 100 * text_only_prior(train, test)["accuracy"] == pytest.approx(percent, abs=1)


def test_blank_image_keeps_size_and_mean():
    image = Image.new("RGB", (4, 2), (10, 20, 30))
    image.paste((110, 20, 31), (0, 0, 2, 2))
    blank = blank_image(image)
    assert (blank.size, blank.mode) == ((4, 2), "RGB")
    assert blank.getcolors() == [(8, (60, 20, 30))]  # the mean 30.5 rounds to even


def test_partners_share_modality_and_number_of_images_but_not_the_group():
    records = [record(str(i), group=str(i // 2), modality=("CT", "OCT")[i % 2]) for i in range(40)]
    records += [record(f"two{i}", images=(Path("a"), Path("b"))) for i in range(4)]
    partners = shuffled_partners(records, seed=0)
    assert partners.keys() == {record.id for record in records}
    for item in records:
        partner = partners[item.id]
        assert partner.modality == item.modality
        assert len(partner.images) == len(item.images)
        assert partner.group != item.group
    assert partners == shuffled_partners(records[::-1], seed=0)
    assert partners != shuffled_partners(records, seed=1)


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
