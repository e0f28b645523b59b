"""What kind of file it is, by its first bytes; a name says nothing, but for the one slide format without a sign."""

import gzip
import struct
import zlib
from pathlib import Path

from medr1.data.images.limits import MAX_PIXELS

_WHOLE_SLIDE = b"1.2.840.10008.5.1.4.1.1.77.1.6"
"""SOP class of whole slides, which stands in the file meta information (PS3.4 B.5)."""


def kind_of(path: Path) -> str:
    """ "dicom", "nifti", "slide" or "picture"; what is none of these is a picture that cannot be decoded.

    Raises:
        OSError: the file cannot be read.
    """
    head = _head(path)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as file:
                head = file.read(600)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return "picture"
        return "nifti" if _is_nifti(head) else "picture"
    kind = "dicom" if is_dicom(path) else "nifti" if _is_nifti(head) else "picture"
    # The preamble of a DICOM file may be a TIFF header: it is DICOM all the same.
    if _WHOLE_SLIDE in head if kind == "dicom" else is_tiff(path) or path.suffix.lower() == ".mrxs":
        return "slide" if is_slide(path) else kind
    return kind


def is_dicom(path: Path) -> bool:
    """With the preamble of a DICOM file, or without: then it begins with a small element of group 2 or 8."""
    head = _head(path)
    if head[128:132] == b"DICM":
        return True
    if len(head) < 8:
        return False
    little, big = struct.unpack("<HH", head[:4]), struct.unpack(">HH", head[:4])
    if not any(group in (2, 8) and element <= 0x20 for group, element in (little, big)):
        return False
    has_representation = head[4:6].isalpha() and head[4:6].isupper()
    return has_representation or struct.unpack("<I", head[4:8])[0] <= 64


def is_slide(path: Path) -> bool:
    """Whether a file is of a slide scanner, or a TIFF with more pixels than are ever decoded at once."""
    try:
        import openslide
        import tifffile
    except ImportError:
        return False  # a slide is then refused as a picture that is too large
    vendor = openslide.OpenSlide.detect_format(str(path))
    if vendor is not None and vendor != "generic-tiff":
        return True
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            return page.imagewidth * page.imagelength > MAX_PIXELS
    except Exception:  # whatever is wrong with it is told when it is read as a picture
        return False


def is_tiff(path: Path) -> bool:
    """A TIFF or BigTIFF of either byte order."""
    return _head(path)[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(600)
