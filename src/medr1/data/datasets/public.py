"""Readers of the public sets besides OmniMedVQA, each with the set's own field names and traps.

VQA-RAD (the original JSON): a number may be the answer; "NULL" is no case. Questions have no options.
SLAKE: English and Chinese rows in one file. `answer_type` CLOSED is not yes or no alone: the answer decides.
PMC-VQA: options carry their letter ("A: …"), the column of the answer is also spelt "Anwser", and a letter stands
    beside it. `test.csv`, `test_clean.csv` and `test_2.csv` overlap: give one file.
MedXpertQA-MM: the question repeats the choices, which our prompt lists itself; several images an item.
GMAI-MMBench: base64 images in a TSV; 38 modalities, of which those that Record does not know are not stated; the
    test files come without answers.

Modality and question type are None where a set does not say them in our terms. VQA-RAD and PathVQA as republished in
Parquet have the columns of one's own data: `medr1.data.datasets.own`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from medr1.data.datasets.embedded import from_base64, keep_image
from medr1.data.datasets.own import Place, Row, read_own, said
from medr1.data.datasets.rows import NotAsked, answer_letter, canonical_modality, options_in_order, text_field
from medr1.data.datasets.tables import is_missing
from medr1.data.records import LETTERS, Record, normalise_option


@dataclass(frozen=True)
class Layout:
    """What a table of a known set looks like."""

    name: str
    columns: tuple[str, ...]
    """Names that it must have, as `tables.column` gives them; "a|b" takes either."""
    read: Callable[[Row, Place], Record]

    def fits(self, columns: frozenset[str]) -> bool:
        """Whether a table with these columns has this layout."""
        return all(not columns.isdisjoint(name.split("|")) for name in self.columns)


def _vqa_rad(row: Row, place: Place) -> Record:
    image, case = text_field(row, "image name"), row.get("image case url")
    cases = (case,) if isinstance(case, str) and case != "NULL" else ()
    return Record(
        id=place.id,
        images=(place.folder.find(image, "VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "images"),),
        question=text_field(row, "question"),
        options=(),
        answer=said(row, "answer"),
        modality=None,
        question_type=None,
        source="VQA-RAD",
        group=cases[0] if cases else image,
        groups=cases,
        licence="CC0-1.0",
    )


_SLAKE_TYPES = {
    "modality": "Modality Recognition",
    "organ": "Anatomy Identification",
    "abnormality": "Disease Diagnosis",
}
"""SLAKE's other kinds of content (position, plane, size, colour, knowledge graph …) are none of our question types."""


def _slake(row: Row, place: Place) -> Record:
    language = text_field(row, "q lang")
    if place.language not in ("all", language):
        raise NotAsked(f"its language is {language!r}, not {place.language!r} (data.language)")
    image = text_field(row, "img name")
    return Record(
        id=place.id,
        images=(place.folder.find(image, "imgs"),),
        question=text_field(row, "question"),
        options=(),
        answer=said(row, "answer"),
        modality=canonical_modality(text_field(row, "modality")),
        question_type=_SLAKE_TYPES.get(str(row.get("content type", "")).casefold()),
        source="SLAKE",
        group=image.partition("/")[0],
        licence="CC BY 4.0",
    )


def _pmc_vqa(row: Row, place: Place) -> Record:
    image = text_field(row, "figure path")
    letters = [letter for letter in LETTERS if f"choice {letter.lower()}" in row]
    given = [_without_letter(text_field(row, f"choice {letter.lower()}"), letter) for letter in letters]
    options = options_in_order(given)
    if letters != list(LETTERS[: len(letters)]):
        raise ValueError(f"choices {', '.join(letters)} are not A, B, … without a gap")
    answer = said(row, "answer") if "answer" in row else said(row, "anwser") if "anwser" in row else ""
    label = said(row, "answer label") if "answer label" in row else answer
    if label not in letters:  # a file without labels: the answer is a text, with its letter before it perhaps
        label = answer_letter(_without_letter(answer, answer[:1]), options)
    texts = [normalise_option(option) for option in options]
    text = normalise_option(_without_letter(answer, label))
    if text in texts and text != texts[LETTERS.index(label)]:
        raise ValueError(f"the answer is {answer!r} and its label {label}; mend one")
    return Record(
        id=place.id,
        images=(place.folder.find(image, "images", "figures", "images_2"),),
        question=text_field(row, "question"),
        options=options,
        answer=label,
        modality=None,
        question_type=None,
        source="PMC-VQA",
        group=image.partition("_")[0],  # the article; its figures stay together
        licence="of each article",
    )


def _without_letter(text: str, letter: str) -> str:
    return re.sub(rf"^\s*{re.escape(letter)}\s*:", "", text).strip() if letter and text else text


def _medxpertqa(row: Row, place: Place) -> Record:
    options, images = row.get("options"), row.get("images")
    if not isinstance(options, dict) or not isinstance(images, list) or not images:
        raise ValueError("'options' is no object of letters, or 'images' is no list of names; give the MM part")
    given = {letter: text for letter, text in options.items() if not is_missing(text)}
    if sorted(given) != list(LETTERS[: len(given)]):
        raise ValueError(f"option keys {', '.join(given)} are not A, B, … without a gap")
    texts = options_in_order([text_field(given, letter) for letter in sorted(given)])
    names = [text_field({"images": name}, "images") for name in images]
    return Record(
        id=said(row, "id"),
        images=tuple(place.folder.find(name, "images") for name in names),
        question=_without_choices(text_field(row, "question"), texts),
        options=texts,
        answer=text_field(row, "label"),
        modality=None,
        question_type=None,
        source="MedXpertQA-MM",
        group=names[0],
        groups=(),
        licence="MIT",
    )


def _without_choices(question: str, options: tuple[str, ...]) -> str:
    """The stem of a question that ends with its own list of all these options."""
    match = re.search(r"\s*answer choices\s*:(.*)\Z", question, re.IGNORECASE | re.DOTALL)
    listed = match and all(normalise_option(option) in normalise_option(match[1]) for option in options)
    return question[: match.start()] if match and listed else question


def _gmai(row: Row, place: Place) -> Record:
    if "." in str(row.get("image")):  # base64 has no full stop: a path, and a table of one's own with a row's number
        return read_own(row, place)
    letters = [letter for letter in LETTERS if letter.lower() in row]
    if letters != list(LETTERS[: len(letters)]):
        raise ValueError(f"options {', '.join(letters)} are not A, B, … without a gap")
    if "answer" not in row:
        raise ValueError("'answer' is missing; the published test files have none, use the validation file")
    options = options_in_order([said(row, letter.lower()) for letter in letters])
    path = keep_image(from_base64(text_field(row, "image")))
    try:
        modality = canonical_modality(str(row.get("modality", "")))
    except ValueError:
        modality = None
    return Record(
        id=f"{place.table.stem}/{said(row, 'index')}",
        images=(path,),
        question=text_field(row, "question"),
        options=options,
        answer=text_field(row, "answer"),
        modality=modality,
        question_type=None,
        source="GMAI-MMBench",
        group=path.stem,
        groups=(),
    )


OWN = Layout("your own", ("image|images", "question", "answer"), read_own)
LAYOUTS = (
    Layout("VQA-RAD", ("image name", "question", "answer", "phrase type"), _vqa_rad),
    Layout("SLAKE", ("img name", "question", "answer", "q lang"), _slake),
    Layout("PMC-VQA", ("figure path", "question", "choice a", "choice b"), _pmc_vqa),
    Layout("GMAI-MMBench", ("index", "image", "question", "a", "b"), _gmai),
    OWN,
    Layout("MedXpertQA-MM", ("question", "options", "label", "images"), _medxpertqa),
)
"""The first that fits is taken: your own fits most of those before it, and what has no answer is MedXpertQA's."""


def layout_of(columns: frozenset[str]) -> Layout | None:
    """The layout that a table with these columns has; None where none fits."""
    return next((layout for layout in LAYOUTS if layout.fits(columns)), None)
