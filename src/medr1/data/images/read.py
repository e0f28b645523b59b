"""Any medical image file to 8-bit RGB, or one clear line that names the file.

    read_image("scan.dcm#window=lung").decisions       # what was decided on the way
    load_image("volume.nii.gz#axis=coronal&slice=40")  # the image alone
    expand_reference("volume.nii.gz#slices=4")         # four references, evenly spaced

Content decides, not a file's name. Nothing that identifies a patient is ever read out of a header, but for
`group_of`, which hashes it.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw

from medr1.data.images.kinds import kind_of
from medr1.data.images.limits import MAX_ASPECT
from medr1.data.images.raster import num_pages, read_raster
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

NEARLY_BLACK = 17
"""Brightest value, of 255, below which a picture is hardly one: labels of a mask, or 12-bit values read as of 16, which
reach 4095 / 65535 * 255 = 15.9. Of an inverted one all is as near to white.
"""


@dataclass(frozen=True)
class Reading:
    """An image and how it came about."""

    image: Image.Image
    """RGB, 8 bits a channel."""
    decisions: dict[str, Any]
    """Words, numbers and lists of words: kind; where they apply frame, slice, window, scale, polarity, transfer_syntax
    and others; warnings (perhaps none); left_out, of a folder: files in it that cannot be read. Nothing of it but
    these names, which are the user's own, can identify a patient."""


def read_image(reference: Path | str) -> Reading:
    """Decode one image: a file, or what a selector picks in it or in a folder of one DICOM series.

    Selectors, see `Reference`; frames and slices count from 1:
        folder: slice (middle), and what its DICOM files take
        picture: frame
        DICOM: frame (middle), window (a CT preset, the number of one in the file, or CENTRE,WIDTH)
        NIfTI: axis (axial, coronal, sagittal), slice (middle), window (a CT preset or CENTRE,WIDTH)
        slide: level, x, y (upper left corner in pixels of level 0), size (SIDE or WIDTHxHEIGHT in pixels of the level)
        all: redact, black areas: top:N, bottom:N, left:N, right:N or X,Y,WIDTH,HEIGHT in pixels, several with ";"

    Raises:
        MedR1Error: the file is missing, empty, cut off, of no known format, too large or too narrow, or the selector
            is wrong.
    """
    parsed = Reference.parse(reference)
    if parsed.path.is_dir():
        from medr1.data.images.series import pick

        chosen, place, warnings, left_out = pick(parsed)
        reading = read_image(str(chosen))
        told = {"slice": place, "left_out": left_out, "warnings": [*warnings, *reading.decisions["warnings"]]}
        return Reading(reading.image, reading.decisions | told)
    parsed = _existing(reference)
    try:
        match kind_of(parsed.path):
            case "dicom":
                from medr1.data.images.dicom import read_dicom as read
            case "nifti":
                from medr1.data.images.nifti import read_nifti as read
            case "slide":
                from medr1.data.images.slide import read_slide as read
            case _:
                read = read_raster
        image, decisions = read(parsed)
    except OSError as error:
        raise MedR1Error(f"{parsed}: cannot be read ({error.strerror}); check its permissions") from error
    image.info.clear()  # EXIF, XMP and comments, which a copy that is saved would carry on
    told = decisions.setdefault("warnings", [])
    told += [] if any(warning.startswith("all of it") for warning in told) else _looks_empty(image)
    if "redact" in parsed.selector:
        decisions["redacted"] = _redact(image, parsed)
    if max(image.size) > MAX_ASPECT * min(image.size):
        size = f"{image.width} x {image.height}"
        raise MedR1Error(f"{parsed}: {size} pixels are more than {MAX_ASPECT} times as long as wide; crop it")
    return Reading(image, decisions)


def _looks_empty(image: Image.Image) -> list[str]:
    """A warning about an image in which nothing can be seen."""
    ends = cast(tuple[tuple[int, int], ...], image.getextrema())
    if all(low == high for low, high in ends):
        return ["all of it is one colour"]
    darkest, brightest = min(low for low, _ in ends), max(high for _, high in ends)
    if brightest < NEARLY_BLACK:
        return [f"nearly black: nothing in it is brighter than {brightest} of 255"]
    if darkest > 255 - NEARLY_BLACK:
        return [f"nearly white: nothing in it is darker than {darkest} of 255"]
    return []


def load_image(reference: Path | str) -> Image.Image:
    """The image of `read_image`: RGB, 8 bits a channel."""
    return read_image(reference).image


def by_warning(warned: Mapping[Path, Sequence[str]]) -> dict[str, list[Path]]:
    """Images by what was warned of, without what follows a colon and is of one image alone; the most frequent first."""
    images: dict[str, list[Path]] = defaultdict(list)
    for image, said in warned.items():
        for warning in dict.fromkeys(one.partition(": ")[0] for one in said):
            images[warning].append(image)
    return dict(sorted(images.items(), key=lambda item: -len(item[1])))


def expand_reference(reference: Path | str) -> list[Path]:
    """The references that `slices=N` (NIfTI, folder of a DICOM series) or `frames=N` (others) stands for, evenly
    spaced; else the one given.

    N = 1 gives the middle. The other keys stay.

    Raises:
        MedR1Error: as `read_image`, or there are fewer than N.
    """
    parsed = Reference.parse(reference)
    many = [key for key in ("slices", "frames") if key in parsed.selector]
    if not many:
        return [Path(reference)]
    key, *_ = many
    kind = "series" if parsed.path.is_dir() else kind_of(_existing(reference).path)
    if kind == "series":
        from medr1.data.images.series import num_slices as count
    elif kind == "nifti":
        from medr1.data.images.nifti import num_slices as count
    elif kind == "dicom":
        from medr1.data.images.dicom import num_frames as count
    else:
        count = num_pages
    one = {"slices": "slice", "frames": "frame"}[key]
    if kind == "slide" or (key == "slices") != (kind in ("nifti", "series")) or len(many) > 1 or one in parsed.selector:
        raise MedR1Error(
            f"{parsed}: give slices=N for NIfTI or a folder, or frames=N for DICOM and pictures, and no {one}"
        )
    others = {name: value for name, value in parsed.selector.items() if name != key}
    total = count(Reference(parsed.path, others))
    number = parsed.whole(key, 1, 1, total)
    places = [(2 * place + 1) * total // (2 * number) + 1 for place in range(number)]
    return [Path(str(Reference(parsed.path, others | {one: str(place)}))) for place in places]


def file_reference(reference: Path | str) -> Path:
    """The reference; of a folder the one of the file of the slice that it stands for: bytes, patient and copies are
    known by file.

    Raises:
        MedR1Error: the folder holds no DICOM image, or there is no such slice.
    """
    parsed = Reference.parse(reference)
    if not parsed.path.is_dir():
        return Path(reference)
    from medr1.data.images.series import pick

    return Path(str(pick(parsed)[0]))


def _existing(reference: Path | str) -> Reference:
    parsed = Reference.parse(reference)
    if not parsed.path.is_file():
        raise MedR1Error(f"{parsed.path}: no such image file; check the path")
    if parsed.path.stat().st_size == 0:
        raise MedR1Error(f"{parsed.path}: the image file is empty; fetch it again")
    return parsed


def _redact(image: Image.Image, reference: Reference) -> str:
    """Blacken areas in place; a part of an area that misses the image is a mistake."""
    width, height = image.size
    for area in reference.selector["redact"].split(";"):
        if band := re.fullmatch(r"(top|bottom|left|right):(\d{1,6})", area):
            side, size = band[1], int(band[2])
            box = {
                "top": (0, 0, width, size),
                "bottom": (0, height - size, width, height),
                "left": (0, 0, size, height),
                "right": (width - size, 0, width, height),
            }[side]
        elif re.fullmatch(r"\d{1,6}(,\d{1,6}){3}", area):
            x, y, across, down = map(int, area.split(","))
            box = (x, y, x + across, y + down)
        else:
            raise reference.wrong("redact", "top:N, bottom:N, left:N, right:N or X,Y,WIDTH,HEIGHT, several with ';'")
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise reference.wrong("redact", f"areas inside its {width} x {height} pixels")
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="black")
    return reference.selector["redact"]
