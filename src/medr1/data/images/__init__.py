"""Readers of images: `read_image`, for every supported kind of file."""

from medr1.data.images.contents import Content, all_cores, contents_of, with_contents
from medr1.data.images.identity import group_of, is_salted, name_of_content
from medr1.data.images.kinds import kind_of
from medr1.data.images.limits import MAX_PIXELS
from medr1.data.images.read import Reading, by_warning, expand_reference, file_reference, load_image, read_image
from medr1.data.images.reference import content_digest, file_of, resolve_inside, selector_of

__all__ = [
    "MAX_PIXELS",
    "Content",
    "Reading",
    "all_cores",
    "by_warning",
    "content_digest",
    "contents_of",
    "expand_reference",
    "file_of",
    "file_reference",
    "group_of",
    "is_salted",
    "kind_of",
    "load_image",
    "name_of_content",
    "read_image",
    "resolve_inside",
    "selector_of",
    "with_contents",
]
