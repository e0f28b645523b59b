"""One self-contained HTML page about a training run: what improved, whether it is the image, and every
sample.

The page is drawn from stored rows and never runs a model. It needs no network, and what a model wrote is
shown as text, never as markup.

    medr1 report --base base.jsonl --trained trained.jsonl --run runs/mine --control blank=blank.jsonl
"""

import hashlib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medr1.config import RECIPE, Config, load_config, recipe_of, to_toml
from medr1.data.heldout import split_of
from medr1.data.parts import load_parts
from medr1.data.records import read_jsonl, write_atomic
from medr1.errors import MedR1Error
from medr1.evaluation.calibration import Calibration, read_calibration
from medr1.evaluation.controls import CONDITIONS, text_only_prior
from medr1.evaluation.looking import Asked, of_all, read_looking
from medr1.evaluation.metrics import NOT_STATED, OPEN_SCORES, Row, compare, summarise, untrained
from medr1.evaluation.rows import check_pair, differing, read_rows, record_of, said
from medr1.report.looking import BASE, TRAINED, looking_section
from medr1.report.pages import (
    environment,
    html_file,
    label,
    package_versions,
    percent,
    points,
    span,
    span_points,
    thumbnail,
)
from medr1.report.plots import AFTER, BEFORE, CHANCE, CONTROL, change_plot, learning_curves, story_plot
from medr1.report.trust import calibration_section, faithfulness_section
from medr1.trust.faithfulness import read_faithfulness

CONTROLS = (*(name for name in CONDITIONS if name != "image"), "text_only")
"""What a control may be: a condition that its rows then state, or an accuracy table of the option texts alone."""
GUESSING = 0.1
"""Option texts alone give nothing away if at most so much above chance is possible."""
MAX_SAMPLES = 600
"""Samples in the viewer; of more rows so many are drawn at random, and the page says so."""


@dataclass(frozen=True)
class ReportData:
    """All that a report says, from the files of a run."""

    base: Sequence[Row]
    """Rows of `medr1.evaluation.run` before training, condition "image"."""
    trained: Sequence[Row]
    """Rows of the same records after training."""
    image_root: Path
    """Folder that the rows' image paths start from: that of the file of rows."""
    controls: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Name ("text_only", "blank", "shuffled") to `accuracy_table` or `summarise` of the trained model."""
    log: Sequence[dict[str, Any]] = ()
    """Lines of the training log, each with "step"."""
    config: Config | None = None
    """The training recipe."""
    calibration: Calibration | None = None
    """Of the trained model; None fits one where the rows have option_probs."""
    faithfulness: dict[str, Any] | None = None
    """What `faithfulness.conclude` returned for the trained model."""
    looking: tuple[Asked, Asked] | None = None
    """The ways in which base and trained model were asked, these rows among them; see `medr1.evaluation.looking`."""
    name: str | None = None
    """Of the trained model; None: as its rows say."""
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    """Package to version; by default of this process."""


def report_from_files(
    base: Path,
    trained: Path,
    *,
    out: Path,
    run: Path | None = None,
    controls: Sequence[str] = (),
    calibration: Path | None = None,
    faithfulness: Path | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Write a report from files that `medr1 eval` and `medr1 train` made.

    What is set side by side is known by its rows: the model as it was before, after and under each control, in one
    mode, with one limit of tokens, on the same questions, in the condition that is named.

    Args:
        base: rows before training (.jsonl).
        trained: rows after training (.jsonl).
        out: the HTML file.
        run: the training run's folder; its log.jsonl and recipe.toml are shown, and what the option texts of its
            training part give away of the questions that were answered.
        controls: NAME=FILE each, NAME one of CONTROLS; rows (.jsonl) of that condition, or of text_only the table
            (.json) that `text_only_prior` gave for these questions.
        calibration: what `medr1 calibrate` wrote for the trained model.
        faithfulness: folder that `medr1 faithfulness` wrote for the trained model.
        name: what the page calls the trained model; None: as its rows do.

    Returns:
        What `write_report` returns.

    Raises:
        MedR1Error: a file is missing or not what it should be, or two of them are not alike.
    """
    config = load_config(run / RECIPE) if run else None
    before, after = condition_rows(base, "image"), condition_rows(trained, "image")
    check_pair(after, trained, before, base, ALIKE)
    known = trained_on([before, after])
    tables: dict[str, dict[str, Any]] = {}
    looking = (read_looking(base, before), read_looking(trained, after))
    if config:
        _check_run(run, Path(after[0]["model"]), trained)
        learned = load_parts(config.data, split_of(run))[0]
        tables["text_only"] = text_only_prior(learned, [record_of(row) for row in without(known, after)])
    given: set[str] = set()
    for control in controls:
        kind, file = named_control(control)
        if kind in given:
            raise MedR1Error(f"{file}: a second control {kind}; give one")
        given.add(kind)
        if kind == "text_only":
            tables[kind] = text_table(file, without(known, after))
        else:
            rows = condition_rows(file, kind)
            check_pair(rows, file, after, trained, ("model", *ALIKE))
            looking[1][kind] = rows
    shown = {kind: rows for kind, rows in of_all(looking[1]).items() if kind in CONTROLS}
    tables |= {kind: summarise(without(known, rows)) for kind, rows in shown.items()}
    of_trained: list[tuple[Path, Mapping[str, Any]]] = []
    found = read_calibration(calibration) if calibration else None
    edits = read_faithfulness(faithfulness) if faithfulness else None
    if calibration and found:
        of_trained.append((calibration, found.model_dump()))
    if faithfulness and edits:
        of_trained.append((faithfulness, edits))
    for place, about in of_trained:
        if differing(about, after[0], ("model",)):
            told = f"{said(about, 'model')}, and {trained} of {said(after[0], 'model')}"
            raise MedR1Error(f"{place}: is of {told}; give what was made of the trained model")
    data = ReportData(
        base=before,
        trained=after,
        image_root=base.parent,
        controls=tables,
        log=read_jsonl(run / "log.jsonl") if run else (),
        config=config,
        calibration=found,
        faithfulness=edits,
        looking=looking,
        name=name,
    )
    return write_report(data, out)


def write_report(data: ReportData, out: Path, *, max_samples: int = MAX_SAMPLES) -> dict[str, Any]:
    """Write the page.

    Returns:
        report (path), base_macro, trained_macro, gain_points, chance, and the macro accuracy of each
        control: what the first screen says, as fractions; gain_points in percentage points. looking: before, after
        (what `looking.measure` gives) and change, where the trained model was asked in other ways too.

    Raises:
        MedR1Error: the two evaluations differ in their records, each of these was trained on, or the file cannot be
            written.
    """
    html_file(out)
    if not data.base:
        raise MedR1Error(f"{out}: no rows to report; evaluate some records first")
    known = trained_on([data.base, data.trained])
    before, after = without(known, data.base), without(known, data.trained)
    if not before:
        raise MedR1Error(
            f"{out}: every question was trained on by the run of one of the models; evaluate both on questions that"
            " none saw"
        )
    base, trained, change = summarise(before), summarise(after), compare(before, after)
    trained["trained_on"] = summarise([row for row in data.trained if row["id"] in known])["trained_on"]
    samples, thumbnails = viewer_samples((before, after), data.image_root, max_samples)
    for sample in samples:
        sample["before"], sample["after"] = sample.pop("replies")
    scores = {
        "base": overall(base),
        "trained": overall(trained),
        "change": overall(change),
        "controls": {name: overall(table) for name, table in data.controls.items()},
    }
    recipe = to_toml(data.config) if data.config else ""
    ways = [{way: without(known, rows) for way, rows in asked.items()} for asked in data.looking or ()]
    looking = looking_section([*zip((BASE, TRAINED), ways, strict=True)]) if ways else None
    exchanged = looking and {"reliance", "reliance_blank"} & looking["measured"][TRAINED].keys()
    looked = looking["n"] if looking and exchanged else 0
    page = (
        environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            num_shown=len(before),
            base=base,
            trained=trained,
            change=change,
            scores=scores,
            models=(data.base[0]["model"], data.name or data.trained[0]["model"]),
            table=_table(base, trained, change, data.controls),
            open_table=open_table((base, trained)),
            story=tell(scores, trained, len(known), looked),
            story_plot=story_plot(_story_lines(scores)),
            modality_plot=_change_plot(base, trained, "by_modality"),
            type_plot=_change_plot(base, trained, "by_question_type"),
            curves=learning_curves(data.log),
            looking=looking,
            calibration=calibration_section(before, after, data.calibration),
            faithfulness=faithfulness_section(data.faithfulness) if data.faithfulness else None,
            how=how_trained(data.config, data.log),
            recipe=recipe,
            recipe_hash=hashlib.sha256(recipe.encode()).hexdigest()[:16],
            samples=samples,
            thumbnails=thumbnails,
            lost_images=thumbnails.count(None),
        )
    )
    write_atomic(out, page)
    gain = scores["change"]["difference"]
    return {
        "report": str(out),
        "base_macro": scores["base"]["accuracy"],
        "trained_macro": scores["trained"]["accuracy"],
        "gain_points": None if gain is None else 100 * gain,
        "chance": scores["trained"]["chance"],
        **{name: cell["accuracy"] for name, cell in scores["controls"].items()},
        **({"looking": {**looking["measured"], "change": looking["changed"][TRAINED]}} if looking else {}),
    }


def trained_on(evaluations: Sequence[Sequence[Row]]) -> set[str]:
    """The questions, by id, that the run of one of the models trained on: they are in no number that compares these."""
    return {row["id"] for rows in evaluations for row in rows} - set.intersection(
        *({row["id"] for row in untrained(rows)} for rows in evaluations)
    )


def without(known: Collection[str], rows: Sequence[Row]) -> list[Row]:
    """The rows of other questions than these."""
    return [row for row in rows if row["id"] not in known]


def tell(scores: dict[str, Any], trained: dict[str, Any], left_out: int = 0, looked: int = 0) -> list[tuple[str, str]]:
    """The story in sentences, each with its worth ("good", "bad", "open"); nothing within noise is a win.

    Args:
        left_out: questions that the run of one of the models trained on.
        looked: questions that the trained model was asked with another image or a blank one, see "Does it look?".
    """
    before, after, change = scores["base"], scores["trained"], scores["change"]
    over = f", averaged over {after['n']} modalities" if trained["macro"]["n"] > 1 else ""
    moved = f"from {percent(before['accuracy'])} to {percent(after['accuracy'])}{over}"
    by = f"{points(change['difference'])} points, 95 % interval {span_points(change['ci95'])}"
    if change["ci95"] and change["ci95"][0] > 0:
        story = [("good", f"Training raised held-out accuracy {moved} ({by}).")]
    elif change["ci95"] and change["ci95"][1] < 0:
        story = [("bad", f"Training lowered held-out accuracy {moved} ({by}).")]
    else:
        story = [("open", f"Held-out accuracy went {moved} ({by}): a change within the noise.")]
    if known := trained.get("trained_on"):
        cell = known if known["n"] else known["open"]
        num = known["n"] + known["open"]["n"]
        told = f"{num:,} of the questions were trained on by the run and are in none of these numbers"
        story.append(("open", f"{told}; on them the trained model scores {percent(cell['accuracy'])}."))
        left_out -= num
    if left_out:
        more = f"{left_out:,} {'more' if known else 'of the questions'}"
        told = "were trained on by the run of the model before and are in none of these numbers"
        story.append(("open", f"{more} {told}."))

    controls = scores["controls"]
    if exchanged := controls.get("blank") or controls.get("shuffled"):
        shown = "the image blanked" if "blank" in controls else "another image of the modality"
        seen = f"With {shown} the trained model scores {percent(exchanged['accuracy'])}"
        if above(after, exchanged):
            story.append(("good", f"{seen}: it looks at the image."))
        else:
            story.append(("bad", f"{seen}: nothing here shows that it looks at the image."))
    elif looked:
        told = f"The image was exchanged in {looked:,} of the questions alone: “Does it look?” says what that did."
        story.append(("open", told))
    else:
        story.append(("open", "No blank-image control was run: whether the image is used is not known."))

    text = controls.get("text_only")
    if text and text["n"]:
        alone = f"Option texts alone, without image or question, score {percent(text['accuracy'])}"
        guessing = f"guessing {percent(text['chance'])}"
        story.append(
            {
                "nothing": ("good", f"{alone}, no better than {guessing}: they give nothing away."),
                "unknown": ("open", f"{alone} ({span(text['ci95'])}), which cannot be told from {guessing}."),
                "some": ("open", f"{alone} ({guessing}): they give some answers away."),
                "all": ("bad", f"{alone} ({guessing}): they give answers away, and the trained model does no better."),
            }[given_away(text, after)]
        )
    elif trained["macro"]["n"] or trained["n"]:  # open questions have no options to give anything away
        story.append(("open", "No text-only control was run: the options may give the answers away."))
    return story


def how_trained(config: Config | None, log: Sequence[dict[str, Any]]) -> str:
    """What was trained, in a line."""
    if config is None:
        return ""
    steps = max((line["step"] for line in log), default=config.optimizer.steps)
    batch = f"{config.optimizer.prompts_per_step} prompts"
    if config.method == "grpo":
        batch += f" × {config.rollout.num_completions} completions"
    return (
        f"{config.method.upper()} from {config.model.name} on {config.data.path}: "
        f"{steps:,} steps of {batch}, prompt mode {config.rollout.mode}, "
        f"seed {config.optimizer.seed}, split seed {config.data.split_seed}."
    )


ALIKE = ("mode", "max_new_tokens", "scoring", "reasoning")
"""What evaluations must agree in to be set side by side."""


def condition_rows(path: Path, condition: str) -> list[Row]:
    """The rows of a file, which are of this condition.

    Raises:
        MedR1Error: they are of another, or what `read_rows` raises.
    """
    rows = read_rows(path)
    if rows[0]["condition"] != condition:
        raise MedR1Error(
            f"{path}: its rows are of condition {rows[0]['condition']}, not {condition}; give the file of `medr1 eval"
            f" --condition {condition}`"
        )
    return rows


def named_control(control: str) -> tuple[str, Path]:
    """NAME=FILE of --control as the two.

    Raises:
        MedR1Error: it is not of this form, or NAME none of CONTROLS.
    """
    name, equals, file = control.partition("=")
    if not equals:
        raise MedR1Error(f"--control {control}: write NAME=FILE, for example blank=blank.jsonl")
    if name not in CONTROLS:
        raise MedR1Error(f"--control {control}: {name} is no control; choose {', '.join(CONTROLS)}")
    return name, Path(file)


def _check_run(run: Path | None, model: Path, rows: Path) -> None:
    """That a model which lies in the folder of a run lies in this one."""
    if (
        run
        and model.is_dir()
        and recipe_of(str(model))
        and run.resolve() not in (model.resolve(), *model.resolve().parents)
    ):
        raise MedR1Error(f"{run}: is not the run of {model}, whose answers {rows} holds; give --run that model's run")


def text_table(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """The table of the option texts alone, which is of the questions of these rows.

    Raises:
        MedR1Error: the file is none, or of other questions.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MedR1Error(f"{path}: cannot be read as JSON; give the table that text_only_prior returned") from error
    of_rows = text_only_prior([], [record_of(row) for row in rows])
    if not isinstance(table, dict) or not of_rows.keys() <= table.keys():
        raise MedR1Error(f"{path}: is no accuracy table; give what text_only_prior returned")
    for part in ("by_modality", "by_question_type"):
        asked, there = ({name: cell["n"] for name, cell in of[part].items()} for of in (of_rows, table))
        if asked != there:
            raise MedR1Error(
                f"{path}: is of {table['n']} questions that are not those answered ({of_rows['n']}); make the prior of"
                " these, or give --run in its place"
            )
    return table


def overall(table: dict[str, Any]) -> dict[str, Any]:
    """The headline cell: the average over modalities, or over rows where no file states a modality; of open questions
    where there are no others.
    """
    if table["macro"]["n"]:
        return table["macro"]
    return table if table["n"] else table.get("open") or table


def num_counted(table: dict[str, Any]) -> int:
    """Questions that `overall` is of: not those of no stated modality beside others that state one, nor open ones
    beside multiple choice.
    """
    if table["macro"]["n"]:
        return sum(cell["n"] for name, cell in table["by_modality"].items() if name != NOT_STATED)
    return int(overall(table)["n"])


def above(cell: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the two intervals part: stricter than a test of the difference, and needs no pairing."""
    return bool(cell["ci95"] and other["ci95"] and cell["ci95"][0] > other["ci95"][1])


def given_away(text: dict[str, Any], cell: dict[str, Any]) -> str:
    """What option texts alone give away to a model that scores so: "nothing", "some", "all" that it knows; "unknown"
    where they may be right by chance, but also far more often (see GUESSING).
    """
    low, high = text["ci95"]
    if low <= text["chance"]:
        return "nothing" if high <= text["chance"] + GUESSING else "unknown"
    return "some" if above(cell, text) else "all"


def _story_lines(scores: dict[str, Any]) -> list[tuple[str, dict[str, Any], Any]]:
    chance = {"accuracy": scores["trained"]["chance"], "ci95": None}
    lines = [
        ("guessing", chance, CHANCE),
        *((label(name), cell, CONTROL) for name, cell in scores["controls"].items()),
        ("before training", scores["base"], BEFORE),
        ("after training", scores["trained"], AFTER),
    ]
    return [line for line in lines if line[1]["accuracy"] is not None]


def _change_plot(base: dict[str, Any], trained: dict[str, Any], part: str) -> str:
    title = f"Accuracy {part.replace('_', ' ')} before and after training"
    if not base[part]:
        return ""
    return change_plot([(name, cell, trained[part][name]) for name, cell in base[part].items()], title)


def _table(
    base: dict[str, Any],
    trained: dict[str, Any],
    change: dict[str, Any],
    controls: Mapping[str, dict[str, Any]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The table of accuracies as parts with a title; a control that lacks a line has None there."""

    def line(name: str, n: int | str, *path: str) -> dict[str, Any]:
        before, after, moved, *others = (_inside(t, path) for t in (base, trained, change, *controls.values()))
        return {
            "name": name,
            "n": n,
            "chance": after["chance"],
            "controls": [other.get("accuracy") for other in others],
            "before": before,
            "after": after,
            "change": moved,
        }

    parts = [
        (title, [line(name, cell["n"], part, name) for name, cell in base[part].items()])
        for title, part in (("Modality", "by_modality"), ("Question type", "by_question_type"))
    ]
    together = [line("all questions", base["n"])] if base["n"] else []
    if base["macro"]["n"]:
        together.insert(0, line(f"average of {base['macro']['n']} modalities", "", "macro"))
    return [*parts, ("Together", together)]


def open_table(tables: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(score, a cell for each of these summaries) of open questions; none where there are none."""
    if not all(table["open"] for table in tables):
        return []
    lines = [(name, [table["open"][part] for table in tables]) for name, part in OPEN_SCORES.items()]
    return [line for line in lines if line[1][0]["n"]]


def _inside(table: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for name in path:
        table = table.get(name, {})
    return table


def viewer_samples(
    evaluations: Sequence[Sequence[Row]], image_root: Path, max_samples: int
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """The viewer's samples, naming images by index, and the images as data URIs (None for a lost file).

    Args:
        evaluations: rows of the same records each; a sample's "replies" are in this order.
    """
    first, *others = evaluations
    drawn = random.Random(0).sample(list(first), min(max_samples, len(first)))
    by_id = [{row["id"]: row for row in rows} for rows in others]
    paths = {path: index for index, path in enumerate(dict.fromkeys(p for row in drawn for p in row["images"]))}
    shown = ("id", "modality", "question_type", "source", "question", "options", "gold")
    samples = [
        {
            **{name: row[name] for name in shown},
            "images": [paths[path] for path in row["images"]],
            "replies": [_reply(row), *(_reply(rows[row["id"]]) for rows in by_id)],
        }
        for row in drawn
    ]
    return samples, [thumbnail(image_root / path) for path in paths]


def _reply(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("reply", "letter", "outcome", "correct", "finish", "tokens")}
