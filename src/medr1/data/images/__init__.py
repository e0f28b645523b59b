"""Readers of images: `read_image`, for every supported kind of file."""

from medr1.data.images.identity import group_of
from medr1.data.images.kinds import kind_of
from medr1.data.images.limits import MAX_PIXELS
from medr1.data.images.read import Reading, expand_reference, load_image, read_image
from medr1.data.images.reference import content_digest, file_of, resolve_inside

__all__ = [
    "MAX_PIXELS",
    "Reading",
    "content_digest",
    "expand_reference",
    "file_of",
    "group_of",
    "kind_of",
    "load_image",
    "read_image",
    "resolve_inside",
]
