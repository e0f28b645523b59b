"""Objectives that keep a policy looking: what they pay for, and what they no longer pay for."""

from collections import Counter
from pathlib import Path

from medr1.data.records import Record
from medr1.training.looking import OtherImages


def record(name: str, answer: str, options: tuple[str, ...] = ("Cyst", "Scar"), **fields: object) -> Record:
    defaults = {
        "images": (Path(f"{name}.png"),),
        "question": "What is it?",
        "modality": "OCT",
        "question_type": "Disease Diagnosis",
        "source": "made",
        "group": name,
    }
    return Record.model_validate({**defaults, "id": name, "options": options, "answer": answer, **fields})


RECORDS = [
    record("one", "A"),
    record("two", "B"),
    record("three", "A", ("Scar.", "cyst")),
    record("far", "B", modality="MRI"),
    record("other", "A", ("Cyst", "Fluid")),
    record("type", "B", question_type="Lesion Grading"),
]


def test_exchanged_images_come_with_their_own_right_answer() -> None:
    others = OtherImages(RECORDS)
    right = {"one.png": "Cyst", "two.png": "Scar", "three.png": "Scar"}
    drawn: Counter[str] = Counter()
    for step in range(400):
        asked = others.exchanged(RECORDS[0], 1.0, f"0 {step}")
        assert (asked.id, asked.options, asked.group) == ("one", ("Cyst", "Scar"), "one")
        assert asked.gold == right[asked.images[0].name]
        drawn[asked.gold] += 1
    assert abs(drawn["Cyst"] - 200) < 50, "no option is right more often than another, however often it is in the data"
    assert {others.exchanged(RECORDS[2], 1.0, str(step)).gold for step in range(20)} == {"Scar.", "cyst"}, "as worded"


def test_an_image_of_another_modality_is_shown_where_the_own_has_no_other_answer() -> None:
    others = OtherImages(RECORDS)
    assert {others.exchanged(RECORDS[3], 1.0, str(step)).images[0].name for step in range(60)} == {
        "one.png", "two.png", "three.png", "far.png"
    }  # fmt: skip


def test_exchanges_are_a_share_and_the_same_whenever_drawn() -> None:
    others, again = OtherImages(RECORDS), OtherImages(RECORDS[::-1][::-1])
    drawn = [others.exchanged(RECORDS[0], 0.4, str(step)) for step in range(500)]
    assert drawn == [again.exchanged(RECORDS[0], 0.4, str(step)) for step in range(500)]
    # Of those that are exchanged half show a scar, and the others the only cyst there is, their own.
    assert 60 < sum(one != RECORDS[0] for one in drawn) < 140
    assert all(others.exchanged(RECORDS[0], 0.0, str(step)) is RECORDS[0] for step in range(50))


def test_what_has_no_other_answer_is_asked_as_it_is() -> None:
    others = OtherImages(RECORDS)
    alone = record("open", "Cyst", ())
    twice = record("twice", "A", ("Cyst", "cyst "))
    for one in (RECORDS[4], RECORDS[5], alone, twice, record("text", "A", images=())):
        assert others.exchanged(one, 1.0, "0") is one
