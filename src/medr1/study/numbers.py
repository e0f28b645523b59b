"""What a study's rows say, as numbers: averages in and out of domain, matrices, comparisons, controls, option order.

A `Line` is one way of training along one axis: a model a value of the axis (CT, MRI, …) and seed. Its answers are put
together into evaluations with one row a question, so that the statistics of
`medr1.evaluation.metrics` apply as they are:

- own: each question answered by the model that was trained on its value;
- others: each question answered by the models trained on other values, `correct` being the mean of these;
- whole: each question answered by all of them, likewise, so that the average over an axis is that of the whole matrix,
  which is how the published study averages.

Several seeds of one value are averaged first, so that a value with more of them counts no more. Intervals therefore
count groups of questions, given the models that were trained; what each seed gave stands beside them. Averages over an
axis count each of its values once. Two ways of training are compared over the cells that both have: those of the same
value and seed.
"""

import json
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from medr1.data.claims import claims_to_see
from medr1.data.prompts import MODES
from medr1.errors import MedR1Error
from medr1.evaluation.intervals import mean_interval
from medr1.evaluation.looking import cell_of, paired, values
from medr1.evaluation.metrics import (
    AXES,
    Row,
    accuracy_table,
    flip_rate,
    judged,
    macro,
    paired_change,
    shared_groups,
    summarise,
)
from medr1.evaluation.rows import differing, read_rows

METHODS = {"sft": "SFT", "grpo": "GRPO", "looking": "GRPO, looking,"}
"""As labels begin."""
CONTROLS = ("blank", "no_image", "shuffled", "shuffled_other")
SIDES = ("own", "others")
WHOLE = "whole"
IDENTITY = ("method", "mode", "axis", "trained_on", "seed", "model")
"""What tells one model, asked in one mode, from any other."""

NEEDED = (
    "id", "modality", "question_type", "group", "chance", "correct", "outcome", "letter", "options", "finish",
    "format_ok", "tokens",
)  # fmt: skip
"""Fields of a row that numbers are made of; the long texts stay in the files."""


@dataclass(frozen=True)
class Entry:
    """One entry of results.json's "evaluations", with the needed fields of its rows."""

    method: str
    """"base", "sft", "grpo", "looking" or "baseline"."""
    mode: str
    axis: str | None
    trained_on: str | None
    seed: int | None
    model: str
    condition: str
    file: Path
    rows: list[Row]


@dataclass(frozen=True)
class Line:
    """One way of training along one axis."""

    axis: str
    method: str
    mode: str

    @property
    def label(self) -> str:
        """As the report names it, such as "GRPO think"."""
        return f"{METHODS[self.method]} {self.mode}"


Trained = Set[tuple[str | None, int | None]]
"""(value trained on, seed) of some of a line's models."""


class StudyResults:
    """A finished study's folder: results.json and the rows that it names.

    Raises:
        MedR1Error: results.json or a file of rows is missing or not what it should be.
    """

    def __init__(self, folder: Path):
        path = folder / "results.json"
        try:
            self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = self.results["evaluations"]
        except (OSError, ValueError, KeyError) as error:
            raise MedR1Error(f"{path}: holds no finished study; run `medr1 study` to its end first") from error
        self.folder = folder
        self.entries = [
            Entry(
                **{name: entry[name] for name in IDENTITY},
                condition=entry["condition"],
                file=folder / entry["rows"],
                rows=_read(folder / entry["rows"], entry["condition"], entry["mode"]),
            )
            for entry in found
        ]
        order = [*AXES, *METHODS, *MODES]
        self.lines = sorted(
            {Line(entry.axis, entry.method, entry.mode) for entry in self.entries if entry.axis},
            key=lambda line: [order.index(part) for part in (line.axis, line.method, line.mode)],
        )

    def of(self, line: Line, condition: str = "image", among: Trained | None = None) -> list[Entry]:
        """The evaluations of a line's models, or of those among them, in the order of the axis and of the seeds."""
        wanted = (line.axis, line.method, line.mode, condition)
        asked = [e for e in self.entries if (e.axis, e.method, e.mode, e.condition) == wanted]
        kept = [e for e in asked if among is None or (e.trained_on, e.seed) in among]
        return sorted(kept, key=lambda entry: (AXES[line.axis].index(str(entry.trained_on)), entry.seed))

    def trained(self, line: Line) -> Trained:
        """A line's models."""
        return {(entry.trained_on, entry.seed) for entry in self.of(line)}

    def base(self, mode: str, condition: str = "image") -> list[Row]:
        """Rows of the untrained model asked so; none where it was not."""
        asked = ("base", mode, condition)
        return [row for e in self.entries if (e.method, e.mode, e.condition) == asked for row in e.rows]

    def own(self, line: Line, condition: str = "image", among: Trained | None = None) -> list[Row]:
        """One row a question: what the model trained on its value answers, averaged over seeds."""
        return averaged(self.of(line, condition, among), tested_on_own)

    def others(self, line: Line, condition: str = "image", among: Trained | None = None) -> list[Row]:
        """One row a question: what the models trained on other values answer, averaged over seeds and over these."""
        return averaged(
            self.of(line, condition, among), lambda entry, row: row[line.axis] not in (entry.trained_on, None)
        )

    def whole(self, line: Line, condition: str = "image", among: Trained | None = None) -> list[Row]:
        """One row a question: what all models answer, averaged over seeds and over the values trained on."""
        return averaged(self.of(line, condition, among), lambda entry, row: row[line.axis] is not None)

    def same_model(self, entry: Entry, condition: str) -> Entry | None:
        """The evaluation of the same model in the same mode under another condition; None where it was not asked."""
        wanted = [condition, *(getattr(entry, name) for name in IDENTITY)]
        return next((e for e in self.entries if [e.condition, *(getattr(e, n) for n in IDENTITY)] == wanted), None)


def study_numbers(study: StudyResults) -> dict[str, Any]:
    """Every number of the report, JSON-like.

    Returns:
        lines: what `line_numbers` gives, in the order of the report, the costs of controls with what `metrics.judged`
            says of all of them together, and their `verdict`.
        comparisons: what `comparisons` gives.
        whole: the same over the whole matrix, corrected by itself: it averages the same answers once more.
        matrices: what `matrix` gives for each line.
        bases: what `bases` gives.
        untrained: what `untrained` gives.
        order: what `option_order` gives.
        not_ordered: methods, as labels name them, none of whose models was asked so.
    """
    lines = [line_numbers(study, line) for line in study.lines]
    trained = {line.method for line in study.lines}
    ordered = {entry.method for entry in study.entries if entry.condition == "permuted"}
    controls = [control for line in lines for control in line["controls"].values()]
    for control, cost in zip(controls, judged([control["cost"] for control in controls]), strict=True):
        control["cost"] = {**cost, "verdict": verdict(cost)}
    return {
        "lines": lines,
        "comparisons": comparisons(study),
        "whole": comparisons(study, (WHOLE,)),
        "matrices": [matrix(study, line) for line in study.lines],
        "bases": bases(study),
        "untrained": untrained(study),
        "order": option_order(study),
        "not_ordered": [METHODS[method].rstrip(",") for method in METHODS if method in trained - ordered],
    }


def line_numbers(study: StudyResults, line: Line) -> dict[str, Any]:
    """Averages of a line over its axis; accuracies are what `average` gives.

    Returns:
        axis, method, mode, label, seeds; values, those that it has models of, and num_values, those that are tested.
        own, others, whole, base: in the own domain, in the others, in all; of the untrained model in the own domain.
        seeds_own: accuracy in the own domain, one a seed, over the values that have all of them: num_seeded of them.
        prior: average of the option-text prior learned on a value and tested on it.
        controls: condition to accuracy in the own domain, with `cost`: what the image adds on the same questions, see
            `metrics.paired_change`.
        looking: what `looking.cell_of` gives of each measure that its controls allow, in the own domain, each question
            once, averaged over seeds; with `change`, `looking.paired` against the untrained model, None where that was
            not asked so.
        replies: of the own domain and all seeds, see `metrics.summarise`.
    """
    own, entries = study.own(line), study.of(line)
    trained = study.trained(line)
    seeds = sorted({seed for _, seed in trained if seed is not None})
    named = list(dict.fromkeys(entry.trained_on for entry in entries))
    seeded = [value for value in named if all((value, seed) in trained for seed in seeds)]
    by_seed = [study.own(line, among={(value, seed) for value in seeded}) for seed in seeds]
    controls = {}
    for condition in CONTROLS:
        if without := study.own(line, condition):
            cost = paired_change(without, asked_too(own, without), line.axis)
            controls[condition] = {**average(without, line.axis), "cost": cost}
    priors = {p["trained_on"]: p["table"] for p in study.results["priors"] if p["axis"] == line.axis}
    asked = [[row["group"] for row in own if row[line.axis] == value] for value in named]
    return {
        "axis": line.axis,
        "method": line.method,
        "mode": line.mode,
        "label": line.label,
        "seeds": seeds,
        "values": named,
        "num_values": len({row[line.axis] for row in study.base(line.mode)} - {None}),
        "num_seeded": len(seeded),
        "own": average(own, line.axis),
        "others": average(study.others(line), line.axis),
        "whole": average(study.whole(line), line.axis),
        "base": average(asked_too(study.base(line.mode), own), line.axis),
        "seeds_own": [macro(rows, line.axis)["accuracy"] for rows in by_seed],
        "prior": _prior_average([priors[value][f"by_{line.axis}"][value] for value in named], asked),
        "controls": controls,
        "looking": _looking(study, line),
        "replies": summarise([row for entry in entries for row in entry.rows if tested_on_own(entry, row)]),
    }


LOOKING = ("reliance", "reliance_blank", "sensitivity", "claims", "hallucinated")
"""Measures of looking that a study's controls allow."""


def _looking(study: StudyResults, line: Line) -> dict[str, dict[str, Any]]:
    own = _looked(study, study.of(line), tested_on_own)
    untrained = [e for e in study.entries if (e.method, e.mode, e.condition) == ("base", line.mode, "image")]
    base = _looked(study, untrained, lambda entry, row: row[line.axis] is not None)
    groups = {row["id"]: row["group"] for entry in study.of(line) for row in entry.rows}
    if len(own) == 2:  # accuracy and claims, which need no control
        return {}
    return {
        name: {
            **cell_of(name, own[name], groups),
            "change": paired(name, base[name], own[name], groups) if name in base else None,
        }
        for name in LOOKING
        if name in own
    }


def _looked(
    study: StudyResults, entries: Iterable[Entry], keep: Callable[[Entry, Row], bool]
) -> dict[str, dict[str, float]]:
    """`looking.values` of the kept rows, averaged over the models that answered a question."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in entries:
        asked = {"image": [row for row in entry.rows if keep(entry, row)]}
        others = {name: study.same_model(entry, name) for name in ("shuffled", "blank")}
        asked |= {name: other.rows for name, other in others.items() if other}
        for name, of in values(asked).items():
            for question, value in of.items():
                found.setdefault(name, {}).setdefault(question, []).append(value)
    return {name: {question: sum(v) / len(v) for question, v in of.items()} for name, of in found.items()}


def comparisons(study: StudyResults, sides: Sequence[str] = SIDES) -> list[dict[str, Any]]:
    """The study's questions: each line against the base, GRPO against SFT, think against no-think, looking against
    plain GRPO of the same mode; on each side. Two lines are compared over the models that both have.

    Returns:
        axis, side ("own", "others" or "whole"), kind ("base", "sft", "think", "looking", and "reliance": the last one's
        of accuracy with the own image less accuracy with another one of the modality, each question counting once),
        after, before (labels), models (of each of the two), accuracy and accuracy_before (what `average` gives of
        these models), and what `metrics.judged` gives for the averages over the axis, corrected over all comparisons,
        with its `verdict`.
    """

    @cache  # the same models are compared with several
    def rows(line: Line, side: str, among: frozenset[Any]) -> list[Row]:
        answers = {"own": study.own, "others": study.others, WHOLE: study.whole}[side]
        return answers(line, among=among)

    names, changes = [], []
    for axis in AXES:
        lines = [line for line in study.lines if line.axis == axis]
        groups = {row["id"]: row["group"] for entry in study.entries if entry.axis == axis for row in entry.rows}
        for side in sides:
            for kind, before, after in _pairs(lines):
                among = frozenset(study.trained(after) & study.trained(before or after))
                new = rows(after, side, among)
                old = rows(before, side, among) if before else study.base(after.mode)
                label = before.label if before else f"base {after.mode}"
                old, new = asked_too(old, new), asked_too(new, old)
                name = {"axis": axis, "side": side, "after": after.label, "before": label, "models": len(among)}
                name |= {"accuracy": average(new, axis), "accuracy_before": average(old, axis)}
                found = {kind: paired_change(old, new, axis)}
                if kind == "looking" and before and side == "own":
                    lost, won = (_looked(study, study.of(of, among=among), tested_on_own) for of in (before, after))
                    if "reliance" in lost and "reliance" in won:
                        found["reliance"] = paired("reliance", lost["reliance"], won["reliance"], groups)
                for what, change in found.items():
                    if change["n"]:
                        names.append({**name, "kind": what})
                        changes.append(change)
    return [{**name, **change, "verdict": verdict(change)} for name, change in zip(names, judged(changes), strict=True)]


def matrix(study: StudyResults, line: Line) -> dict[str, Any]:
    """Each value trained on against each value tested on.

    Returns:
        axis, label, values: the values tested, in the order of records.py.
        base: the untrained model's cell (`metrics.accuracy_table`) for each of them, and its `average`.
        rows: for each value trained on: trained_on; cells, one for each value tested: tested_on, accuracy, ci95, n,
            chance, base (accuracy), seeds (accuracy one a seed), change (what `metrics.judged` gives, corrected over
            the matrix, with its `verdict`); average: `metrics.macro` and its `difference` from the base's; prior:
            accuracy of the option-text prior learned on this value and tested on it.
    """
    base = study.base(line.mode)
    base_cells, base_average = accuracy_table(base)[f"by_{line.axis}"], macro(base, line.axis)
    values = [value for value in AXES[line.axis] if value in base_cells]
    priors = {p["trained_on"]: p["table"] for p in study.results["priors"] if p["axis"] == line.axis}
    rows, changes = [], []
    for trained_on in dict.fromkeys(entry.trained_on for entry in study.of(line)):
        seeds = [entry for entry in study.of(line) if entry.trained_on == trained_on]
        answers = averaged(seeds, lambda entry, row: row[line.axis] is not None)
        after = accuracy_table(answers)[f"by_{line.axis}"]
        by_seed = [accuracy_table(entry.rows)[f"by_{line.axis}"] for entry in seeds]
        cells = []
        for value in values:
            before, now = ([row for row in part if row[line.axis] == value] for part in (base, answers))
            changes.append(paired_change(before, now))
            seen = [table[value]["accuracy"] for table in by_seed]
            cells.append({"tested_on": value, **after[value], "base": base_cells[value]["accuracy"], "seeds": seen})
        average = macro(answers, line.axis)
        rows.append(
            {
                "trained_on": trained_on,
                "cells": cells,
                "average": {**average, "difference": average["accuracy"] - base_average["accuracy"]},
                "prior": priors[trained_on][f"by_{line.axis}"][trained_on]["accuracy"],
            }
        )
    marked = iter(judged(changes))
    for cell in (cell for row in rows for cell in row["cells"]):
        change = next(marked)
        cell["change"] = {**change, "verdict": verdict(change)}
    return {
        "axis": line.axis,
        "label": line.label,
        "values": values,
        "base": {"cells": [base_cells[value] for value in values], "average": base_average},
        "rows": rows,
    }


def bases(study: StudyResults) -> list[dict[str, Any]]:
    """The untrained model on the questions that the lines of an axis answer, for each axis and each mode.

    Returns:
        axis, mode, own and others (`average`), controls: condition to accuracy in the own domain.
    """
    found = []
    for axis in dict.fromkeys(line.axis for line in study.lines):
        for mode in MODES:
            trained = {entry.trained_on for entry in study.entries if (entry.axis, entry.mode) == (axis, mode)}
            rows = study.base(mode)
            if own := [row for row in rows if row[axis] in trained]:
                others = [row for row in rows if {row[axis]} != trained]  # two values are each other's
                asked = {name: asked_too(study.base(mode, name), own) for name in CONTROLS}
                controls = {name: average(without, axis) for name, without in asked.items() if without}
                about = {"axis": axis, "mode": mode, "own": average(own, axis), "others": average(others, axis)}
                found.append({**about, "controls": controls})
    return found


def untrained(study: StudyResults) -> list[dict[str, Any]]:
    """Models asked as they are, each in each mode.

    Returns:
        method ("base" or "baseline"), model, mode, all (`metrics.summarise`), modality and question_type
        (`average`).
    """
    found = []
    for entry in study.entries:
        if entry.axis is None and entry.condition == "image":
            averages = {axis: average(entry.rows, axis) for axis in AXES}
            about = {name: getattr(entry, name) for name in ("method", "model", "mode")}
            found.append({**about, "all": summarise(entry.rows), **averages})
    return found


def option_order(study: StudyResults) -> list[dict[str, Any]]:
    """How often a model chooses another option text once the options change places, and once nothing changes.

    Returns:
        label, permuted and repeat (what `metrics.flip_rate` gives, None where it was not asked), for each model that
        was asked with permuted options.
    """
    found = []
    for entry in study.entries:
        if entry.condition == "permuted":
            image, again = study.same_model(entry, "image"), study.same_model(entry, "repeat")
            assert image, "every model is asked with the image as it is"
            trained = f", trained on {entry.trained_on}, seed {entry.seed}" if entry.trained_on else ""
            name = Line(entry.axis, entry.method, entry.mode).label if entry.axis else f"{entry.method} {entry.mode}"
            found.append(
                {
                    "label": f"{name}{trained}",
                    "permuted": flip_rate(asked_too(image.rows, entry.rows), entry.rows),
                    "repeat": flip_rate(asked_too(image.rows, again.rows), again.rows) if again else None,
                }
            )
    return found


def verdict(change: dict[str, Any]) -> str:
    """Of a change as `metrics.judged` gives it: "up", "down", "noise" or "too few"."""
    if change["significant"] is None:
        return "too few"
    return "noise" if not change["significant"] else "up" if change["difference"] > 0 else "down"


def average(rows: Sequence[Row], axis: str) -> dict[str, Any]:
    """`metrics.macro`, with the number of questions."""
    return {**macro(rows, axis), "questions": sum(row[axis] is not None for row in rows)}


def averaged(entries: Iterable[Entry], keep: Callable[[Entry, Row], bool]) -> list[Row]:
    """One row a question, by id, of the kept rows of several evaluations; `correct` is the mean over the values that
    were trained on, of the mean over the models of each.
    """
    rows: dict[str, Row] = {}
    answers: dict[str, dict[str | None, list[float]]] = {}
    for entry in entries:
        for row in entry.rows:
            if keep(entry, row):
                rows[row["id"]] = row
                answers.setdefault(row["id"], {}).setdefault(entry.trained_on, []).append(float(row["correct"]))
    return [{**rows[name], "correct": _mean(map(_mean, answers[name].values()))} for name in sorted(rows)]


def _mean(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found)


def tested_on_own(entry: Entry, row: Row) -> bool:
    """Whether a row is a question of the value that its model was trained on."""
    return row[str(entry.axis)] == entry.trained_on


def asked_too(rows: Iterable[Row], others: Iterable[Row]) -> list[Row]:
    """Those rows whose question is also among the others."""
    ids = {row["id"] for row in others}
    return [row for row in rows if row["id"] in ids]


def _pairs(lines: Sequence[Line]) -> list[tuple[str, Line | None, Line]]:
    """(kind, before, after) of what the study compares on one axis; before is None for the base."""
    pairs: list[tuple[str, Line | None, Line]] = [("base", None, line) for line in lines]
    supervised = [line for line in lines if line.method == "sft"]
    reinforced = [line for line in lines if line.method == "grpo"]
    pairs += [("sft", before, after) for after in reinforced for before in supervised]
    quiet = [line for line in reinforced if line.mode == "no-think"]
    pairs += [("think", before, after) for before in quiet for after in reinforced if after != before]
    looking = {line.mode: line for line in lines if line.method == "looking"}
    pairs += [("looking", before, looking[before.mode]) for before in reinforced if before.mode in looking]
    return pairs


def _prior_average(cells: Sequence[dict[str, Any]], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Plain average of cells of different questions, as `average` would give it; None throughout for none.

    An image that is asked about in several question types is in several cells, and so is a patient with images of two
    modalities. How much these correlate is not in the table: they do as much as they can.

    Args:
        groups: of the questions of each cell.
    """
    ci = mean_interval([(cell["accuracy"], cell["ci95"]) for cell in cells], shared_groups(groups)) if cells else None
    means = {name: sum(c[name] for c in cells) / len(cells) if cells else None for name in ("accuracy", "chance")}
    return {**means, "ci95": list(ci) if ci else None, "n": len(cells), "questions": sum(c["n"] for c in cells)}


def _read(path: Path, condition: str, mode: str) -> list[Row]:
    rows = read_rows(path)
    if differing(rows[0], {"condition": condition, "mode": mode}, ("condition", "mode")):
        told = f"condition {rows[0]['condition']} and mode {rows[0]['mode']}, not of {condition} and {mode}"
        raise MedR1Error(f"{path}: its rows are of {told} as results.json says; run the study again")
    # None was trained on, since a study's cells train on the same division; were it so, it would not count here.
    kept = [row for row in rows if row.get("seen_by_run") != "trained on"]
    claims = [{"claims": claims_to_see(row["reply"], row["question"])} if condition == "image" else {} for row in kept]
    return [{name: row[name] for name in NEEDED} | more for row, more in zip(kept, claims, strict=True)]
