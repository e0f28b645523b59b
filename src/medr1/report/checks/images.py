"""Copies among the images: the same bytes, the same pixels, nearly the same look.

Nearly the same look: the 64-bit perceptual hashes (imagehash's pHash, the signs of an 8 x 8 block of a cosine
transform) differ in at most MAX_DISTANCE bits, and the grey values at SIDE x SIDE correlate by at least
MIN_CORRELATION. Radiographs of one view and photographs of one organ look alike without being one picture:
such a pair is a candidate for the eye, not a verdict.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import imagehash
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from medr1.data.images import all_cores, by_warning, contents_of, file_of, read_image
from medr1.data.records import Record
from medr1.errors import MedR1Error

HASH_BITS = 64
MAX_DISTANCE = 4
"""Bits in which the hashes of a candidate pair may differ."""
MIN_CORRELATION = 0.95
"""Pearson correlation of grey values from which a candidate is kept."""
SIDE = 64
"""Pixels of the square that correlations are taken on; SIDE * SIDE bytes an image are held in memory."""

Item = TypeVar("Item")


class Near(NamedTuple):
    """Two pictures that look alike, by their number in `Pictures.paths`."""

    first: int
    second: int
    distance: int
    correlation: float


@dataclass(frozen=True)
class Pictures:
    """What the image files of a data set hold; item i of each list belongs to paths[i]."""

    paths: list[Path]
    """Files that could be decoded."""
    file_hashes: list[str]
    """SHA-256 of the file's bytes, as the split has it (`medr1.data.images.contents_of`)."""
    pixel_hashes: list[str]
    """SHA-256 of size and decoded RGB pixels, as the split has it."""
    missing: list[Path]
    unreadable: list[str]
    """One line for each file that is there and cannot be decoded."""
    num_candidates: int
    """Pairs of different pixels whose hashes are near."""
    near: list[Near]
    """Those of them that correlate. Of several files with the same pixels only the first is compared."""
    content: dict[Path, str]
    """Every image to its pixels' hash, or where it could not be decoded to its path."""
    near_content: dict[str, set[str]]
    """Pixels' hash to those of the pictures that look alike."""
    warned: dict[str, list[Path]]
    """Files by what `read_image` warns of, see `by_warning`."""


def look_at(images: Sequence[Path]) -> Pictures:
    """Decode every image file once, with a progress bar on stderr, and compare them."""
    missing, unreadable, paths, file_hashes, pixel_hashes, perceptual, grey = [], [], [], [], [], [], []
    warned: dict[Path, list[str]] = {}
    contents = contents_of(images)
    looks = track(all_cores(_look, images), "images", total=len(images), console=Console(stderr=True))
    for image, look in zip(images, looks, strict=True):
        if look is None:
            missing.append(image)
        elif isinstance(look, str):
            unreadable.append(look)
        else:
            paths.append(image)
            file_hashes.append(contents[image].file)
            pixel_hashes.append(contents[image].pixels or str(image))
            perceptual.append(look[0])
            grey.append(look[1])
            warned[image] = look[2]
    num_candidates, near = _near(pixel_hashes, perceptual, grey)
    near_content: dict[str, set[str]] = defaultdict(set)
    for pair in near:
        first, second = pixel_hashes[pair.first], pixel_hashes[pair.second]
        near_content[first].add(second)
        near_content[second].add(first)
    content = {image: str(image) for image in images} | dict(zip(paths, pixel_hashes, strict=True))
    read = (paths, file_hashes, pixel_hashes, missing, unreadable)
    return Pictures(*read, num_candidates, near, content, dict(near_content), by_warning(warned))


def _look(image: Path) -> tuple[int, npt.NDArray[np.uint8], list[str]] | str | None:
    """Perceptual hash, grey values (SIDE * SIDE,) and warnings; a line for what cannot be decoded, None for what is not
    there.
    """
    if not os.path.isfile(file_of(image)):
        return None
    try:
        reading = read_image(image)
    except MedR1Error as error:
        return str(error)
    flat = reading.image.convert("L")
    hashed = int(str(imagehash.phash(flat)), 16)
    return hashed, np.asarray(flat.resize((SIDE, SIDE))).ravel(), reading.decisions["warnings"]


def copies(items: Sequence[Item], keys: Sequence[Hashable]) -> list[list[Item]]:
    """Sets of two or more items with the same key, in the order of the items."""
    by_key: dict[Hashable, list[Item]] = defaultdict(list)
    for item, key in zip(items, keys, strict=True):
        by_key[key].append(item)
    return [same for same in by_key.values() if len(same) > 1]


def near_pairs(hashes_N: npt.NDArray[np.uint64], max_distance: int = MAX_DISTANCE) -> npt.NDArray[np.int64]:
    """All pairs (P, 2), first < second, in order, of 64-bit hashes that differ in at most `max_distance` bits.

    Two such hashes agree in one of max_distance + 1 bands of bits (pigeonhole), so only hashes that share a
    band are compared.
    """
    edges = np.linspace(0, HASH_BITS, max_distance + 2).astype(int).tolist()
    found = [np.empty((0, 2), np.int64)]
    for low, high in itertools.pairwise(edges):
        band_N = (hashes_N >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band_N, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(band_N[order])) + 1):
            for position, first in enumerate(same[:-1]):
                others = same[position + 1 :]
                second = others[np.bitwise_count(hashes_N[others] ^ hashes_N[first]) <= max_distance]
                found.append(np.stack([np.full_like(second, first), second], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def correlations(grey_NP: npt.NDArray[np.uint8], pairs_K2: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Pearson correlation (K,) of the grey values of each pair of rows, of which none may be constant."""
    parts = [np.empty(0)]
    for some in np.array_split(pairs_K2, len(pairs_K2) // 4096 + 1):  # 4096 pairs are 256 MB as floats
        first, second = (grey_NP[some[:, side]].astype(np.float64) for side in (0, 1))
        first -= first.mean(axis=1, keepdims=True)
        second -= second.mean(axis=1, keepdims=True)
        parts.append(np.vecdot(first, second) / np.sqrt(np.vecdot(first, first) * np.vecdot(second, second)))
    return np.concatenate(parts)


def _near(pixel_hashes: Sequence[str], perceptual: Sequence[int], grey: Sequence[np.ndarray]) -> tuple[int, list[Near]]:
    """(number of pairs with near hashes, those that correlate too), over pictures that differ and are not constant."""
    first_with = {pixels: number for number, pixels in reversed(list(enumerate(pixel_hashes)))}
    kept = np.array(sorted(number for number in first_with.values() if np.ptp(grey[number])), dtype=np.int64)
    if not len(kept):
        return 0, []
    hashes_N = np.array(perceptual, dtype=np.uint64)
    pairs_K2 = kept[near_pairs(hashes_N[kept])]
    correlation_K = correlations(np.stack(grey), pairs_K2)
    distance_K = np.bitwise_count(hashes_N[pairs_K2[:, 0]] ^ hashes_N[pairs_K2[:, 1]])
    return len(pairs_K2), [
        Near(int(first), int(second), int(distance), float(correlation))
        for (first, second), distance, correlation in zip(pairs_K2, distance_K, correlation_K, strict=True)
        if correlation >= MIN_CORRELATION
    ]


def image_findings(
    pictures: Pictures, records: Sequence[Record], parts: Iterable[Sequence[Record]] | None, folder: Path
) -> dict[str, Any]:
    """What is wrong with the images, by their names below `folder`.

    Args:
        pictures: `look_at` the images of the records.
        records: all.
        parts: our train and test, or None.
        folder: that of the data set.

    Returns:
        num (named by records), read, missing, unreadable (one line each), warnings ({"warning", "num", "first"}; the
        most frequent first). Of those read: byte_copies,
        pixel_copies, pixel_copies_across_groups (sets), near_candidates (number of pairs with near hashes) and
        near_duplicates, those of them that correlate: {"images", "distance", "correlation", "across_groups",
        "across_parts"}, pairs across our parts first, then across groups, then by falling correlation; and
        near_across_groups, near_across_parts, the numbers of such pairs. These are None where none was read.
    """
    groups, sides = defaultdict[str, set[Any]](set), defaultdict[str, set[Any]](set)
    for record in records:
        for image in record.images:
            groups[pictures.content[image]].add(record.group)  # one name for all that share a patient, lesion or study
    for side, part in enumerate(parts or ()):
        for record in part:
            for image in record.images:
                sides[pictures.content[image]].add(side)

    def name(image: Path) -> str:
        return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else str(image)

    pairs: list[dict[str, Any]] = []
    for pair in pictures.near:
        first, second = pictures.pixel_hashes[pair.first], pictures.pixel_hashes[pair.second]
        pairs.append(
            {
                "images": [name(pictures.paths[pair.first]), name(pictures.paths[pair.second])],
                "distance": pair.distance,
                "correlation": pair.correlation,
                "across_groups": len(groups[first] | groups[second]) > 1,
                "across_parts": len(sides[first] | sides[second]) > 1,
            }
        )
    pairs.sort(key=lambda p: (not p["across_parts"], not p["across_groups"], -p["correlation"], p["images"]))
    byte_copies = copies(pictures.paths, pictures.file_hashes)
    pixel_copies = copies(pictures.paths, pictures.pixel_hashes)
    across = [same for same in pixel_copies if len(groups[pictures.content[same[0]]]) > 1]
    of_read = {
        "byte_copies": [list(map(name, same)) for same in byte_copies],
        "pixel_copies": [list(map(name, same)) for same in pixel_copies],
        "pixel_copies_across_groups": [list(map(name, same)) for same in across],
        "near_candidates": pictures.num_candidates,
        "near_duplicates": pairs,
        "near_across_groups": sum(pair["across_groups"] for pair in pairs),
        "near_across_parts": sum(pair["across_parts"] for pair in pairs),
    }
    return {
        "num": len(pictures.content),
        "read": len(pictures.paths),
        "missing": list(map(name, pictures.missing)),
        "unreadable": pictures.unreadable,
        "warnings": [
            {"warning": warning, "num": len(images), "first": name(images[0])}
            for warning, images in pictures.warned.items()
        ],
        **(of_read if pictures.paths else dict.fromkeys(of_read)),
    }
