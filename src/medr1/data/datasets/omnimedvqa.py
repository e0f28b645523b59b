"""Reader of OmniMedVQA's layout: `QA_information/Open-access/<source>.json` beside `Images/<source>/…`.

A row has `dataset, question_id, question_type, question, gt_answer, image_path, option_A, option_B[, …],
modality_type`; `gt_answer` is the text of the right option, and an item with fewer options lacks the later
keys. Only the open-access part is read: the restricted part comes without images.

Known defect of the public files: one item of "Chest CT Scan.json" names its modality under `modality` instead
of `modality_type`. Both keys are read.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medr1.data.datasets.rows import (
    ImageFolder,
    canonical_modality,
    canonical_question_type,
    letter_of,
    plain_options,
    read_records,
    text_field,
)
from medr1.data.datasets.tables import is_missing, read_table, without_missing
from medr1.data.records import LETTERS, Record, normalise_option
from medr1.errors import MedR1Error


def question_files(root: Path) -> list[Path]:
    """The files of the open-access part, but hidden ones, which macOS lays beside others ("._HAM10000.json")."""
    return sorted((root / "QA_information" / "Open-access").glob("[!.]*.json"))


def read_omnimedvqa(root: Path, refused: list[str] | None = None) -> Sequence[Record]:
    """Every question of the open-access part below a folder that holds QA_information and Images.

    Args:
        refused: gets a line for each bad row, see `read_records`.

    Raises:
        MedR1Error: no question file, a file that is not JSON, or a bad row.
    """
    files = question_files(root)
    if not files:
        raise MedR1Error(f"{root}: no QA_information/Open-access/*.json; unpack OmniMedVQA.zip here")
    folder = ImageFolder(root)
    return read_records(map(read_table, files), lambda table, number, row: _record(folder, row), refused)


def _record(folder: ImageFolder, row: dict[str, Any]) -> Record:
    given, gold = _options(row), text_field(row, "gt_answer")
    options, _ = plain_options(given)
    is_whole = normalise_option(gold) in map(normalise_option, given)
    image = text_field(row, "image_path")
    groups = folder.groups(image)
    name = row.get("group")  # a conversion writes it: what an image without a group is counted by
    modality_key = "modality" if "modality" in row and "modality_type" not in row else "modality_type"
    return Record(
        id=text_field(row, "question_id"),
        images=(folder.locate(image),),
        question=text_field(row, "question"),
        options=options,
        answer=letter_of(gold, given if is_whole else options),
        modality=canonical_modality(text_field(row, modality_key)),
        question_type=canonical_question_type(text_field(row, "question_type")),
        source=text_field(row, "dataset"),
        group=groups[0] if groups else name if isinstance(name, str) and not is_missing(name, names=True) else image,
        groups=groups,
    )


def _options(row: dict[str, Any]) -> tuple[str, ...]:
    named = sorted(key for key in row if re.fullmatch("option_[A-Z]", key) and row[key] is not None)
    given = named[: len(without_missing([row[key] for key in named], "options"))]
    if given != [f"option_{letter}" for letter in LETTERS[: len(given)]]:
        raise ValueError(f"option keys {', '.join(given)} are not A, B, … without a gap")
    return tuple(text_field(row, key) for key in given)
