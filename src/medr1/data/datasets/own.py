"""The format for one's own data: a row a question, in CSV, TSV, JSON, JSON lines or Parquet.

    image, question, answer                              needed; several images with ";" between, or a JSON list
    option_a, option_b, … or options (";", JSON list)    none: the question is open; see OPTION for other names
    id, modality, question_type, group, source, licence  optional; alternatives: other right answers, of open ones

`answer` is the letter of the right option or its text; of an open question the text. Options may carry letters of
their own ("A. Naevus"), which are taken off. A cell that holds nothing, "nan", "<NA>" or "null" is missing, and "None"
and "N/A" but as an option or an answer. Image paths start from the
folder that was given (or the table's), and may carry a selector ("scan.dcm#frame=3") or ask for several slices
("volume.nii.gz#slices=4"). `group` may name several ("p1;p2" where images are several, or a JSON list). Without it an
image's patient (DICOM) or content is the group. A record dumped as JSON is a row of this format. So are VQA-RAD and
PathVQA as republished in Parquet, with images inside the rows, below a folder or in a repository of that name.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
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
"""Source and terms of tables that say neither and hold their images, by a folder's name in lower-case letters."""

OPTION = re.compile(r"(option|choice|opt|op|answer|) ?(?:([a-z])|(\d{1,2}))")
"""A column of one option: "option a", "choice_a", "optionA", "opa" (MedMCQA), "option 1", a letter or number alone."""
OPTIONS = ("options", "choices", "option", "choice")
"""A column of all of them."""
_LIKE_OPTIONS = re.compile(r"(option|choice|opt|distractor)s?(?![a-z])")


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
    given, is_numbered = _options(row, place.table.columns)
    options, answer = given, said(row, "answer")
    if given:
        options, answer = options_and_letter(given, _by_number(answer, given) if is_numbered else answer)
    images, group, groups, is_inside = _images(row, place)
    if "group" in row or row.get("groups"):
        told = _groups(row, len(images))
        group = said(row, "group") if {"group", "groups"} <= row.keys() else next(iter(told), group)
        groups = tuple(dict.fromkeys([*told, *groups]))
    names = [re.sub(r"[^a-z]", "", part) for part in re.split(r"[/\\\s#]", place.table.name.casefold()) if is_inside]
    source, licence = next(
        (REPUBLISHED[name] for name in names if name in REPUBLISHED),
        (place.table.stem.rpartition("/")[2], "follows the source"),
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


def _options(row: Row, columns: frozenset[str]) -> tuple[tuple[str, ...], bool]:
    """Options of a row of a table with these columns, and whether numbers name them and not letters.

    Raises:
        ValueError: they stand twice or have a gap, or a column looks like an option and is none that is known.
    """
    found = [[(0, name)] for name in OPTIONS if name in row]
    for marked in _option_columns(columns.union(row)):
        found += [some] if (some := [(mark, name) for mark, name in marked if name in row]) else []
    ours = [some for some in found if re.fullmatch("options|option [a-z]", some[0][1])]
    found = ours or found  # beside those a column "choice" or "a" may be anything
    if len(found) > 1:
        raise ValueError(f"options stand in {found[0][0][1]!r} and in {found[1][0][1]!r}; keep one")
    if not found:
        for name, value in row.items():
            if _LIKE_OPTIONS.match(name) and isinstance(value, str | list | dict):
                raise ValueError(
                    f"column {name!r} looks like an option and is none of option_a, option_b, … or options; rename it"
                )
        return (), False
    names = [name for _, name in found[0]]
    if names[0] in OPTIONS:
        options = _listed(row[names[0]], names[0])
        if row[names[0]] and not options:
            raise ValueError(f"{names[0]!r} lists no value; fill them in, or take it out where the question is open")
        return options, False
    is_numbered = names[0][-1].isdecimal()
    names = names[: len(without_missing([row[name] for name in names], "options"))]
    if [mark for mark, _ in found[0][: len(names)]] != [*range(1, len(names) + 1)]:
        first = "1, 2" if is_numbered else "a, b"
        raise ValueError(f"option columns {', '.join(names)} are not {first}, … without a gap")
    return tuple(said(row, name) for name in names), is_numbered


@lru_cache(maxsize=64)  # rows of a table mostly have the same
def _option_columns(columns: frozenset[str]) -> list[list[tuple[int, str]]]:
    """Columns of single options, with the place that the letter or number of each says, in this order; by kind.

    What begins with "option" or "choice" is one. Other names may mean anything, unless a first has another beside it.
    """
    kinds: dict[tuple[str, bool], list[tuple[int, str]]] = {}
    for name in columns - {*OPTIONS}:
        if parts := OPTION.fullmatch(name):
            kind, letter, number = parts.groups()
            place = int(number) if number else ord(letter) - ord("a") + 1
            kinds.setdefault((kind, number is None), []).append((place, name))
    return [
        sorted(marked)
        for (kind, _), marked in sorted(kinds.items())
        if kind in ("option", "choice") or (len(marked) > 1 and 1 in dict(marked))
    ]


def _by_number(answer: str, given: tuple[str, ...]) -> str:
    """The answer, or its option's letter if it is the number of one.

    Raises:
        ValueError: it is another option's text too.
    """
    if not answer.isdecimal() or not 0 < int(answer) <= len(given):
        return answer
    if answer in given and given[int(answer) - 1] != answer:
        raise ValueError(f"the answer {answer!r} is the number of one option and another's text; write the letter")
    return f"({LETTERS[int(answer) - 1]})"


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


def _images(row: Row, place: Place) -> tuple[tuple[Path, ...], str, tuple[str, ...], bool]:
    """Paths of a row's images; name of the first's group, "" where its content is to name it; groups of them all;
    whether all stood inside the row.
    """
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
        return (), place.id, (), False
    if groups or not os.path.isfile(file_of(images[0])):
        return tuple(images), groups[0] if groups else names[0], groups, not names
    return tuple(images), "" if names else images[0].stem, groups, not names
