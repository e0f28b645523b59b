"""Readers against the public files' counts and defects, and against every kind of bad input."""

import json
import os
from pathlib import Path

import pytest

from medr1.data.datasets import load_records
from medr1.data.datasets.medr1_splits import modality_of_image
from medr1.data.datasets.rows import canonical_modality, canonical_question_type
from medr1.data.records import MODALITIES, QUESTION_TYPES, Record
from medr1.errors import MedR1Error
from medr1.report.checks import check_data

ROW = {
    "dataset": "HAM10000",
    "question_id": "HAM10000_0",
    "question_type": "Disease Diagnosis",
    "question": "What is shown?",
    "gt_answer": "Naevus",
    "image_path": "Images/HAM10000/a b.jpg",
    "option_A": "Melanoma",
    "option_B": "Naevus",
    "modality_type": "Dermoscopy",
}
SPLIT_ROW = {
    "image": "Images/MIAS/mdb084.png",
    "problem": "What is it? A)CT, B)T3 N0, Stage III, C)MRI",
    "solution": "<answer> B </answer>",
}


def omnimedvqa(root: Path, *changes: dict, groups: str | None = None) -> Path:
    """An OmniMedVQA folder: a row for each dict of changes to ROW, in which None removes a key."""
    rows = [
        {k: v for k, v in ({**ROW, "question_id": f"q{i}"} | change).items() if v is not None}
        for i, change in enumerate(changes or ({},))
    ]
    file = root / "QA_information" / "Open-access" / "HAM10000.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
    image = root / ROW["image_path"]
    image.parent.mkdir(parents=True)
    image.write_bytes(b"not decoded here")
    if groups is not None:
        (root / "groups.csv").write_text(groups, encoding="utf-8")
    return root


def split_file(root: Path, *changes: dict, name: str = "X-Ray_train.json") -> Path:
    file = root / name
    file.write_text(json.dumps([SPLIT_ROW | change for change in changes or ({},)]), encoding="utf-8")
    return file


def error_of(path: Path, **arguments) -> str:
    with pytest.raises(MedR1Error) as error:
        load_records(path, **arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


# -- the public files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public(shared: Path) -> list[Record]:
    return load_records(shared / "data" / "medr1_splits", check_images=False)


def test_every_public_split_row_is_read(shared: Path, public: list[Record]) -> None:
    root = shared / "data" / "medr1_splits"
    files = sorted(root.rglob("*.json"))
    rows = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    assert len(public) == sum(map(len, rows.values())) == 36_598
    for record in public:
        stem, _, number = record.id.rpartition("/")
        row = rows[stem][int(number) - 1]
        assert record.modality in MODALITIES
        assert record.images == (root / row["image"],)
        assert row["solution"].strip("<>/answer ") == record.answer
        # Stem and options put together again give the row's text, up to white space.
        listed = [f"{letter}){text}" for letter, text in zip(record.letters, record.options, strict=True)]
        assert "".join((record.question + ",".join(listed)).split()) == "".join(row["problem"].split())


def test_modality_of_a_source_agrees_with_the_modality_files(shared: Path, public: list[Record]) -> None:
    """The map from sources serves question-type files; the modality files are the truth about the sources."""
    root = shared / "data" / "medr1_splits"
    stated = [record for record in public if record.question_type is None]
    assert len(stated) == 31_404
    for record in stated:
        assert modality_of_image(str(record.images[0].relative_to(root))) == record.modality, record.id


def test_question_type_files(shared: Path) -> None:
    folder = shared / "data" / "medr1_splits" / "question_type" / "test"
    records = load_records(folder, check_images=False)
    assert {record.question_type for record in records} == {
        "Modality Recognition",
        "Lesion Grading",
        "Other Biological Attributes",
    }
    kept = load_records(folder, check_images=False, modalities=["x-ray"], question_types=["modality recognition"])
    assert {record.modality for record in kept} == {"X-Ray"}


def test_the_row_of_unknown_modality(shared: Path) -> None:
    file = shared / "data" / "medr1_splits" / "modality" / "train" / "unknown_train.json"
    (record,) = load_records(file, check_images=False)
    assert (record.modality, record.source, record.gold) == ("CT", "Chest CT Scan", "CT")


def test_real_images(shared: Path) -> None:
    root = shared / "data" / "real"
    records = load_records(root)
    assert len(records) == 12_807
    assert len({record.images for record in records}) == 5_478
    assert {record.modality for record in records} == set(MODALITIES)
    assert {record.question_type for record in records} == set(QUESTION_TYPES)
    lines = (root / "groups.csv").read_text(encoding="utf-8").splitlines()[1:]
    groups = dict(line.rsplit(",", 1) for line in lines)
    assert all(record.group == groups[str(record.images[0].relative_to(root))] for record in records)
    assert len({record.group for record in records}) < 5_478


# -- spellings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        ("CT(Computed Tomography)", "CT"),
        ("MR (Mag-netic Resonance Imaging)", "MRI"),
        ("X-Ray", "X-Ray"),
        ("xray", "X-Ray"),
        ("ultrasound", "Ultrasound"),
        ("US", "Ultrasound"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        ("Microscopy Images", "Microscopy"),
        ("Fundus", "Fundus Photography"),
        *((modality, modality) for modality in MODALITIES),
    ],
)
def test_modality_spellings(text: str, modality: str) -> None:
    assert canonical_modality(text) == modality


def test_unknown_spellings_are_errors() -> None:
    for text in ("Endoscopy", "unknown", "", "CTA"):
        with pytest.raises(ValueError, match="unknown modality"):
            canonical_modality(text)
    assert canonical_question_type("disease_diagnosis") == "Disease Diagnosis"
    with pytest.raises(ValueError, match="unknown question type"):
        canonical_question_type("Diagnosis")


def test_image_names_that_tell_the_modality() -> None:
    assert modality_of_image("Images/RadImageNet/normal/mri-abd-normal12.png") == "MRI"
    assert modality_of_image("Images/RadImageNet/normal/abd-normal12.png") == "CT"
    assert modality_of_image("Images/RadImageNet/cbd/usn7.png") == "Ultrasound"
    assert modality_of_image("Images/RadImageNet/cbd/wrist7.png") is None
    assert modality_of_image("Images/OCT & X-Ray 2017/test/NORMAL/NORMAL-123-4.jpeg") == "OCT"
    assert modality_of_image("Images/OCT & X-Ray 2017/test/NORMAL/NORMAL2-IM-0012-0001.jpeg") == "X-Ray"
    assert modality_of_image("Images/Somewhere/a.png") is None


# -- what a row becomes --------------------------------------------------------------------------------------


def test_omnimedvqa_row(tmp_path: Path) -> None:
    (record,) = load_records(omnimedvqa(tmp_path))
    assert (record.answer, record.gold, record.options) == ("B", "Naevus", ("Melanoma", "Naevus"))
    assert record.images == (tmp_path / ROW["image_path"],)
    assert record.group == ROW["image_path"]  # no groups.csv: each image is its own group
    assert record.chance == 0.5


def test_the_public_item_with_another_modality_key(tmp_path: Path) -> None:
    change = {"modality_type": None, "modality": "CT(Computed Tomography)"}
    (record,) = load_records(omnimedvqa(tmp_path, change))
    assert record.modality == "CT"


def test_gold_by_case_and_duplicate_distractors(tmp_path: Path) -> None:
    records = load_records(
        omnimedvqa(
            tmp_path,
            {"gt_answer": "naevus "},  # another case, and white space
            {"option_B": "Right Atrium", "option_C": "Right atrium", "gt_answer": "Right atrium"},
            {"option_C": "Melanoma"},  # duplicate distractors are read, and told by `medr1 data check`
        )
    )
    assert [record.answer for record in records] == ["B", "C", "B"]
    assert records[1].right_letters == ("B", "C")


def test_groups_file(tmp_path: Path) -> None:
    (record,) = load_records(omnimedvqa(tmp_path, groups=f"image_path,group\n{ROW['image_path']},lesion_17\n"))
    assert record.group == "lesion_17"


def test_groups_file_with_spaces(tmp_path: Path) -> None:
    root = omnimedvqa(tmp_path, {}, {"image_path": "Images/HAM10000/b.jpg"}, groups="image_path,group\n")
    lines = f"{ROW['image_path']},lesion_17 \n Images/HAM10000/b.jpg, lesion_17\n"
    (root / "groups.csv").write_text("image_path,group\n" + lines)
    records = load_records(root, check_images=False)
    assert [record.groups for record in records] == [("lesion_17",)] * 2


def test_hidden_files_are_none_of_the_data(tmp_path: Path) -> None:
    """macOS lays "._NAME" with a file's attributes beside it, on disks that are not its own."""
    root = omnimedvqa(tmp_path / "omni")
    (root / "QA_information" / "Open-access" / "._HAM10000.json").write_bytes(b"\0\5\x16\7")
    assert len(load_records(root)) == check_data(root)["records"] == 1
    split_file(tmp_path)
    (tmp_path / "._X-Ray_train.json").write_bytes(b"\0\5\x16\7")
    assert len(load_records(tmp_path, check_images=False)) == 1


def test_split_row(tmp_path: Path) -> None:
    (record,) = load_records(split_file(tmp_path), check_images=False)
    assert record.question == "What is it?"
    assert record.options == ("CT", "T3 N0, Stage III", "MRI")
    assert (record.id, record.source, record.modality) == ("X-Ray_train/1", "MIAS", "X-Ray")


def test_image_root_of_split_files(tmp_path: Path) -> None:
    file = split_file(tmp_path)
    assert "mdb084.png: no such image, wanted by record X-Ray_train/1" in error_of(file)
    image = tmp_path / "data" / SPLIT_ROW["image"]
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    (record,) = load_records(file, image_root=tmp_path / "data")
    assert record.images == (image,)


def test_an_unknown_source_in_a_question_type_file_has_no_modality(tmp_path: Path) -> None:
    file = split_file(tmp_path, {"image": "Images/Mine/a.png"}, name="Lesion Grading_test.json")
    (record,) = load_records(file, check_images=False)
    assert (record.modality, record.question_type) == (None, "Lesion Grading")


# -- bad input: one line that names file, row and remedy -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gt_answer": "Wart"}, "the answer 'Wart' is not among the options"),
        ({"gt_answer": None}, "'gt_answer' is missing"),
        ({"gt_answer": 3}, "'gt_answer' is not a text but 3"),
        ({"option_C": "Naevus"}, "duplicate options B and C both read as the answer, 'Naevus'"),
        ({"option_B": "NAEVUS", "option_C": "naevus"}, "duplicate options B and C both read as the answer"),
        (
            {"option_B": None, "option_C": "Naevus"},
            "option keys option_A, option_C are not A, B, …",
        ),
        ({"option_A": "Naevus", "option_B": None}, "1 options, expected 2 to 26"),
        ({"option_A": " "}, "'options' lacks a value before others"),
        ({"question": " "}, "the question is empty"),
        ({"modality_type": "Endoscopy"}, "unknown modality 'Endoscopy'"),
        ({"modality_type": None}, "'modality_type' is missing"),
        ({"question_type": "Prognosis"}, "unknown question type 'Prognosis'"),
        ({"question_id": "q0"}, "id 'q0' was used before"),
        ({"image_path": "/etc/passwd"}, "image path '/etc/passwd' leads out of the data folder"),
        ({"image_path": "../secret.png"}, "image path '../secret.png' leads out of the data folder"),
        (
            {"image_path": "Images/../../a.png"},
            "image path 'Images/../../a.png' leads out of the data folder",
        ),
        ({"image_path": "Images/x/../a.jpg"}, "image path 'Images/x/../a.jpg' leads out of the data folder"),
        ({"image_path": "a\0b"}, r"image path 'a\x00b' is not a file name"),
        ({"image_path": ""}, "image path '' is not a file name"),
        ({"question": "\ud800"}, "'utf-8' codec can't encode character"),
    ],
)
def test_bad_omnimedvqa_rows(tmp_path: Path, change: dict, reason: str) -> None:
    message = error_of(omnimedvqa(tmp_path, {}, change))
    assert f"HAM10000.json: row 2: {reason}" in message


def test_all_bad_rows_are_counted(tmp_path: Path) -> None:
    message = error_of(omnimedvqa(tmp_path, {}, {"gt_answer": "x"}, {}, {"question": None}))
    assert "row 2" in message
    assert message.endswith("(the first of 2 bad rows)")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"problem": "What is it?"}, "option letters (none) in 'problem'"),
        ({"problem": "What? A)x, C)y"}, "option letters A, C in 'problem' are not A, B, … in order"),
        ({"problem": "What? A)x, B)y, C)y"}, "duplicate options B and C"),
        ({"problem": "A)x, B)y"}, "the question is empty"),
        ({"solution": "B"}, "'solution' is 'B', expected '<answer> B </answer>'"),
        ({"solution": "<answer> D </answer>"}, "the answer 'D' is not among the options A, B, C"),
        ({"image": "a.png"}, "image path 'a.png' names no source"),
        ({"image": "../a/b.png"}, "image path '../a/b.png' leads out of the data folder"),
    ],
)
def test_bad_split_rows(tmp_path: Path, change: dict, reason: str) -> None:
    message = error_of(split_file(tmp_path, {}, change), check_images=False)
    assert f"X-Ray_train.json: row 2: {reason}" in message


def test_an_unknown_file_needs_a_known_source(tmp_path: Path) -> None:
    file = split_file(tmp_path, {"image": "Images/Mine/a.png"}, name="unknown_train.json")
    assert "row 1: the modality is unknown for source 'Mine'" in error_of(file, check_images=False)


def test_symbolic_links_out_of_the_folder(tmp_path: Path) -> None:
    root = omnimedvqa(tmp_path / "data", {}, {"image_path": "Images/HAM10000/link.jpg"})
    (tmp_path / "outside.jpg").write_bytes(b"x")
    os.symlink(tmp_path / "outside.jpg", root / "Images" / "HAM10000" / "link.jpg")
    assert "row 2: image path 'Images/HAM10000/link.jpg' leads out of the data folder" in error_of(root)


def test_a_linked_data_folder_is_fine(tmp_path: Path) -> None:
    root = omnimedvqa(tmp_path / "data")
    os.symlink(root, tmp_path / "link")
    assert len(load_records(tmp_path / "link")) == 1


def test_bad_files(tmp_path: Path) -> None:
    assert "nowhere: no such file or folder" in error_of(tmp_path / "nowhere")
    assert "no known layout. Looked for QA_information (OmniMedVQA), *_train.json" in error_of(tmp_path)
    file = tmp_path / "X-Ray_train.json"
    file.write_text('[\n{"image": 1},\n{"image" 2}]', encoding="utf-8")
    assert "X-Ray_train.json: line 3 is not JSON" in error_of(file)
    file.write_text("", encoding="utf-8")
    assert "the file is empty" in error_of(file)
    for text in ("[" * 100_000, "[1" + "0" * 5_000 + "]"):
        file.write_text(text, encoding="utf-8")
        assert "cannot be read as JSON" in error_of(file)
    file.write_text("{}", encoding="utf-8")
    assert "expected a list of questions, found a dict" in error_of(file)
    file.write_text("[]", encoding="utf-8")
    assert "no questions in it" in error_of(file)
    file.write_text("[[1]]", encoding="utf-8")
    assert "row 1: not an object but [1]" in error_of(file)
    file.write_bytes(b'["\xff"]')
    assert "not UTF-8 text" in error_of(file)
    assert "the name gives neither modality nor question type" in error_of(split_file(tmp_path, name="mine.json"))
    empty = tmp_path / "empty"
    (empty / "QA_information").mkdir(parents=True)
    assert "no QA_information/Open-access/*.json" in error_of(empty)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ("image,patient\na,b\n", "the first line must name the columns image_path and group"),
        ("image_path,group\nx\n", "line 2 lacks an image path or a group"),
        ("image_path,group\nx,NA\n", "line 2 lacks an image path or a group"),
        ("image_path,group\nx, None\n", "line 2 lacks an image path or a group"),
        ("image_path,group\na,1\na,2\n", "line 3 gives 'a' a second group"),
        ("image_path,group\na,1\n", f"image '{ROW['image_path']}' is not in"),
    ],
)
def test_bad_groups_file(tmp_path: Path, groups: str, reason: str) -> None:
    message = error_of(omnimedvqa(tmp_path, groups=groups))
    assert "groups.csv" in message
    assert reason in message


def test_missing_image(tmp_path: Path) -> None:
    root = omnimedvqa(tmp_path, {}, {"image_path": "Images/HAM10000/gone.jpg", "dataset": "Other"})
    assert "gone.jpg: no such image, wanted by record q1" in error_of(root)
    assert len(load_records(root, check_images=False)) == 2
    assert len(load_records(root, sources=["HAM10000"])) == 1  # only the kept records' images are wanted


def test_filters(tmp_path: Path) -> None:
    root = omnimedvqa(tmp_path, {}, {"modality_type": "ultrasound", "dataset": "BUSI"})
    assert [record.id for record in load_records(root, modalities=["US"])] == ["q1"]
    assert [record.id for record in load_records(root, sources=["BUSI"])] == ["q1"]
    assert "modality 'CT' is left; present: Dermoscopy, Ultrasound" in error_of(root, modalities=["US", "CT"])
    assert "source 'BUSI' is left; present: HAM10000" in error_of(root, modalities=["dermoscopy"], sources=["BUSI"])
    assert "unknown modality 'PET'" in error_of(root, modalities=["PET"])
    assert "unknown question type 'x'" in error_of(root, question_types=["x"])
    assert "the source filter is []" in error_of(root, sources=[])
    assert "the modality filter is 'CT'; give a list" in error_of(root, modalities="CT")
    assert "present: none (the files do not say)" in error_of(
        split_file(tmp_path), check_images=False, question_types=["Lesion Grading"]
    )
