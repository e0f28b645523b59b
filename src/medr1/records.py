"""The one record that every part of Med-R1 passes on, and the few file helpers that keep results whole.

A `Record` is a multiple-choice question about one or more images. Readers make records, splits divide them,
prompts word them, evaluation scores them. Image paths and ids are for us alone: they never reach a prompt,
since in the public data the answer often stands in them.
"""

import json
import os
import string
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from medr1.errors import MedR1Error

MODALITIES = (
    "CT",
    "MRI",
    "Ultrasound",
    "Dermoscopy",
    "Fundus Photography",
    "OCT",
    "Microscopy",
    "X-Ray",
)
QUESTION_TYPES = (
    "Modality Recognition",
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Other Biological Attributes",
)
LETTERS = string.ascii_uppercase


class Record(BaseModel):
    """One multiple-choice question about one or more images.

    Example:
        Record(id="HAM10000_00001", images=(Path("Images/HAM10000/a.jpg"),), question="Which finding is present?",
               options=("Melanoma", "Vascular lesion"), answer="A", modality="Dermoscopy",
               question_type="Disease Diagnosis", source="HAM10000", group="lesion_17")
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Unique within its data set."""
    images: tuple[Path, ...]
    """Image files in the order the prompt shows them; may be empty for a text-only question."""
    question: str
    """The stem, without options."""
    options: tuple[str, ...]
    """Two to 26 option texts; option i has letter LETTERS[i]."""
    answer: str
    """Letter of the right option."""
    modality: str | None
    """One of MODALITIES; None where the file does not say."""
    question_type: str | None
    """One of QUESTION_TYPES; None where the file does not say."""
    source: str
    """Name of the set that the image comes from."""
    group: str
    """Patient, lesion or image that must stay on one side of a split."""
    licence: str = "follows the source"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if not 2 <= len(self.options) <= len(LETTERS):
            raise ValueError(f"{len(self.options)} options, expected 2 to {len(LETTERS)}")
        if any(not option.strip() for option in self.options):
            raise ValueError("an option is empty")
        if self.answer not in self.letters:
            raise ValueError(f"answer {self.answer!r} is not one of {', '.join(self.letters)}")
        if self.modality is not None and self.modality not in MODALITIES:
            raise ValueError(f"unknown modality {self.modality!r}, expected one of {', '.join(MODALITIES)}")
        if self.question_type is not None and self.question_type not in QUESTION_TYPES:
            raise ValueError(
                f"unknown question type {self.question_type!r}, expected one of {', '.join(QUESTION_TYPES)}"
            )
        return self

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters in use, ("A", "B", …)."""
        return tuple(LETTERS[: len(self.options)])

    @property
    def gold(self) -> str:
        """Text of the right option."""
        return self.options[LETTERS.index(self.answer)]

    @property
    def right_letters(self) -> tuple[str, ...]:
        """Letters whose text equals the gold text up to case and white space (some public items repeat an option)."""
        gold = normalise_option(self.gold)
        return tuple(
            letter
            for letter, option in zip(self.letters, self.options, strict=True)
            if normalise_option(option) == gold
        )

    @property
    def chance(self) -> float:
        """Expected accuracy of a uniform guess on this item, in [0, 1]."""
        return len(self.right_letters) / len(self.options)


def normalise_option(text: str) -> str:
    """Case-folded text with single spaces: two options that agree in this are the same option."""
    return " ".join(text.casefold().split())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file. A torn last line (a run that was killed while writing) is left out.

    Raises:
        MedR1Error: the file is missing, or a line before the last is not JSON.
    """
    if not path.is_file():
        raise MedR1Error(f"{path}: no such file; give the path of a .jsonl file that medr1 wrote")
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a tear may split a character
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise MedR1Error(f"{path}: line {number} is not JSON ({error.msg}); remove or repair it") from error
    return rows


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file and force them to disk: all of them, or on a full disk none.

    Raises:
        MedR1Error: the disk is full or the folder cannot be written.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise MedR1Error(f"{path}: cannot be written ({error.strerror}); free space and run again") from error


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON-lines file anew, whole or not at all; raises as `write_atomic`."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a half.

    Raises:
        MedR1Error: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it private; results are for everybody who may read the folder
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be written ({error.strerror}); free space and run again") from error
