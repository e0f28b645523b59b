"""What is in a data set and what is wrong with it, before anything is trained on it: the leak report.

    medr1 data check OmniMedVQA --out check

counts, looks for copies among the images (the same bytes, the same pixels, nearly the same look), compares the
published parts and our own, and names defects of questions, options and spellings. They are findings, not
errors: rows that the reader refuses are listed, and an error is only where all of them are.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medr1.data.datasets import load_records, num_refused
from medr1.data.kept import taken
from medr1.data.records import Record
from medr1.evaluation.metrics import NOT_STATED
from medr1.report.checks.images import image_findings, look_at
from medr1.report.checks.parts import asked_apart, by_file, compare_parts, own_parts, published_parts
from medr1.report.checks.texts import answers, letters, mean_chance, options, questions, spellings

OWN_SPLIT = "medr1's own split"
LISTED = 1000
"""Items listed for a finding; its number is of all."""


def check_data(path: Path | str, *, image_root: Path | None = None, language: str = "en") -> dict[str, Any]:
    """Counts and findings for a data set, ready for JSON. A finding is {"num", "listed"}.

    Args:
        path, image_root, language: as `load_records` takes them.

    Returns:
        path, folder (which image names start from), records, refused (a line for each row or file that was left out),
        groups (those that share a patient, lesion or study are one; the split also joins those that share an image),
        open (number of open questions), chance (mean accuracy of a guess at multiple choice; None without any).
        counts: of records by modality, question_type, num_options.
        sources: of each, its records, images and licences.
        images: `image_findings`. questions, options, spellings, letters (None without multiple
            choice), answers: see `medr1.report.checks.texts`.
        parts: for each published pair of files, and last for our own split, its name and `compare_parts`.

    Raises:
        MedR1Error: as `load_records`; refused rows, missing and undecodable images are findings.
    """
    refused: list[str] = []
    tables: list[tuple[str, int]] = []
    records = load_records(
        path, check_images=False, image_root=image_root, language=language, refused=refused, files=tables
    )
    path = Path(path)
    choice = taken(records, (place for place, record in enumerate(records) if not record.is_open))
    folder = image_root or (path if path.is_dir() else path.parent)
    files = by_file(records, tables) or {"": records}  # OmniMedVQA's are of no split
    pictures = look_at(sorted({image for record in records for image in record.images}))
    parts = published_parts(files)
    if own := own_parts(records):
        parts[OWN_SPLIT] = own

    return {
        "path": str(path),
        "folder": str(folder),
        "records": len(records),
        "refused": {"num": len(refused), "said": num_refused(refused, len(records)), "listed": refused[:LISTED]},
        "groups": len({record.group for record in records}),
        "open": len(records) - len(choice),
        "chance": mean_chance(choice) if choice else None,
        "counts": {
            "modality": _count(record.modality or NOT_STATED for record in records),
            "question_type": _count(record.question_type or NOT_STATED for record in records),
            "num_options": _count(str(len(record.options) or "open") for record in records),
        },
        "sources": _sources(records),
        "images": _listed(image_findings(pictures, records, own, folder)),
        "questions": _listed(questions(asked_apart(files), pictures.content)),
        "options": _listed(options(records)),
        "spellings": _listed(spellings(path)),
        "letters": letters(choice) if choice else None,
        "answers": answers(records),
        "parts": [{"name": name, **compare_parts(*both, pictures)} for name, both in parts.items()],
    }


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _sources(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    images: dict[str, set[Path]] = defaultdict(set)
    licences: dict[str, set[str]] = defaultdict(set)
    for record in records:
        images[record.source].update(record.images)
        licences[record.source].add(record.licence)
    return {
        source: {"records": num, "images": len(images[source]), "licences": sorted(licences[source])}
        for source, num in _count(record.source for record in records).items()
    }


def _listed(findings: Mapping[str, Any]) -> dict[str, Any]:
    """Each list as {"num", "listed"}, of which LISTED items are kept; other values as they are."""
    return {
        name: {"num": len(found), "listed": found[:LISTED]} if isinstance(found, list) else found
        for name, found in findings.items()
    }
