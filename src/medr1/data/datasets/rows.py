"""What every reader shares: spellings of modality and question type, safe image paths, one line for bad rows.

A reader turns one row of a table into a `Record` and raises `ValueError` where it cannot; `read_records` runs
it over all rows of all tables and lists the rows that it refused. No row is ever left out silently.
"""

import csv
import io
import os
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from medr1.data.datasets.tables import Table, is_missing, read_text
from medr1.data.images import expand_reference, file_of, file_reference, resolve_inside
from medr1.data.kept import code, kept, taken
from medr1.data.records import LETTERS, MODALITIES, QUESTION_TYPES, Record, normalise_option
from medr1.errors import MedR1Error

# Keys are lower-case letters only, without what follows an opening bracket: the public files spell
# "CT(Computed Tomography)", "MR (Mag-netic Resonance Imaging)" and "OCT (Optical Coherence Tomography" (never
# closed).
_MODALITY_OF_KEY = {
    "ct": "CT",
    "mr": "MRI",
    "mri": "MRI",
    "ultrasound": "Ultrasound",
    "us": "Ultrasound",
    "dermoscopy": "Dermoscopy",
    "fundus": "Fundus Photography",
    "fundusphotography": "Fundus Photography",
    "oct": "OCT",
    "microscopy": "Microscopy",
    "microscopyimages": "Microscopy",
    "xray": "X-Ray",
}


def _key(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.partition("(")[0].casefold())


_TYPE_OF_KEY = {_key(question_type): question_type for question_type in QUESTION_TYPES}


def canonical_modality(text: str) -> str:
    """The member of MODALITIES that a spelling such as "MR (Mag-netic Resonance Imaging)" or "x-ray" means.

    Raises:
        ValueError: the spelling is not known.
    """
    if _key(text) not in _MODALITY_OF_KEY:
        raise ValueError(f"unknown modality {text!r}, expected one of {', '.join(MODALITIES)}")
    return _MODALITY_OF_KEY[_key(text)]


def canonical_question_type(text: str) -> str:
    """The member of QUESTION_TYPES that a spelling such as "disease_diagnosis" means.

    Raises:
        ValueError: the spelling is not known.
    """
    if _key(text) not in _TYPE_OF_KEY:
        raise ValueError(f"unknown question type {text!r}, expected one of {', '.join(QUESTION_TYPES)}")
    return _TYPE_OF_KEY[_key(text)]


def text_field(row: dict[str, Any], key: str) -> str:
    """The stripped text under a key.

    Raises:
        ValueError: the key is absent, or its value is not a text that UTF-8 can hold.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is missing" if value is None else f"{key!r} is not a text but {value!r}")
    value.encode()  # a lone surrogate, which JSON can hold, raises here rather than when results are written
    return value.strip()


def letter_of(gold: str, options: Sequence[str]) -> str:
    """Letter of the option whose text is `gold`: the same text, else the same up to case and white space.

    Raises:
        ValueError: no option has that text, or more than one.
    """
    found = [letter for letter, option in zip(LETTERS, options, strict=False) if option == gold]
    if not found:
        wanted = normalise_option(gold)
        found = [letter for letter, option in zip(LETTERS, options, strict=False) if normalise_option(option) == wanted]
    if not found:
        raise ValueError(f"the answer {gold!r} is not among the options {list(options)}")
    if len(found) > 1:
        raise ValueError(f"duplicate options {' and '.join(found)} both read as the answer, {gold!r}; remove one")
    return found[0]


_OWN_LETTER = re.compile(
    r"""\s* (?: (?:option|choice) \s+ )?
        (?: [(\[（] ([A-Za-zＡ-Ｚａ-ｚ]|\d{1,2}) [)\]）] [.:]?   # (A) x, [1] x
          | ([A-Za-zＡ-Ｚａ-ｚ]) [.)\]:、．）：]                # A. x, A)x, a: x, A、x
          | (\d{1,2}) (?: [.)\]:] (?=\s) | [、．）：])        # 1. x, but not 1.5
          | ([A-Za-z]) \s+ [-–—] (?=\s)                     # A - x, but not A-mode
        ) \s* (?=\S)""",
    re.VERBOSE | re.IGNORECASE,
)

_SPECIES = re.compile(r"\s*[A-Z]\. ?([a-z]{3,})( [a-z.]+)?\s*")
"""What reads as a species with its genus shortened, such as "A. fumigatus"; "A. naevus" does too."""
_EPITHETS = frozenset(
    re.findall(
        r"\w+",
        """
        abortus aegypti aeruginosa africanum albicans albopictus anthracis aureus auris baumannii botulinum
        braziliensis burgdorferi burnetii capsulatum castellanii cayetanensis cepacia cereus chaffeensis cloacae
        coli dermatitidis difficile diphtheriae ducreyi duodenale epidermidis faecalis faecium flavus floccosum
        folliculorum fragilis freundii fumigatus gambiae gattii glabrata granulosus haematobium henselae
        hepatica histolytica hominis hydrophila immitis influenzae israelii jejuni krusei lamblia latum
        lumbricoides malayi medinensis melitensis microti monocytogenes multilocularis necrophorum neoformans
        nidulans niger nucleatum parapsilosis parvum pedrosoi perfringens pertussis phagocytophilum pneumoniae
        posadasii pseudomallei psittaci pylori quintana recurrentis solani subtilis terreus tetani trachomatis
        tropicalis tularensis vaginalis vermicularis
        """,
    )
)
"""Second halves of the names of germs and parasites that medicine asks about, of genera from A on."""


def plain_options(given: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Options without letters or numbers of their own, which a prompt gives them anew; and these letters.

    They are taken off only where all options carry one, and these are A, B, … (or 1, 2, …) of as many, in any order:
    "A. fumigatus" among other names stays whole. So it does beside "B. dermatitidis", where genera shortened to a
    letter happen to be these letters: where all options read as species and one is known to be one. "" where none
    were taken off.

    Example:
        plain_options(["A. Naevus", "B. Melanoma"]) == (("Naevus", "Melanoma"), "AB")
    """
    species = [_SPECIES.fullmatch(option) for option in given]
    if all(species) and any(one[1] in _EPITHETS for one in species if one):
        return tuple(given), ""
    marks = [_OWN_LETTER.match(option) for option in given]
    found = [_letter(mark) for mark in marks if mark]
    if all(one.isdigit() for one in found):
        found = [LETTERS[int(one) - 1] if 0 < int(one) <= len(LETTERS) else "" for one in found]
    if not given or "".join(sorted(found)) != LETTERS[: len(given)]:
        return tuple(given), ""
    return tuple(option[mark.end() :].strip() for option, mark in zip(given, marks, strict=True) if mark), "".join(
        found
    )


def _letter(mark: re.Match[str]) -> str:
    """The letter or number of a match of _OWN_LETTER, as A to Z or in digits."""
    return unicodedata.normalize("NFKC", next(filter(None, mark.groups()))).upper()


def options_in_order(given: Sequence[str]) -> tuple[str, ...]:
    """`plain_options` where the right one is named by its place.

    Raises:
        ValueError: the options' own letters say another order.
    """
    options, own = plain_options(given)
    if own not in ("", LETTERS[: len(given)]):
        raise ValueError(f"the options' own letters are {', '.join(own)}, in another order than their places; mend one")
    return options


def options_and_letter(given: Sequence[str], answer: str) -> tuple[tuple[str, ...], str]:
    """`plain_options`, and the letter of the right one, which is given as `answer_letter` reads it.

    Raises:
        ValueError: as `answer_letter`; or the options' own letters or numbers are out of order and the answer is one.
    """
    options, own = plain_options(given)
    if own:
        if normalise_option(answer) in map(normalise_option, given):
            return options, letter_of(answer, given)
        number = re.fullmatch(r"\(?(\d{1,2})[).]?", answer)
        if own != LETTERS[: len(given)] and (number or letter_named(answer, len(given))):
            raise ValueError(f"the options' own letters are {', '.join(own)}, the answer is {answer!r}: write its text")
        if number and given[0].lstrip(" ([")[:1].isdigit() and 0 < int(number[1]) <= len(given):
            answer = LETTERS[int(number[1]) - 1]
    return options, answer_letter(answer, options)


def letter_named(answer: str, num_options: int) -> str:
    """The letter that an answer is: "B", "b", "B)", "B.", "(B)"; "" where it is none of these options'."""
    match = re.fullmatch(r"\(([A-Z])\)|([A-Z])[).]?", answer) or re.fullmatch(r"()([a-z])", answer)
    letter = (match[1] or match[2]).upper() if match else ""
    return letter if letter and letter in LETTERS[:num_options] else ""


def answer_letter(answer: str, options: tuple[str, ...]) -> str:
    """Letter of the right option, given as a letter, as the option's text, or as both ("B. Melanoma").

    Raises:
        ValueError: it is none of these, or it is the text of one option and the letter of another.
    """
    letter = letter_named(answer, len(options))
    texts = [normalise_option(option) for option in options]
    if letter:
        if normalise_option(answer) in texts and letter_of(answer, options) != letter:
            raise ValueError(
                f"the answer {answer!r} is the letter of one option and the text of another; write ({letter})"
            )
        return letter
    mark = _OWN_LETTER.match(answer)
    if normalise_option(answer) in texts or mark is None or normalise_option(answer[mark.end() :]) not in texts:
        return letter_of(answer, options)
    own = _letter(mark)
    if own.isdigit():
        own = LETTERS[int(own) - 1] if 0 < int(own) <= len(options) else ""
    if own not in LETTERS[: len(options)] or texts[LETTERS.index(own)] != normalise_option(answer[mark.end() :]):
        raise ValueError(f"the answer {answer!r} has the letter of one option and the text of another; mend one")
    return own


LOCATED = 20_000
"""Images whose paths are remembered at most."""


class ImageFolder:
    """The folder that image paths are relative to, and its groups.csv (image_path,group) where there is one.

    Args:
        root: None where a table has no folder (one of the hub): every path in it is then refused.

    Raises:
        MedR1Error: groups.csv lacks a column or a value, or gives one image two groups.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._located: dict[str, Path] = {}
        self._groups_file = root / "groups.csv" if root else Path()
        self._groups = _read_groups(self._groups_file) if self._groups_file.is_file() else None

    def locate(self, relative: str) -> Path:
        """Path of an image (or reference, see `medr1.data.images`), which need not exist.

        Raises:
            ValueError: the path is empty or absolute, or leads out of the folder by ".." or a symbolic link.
        """
        if self.root is None:
            raise ValueError(f"image {relative!r} is a file of its own; download the images and give --image-root")
        if relative not in self._located:  # many questions are about one image
            if len(self._located) == LOCATED:
                self._located.clear()
            self._located[relative] = resolve_inside(self.root, relative)
        return self._located[relative]

    def find(self, name: str, *folders: str) -> Path:
        """Path of an image that lies in the root or in one of these folders of it; in the first where it is nowhere.

        Raises:
            ValueError: as `locate`.
        """
        places = [self.locate(relative) for relative in (name, *(f"{folder}/{name}" for folder in folders))]
        return next((place for place in places if os.path.isfile(place)), places[1])

    def expand(self, relative: str) -> list[Path]:
        """Paths of the images that a reference names: several where it asks for several slices or frames. Of a folder
        they are the files of its slices.

        Raises:
            ValueError: as `locate`; or the reference asks for what the file does not have.
        """
        path = self.locate(relative)
        is_folder = os.path.isdir(file_of(path))
        if "#" not in relative and not is_folder:
            return [path]
        try:
            found = [file_reference(one) for one in expand_reference(path)]
        except MedR1Error as error:
            raise ValueError(str(error)) from error
        # A folder's files may be links that lead out of the root.
        return [self.locate(os.path.relpath(one, self.root)) for one in found] if is_folder else found

    def groups(self, *images: str) -> tuple[str, ...]:
        """Groups of images by their lines in groups.csv; none without that file.

        Raises:
            ValueError: groups.csv is there and does not list an image.
        """
        if self._groups is None:
            return ()
        if unlisted := [image for image in images if image not in self._groups]:
            raise ValueError(f"image {unlisted[0]!r} is not in {self._groups_file}; add a line for it")
        return tuple(dict.fromkeys(self._groups[image] for image in images))


def _read_groups(path: Path) -> dict[str, str]:
    groups: dict[str, str] = {}
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if not {"image_path", "group"} <= set(reader.fieldnames or ()):
        raise MedR1Error(f"{path}: the first line must name the columns image_path and group")
    for row in reader:
        image, group = ((row[name] or "").strip() for name in ("image_path", "group"))
        if is_missing(image) or is_missing(group, names=True):
            raise MedR1Error(f"{path}: line {reader.line_num} lacks an image path or a group; fill it in")
        if groups.setdefault(image, group) != group:
            raise MedR1Error(f"{path}: line {reader.line_num} gives {image!r} a second group; keep one")
    return groups


class NotAsked(ValueError):
    """A row that is sound and filtered out (another language): told among the refused rows, never an error."""


def read_records(
    tables: Iterable[Table],
    read: Callable[[Table, int, dict[str, Any]], Record],
    refused: list[str] | None = None,
    files: list[tuple[str, int]] | None = None,
) -> Sequence[Record]:
    """All rows of all tables as records. `read(table, number, row)` makes one, with rows counted from 1.

    An id that each table has once, about something else, gets the table's stem before it but in the first: "test/1".

    Args:
        refused: gets one line for each row that is left out; None: no bad row is tolerated.
        files: gets the stem of each table and how many of the records are of it, in their order.

    Raises:
        MedR1Error: a table cannot be read, or no row is good, or rows are bad and `refused` is None: names the first
            bad one, with the number of all.
    """
    bad: list[tuple[int, str]] = []
    """With the row's number among those of all tables."""
    not_asked: list[str] = []
    begins: list[tuple[int, str, str]] = []
    """Of each table: the number of rows before it, its name and its stem."""
    numbers, codes = array("Q"), array("Q")
    """Of each record: its row's number, and what stands for its id."""

    def good() -> Iterator[Record]:
        number = 0
        for table in tables:
            begins.append((number, table.name, table.stem))
            for row in table.rows:
                number += 1
                try:
                    if isinstance(row, ValueError):
                        raise row
                    if not isinstance(row, dict):
                        raise ValueError(f"not an object but {row!r:.40}")
                    record = read(table, number - begins[-1][0], row)
                except NotAsked as reason:
                    not_asked.append(f"{place(number)}: {reason}")
                except ValueError as error:
                    bad.append((number, _reason(error)))
                else:
                    numbers.append(number)
                    codes.append(code(record.id))
                    yield record

    def table_of(number: int) -> int:
        return bisect_left(begins, (number,)) - 1

    def place(number: int) -> str:
        before, name, _ = begins[table_of(number)]
        return f"{name}: row {number - before}"

    records = kept(good())
    repeated = _repeated(records, codes)
    met: dict[int, list[int]] = {}
    """Of the place of each id that comes again: the tables of all that have it."""
    for again, first in repeated.items():
        met.setdefault(first, [table_of(numbers[first])]).append(table_of(numbers[again]))
    elsewhere = {
        again: f"{begins[table_of(numbers[again])][2]}/{records[again].id}"
        for again, first in repeated.items()
        if len({*met[first]}) == len(met[first]) and _asked(records[again]) != _asked(records[first])
    }
    if elsewhere:
        for again, name in elsewhere.items():
            codes[again] = code(name)
        renamed = (elsewhere.get(number) for number in range(len(records)))
        records = kept(
            record.model_copy(update={"id": name}) if name else record
            for record, name in zip(records, renamed, strict=True)
        )
        repeated = _repeated(records, codes)
    for again, first in repeated.items():
        reason = f"id {records[again].id!r} was used before, at {place(numbers[first])}; make ids unique"
        bad.append((numbers[again], reason))
    if repeated:
        whole = [number for number in range(len(records)) if number not in repeated]
        records, numbers = taken(records, whole), array("Q", (numbers[number] for number in whole))
    if files is not None:
        ends = [bisect_right(numbers, before) for before, _, _ in begins[1:]] + [len(numbers)]
        sizes = (end - start for start, end in pairwise([0, *ends]))
        files += zip((stem for _, _, stem in begins), sizes, strict=True)
    lines = [f"{place(number)}: {reason}" for number, reason in sorted(bad)]
    if refused is None or not records:
        refuse(lines or (not_asked if not records else []))
    else:
        refused += [*lines, *not_asked]
    return records


def _asked(record: Record) -> tuple[Any, ...]:
    """What a row asks and says, by which a row that stands in two tables is known."""
    return record.images, record.question, record.options, record.answer


def _repeated(records: Sequence[Record], codes: "array[int]") -> dict[int, int]:
    """Places of records whose id one before them has, and the place of the first that has it."""
    values, times = np.unique(np.asarray(codes), return_counts=True)
    alike = np.flatnonzero(np.isin(np.asarray(codes), values[times > 1])).tolist()
    firsts: dict[str, int] = {}
    return {place: first for place in alike if (first := firsts.setdefault(records[place].id, place)) != place}


def refuse(bad: Sequence[str]) -> None:
    """Raise for a list of faults, one line each: the first is told, and how many there are.

    Raises:
        MedR1Error: the list is not empty.
    """
    if bad:
        raise MedR1Error(bad[0] if len(bad) == 1 else f"{bad[0]} (the first of {len(bad)} bad rows)")


def _reason(error: ValueError) -> str:
    """One line for a row's fault; pydantic's own text has several."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
