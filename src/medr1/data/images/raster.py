"""PNG, JPEG, TIFF and other common formats: Pillow, and tifffile where Pillow cannot."""

import math
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from medr1.data.images.display import stretched
from medr1.data.images.kinds import is_tiff
from medr1.data.images.limits import MAX_PIXELS, extra, reason
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

# Pillow's own list also has formats that start other programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000")


def read_raster(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    """A frame, upright by its EXIF tag; the first of several by default.

    Alpha is laid on white. Grey values of more than 8 bits are stretched so that the frame's own smallest and largest
    become 0 and 255 (a constant image becomes black); colours of 16 bits keep their upper 8.
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
        raise undecodable(reference, error) from error


def undecodable(reference: Reference, error: Exception) -> MedR1Error:
    """The line for a file that a decoder refused."""
    return MedR1Error(
        f"{reference}: cannot be decoded as an image ({reason(error)}); fetch it again or convert it to PNG"
    )


def num_pages(reference: Reference) -> int:
    """Frames or pages of the file."""
    try:
        with Image.open(reference.path, formats=FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except Exception as error:
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
        tags = getattr(image, "tag_v2", {})
        if tags.get(284) == 2 and max(tags.get(258, (8,))) > 8:  # Pillow 12 mistakes uncompressed planes of 16 bits
            raise ValueError("colours one after the other, of more than 8 bits")
        image.load()
        rgb, decisions["scale"] = _to_rgb(image)
        return ImageOps.exif_transpose(rgb), decisions


def _by_tifffile(reference: Reference, first: Exception) -> tuple[Image.Image, dict[str, Any]]:
    """Compressed 16-bit colour, float and many other TIFFs that Pillow refuses with `first`."""
    tifffile: Any = extra("tifffile", reference)
    try:
        with tifffile.TiffFile(reference.path) as file:
            number = reference.whole("frame", 1, 1, len(file.pages))
            page = file.pages[number - 1]
            _bounded(reference, page.imagewidth, page.imagelength)
            if math.prod(page.shape) > 4 * MAX_PIXELS:  # a few bytes can tell of thousands of colours
                raise ValueError
            values = page.asarray()
            if page.axes == "SYX":  # colours one after the other
                values = np.moveaxis(values, 0, -1)
            colour = page.photometric.name
            frames = len(file.pages)
        rgb, scale = _array_to_rgb(values, colour)
    except MedR1Error:
        raise
    except Exception:  # the name of what Pillow missed says more than tifffile's complaint about the same bytes
        raise undecodable(reference, first) from first
    return rgb, {"kind": "picture", "format": "TIFF", "frame": f"{number} of {frames}", "scale": scale}


def _bounded(reference: Reference, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width} x {height}"
        raise MedR1Error(f"{reference}: {size} pixels are above the limit of {MAX_PIXELS}; shrink it")


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # Pillow heeds it in 8-bit TIFF only
        return _array_to_rgb(np.asarray(image), "MINISWHITE" if white_is_zero else "MINISBLACK")
    if image.has_transparency_data:
        return _on_white(image), "as it is, alpha on white"
    return image.convert("RGB"), "as it is"


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _array_to_rgb(values: np.ndarray, colour: str) -> tuple[Image.Image, str]:
    """Grey (height, width) or colour (height, width, 3 or 4 with alpha) of any number type."""
    if values.shape[2:] in ((3,), (4,)) and colour in ("RGB", "YCBCR", "PALETTE"):
        if values.dtype == np.uint16:
            return _on_white(Image.fromarray((values >> 8).astype(np.uint8))), "upper 8 of 16 bits"
        if values.dtype == np.uint8:
            return _on_white(Image.fromarray(values)), "as it is"
    elif values.ndim != 2 or colour not in ("MINISBLACK", "MINISWHITE"):
        raise ValueError(f"{values.ndim} dimensions and colours of kind {colour} are not supported")
    if not np.isfinite(values).all():
        raise ValueError("it has infinite or undefined grey values")
    low, high = values.min(), values.max()
    scaled = stretched(values, float(low), float(high))
    if colour == "MINISWHITE":
        scaled = 255 - scaled
    return Image.fromarray(scaled).convert("RGB"), f"{low:g} to {high:g} (smallest and largest value)"
