"""The data check finds what was put in, and the known overlaps of the public splits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from medr1.checks import check_data
from medr1.errors import MedR1Error


def folder(root: Path) -> Path:
    rows = []
    images = root / "Images" / "S"
    images.mkdir(parents=True)
    for number, (colour, options) in enumerate(
        [("red", ("a", "b")), ("red", ("a", "b", "c", "d")), ("blue", ("a", "b", "B")), ("green", ("a", "c"))]
    ):
        Image.new("RGB", (8, 8), colour).save(images / f"{number}.png")
        rows.append(
            {
                "dataset": "S",
                "question_id": f"q{number}",
                "question_type": "Lesion Grading",
                "question": "Which?",
                "gt_answer": "a",
                "image_path": f"Images/S/{number}.png",
                "modality_type": "OCT",
                **{f"option_{letter}": text for letter, text in zip("ABCD", options, strict=False)},
            }
        )
    rows.append({**rows[0], "question_id": "q4"})
    questions = root / "QA_information" / "Open-access"
    questions.mkdir(parents=True)
    (questions / "S.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


def test_findings(tmp_path: Path) -> None:
    root = folder(tmp_path)
    report = check_data(root)
    copies = [[str(root / "Images" / "S" / "0.png"), str(root / "Images" / "S" / "1.png")]]
    assert report == {
        "records": 5,
        "images": 4,
        "missing_images": 0,
        "groups": 4,
        "by_modality": {"OCT": 5},
        "by_question_type": {"Lesion Grading": 5},
        "by_source": {"S": 5},
        "by_num_options": {"2": 3, "3": 1, "4": 1},
        "by_answer": {"A": 5},
        "licence_by_source": {"S": "follows the source"},
        "chance": pytest.approx((3 / 2 + 1 / 3 + 1 / 4) / 5),
        "distinct_questions": 1,
        "duplicate_options": {"num": 1, "examples": ["q2"]},
        "duplicate_questions": {"num": 2, "examples": ["q0", "q4"]},
        "duplicate_images": {"num": 1, "examples": copies},
        "duplicate_images_across_groups": {"num": 1, "examples": copies},
        "train_test_overlap": {},
    }
    json.dumps(report)
    (root / "groups.csv").write_text(
        "image_path,group\n" + "".join(f"Images/S/{n}.png,{n // 2}\n" for n in range(4)), encoding="utf-8"
    )
    assert check_data(root)["duplicate_images_across_groups"]["num"] == 0


def test_a_missing_image_is_an_error(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "Images" / "S" / "3.png").unlink()
    with pytest.raises(MedR1Error, match=r"3\.png: no such image, wanted by record q3"):
        check_data(root)


def test_real_data(shared: Path) -> None:
    report = check_data(shared / "data" / "real")
    assert report["records"] == 12_807
    assert report["duplicate_images_across_groups"]["num"] == 0
    assert report["duplicate_options"]["num"] == 0


def test_public_splits(shared: Path) -> None:
    """Test questions whose image is in train, against counts made before by other means."""
    report = check_data(shared / "data" / "medr1_splits")
    assert report["missing_images"] == report["images"]
    overlap = {name.split(" ")[0]: found["image_in_train"] for name, found in report["train_test_overlap"].items()}
    assert overlap == {"Dermoscopy": 241, "OCT": 253, "Microscopy": 308, "Lesion": 0}
