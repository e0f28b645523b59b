"""What no reader decodes, and how a failure is told."""

import importlib
import logging
from types import ModuleType

from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

logging.getLogger("tifffile").disabled = True  # it would tell on stderr, in its words, what our one line tells

MAX_PIXELS = 80_000_000
"""Largest image that is decoded, in pixels: a mammogram has 30 million, a small bomb billions."""

MAX_BYTES = 4 << 30
"""Largest content that is unpacked from a compressed file."""

MAX_ASPECT = 200
"""Longest side over shortest: the image processors of the Qwen-VL family refuse more."""


def extra(module: str, reference: Reference) -> ModuleType:
    """A module of the extra `medr1[images]`.

    Raises:
        MedR1Error: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MedR1Error(f"{reference}: needs {name}; pip install 'medr1[images]'") from error


def reason(error: Exception) -> str:
    """A decoder's complaint in one line. Not for DICOM, whose decoders quote values of the header."""
    return " ".join(str(error).split()) or type(error).__name__
