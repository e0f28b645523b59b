"""DICOM files that are the slices of one series, in the order in which they lie in the body.

read_image("study/head#slice=12&window=brain")  # the twelfth slice of the folder's largest series
expand_reference("study/head#slices=4")         # four of its slices, evenly spaced
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from medr1.data.images.dicom import SliceHeader, slice_header
from medr1.data.images.kinds import is_dicom
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

MAX_FILES = 20_000
"""Files of a folder, those of its subfolders with them, above which it is no folder of one series."""


@dataclass(frozen=True)
class Series:
    """Slices of one series."""

    files: tuple[Path, ...]
    order: str
    """What they were ordered by, in words."""


def in_series(paths: Iterable[Path]) -> list[Series]:
    """The series among files, the largest first, then that of the first file; what is no DICOM image is left out.

    Raises:
        MedR1Error: a file may not be read, or pydicom is not installed.
    """
    found: dict[str, list[tuple[Path, SliceHeader]]] = defaultdict(list)
    for path in paths:
        try:
            header = slice_header(path) if is_dicom(path) else None
        except OSError as error:
            raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        if header:
            found[header.series].append((path, header))
    return sorted((_ordered(slices) for slices in found.values()), key=lambda series: -len(series.files))


def pick(reference: Reference) -> tuple[Reference, str, list[str]]:
    """The slice that a folder with `slice` stands for, the middle one by default.

    Returns:
        The file with the other keys; "12 of 24", and warnings.

    Raises:
        MedR1Error: the folder holds no DICOM image, or there is no such slice.
    """
    series, *others = _series_of(reference)
    total = len(series.files)
    place = reference.whole("slice", total // 2 + 1, 1, total)
    kept = {key: value for key, value in reference.selector.items() if key != "slice"}
    warnings = []
    if others:
        images = sum(len(other.files) for other in others)
        warnings.append(f"its folder holds {len(others) + 1} series; this is of the largest, not of the other {images}")
    if total > 1 and series.order != "position":
        warnings.append(f"no header says where in the body the slices lie: they are in the order of {series.order}")
    return Reference(series.files[place - 1], kept), f"{place} of {total}", warnings


def num_slices(reference: Reference) -> int:
    """Slices of the folder's largest series.

    Raises:
        MedR1Error: the folder holds no DICOM image.
    """
    return len(_series_of(reference)[0].files)


def _series_of(reference: Reference) -> list[Series]:
    folder = reference.path
    inside = list(islice(folder.rglob("*"), MAX_FILES + 1))
    if len(inside) > MAX_FILES:
        raise MedR1Error(f"{folder}: holds more than {MAX_FILES:,} files; name the folder of one series")
    files = [path for path in sorted(inside) if path.is_file() and path.stat().st_size]
    found = _known_series(tuple((path, path.stat().st_mtime_ns) for path in files))
    if not found:
        raise MedR1Error(f"{folder}: holds no DICOM image; name an image file, or the folder of a DICOM series")
    return found


@lru_cache(maxsize=4)
def _known_series(files: tuple[tuple[Path, int], ...]) -> list[Series]:
    """Headers are read once for all slices that are asked for, until a file changes."""
    return in_series(path for path, _ in files)


def _ordered(slices: list[tuple[Path, SliceHeader]]) -> Series:
    """By the place along the normal of the slices where all state one and the same, else by their numbers, else by
    name.
    """
    key: Callable[[tuple[Path, SliceHeader]], Any]
    headers = [header for _, header in slices]
    normals = {header.normal for header in headers}
    if len(normals) == 1 and None not in normals and len({header.along for header in headers}) > 1:
        order, key = "position", lambda one: (one[1].along, one[1].number or 0, one[0].name)
    elif all(header.number is not None for header in headers):
        order, key = "their numbers", lambda one: (one[1].number, one[0].name)
    else:
        order, key = "their file names", lambda one: one[0].name
    return Series(tuple(path for path, _ in sorted(slices, key=key)), order)
