"""The data check finds what was put in, and the known overlaps of the public splits."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from medr1.cli import app
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.report.checks import check_data, print_check, write_check
from medr1.report.checks.images import MAX_DISTANCE, copies, correlations, near_pairs
from medr1.report.checks.page import tell
from medr1.report.checks.texts import answers, letters, options, plain, questions


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": "S",
        "question_id": f"q{number}",
        "question_type": "Lesion Grading",
        "question": "Which?",
        "gt_answer": "a",
        "image_path": f"Images/S/{number}.png",
        "modality_type": "OCT",
        "option_A": "a",
        "option_B": "b",
        **changes,
    }


def omnimedvqa(root: Path, rows: list[dict[str, Any]]) -> Path:
    questions = root / "QA_information" / "Open-access"
    questions.mkdir(parents=True)
    (questions / "S.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "Images" / "S").mkdir(parents=True)
    return root


def texture(seed: int, size: int = 96) -> Image.Image:
    """A random grey picture with detail of all sizes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def record(number: int, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "id": f"q{number}",
        "images": (Path(f"{number}.png"),),
        "question": "Which?",
        "options": ("a", "b"),
        "answer": "A",
        "modality": "OCT",
        "question_type": "Lesion Grading",
        "source": "S",
        "group": str(number),
    }
    return Record(**values | changes)


@pytest.fixture
def defective(tmp_path: Path) -> Path:
    """Eight questions: 1 is 0 in other bytes, 2 is 0 re-encoded as a smaller JPEG, 3 is another picture, 4 is cut
    off, 5 is missing; q6 and q7 ask again about picture 3."""
    third = "Images/S/3.png"
    rows = [
        row(0),
        row(1, option_C="c", option_D="C", modality_type="OCT (Optical Coherence Tomography"),
        row(2, image_path="Images/S/2.jpg", gt_answer="A"),
        row(3, question="What is  shown here, in this image?"),
        row(4, option_A="B.", option_B="a", option_C="c"),
        row(5, question_type="disease_diagnosis"),
        row(6, image_path=third, question="what is shown here in this image", gt_answer="b"),
        row(7, image_path=third, question="What is shown here, in the image?"),
    ]
    rows[7]["modality"] = rows[7].pop("modality_type")
    root = omnimedvqa(tmp_path / "data", rows)
    images = root / "Images" / "S"
    texture(0).save(images / "0.png")
    texture(0).save(images / "1.png", compress_level=0)
    texture(0).resize((64, 64)).save(images / "2.jpg", quality=60)
    texture(3).save(images / "3.png")
    (images / "4.png").write_bytes((images / "3.png").read_bytes()[:200])
    return root


def test_findings(defective: Path) -> None:
    report = check_data(defective)
    assert (report["records"], report["groups"]) == (8, 6)
    assert report["chance"] == pytest.approx((6 / 2 + 1 / 4 + 1 / 3) / 8)
    assert report["counts"] == {
        "modality": {"OCT": 8},
        "question_type": {"Lesion Grading": 7, "Disease Diagnosis": 1},
        "num_options": {"2": 6, "4": 1, "3": 1},
    }
    assert report["sources"] == {"S": {"records": 8, "images": 6, "licences": ["follows the source"]}}

    images = report["images"]
    assert (images["num"], images["read"]) == (6, 4)
    assert images["missing"] == {"num": 1, "listed": ["Images/S/5.png"]}
    assert images["unreadable"]["num"] == 1
    assert re.search(r"4\.png: cannot be decoded as an image", images["unreadable"]["listed"][0])
    assert images["byte_copies"]["num"] == 0
    assert images["pixel_copies"] == {"num": 1, "listed": [["Images/S/0.png", "Images/S/1.png"]]}
    assert images["pixel_copies_across_groups"] == images["pixel_copies"]
    assert [pair["images"] for pair in images["near_duplicates"]["listed"]] == [["Images/S/0.png", "Images/S/2.jpg"]]
    assert images["near_across_groups"] == 1

    assert report["questions"]["repeated"]["listed"] == [["q0", "q1"], ["q3", "q6"]]  # q1 shows the pixels of q0
    assert report["questions"]["conflicting"]["listed"] == [["q3", "q6"]]
    assert report["questions"]["near_same"]["listed"] == [["q3", "q7"]]
    assert report["options"]["duplicates"]["listed"] == ["q1"]
    assert report["options"]["variants"]["listed"] == [{"b": 7, "B.": 1}, {"c": 2, "C": 1}]
    assert report["options"]["stem_variants"]["num"] == 1
    mended = report["spellings"]["canonicalised"]["listed"]
    assert {(line["field"], line["written"], line["read_as"]) for line in mended} == {
        ("key", "modality", "modality_type"),
        ("modality_type", "OCT (Optical Coherence Tomography", "OCT"),
        ("question_type", "disease_diagnosis", "Disease Diagnosis"),
        ("gt_answer", "A", "a"),
    }
    assert report["spellings"]["mended"] == 4
    assert report["spellings"]["spaces"]["listed"] == ["S.json: row 4"]
    assert json.loads(json.dumps(report)) == report


def test_groups_keep_copies_together(defective: Path) -> None:
    names = [*(f"{number}.png" for number in (0, 1, 3, 4, 5)), "2.jpg"]
    lines = [f"Images/S/{name},{'one' if name[0] in '012' else name}\n" for name in names]
    (defective / "groups.csv").write_text("image_path,group\n" + "".join(lines), encoding="utf-8")
    images = check_data(defective)["images"]
    assert (images["pixel_copies"]["num"], images["pixel_copies_across_groups"]["num"]) == (1, 0)
    assert (images["near_duplicates"]["num"], images["near_across_groups"], images["near_across_parts"]) == (1, 0, 0)


def test_copies_are_on_one_side_of_our_split_and_on_both_of_a_published_one(tmp_path: Path) -> None:
    """Twenty files of four pictures, each file its own group: no path is shared, all test pictures would be."""
    root = omnimedvqa(tmp_path, [row(number) for number in range(20)])
    for number in range(20):
        texture(number % 4).save(root / "Images" / "S" / f"{number}.png")
    report = check_data(root)
    (own,) = report["parts"]
    assert (own["name"], own["train"], own["test"]) == ("medr1's own split", 15, 5)  # one of the four pictures
    assert (own["image_in_train"], own["group_in_train"], own["near_in_train"]) == (0, 0, 0)
    assert (own["copy_in_train"], own["question_in_train"], own["stem_in_train"]) == (0, 0, 5)

    problem = {"problem": "Which? A)x, B)y", "solution": "<answer> A </answer>"}
    for part, numbers in (("train", range(16)), ("test", range(16, 20))):
        rows = [{"image": f"Images/S/{number}.png", **problem} for number in numbers]
        (tmp_path / f"CT_{part}.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.rmtree(root / "QA_information")
    report = check_data(tmp_path)
    published, own = report["parts"]
    assert (published["image_in_train"], published["group_in_train"], published["copy_in_train"]) == (0, 0, 4)
    assert own["copy_in_train"] == 0
    assert any(worth == "bad" and "4 show the pixels of a train image" in told for worth, told in tell(report))


def test_published_parts_without_images(tmp_path: Path) -> None:
    def split_row(name: str, stem: str) -> dict[str, str]:
        return {"image": f"Images/S/{name}.png", "problem": f"{stem} A)x, B)y", "solution": "<answer> A </answer>"}

    train = [split_row("0", "Which?"), split_row("1", "Which one?")]
    test = [split_row("0", "Where?"), split_row("1", "Which one?"), split_row("2", "which")]
    (tmp_path / "CT_train.json").write_text(json.dumps(train), encoding="utf-8")
    (tmp_path / "CT_test.json").write_text(json.dumps(test), encoding="utf-8")
    report = check_data(tmp_path)
    published, own = report["parts"]
    assert {name: value for name, value in published.items() if name != "text_only"} == {
        "name": "CT",
        "train": 2,
        "test": 3,
        "image_in_train": 2,
        "group_in_train": 2,
        "copy_in_train": None,
        "near_in_train": None,
        "question_in_train": 1,
        "stem_in_train": 2,
    }
    assert published["text_only"]["accuracy"] == 1 and own["image_in_train"] == 0
    assert report["questions"]["repeated"]["num"] == 0  # train and test of a published split are told apart
    assert report["images"]["pixel_copies"] is None and report["images"]["near_duplicates"] is None
    assert tell(report)[0] == ("open", "None of the 3 image files is there: nothing could be checked on them.")


@given(st.data())
def test_bands_find_every_near_pair(data: st.DataObject) -> None:
    """Against the slow definition, on hashes of which many are a few flipped bits apart."""
    bases = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.sets(st.integers(0, 63), max_size=6).map(lambda bits: sum(1 << bit for bit in bits))
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(bases), flips), max_size=20))
    hashes = [base ^ flip for base, flip in drawn]
    expected = [
        [i, j]
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if (hashes[i] ^ hashes[j]).bit_count() <= MAX_DISTANCE
    ]
    assert near_pairs(np.array(hashes, dtype=np.uint64)).tolist() == expected


def test_correlations_agree_with_numpy() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (5, 64 * 64), dtype=np.uint8)
    pairs = np.array([(i, j) for i in range(5) for j in range(i + 1, 5)])
    expected = [np.corrcoef(grey[i], grey[j])[0, 1] for i, j in pairs]
    assert correlations(grey, pairs) == pytest.approx(expected, abs=1e-12)
    assert len(correlations(grey, pairs[:0])) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((image.width * 2 // 3, image.height * 2 // 3)),
        lambda image: image.point(lambda value: round(value * 0.85)),
        lambda image: image.rotate(0.4),
    ],
    ids=["shrunk", "darker", "hardly turned"],
)
def test_real_pictures_changed_a_little_look_alike(
    tmp_path: Path, shared: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    files = [
        file for source in sorted((shared / "data/real/Images").iterdir()) for file in sorted(source.iterdir())[:2]
    ]
    root = omnimedvqa(tmp_path, [row(number) for number in range(2 * len(files))])
    for number, file in enumerate(files):
        with Image.open(file) as image:
            image.convert("RGB").save(root / "Images" / "S" / f"{number}.png")
            change(image.convert("RGB")).save(root / "Images" / "S" / f"{number + len(files)}.png")
    found = check_data(root)["images"]["near_duplicates"]["listed"]
    expected = {(f"Images/S/{number}.png", f"Images/S/{number + len(files)}.png") for number in range(len(files))}
    pairs = {tuple(sorted(pair["images"], key=lambda name: int(Path(name).stem))) for pair in found}
    assert pairs <= expected
    assert len(pairs) >= 0.8 * len(files)


def test_constant_pictures_are_no_look_alikes(tmp_path: Path) -> None:
    """Their hashes agree, but a correlation is not defined for them."""
    root = omnimedvqa(tmp_path, [row(number) for number in range(3)])
    for number, colour in enumerate(("black", "grey", "white")):
        Image.new("RGB", (9, 9), colour).save(root / "Images" / "S" / f"{number}.png")
    images = check_data(root)["images"]
    assert (images["near_candidates"], images["near_duplicates"]["num"], images["pixel_copies"]["num"]) == (0, 0, 0)


def test_one_picture_alone(tmp_path: Path) -> None:
    """One group cannot be divided: no parts, and the sentence says so."""
    root = omnimedvqa(tmp_path, [row(0)])
    texture(0).save(root / "Images" / "S" / "0.png")
    report = check_data(root)
    assert report["parts"] == []
    assert ("open", "Too few groups to divide into train and test.") in tell(report)
    write_check(report, tmp_path / "out")


def test_letters() -> None:
    """30 A and 10 B of two options: chi-squared (10^2 + 10^2) / 20 = 10 with one degree of freedom, p = 0.00157."""
    records = [record(number, answer="A" if number < 30 else "B") for number in range(40)]
    found = letters(records)
    assert found["by_num_options"] == {"2": {"A": 30, "B": 10}}
    assert found["p"] == pytest.approx(0.0015654, rel=1e-4)
    assert (found["best"], found["best_share"]) == ("A", 0.75)
    even = [*records[:10], *records[30:], *(record(40 + n, options=("x", "y", "z"), answer="ABC"[n]) for n in range(3))]
    assert letters(even)["p"] == pytest.approx(1)


def test_answers() -> None:
    """ "a" is right in two of four and not on offer in one of three options: (2 + 1/3) / 4."""
    records = [
        record(0),
        record(1, options=("b", "A."), answer="B"),
        record(2, answer="B"),
        record(3, options=("x", "y", "z"), answer="C"),
        record(4, question_type=None),
    ]
    found = answers(records)
    assert list(found) == ["Lesion Grading", "OCT, any type"]
    assert found["Lesion Grading"]["majority"] == pytest.approx((2 + 1 / 3) / 4)
    assert found["Lesion Grading"]["chance"] == pytest.approx((3 / 2 + 1 / 3) / 4)
    assert (found["Lesion Grading"]["n"], found["Lesion Grading"]["distinct"]) == (4, 3)
    assert [times for _, times in found["Lesion Grading"]["top"]] == [2, 1, 1]


def test_words() -> None:
    assert plain(' "Which  IS it?" ') == "which is it"
    content = {Path(f"{number}.png"): str(number) for number in range(9)}
    apart = [[record(0)], [record(1, images=(Path("0.png"),))]]
    assert questions(apart, content) == {"repeated": [], "conflicting": [], "near_same": []}
    assert questions([apart[0] + apart[1]], content)["repeated"] == [["q0", "q1"]]
    left, right = record(0, question="Is this the left eye?"), record(1, question="Is this a malignant lesion?")
    assert questions([[left, right]], dict.fromkeys(content, "same"))["near_same"] == []
    assert options([record(0), record(1, options=("a", "b", "B"))])["duplicates"] == ["q1"]
    assert copies("abcd", [1, 2, 1, 3]) == [["a", "c"]]


def test_signs_are_parts_of_answers() -> None:
    """ER+ and ER- are two answers and no spelling of one, and who gives both about a picture contradicts himself."""
    signs = ["ER+", "ER-", "ER−", "<5 cm", ">5 cm", "≥3", "≤3", "-5", "5"]
    assert len({*map(plain, signs)}) == 8 and plain("T2-weighted, grade-3.") == "t2 weighted grade 3"
    different = [
        record(0, options=("ER+", "ER-")),
        record(1, options=(">5 cm", "<5 cm")),
        record(2, options=("-5", "5")),
    ]
    assert options(different)["variants"] == []
    assert options([*different, record(3, options=("er +", "x"))])["variants"] == [{"ER+": 1, "er +": 1}]
    opened = [record(0, options=(), answer="ER+"), record(1, options=(), answer="ER-")]
    assert answers(opened)["open, a text"]["distinct"] == 2
    content = dict.fromkeys((Path("0.png"), Path("1.png")), "same")
    assert questions([opened], content)["conflicting"] == [["q0", "q1"]]


def own(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [("train.json", "test.json"), ("train/rows.json", "test/rows.json")])
def test_parts_whose_rows_have_ids(tmp_path: Path, names: tuple[str, str]) -> None:
    """Half of the test questions show an image of train; ids with "/" are of no other file."""
    asked = [{"question": f"What is {n}?", "answer": "x", "image": f"{n}.png"} for n in range(8)]
    train, test = asked[:6], [{**row, "question": "Where?"} for row in asked[4:8]]
    for name, rows in zip(names, (train, test), strict=True):
        own(tmp_path, name, [row | {"id": f"{name[:2]}{n}/{n}"} for n, row in enumerate(rows)])
    published, _ = check_data(tmp_path)["parts"]
    assert (published["train"], published["test"], published["image_in_train"]) == (6, 4, 2)


def test_a_question_asked_again_is_found_whatever_ids_and_files_are_called(tmp_path: Path) -> None:
    rows = [{"question": "What is it?", "answer": "x", "image": "a.png", "id": f"patient{n}/1"} for n in range(2)]
    own(tmp_path, "one.json", rows)
    own(tmp_path, "two.json", [rows[0] | {"id": "again", "answer": "y"}])
    found = check_data(tmp_path)["questions"]
    assert found["repeated"]["listed"] == found["conflicting"]["listed"] == [["patient0/1", "patient1/1", "again"]]


def test_a_patient_of_several_studies_is_one_group(tmp_path: Path) -> None:
    """The same pixels in two studies of one patient are not across groups, and of two patients they are."""
    groups = {"a": ["p1", "study 1"], "b": ["p1", "study 2"], "c": ["p2"], "d": ["p3"]}
    for number, name in enumerate(groups):
        texture(number // 2).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "question": "What?", "answer": "x", "group": of} for name, of in groups.items()]
    report = check_data(own(tmp_path, "mine.json", rows))
    assert (report["records"], report["groups"]) == (4, 3)
    assert report["images"]["pixel_copies"]["num"] == 2
    assert report["images"]["pixel_copies_across_groups"]["listed"] == [["c.png", "d.png"]]


def test_the_next_command_has_the_options_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "my images").mkdir()
    texture(0).save(tmp_path / "my images" / "a.png")
    own(tmp_path, "mine.json", [{"image": "a.png", "question": "What?", "answer": "x"}])
    data = [str(tmp_path / "mine.json"), "--image-root", str(tmp_path / "my images"), "--language", "all"]

    def said(*arguments: str) -> str:
        return CliRunner().invoke(app, ["data", *arguments]).output.replace("\n", " ")

    again = f"medr1 data check {data[0]} --image-root '{data[2]}' --language all"
    assert f"{again} --out check" in said("check", *data)
    settings = f"--set 'data.image_root={data[2]}' --set data.language=all"
    assert f"medr1 train --data {data[0]} {settings} --out" in said("check", *data, "--out", str(tmp_path / "c"))
    assert f"`{again}`" in said("show", *data, "--out", str(tmp_path / "page.html"))


def test_page(defective: Path, tmp_path: Path) -> None:
    """Self-contained, nothing of the data set becomes markup, pictures inside, the same JSON beside it."""
    file = defective / "QA_information" / "Open-access" / "S.json"
    hostile = "<script>alert(1)</script>"
    rows = json.loads(file.read_text(encoding="utf-8"))
    rows[0]["question"] = rows[1]["gt_answer"] = rows[1]["option_A"] = hostile
    file.write_text(json.dumps(rows), encoding="utf-8")
    report = check_data(defective)
    write_check(report, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8")) == report
    page = (tmp_path / "out" / "check.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:image/webp|#)""", page) and "url(" not in page
    assert page.count("<img ") == 2 * report["images"]["near_duplicates"]["num"] == 2
    assert "not for clinical use" in page and "candidates, not verdicts" in page
    for _, sentence in tell(report):
        assert sentence.replace("'", "&#39;") in page


def test_console(defective: Path) -> None:
    console = Console(record=True, width=100)
    print_check(check_data(defective), console)
    text = console.export_text()
    assert "8 questions, 6 images, 6 groups, 1 sources" in text
    assert "✗" in text and "✓" in text and "Lesion Grading" in text


def test_command(defective: Path, tmp_path: Path) -> None:
    """Defects are findings, with exit status 0; a folder without questions is none."""
    ran = CliRunner().invoke(app, ["data", "check", str(defective), "--json", "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0
    assert json.loads(ran.stdout.strip().splitlines()[-1])["images"]["missing"]["num"] == 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["check.html", "check.json"]
    ran = CliRunner().invoke(app, ["data", "check", str(tmp_path / "out")])
    assert ran.exit_code != 0 and isinstance(ran.exception, MedR1Error)


def test_real_data(shared: Path) -> None:
    """The exact copies among the real images lie within groups; many BUSI and OCT pictures look alike across them."""
    report = check_data(shared / "data" / "real")
    images = report["images"]
    assert (report["records"], images["num"], images["read"]) == (12_807, 5_478, 5_478)
    assert (images["byte_copies"]["num"], images["pixel_copies_across_groups"]["num"]) == (11, 0)
    assert 100 < images["near_across_groups"] < 200
    (own,) = report["parts"]
    assert (own["image_in_train"], own["group_in_train"], own["copy_in_train"]) == (0, 0, 0)
    assert report["options"]["duplicates"]["num"] == 0


def test_public_splits(shared: Path) -> None:
    """Test questions whose image is in train, and what option texts give away, against counts made by other means."""
    report = check_data(shared / "data" / "medr1_splits")
    assert report["images"]["missing"]["num"] == report["images"]["num"]
    *published, own = report["parts"]
    found = {part["name"].split(" ")[0]: part for part in published}
    assert {name: part["image_in_train"] for name, part in found.items()} == {
        "Dermoscopy": 241,
        "OCT": 253,
        "Microscopy": 308,
        "Lesion": 0,
    }
    known = {"Dermoscopy": 0.951, "OCT": 1.0, "Microscopy": 0.986, "Lesion": 0.961}
    for name, accuracy in known.items():
        assert found[name]["text_only"]["accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert (own["image_in_train"], own["group_in_train"]) == (0, 0)
