"""The one record that every part of Med-R1 passes on, and the few file helpers that keep results whole.

A `Record` is a question about one or more images, with options to choose from or open. Readers make records, splits
divide them, prompts word them, evaluation scores them. Image paths and ids are for us alone: they never reach a prompt,
since in the public data the answer often stands in them.
"""

import json
import math
import os
import re
import shutil
import string
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
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
_NONE_GIVEN: set[str] = set()


class Record(BaseModel):
    """One question about one or more images: multiple choice, or open (no options, the answer is a text).

    Example:
        Record(id="HAM10000_00001", images=(Path("Images/HAM10000/a.jpg"),), question="Which finding is present?",
               options=("Melanoma", "Vascular lesion"), answer="A", modality="Dermoscopy",
               question_type="Disease Diagnosis", source="HAM10000", group="lesion_17")
        Record(id="slake/12", images=(Path("imgs/xmlab1/source.jpg"),), question="Which organ is enlarged?",
               options=(), answer="Heart", modality="X-Ray", question_type=None, source="SLAKE", group="xmlab1")
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Unique within its data set."""
    images: tuple[Path, ...]
    """Image files in the order the prompt shows them; may be empty for a text-only question."""
    question: str
    """The stem, without options."""
    options: tuple[str, ...]
    """Two to 26 option texts; option i has letter LETTERS[i]. None of them: the question is open."""
    answer: str
    """Letter of the right option; of an open question the right answer's text."""
    modality: str | None
    """One of MODALITIES; None where the file does not say."""
    question_type: str | None
    """One of QUESTION_TYPES; None where the file does not say."""
    source: str
    """Name of the set that the image comes from."""
    group: str
    """Patient, lesion, study or image whose questions are one draw in every interval. Where records hang together by
    several groups or by copies of an image, `medr1.data.splits.joined` gives them one name."""
    groups: tuple[str, ...] = ()
    """Every patient, lesion or study that its images are of, each of which must stay on one side of a split. Left out
    it is `group` alone; none where the data say nothing, so that only the images themselves tell."""
    licence: str = "follows the source"
    alternatives: tuple[str, ...] = ()
    """Other texts that are right too; of an open question only."""

    @model_validator(mode="before")
    @classmethod
    def _grouped(cls, values: Any) -> Any:
        if isinstance(values, dict) and "groups" not in values and "group" in values:
            return values | {"groups": (values["group"],)}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if self.is_open:
            if any(not text.strip() for text in (self.answer, *self.alternatives)):
                raise ValueError("an answer of an open question is empty")
        elif not 2 <= len(self.options) <= len(LETTERS):
            raise ValueError(f"{len(self.options)} options, expected 2 to {len(LETTERS)}")
        elif any(not option.strip() for option in self.options):
            raise ValueError("an option is empty")
        elif self.alternatives:
            raise ValueError("alternatives are for open questions; this one has options")
        elif self.answer not in self.letters:
            raise ValueError(f"answer {self.answer!r} is not one of {', '.join(self.letters)}")
        if self.modality is not None and self.modality not in MODALITIES:
            raise ValueError(f"unknown modality {self.modality!r}, expected one of {', '.join(MODALITIES)}")
        if self.question_type is not None and self.question_type not in QUESTION_TYPES:
            raise ValueError(
                f"unknown question type {self.question_type!r}, expected one of {', '.join(QUESTION_TYPES)}"
            )
        # Nobody asks which fields were given, and a set of their names is a third of what a record takes.
        object.__setattr__(self, "__pydantic_fields_set__", _NONE_GIVEN)
        return self

    def sharing(self, known: dict[Any, Any]) -> Self:
        """This record, its parts the same objects as equal ones of others, which `known` holds."""
        for name in ("images", "options", "answer", "group", "groups", "source", "licence"):
            value = self.__dict__[name]
            if value not in known and isinstance(value, tuple):
                value = tuple(known.setdefault(part, part) for part in value)
            self.__dict__[name] = known.setdefault(value, value)
        return self

    def packed(self) -> dict[str, Any]:
        """Plain values, which are quicker to store and to restore than the record."""
        return self.__dict__ | {"images": [*map(str, self.images)]}

    @classmethod
    def unpacked(cls, values: dict[str, Any]) -> Self:
        """The record of which these are the `packed` values; they are not checked again, and become its own."""
        record = cls.__new__(cls)
        values["images"] = tuple(map(_path, values["images"]))
        record.__setstate__(
            {
                "__dict__": values,
                "__pydantic_extra__": None,
                "__pydantic_fields_set__": _NONE_GIVEN,
                "__pydantic_private__": None,
            }
        )
        return record

    @property
    def is_open(self) -> bool:
        """Whether the answer is a text of one's own and not one of several options."""
        return not self.options

    @property
    def is_yes_no(self) -> bool:
        """Whether this is an open question whose right answer is yes or no, in any dress ("Yes ", "no.")."""
        return self.is_open and normalise_answer(self.answer) in ("yes", "no")

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters in use, ("A", "B", …); none of an open question."""
        return tuple(LETTERS[: len(self.options)])

    @property
    def gold(self) -> str:
        """Text of the right option, or of the right answer."""
        return self.answer if self.is_open else self.options[LETTERS.index(self.answer)]

    @property
    def right_letters(self) -> tuple[str, ...]:
        """Letters whose text equals the gold text up to case and white space (some public items repeat an option).

        None of an open question.
        """
        gold = normalise_option(self.gold)
        return tuple(
            letter
            for letter, option in zip(self.letters, self.options, strict=True)
            if normalise_option(option) == gold
        )

    @property
    def chance(self) -> float | None:
        """Expected accuracy of a uniform guess, in [0, 1]: over the options, or 0.5 of an open question that is
        answered by yes or no. Undefined (None) of any other open question.
        """
        if self.is_open:
            return 0.5 if self.is_yes_no else None
        return len(self.right_letters) / len(self.options)


@lru_cache(maxsize=1 << 12)  # neighbours are about one image, and a path takes longer to read than all the rest
def _path(text: str) -> Path:
    return Path(text)


@lru_cache(maxsize=65536)  # options come back, in their order and in others
def normalise_option(text: str) -> str:
    """Case-folded text with single spaces: two options that agree in this are the same option."""
    return " ".join(text.casefold().split())


_SPELT_SIGNS = {"+/-": "±", ">=": "≥", "<=": "≤", "≧": "≥", "≦": "≤"}
_DASH = r"[-\u2010\u2011\u2013]"
_MINUS = re.compile(
    rf"(?<=\w){_DASH}(?![\w-])|(?<=\w\s){_DASH}(?![-\s]*\w)"  # ER-, and "ER -" where no word follows
    rf"|(?<=\(){_DASH}(?=\))|(?<!\w){_DASH}(?=\.?\d)"  # (-), and -5
)
"""Dashes that say minus: others join words ("T2-weighted", "3-5") or part them."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+|[+<>≤≥±%]|(?<!\w)−|−(?!\w)")


def words_and_signs(text: str) -> list[str]:
    """Words of a text, single Chinese or Japanese characters, and the signs that change what it says: + − ± < > ≤ ≥ %.

    Example:
        words_and_signs("ER-, T2-weighted >=3") == ["ER", "−", "T2", "weighted", "≥", "3"]
    """
    for spelt, sign in _SPELT_SIGNS.items():
        text = text.replace(spelt, sign)
    return _WORD.findall(_MINUS.sub("−", text))


def plain(text: str) -> str:
    """Case-folded `words_and_signs` with single spaces: "ER+" is not "ER-", and "Hepatitis A" keeps its "A"."""
    return " ".join(words_and_signs(text.casefold()))


def normalise_answer(text: str) -> str:
    """An open answer as it is compared: compatible characters made one (NFKC), case-folded `words_and_signs` with
    single spaces between, no other punctuation, and no English article before a word or a comparison.

    After the normalisation of SQuAD (arXiv:1606.05250), which deletes punctuation: here it parts words, so that
    "T2-weighted" is "T2 weighted". Of its articles "Hepatitis A" and "A+" (blood) have none.
    """
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = words_and_signs(plain)
    kept = [
        word
        for word, following in pairwise([*words, ""])
        if word not in ("a", "an", "the") or following in ("", "+", "−", "±", "%")
    ]
    return " ".join(kept or plain.split())


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


def read_json(path: Path) -> Any:
    """What stands in a JSON file that medr1 keeps for its own going on.

    Raises:
        MedR1Error: it is damaged, by a failing disk or a copy that broke off: we write it whole or not at all.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedR1Error(f"{path}: is damaged; restore it, or delete it and run the same command again") from error


def resume_jsonl(path: Path, keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """Rows by their "key" that a former run left in a file, which may not exist; a torn last line is cut off it.

    Raises:
        MedR1Error: a row is none of those that this run would write.
    """
    rows = {row["key"]: row for row in read_jsonl(path)} if path.exists() else {}
    if foreign := rows.keys() - set(keys):
        raise MedR1Error(f"{path}: holds {len(foreign)} rows of another model, seed or data; name another folder")
    if rows:
        write_jsonl(path, rows.values())
    return rows


def to_json(value: Any, **settings: Any) -> str:
    """JSON as the standard has it, for any reader: a number that is not finite, which JSON cannot hold, is null.

    Args:
        settings: of `json.dumps`.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **settings)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **settings)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSON-lines file and force them to disk: all of them, or on a full disk none.

    Raises:
        MedR1Error: the disk is full, the folder cannot be written, or a row names what is not UTF-8.
    """
    content = _utf8("".join(to_json(row) + "\n" for row in rows), path)
    size = path.stat().st_size if path.exists() else 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise MedR1Error(f"{path}: cannot be written ({error.strerror}); free space and run again") from error


def _utf8(text: str, path: Path) -> bytes:
    """The text as it is written. Readers refuse data that are not UTF-8; what is not is a name in the file system."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 40) : error.end + 20])
        raise MedR1Error(
            f"{path}: cannot be written, since it names a file or folder that is not UTF-8, near {near}; rename that"
            " and run again"
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """A folder to fill within the block. What is broken off leaves nothing in it, so that the same command can be given
    again.

    Raises:
        MedR1Error: it holds something already, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MedR1Error(f"{out}: holds something already; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for place in out.iterdir() if out.is_dir() else ():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        if isinstance(error, OSError):
            raise MedR1Error(f"{out}: cannot be written ({error.strerror}); free space and run again") from error
        raise


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON-lines file anew, whole or not at all; raises as `write_atomic`."""
    write_atomic(path, "".join(to_json(row) + "\n" for row in rows))


def write_atomic(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file (text as UTF-8, whole or in pieces) so that a reader sees the old or the new content, never a half.

    Raises:
        MedR1Error: the disk is full, the folder cannot be written, or the content names what is not UTF-8.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                pieces = [content] if isinstance(content, str | bytes) else content
                file.writelines(_utf8(piece, path) if isinstance(piece, str) else piece for piece in pieces)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it private; results are for everybody who may read the folder
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be written ({error.strerror}); free space and run again") from error
