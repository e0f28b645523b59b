"""Grey values to 8 bits (by a window, a straight stretch, or percentiles) and pixels to squares."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from medr1.data.images.limits import MAX_PIXELS
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

Grey = npt.NDArray[np.uint8]
Values = npt.NDArray[Any]

CT_WINDOWS = {
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "soft": (50, 400),
    "liver": (30, 150),
    "brain": (40, 80),
    "stroke": (40, 40),
    "subdural": (75, 215),
    "bone": (400, 1800),
}
"""Customary (centre, width) in Hounsfield units; values differ a little from one hospital to the next."""

UNDEFINED = "undefined or infinite values are black or white"
"""The warning of an image that has some."""

DEPTHS = (8, 10, 12, 14)
"""Bits that instruments store in words of 16 without shifting them up."""

PERCENTILES = (0.5, 99.5)
"""What becomes black and white where nothing says which grey values matter: hot pixels do not darken the rest."""


def given_window(reference: Reference, *, numbered: bool) -> tuple[float, float, str] | None:
    """Centre, width and words for the window that a selector gives: a preset, or CENTRE,WIDTH.

    None where it gives none, or with `numbered` a number, which means one of the file's own.

    Raises:
        MedR1Error: it is something else.
    """
    text = reference.selector.get("window")
    if text is None or (numbered and text.isdecimal()):
        return None
    if text in CT_WINDOWS:
        center, width = CT_WINDOWS[text]
        return center, width, f"{text}: centre {center}, width {width}"
    if (pair := re.fullmatch(r"(-?\d+\.?\d*),(\d+\.?\d*)", text)) and float(pair[2]) >= (1 if numbered else 1e-9):
        return float(pair[1]), float(pair[2]), f"centre {pair[1]}, width {pair[2]}"
    own = ", the number of a window in the file" if numbered else ""
    raise reference.wrong("window", f"{', '.join(CT_WINDOWS)} (CT only){own} or CENTRE,WIDTH")


def windowed(values: Values, center: float, width: float, function: str = "LINEAR") -> Grey:
    """Grey values through a window; the formulas are DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3 with output 0 to 255.

    Args:
        values: any shape and number type.
        width: at least 1 for LINEAR, above 0 for LINEAR_EXACT and SIGMOID.
        function: LINEAR, LINEAR_EXACT or SIGMOID.

    Raises:
        ValueError: width or function is none of these.
    """
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise ValueError("the window's function is unknown")
    if not np.isfinite([center, width]).all() or not (width >= 1 if function == "LINEAR" else width > 0):
        raise ValueError("the window's width is too small or no number")
    x = values.astype(np.float64) - center
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return _rounded(1 / (1 + np.exp(-4 * x / width)))
    if function == "LINEAR":
        x, width = x + 0.5, width - 1
    return _rounded(x / width + 0.5 if width else x > 0)


def stretched(values: Values, low: float, high: float) -> Grey:
    """Grey values with `low` and below as 0, `high` and above as 255, linear between; all 0 where low == high."""
    x = values.astype(np.float64)
    if not math.isfinite(high - low):  # a range that no float64 holds
        x, low, high = x / 4, low / 4, high / 4
    x -= low
    return _rounded(x / (high - low) if high > low else np.zeros_like(x))


def finite_values(reference: Reference, values: Values) -> Values:
    """The values that are numbers, in one row.

    Raises:
        MedR1Error: there is none, so that there is nothing to show.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        why = "every value is undefined or infinite (NaN, inf)"
        raise MedR1Error(f"{reference}: {why}; choose another part of the file or leave it out")
    return finite


def robust_range(finite: Values) -> tuple[float, float, str]:
    """What to stretch where no window is known: low, high, and how they came about.

    PERCENTILES of the finite values; where those coincide, as in a mask or a sparse map, the smallest and largest.
    """
    low, high = (float(value) for value in np.percentile(finite, PERCENTILES))
    if low < high:
        return low, high, f"{low:g} to {high:g} (percentiles {PERCENTILES[0]} and {PERCENTILES[1]})"
    low, high = float(finite.min()), float(finite.max())
    return low, high, f"{low:g} to {high:g} (smallest and largest value)"


def bits_in_use(values: Values, depth: int | None = None) -> int:
    """Bits that unsigned values take: all that their type (or `depth`) has, or one of DEPTHS where none is above.

    Dark values of 8 bits that were drawn out to 16, all of them multiples of 256 or of 257, take 16.
    """
    whole, largest = depth or 8 * values.dtype.itemsize, int(values.max())
    bits = min(whole, next((bits for bits in (*DEPTHS, 16) if largest < 2**bits), whole))
    is_drawn_out = 8 < bits < 16 <= whole and any(not (values % step).any() for step in (256, 257))
    return 16 if is_drawn_out else bits


def eight_bit_colours(values: Values) -> tuple[Grey, list[str]]:
    """Colours of a palette, whose entries have 8 or 16 bits, as 8 bits, and a warning where fewer than 16 are in use.

    Some writers put colours of 8 or 12 bits into entries of 16.
    """
    if values.dtype == np.uint8:
        return values, []
    bits = bits_in_use(values)
    fewer = [f"no colour of its palette is above {2**bits - 1}: taken as {bits} bits"] if 8 < bits < 16 else []
    return (values >> max(bits - 8, 0)).astype(np.uint8), fewer


def by_table(stored: npt.NDArray[np.integer], function: Callable[[npt.NDArray[np.integer]], Grey]) -> Grey:
    """`function(stored)` for an elementwise function, computed once for each value that there can be."""
    low, high = int(stored.min()), int(stored.max())
    if high - low >= min(1 << 16, stored.size):
        return function(stored)
    return function(np.arange(low, high + 1))[np.subtract(stored, low, dtype=np.int64)]


def square_pixels(reference: Reference, image: Image.Image, height: float, width: float) -> Image.Image:
    """The image with its pixels, `height` x `width` in any one unit, made square: the longer side is drawn out.

    Pixels that are square to 1 % stay untouched.

    Raises:
        MedR1Error: the sides cannot be true.
    """
    aspect = height / width
    if abs(aspect - 1) <= 0.01:
        return image
    size = (image.width, image.height * aspect) if aspect > 1 else (image.width / aspect, image.height)
    if not size[0] * size[1] <= MAX_PIXELS:
        raise MedR1Error(f"{reference}: its header makes pixels {height:g} high and {width:g} wide; mend the header")
    return image.resize((round(size[0]), round(size[1])), Image.Resampling.BILINEAR)


def _rounded(share: Values) -> Grey:
    """A share of white, clipped to [0, 1], as 0 to 255; undefined is black."""
    return np.rint(255 * np.clip(np.nan_to_num(share, nan=0.0), 0, 1)).astype(np.uint8)
