"""What is in a data set and what is wrong with it, before anything is trained on it."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from medr1.datasets import is_omnimedvqa, load_records
from medr1.records import Record, normalise_option

NUM_EXAMPLES = 5
"""Examples named for each finding."""


def check_data(path: Path | str) -> dict[str, Any]:
    """Counts and findings for a data set, ready for JSON.

    Counts: records, images, missing_images (Med-R1 split files come without images; for OmniMedVQA a missing
    one is an error), groups, by_modality, by_question_type, by_source, by_num_options, by_answer,
    licence_by_source, chance (mean expected accuracy of a uniform guess), distinct_questions (stems).

    Findings, each {"num", "examples"}: duplicate_options (two options of a record read the same),
    duplicate_questions (image and stem of another record), duplicate_images (same bytes under several paths)
    and of them duplicate_images_across_groups, which a split by group cannot keep together.

    train_test_overlap, for each pair of Med-R1 files: the test questions, those whose image is also in train,
    and those whose image and stem are.

    Raises:
        MedR1Error: as `load_records`.
    """
    path = Path(path)
    records = load_records(path, check_images=is_omnimedvqa(path))
    images = sorted({image for record in records for image in record.images})
    present = [image for image in images if os.path.isfile(image)]
    group_of = {image: record.group for record in records for image in record.images}
    copies = _copies(present)
    asked = Counter(_asked(record) for record in records)
    return {
        "records": len(records),
        "images": len(images),
        "missing_images": len(images) - len(present),
        "groups": len({record.group for record in records}),
        "by_modality": _count(records, lambda record: record.modality or "not said"),
        "by_question_type": _count(records, lambda record: record.question_type or "not said"),
        "by_source": _count(records, lambda record: record.source),
        "by_num_options": _count(records, lambda record: str(len(record.options))),
        "by_answer": _count(records, lambda record: record.answer),
        "licence_by_source": {record.source: record.licence for record in records},
        "chance": sum(record.chance for record in records) / len(records),
        "distinct_questions": len({record.question for record in records}),
        "duplicate_options": _finding(
            record.id for record in records if len(set(map(normalise_option, record.options))) < len(record.options)
        ),
        "duplicate_questions": _finding(record.id for record in records if asked[_asked(record)] > 1),
        "duplicate_images": _finding([str(image) for image in same] for same in copies),
        "duplicate_images_across_groups": _finding(
            [str(image) for image in same] for same in copies if len({group_of[image] for image in same}) > 1
        ),
        "train_test_overlap": _train_test_overlap(records),
    }


def _asked(record: Record) -> tuple[Any, ...]:
    return (record.images, record.question)


def _count(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, int]:
    return dict(sorted(Counter(map(key, records)).items()))


def _finding(found: Iterable[Any]) -> dict[str, Any]:
    everything = list(found)
    return {"num": len(everything), "examples": everything[:NUM_EXAMPLES]}


def _copies(images: Sequence[Path]) -> list[list[Path]]:
    """Sets of files with the same bytes. Only files of the same size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for image in images:
        by_size[image.stat().st_size].append(image)
    by_hash: dict[str, list[Path]] = defaultdict(list)
    for same_size in by_size.values():
        if len(same_size) > 1:
            for image in same_size:
                by_hash[hashlib.sha256(image.read_bytes()).hexdigest()].append(image)
    return [same for same in by_hash.values() if len(same) > 1]


def _train_test_overlap(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """For each "<name>_test" file beside a "<name>_train" file of Med-R1, told by the records' ids."""
    by_file: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_file[record.id.rpartition("/")[0]].append(record)
    overlap = {}
    for file, test in by_file.items():
        name = file.removesuffix("_test")
        train = by_file.get(f"{name}_train")
        if name == file or not train:
            continue
        train_images = {image for record in train for image in record.images}
        train_asked = set(map(_asked, train))
        overlap[name] = {
            "test_questions": len(test),
            "image_in_train": sum(not train_images.isdisjoint(record.images) for record in test),
            "image_and_stem_in_train": sum(_asked(record) in train_asked for record in test),
        }
    return overlap
