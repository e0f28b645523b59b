"""The kept replies of a study give the kept tables: counted again from them, without the code of the report."""

import csv
import gzip
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

RESULTS = Path(__file__).parents[1] / "results" / "small"
HOMES = ("MRI", "Ultrasound", "OCT")
"""What the study trains on."""
Rows = dict[str, list[dict[str, str]]]
ById = dict[str, dict[str, str]]


def kept(name: str, folder: Path = RESULTS) -> Rows:
    """Rows by evaluation."""
    rows: Rows = {}
    for row in csv.DictReader(io.StringIO(gzip.decompress((folder / name).read_bytes()).decode())):
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


COMPARISONS = {
    "looking-real": (298, [0]),
    "looking-real-50": (360, [0]),
    "looking-objectives": (298, [1]),
    "looking-pairs": (955, [0, 1]),
}
"""Folders of comparisons on real images: questions, and the seeds of the trainings."""


@pytest.mark.parametrize("name", COMPARISONS)
def test_figures_of_looking_on_real_images(name: str) -> None:
    folder, (asked, seeds) = RESULTS.parent / name, COMPARISONS[name]
    rows, told = kept("rows.csv.gz", folder), json.loads((folder / "figures.json").read_text())
    arms = {evaluation.split()[1].rpartition("-")[0] for evaluation in rows}
    assert arms == {"base", "accuracy", "looking", *told["over_accuracy"]} and told["seeds"] == seeds
    found = {}
    for arm in arms:
        of_seeds = []
        for seed in seeds if arm != "base" else [0]:
            own, other = (
                {row["id"]: row for part in told["parts"] for row in rows[f"{part} {arm}-{seed} {way}"]}
                for way in ("image", "shuffled")
            )
            assert own.keys() == other.keys() and len(own) == asked
            of_seeds.append(measures(own, other))
        found[arm] = {name: fmean(of_one[name] for of_one in of_seeds) for name in of_seeds[0]}
        for name, value in found[arm].items():
            assert told[arm][name][0] == pytest.approx(value, abs=1e-4)
    for arm, over in told["over_accuracy"].items():
        for name, value in found[arm].items():
            assert over[name]["over_groups"][0] == pytest.approx(value - found["accuracy"][name], abs=1e-4)


def measures(own: ById, other: ById) -> dict[str, float]:
    """Of the same questions asked with their own image and with another."""
    accuracy, elsewhere = right([*own.values()]), right([*other.values()])
    changed = fmean(own[name]["letter"] != other[name]["letter"] for name in own)
    return {"accuracy": accuracy, "reliance": accuracy - elsewhere, "image_sensitivity": changed}


Cells = dict[tuple[str, str], list[dict]]
"""Rows by cell and condition."""


def kept_cells(keep: Path) -> Cells:
    """What `medr1 study --keep` wrote."""
    cells: Cells = {}
    for path in sorted((keep / "cells").glob("*.json.gz")):
        for condition, columns in json.loads(gzip.decompress(path.read_bytes()))["evaluations"].items():
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            cells[path.name.removesuffix(".json.gz"), condition] = rows
    return cells


def count_again(keep: Path, tables: Path, instead: dict[str, list[dict]] | None = None) -> None:
    """Every matrix, and every average in and out of domain, from kept rows.

    Args:
        instead: rows in place of a cell's.
    """
    answers = {name: rows for (name, condition), rows in kept_cells(keep).items() if condition == "image"}
    if (about := keep / "about.json").is_file():  # tables of the cells that were done then
        answers = {name: answers[name] for name in json.loads(about.read_text())["cells"]}
    answers |= instead or {}
    for rows in answers.values():
        assert all(row["correct"] == (row["letter"] == row["gold"]) for row in rows)
    shares = {name: defaultdict(list) for name in answers}
    for name, rows in answers.items():
        for row in rows:
            for axis in ("modality", "question_type"):
                shares[name][axis, row[axis]].append(row["correct"])

    def named(axis: str, value: str, way: str) -> list[str]:
        """The cells of a value, one a seed; of the base the one that there is."""
        start = re.sub("[^a-z0-9]+", "-", f"{axis} {value} {way} seed".lower())
        return [f"base-{way}"] if f"base-{way}" in answers else [name for name in answers if name.startswith(start)]

    def accuracy(axis: str, value: str, way: str, tested: str) -> float:
        return fmean(fmean(shares[name][axis, tested]) for name in named(axis, value, way))

    counted = 0
    for path in tables.glob("matrix-*.csv"):
        axis, way = re.fullmatch(r"matrix-(modality|question-type)-(.*)", path.stem).groups()
        axis, way = axis.replace("-", "_"), way.replace("grpo-looking", "looking")
        mode = re.sub("^(sft|grpo|looking)-", "", way)
        for row in csv.DictReader(path.open()):
            of = mode if row["trained_on"] == "base" else way
            seen = accuracy(axis, row["trained_on"], of, row["tested_on"])
            assert seen == pytest.approx(float(row["accuracy"])), (path.name, row)
            names = named(axis, row["trained_on"], of)
            assert {len(shares[name][axis, row["tested_on"]]) for name in names} == {int(row["n"])}
            counted += 1
    assert counted
    for row in csv.DictReader((tables / "averages.csv").open()):
        axis, label = row["axis"], row["model"]
        way = re.sub("[^a-z]+", "-", label.lower()).replace("grpo-looking", "looking").removeprefix("base-")
        values = sorted({value for found in shares.values() for of, value in found if of == axis})
        homes = {value for value in values if named(axis, value, way)}
        if label.startswith("base"):  # the values that any way of training in this mode is trained on
            ways = [f"{method}-{way}" for method in ("sft", "grpo", "looking")]
            homes = {value for value in values if any(named(axis, value, of) for of in ways)}
        averages = []
        for tested in values:
            trained = [home for home in homes if (home == tested) == (row["tested_on"] == "own")]
            if trained:
                averages.append(fmean(accuracy(axis, home, way, tested) for home in trained))
        assert fmean(averages) == pytest.approx(float(row["accuracy"])), row
    for row in csv.DictReader((tables / "whole.csv").open()):  # the plain mean of a matrix
        way = re.sub("[^a-z]+", "-", row["after"].lower())
        if row["before"].startswith("base"):
            cells = [*csv.DictReader((tables / f"matrix-{row['axis'].replace('_', '-')}-{way}.csv").open())]
            trained, untrained = (
                fmean(float(cell["accuracy"]) for cell in cells if (cell["trained_on"] == "base") == base)
                for base in (False, True)
            )
        else:  # of the models of the same value and seed that both ways have
            own = [name for name in answers if name.startswith(row["axis"].replace("_", "-"))]
            models = [
                {name.replace(f"-{of}-", " "): name for name in own if f"-{of}-seed" in name}
                for of in (way.replace("grpo-looking", "looking"), re.sub("[^a-z]+", "-", row["before"].lower()))
            ]
            both = models[0].keys() & models[1].keys()
            assert len(both) == int(row["models"])
            values = {value for found in shares.values() for of, value in found if of == row["axis"]}
            trained, untrained = (
                fmean(
                    fmean(fmean(shares[of[name]][row["axis"], tested]) for name in both if name.split()[0] == home)
                    for home in {name.split()[0] for name in both}
                    for tested in values
                )
                for of in models
            )
            assert untrained == pytest.approx(float(row["accuracy_before"])), row
        assert trained == pytest.approx(float(row["accuracy"])), row
        assert trained - untrained == pytest.approx(float(row["difference"])), row


def test_whole_tables_are_counted_again() -> None:
    """Of each study that is kept cell by cell and has tables, of all cells or of those that were done then."""
    for cells in RESULTS.parent.glob("*/cells"):
        if (tables := cells.with_name("tables")).is_dir():
            count_again(cells.parent, tables)
