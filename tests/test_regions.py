"""Regions and pointing: hand-drawn boxes, exact chance, and lines that are no box."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from medr1.cli import app
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record
from medr1.data.regions import num_unmatched, overlap, overlap_chance, pointing, read_regions, region_cells
from medr1.errors import MedR1Error

grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


def test_cells_of_a_region() -> None:
    """A grid of 2 x 4 cells of 10 x 10 pixels."""
    size, grid = (40, 20), (2, 4)

    def cells(*boxes: tuple[float, float, float, float]) -> list[tuple[int, int]]:
        return list(zip(*(places.tolist() for places in region_cells(list(boxes), size, grid).nonzero()), strict=True))

    assert cells((12, 2, 18, 8)) == [(0, 1)]
    assert cells((8, 2, 16, 8)) == [(0, 1)], "a third of what the other cell holds is a rim"
    assert cells((7, 2, 14, 8)) == [(0, 0), (0, 1)], "18 pixels are more than half of 24"
    assert cells((8, 8, 12, 12)) == [(0, 0), (0, 1), (1, 0), (1, 1)], "at a corner all four share it"
    assert cells((1, 1, 4, 4), (31, 11, 34, 14)) == [(0, 0), (1, 3)], "two boxes, one region"
    assert cells((1, 1, 9, 9), (2, 2, 8, 8)) == [(0, 0)], "what two boxes share counts once"
    with pytest.raises(ValueError, match="no pixel of the 40 x 20 image"):
        cells((50, 2, 60, 8))
    assert cells((30, 10, 40, 20)) == [(1, 3)]
    for box in ((30, 10, 41, 20), (30, 10, 40, 20.5)):  # of the file before it was turned, or shrunk
        with pytest.raises(ValueError, match=r"its box to 4[01], 20(\.5)? reaches beyond the 40 x 20 image"):
            cells((1, 1, 4, 4), box)


@given(
    st.floats(0, 0.9),
    st.floats(0, 0.9),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.tuples(st.integers(20, 90), st.integers(20, 90)),
    grids,
)
def test_the_most_covered_cell_is_always_one(
    left: float, top: float, across: float, down: float, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    width, height = size
    right, bottom = left * width + across * width + 1, top * height + down * height + 1
    box = (left * width, top * height, min(right, width), min(bottom, height))
    inside = region_cells([box], size, grid)
    assert inside.shape == grid and inside.any()
    if across == down == 1 and left == top == 0:
        assert inside.all()


@given(st.lists(st.booleans(), min_size=1, max_size=8).filter(any))
def test_chance_is_what_random_maps_get(cells: list[bool]) -> None:
    """Over every possible top k, and over every possible hottest cell."""
    inside, num = np.array(cells), len(cells)
    shared = []
    for top in combinations(range(num), int(inside.sum())):
        scores = np.zeros(num)
        scores[list(top)] = 1
        shared.append(overlap(scores, inside))
    assert overlap_chance(inside) == pytest.approx(np.mean(shared))
    assert np.mean([pointing(scores, inside) for scores in np.eye(num)]) == pytest.approx(inside.mean())
    assert pointing(np.zeros(num), inside) == pytest.approx(inside.mean()), "a flat map points nowhere"
    assert overlap(inside.astype(float), inside) == 1


def test_pointing_by_hand() -> None:
    inside = np.array([[True, True], [False, False]])
    assert pointing(np.array([[0.1, 0.9], [0.3, 0.2]]), inside) == 1
    assert pointing(np.array([[0.1, 0.2], [0.9, 0.3]]), inside) == 0
    assert pointing(np.array([[0.1, 0.9], [0.9, 0.2]]), inside) == 0.5
    assert overlap(np.array([[0.1, 0.8], [0.9, 0.2]]), inside) == pytest.approx(1 / 3)
    assert overlap_chance(inside) == pytest.approx(
        (1 * 0 + 4 / 3 + 1 * 1) / 6
    )  # of 6 pairs: 1 misses, 4 share one, 1 hits


def test_lines_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    assert read_regions(tmp_path) == {}
    file = tmp_path / "regions.csv"
    file.write_text("image_path,left,top,right,bottom,label\nImages/a.png,1,2,3.5,4,cyst\nImages/a.png,0,0,9,9,\n")
    assert read_regions(tmp_path) == {tmp_path / "Images/a.png": [(1, 2, 3.5, 4), (0, 0, 9, 9)]}
    for line in (
        "a.png,3,2,1,4",
        "a.png,1,2,x,4",
        "a.png,1,2,3",
        "a.png,-1,0,3,3",
        "a.png,nan,0,3,3",
        "a.png,0,0,inf,3",
    ):
        file.write_text(f"image_path,left,top,right,bottom\n{line}\n")
        with pytest.raises(MedR1Error, match=r"regions\.csv: line 2 is no box"):
            read_regions(tmp_path)
    file.write_text("left,top,right,bottom,image_path\n1,2,3,4\n")
    with pytest.raises(MedR1Error, match=r"regions\.csv: line 2 lacks an image path"):
        read_regions(tmp_path)
    file.write_bytes("image_path,left,top,right,bottom\nbösartig.png,1,2,3,4\n".encode("cp1252"))
    with pytest.raises(MedR1Error, match=r"regions\.csv: not UTF-8 text"):
        read_regions(tmp_path)
    file.write_text("image_path,left,top,right,bottom\n a.png ,1,2,3,4\na.png,5,6,7,8\nb.png,1,2,3,4\n", "utf-16")
    regions = read_regions(tmp_path)
    assert regions == {tmp_path / "a.png": [(1, 2, 3, 4), (5, 6, 7, 8)], tmp_path / "b.png": [(1, 2, 3, 4)]}
    fields = {"question": "?", "options": (), "answer": "x", "modality": None, "question_type": None, "source": "s"}
    record = Record(id="1", images=(tmp_path / "b.png",), group="1", **fields)
    assert (num_unmatched(regions, [record], []), num_unmatched({}, [record])) == (2, 0)
    file.write_text("image_path,x0\na,1\n")
    with pytest.raises(MedR1Error, match="first line lacks bottom, left, right, top"):
        read_regions(tmp_path)


def test_boxes_are_read_before_a_model_and_those_of_no_question_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise MedR1Error("the model is loaded")

    monkeypatch.setattr("medr1.policy.vlm.load_vlm", no_model)
    data = write_phantoms(tmp_path / "data", num_images=16, seed=0)
    command = ["explain", "--data", str(data), "--out", str(tmp_path / "out")]
    with (data / "regions.csv").open("a") as file:
        file.write("Images/other.png,1,2,3,4\n")
    ended = CliRunner().invoke(app, command)
    assert str(ended.exception) == "the model is loaded"
    assert "1 of 17 boxes are of an image that none of these questions shows" in " ".join(ended.output.split())
    (data / "regions.csv").write_bytes(b"\xff")
    assert "regions.csv: not UTF-8 text" in str(CliRunner().invoke(app, command).exception)
