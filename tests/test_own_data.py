"""One's own data: the documented format with all it takes and refuses, conversion there and back, and the page."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from medr1.cli import app
from medr1.data.datasets import load_records, num_refused
from medr1.data.datasets.convert import convert
from medr1.data.datasets.embedded import keep_image
from medr1.data.heldout import read_split
from medr1.data.images import load_image, resolve_inside
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import build_messages
from medr1.data.records import MODALITIES, QUESTION_TYPES, Record, read_jsonl
from medr1.data.splits import split_by_group
from medr1.errors import MedR1Error
from medr1.report.checks import check_data
from medr1.report.checks.page import tell
from medr1.report.show import write_samples

os.umask(UMASK := os.umask(0))
HEADER = "image,question,option_a,option_b,option_c,answer,modality,question_type,group,source\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path_factory.mktemp("cache")))


def pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(root / name)
    return root


def table(root: Path, text: str, name: str = "mine.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def load(path: Path, **arguments) -> tuple[list[Record], list[str]]:
    refused: list[str] = []
    return load_records(path, refused=refused, **arguments), refused


def error_of(path: Path, **arguments) -> str:
    with pytest.raises(MedR1Error) as error:
        load(path, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- what the format takes -----------------------------------------------------------------------------------


def test_a_csv_with_everything(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b 1.png")
    rows = (
        "a.png,Which?,Cyst,Tumour,,B,ct,disease_diagnosis,p1,Clinic\n"
        'a.png;b 1.png,"Two views, which?",Cyst,Tumour,Scar,scar,,,,\n'
        "b 1.png,Is it broken?,,,,Yes,X-Ray,,p2,\n"
    )
    for name, text in (
        ("mine.csv", HEADER + rows),
        ("mine.tsv", (HEADER + rows).replace('"Two views, which?"', "Two views; which?").replace(",", "\t")),
    ):
        first, second, third = load_records(table(tmp_path, text, name))
        assert (first.answer, first.options, first.modality) == ("B", ("Cyst", "Tumour"), "CT")
        assert (first.question_type, first.group, first.source) == ("Disease Diagnosis", "p1", "Clinic")
        assert (first.id, first.images, first.licence) == ("mine/1", (tmp_path / "a.png",), "follows the source")
        assert second.images == (tmp_path / "a.png", tmp_path / "b 1.png")
        assert (second.answer, second.modality, second.source) == ("C", None, "mine")
        assert second.group == load_records(table(tmp_path, "image,question,answer\na.png,q?,x\n", "o.csv"))[0].group
        assert (third.options, third.answer, third.is_yes_no, third.group) == ((), "Yes", True, "p2")


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("image,question,options,answer", "a.png,Which?,Cyst;Tumour,B"),
        ("image,question,options,answer", 'a.png,Which?,"[""Cyst"", ""Tumour""]",Tumour'),
        ("Image,Question,Option A,OPTION_B,Answer", "a.png,Which?,Cyst,Tumour,(B)"),
        ("image;question;option_a;option_b;answer", "a.png;Which?;Cyst;Tumour;b"),  # a spreadsheet's semicolons
        ("\ufeffimage,question,option_a,option_b,answer,note", "a.png,Which?,Cyst,Tumour,B),ignored"),
        ("images,question,option_a,option_b,answer", '"[""a.png""]",Which?, Cyst , Tumour ,B.'),
    ],
)
def test_ways_to_write_the_same(tmp_path: Path, header: str, row: str) -> None:
    pictures(tmp_path, "a.png")
    (record,) = load_records(table(tmp_path, f"{header}\r\n{row}\r\n"))
    assert (record.options, record.answer, record.images) == (("Cyst", "Tumour"), "B", (tmp_path / "a.png",))


def test_json_and_json_lines(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    rows = [
        {"image": ["a.png", "b.png"], "question": "Which?", "options": ["Cyst", 12], "answer": 12},
        {"image": "a.png", "question": "Is it?", "answer": True},
        {"image": [], "question": "No image?", "answer": "none", "alternatives": ["nothing"]},
    ]
    lines = "\n".join(map(json.dumps, rows))
    for name, text in (("own.json", json.dumps(rows)), ("own.jsonl", lines)):
        first, second, third = load_records(table(tmp_path, text, name))
        assert (first.options, first.answer, len(first.images)) == (("Cyst", "12"), "B", 2)
        assert (second.answer, second.is_yes_no) == ("yes", True)
        assert (third.images, third.alternatives, third.group) == ((), ("nothing",), "own/3")
    records, refused = load(table(tmp_path, lines + '\n{"image": \n', "own.jsonl"))
    assert len(records) == 3
    assert "own.jsonl: row 4: is not JSON" in refused[0]


def test_a_folder_with_tables_and_groups(tmp_path: Path) -> None:
    pictures(tmp_path, "Images/a.png", "Images/b.png")
    table(tmp_path, "image,question,answer\nImages/a.png,What?,heart\n", "first.csv")
    table(tmp_path, "image,question,answer\nImages/b.png,What?,lung\n", "second.csv")
    table(tmp_path, "name,age\nx,3\n", "people.csv")
    records = load_records(tmp_path)
    assert [record.id for record in records] == ["first/1", "second/1"]
    assert len({record.group for record in records}) == 2
    table(tmp_path, "image_path,group\nImages/a.png,patient\nImages/b.png,patient\n", "groups.csv")
    assert {record.group for record in load_records(tmp_path)} == {"patient"}
    (tmp_path / "first.csv").rename(tmp_path / "moved.csv")
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.move(tmp_path / "moved.csv", other / "first.csv")
    (record,) = load_records(other / "first.csv", image_root=tmp_path)
    assert record.images == (tmp_path / "Images" / "a.png",)


def test_a_copied_picture_is_one_group(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    shutil.copyfile(tmp_path / "a.png", tmp_path / "copy.png")
    text = "image,question,answer\na.png,What?,x\nb.png,What?,x\ncopy.png,What?,x\n"
    first, other, copy = load_records(table(tmp_path, text))
    assert first.group == copy.group != other.group


def test_a_record_dumped_is_a_row(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    record = Record(id="1", images=(Path("a.png"),), question="Which?", options=("x", "y"), answer="B", modality="CT",
                    question_type=None, source="s", group="g", licence="CC0")  # fmt: skip
    (again,) = load_records(table(tmp_path, record.model_dump_json() + "\n", "dump.jsonl"))
    assert again == record.model_copy(update={"images": (tmp_path / "a.png",)})


def test_a_name_with_a_semicolon(tmp_path: Path) -> None:
    pictures(tmp_path, "a;b.png")
    (record,) = load_records(table(tmp_path, 'image,question,answer\n"a;b.png",What?,x\n'))
    assert record.images == (tmp_path / "a;b.png",)


@pytest.mark.parametrize(
    ("header", "cells", "answer"),
    [
        ("A,B,C", "Cyst,Tumour,", "B"),
        ("a,b", "Cyst,Tumour", "tumour"),
        ("choice_a,choice_b", "Cyst,Tumour", "B"),
        ("Choice A,Choice B,Choice C", "Cyst,Tumour,", "(B)"),
        ("optionA,optionB", "Cyst,Tumour", "B"),
        ("opa,opb,opc", "Cyst,Tumour,", "b"),
        ("answer_a,answer_b", "Cyst,Tumour", "B"),
        ("option1,option2", "Cyst,Tumour", "2"),
        ("Option 2,Option 1", "Tumour,Cyst", "B"),
        ("1,2", "Cyst,Tumour", "2"),
        ("choices", "Cyst;Tumour", "B"),
        ("option", '"[""Cyst"", ""Tumour""]"', "Tumour"),
        ("option_a,option_b,choice,a,b", "Cyst,Tumour,x,y,z", "B"),  # beside the format's own they are notes
    ],
)
def test_option_columns_of_other_names(tmp_path: Path, header: str, cells: str, answer: str) -> None:
    """Unknown ones would be ignored, and the question open with "B" as its answer."""
    pictures(tmp_path, "a.png")
    text = f"index,image,question,{header},answer\n7,a.png,Which?,{cells},{answer}\n"
    for name, written in (("mine.csv", text), ("mine.json", None)):
        if written is None:
            (row,) = csv.DictReader(io.StringIO(text))
            written = json.dumps([{"image": "a.png", "question": "Open?", "answer": "x"}, row])
        record = load_records(table(tmp_path, written, name))[-1]
        assert (record.options, record.answer) == (("Cyst", "Tumour"), "B")
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("header", "cells", "reason"),
    [
        ("distractor_1,distractor_2", "x,y", "column 'distractor 1' looks like an option and is none of option_a"),
        ("option_text_a,option_text_b", "x,y", "column 'option text a' looks like an option"),
        ("opts", "x;y", "column 'opts' looks like an option"),
        ("option_0,option_1", "x,y", "option columns option 0, option 1 are not 1, 2, … without a gap"),
        ("A,B,C", "x,,y", "option columns a, c are not a, b, … without a gap"),
        ("A,B,choices", "x,y,x;y", "options stand in 'choices' and in 'a'; keep one"),
        ("option_1,option_2", "2,1", "the answer '2' is the number of one option and another's text; write the letter"),
        ("choice", "x", "the answer '2' is not among the options ['x']"),
    ],
)
def test_option_columns_that_cannot_be_told_are_refused(tmp_path: Path, header: str, cells: str, reason: str) -> None:
    pictures(tmp_path, "a.png")
    assert reason in error_of(table(tmp_path, f"image,question,{header},answer\na.png,Which?,{cells},2\n"))
    notes = "image,question,num_options,optional_note,x,y,answer\na.png,Which?,0,none,1,2,heart\n"
    (record,) = load_records(table(tmp_path, notes))
    assert record.is_open and record.answer == "heart"


def test_own_tables_with_columns_of_public_sets(tmp_path: Path) -> None:
    """A number a row beside A, B, … as GMAI-MMBench has it, and a label, which is MedXpertQA's answer."""
    pictures(tmp_path, "a.png", "b.png")
    file = table(tmp_path, "index,image,question,A,B,answer\n5,a.png;b.png,Which?,Cyst,Tumour,B\n")
    (record,) = load_records(file)
    assert (record.id, record.options, record.answer) == ("mine/1", ("Cyst", "Tumour"), "B")
    assert record.images == (tmp_path / "a.png", tmp_path / "b.png")
    labelled = "images,question,options,answer,label\na.png,Which?,Cyst;Tumour,B,malignant\n"
    (record,) = load_records(table(tmp_path, labelled))
    assert (record.options, record.answer, record.source) == (("Cyst", "Tumour"), "B", "mine")


def test_a_folders_name_gives_no_source_and_no_licence(tmp_path: Path) -> None:
    clinic = pictures(tmp_path / "vqa_rad_compare" / "vqa-rad", "a.png")
    (record,) = load_records(table(clinic, "image,question,answer\na.png,What?,x\n"))
    assert (record.source, record.licence) == ("mine", "follows the source")


# -- what it refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.png,Which?,Cyst,Tumour,,,,,,", "'answer' is missing"),
        ("a.png,Which?,Cyst,Tumour,,C,,,,", "the answer 'C' is not among the options"),
        ("a.png,Which?,Cyst,Tumour,,Wart,,,,", "the answer 'Wart' is not among the options"),
        ("a.png,Which?,Cyst,Cyst,,Cyst,,,,", "duplicate options A and B both read as the answer, 'Cyst'"),
        ("a.png,Which?,B,A,,B,,,,", "the answer 'B' is the letter of one option and the text of another; write (B)"),
        ("a.png,Which?,Cyst,,Scar,A,,,,", "option columns option a, option c are not a, b, … without a gap"),
        ("a.png,Which?,Cyst,,,A,,,,", "1 options, expected 2 to 26"),
        ("a.png,,Cyst,Tumour,,A,,,,", "'question' is missing"),
        (",Which?,Cyst,Tumour,,A,,,,", "'image' is missing; write [] where a question has no image"),
        ("../a.png,Which?,Cyst,Tumour,,A,,,,", "image path '../a.png' leads out of the data folder"),
        ("/a.png,Which?,Cyst,Tumour,,A,,,,", "image path '/a.png' leads out of the data folder"),
        ("a.png;,Which?,Cyst,Tumour,,A,,,,", "image path '' is not a file name"),
        ("[a.png],Which?,Cyst,Tumour,,A,,,,", "'image' begins like a JSON list and is none"),
        ("a.png,Which?,Cyst,Tumour,,A,PET,,,", "unknown modality 'PET', expected one of CT"),
        ("a.png,Which?,Cyst,Tumour,,A,,Prognosis,,", "unknown question type 'Prognosis'"),
        ("a.png,Which, then?,Cyst,Tumour,,A,,,,", "has more cells than there are columns; quote the text"),
    ],
)
def test_bad_rows_are_refused_one_by_one(tmp_path: Path, row: str, reason: str) -> None:
    pictures(tmp_path, "a.png")
    good = "a.png,Which?,Cyst,Tumour,,A,,,,\n"
    file = table(tmp_path, HEADER + good + row + "\n" + good)
    records, refused = load(file)
    assert [record.id for record in records] == ["mine/1", "mine/3"]
    (line,) = refused
    assert line.startswith(f"{file}: row 2: {reason}")
    with pytest.raises(MedR1Error, match=re.escape(reason)):  # who gives no list wants no bad row
        load_records(file)


def test_only_bad_rows_are_an_error(tmp_path: Path) -> None:
    file = table(tmp_path, HEADER + "a.png,Which?,Cyst,Tumour,,C,,,,\n" * 3)
    assert error_of(file).endswith("mine.csv: row 1: the answer 'C' is not among the options ['Cyst', 'Tumour'] "
                                   "(the first of 3 bad rows)")  # fmt: skip


def test_json_rows_of_the_wrong_kind(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    rows = [
        {"image": "a.png", "question": "q", "answer": "x"},
        {"image": 3, "question": "q", "answer": "x"},
        {"image": "a.png", "question": ["q"], "answer": "x"},
        {"image": "a.png", "question": "q", "answer": "x", "options": {"A": "x"}},
        {"image": "a.png", "question": "q", "answer": "A", "options": ["x", "y"], "option_a": "x"},
        {"image": "a.png", "images": ["a.png"], "question": "q", "answer": "x"},
        {"image": "a.png", "Image": "a.png", "question": "q", "answer": "x"},
        {"image": {"path": "a.png"}, "question": "q", "answer": "x"},
        {"image": "a.png", "question": "\ud800", "answer": "x"},
        ["a.png"],
    ]
    records, refused = load(table(tmp_path, json.dumps(rows), "own.json"))
    assert len(records) == 1
    reasons = ("'image' is neither a path nor a picture but 3", "'question' is not a text but ['q']",
               "'options' is neither a list nor a text", "options stand in 'options' and in 'option a'; keep one",
               "images stand in 'image' and in 'images'; keep one", "have the same name; rename one",
               "'image' is neither a path nor a picture", "can't encode character",
               "not an object but ['a.png']")  # fmt: skip
    for line, reason in zip(refused, reasons, strict=True):
        assert reason in line


def test_bad_tables(tmp_path: Path) -> None:
    assert "two columns are named 'answer'; rename one" in error_of(table(tmp_path, "image,question,answer,Answer\n"))
    assert "no questions in it" in error_of(table(tmp_path, "image,question,answer\n"))
    open_quote = table(tmp_path, 'image,question,answer\na.png,"What?,x\na.png,What?,x\n')
    assert "mine.csv: row 1 is no CSV" in error_of(open_quote)
    (tmp_path / "mine.csv").write_bytes(b"image,question,answer\na.png,caf\xe9?,x\n")
    assert "mine.csv: not UTF-8 text, near its first line; save it as UTF-8" in error_of(tmp_path / "mine.csv")
    unknown = error_of(table(tmp_path, "picture,text,label\na,b,c\n"))
    assert "no known layout" in unknown
    assert "your own (image or images, question, answer)" in unknown
    assert "Found mine.csv (columns label, picture, text)" in unknown
    (tmp_path / "mine.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read as Parquet" in error_of(tmp_path / "mine.parquet")
    assert "no known layout" in error_of(table(tmp_path, "x", "notes.txt"))


NEXT = "image,question,answer\nb.png,Where?,y\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("test.csv", "image,question,answer\nb.png,Où?,y\n".encode("cp1252"), "not UTF-8 text"),
        ("test.csv", b"image,question,awnser\nb.png,Where?,y\n", "has no column answer (columns awnser, image, quest"),
        ("test.csv", b"picture,question,answer\nb.png,Where?,y\n", "has no column image or images"),
        ("test.csv", b"image,question,answer,Answer\nb.png,Where?,y,y\n", "two columns are named 'answer'"),
        ("test.json", b'[{"image": "b.png", "question": "Where?", "answer": "y"},]', "a comma stands before a closing"),
        ("test.json", b'{"rows": [{"image": "b.png", "question": "Where?", "answer": "y"}]}', "expected a list of qu"),
        ("test.json", b'{"image": {"0": "b.png"}, "question": {"0": "Where?"}}', "expected a list of questions"),
        ("test.jsonl", b"", "the file is empty"),
        ("test.parquet", b"PAR1 no", "Parquet"),
        ("test.csv", gzip.compress(NEXT.encode(), mtime=0), "is packed by gzip"),
    ],
)
def test_a_table_beside_good_ones_that_cannot_be_read_is_told(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    pictures(tmp_path, "a.png", "b.png")
    table(tmp_path, "image,question,answer\na.png,What?,x\n", "train.csv")
    table(tmp_path, "image_path,left,top,right,bottom\na.png,0,0,2,2\n", "regions.csv")
    table(tmp_path, "image_path,group\na.png,p1\nb.png,p2\n", "groups.csv")
    table(tmp_path, "question,author\nWhat?,x\n", "authors.csv")
    table(tmp_path, '{"version": 1, "splits": [{"name": "train"}]}', "dataset_info.json")  # metadata are no defect
    (tmp_path / name).write_bytes(content)
    records, (line,) = load(tmp_path)
    assert len(records) == 1 and line.startswith(f"{tmp_path / name}: ") and says in line
    assert line.endswith("; the whole file is left out")
    with pytest.raises(MedR1Error, match=re.escape(says)):  # who gives no list wants no file left out
        load_records(tmp_path)
    told = dict(tell(check_data(tmp_path)))["bad"]
    assert "1 file left out, first" in told and name in told
    assert num_refused([line, "x.csv: row 2: no answer"], 1_998) == "1 file and 1 of 1,999 rows"


def test_tables_of_one_name_and_ids_that_begin_anew_in_each(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    for folder in ("A", "B"):
        (tmp_path / "two" / folder).mkdir(parents=True)
        table(
            tmp_path / "two" / folder, f"image,question,answer\na.png,{folder}?,x\nb.png,{folder}?,x\n", "questions.csv"
        )
    records, refused = load(tmp_path / "two", image_root=tmp_path)
    assert not refused and {record.source for record in records} == {"questions"}
    assert [record.id for record in records] == ["A/questions/1", "A/questions/2", "B/questions/1", "B/questions/2"]
    head = "id,image,question,answer\n"
    table(tmp_path, head + "1,a.png,What?,x\n2,b.png,What?,x\n3,b.png,Why?,x\n", "test.csv")
    table(tmp_path, head + "1,a.png,Where?,x\n2,b.png,What?,x\n4,b.png,How?,x\n", "train.csv")
    table(tmp_path, head + "1,a.png,Who?,x\n3,b.png,Who?,x\n3,b.png,Whose?,x\n", "validate.csv")
    records, refused = load(tmp_path)
    assert [record.id for record in records] == ["1", "2", "3", "train/1", "4", "validate/1"]
    # the same question in two files is one; an id that one file has twice is a mistake
    for line, place in zip(refused, ("train.csv: row 2", "validate.csv: row 2", "validate.csv: row 3"), strict=True):
        assert place in line and "was used before" in line


# -- values that are none, options with letters, files of other makes -----------------------------------------


def test_a_missing_value_names_nothing(shared: Path, tmp_path: Path) -> None:
    for record in load_records(shared / "findings" / "inputs" / "pandas-nan.json"):
        assert record.options == ("Naevus", "Melanoma") and record.group.startswith("file-")
    pictures(tmp_path, "a.png", "b.png")
    for nothing in ("nan", "NaN", "None", "<NA>", "null", "N/A", ""):
        rows = f"a.png,What?,x,y,{nothing if nothing not in ('None', 'N/A') else ''},B,{nothing},{nothing},{nothing}\n"
        header = "image,question,option_a,option_b,option_c,answer,group,modality,source\n"
        records, refused = load(table(tmp_path, header + rows + rows.replace("a.png", "b.png")))
        assert not refused and len({record.group for record in records}) == 2, nothing
        assert {(record.options, record.answer, record.modality, record.source) for record in records} == {
            (("x", "y"), "B", None, "mine")
        }
    bad = "image,question,answer\na.png,What?,nan\nnan,What?,x\na.png,<NA>,x\n"
    _, refused = load(table(tmp_path, bad + "a.png,What?,None\n"))
    assert [line.rsplit(": ")[-1].partition(" is missing")[0] for line in refused] == [
        "'answer'",
        "'image'",
        "'question'",
    ]


def test_none_is_an_option_and_an_answer(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    header = "image,question,option_a,option_b,option_c,answer\n"
    rows = [
        "Nodule,Mass,None,C",
        "Nodule,N/A,None,None",
        "None,Mass,Nodule,A",
        "Nodule,None of these,NA,c",
        "x,y,None,B",
    ]
    records, refused = load(table(tmp_path, header + "".join(f"a.png,What?,{row}\n" for row in rows)))
    assert not refused and [record.gold for record in records] == ["None", "None", "None", "NA", "y"]
    assert load(table(tmp_path, "image,question,answer\na.png,What?,None\n"))[0][0].answer == "None"
    several = {"image": "a.png", "question": "q", "answer": "B", "options": ["x", "y", "None", "None"]}
    inner = several | {"options": ["x", float("nan"), "y"]}
    (record,), refused = load(table(tmp_path, json.dumps([several, inner]), "own.json"))
    assert record.options == ("x", "y") and "'options' lacks a value before others" in refused[0]
    gap = table(tmp_path, header + "a.png,What?,x,nan,y,A\na.png,What?,x,y,nan,A\n")
    assert "are not a, b, … without a gap" in load(gap)[1][0]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ("A. Naevus|B. Melanoma", "Naevus|Melanoma"),
        ("A) Naevus|B) Melanoma|C) Wart", "Naevus|Melanoma|Wart"),
        ("(A) Naevus|(B) Melanoma", "Naevus|Melanoma"),
        ("[a] Naevus|[b] Melanoma", "Naevus|Melanoma"),
        ("A: Naevus|B: Melanoma", "Naevus|Melanoma"),
        ("A.Naevus|B.Melanoma", "Naevus|Melanoma"),
        ("A - Naevus|B - Melanoma", "Naevus|Melanoma"),
        ("1. Naevus|2. Melanoma", "Naevus|Melanoma"),
        ("(1) Naevus|(2) Melanoma", "Naevus|Melanoma"),
        ("B. Naevus|A. Melanoma", "Naevus|Melanoma"),
        ("A-mode|B-mode", None),
        ("1.5 cm|2.5 cm", None),
        ("1:30|2:30", None),
        ("A|B", None),
        ("A. fumigatus|C. albicans", None),
        ("A. fumigatus|B. dermatitidis", None),
        ("B. fragilis|A. baumannii|C. difficile", None),
        ("A. lumbricoides|B. malayi|C. parvum hominis", None),
        ("A. naevus|B. melanoma", "naevus|melanoma"),
        ("a. naevus|b. melanoma", "naevus|melanoma"),
        ("A) fumigatus|B) dermatitidis", "fumigatus|dermatitidis"),
        ("a. fumigatus|b. dermatitidis", "fumigatus|dermatitidis"),
        ("A. Aspergillus fumigatus|B. Candida albicans", "Aspergillus fumigatus|Candida albicans"),
        ("A. A. fumigatus|B. B. dermatitidis", "A. fumigatus|B. dermatitidis"),
        ("A、痣|B、黑色素瘤", "痣|黑色素瘤"),
        ("Ａ．Naevus|Ｂ．Melanoma", "Naevus|Melanoma"),
        ("（A）Naevus|（B）Melanoma", "Naevus|Melanoma"),
        ("A – Naevus|B – Melanoma", "Naevus|Melanoma"),
        ("A] Naevus|B] Melanoma", "Naevus|Melanoma"),
        ("Option A: Naevus|Option B: Melanoma", "Naevus|Melanoma"),
        ("Option A|Option B", None),
        ("1、Naevus|2、Melanoma", "Naevus|Melanoma"),
        ("A. Naevus|Melanoma", None),
        ("A. Naevus|A. Melanoma", None),
        ("B. Naevus|C. Melanoma", None),
        ("I. Naevus|II. Melanoma", None),
    ],
)
def test_letters_of_the_options_own_are_taken_off(tmp_path: Path, options: str, plain: str | None) -> None:
    """As columns and as a list; the answer is a letter, a text, or both, and the prompt has one letter an option."""
    pictures(tmp_path, "a.png")
    given, texts = options.split("|"), (plain or options).split("|")
    in_order = plain and not options.startswith("B.")
    answers = [given[1], texts[1], *(["B", "(B)", "b"] if in_order or not plain else [])]
    answers += [f"B. {texts[1]}", f"B) {texts[1]}"] if in_order else []
    for answer in answers:
        row = {"image": "a.png", "question": "What?", "answer": answer}
        columns = {f"option_{letter}": text for letter, text in zip("abc", given, strict=False)}
        for cells in ({"options": given}, columns):
            (record,), _ = load(table(tmp_path, json.dumps([row | cells]), "own.json"))
            assert record.options == tuple(texts) and record.gold == texts[1], answer
            lines = build_messages(record, "no-think")[0]["content"][-1]["text"].split("\n")
            assert lines[1:3] == [f"A) {texts[0]}", f"B) {texts[1]}"]
    if plain and not in_order:
        for letter in "AB":
            _, (line,) = load(
                table(tmp_path, json.dumps([{**row, "options": given, "answer": letter}, row | cells]), "own.json")
            )
            assert "the options' own letters are B, A" in line


def test_numbers_that_are_none_and_images_that_are_no_files(tmp_path: Path) -> None:
    """JSON of Python's holds Infinity; each is one line with its field, and no text called "inf"."""
    pictures(tmp_path, "a.png")
    row = {"image": "a.png", "question": "What?", "options": ["x", "y"], "answer": "A"}
    infinite = float("inf")
    for name, value, words in (
        ("options", ["x", infinite], "'options' is inf"),
        ("answer", -infinite, "'answer' is -inf"),
        ("group", infinite, "'group' is inf"),
        ("id", infinite, "'id' is inf"),
        ("options", [None, float("nan")], "'options' lists no value"),
        ("options", {"A": "x"}, "neither a list nor a text but {'A': 'x'}; write a list"),
        ("options", "['x', 'y']", "write it with json.dumps"),
        ("image", "https://example.org/a.png", "begins with https: and names no file"),
        ("image", "data:image/png;base64,AAAA", "begins with data: and names no file"),
        ("image", {"path": None, "bytes": None}, "neither a path nor a picture"),
    ):
        records, (line,) = load(table(tmp_path, json.dumps([row | {name: value}, row]), "own.json"))
        assert len(records) == 1 and "row 1: " in line and words in line, name
    unloaded = row | {"image": {"path": "a.png", "bytes": None}}  # as datasets gives an image that it did not decode
    (record,), refused = load(table(tmp_path, json.dumps([unloaded]), "own.json"))
    assert record.images == (tmp_path / "a.png",) and not refused


def test_a_patient_of_pandas_floats_is_one(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"image": name, "question": "What?", "answer": "x"} for name in ("a.png", "b.png", "c.png")]
    groups = [{"group": 12}, {"group": 12.0}, {"group": "12.0"}]
    records, refused = load(
        table(tmp_path, json.dumps([row | group for row, group in zip(rows, groups, strict=True)]), "own.json")
    )
    assert {record.group for record in records} == {"12"} and not refused


def test_an_answer_with_another_options_letter_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    row = {"image": "a.png", "question": "What?", "options": ["A. x", "B. y"], "answer": "A. y"}
    numbered = row | {"options": ["1. 2", "2. 3"], "answer": "1. 3"}
    right = row | {"options": ["1. x", "2. y"], "answer": "2"}
    (record,), refused = load(table(tmp_path, json.dumps([row, numbered, right]), "own.json"))
    assert record.gold == "y" and all(
        "has the letter of one option and the text of another" in line for line in refused
    )


def test_own_numbers_in_another_order_are_told_as_letters_are(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    row = {"image": "a.png", "question": "What?", "options": ["2. Melanoma", "1. Naevus"]}
    rows = [row | {"answer": answer} for answer in ("2", "(2)", 2, "Melanoma", "1. Naevus")]
    records, refused = load(table(tmp_path, json.dumps(rows), "own.json"))
    assert [record.gold for record in records] == ["Melanoma", "Naevus"]
    assert len(refused) == 3 and all("write its text" in line for line in refused)


def test_letters_in_the_layouts_of_public_sets(tmp_path: Path) -> None:
    pictures(tmp_path, "Images/X/a.png", "images/a.png")
    omni = {"dataset": "X", "question_id": "1", "question_type": "Disease Diagnosis", "question": "What?",
            "gt_answer": "B. y", "image_path": "Images/X/a.png", "option_A": "A. x", "option_B": "B. y",
            "option_C": float("nan"), "modality_type": "CT"}  # fmt: skip
    folder = tmp_path / "QA_information" / "Open-access"
    folder.mkdir(parents=True)
    for answer in ("B. y", "y"):
        (folder / "X.json").write_text(json.dumps([omni | {"gt_answer": answer}]))
        (record,) = load_records(tmp_path)
        assert record.options == ("x", "y") and record.answer == "B"
    shutil.rmtree(folder.parent)
    row = {"image": "Images/X/a.png", "problem": "What? A)A. x, B)B. y", "solution": "<answer>B</answer>"}
    (tmp_path / "CT_train.json").write_text(json.dumps([row]))
    (record,) = load_records(tmp_path)
    assert record.options == ("x", "y") and record.answer == "B"
    (tmp_path / "CT_train.json").unlink()
    expert = {
        "id": "1",
        "question": "What?",
        "options": {"A": "(A) x", "B": "(B) y", "C": None},
        "label": "B",
        "images": ["a.png"],
    }
    (tmp_path / "mm.jsonl").write_text(json.dumps(expert))
    (record,) = load_records(tmp_path)
    assert record.options == ("x", "y") and record.answer == "B"


GOOD = [{"image": "a.png", "question": f"What {number}?", "answer": "x"} for number in range(2)]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + json.dumps(GOOD),
        "\r\n".join(map(json.dumps, GOOD)) + "\r\n",
        "\n\n".join(map(json.dumps, GOOD)),
        json.dumps(GOOD, indent=2),
        json.dumps(GOOD).encode("utf-16"),
    ],
)
@pytest.mark.parametrize("name", ["own.json", "own.jsonl"])
def test_json_however_it_was_written(tmp_path: Path, content: str | bytes, name: str) -> None:
    """A list in a file of lines, lines in a file of a list, marks, line ends and UTF-16 with a mark."""
    pictures(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [record.question for record in load_records(tmp_path / name)] == ["What 0?", "What 1?"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_however_it_was_written(tmp_path: Path, delimiter: str, encoding: str, end: str) -> None:
    pictures(tmp_path, "a.png")
    lines = [["", "image", "question", "answer"], ["0", "a.png", "Größe?", "x"]]
    (tmp_path / "own.csv").write_bytes(end.join(delimiter.join(line) for line in lines).encode(encoding))
    assert [record.question for record in load_records(tmp_path / "own.csv")] == ["Größe?"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "".join(json.dumps(row) + ",\n" for row in GOOD), "line 1 is not JSON (a comma follows the object"),
        ("a.json", "".join(json.dumps(row) + ",\n" for row in GOOD), "line 1 is not JSON (a comma follows the object"),
        ("a.jsonl", "\n\n" + str(GOOD[0]), "line 3 is not JSON (single quotes"),
        ("a.json", str(GOOD), "line 1 is not JSON (single quotes"),
        ("a.json", '[{"image": None}]', "None is Python's"),
        ("a.json", json.dumps(GOOD, indent=1)[:-2] + ",\n]", "a comma stands before a closing bracket"),
        ("a.json", '[{"image": "a.png",}]', "a comma stands before a closing bracket"),
        ("a.json", "", "the file is empty"),
        ("a.jsonl", "", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.parquet", "", "the file is empty"),
        ("a.csv", gzip.compress(b"image,question,answer\n", mtime=0), "is packed by gzip; unpack it first"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is packed by gzip; unpack it first"),
        ("a.csv", b"PK\3\4 a sheet", "a zip archive or a spreadsheet"),
        ("a.csv", "image,question,answer\n".encode("utf-16-le"), "holds NUL bytes"),
        ("a.json", json.dumps(GOOD).encode("utf-16-be"), "holds NUL bytes"),
        ("a.csv", "image,question,answer,\na.png,What?,x,y,z\n", "has more cells than there are columns"),
    ],
)
def test_a_file_that_is_no_table_is_one_line_with_its_cause(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(MedR1Error) as error:
            load_records(path)
        assert says in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_trailing_commas_of_the_report(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=r"trailing-commas\.jsonl: line 1 is not JSON .a comma follows the object"):
        load_records(shared / "findings" / "inputs" / "trailing-commas.jsonl")
    pictures(tmp_path, "a.png")
    mixed = json.dumps(GOOD[0]) + "\n\n" + json.dumps(GOOD[1]) + ",\n"
    _, (line,) = load(table(tmp_path, mixed, "own.jsonl"))
    assert "own.jsonl: row 2: is not JSON (line 3: a comma follows the object" in line


# -- conversion ----------------------------------------------------------------------------------------------

words = (
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
    .map(str.strip)
    .filter(bool)
)
names = st.sampled_from(["a.png", "b.JPG", "c d.nii.gz", "e;f.png", "[g].png", "h#1.png", "x/i"])


@st.composite
def record_lists(draw: st.DrawFn) -> list[Record]:
    records = []
    for number in range(draw(st.integers(1, 4))):
        options = (
            tuple(draw(st.lists(words, min_size=2, max_size=5, unique_by=str.casefold))) if draw(st.booleans()) else ()
        )
        records.append(
            Record(
                id=f"{draw(words)}{number}",
                images=tuple(map(Path, draw(st.lists(names, max_size=3)))),
                question=draw(words),
                options=options,
                answer=draw(st.sampled_from("ABCDE"[: len(options)])) if options else draw(words),
                modality=draw(st.sampled_from([None, *MODALITIES])),
                question_type=draw(st.sampled_from([None, *QUESTION_TYPES])),
                source=draw(words),
                group=draw(words),
                licence=draw(words),
                alternatives=() if options else tuple(draw(st.lists(words, max_size=2))),
            )
        )
    return records


@settings(max_examples=60)
@given(record_lists(), st.sampled_from(["csv", "jsonl", "omnimedvqa"]))
def test_round_trip(records: list[Record], to: str) -> None:
    """What is written reads back as the same records, picture by picture; what is not written is told."""
    with tempfile.TemporaryDirectory() as name:
        root, out = Path(name) / "in", Path(name) / "out"
        for number, image in enumerate(sorted({image for record in records for image in record.images})):
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            (root / image).write_bytes(bytes([number]) * 9)
        given_records = [
            record.model_copy(update={"images": tuple(root / image for image in record.images)}) for record in records
        ]
        try:
            result = convert(given_records, to, out)
        except MedR1Error as error:
            assert f"none of {len(records)} records can be written so" in str(error)
            return
        again = {record.id: record for record in load_records(out)}
        left_out = {line.partition(": ")[0].removeprefix("record ") for line in result["refused"]}
        assert len(again) == result["records"] == len(records) - len(result["refused"])
        lost = {"licence", "groups"} if to == "omnimedvqa" else set()
        for record in given_records:
            if record.id in left_out and record.id not in again:
                continue
            other = again[record.id]
            assert other.model_dump(exclude={"images", *lost}) == record.model_dump(exclude={"images", *lost})
            assert [p.read_bytes() for p in other.images] == [p.read_bytes() for p in record.images]
            assert all(path.is_relative_to(out) for path in other.images)


def test_conversion_of_an_omnimedvqa_folder_there_and_back(tmp_path: Path) -> None:
    root = write_phantoms(tmp_path / "phantoms", num_images=8, seed=0)
    first = load_records(root)
    convert(first, "csv", tmp_path / "csv")
    convert(load_records(tmp_path / "csv"), "jsonl", tmp_path / "jsonl")
    result = convert(load_records(tmp_path / "jsonl"), "omnimedvqa", tmp_path / "back")
    assert (result["records"], result["images"], result["refused"]) == (40, 8, [])
    back = {record.id: record for record in load_records(tmp_path / "back")}
    for record in first:
        other = back[record.id]
        lost = {"images", "groups"}  # OmniMedVQA's groups.csv cannot say that a group is no more than a path
        assert other.model_dump(exclude=lost) == record.model_dump(exclude=lost)
        assert other.images[0].read_bytes() == record.images[0].read_bytes()


def held_out(records: Sequence[Record]) -> set[str]:
    return {record.id for record in split_by_group(records, 0.3, 0)[1]}


def test_a_conversion_holds_out_the_same_questions(tmp_path: Path) -> None:
    """Also where some images have groups and others none, which groups.csv then has to name too."""
    root = write_phantoms(tmp_path / "phantoms", num_images=40, seed=0)
    pictures(tmp_path / "mixed", *(f"{number}.png" for number in range(30)))
    rows = [f"{n}.png,Which?,Cyst,Tumour,,B,CT,Disease Diagnosis,{f'p{n // 2}' if n < 12 else ''},s" for n in range(30)]
    table(tmp_path / "mixed", HEADER + "\n".join(rows) + "\n")
    for data in (root, tmp_path / "mixed"):
        first = load_records(data)
        for to in ("omnimedvqa", "csv", "jsonl"):
            out = tmp_path / f"{data.name}-{to}"
            assert not convert(first, to, out)["refused"]
            assert held_out(load_records(out)) == held_out(first)
    assert not (tmp_path / "phantoms-omnimedvqa" / "groups.csv").exists()


def test_a_converted_image_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who blackens names in the copy leaves the original alone, and others may read it."""
    pictures(tmp_path, "a.png")
    kept_one = keep_image((tmp_path / "a.png").read_bytes())
    assert kept_one.stat().st_mode & 0o777 == 0o666 & ~UMASK
    records = load_records(table(tmp_path, "image,question,answer\na.png,What?,x\n"))
    records += [records[0].model_copy(update={"id": "2", "images": (kept_one,)})]
    convert(records, "csv", tmp_path / "out")
    for record, original in zip(load_records(tmp_path / "out"), (tmp_path / "a.png", kept_one), strict=True):
        record.images[0].write_bytes(b"black")
        assert original.read_bytes() != b"black"


def test_what_a_layout_cannot_hold_is_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    rows = [
        "a.png,Which?,Cyst,Tumour,,B,CT,Disease Diagnosis,p1,s",
        "a.png;b.png,Which?,Cyst,Tumour,,B,CT,Disease Diagnosis,p1,s",
        "a.png,Which?,,,,Cyst,CT,Disease Diagnosis,p1,s",
        "a.png,Which?,Cyst,Tumour,,B,,Disease Diagnosis,p1,s",
        "a.png,Which?,Cyst,Tumour,,B,CT,,p1,s",
        "a.png,Which?,Cyst,Tumour,,B,CT,Disease Diagnosis,p2,s",
    ]
    records = load_records(table(tmp_path, HEADER + "\n".join(rows) + "\n"))
    result = convert(records, "omnimedvqa", tmp_path / "out")
    assert result["records"] == 1
    reasons = ("it has 2 images", "an open question has no options", "it states no modality",
               "it states no question type", "its image has the group 'p1' too")  # fmt: skip
    for number, (line, reason) in enumerate(zip(result["refused"], reasons, strict=True), start=2):
        assert line.startswith(f"record mine/{number}: ")
        assert reason in line
    with pytest.raises(MedR1Error, match="holds something already; name a new folder"):
        convert(records, "csv", tmp_path / "out")
    with pytest.raises(MedR1Error, match="--to xml: choose omnimedvqa, csv, jsonl"):
        convert(records, "xml", tmp_path / "other")
    with pytest.raises(MedR1Error, match="none of 1 records can be written so; first record mine/2: it has 2 images"):
        convert(records[1:2], "omnimedvqa", tmp_path / "other")
    (tmp_path / "b.png").unlink()
    with pytest.raises(MedR1Error, match=r"b\.png: no such image, wanted by record mine/2"):
        convert(records, "csv", tmp_path / "other")


def test_a_conversion_that_breaks_off_can_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there already stood in its way, and Ctrl-C says that the same command goes on."""
    pictures(tmp_path, "a.png", "b.png")
    rows = [f"{name}.png,Which?,Cyst,Tumour,,B,CT,Disease Diagnosis,p1,s" for name in "ab"]
    records = load_records(table(tmp_path, HEADER + "\n".join(rows) + "\n"))
    copyfile = shutil.copyfile
    for fault in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def copy(source: Path, target: Path, fault: BaseException = fault) -> None:
            copyfile(source, target)
            if target.name.startswith("000002"):
                raise fault

        monkeypatch.setattr(shutil, "copyfile", copy)
        with pytest.raises((MedR1Error, KeyboardInterrupt)) as raised:
            convert(records, "csv", tmp_path / "out")
        assert isinstance(raised.value, KeyboardInterrupt) or "out: cannot be written (No space" in str(raised.value)
        assert not any((tmp_path / "out").iterdir())
    monkeypatch.undo()
    assert convert(records, "csv", tmp_path / "out")["records"] == 2


# -- check, show, command line -------------------------------------------------------------------------------


def mixed(root: Path) -> Path:
    pictures(root, *(f"{letter}.png" for letter in "abcdef"))
    rows = [f"{letter}.png,Which?,Cyst,Tumour,,{'AB'[i % 2]},CT,,g{i},s" for i, letter in enumerate("abcdef")]
    rows += ["a.png;b.png,Is <b>it</b> broken?,,,,yes,X-Ray,,g0,s", "c.png,Where is it?,,,,left lung,CT,,g2,s",
             "a.png,Which?,Cyst,Tumour,,E,CT,,g0,s"]  # fmt: skip
    return table(root, HEADER + "\n".join(rows) + "\n")


def test_check_lists_refused_rows_and_open_questions(tmp_path: Path) -> None:
    file = mixed(tmp_path)
    report = check_data(file)
    assert (report["records"], report["open"], report["chance"]) == (8, 2, 0.5)
    assert report["refused"] == {
        "num": 1,
        "said": "1 of 9 rows",
        "listed": [f"{file}: row 9: the answer 'E' is not among the options ['Cyst', 'Tumour']"],
    }
    assert report["counts"]["num_options"] == {"2": 6, "open": 2}
    assert report["answers"]["open, yes or no"]["chance"] == 0.5
    assert report["answers"]["open, a text"]["chance"] is None
    runner = CliRunner()
    done = runner.invoke(app, ["data", "check", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "left out" in done.output
    assert "row 9: the answer" in (tmp_path / "out" / "check.html").read_text()
    only_open = table(tmp_path, "image,question,answer\na.png,What?,x\nb.png,Is it?,no\n", "open.csv")
    done = runner.invoke(app, ["data", "check", str(only_open), "--out", str(tmp_path / "open")])
    assert done.exit_code == 0, done.output


def test_page_of_samples(tmp_path: Path) -> None:
    file = mixed(tmp_path)
    records, refused = load(file)
    result = write_samples(records, tmp_path / "page.html", name="mine", num=20, refused=refused)
    assert result == {"page": str(tmp_path / "page.html"), "records": 8, "shown": 8, "lost_images": 0}
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article") == 8 and page.count("data:image/webp") == 9
    assert page.count('class="gold"') == 8
    assert "&lt;b&gt;it&lt;/b&gt;" in page and "<b>it</b>" not in page
    assert "1 of 9 rows left out" in page and "Research use only" in page
    assert "http://" not in page and "https://" not in page
    (tmp_path / "a.png").unlink()
    again = write_samples(records, tmp_path / "page.html", name="mine", num=3, seed=1)
    assert again["shown"] == 3
    same = write_samples(list(records), tmp_path / "other.html", name="mine", num=3, seed=1)
    assert (tmp_path / "other.html").read_text() == (tmp_path / "page.html").read_text() and same["shown"] == 3


def test_show_and_convert_from_the_command_line(tmp_path: Path) -> None:
    file, runner = mixed(tmp_path), CliRunner()
    done = runner.invoke(app, ["data", "show", str(file), "--out", str(tmp_path / "p.html"), "--n", "2", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout.splitlines()[-1])["shown"] == 2
    done = runner.invoke(app, ["data", "convert", str(file), "--to", "jsonl", "--out", str(tmp_path / "o"), "--json"])
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["records"], len(result["refused"])) == (8, 1)
    assert len(load_records(tmp_path / "o")) == 8


def test_training_and_evaluation_on_ones_own_csv(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two GRPO steps and an evaluation of multiple choice, open questions and an item with two images."""
    file, runner = mixed(tmp_path), CliRunner()
    sizes = ["rollout.num_completions=2", "rollout.max_new_tokens=4", "optimizer.prompts_per_step=3",
             "data.test_fraction=0.4", "grpo.rewards={accuracy=1.0, token_f1=0.5}", "grpo.beta=0.0"]  # fmt: skip
    options = [part for size in sizes for part in ("--set", size)]
    done = runner.invoke(app, ["train", "--data", str(file), "--model", "tiny", "--mode", "no-think", "--steps", "2",
                               "--out", str(tmp_path / "run"), *options])  # fmt: skip
    assert done.exit_code == 0, done.output
    told = capfd.readouterr().err
    assert "1 of 9 rows left out, first" in told.replace("\n", "") + done.output.replace("\n", "")
    replies = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert len(replies) == 2 * 3 * 2
    done = runner.invoke(app, ["eval", "--data", str(file), "--model", str(tmp_path / "run" / "model"), "--part", "all",
                               "--mode", "no-think", "--max-new-tokens", "4", "--out", str(tmp_path / "r.jsonl"),
                               "--json"])  # fmt: skip
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    list_of_run = read_split(tmp_path / "run")
    assert list_of_run is not None
    known = summary["trained_on"]  # what the run trained on stands apart
    assert (summary["n"] + known["n"], summary["open"]["n"] + known["open"]["n"]) == (6, 2)
    assert known["n"] + known["open"]["n"] == len([*list_of_run.questions("trained_on")]) > 0
    assert f"open questions, n = {summary['open']['n']}" in done.stdout


def test_slices_of_a_volume_are_several_images_of_one_group(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    voxels = np.arange(16 * 16 * 9, dtype=np.int16).reshape(16, 16, 9)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "vol.nii.gz")
    text = (
        "image,question,answer\nvol.nii.gz#slices=3,What?,x\nvol.nii.gz#slice=2,What?,x\nvol.nii.gz#slices=99,What?,x\n"
    )
    records, refused = load(table(tmp_path, text))
    several, one = records
    assert len(several.images) == 3 and len(set(several.images)) == 3
    assert all(load_image(image).size == (16, 16) for image in several.images)
    assert one.images == (tmp_path / "vol.nii.gz#slice=2",)
    assert several.group == one.group
    assert len(refused) == 1 and "row 3" in refused[0] and "vol.nii.gz" in refused[0]
    assert convert(records, "csv", tmp_path / "out")["images"] == 1
    again = load_records(tmp_path / "out")
    for record, other in zip(records, again, strict=True):
        pixels = [[load_image(image).tobytes() for image in item.images] for item in (record, other)]
        assert pixels[0] == pixels[1]


def test_many_questions_about_few_images_take_the_paths_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is resolved once, and records that say the same hold the same objects: counted, at two sizes."""
    resolved: list[str] = []

    def counted(root: Path, name: str) -> Path:
        resolved.append(name)
        return resolve_inside(root, name)

    monkeypatch.setattr("medr1.data.datasets.rows.resolve_inside", counted)
    for count in (40, 80):
        resolved.clear()
        lines = [
            {"image": f"{n % 4}.png", "question": f"What is {n}?", "options": ["Naevus", "Melanoma"], "answer": "B"}
            for n in range(count)
        ]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        records = load_records(tmp_path, check_images=False)
        assert len(records) == count and len(resolved) == 4
        for name, different in (("images", 4), ("options", 1), ("group", 4), ("source", 1), ("alternatives", 1)):
            assert len({id(getattr(record, name)) for record in records}) == different, name
