"""PNG, JPEG, TIFF and other common formats: Pillow, and imagecodecs and tifffile where Pillow loses values.

Pillow gives colours and transparent grey of 16 bits their upper 8, drops the sign of 8-bit values, swaps the bytes of
some compressed TIFFs of big-endian order, and refuses many others: those are read elsewhere.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

from medr1.data.images.codestream import declared
from medr1.data.images.display import (
    DEPTHS,
    UNDEFINED,
    Values,
    bits_in_use,
    eight_bit_colours,
    finite_values,
    stretched,
)
from medr1.data.images.kinds import is_tiff
from medr1.data.images.limits import MAX_PIXELS, extra, reason
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

# Pillow's own list also has formats that start other programs (EPS runs Ghostscript).
FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "TIFF",
    "GIF",
    "WEBP",
    "PPM",
    "JPEG2000",
    *(["AVIF"] if features.check("avif") else []),
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by the number under the orientation tag."""

_OTHERS = {
    b"version https://git-lfs": ("a pointer of Git LFS and not the image itself", "run git lfs pull"),
    b"<": ("a page or drawing in HTML, XML or SVG and no picture", "fetch it again or convert it to PNG"),
    b"\x1f\x8b": ("packed by gzip", "unpack it, or fetch it again where that fails"),
    b"PK\3\4": ("a zip archive", "unpack it"),
    b"%PDF": ("a PDF", "save the picture in it as PNG"),
    b"ftyp": ("a film or an image of a telephone (MP4, HEIC)", "convert it to PNG"),
    b"NRRD": ("an NRRD volume", "convert it to NIfTI"),
    b"ObjectType": ("a MetaImage volume", "convert it to NIfTI"),
    b"\x89HDF": ("HDF5", "save the pictures in it as PNG or NIfTI"),
    b"\x93NUMPY": ("an array of numpy's", "save it as PNG or NIfTI"),
}
"""What people have in place of an image, by its first bytes, and what to do."""

_TAG_BITS, _TAG_PHOTOMETRIC, _TAG_ORIENTATION, _TAG_COLORMAP, _TAG_FORMAT = 258, 262, 274, 320, 339


def read_raster(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    """A frame, upright by its EXIF tag; the first of several by default.

    Alpha is laid on white. Grey values of more than 8 bits, signed and float ones are stretched so that the frame's own
    smallest and largest become 0 and 255 (a constant image becomes black; undefined values too). Colours of more than
    8 bits keep the upper 8 of the bits that are in use: colours of a 12-bit camera in 16-bit words are none of them
    above 4095, and would be black by the upper 8 of 16.
    """
    reference.allow("picture", "frame")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # also Pillow's own bomb warning: our limit, which is lower, follows
            return _by_pillow(reference)
    except MedR1Error:
        raise
    except Exception as error:  # at bad bytes decoders raise nearly anything, not OSError alone
        if is_tiff(reference.path):
            return _by_tifffile(reference, error)
        if (code := declared(_begin(reference.path))) and code.bits != 8:
            return _by_imagecodecs(reference, error)
        raise undecodable(reference, error) from error


def undecodable(reference: Reference, error: Exception) -> MedR1Error:
    """The line for a file that a decoder refused."""
    head = _begin(reference.path)[:100].lstrip(b"\xef\xbb\xbf \t\r\n")
    why = "cannot identify image file" if isinstance(error, UnidentifiedImageError) else reason(error)
    remedy = "fetch it again or convert it to PNG"
    for sign, (what, instead) in _OTHERS.items():
        if head.startswith(sign) or (head[4:8] == b"ftyp" == sign and head[8:12] != b"avif"):
            why, remedy = f"cannot identify image file: it is {what}", instead
    return MedR1Error(f"{reference}: cannot be decoded as an image ({why}); {remedy}")


def num_pages(reference: Reference) -> int:
    """Frames or pages of the file."""
    try:
        with Image.open(reference.path, formats=FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except Exception as error:
        if not is_tiff(reference.path):
            raise undecodable(reference, error) from error
        try:
            with extra("tifffile", reference).TiffFile(reference.path) as file:
                return len(file.pages)
        except MedR1Error:
            raise
        except Exception:
            raise undecodable(reference, error) from error


def _by_pillow(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    with Image.open(reference.path, formats=FORMATS) as image:
        decisions: dict[str, Any] = {"kind": "picture", "format": image.format}
        # Counting walks through the file, and an MPO's further frames are previews: only where it is asked for.
        if "frame" in reference.selector or image.format in ("TIFF", "GIF", "WEBP"):
            frames = getattr(image, "n_frames", 1)
            image.seek(reference.whole("frame", 1, 1, frames) - 1)
            decisions["frame"] = f"{image.tell() + 1} of {frames}"
        _bounded(reference, image.width, image.height)
        if image.format == "TIFF":
            _demand_small_samples(image)
        if _is_deep(image, reference.path):
            return _by_imagecodecs(reference, None)
        if image.format == "PPM" and image.tile[0][0] == "ppm" and image.tile[0][3] == ("RGB", 65535):
            start, size = image.tile[0][2], 3 * image.width * image.height
            words = np.frombuffer(reference.path.read_bytes(), ">u2", size, start).astype(np.uint16)
            rgb, said = _array_to_rgb(reference, words.reshape(image.height, image.width, 3))
            return rgb, decisions | said
        image.load()
        orientation = _orientation(image)
        rgb, said = _to_rgb(reference, image)
    return _upright(rgb, orientation, decisions | said)


def _demand_small_samples(image: Any) -> None:
    """Raise ValueError, which leads to tifffile, unless a TIFF has unsigned samples of 8 bits or fewer."""
    tags = image.tag_v2
    if max(tags.get(_TAG_BITS, (1,))) > 8 or max(tags.get(_TAG_FORMAT, (1,))) not in (1, 4):
        raise ValueError("samples of more than 8 bits or with a sign")


def _is_deep(image: Any, path: Path) -> bool:
    """Whether a PNG or JPEG 2000 file has samples of more than 8 bits of which Pillow would drop some."""
    if image.format == "PNG":
        return image.mode in ("LA", "RGB", "RGBA") and str(image.tile[0][3]).endswith("16B")
    if image.format != "JPEG2000":
        return False
    code = declared(_begin(path))
    return code is not None and code.bits > 8


def _begin(path: Path) -> bytes:
    """Enough of a file for the header of its code stream, after the profiles that may stand before it."""
    with path.open("rb") as file:
        return file.read(1 << 20)


def _by_imagecodecs(reference: Reference, first: Exception | None) -> tuple[Image.Image, dict[str, Any]]:
    """A PNG, JPEG or JPEG 2000 file of more than 8 bits a sample."""
    imagecodecs = extra("imagecodecs", reference)
    content = reference.path.read_bytes()
    code = declared(content)
    try:
        if code is not None:
            _bounded(reference, code.columns, code.rows)
        if content.startswith(b"\x89PNG"):
            kind, values = "PNG", imagecodecs.png_decode(content)
        elif content.startswith(b"\xff\xd8"):
            kind, values = "JPEG", imagecodecs.jpeg_decode(content)
        else:
            kind, values = "JPEG2000", imagecodecs.jpeg2k_decode(content)
        # Of a JPEG that Pillow refuses the orientation is not known.
        orientation = 1 if first else _orientation_of(reference.path)
        transparency = "straight" if values.shape[2:] in ((2,), (4,)) else ""
        rgb, said = _array_to_rgb(reference, values, transparency, depth=code.bits if code else None)
    except MedR1Error:
        raise
    except Exception as error:
        raise undecodable(reference, first or error) from error
    return _upright(rgb, orientation, {"kind": "picture", "format": kind} | said)


def _orientation_of(path: Path) -> object:
    with Image.open(path, formats=FORMATS) as image:
        image.load()
        return _orientation(image)


def _orientation(image: Image.Image) -> object:
    """The number under the orientation tag, also of a chunk after the pixels, which must be loaded; 1 where it is
    broken: that is no fault of the picture.
    """
    try:
        return image.getexif().get(_TAG_ORIENTATION, 1)
    except Exception:  # of many kinds, at bad bytes
        return 1


def _by_tifffile(reference: Reference, first: Exception) -> tuple[Image.Image, dict[str, Any]]:
    """Samples of more than 8 bits, with a sign or as floats, and other TIFFs that Pillow refuses with `first`."""
    tifffile: Any = extra("tifffile", reference)
    said_before: list[str] = []
    try:
        with tifffile.TiffFile(reference.path) as file:
            number = reference.whole("frame", 1, 1, len(file.pages))
            page = file.pages[number - 1]
            _bounded(reference, page.imagewidth, page.imagelength)
            if math.prod(page.shape) > 4 * MAX_PIXELS:  # a few bytes can tell of thousands of colours
                raise ValueError("too many samples")
            values = page.asarray()
            frames, colour = len(file.pages), page.photometric.name
            orientation = page.tags.valueof(_TAG_ORIENTATION, 1)
            if colour == "PALETTE":
                table, said_before = eight_bit_colours(page.colormap)
                values, colour = table.T[values], "RGB"
            values, transparency = _samples(values, page.axes, colour, page.extrasamples, said_before)
        rgb, said = _array_to_rgb(reference, values, transparency, white_is_zero=colour == "MINISWHITE")
    except MedR1Error:
        raise
    except Exception as error:
        # What Pillow missed says more than tifffile's complaint about the same bytes, but for what we sent here.
        why = error if isinstance(first, ValueError) else first
        raise undecodable(reference, why) from error
    said["warnings"] += said_before
    return _upright(rgb, orientation, {"kind": "picture", "format": "TIFF", "frame": f"{number} of {frames}"} | said)


_NUM_COLOURS = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3, "YCBCR": 3, "SEPARATED": 4}
"""Samples a pixel without alpha, by the TIFF's photometric interpretation."""


def _samples(values: Values, axes: str, colour: str, beside: tuple[int, ...], warned: list[str]) -> tuple[Values, str]:
    """Values as (height, width) or (height, width, samples), and what is transparent: "", "straight", "multiplied".

    Args:
        axes: tifffile's letters for the axes of `values`.
        beside: what the samples after the colour's are (TIFF 6.0, ExtraSamples: 1 multiplied alpha, 2 straight).
        warned: gets a line where some are not shown.
    """
    if axes == "SYX":  # colours one after the other
        values, axes = np.moveaxis(values, 0, -1), "YXS"
    if axes not in ("YX", "YXS") or colour not in _NUM_COLOURS:
        raise ValueError(f"axes {axes} and colours of kind {colour} are not supported")
    count = _NUM_COLOURS[colour]
    num_samples = values.shape[2] if axes == "YXS" else 1
    if num_samples < count or (colour == "SEPARATED" and values.dtype.kind != "u"):
        raise ValueError(f"{num_samples} samples of type {values.dtype} for colours of kind {colour}")
    has_alpha = beside and num_samples > count and colour != "SEPARATED"
    transparency = {1: "multiplied", 2: "straight"}.get(beside[0], "") if has_alpha else ""
    shown = count + bool(transparency)
    if num_samples > shown:
        warned.append(f"not all channels are shown: of {num_samples} the first {shown}")
    if colour == "SEPARATED":
        eight = (values[..., :4] >> 8 * (values.dtype.itemsize - 1)).astype(np.uint8)
        return np.asarray(Image.fromarray(eight, "CMYK").convert("RGB")), ""
    kept = values if axes == "YX" else values[..., :shown]
    return kept[..., 0] if kept.shape[2:] == (1,) else kept, transparency


def _bounded(reference: Reference, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width} x {height}"
        raise MedR1Error(f"{reference}: {size} pixels are above the limit of {MAX_PIXELS}; shrink it")


def _upright(image: Image.Image, orientation: object, decisions: dict[str, Any]) -> tuple[Image.Image, dict[str, Any]]:
    if isinstance(orientation, int) and orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
        return image, decisions | {"orientation": f"turned upright by its EXIF tag ({orientation})"}
    return image, decisions


def _to_rgb(reference: Reference, image: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    """What Pillow decoded without loss as RGB, and what was decided."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if isinstance(clear := image.info.get("transparency"), int):  # the one grey value of a PNG that is not seen
            values = np.stack([values, np.where(values == clear, 0, 65535)], axis=-1)
        return _array_to_rgb(reference, values, "straight" if values.ndim == 3 else "")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert rgb is not None
        return rgb, {"scale": "L*a*b* as sRGB"}
    if image.mode == "P" and image.format == "TIFF":
        entries = getattr(image, "tag_v2", {}).get(_TAG_COLORMAP, ())
        if entries and max(entries) < 2 ** DEPTHS[-1]:  # Pillow would take the upper 8 of 16
            table, fewer = eight_bit_colours(np.array(entries, dtype=np.uint16).reshape(3, -1))
            image.putpalette(table.T.tobytes())
            return image.convert("RGB"), {
                "scale": "colours of its palette, fewer bits in entries of 16",
                "warnings": fewer,
            }
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), {"scale": "as it is, alpha on white"}
    return image.convert("RGB"), {"scale": "as it is"}


def _array_to_rgb(
    reference: Reference,
    values: Values,
    transparency: str = "",
    *,
    white_is_zero: bool = False,
    depth: int | None = None,
) -> tuple[Image.Image, dict[str, Any]]:
    """Grey (height, width), grey and alpha (…, 2), colour (…, 3), colour and alpha (…, 4) of any number type as RGB.

    Args:
        transparency: "" (no alpha), "straight", or "multiplied" where the alpha has been multiplied into the values.
        depth: bits of a value where the file declares fewer than the array's type has.
    """
    told: list[str] = []
    if values.dtype.kind == "c":
        values, told = np.abs(values), ["complex values show their magnitude"]
    if values.dtype.kind not in "biuf":
        raise ValueError(f"values of type {values.dtype}")
    opaque = np.ones(values.shape[:2])
    if transparency:
        values, alpha = values[..., :-1], values[..., -1]
        bits = bits_in_use(alpha, depth) if alpha.dtype.kind == "u" else 0
        opaque = np.clip(alpha / (2**bits - 1 if bits else 1), 0, 1)
        if transparency == "multiplied":
            values = np.where(opaque[..., None] > 0, values / np.maximum(opaque, 1e-6)[..., None], 0).astype(
                values.dtype
            )
        if values.shape[2] == 1:
            values = values[..., 0]
    seen = values[opaque > 0] if transparency and (opaque > 0).any() else values
    finite = finite_values(reference, seen)
    if finite.size < seen.size:
        told.append(UNDEFINED)
    if values.ndim == 2 or values.dtype.kind != "u":
        low, high, words = _ends(finite, is_grey=values.ndim == 2)
    else:
        bits = bits_in_use(finite, depth)
        words = f"upper 8 of {bits} bits" if bits > 8 else "as it is"
        low, high = 0.0, float(2**bits - 1)
        if (whole := depth or 8 * values.dtype.itemsize) > bits:
            told.append(f"no colour is above {2**bits - 1}: taken as {bits} bits in words of {whole}")
    if values.dtype == np.uint16 and values.ndim == 3 and bits == 16:
        shown = (values >> 8).astype(np.uint8)
    else:
        shown = stretched(values, low, high)
    if white_is_zero:
        shown = 255 - shown
    if transparency:
        words += ", alpha on white"
        share = opaque if shown.ndim == 2 else opaque[..., None]
        shown = np.rint(shown * share + 255 * (1 - share)).astype(np.uint8)
    return Image.fromarray(shown).convert("RGB"), {"scale": words, "warnings": told}


def _ends(finite: Values, *, is_grey: bool) -> tuple[float, float, str]:
    """What becomes black and white: of grey the smallest and largest value, of float colours 0 and 1 or 255."""
    if finite.dtype == np.bool_:
        return 0.0, 1.0, "1 bit"
    if finite.dtype == np.uint8:
        return 0.0, 255.0, "as it is"
    low, high = float(finite.min()), float(finite.max())
    if not is_grey and low >= 0 and high <= 255:
        top = 1.0 if high <= 1 else 255.0
        return 0.0, top, f"0 to {top:g}"
    return low, high, f"{low:g} to {high:g} (smallest and largest value)"
