"""The kept replies of a study give the kept tables: counted again from rows.csv.gz, without the code of the report."""

import csv
import gzip
import io
from pathlib import Path
from statistics import fmean

import pytest

RESULTS = Path(__file__).parents[1] / "results" / "small"
HOMES = ("MRI", "Ultrasound", "OCT")
"""What the study trains on."""
Rows = dict[str, list[dict[str, str]]]


def kept(name: str) -> Rows:
    """Rows by evaluation."""
    rows: Rows = {}
    for row in csv.DictReader(io.StringIO(gzip.decompress((RESULTS / name).read_bytes()).decode())):
        rows.setdefault(row["evaluation"], []).append(row)
    return rows


def right(rows: list[dict[str, str]]) -> float:
    return fmean(row["correct"] == "True" for row in rows)


@pytest.mark.parametrize("name", ["rows.csv.gz", "base-rows.csv.gz"])
def test_right_is_the_letter_of_the_right_option(name: str) -> None:
    for rows in kept(name).values():
        assert [row["correct"] for row in rows] == [str(row["letter"] == row["gold"]) for row in rows]
        assert len({row["id"] for row in rows}) == len(rows)


def evaluations(method: str, mode: str, home: str) -> list[str]:
    """Of the models trained on one modality, one a seed; the base is the same for all."""
    if method == "base":
        return [f"base-{mode}-image"]
    return [f"modality-{home.lower()}-{method}-{mode}-seed{seed}-image" for seed in (0, 1)]


def test_averages_of_the_study() -> None:
    rows = kept("rows.csv.gz")
    tested = sorted({row["modality"] for row in rows["base-think-image"]})
    with (RESULTS / "tables/averages.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 10
    for line in table:
        method, mode = line["model"].lower().split()
        averages = []
        for modality in tested:
            homes = [home for home in HOMES if (home == modality) == (line["tested_on"] == "own")]
            names = [name for home in homes for name in evaluations(method, mode, home)]
            answers = [right([row for row in rows[name] if row["modality"] == modality]) for name in names]
            averages += [fmean(answers)] if answers else []
        assert fmean(averages) == pytest.approx(float(line["accuracy"]))


def test_table_of_the_base() -> None:
    rows = kept("base-rows.csv.gz")
    lines = (RESULTS / "base.md").read_text().splitlines()[2:]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(shown) == 9
    for name, n, _, _, blanked, seen, *_ in shown:
        for cell, evaluation in ((blanked, "small-blank"), (seen, "small-image")):
            asked = [row for row in rows[evaluation] if name in ("all", row["modality"])]
            assert (f"{len(asked):,}", f"{100 * right(asked):.1f} %") == (n, cell.split(" (")[0])
