"""Reader of the public Med-R1 split files: lists of {"image", "problem", "solution"}.

The options stand inline in `problem`. A row says neither modality nor question type nor source. The source is
the second part of the image path. Files are named `<modality>_train.json` or `<question type>_test.json`, so
a file gives one of the two, for all of its rows. In a modality file the question type is None. In a
question-type file the modality follows from the source, since an open-access source of OmniMedVQA has one
modality, but for two in which the file names tell it (RadImageNet, "OCT & X-Ray 2017"); an unknown source
gives None.

Known defect of the public files: `unknown_train.json` holds one row, which OmniMedVQA published without its
`modality_type`. Its modality is taken from its source (Chest CT Scan: CT), and a row of such a file whose
source is not known is an error.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from medr1.data.datasets.rows import (
    ImageFolder,
    canonical_modality,
    canonical_question_type,
    letter_of,
    options_in_order,
    read_records,
    text_field,
)
from medr1.data.datasets.tables import Table, read_table, stems_of
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error

_SOURCES = {
    "CT": ("Chest CT Scan", "Covid CT", "SARS-CoV-2 CT-scan"),
    "X-Ray": (
        "COVIDx CXR-4",
        "Chest X-Ray PA",
        "CoronaHack",
        "Covid-19 tianchi",
        "Covid19 heywhale",
        "Knee Osteoarthritis",
        "MIAS",
        "Mura",
        "Pulmonary Chest MC",
        "Pulmonary Chest Shenzhen",
        "RUS CHN",
    ),
    "Dermoscopy": (
        "Fitzpatrick 17k",
        "ISBI2016",
        "ISIC2018",
        "ISIC2019",
        "ISIC2020",
        "Monkeypox Skin Image 2022",
        "PAD-UFES-20",
    ),
    "Fundus Photography": (
        "ACRIMA",
        "Adam Challenge",
        "DRIMDB",
        "DeepDRiD",
        "Diabetic Retinopathy",
        "JSIEC",
        "OLIVES",
        "PALM2019",
        "Yangxi",
    ),
    "OCT": ("Retinal OCT-C8",),
    "Microscopy": (
        "ALL Challenge",
        "BioMediTech",
        "Blood Cell",
        "BreakHis",
        "CRC100k",
        "HuSHeM",
        "MAlig Lymph",
        "MHSMA",
        "NLM- Malaria Data",
    ),
}
_MODALITY_OF_SOURCE = {source: modality for modality, sources in _SOURCES.items() for source in sources}

# What stands before the number in RadImageNet's file names, without "-normal": "lung123.png",
# "mri-abd-normal4.png".
_MODALITY_OF_RADIMAGENET_PREFIX = {
    **dict.fromkeys(("abd", "lung"), "CT"),
    **dict.fromkeys(("usn", "usf", "thyroid-nodule"), "Ultrasound"),
    **dict.fromkeys(("mri-abd", "mrabd", "brain", "spine", "knee", "hip", "shoulder", "foot", "ankle"), "MRI"),
}

_OPTION_LETTER = re.compile(r"(?:^|(?<=[\s,]))([A-Z])\)")
_SOLUTION = re.compile(r"\s*<answer>\s*([A-Z])\s*</answer>\s*")


def split_files(path: Path) -> list[Path]:
    """The file itself, or all *_train.json and *_test.json below a folder, but hidden ones."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("[!.]*.json") if re.search(r"_(train|test)$", file.stem))


def is_medr1_splits(path: Path) -> bool:
    """Whether a file, or a split file below a folder, has rows as Med-R1's; one without rows is told by its name.

    Raises:
        MedR1Error: the file cannot be read.
    """
    if path.is_file():
        columns = read_table(path).columns if path.suffix == ".json" else frozenset()
        named = path.suffix == ".json" and re.search(r"_(train|test)$", path.stem) is not None
        return "problem" in columns or (not columns and named)
    return any(_readable(file) and is_medr1_splits(file) for file in split_files(path))


def _readable(file: Path) -> bool:
    try:
        read_table(file)
    except MedR1Error:
        return False  # of another kind, or broken: then it is told where no layout fits
    return True


def read_medr1_splits(
    path: Path,
    image_root: Path | None = None,
    refused: list[str] | None = None,
    files: list[tuple[str, int]] | None = None,
) -> Sequence[Record]:
    """Every row of one split file, or of all below a folder. Ids are "<file stem>/<row, from 1>".

    Args:
        path: a split file or a folder with such files.
        image_root: the folder that holds Images/; without it the given folder or the file's folder.
        refused, files: as `read_records`.

    Raises:
        MedR1Error: a bad row, a file that is not JSON, or one whose name says neither modality nor type.
    """
    stems = stems_of(split_files(path), path if path.is_dir() else path.parent)
    folder = ImageFolder(image_root or (path if path.is_dir() else path.parent))
    named = {str(file): _named(file) for file in stems}

    def record(table: Table, number: int, row: dict[str, Any]) -> Record:
        modality, question_type = named[table.name]
        question, options, answer = _question(text_field(row, "problem"), text_field(row, "solution"))
        image = text_field(row, "image")
        file_path = folder.locate(image)
        groups = folder.groups(image)
        parts = PurePosixPath(image).parts
        if len(parts) < 3:
            raise ValueError(f"image path {image!r} names no source; expected Images/<source>/<file>")
        if modality is None:
            modality = modality_of_image(image)
        if modality is None and question_type is None:
            raise ValueError(f"the modality is unknown for source {parts[1]!r}; move the row to a modality's file")
        return Record(
            id=f"{table.stem}/{number}",
            images=(file_path,),
            question=question,
            options=options,
            answer=answer,
            modality=modality,
            question_type=question_type,
            source=parts[1],
            group=groups[0] if groups else image,
            groups=groups,
        )

    tables = (replace(read_table(file), stem=stem) for file, stem in stems.items())
    return read_records(tables, record, refused, files)


def modality_of_image(image: str) -> str | None:
    """Modality of an image path Images/<source>/…; None where source and file name do not tell it."""
    parts = PurePosixPath(image).parts
    source, name = parts[1], parts[-1]
    if source == "RadImageNet":
        prefix = re.sub(r"\d+\.\w+$", "", name).removesuffix("-normal")
        return _MODALITY_OF_RADIMAGENET_PREFIX.get(prefix)
    if source == "OCT & X-Ray 2017":
        if re.match(r"(CNV|DME|DRUSEN|NORMAL)-\d+-\d+\.", name):
            return "OCT"
        return "X-Ray" if re.match(r"(person\d+_|(NORMAL\d+-)?IM-)", name) else None
    return _MODALITY_OF_SOURCE.get(source)


def _named(file: Path) -> tuple[str | None, str | None]:
    """(modality, question type) that a file's name gives; both None for the public "unknown" file."""
    name = re.sub(r"_(train|test)$", "", file.stem)
    if name == "unknown":
        return None, None
    for canonical in (canonical_modality, canonical_question_type):
        try:
            value = canonical(name)
        except ValueError:
            continue
        return (value, None) if canonical is canonical_modality else (None, value)
    raise MedR1Error(
        f"{file}: the name gives neither modality nor question type; rename it as in 'X-Ray_train.json', "
        "or give the folder that holds QA_information"
    )


def _question(problem: str, solution: str) -> tuple[str, tuple[str, ...], str]:
    """Stem, options and right letter of a row. Options hold commas themselves, so the letters divide them."""
    marks = list(_OPTION_LETTER.finditer(problem))
    letters = "".join(mark[1] for mark in marks)
    if not marks or letters != LETTERS[: len(marks)]:
        raise ValueError(f"option letters {', '.join(letters) or '(none)'} in 'problem' are not A, B, … in order")
    ends = [mark.start() for mark in marks[1:]] + [len(problem)]
    options = options_in_order(
        [problem[mark.end() : end].strip().removesuffix(",").rstrip() for mark, end in zip(marks, ends, strict=True)]
    )
    answer = _SOLUTION.fullmatch(solution)
    if answer is None:
        raise ValueError(f"'solution' is {solution!r}, expected '<answer> B </answer>'")
    if answer[1] not in letters:
        raise ValueError(f"the answer {answer[1]!r} is not among the options {', '.join(letters)}")
    letter_of(options[letters.index(answer[1])], options)  # refuses a right option that stands there twice
    return problem[: marks[0].start()].strip(), options, answer[1]
