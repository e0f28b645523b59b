"""Any common image file to 8-bit RGB, or one clear line that names the file."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from medr1.errors import MedR1Error

MAX_PIXELS = 80_000_000
"""Largest image that is decoded, in pixels: a mammogram has 30 million, a small bomb billions."""

# Pillow's own list also has formats that start other programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "JPEG2000")


def load_image(path: Path | str) -> Image.Image:
    """Decode an image file wholly: upright by its EXIF tag, RGB, 8 bits a channel, size unchanged.

    Alpha is laid on white. Grey values of more than 8 bits are scaled linearly so that the image's own
    smallest and largest value become 0 and 255 (a constant image becomes black). A file with several frames
    gives its first.

    Raises:
        MedR1Error: the file is missing, empty, cut off, not an image of a known format, or above MAX_PIXELS.
    """
    path = Path(path)
    if not path.is_file():
        raise MedR1Error(f"{path}: no such image file; check the path")
    if path.stat().st_size == 0:
        raise MedR1Error(f"{path}: the image file is empty; fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
            image: Image.Image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise MedR1Error(f"{path}: {size} pixels are above the limit of {MAX_PIXELS}; shrink it")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except MedR1Error:
        raise
    except Exception as error:  # at bad bytes decoders raise nearly anything, not OSError alone
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MedR1Error(
            f"{path}: cannot be decoded as an image ({reason}); fetch it again or convert it to PNG"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values (height, width) of any number type as uint8, the smallest as 0 and the largest as 255."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has infinite or undefined grey values")
    low, high = values.min(), values.max()
    return np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
