"""Readers: one call, `load_records`, for every supported layout of questions and images.

A layout is told by content: a folder QA_information, the column "problem", the columns of a table.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medr1.data.datasets.hub import PREFIX, hub_tables
from medr1.data.datasets.medr1_splits import is_medr1_splits, read_medr1_splits
from medr1.data.datasets.omnimedvqa import read_omnimedvqa
from medr1.data.datasets.own import Place
from medr1.data.datasets.public import LAYOUTS, OWN, Layout, layout_of
from medr1.data.datasets.rows import ImageFolder, canonical_modality, canonical_question_type, read_records, refuse
from medr1.data.datasets.tables import SUFFIXES, NoRows, Table, by_column, read_table, stems_of
from medr1.data.images import file_of, name_of_content, with_contents
from medr1.data.kept import kept, taken
from medr1.data.records import Record
from medr1.data.splits import joined
from medr1.errors import MedR1Error

WHOLE = "the whole file is left out"
"""End of the line for a table that cannot be read."""


def num_refused(refused: Sequence[str], num_records: int) -> str:
    """What the lines of `load_records` left out beside so many records, in words: "1 file and 2 of 50 rows"."""
    num_files = sum(line.endswith(WHOLE) for line in refused)
    num_rows = len(refused) - num_files
    files = f"{num_files:,} file{'' if num_files == 1 else 's'}"
    rows = f"{num_rows:,} of {num_records + num_rows:,} rows"
    return " and ".join(words for num, words in ((num_files, files), (num_rows, rows)) if num)


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
    language: str = "en",
    refused: list[str] | None = None,
    files: list[tuple[str, int]] | None = None,
) -> Sequence[Record]:
    """Read all questions of a data set, in the order of its files.

    Args:
        path: a folder with QA_information (OmniMedVQA); a Med-R1 split file or a folder of them; a table of
            questions or a folder with some, of a set named in `medr1.data.datasets.public` or in the format of
            `medr1.data.datasets.own`; or "hub:OWNER/NAME".
        modalities: keep these only, in any known spelling ("MR", "x-ray"); None keeps all.
        question_types: keep these only; None keeps all.
        sources: keep these only, spelt as in the data; None keeps all.
        check_images: demand that the image files of the kept records exist.
        image_root: the folder that image paths start from (and that perhaps has a groups.csv), but for OmniMedVQA;
            None is the folder given, or the file's folder.
        language: keep rows in this language where rows say theirs (SLAKE); "all" keeps every row.
        refused: gets a line for each row that was left out, as bad or in another language, and for each table of a
            folder that cannot be read or lacks one column; with None the first of them is an error.
        files: gets the short name of each table but OmniMedVQA's, and how many records, before any filter, are of it.

    Raises:
        MedR1Error: the path has no known layout, a file is bad, all rows are bad or, without `refused`, one (all
            rows are read; the first bad one is named with the number of all), a filter is unknown or keeps nothing,
            or an image is missing.
    """
    root = None if image_root is None else Path(image_root)
    records = _grouped(_read(str(path), root, language, refused, files))
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
) -> Sequence[Record]:
    """The records that pass the filters, see `load_records`.

    Raises:
        MedR1Error: a filter is unknown, or names what no record has.
    """
    wanted = {
        "modality": _wanted("modality", modalities),
        "question_type": _wanted("question type", question_types),
        "source": _wanted("source", sources),
    }
    selected = records
    for field, values in wanted.items():
        if values is None:
            continue
        present = {getattr(record, field) for record in selected}
        if absent := [value for value in values if value not in present]:
            raise MedR1Error(
                f"no question with {field.replace('_', ' ')} {absent[0]!r} is left; "
                f"present: {', '.join(sorted(filter(None, present))) or 'none (the files do not say)'}"
            )
        selected = taken(selected, [place for place, record in enumerate(selected) if getattr(record, field) in values])
    return selected


def require_images(records: Iterable[Record]) -> None:
    """Raise MedR1Error, naming the first and the number of all, if image files of these records do not exist."""
    refuse(
        [
            f"{image}: no such image, wanted by record {record.id}; add the file or leave its source out"
            for record in records
            for image in record.images
            if not os.path.isfile(file_of(image))  # unlike Path.is_file it also says no to a name too long
        ]
    )


def question_tables(path: Path) -> tuple[list[tuple[Table, Layout]], list[str]]:
    """The table in a file, or those in a folder that have a known layout: beside each other, else one folder down.

    Returns:
        The tables, and a line for each file beside them that was meant to be one: it cannot be read, or lacks one of
        the columns of one's own data.

    Raises:
        MedR1Error: there is none; the line says what was looked for and what was found.
    """
    found: list[str] = []
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        tables, found, _ = _fitting([path], path.parent, strict=True)
        if tables:
            return tables, []
    for pattern in ("*", "*/*") if path.is_dir() else ():
        files = sorted(file for file in path.glob(pattern) if file.suffix.lower() in SUFFIXES and file.is_file())
        tables, others, meant = _fitting([file for file in files if not file.name.startswith(".")], path)
        if tables:
            return tables, meant
        found += others
    known = "; ".join(f"{layout.name} ({', '.join(layout.columns).replace('|', ' or ')})" for layout in LAYOUTS)
    raise MedR1Error(
        f"{path}: no known layout. Looked for QA_information (OmniMedVQA), *_train.json and *_test.json (Med-R1) and "
        f"a table ({', '.join(SUFFIXES)}) with the columns of {known}. Found {'; '.join(found) or 'none'}"
    )


def _fitting(
    files: Sequence[Path], folder: Path, *, strict: bool = False
) -> tuple[list[tuple[Table, Layout]], list[str], list[str]]:
    """Tables with their layout, a line for each file that has none, and one for each of these that should have."""
    tables, others, meant = [], [], []
    for file in files:
        try:
            table = read_table(file)
        except MedR1Error as error:
            if strict:
                raise
            others.append(str(error))
            meant += [] if isinstance(error, NoRows) else [str(error)]
            continue
        if layout := layout_of(table.columns):
            tables.append((table, layout))
            continue
        columns = ", ".join(sorted(table.columns)[:20]) or "none"
        others.append(f"{file.name} (columns {columns})")
        lacking = [name for name in OWN.columns if table.columns.isdisjoint(name.split("|"))]
        if len(lacking) == 1:
            name = lacking[0].replace("|", " or ")
            meant.append(f"{file}: has no column {name} (columns {columns}); add or rename it")
    stems = stems_of((Path(table.name) for table, _ in tables), folder)
    tables = [(replace(table, stem=stems[Path(table.name)]), layout) for table, layout in tables]
    return tables, others, meant


def _read(
    path: str,
    image_root: Path | None,
    language: str,
    refused: list[str] | None,
    files: list[tuple[str, int]] | None,
) -> Sequence[Record]:
    folder = Path(path)
    if path.startswith(PREFIX):
        tables = hub_tables(path)
        fitting = [(table, layout) for table in tables if (layout := layout_of(table.columns))]
        if not fitting:
            columns = ", ".join(sorted(tables[0].columns)[:20]) if tables else "none"
            raise MedR1Error(f"{path}: no known layout (columns {columns}); convert it to the format of medr1's own")
        records = _read_tables(fitting, ImageFolder(image_root), language, refused, files)
    elif not folder.exists():
        raise MedR1Error(
            f"{path}: no such file or folder; give a folder with QA_information, a table or hub:OWNER/NAME"
        )
    elif is_omnimedvqa(folder):
        if image_root is not None:
            raise MedR1Error(f"{path}: image_root is not for OmniMedVQA; images lie beside QA_information here")
        records = read_omnimedvqa(folder, refused)
    elif is_medr1_splits(folder):
        records = read_medr1_splits(folder, image_root, refused, files)
    else:
        root = image_root or (folder if folder.is_dir() else folder.parent)
        found, meant = question_tables(folder)
        if refused is None:
            refuse(meant)
        else:
            refused += [f"{line}; {WHOLE}" for line in meant]
        records = _read_tables(found, ImageFolder(root), language, refused, files)
    if not records:
        raise MedR1Error(f"{path}: no questions in it")
    return records


def _grouped(records: Sequence[Record]) -> Sequence[Record]:
    """Each record with the patients and studies of its DICOM files among its groups; a group without a name gets that
    of the first of them, or of its first image's content. Records that share a group get one name for it.
    """

    def told() -> Iterator[Record]:
        for record, contents in with_contents(records, lambda record: record.images, decode=False):
            owners = [owner for image in record.images if image in contents for owner in contents[image].owners]
            groups = tuple(dict.fromkeys([*record.groups, *owners]))
            if groups != record.groups or not record.group:
                first = contents.get(record.images[0])
                content = name_of_content(first.file) if first else str(record.images[0])
                group = record.group or (groups[0] if groups else content)
                record = record.model_copy(update={"group": group, "groups": groups})
            yield record

    return joined(kept(told()), by_content=False)


def _read_tables(
    tables: Sequence[tuple[Table, Layout]],
    folder: ImageFolder,
    language: str,
    refused: list[str] | None,
    files: list[tuple[str, int]] | None,
) -> Sequence[Record]:
    layouts = {table.name: layout for table, layout in tables}

    def record(table: Table, number: int, row: dict[str, Any]) -> Record:
        return layouts[table.name].read(by_column(row), Place(table, number, folder, language))

    return read_records((table for table, _ in tables), record, refused, files)


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
