"""Each public set in its own layout and field names, with every trap that is known of it, and the hub."""

import base64
import csv
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from medr1.data.datasets import load_records
from medr1.data.records import Record
from medr1.data.splits import split_by_group
from medr1.errors import MedR1Error
from medr1.report.checks import check_data


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEDR1_CACHE", str(folder))
    return folder


def png(grey: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def put(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, rows: list[dict], lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path | str, **arguments) -> tuple[list[Record], list[str]]:
    refused: list[str] = []
    return load_records(path, refused=refused, **arguments), refused


# -- VQA-RAD -------------------------------------------------------------------------------------------------

VQA_RAD = {
    "qid": "1",
    "phrase_type": "freeform",
    "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
    "image_case_url": "https://medpix.nlm.nih.gov/case?id=1",
    "image_name": "synpic1.jpg",
    "image_organ": "HEAD",
    "question": "Are regions of the brain infarcted?",
    "question_type": "PRES",
    "answer": "Yes ",
    "answer_type": "CLOSED",
}


def test_vqa_rad(tmp_path: Path) -> None:
    put(tmp_path, "VQA_RAD Image Folder/synpic1.jpg", "VQA_RAD Image Folder/synpic2.jpg")
    write_json(
        tmp_path / "VQA_RAD Dataset Public.json",
        [
            VQA_RAD,
            VQA_RAD | {"question": "How many nodules?", "answer": 3, "answer_type": "OPEN"},  # a number
            VQA_RAD | {"image_name": "synpic2.jpg", "image_case_url": "NULL", "answer": "in the left lobe"},
            VQA_RAD | {"answer": ""},
        ],
    )
    records, refused = load(tmp_path)
    assert [record.answer for record in records] == ["Yes", "3", "in the left lobe"]
    assert [record.is_yes_no for record in records] == [True, False, False]
    assert all(record.is_open and record.modality is None for record in records)
    assert records[0].images == (tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg",)
    assert [record.group for record in records] == [VQA_RAD["image_case_url"]] * 2 + ["synpic2.jpg"]
    assert refused == [f"{tmp_path / 'VQA_RAD Dataset Public.json'}: row 4: 'answer' is missing"]


def test_republished_parquet_shares_images_between_its_parts_and_ours_does_not(tmp_path: Path, cache: Path) -> None:
    """VQA-RAD and PathVQA of the hub: images inside the rows, the same one in train and in test."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def shard(name: str, rows: list[tuple[int, str, str]]) -> None:
        path = tmp_path / "vqa-rad" / "data" / f"{name}-00000-of-00001-eb8844602202be60.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [{"image": {"bytes": png(grey), "path": None}, "question": q, "answer": a} for grey, q, a in rows]
        parquet.write_table(arrow.Table.from_pylist(cells), path)

    shard("train", [(0, "is it large?", "yes"), (1, "where is it?", "left lung"), (1, "is it large?", "no")])
    shard("test", [(0, "is it broken?", "no"), (2, "what is it?", "heart")])
    records, refused = load(tmp_path / "vqa-rad")
    assert not refused
    assert [record.id for record in records][:2] == [f"test-00000-of-00001-eb8844602202be60/{n}" for n in (1, 2)]
    assert {(record.source, record.licence) for record in records} == {("VQA-RAD", "CC0-1.0")}
    assert len({record.images for record in records}) == len({record.group for record in records}) == 3
    assert all(record.images[0].is_relative_to(cache) for record in records)
    assert records[0].images[0].read_bytes() == png(0)
    (published, own) = check_data(tmp_path / "vqa-rad")["parts"]
    assert (published["name"], published["train"], published["test"]) == ("the published split", 3, 2)
    assert published["image_in_train"] == 1
    assert own["image_in_train"] == own["copy_in_train"] == 0
    train, test = split_by_group(records, 0.3, 0)
    assert not {record.images for record in train} & {record.images for record in test}


# -- SLAKE ---------------------------------------------------------------------------------------------------

SLAKE = {
    "img_id": 1,
    "img_name": "xmlab1/source.jpg",
    "question": "What modality is used to take this image?",
    "answer": "MRI",
    "q_lang": "en",
    "location": "Abdomen",
    "modality": "MRI",
    "answer_type": "OPEN",
    "base_type": "vqa",
    "content_type": "Modality",
    "triple": ["vhead", "_", "_"],
    "qid": 0,
}


def test_slake(tmp_path: Path) -> None:
    put(tmp_path, "imgs/xmlab1/source.jpg")
    write_json(
        tmp_path / "train.json",
        [
            SLAKE,
            SLAKE | {"q_lang": "zh", "question": "这张图片的成像方式是什么？", "answer": "核磁共振"},
            SLAKE
            | {"answer_type": "CLOSED", "question": "Is it healthy?", "answer": "No", "content_type": "Abnormality"},
            # CLOSED, and not yes or no
            SLAKE | {"answer_type": "CLOSED", "question": "Lung or heart?", "answer": "Lung", "content_type": "KG"},
            SLAKE | {"modality": "PET"},
        ],
    )
    write_json(tmp_path / "imgs" / "xmlab1" / "question.json", [SLAKE])  # SLAKE's own copy a folder deeper
    write_csv(tmp_path / "KG" / "en_disease.csv", [{"disease": "x", "symptom": "y"}])
    records, refused = load(tmp_path)
    assert [(record.answer, record.question_type) for record in records] == [
        ("MRI", "Modality Recognition"),
        ("No", "Disease Diagnosis"),
        ("Lung", None),
    ]
    assert [record.is_yes_no for record in records] == [False, True, False]
    first = records[0]
    assert (first.id, first.group, first.modality, first.licence) == ("train/1", "xmlab1", "MRI", "CC BY 4.0")
    assert len(refused) == 2
    assert "row 5: unknown modality 'PET'" in refused[0]
    assert "row 2: its language is 'zh', not 'en' (data.language)" in refused[1]
    assert [record.answer for record in load(tmp_path, language="zh")[0]] == ["核磁共振"]
    assert len(load(tmp_path, language="all")[0]) == 4


# -- PMC-VQA -------------------------------------------------------------------------------------------------

PMC = {
    "Figure_path": "PMC1064097_F1.jpg",
    "Question": "What is the uptake pattern in the breast? ",
    "Answer": "Focal uptake pattern",
    "Choice A": " A:Diffuse uptake pattern ",
    "Choice B": " B:Focal uptake pattern ",
    "Choice C": " C:No uptake pattern ",
    "Choice D": " D:Cannot determine from the information given ",
    "Answer_label": "B",
}


def test_pmc_vqa(tmp_path: Path) -> None:
    put(tmp_path, "images/PMC1064097_F1.jpg", "images/PMC1064097_F2.jpg")
    rows = [
        PMC,
        PMC | {"Figure_path": "PMC1064097_F2.jpg", "Answer": "B:Focal uptake pattern"},
        PMC | {"Answer": "Diffuse uptake pattern"},  # says A, and its label B
        PMC | {"Answer_label": "E"},
        PMC | {"Choice B": "B: "},
        PMC | {"Question": " "},
    ]
    file = write_csv(tmp_path / "test_clean.csv", rows)
    records, refused = load(file)
    assert [record.options for record in records] == [
        ("Diffuse uptake pattern", "Focal uptake pattern", "No uptake pattern",
         "Cannot determine from the information given"),
    ] * 3  # fmt: skip
    assert [record.answer for record in records] == ["B", "B", "B"]  # the label "E" is no letter here, the text is
    assert {record.group for record in records} == {"PMC1064097"}  # figures of one article stay together
    assert records[0].images == (tmp_path / "images" / "PMC1064097_F1.jpg",)
    assert [line.partition(": row ")[2].partition(":")[0] for line in refused] == ["3", "5", "6"]
    assert "the answer is 'Diffuse uptake pattern' and its label B; mend one" in refused[0]


def test_pmc_vqa_with_its_misspelt_column_and_no_label(tmp_path: Path) -> None:
    put(tmp_path, "figures/PMC1_F1.jpg")
    row = {name: text for name, text in PMC.items() if name not in ("Answer", "Answer_label")}
    rows = [row | {"Figure_path": "PMC1_F1.jpg", "Anwser": answer} for answer in ("B", "C:No uptake pattern", "x")]
    records, refused = load(write_csv(tmp_path / "train.csv", rows))
    assert [record.answer for record in records] == ["B", "C"]
    assert records[0].images == (tmp_path / "figures" / "PMC1_F1.jpg",)
    assert "row 3: the answer 'x' is not among the options" in refused[0]


def test_pmc_vqa_takes_off_a_letter_at_the_beginning_alone(tmp_path: Path) -> None:
    put(tmp_path, "images/PMC1064097_F1.jpg")
    row = PMC | {
        "Choice B": "Hepatitis B: acute",
        "Choice C": " C:Hepatitis C: chronic ",
        "Answer": "Hepatitis C: chronic",
    }
    (record,) = load_records(write_csv(tmp_path / "test.csv", [row | {"Answer_label": "C"}]))
    assert record.options[1:3] == ("Hepatitis B: acute", "Hepatitis C: chronic") and record.answer == "C"


# -- MedXpertQA ----------------------------------------------------------------------------------------------

MEDX = {
    "id": "MM-26",
    "question": "A man falls. What is it?\nAnswer Choices: (A) Fracture (B) Sprain (C) None, or both",
    "options": {"A": "Fracture", "B": "Sprain", "C": "None, or both"},
    "label": "B",
    "images": ["MM-26-a.jpeg", "MM-26-b.jpeg"],
    "medical_task": "Diagnosis",
    "body_system": "Skeletal",
    "question_type": "Reasoning",
}


def test_medxpertqa(tmp_path: Path) -> None:
    put(tmp_path, "images/MM-26-a.jpeg", "images/MM-26-b.jpeg")
    write_json(
        tmp_path / "MM" / "test.jsonl",
        [
            MEDX,
            MEDX | {"id": "MM-27", "question": "The answer choices: are not all here. A fracture?"},
            MEDX | {"id": "MM-28", "label": "D"},
            MEDX | {"id": "MM-29", "options": {"A": "x", "C": "y"}},
            MEDX | {"id": "MM-30", "images": []},
            MEDX,
        ],
        lines=True,
    )
    # The text part has no images: no layout of ours, and no harm to the other part.
    write_json(tmp_path / "Text" / "test.jsonl", [{k: v for k, v in MEDX.items() if k != "images"}], lines=True)
    records, refused = load(tmp_path)
    assert [record.id for record in records] == ["MM-26", "MM-27"]
    assert records[0].question == "A man falls. What is it?"  # the prompt lists the choices itself
    assert records[1].question == "The answer choices: are not all here. A fracture?"
    assert records[0].images == tuple(tmp_path / "images" / f"MM-26-{letter}.jpeg" for letter in "ab")
    assert (records[0].answer, records[0].gold, records[0].question_type) == ("B", "Sprain", None)
    reasons = ("answer 'D' is not one of", "option keys A, C are not", "give the MM part", "id 'MM-26' was used before")
    assert len(refused) == len(reasons)
    for line, reason in zip(refused, reasons, strict=True):
        assert reason in line


# -- GMAI-MMBench --------------------------------------------------------------------------------------------


def test_gmai_mmbench(tmp_path: Path) -> None:
    rows = [
        {
            "index": number,
            "image": base64.b64encode(png(number % 2)).decode() + "A" * 0,
            "question": "Which is shown?",
            "A": "Polyp",
            "B": "Ulcer",
            "C": "" if number else "Clip",
            "D": "",
            "E": "",
            "answer": "B",
            "category": "Attribute Recognition",
            "clinical vqa task": "Attribute Recognition",
            "department": "Gastroenterology",
            "perceptual granularity": "Image Level",
            "modality": "Endoscopy" if number else "X_ray",
            "original task": "t",
        }
        for number in range(3)
    ]
    rows.append(rows[0] | {"index": 3, "answer": ""})  # the test files have no answers
    rows.append(rows[0] | {"index": 4, "image": "no base64!"})
    rows.append(rows[0] | {"index": 5, "image": base64.b64encode(b"no picture").decode()})
    rows.append(rows[0] | {"index": 6, "B": ""})
    for name, header in (("GMAI_VAL", list(rows[0])), ("GMAI_lower", [name.lower() for name in rows[0]])):
        renamed = [dict(zip(header, row.values(), strict=True)) for row in rows]  # the kit lower-cases the names
        records, refused = load(write_csv(tmp_path / f"{name}.tsv", renamed, delimiter="\t"))
        assert [record.id for record in records] == [f"{name}/{number}" for number in range(3)]
        assert [record.options for record in records] == [("Polyp", "Ulcer", "Clip"), *[("Polyp", "Ulcer")] * 2]
        assert [record.modality for record in records] == ["X-Ray", None, None]
        assert records[0].images == records[2].images != records[1].images  # one picture, one path
        assert records[0].group == records[2].group
        reasons = ("'answer' is missing; the published test files have none", "the image is no base64 text",
                   "the image in the row cannot be decoded", "options A, C are not A, B")  # fmt: skip
        for line, reason in zip(refused, reasons, strict=True):
            assert reason in line


def test_a_cell_above_pythons_limit_is_read(tmp_path: Path) -> None:
    """csv stops at 131,072 characters a cell, less than many a base64 image has."""
    noise = Image.effect_noise((400, 400), 90)
    file = io.BytesIO()
    noise.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert len(text) > 131_072
    row = {"index": 0, "image": text, "question": "What?", "A": "x", "B": "y", "answer": "A"}
    (record,) = load_records(write_csv(tmp_path / "a.tsv", [row], delimiter="\t"))
    assert record.images[0].read_bytes() == file.getvalue()


# -- the hub -------------------------------------------------------------------------------------------------


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, configuration: str | None) -> object:
        asked.append((name, configuration))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such repository\nand more lines")
        features = datasets.Features(
            {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
        )
        rows = {"image": [Image.open(io.BytesIO(png(9)))], "question": ["is it so?"], "answer": ["yes"]}
        if name == "mm/files":
            features = datasets.Features(dict.fromkeys(("image", "question", "answer"), datasets.Value("string")))
            rows |= {"image": ["a.png"]}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (record,) = load_records("hub:flaviagiammarino/vqa-rad")
    assert (record.id, record.answer, record.source) == ("train/1", "yes", "VQA-RAD")
    assert Image.open(record.images[0]).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(MedR1Error, match=r"image 'a\.png' is a file of its own; download the images and give --image"):
        load_records("hub:mm/files#MM")
    put(tmp_path, "a.png")
    (record,) = load_records("hub:mm/files#MM", image_root=tmp_path)
    assert record.images == (tmp_path / "a.png",)
    with pytest.raises(MedR1Error, match=r"hub:nobody/nothing: the hub does not give this data set \(no such repos"):
        load_records("hub:nobody/nothing")
    assert asked[0] == ("flaviagiammarino/vqa-rad", None)
    assert asked[1] == ("mm/files", "MM")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MedR1Error, match=r"needs datasets; pip install 'medr1\[hub\]'"):
        load_records("hub:a/b")
