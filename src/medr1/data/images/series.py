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
from typing import Any, NamedTuple

from medr1.data.images.dicom import SliceHeader, slice_header
from medr1.data.images.kinds import is_dicom
from medr1.data.images.limits import extra
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

SUFFIXES = (".dcm", ".dicom", ".ima")
"""Names of files that are meant to be DICOM, whatever is left in them."""
MAX_FILES = 20_000
"""Files of a folder, those of its subfolders with them, above which it is no folder of one series."""


@dataclass(frozen=True)
class Series:
    """Slices of one series."""

    files: tuple[Path, ...]
    order: str
    """What they were ordered by, in words."""
    is_named: bool
    """Whether their headers name it; else it is all slices of a study without one."""


class Sorted(NamedTuple):
    """What files are."""

    series: list[Series]
    """The largest first, then that of the first file."""
    unreadable: list[Path]
    """Those that should be slices and cannot be read. What is no image at all is in neither."""


def in_series(paths: Iterable[Path]) -> Sorted:
    """The series among files.

    Raises:
        MedR1Error: a file may not be read, or pydicom is not installed.
    """
    found: dict[tuple[str, str], list[tuple[Path, SliceHeader]]] = defaultdict(list)
    unreadable: list[Path] = []
    for path in paths:
        extra("pydicom", Reference(path))
        try:
            header = slice_header(path) if is_dicom(path) else None
        except OSError as error:
            raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        except MedR1Error:
            unreadable.append(path)
            continue
        if header:
            found[header.series, header.owner].append((path, header))
        elif path.suffix.lower() in SUFFIXES and not is_dicom(path):
            unreadable.append(path)
    return Sorted(sorted(map(_ordered, found.values()), key=lambda series: -len(series.files)), unreadable)


def pick(reference: Reference) -> tuple[Reference, str, list[str], list[str]]:
    """The slice that a folder with `slice` stands for, the middle one by default.

    Returns:
        The file with the other keys; "12 of 24"; warnings; and the folder's files, by their paths in it, that cannot
        be read and are none of these 24.

    Raises:
        MedR1Error: the folder holds no DICOM image, or there is no such slice.
    """
    (series, *others), unreadable = _series_of(reference)
    total = len(series.files)
    place = reference.whole("slice", total // 2 + 1, 1, total)
    kept = {key: value for key, value in reference.selector.items() if key != "slice"}
    warnings = []
    if others:
        images = sum(len(other.files) for other in others)
        warnings.append(f"its folder holds {len(others) + 1} series; this is of the largest, not of the other {images}")
    if unreadable:
        files = f"{len(unreadable)} files" if len(unreadable) > 1 else "1 file"
        warnings.append(f"{files} of its folder cannot be read and {'are' if len(unreadable) > 1 else 'is'} left out")
    if total > 1 and series.order != "position":
        warnings.append(f"no header says where in the body the slices lie: they are in the order of {series.order}")
    if total > 1 and not series.is_named:
        warnings.append("no header says which series a slice is of: they are taken as one")
    left_out = [str(path.relative_to(reference.path)) for path in unreadable]
    return Reference(series.files[place - 1], kept), f"{place} of {total}", warnings, left_out


def num_slices(reference: Reference) -> int:
    """Slices of the folder's largest series.

    Raises:
        MedR1Error: the folder holds no DICOM image.
    """
    return len(_series_of(reference).series[0].files)


def _series_of(reference: Reference) -> Sorted:
    folder = reference.path
    inside = list(islice(folder.rglob("*"), MAX_FILES + 1))
    if len(inside) > MAX_FILES:
        raise MedR1Error(f"{folder}: holds more than {MAX_FILES:,} files; name the folder of one series")
    files = [path for path in sorted(inside) if path.is_file()]
    found = _known_series(tuple((path, path.stat().st_mtime_ns) for path in files))
    if not found.series:
        lost = f" that can be read ({len(found.unreadable)} cannot)" if found.unreadable else ""
        raise MedR1Error(f"{folder}: holds no DICOM image{lost}; name an image file, or the folder of a DICOM series")
    return found


@lru_cache(maxsize=4)
def _known_series(files: tuple[tuple[Path, int], ...]) -> Sorted:
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
    return Series(tuple(path for path, _ in sorted(slices, key=key)), order, bool(headers[0].series))
