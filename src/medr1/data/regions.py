"""Does a map point where the finding is? Boxes that a data set states, and two measures against them.

A data folder may hold `regions.csv`, one box a line: image_path (as in the questions), left, top, right, bottom in
pixels of the image as medr1 reads it (turned upright, pixels made square, of a slide the overview): for most files its
own. Several lines of one image are one region together. The phantoms' folder has it.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medr1.data.datasets.tables import is_missing, read_text
from medr1.data.records import Record
from medr1.errors import MedR1Error

REGIONS = "regions.csv"
REGION_COLUMNS = ("image_path", "left", "top", "right", "bottom")

ABOUT_REGION = ("Disease Diagnosis", "Lesion Grading")
"""Question types whose answer is in the region; where an image comes from or which organ it shows is not."""

Box = tuple[float, float, float, float]
Cells = NDArray[np.bool_]


def read_regions(folder: Path) -> dict[Path, list[Box]]:
    """Boxes (left, top, right, bottom) by image path; empty where the folder has no regions.csv.

    Raises:
        MedR1Error: the file is no text, a column is missing, or a line is no box or names no image.
    """
    path = folder / REGIONS
    if not path.is_file():
        return {}
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if missing := set(REGION_COLUMNS) - set(reader.fieldnames or ()):
        raise MedR1Error(f"{path}: the first line lacks {', '.join(sorted(missing))}; name {', '.join(REGION_COLUMNS)}")
    boxes: dict[Path, list[Box]] = {}
    for row in reader:
        try:
            left, top, right, bottom = (float(row[name]) for name in REGION_COLUMNS[1:])
        except (TypeError, ValueError):
            left, top, right, bottom = 0, 0, 0, 0
        if not (0 <= left < right < math.inf and 0 <= top < bottom < math.inf):
            raise MedR1Error(f"{path}: line {reader.line_num} is no box; write 0 <= left < right and 0 <= top < bottom")
        if is_missing(row["image_path"]):
            raise MedR1Error(f"{path}: line {reader.line_num} lacks an image path; fill it in")
        boxes.setdefault(folder / row["image_path"].strip(), []).append((left, top, right, bottom))
    return boxes


def num_unmatched(regions: Mapping[Path, list[Box]], *parts: Iterable[Record]) -> int:
    """Number of boxes whose image no record of these parts shows."""
    if not regions:
        return 0  # no need to go through all records
    shown = {image for records in parts for record in records for image in record.images}
    return sum(len(boxes) for image, boxes in regions.items() if image not in shown)


def region_cells(boxes: list[Box], size: tuple[int, int], grid: tuple[int, int]) -> Cells:
    """The cells (rows, columns) that lie in a region: those that it covers at least half as much as any cell.

    So every region has a cell, a small one that four cells share about equally has four, and a cell that only its
    rim touches does not count.

    Args:
        size: width and height of the image as it is read, in pixels.

    Raises:
        ValueError: no pixel of the image lies in the boxes, or one reaches beyond the image.
    """
    width, height = size
    rows, columns = grid
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    inside_HW = np.zeros((height, width), bool)
    for left, top, right, bottom in boxes:
        inside_HW |= ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))
    covered = np.zeros(grid)
    row_H, column_W = (y * rows / height).astype(int), (x * columns / width).astype(int)
    np.add.at(covered, (row_H[:, None], column_W), inside_HW)
    if not covered.any():
        raise ValueError(f"no pixel of the {width} x {height} image lies in its region")
    if beyond := [box for box in boxes if box[2] > width or box[3] > height]:
        raise ValueError(f"its box to {beyond[0][2]:g}, {beyond[0][3]:g} reaches beyond the {width} x {height} image")
    return covered >= covered.max() / 2


def pointing(scores: NDArray[np.float64], inside: Cells) -> float:
    """1.0 where the hottest cell lies in the region, else 0.0; cells that tie share the point.

    The pointing game of Zhang et al. (IJCV 2018, 126:1084) on cells. A flat map, and one of chance, expect
    `inside.mean()`.
    """
    return float(inside[scores == scores.max()].mean())


def overlap(scores: NDArray[np.float64], inside: Cells) -> float:
    """Intersection over union of the region's k cells with the k hottest ones, in [0, 1]."""
    top = np.zeros(scores.size, bool)
    top[np.argsort(-scores.ravel(), kind="stable")[: inside.sum()]] = True
    return float((top & inside.ravel()).sum() / (top | inside.ravel()).sum())


def overlap_chance(inside: Cells) -> float:
    """What `overlap` expects of k cells drawn at random: the mean of h / (2k - h) over hypergeometric hits h."""
    k = int(inside.sum())
    hits = np.arange(k + 1)
    return float((stats.hypergeom.pmf(hits, inside.size, k, k) * hits / (2 * k - hits)).sum())
