"""Any readable data set written anew: as OmniMedVQA, or in the format of one's own data as CSV or JSON lines.

    medr1 data convert SLAKE --to csv --out slake

The folder stands alone: copies of the images lie in it. What a layout cannot hold is left out and told, record by
record; what is written reads back as the same records.
"""

import csv
import hashlib
import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medr1.data.datasets.rows import answer_letter, letter_of, plain_options
from medr1.data.datasets.tables import is_missing, without_missing
from medr1.data.images import file_of, selector_of
from medr1.data.records import LETTERS, Record, new_folder, write_atomic
from medr1.errors import MedR1Error

QUESTIONS = "questions"
"""Stem of the table that a conversion writes, and the name that its rows' ids would get without one."""


def convert(records: Sequence[Record], to: str, out: Path) -> dict[str, Any]:
    """Write records into a folder that is new or empty.

    Args:
        to: "omnimedvqa", "csv" or "jsonl".

    Returns:
        out, records (written), images (files in the folder), refused: a line for each record left out.

    Raises:
        MedR1Error: an unknown format, a folder that holds something, an image that is missing, no record that the
            format can hold, or a full disk.
    """
    if to not in WRITERS:
        raise MedR1Error(f"--to {to}: choose {', '.join(WRITERS)}")
    check, write = WRITERS[to]
    kept, refused = [], []
    groups: dict[Path, str] = {}
    for record in records:
        try:
            _check_words(record)
            check(record)
            if to == "omnimedvqa" and groups.setdefault(record.images[0], record.group) != record.group:
                raise ValueError(
                    f"its image has the group {groups[record.images[0]]!r} too, and one is all it can have"
                )
        except ValueError as error:
            refused.append(f"record {record.id}: {error}")
        else:
            kept.append(record)
    if not kept:
        raise MedR1Error(f"--to {to}: none of {len(records)} records can be written so; first {refused[0]}")
    with new_folder(out):
        names = _place_images(kept, out)
        write(kept, names, out)
    num_images = len({file_of(image) for image in names})
    return {"out": str(out), "records": len(kept), "images": num_images, "refused": refused}


def _place_images(records: Sequence[Record], out: Path) -> dict[Path, str]:
    """Put each image file into out/Images/<source>; returns reference to its name from `out`, selector included."""
    names: dict[Path, str] = {}
    files: dict[Path, str] = {}
    for record in records:
        for image in record.images:
            file = file_of(image)
            if file not in files:
                # Numbered: names of two folders may agree. All suffixes stay: ".nii.gz" is told by both.
                suffixes = (
                    "".join(file.suffixes[-2:])
                    if re.fullmatch(r"(\.\w{1,8}){1,2}", "".join(file.suffixes[-2:]))
                    else ""
                )
                files[file] = f"Images/{_folder_name(record.source)}/{len(files) + 1:06d}{suffixes}"
                target = out / files[file]
                target.parent.mkdir(parents=True, exist_ok=True)
                if not file.is_file():
                    raise MedR1Error(f"{file}: no such image, wanted by record {record.id}; add the file first")
                shutil.copyfile(file, target)  # no link: who blackens a copy must not blacken the original
            names[image] = files[file] + selector_of(image)
    return names


def _folder_name(source: str) -> str:
    """A source as the name of a folder or file."""
    return re.sub(r"[^\w &()+,.-]", "_", source).strip(" .")[:80] or "source"


def _check_words(record: Record) -> None:
    """Raise ValueError if a reader would take a text for a missing value, or a part of an option for its letter."""
    texts = {"question": record.question, "answer": record.answer}
    for name, text in texts.items():
        if is_missing(text):
            raise ValueError(f"its {name} is {text!r}, which tables write for a missing value")
    for name in ("id", "source", "group", "licence"):
        if is_missing(getattr(record, name), names=True):
            raise ValueError(f"its {name} is {getattr(record, name)!r}, which tables write for a missing value")
    for listed in (record.options, record.alternatives):
        if without_missing(listed, "options") != list(listed):
            raise ValueError("the last of its options reads like a missing value")
    if plain_options(record.options)[1]:
        raise ValueError("its options carry letters of their own, which readers take off")


# -- OmniMedVQA ----------------------------------------------------------------------------------------------


def _check_omnimedvqa(record: Record) -> None:
    if record.is_open:
        raise ValueError("an open question has no options, and OmniMedVQA's have")
    if len(record.images) != 1:
        raise ValueError(f"it has {len(record.images)} images, and OmniMedVQA's have one")
    if len(record.groups) > 1:
        raise ValueError(f"its image has the groups {', '.join(record.groups)}, and one is all it can have")
    for name in ("modality", "question_type"):
        if getattr(record, name) is None:
            raise ValueError(f"it states no {name.replace('_', ' ')}, and OmniMedVQA's do")
    if letter_of(record.gold, record.options) != record.answer:
        raise ValueError("its right option reads like another one, and OmniMedVQA names it by text")


def _write_omnimedvqa(records: Sequence[Record], names: dict[Path, str], out: Path) -> None:
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    groups: dict[str, str] = {}
    for record in records:
        image = names[record.images[0]]
        if record.groups:
            groups[image] = record.group
        by_file[_folder_name(record.source)].append(
            {
                "dataset": record.source,
                "question_id": record.id,
                "question_type": record.question_type,
                "question": record.question,
                "gt_answer": record.gold,
                "image_path": image,
                **{f"option_{letter}": text for letter, text in zip(record.letters, record.options, strict=True)},
                "modality_type": record.modality,
                **({} if record.groups else {"group": record.group}),
            }
        )
    if groups:  # that file names all images: one without a group gets the name that the split knows it by, its bytes
        for image in set(names.values()) - groups.keys():
            groups[image] = hashlib.sha256(file_of(out / image).read_bytes()).hexdigest()
        write_atomic(out / "groups.csv", _csv(["image_path", "group"], [list(item) for item in sorted(groups.items())]))
    for name, rows in by_file.items():
        path = out / "QA_information" / "Open-access" / f"{name}.json"
        write_atomic(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


# -- one's own format ----------------------------------------------------------------------------------------


def _check_own(record: Record) -> None:
    if not record.is_open:
        _answer_cell(record)


def _answer_cell(record: Record) -> str:
    """How the answer is written so that it reads back as itself."""
    if record.is_open:
        return record.answer
    for cell in (record.answer, f"({record.answer})"):
        try:
            if answer_letter(cell, record.options) == record.answer:
                return cell
        except ValueError:  # the letter is another option's text
            continue
    raise ValueError("its right option's letter is the text of another option; change that option's text")


def _write_jsonl(records: Sequence[Record], names: dict[Path, str], out: Path) -> None:
    rows = [
        {
            **record.model_dump(mode="json", exclude_defaults=True),
            "images": [names[image] for image in record.images],
            "answer": _answer_cell(record),
            "groups": list(record.groups),
        }
        for record in records
    ]
    write_atomic(out / f"{QUESTIONS}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_csv(records: Sequence[Record], names: dict[Path, str], out: Path) -> None:
    num_options = max(len(record.options) for record in records)
    letters = [f"option_{letter.lower()}" for letter in LETTERS[:num_options]]
    optional = ["modality", "question_type", "source", "group", "licence", "groups", "alternatives"]
    rows = []
    for record in records:
        images = [names[image] for image in record.images]
        cells = [getattr(record, name) or "" for name in optional[:-2]]
        is_plain = record.groups == (record.group,) and ";" not in record.group and record.group[:1] != "["
        groups = "" if is_plain else json.dumps(record.groups, ensure_ascii=False)
        alternatives = json.dumps(record.alternatives, ensure_ascii=False) if record.alternatives else ""
        options = [*record.options, *[""] * (num_options - len(record.options))]
        shown = images[0] if len(images) == 1 and ";" not in images[0] else json.dumps(images, ensure_ascii=False)
        rows.append([record.id, shown, record.question, *options, _answer_cell(record), *cells, groups, alternatives])
    table = _csv(["id", "image", "question", *letters, "answer", *optional], rows)
    write_atomic(out / f"{QUESTIONS}.csv", table)


def _csv(header: list[str], rows: list[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


Check = Callable[[Record], None]
Write = Callable[[Sequence[Record], dict[Path, str], Path], None]
WRITERS: dict[str, tuple[Check, Write]] = {
    "omnimedvqa": (_check_omnimedvqa, _write_omnimedvqa),
    "csv": (_check_own, _write_csv),
    "jsonl": (_check_own, _write_jsonl),
}
