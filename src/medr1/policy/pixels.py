"""How large an image may be before a model sees it: `model.min_pixels` and `model.max_pixels` of a recipe.

The processor scales each image into these limits, so that they hold wherever it is asked: in training, evaluation,
`ask` and explanations alike. They are saved with it, and a model that a run or an export wrote keeps its own.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_utils import SizeDict

from medr1.errors import MedR1Error

PUBLISHED = 401_408
"""Pixels of an image at most, in the published recipe (arXiv:2503.13939): 512 tokens of 28 x 28 pixels for Qwen2-VL."""
MANY_TOKENS = 4_096
"""Tokens of an image above which the limit in a processor's files is none that was meant: Qwen-VL's own say 16,384."""
MAX_TILES = 6
"""Tiles along a side, for which Idefics3 and SmolVLM have tokens."""


def limit_pixels(processor: Any, name: str, *, min_pixels: int = 0, max_pixels: int = 0) -> None:
    """Set the pixels of an image (width x height) at least and at most; 0 leaves the processor's own limit.

    Qwen-VL's processors scale an image between them, to whole tokens. Those that cut an image into tiles (Idefics3,
    SmolVLM) scale each to one longest edge: it becomes that of the largest square of whole tiles within `max_pixels`.

    Raises:
        MedR1Error: limits that contradict each other or leave not one token or tile, or that this processor lacks.
    """
    if not (min_pixels or max_pixels):
        return
    images = processor.image_processor
    if is_tiled(images):
        _limit_tiles(images, name, min_pixels, max_pixels)
        return
    if not scales_by_pixels(images):
        raise MedR1Error(
            f"{name}: its images have sizes of their own; leave model.min_pixels and model.max_pixels at 0"
        )
    token = (images.patch_size * images.merge_size) ** 2
    own_least, own_most = limits(images)
    most = max_pixels or own_most
    least = min_pixels or min(own_least, most)
    if most < token:
        raise MedR1Error(f"model.max_pixels = {most}: a token of {name} stands for {token}; set at least that")
    if least > most:
        raise MedR1Error(f"model.min_pixels = {least} is above model.max_pixels = {most}; lower it")
    frames = _frames(images)
    images.size = SizeDict(shortest_edge=least * frames, longest_edge=most * frames)


def limit_as_published(processor: Any, name: str, folder: Path) -> None:
    """At most PUBLISHED pixels, where the processor's files set no limit that was meant; see `most_pixels`.

    Not of what a run or an export wrote into `folder`: it was trained with the limits that it was saved with.
    """
    from medr1.config import EXPORTED, RECIPE  # needs pydantic, which a borrowed GPU may lack

    if (folder.resolve().parent / RECIPE).is_file() or any((folder / file).is_file() for file in (RECIPE, EXPORTED)):
        return
    images = processor.image_processor
    if scales_by_pixels(images) and (most := most_pixels(images)) < limits(images)[1]:
        limit_pixels(processor, name, max_pixels=most)


def most_pixels(image_processor: Any) -> int:
    """Pixels of an image at most: the limit in a processor's files, or PUBLISHED where that is above MANY_TOKENS."""
    most = limits(image_processor)[1]
    token = (image_processor.patch_size * image_processor.merge_size) ** 2
    return PUBLISHED if most > MANY_TOKENS * token else most


def limits(image_processor: Any) -> tuple[int, int]:
    """Pixels of an image at least and at most, of a processor that `scales_by_pixels`."""
    frames = _frames(image_processor)
    return image_processor.size["shortest_edge"] // frames, image_processor.size["longest_edge"] // frames


def _frames(image_processor: Any) -> int:
    """How often the limits count a pixel: GLM's once for each of the frames that an image is made into."""
    return image_processor.temporal_patch_size if type(image_processor).__name__.startswith("Glm") else 1


def scales_by_pixels(image_processor: Any) -> bool:
    """Whether these limits are the processor's own way, as of Qwen-VL's, which calls areas edges."""
    size = image_processor.size
    return hasattr(image_processor, "merge_size") and "shortest_edge" in size and "longest_edge" in size


def is_tiled(image_processor: Any) -> bool:
    """Whether a processor cuts images into tiles, as Idefics3's and SmolVLM's do."""
    return hasattr(image_processor, "max_image_size") and "longest_edge" in image_processor.size


def as_scaled(processor: Any, image: Image.Image) -> Image.Image:
    """The image as the processor scales it, so that another one with wider limits leaves it as it is.

    Of tiles the same image: a processor scales every one to its longest edge.
    """
    images = processor.image_processor
    if not scales_by_pixels(images):
        return image
    scaled = images.resize(
        images.process_image(image, do_convert_rgb=True),  # (3, height, width), whole numbers
        size=images.size,
        resample=images.resample,
        factor=images.patch_size * images.merge_size,
    )
    return Image.fromarray(np.moveaxis(np.asarray(scaled), 0, 2))


def _limit_tiles(images: Any, name: str, min_pixels: int, max_pixels: int) -> None:
    tile = images.max_image_size["longest_edge"]
    if min_pixels:
        raise MedR1Error(f"{name} scales every image to one longest edge; leave model.min_pixels at 0")
    tiles = min(math.isqrt(max_pixels) // tile, MAX_TILES)
    if not tiles:
        raise MedR1Error(
            f"model.max_pixels = {max_pixels}: a tile of {name} is {tile} x {tile}; set at least {tile**2}"
        )
    images.size = SizeDict(longest_edge=tiles * tile)
