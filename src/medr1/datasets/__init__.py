"""Readers: one call, `load_records`, for every supported layout of questions and images."""

import os
from collections.abc import Sequence
from pathlib import Path

from medr1.datasets.medr1_splits import read_medr1_splits, split_files
from medr1.datasets.omnimedvqa import read_omnimedvqa
from medr1.datasets.rows import canonical_modality, canonical_question_type, refuse
from medr1.errors import MedR1Error
from medr1.images import file_of
from medr1.records import Record

__all__ = ["is_omnimedvqa", "load_records", "require_images", "select_records"]


def is_omnimedvqa(path: Path) -> bool:
    """Whether a folder has OmniMedVQA's layout."""
    return (path / "QA_information").is_dir()


def load_records(
    path: Path | str,
    *,
    modalities: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    check_images: bool = True,
    image_root: Path | str | None = None,
) -> list[Record]:
    """Read all questions of a data set, in the order of its files.

    Args:
        path: a folder with QA_information (OmniMedVQA), or a Med-R1 split file or a folder of them.
        modalities: keep these only, in any known spelling ("MR", "x-ray"); None keeps all.
        question_types: keep these only; None keeps all.
        sources: keep these only, spelt as in the data; None keeps all.
        check_images: demand that the image files of the kept records exist.
        image_root: for Med-R1 split files, the folder that holds Images/ (and perhaps groups.csv);
            None is the folder given, or the file's folder.

    Raises:
        MedR1Error: the path has no known layout, a file or row is bad (all rows are read; the first bad one
            is named with the number of all), a filter is unknown or keeps nothing, or an image is missing.
    """
    records = _read(Path(path), None if image_root is None else Path(image_root))
    records = select_records(records, modalities=modalities, question_types=question_types, sources=sources)
    if check_images:
        require_images(records)
    return records


def select_records(
    records: Sequence[Record],
    *,
    modalities: Sequence[str] | None = None,
    question_types: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
) -> list[Record]:
    """The records that pass the filters, see `load_records`.

    Raises:
        MedR1Error: a filter is unknown, or names what no record has.
    """
    wanted = {
        "modality": _wanted("modality", modalities),
        "question_type": _wanted("question type", question_types),
        "source": _wanted("source", sources),
    }
    selected = list(records)
    for field, values in wanted.items():
        if values is None:
            continue
        present = {getattr(record, field) for record in selected}
        if absent := [value for value in values if value not in present]:
            raise MedR1Error(
                f"no question with {field.replace('_', ' ')} {absent[0]!r} is left; "
                f"present: {', '.join(sorted(filter(None, present))) or 'none (the files do not say)'}"
            )
        selected = [record for record in selected if getattr(record, field) in values]
    return selected


def require_images(records: Sequence[Record]) -> None:
    """Raise MedR1Error, naming the first and the number of all, if image files of these records do not exist."""
    refuse(
        [
            f"{image}: no such image, wanted by record {record.id}; add the file or leave its source out"
            for record in records
            for image in record.images
            if not os.path.isfile(file_of(image))  # unlike Path.is_file it also says no to a name too long
        ]
    )


def _read(path: Path, image_root: Path | None) -> list[Record]:
    if not path.exists():
        raise MedR1Error(f"{path}: no such file or folder; give a folder with QA_information or a split file")
    if is_omnimedvqa(path):
        if image_root is not None:
            raise MedR1Error(f"{path}: image_root is for split files only; images lie beside QA_information here")
        records = read_omnimedvqa(path)
    elif path.suffix == ".json" or split_files(path):
        records = read_medr1_splits(path, image_root)
    else:
        raise MedR1Error(f"{path}: neither QA_information nor *_train.json or *_test.json in it")
    if not records:
        raise MedR1Error(f"{path}: no questions in it")
    return records


def _wanted(name: str, values: Sequence[str] | None) -> list[str] | None:
    """A filter in canonical spelling."""
    if values is None:
        return None
    if not values or isinstance(values, str):
        raise MedR1Error(f"the {name} filter is {values!r}; give a list of one or more, or leave it out")
    canonical = {"modality": canonical_modality, "question type": canonical_question_type}.get(name, str)
    try:
        return [canonical(value) for value in values]
    except ValueError as error:
        raise MedR1Error(f"{name} filter: {error}") from error
