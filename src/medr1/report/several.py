"""One self-contained HTML page about several models beside their base: the same questions, asked alike.

Every number of the page is of the same questions: what the run of one of the models trained on is left out of all of
them. What is said of a model holds beyond the noise after Holm's correction over the models, or is not said.

    medr1 report --base base.jsonl --trained sft=sft.jsonl --trained grpo=grpo.jsonl --control blank=grpo-blank.jsonl
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from medr1.config import RECIPE, Config, load_config, to_toml
from medr1.data.heldout import split_of
from medr1.data.parts import load_parts
from medr1.data.records import read_jsonl, write_atomic
from medr1.errors import MedR1Error
from medr1.evaluation.controls import text_only_prior
from medr1.evaluation.looking import WAYS, of_all, read_looking
from medr1.evaluation.metrics import MIN_N, Row, by_kind, judged, paired_change, summarise
from medr1.evaluation.rows import check_pair, differing, record_of, said
from medr1.policy.names import step_of
from medr1.report.looking import looking_section
from medr1.report.pages import environment, html_file, label, package_versions, percent, points
from medr1.report.plots import (
    AFTER,
    BEFORE,
    CHANCE,
    CONTROL,
    Mark,
    clipped,
    compared_curves,
    dot_plot,
    steps_plot,
)
from medr1.report.run import (
    ALIKE,
    MAX_SAMPLES,
    above,
    condition_rows,
    given_away,
    how_trained,
    named_control,
    num_counted,
    open_table,
    overall,
    text_table,
    trained_on,
    viewer_samples,
    without,
)

BASE = "base"
"""What the page calls the model of --base."""
VERDICTS = {"better": "above the base", "worse": "below the base", "noise": "within the noise", "few": "too few"}
"""What a paired change says of a model, and its words."""


@dataclass
class Model:
    """One model of the page: the base, or one that is set beside it."""

    name: str
    path: Path
    """The file of its rows."""
    rows: list[Row]
    controls: dict[str, list[Row]] = field(default_factory=dict)
    """Condition to its rows."""
    asked: dict[str, Sequence[Row]] = field(default_factory=dict)
    """Way of asking to its rows, these and the controls among them; see `medr1.evaluation.looking`."""
    prior: dict[str, Any] | None = None
    """`text_only_prior` of the training part of its run, or of the file that was given for all."""
    config: Config | None = None
    how: str = ""
    """What was trained, in a line; empty without its run."""


def several_from_files(
    base: Path,
    trained: Sequence[tuple[str | None, Path]],
    *,
    out: Path,
    runs: Sequence[Path] = (),
    controls: Sequence[str] = (),
    max_samples: int = MAX_SAMPLES,
) -> dict[str, Any]:
    """Write a report of several models from files that `medr1 eval` made.

    Args:
        base: rows of the model that the others are set beside (.jsonl).
        trained: name and rows (.jsonl) of each; a name of None is the model's in its rows.
        out: the HTML file.
        runs: folders of training runs: each is of the models that lie in it, and gives them their recipe and what the
            option texts of its training part give away.
        controls: NAME=FILE each, as in `report_from_files`; a file is of the model that its rows state, an accuracy
            table of text_only of every model that no run is given for.
        max_samples: samples in the viewer.

    Returns:
        report (path), n (questions), left_out (questions that a model's run trained on), chance, base_macro, and
        models: name to macro, ci95, change {difference, ci95, n, groups, p, holm_p, significant}, verdict (of VERDICTS)
        and the macro accuracy of each control, and where one was asked in other ways too, looking: what
        `looking.measure` gives; accuracies and differences as fractions.

    Raises:
        MedR1Error: a file is missing or not what it should be, two of them are not alike, two models have one name, a
            control or a run is of none of the models, or no question is left.
    """
    html_file(out)
    first = Model(BASE, base, condition_rows(base, "image"))
    models = []
    for name, path in trained:
        models.append(Model(name or "", path, condition_rows(path, "image")))
        check_pair(models[-1].rows, path, first.rows, base, ALIKE)
    _name(models)
    texts = _give_controls([first, *models], controls)
    _give_ways([first, *models])
    left_out = _keep_unseen([first, *models])
    logs = dict(_give_run(models, run) for run in runs)
    for model in models if texts else ():
        model.prior = model.prior or text_table(texts[-1], model.rows)
    return _write([first, *models], logs, left_out, out, max_samples)


def _name(models: Sequence[Model]) -> None:
    """A name for each: the given one, or the model's, with the folder of its rows where two would have one."""
    given = [model.name for model in models]
    own = [model.name or model.rows[0]["model"] for model in models]
    for model, name in zip(models, own, strict=True):
        model.name = name
    for tell in (lambda path: path.resolve().parent.name, lambda path: path.name):
        count = Counter([BASE, *(model.name for model in models)])
        for model, name in zip(models, given, strict=True):
            if not name and count[model.name] > 1:
                model.name += f" ({tell(model.path)})"
    count = Counter([BASE, *(model.name for model in models)])
    if twice := next((model for model in models if count[model.name] > 1), None):
        raise MedR1Error(
            f"--trained {twice.path}: a second model of the page is called {twice.name}; give each a name of its own,"
            " NAME=FILE"
        )


def _give_controls(models: Sequence[Model], controls: Sequence[str]) -> list[Path]:
    """Each file of rows to the model that its rows state, or the base where no other is; the tables of option texts."""
    texts = []
    for control in controls:
        name, path = named_control(control)
        if name == "text_only":
            texts.append(path)
            continue
        rows = condition_rows(path, name)
        base, *others = models
        own = [model for model in others if not differing(rows[0], model.rows[0], ("model",))]
        own = own or [base] * (not differing(rows[0], base.rows[0], ("model",)))
        if not own:
            there = ", ".join(said(model.rows[0], "model").removeprefix("model ") for model in models)
            raise MedR1Error(
                f"{path}: is of {said(rows[0], 'model')}, which is none of the page ({there}); leave it out"
            )
        if len(own) > 1:
            files = " and ".join(str(model.path) for model in own)
            raise MedR1Error(
                f"{path}: is of {said(rows[0], 'model')}, and so are {files}: whose control it is cannot be told"
            )
        check_pair(rows, path, own[0].rows, own[0].path, ALIKE)
        if name in own[0].controls:
            raise MedR1Error(f"{path}: a second control {name} of {own[0].name}; give one")
        own[0].controls[name] = rows
    if len(texts) > 1:
        raise MedR1Error(f"{texts[1]}: a second table of option texts; give one, or --run of each model")
    return texts


def _give_ways(models: Sequence[Model]) -> None:
    """The other ways in which each was asked, beside its file; another image and a blank one are controls as well."""
    for model in models:
        model.asked = read_looking(model.path, model.rows)
        whole = of_all(model.asked)
        for name in ("blank", "shuffled"):
            if name in whole:
                model.controls.setdefault(name, [*whole[name]])
        model.asked |= {name: rows for name, rows in model.controls.items() if name in WAYS}


def _keep_unseen(models: Sequence[Model]) -> int:
    """Leave out of all rows the questions that one model's run trained on; their number."""
    known = trained_on([model.rows for model in models])
    if len(known) == len(models[0].rows):
        raise MedR1Error(
            "every question was trained on by the run of one of the models; evaluate all on questions that none saw"
        )
    for model in models:
        model.rows = without(known, model.rows)
        for others in (model.controls, model.asked):
            others |= {name: without(known, rows) for name, rows in others.items()}
    return len(known)


def _give_run(models: Sequence[Model], run: Path) -> tuple[str, list[dict[str, Any]]]:
    """What a run says of the models that lie in its folder; its name, that of the model if it has one, and its log."""
    config = load_config(run / RECIPE)
    places = [(model, Path(model.rows[0]["model"])) for model in models]
    own = [
        model
        for model, place in places
        if place.is_dir() and run.resolve() in (place.resolve(), *place.resolve().parents)
    ]
    if not own:
        there = ", ".join(str(place) for _, place in places)
        raise MedR1Error(
            f"{run}: none of the models lies in this run ({there}); leave it out, or report that model alone"
        )
    prior = text_only_prior(load_parts(config.data, split_of(run))[0], [record_of(row) for row in own[0].rows])
    log = read_jsonl(run / "log.jsonl")
    for model in own:
        model.prior, model.config, model.how = prior, config, how_trained(config, log)
    return own[0].name if len(own) == 1 else run.resolve().name, log


def _checkpoints(models: Sequence[Model]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(step, accuracy) of each run of which several steps were asked, of the base as step 0 where the run began with
    it; and of those that were asked with another image the accuracy with that.
    """
    base, *others = models
    runs: dict[Path, dict[int, Model]] = {}
    for model in others:
        if place := _step_of(Path(model.rows[0]["model"])):
            runs.setdefault(place[0], {})[place[1]] = model
    curves: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for run, steps in runs.items():
        if len(steps) < 2:
            continue
        if load_config(run / RECIPE).model.name == base.rows[0]["model"]:
            steps[0] = base
        ordered = sorted(steps.items())
        curves[run.name] = [(step, overall(summarise(model.rows))) for step, model in ordered]
        other = [(step, model.controls["shuffled"]) for step, model in ordered if "shuffled" in model.controls]
        if len(other) > 1:
            name = f"{run.name}, {label('shuffled')}"
            curves[name] = [(step, overall(summarise(rows))) for step, rows in other]
    return curves


def _step_of(model: Path) -> tuple[Path, int] | None:
    """The run that a model lies in, and the step after which it was written; None where that is not known."""
    run = model.resolve() if (model / RECIPE).is_file() else model.resolve().parent
    if not (run / RECIPE).is_file():
        return None
    if model.name.startswith("checkpoint-"):
        return run, step_of(model)
    log = run / "log.jsonl"
    return (run, max((line["step"] for line in read_jsonl(log)), default=0)) if log.is_file() else None


def _write(
    models: Sequence[Model], logs: dict[str, list[dict[str, Any]]], left_out: int, out: Path, max_samples: int
) -> dict[str, Any]:
    base, *others = models
    tables = [summarise(model.rows) for model in models]
    changes = judged([_change(base, model) for model in others])
    pairs = list(combinations(range(len(others)), 2))
    between = judged([_change(others[one], others[other]) for one, other in pairs])
    names = list(dict.fromkeys(name for model in models for name in model.controls))
    lines: list[dict[str, Any]] = [
        {
            "name": model.name,
            "cell": overall(table),
            "change": change,
            "verdict": _verdict(change) if change else None,
            "text_only": overall(model.prior) if model.prior else None,
            "controls": {name: overall(summarise(rows)) for name, rows in model.controls.items()},
            "looked": not model.asked.keys().isdisjoint(("shuffled", "blank")),
        }
        for model, table, change in zip(models, tables, [None, *changes], strict=True)
    ]
    pair_lines: list[dict[str, Any]] = [
        {"names": (others[one].name, others[other].name), "change": change, "verdict": _verdict(change)}
        for (one, other), change in zip(pairs, between, strict=True)
    ]
    looking = looking_section([(model.name, model.asked) for model in models])
    samples, thumbnails = viewer_samples([model.rows for model in models], base.path.parent, max_samples)
    page = (
        environment()
        .get_template("several.html.j2")
        .render(
            models=models,
            base=base.rows[0]["model"],
            n=len(base.rows),
            lines=lines,
            pairs=pair_lines,
            verdicts=VERDICTS,
            controls=names,
            over=_over(tables[0]),
            story=tell_several(lines, pair_lines, left_out),
            plot=_plot(lines),
            looking=looking,
            steps=steps_plot(curves) if (curves := _checkpoints(models)) else "",
            curves=compared_curves(logs),
            tables=tables,
            table=_by_part(tables),
            open_table=open_table(tables),
            recipes=[(model.name, model.how, to_toml(model.config)) for model in others if model.config],
            versions=package_versions(),
            samples=samples,
            thumbnails=thumbnails,
            lost_images=thumbnails.count(None),
        )
    )
    write_atomic(out, page)
    return {
        "report": str(out),
        "n": num_counted(tables[0]),
        "left_out": left_out,
        "chance": lines[0]["cell"]["chance"],
        "base_macro": lines[0]["cell"]["accuracy"],
        "models": {
            line["name"]: {
                "macro": line["cell"]["accuracy"],
                "ci95": line["cell"]["ci95"],
                "change": line["change"],
                "verdict": line["verdict"],
                **({"text_only": line["text_only"]["accuracy"]} if line["text_only"] else {}),
                **{name: cell["accuracy"] for name, cell in line["controls"].items()},
                **({"looking": looking["measured"][line["name"]]} if looking else {}),
            }
            for line in lines[1:]
        },
    }


def _change(before: Model, after: Model) -> dict[str, Any]:
    """The paired change of what `overall` gives of both."""
    (rows, open_rows), (others, open_others) = by_kind(before.rows), by_kind(after.rows)
    if not rows:
        return paired_change(open_rows, open_others)
    return paired_change(rows, others, "modality" if any(row["modality"] for row in rows) else None)


def _verdict(change: dict[str, Any]) -> str:
    if change["significant"] is None:
        return "few"
    return ("better" if change["difference"] > 0 else "worse") if change["significant"] else "noise"


def _over(table: dict[str, Any]) -> str:
    """What an accuracy of the first table is an average over."""
    if num := table["macro"]["n"]:
        return f"averaged over {num} modalities" if num > 1 else ""
    return "" if table["n"] else "of open questions"


def tell_several(
    lines: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], left_out: int
) -> list[tuple[str, str]]:
    """The story in sentences, each with its worth ("good", "bad", "open"); within the noise nothing wins.

    Args:
        lines: of the base and of each model, as the first table shows them.
        pairs: of each two models: names, change (from the first to the second) and verdict.
        left_out: questions that a model's run trained on.
    """
    models = lines[1:]
    worths = {"better": "good", "worse": "bad", "noise": "open", "few": "open"}
    words = {
        "better": "Above the base, beyond the noise",
        "worse": "Below the base, beyond the noise",
        "noise": "Within the noise of the base",
        "few": f"Too few questions (under {MIN_N}) to judge against the base",
    }
    story = []
    for verdict, worth in worths.items():
        if of := [line for line in models if line["verdict"] == verdict]:
            moved = (f"{line['name']} ({points(line['change']['difference'])} points)" for line in of)
            story.append((worth, f"{words[verdict]}: {_listed(moved)}."))
    story.append(_tell_best(models, pairs))
    if left_out:
        story.append(
            (
                "open",
                f"{left_out:,} of the questions were trained on by a model's run and are in none of these numbers.",
            )
        )

    blank: dict[str, list[str]] = {"good": [], "bad": [], "open": []}
    for line in models:
        cell = line["controls"].get("blank")
        if not cell and line["looked"]:
            continue  # "Does it look?" says it
        blank["open" if not cell else "good" if above(line["cell"], cell) else "bad"].append(line["name"])
    for worth, sentence in (
        ("good", "With the image blanked it scores less, so it looks at the image"),
        ("bad", "Nothing here shows that it looks at the image: blanked, it scores about as much"),
        ("open", "No blank-image control was run, so whether the image is used is not known"),
    ):
        if blank[worth]:
            story.append((worth, f"{sentence}: {_listed(blank[worth])}."))

    text: dict[str, list[str]] = {}
    for line in models:
        cell = line["text_only"]
        if cell and cell["n"]:
            text.setdefault(given_away(cell, line["cell"]), []).append(f"{line['name']} ({percent(cell['accuracy'])})")
        elif line["cell"]["chance"] is not None:
            text.setdefault("not asked", []).append(line["name"])
    for kind, worth, sentence in (
        ("nothing", "good", "Option texts alone do no better than guessing"),
        ("unknown", "open", "Whether option texts alone do better than guessing cannot be told"),
        ("some", "open", "Option texts alone give some answers away, and the model does better"),
        ("all", "bad", "Option texts alone give answers away, and the model does no better"),
        ("not asked", "open", "No text-only control was run, so the options may give the answers away"),
    ):
        if kind in text:
            story.append((worth, f"{sentence}: {_listed(text[kind])}."))
    return story


def _tell_best(models: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Whether one model is above every other beyond the noise."""
    top = max(models, key=lambda line: (line["cell"]["accuracy"], line["name"]))  # a tie has one order in every order
    below = {
        names[1 - place]
        for pair in pairs
        for place, verdict in enumerate(("worse", "better"))
        if (names := pair["names"])[place] == top["name"] and pair["verdict"] == verdict
    }
    unparted = [line["name"] for line in models if line["name"] not in below | {top["name"]}]
    if unparted:
        highest = [line["name"] for line in models if line["cell"]["accuracy"] == top["cell"]["accuracy"]]
        told = f"{_listed(highest)} score{'s' if len(highest) == 1 else ''} highest"
        if rest := [name for name in unparted if name not in highest]:
            told += f", and {_listed(rest)} cannot be told from {'it' if len(highest) == 1 else top['name']}"
        return "open", f"No model is best beyond the noise: {told}."
    worth = "good" if top["verdict"] == "better" else "open"
    return worth, f"{top['name']} is above every other model here, beyond the noise."


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _plot(lines: Sequence[dict[str, Any]]) -> str:
    chance = {"accuracy": lines[0]["cell"]["chance"], "ci95": None}
    marks: list[tuple[str, dict[str, Any], Mark]] = [("guessing", chance, CHANCE)]
    for line in lines:
        marks.append((clipped(line["name"]), line["cell"], BEFORE if line is lines[0] else AFTER))
        own = {"text_only": line["text_only"]} if line["text_only"] else {}
        marks += [(f"– {label(control)}", cell, CONTROL) for control, cell in (own | line["controls"]).items()]
    marks = [mark for mark in marks if mark[1]["accuracy"] is not None]
    return dot_plot(marks, "Accuracy of the base, of each model and of its controls", left=142)


def _by_part(tables: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The accuracies as parts with a title: a line a modality or question type, a cell a model."""
    base = tables[0]
    parts = [
        (
            title,
            [
                {
                    "name": name,
                    "n": cell["n"],
                    "chance": cell["chance"],
                    "cells": [table[part][name] for table in tables],
                }
                for name, cell in base[part].items()
            ],
        )
        for title, part in (("Modality", "by_modality"), ("Question type", "by_question_type"))
    ]
    whole = {"name": "all questions", "n": base["n"], "chance": base["chance"], "cells": list(tables)}
    return [*parts, ("Together", [whole])]
