"""Whole-slide images: an overview by default, or a tile. OpenSlide, and tifffile for pyramids that it does not know.

A slide's label and its photograph of the glass, which bear names, are never read.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medr1.data.images.kinds import is_dicom
from medr1.data.images.limits import MAX_PIXELS, extra, reason
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

OVERVIEW = 1024
"""Longer side of the overview in pixels."""


def read_slide(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    """The whole slide with OVERVIEW pixels a side, or with any of the keys a tile; where it is transparent, white."""
    reference.allow("slide", "level", "x", "y", "size")
    extra("openslide", reference)
    extra("tifffile", reference)
    try:
        return (_by_openslide if _vendor(reference.path) else _by_tifffile)(reference)
    except MedR1Error:
        raise
    except Exception as error:  # OpenSlide and tifffile raise many kinds at bad bytes
        why = type(error).__name__ if is_dicom(reference.path) else reason(error)  # as in dicom.py, no value is quoted
        raise MedR1Error(f"{reference}: cannot be read as a slide ({why}); fetch it again") from None


def _vendor(path: Path) -> str | None:
    import openslide

    return openslide.OpenSlide.detect_format(str(path))


def _by_openslide(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    import openslide

    with openslide.OpenSlide(str(reference.path)) as slide:
        sizes = list(slide.level_dimensions)
        level, place, size = _region(reference, sizes)
        region = slide.read_region(place, level, size)
    white = Image.new("RGBA", region.size, "white")
    return _told(reference, Image.alpha_composite(white, region).convert("RGB"), level, place, sizes)


def _by_tifffile(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    import tifffile

    with tifffile.TiffFile(reference.path) as file:
        pages = [level.keyframe for level in file.series[0].levels]
        sizes = [(page.imagewidth, page.imagelength) for page in pages]
        level, (x, y), (width, height) = _region(reference, sizes)
        if math.prod(sizes[level]) > MAX_PIXELS or math.prod(pages[level].shape) > 4 * MAX_PIXELS:
            raise ValueError(f"level {level} of its {len(sizes)} has too many pixels for this kind of TIFF")
        page: Any = pages[level]
        kind, compression = page.photometric.name, page.compression.name
        # The YCbCr of a JPEG comes out as RGB; further kinds would come out in other colours than are meant.
        if kind not in ("MINISBLACK", "RGB") and (kind, compression) != ("YCBCR", "JPEG"):
            raise ValueError(f"colours of kind {kind} are not supported in this kind of TIFF")
        values = page.asarray()
    if values.dtype != np.uint8 or values.shape[2:] not in ((), (3,)):
        raise ValueError(f"pixels of type {values.dtype} and shape {values.shape}")
    left, top = (edge * sizes[level][0] // sizes[0][0] for edge in (x, y))
    tile = Image.fromarray(values[top : top + height, left : left + width]).convert("RGB")
    return _told(reference, tile, level, (x, y), sizes)


def _region(reference: Reference, sizes: list[tuple[int, int]]) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Level, upper left corner in pixels of level 0, and (width, height) in pixels of the level: a tile, cut at the
    slide's edge; or the whole of the smallest level that is no smaller than the overview.
    """
    if not _is_tile(reference):
        level = max((level for level, size in enumerate(sizes) if max(size) >= OVERVIEW), default=0)
        place, size = (0, 0), sizes[level]
    else:
        level = reference.whole("level", 0, 0, len(sizes) - 1)
        place = (reference.whole("x", 0, 0, sizes[0][0] - 1), reference.whole("y", 0, 0, sizes[0][1] - 1))
        sides = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", reference.selector.get("size", str(OVERVIEW)))
        if not sides:
            raise reference.wrong("size", "SIDE or WIDTHxHEIGHT in pixels of the level")
        scale = sizes[0][0] / sizes[level][0]
        asked = (int(sides[1]), int(sides[2] or sides[1]))
        width, height = (
            min(side, math.ceil((whole - edge) / scale))
            for side, whole, edge in zip(asked, sizes[0], place, strict=True)
        )
        size = (width, height)
    if math.prod(size) > MAX_PIXELS:
        raise MedR1Error(
            f"{reference}: {size[0]} x {size[1]} pixels of level {level} are above the limit of {MAX_PIXELS}; "
            f"select a tile with level (0 to {len(sizes) - 1}), x, y and size"
        )
    return level, place, size


def _is_tile(reference: Reference) -> bool:
    return bool(reference.selector.keys() & {"level", "x", "y", "size"})


def _told(
    reference: Reference, image: Image.Image, level: int, place: tuple[int, int], sizes: list[tuple[int, int]]
) -> tuple[Image.Image, dict[str, Any]]:
    decisions = {"kind": "slide", "slide": f"{sizes[0][0]} x {sizes[0][1]} pixels", "level": f"{level} of 0 to "}
    decisions["level"] += str(len(sizes) - 1)
    if _is_tile(reference):
        return image, {**decisions, "tile": f"{image.width} x {image.height} at {place[0]}, {place[1]}"}
    image.thumbnail((OVERVIEW, OVERVIEW))
    return image, {**decisions, "overview": f"{image.width} x {image.height}"}
