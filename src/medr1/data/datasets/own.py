"""The format for one's own data: a row a question, in CSV, TSV, JSON, JSON lines or Parquet.

    image, question, answer                              needed; several images with ";" between, or a JSON list
    option_a, option_b, … or options (";", JSON list)    none: the question is open
    id, modality, question_type, group, source, licence  optional; alternatives: other right answers, of open ones

`answer` is the letter of the right option or its text; of an open question the text. Options may carry letters of
their own ("A. Naevus"), which are taken off. A cell that holds nothing, "nan", "<NA>" or "null" is missing, and "None"
and "N/A" but as an option or an answer. Image paths start from the
folder that was given (or the table's), and may carry a selector ("scan.dcm#frame=3") or ask for several slices
("volume.nii.gz#slices=4"). `group` may name several ("p1;p2" where images are several, or a JSON list). Without it an
image's patient (DICOM) or content is the group. A record dumped as JSON is a row of this format. So are VQA-RAD and
PathVQA as republished in Parquet, with images inside the rows.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medr1.data.datasets.embedded import keep_image
from medr1.data.datasets.rows import (
    ImageFolder,
    canonical_modality,
    canonical_question_type,
    options_and_letter,
    text_field,
)
from medr1.data.datasets.tables import Table, without_missing
from medr1.data.images import file_of
from medr1.data.records import LETTERS, Record

Row = dict[str, Any]

REPUBLISHED = {"vqarad": ("VQA-RAD", "CC0-1.0"), "pathvqa": ("PathVQA", "images belong to their publishers")}
"""Source and terms of tables that say neither, by a part of their name in lower-case letters."""


@dataclass(frozen=True)
class Place:
    """Where a row stands, and what its images start from."""

    table: Table
    number: int
    """From 1."""
    folder: ImageFolder
    language: str
    """Keep rows in this language where rows say theirs ("en"); "all" keeps every row."""

    @property
    def id(self) -> str:
        """An id for a row that has none."""
        return f"{self.table.stem}/{self.number}"


def read_own(row: Row, place: Place) -> Record:
    """A row of the format above, under the names of `tables.by_column`, as a record."""
    given = _options(row)
    options, answer = options_and_letter(given, said(row, "answer")) if given else ((), said(row, "answer"))
    images, group, groups = _images(row, place)
    if "group" in row or row.get("groups"):
        told = _groups(row, len(images))
        group = said(row, "group") if {"group", "groups"} <= row.keys() else next(iter(told), group)
        groups = tuple(dict.fromkeys([*told, *groups]))
    name = re.sub(r"[^a-z]", "", place.table.name.casefold())
    source, licence = next(
        (known for part, known in REPUBLISHED.items() if part in name), (place.table.stem, "follows the source")
    )
    return Record(
        id=said(row, "id") if "id" in row else place.id,
        images=images,
        question=text_field(row, "question"),
        options=options,
        answer=answer,
        modality=canonical_modality(text_field(row, "modality")) if "modality" in row else None,
        question_type=canonical_question_type(text_field(row, "question type")) if "question type" in row else None,
        source=said(row, "source") if "source" in row else source,
        group=group,
        groups=groups,
        licence=said(row, "licence") if "licence" in row else licence,
        alternatives=_listed(row.get("alternatives", []), "alternatives"),
    )


def said(row: Row, name: str) -> str:
    """A cell as text: a number as it is written, true as "yes".

    Raises:
        ValueError: the cell is empty, or holds something else.
    """
    value = row.get(name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name!r} is {value}, which is no number; write it as a text or leave it out")
    return str(value) if isinstance(value, int | float) else text_field(row, name)


def _options(row: Row) -> tuple[str, ...]:
    named = sorted(name for name in row if re.fullmatch("option [a-z]", name))
    if named and "options" in row:
        raise ValueError(f"options stand in 'options' and in {named[0]!r}; keep one")
    if "options" in row:
        options = _listed(row["options"], "options")
        if row["options"] and not options:
            raise ValueError("'options' lists no value; fill them in, or take it out where the question is open")
        return options
    named = named[: len(without_missing([row[name] for name in named], "options"))]
    if named != [f"option {letter.lower()}" for letter in LETTERS[: len(named)]]:
        raise ValueError(f"option columns {', '.join(named)} are not a, b, … without a gap")
    return tuple(said(row, name) for name in named)


def _listed(value: Any, name: str) -> tuple[str, ...]:
    """Texts of a list, of a JSON list in a cell, or of a cell with semicolons between."""
    if isinstance(value, str):
        value = _json_list(value, name) if value.lstrip().startswith("[") else value.split(";")
    if not isinstance(value, list):
        raise ValueError(f"{name!r} is neither a list nor a text but {value!r:.40}; write a list")
    kept = value if name in ("image", "images") else without_missing(value, name)  # a path that lacks is a mistake
    return tuple(said({name: item}, name) for item in kept)


def _json_list(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name!r} begins like a JSON list and is none ({error}); write it with json.dumps") from error


def _groups(row: Row, num_images: int) -> tuple[str, ...]:
    """Groups of a row that names some; a record dumped as JSON says in `groups` which of them the data told of."""
    name = "groups" if "groups" in row else "group"
    value = row[name]
    several = isinstance(value, str) and (value.lstrip().startswith("[") or (num_images > 1 and ";" in value))
    named = _listed(value, name) if several or isinstance(value, list) else (said(row, name),)
    # pandas writes the whole numbers of a column in which one is missing as floats
    named = tuple(one[:-2] if re.fullmatch(r"\d+\.0", one) else one for one in named)
    if not all(named):
        raise ValueError(f"{name!r} holds an empty name in {value!r:.40}; leave it out")
    return named


def _images(row: Row, place: Place) -> tuple[tuple[Path, ...], str, tuple[str, ...]]:
    """Paths of a row's images; name of the first's group, "" where its content is to name it; groups of them all."""
    if "image" in row and "images" in row:
        raise ValueError("images stand in 'image' and in 'images'; keep one")
    name = "images" if "images" in row else "image"
    given = row.get(name)
    if given is None:
        raise ValueError(f"{name!r} is missing; write [] where a question has no image")
    if isinstance(given, str):
        if elsewhere := re.match(r"\s*(https?:|data:)", given, re.IGNORECASE):
            raise ValueError(f"{name!r} begins with {elsewhere[1]} and names no file; save the image and give its path")
        whole = place.folder.root is not None and os.path.isfile(place.folder.root / given)  # a name with ";" in it
        given = [given] if whole else list(_listed(given, name))
    images: list[Path] = []
    names: list[str] = []
    for image in given if isinstance(given, list) else [given]:
        if isinstance(image, dict) and image.get("bytes", b"") is None:  # as datasets gives what it did not load
            image = image.get("path", image)
        if isinstance(image, str):
            images += place.folder.expand(image.strip())
            names.append(image.strip())
        elif isinstance(image, dict) and isinstance(image.get("bytes"), bytes):  # as Parquet tables of the hub
            images.append(keep_image(image["bytes"]))
        else:
            raise ValueError(f"{name!r} is neither a path nor a picture but {image!r:.40}")
    groups = place.folder.groups(*names)
    if not images:
        return (), place.id, ()
    if groups or not os.path.isfile(file_of(images[0])):
        return tuple(images), groups[0] if groups else names[0], groups
    return tuple(images), "" if names else images[0].stem, groups
