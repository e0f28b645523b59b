"""A study's numbers for citing: tables as CSV, Markdown and LaTeX, a model card, and a TRIPOD-LLM table.

CSV has one line a number's owner, fractions in full precision and an empty field where a number is undefined; Markdown
and LaTeX have the layout of the page, in percent, with a dash there.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import LATEX_ESCAPE_RULES, tabulate

from medr1 import NOTICE
from medr1.data.records import write_atomic
from medr1.evaluation.metrics import AXES
from medr1.report.pages import p_value, percent, points_with_span, with_span
from medr1.study.numbers import CONTROLS, StudyResults

MARKS = {"up": " *", "down": " *", "too few": " (too few)", "noise": ""}
"""How a text table marks a change's verdict."""
SHOWN = ("averages", "whole", "controls", "option-order")
"""Tables of the model card."""
NOT_REPORTED = "not reported"


@dataclass(frozen=True)
class Table:
    """One table: `records` for CSV, `head` and `lines` of text for Markdown and LaTeX."""

    name: str
    """Of its files."""
    caption: str
    records: Sequence[Mapping[str, Any]]
    head: Sequence[str]
    lines: Sequence[Sequence[str]]


def write_exports(study: StudyResults, numbers: dict[str, Any], verdict: tuple[str, str], folder: Path) -> None:
    """Write tables/NAME.csv, .md and .tex, model-card.md and tripod-llm.md into a study's folder.

    Args:
        numbers: what `study_numbers` gave.
        verdict: worth and sentence on the image, as the page has them.

    Raises:
        MedR1Error: a file cannot be written.
    """
    tables = study_tables(study, numbers)
    for path in (folder / "tables").glob("matrix-*"):  # of cells that the study had before
        if path.stem not in {table.name for table in tables}:
            path.unlink()
    for table in tables:
        path = folder / "tables" / table.name
        write_atomic(path.with_name(f"{table.name}.csv"), to_csv(table))
        write_atomic(path.with_name(f"{table.name}.md"), to_markdown(table))
        write_atomic(path.with_name(f"{table.name}.tex"), to_latex(table))
    write_atomic(folder / "model-card.md", model_card(study, numbers, verdict, tables))
    write_atomic(folder / "tripod-llm.md", tripod_llm(study, numbers, verdict))


def study_tables(study: StudyResults, numbers: dict[str, Any]) -> list[Table]:
    """Every table: averages, whole, comparisons, controls, option-order, models, runs, and a matrix for each line."""
    return [
        _averages(numbers),
        _whole(numbers),
        _comparisons(numbers),
        _controls(numbers),
        _option_order(numbers),
        _models(numbers),
        _runs(study),
        *(_matrix(matrix) for matrix in numbers["matrices"]),
    ]


def to_csv(table: Table) -> str:
    """The records as CSV with a head; None is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(table.records[0]) if table.records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """A Markdown table under its caption; bars in names are escaped."""
    head, *lines = ([text.replace("|", "\\|") for text in line] for line in (table.head, *table.lines))
    return f"{table.caption}\n\n{tabulate(lines, head, tablefmt='github', disable_numparse=True)}\n"


def to_latex(table: Table) -> str:
    """A LaTeX table (package booktabs) with special characters escaped; ASCII but for names that are not."""
    rows = tabulate(table.lines, table.head, tablefmt="latex_booktabs", disable_numparse=True)
    caption = "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in table.caption)
    text = f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{rows}\n\\end{{table}}\n"
    for sign, command in {"−": "$-$", "–": "--", "’": "'"}.items():
        text = text.replace(sign, command)
    return text


def model_card(study: StudyResults, numbers: dict[str, Any], verdict: tuple[str, str], tables: Sequence[Table]) -> str:
    """A Hugging Face model card: the averages as evaluation results in its head, the tables in its text."""
    results = study.results
    settings = results["study"]
    recipe = settings["recipe"]
    measured = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type="multiple-choice",
            dataset_name=f"{recipe['data']['path']}, held-out part",
            metric_type="accuracy",
            metric_name=f"{line['label']}, trained on one {_axis(line['axis'])} each, tested on {tested}",
            metric_value=round(line[side]["accuracy"], 4),
        )
        for line in numbers["lines"]
        for side, tested in (("own", "the same"), ("others", "the others"))
        if line[side]["accuracy"] is not None
    ]
    data = ModelCardData(
        model_name=settings["name"],
        base_model=recipe["model"]["name"],
        library_name="transformers",
        pipeline_tag="visual-question-answering",
        tags=["medr1", "research-use-only"],
        eval_results=measured,
    )
    text = (files("medr1.study") / "templates" / "model-card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=text,
        results=results,
        recipe=recipe,
        notice=NOTICE,
        verdict=verdict[1],
        tables=[to_markdown(table) for table in tables if table.name in SHOWN],
        methods=sorted({line.label for line in study.lines}),
        seeds=sorted({run["seed"] for run in results["runs"]}),
    )
    return str(card)


def tripod_llm(study: StudyResults, numbers: dict[str, Any], verdict: tuple[str, str]) -> str:
    """What a study's files answer of the guideline TRIPOD-LLM (Nature Medicine 2025, 31:60); the rest is not reported.

    Its 19 items stand under short names of our own.
    """
    results = study.results
    settings, recipe = results["study"], results["study"]["recipe"]
    asked = max(model["all"]["n"] for model in numbers["untrained"])
    modes = ", ".join(dict.fromkeys(model["mode"] for model in numbers["untrained"]))
    methods = "; ".join(sorted({line.label for line in study.lines}))
    rewarded = any(line.method != "sft" for line in study.lines)
    rewards = ", ".join(f"{name} {weight}" for name, weight in settings["grpo"]["grpo"]["rewards"].items())
    seconds = sum(run["seconds"] for run in results["runs"])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    answers = [
        ("Title", f"Study “{settings['name']}”: multiple-choice questions on medical images"),
        ("Abstract", NOT_REPORTED),
        ("Background: need and intended use", f"intended use: {NOTICE} Clinical need: {NOT_REPORTED}"),
        ("Aims", "what SFT and GRPO on one domain change in it and in others, and whether the image is what is used"),
        (
            "Data: origin, selection, division, preparation",
            f"{recipe['data']['path']}; held-out part drawn by group (patient, lesion or image), split seed "
            f"{recipe['data']['split_seed']}; {asked:,} held-out questions; data sha256 {results['data_sha256']}. "
            f"Dates, demographics and eligibility: {NOT_REPORTED}",
        ),
        (
            "Analysis: model, training, measures",
            f"{recipe['model']['name']}; {methods}; recipe sha256 {results['recipe_hash']}; accuracy with 95 % "
            "intervals by group, paired changes with Holm’s correction; tables/",
        ),
        (
            "Output of the model and how it is read",
            "one option; read by one fixed extractor, what cannot be read is wrong",
        ),
        ("Annotation of the reference standard", NOT_REPORTED),
        ("Prompts", f"one prompt for training and evaluation, in {modes}; greedy replies"),
        ("Summarising of texts before use", "none"),
        ("Instruction tuning and alignment", methods + (f"; rewards {rewards}" if rewarded else "")),
        ("Computing", f"{len(results['runs'])} training runs; {seconds / 3600:.2f} hours; {versions}"),
        ("Ethical approval", NOT_REPORTED),
        (
            "Openness: funding, conflicts, protocol, data, code",
            f"settings and rows in the study’s folder; rest {NOT_REPORTED}",
        ),
        ("Involvement of patients and the public", NOT_REPORTED),
        ("Participants: flow and characteristics", f"questions by value in results.json; persons: {NOT_REPORTED}"),
        ("Performance, by subgroup and with intervals", f"report.html, tables/; on the image: {verdict[1]}"),
        ("Updating of the model", "none after training"),
        ("Interpretation, limits, fairness, usability", f"limits in report.html; fairness by person: {NOT_REPORTED}"),
    ]
    rows = [[str(number), name, answer.replace("|", "\\|")] for number, (name, answer) in enumerate(answers, start=1)]
    table = tabulate(rows, ["item", "what it asks for", "this study"], tablefmt="github", disable_numparse=True)
    return f"# TRIPOD-LLM, study “{settings['name']}”\n\n{NOTICE}\n\n{table}\n"


def _averages(numbers: dict[str, Any]) -> Table:
    changes = {(c["axis"], c["side"], c["after"]): c for c in numbers["comparisons"] if c["kind"] == "base"}
    records: list[dict[str, Any]] = []
    lines = []
    for axis in dict.fromkeys(line["axis"] for line in numbers["lines"]):
        for base in (base for base in numbers["bases"] if base["axis"] == axis):
            label = f"base {base['mode']}"
            whole = next(line["num_values"] for line in numbers["lines"] if line["axis"] == axis)
            records += [_average(axis, label, side, base[side], None) for side in ("own", "others")]
            shown = _among(label, base["own"]["n"], whole)
            lines.append([_axis(axis), shown, _percent(base["own"]), "–", _percent(base["others"]), "–"])
        for line in (line for line in numbers["lines"] if line["axis"] == axis):
            text = [_axis(axis), _among(line["label"], len(line["values"]), line["num_values"])]
            for side in ("own", "others"):
                change = changes.get((axis, side, line["label"]))
                records.append(_average(axis, line["label"], side, line[side], change))
                text += [_percent(line[side]), _change(change)]
            lines.append(text)
    head = ["trained on one", "model", "own, %", "against base", "others, %", "against base"]
    caption = (
        "Accuracy averaged over the axis (own: or over so many of its values as stand behind the model), 95 % "
        "intervals in brackets, paired change against the base in points; * beyond the noise after Holm’s correction. "
        + NOTICE
    )
    return Table("averages", caption, records, head, lines)


def _among(label: str, num: int, whole: int) -> str:
    """A label that says of how many values an average is, where it is not of all that are tested."""
    return label + (f" ({num} of {whole})" if num < whole else "")


def _average(axis: str, label: str, side: str, cell: dict[str, Any], change: dict[str, Any] | None) -> dict[str, Any]:
    return {"axis": axis, "model": label, "tested_on": side, **_average_fields(cell), **_change_fields(change)}


def _whole(numbers: dict[str, Any]) -> Table:
    records, lines = [], []
    for c in numbers["whole"]:
        about = {"axis": c["axis"], "after": c["after"], "before": c["before"], "models": c["models"]}
        before = {"accuracy_before": c["accuracy_before"]["accuracy"]}
        records.append({**about, **_average_fields(c["accuracy"]), **before, **_change_fields(c)})
        told = [_axis(c["axis"]), f"{c['after']} against {c['before']}", str(c["models"])]
        accuracies = [_percent(c[name]) for name in ("accuracy", "accuracy_before")]
        lines.append([*told, *accuracies, _change(c), p_value(c["holm_p"])])
    head = ["trained on one", "comparison", "models of each", "the first, %", "the second, %", "change in points",
            "p, Holm"]  # fmt: skip
    caption = (
        "Every model on everything that is tested, its own domain among it, averaged over the matrix as in the "
        f"published study; accuracies and paired changes over the models that both have. {NOTICE}"
    )
    return Table("whole", caption, records, head, lines)


def _comparisons(numbers: dict[str, Any]) -> Table:
    records, lines = [], []
    for c in numbers["comparisons"]:
        measure = "reliance" if c["kind"] == "reliance" else "accuracy"
        about = {"axis": c["axis"], "tested_on": c["side"], "after": c["after"], "before": c["before"]}
        records.append({**about, "measure": measure, "models": c["models"], **_change_fields(c)})
        told = [_axis(c["axis"]), c["side"], measure, f"{c['after']} against {c['before']}", str(c["models"])]
        lines.append([*told, _change(c), p_value(c["holm_p"])])
    head = ["trained on one", "tested on", "measure", "comparison", "models of each", "change in points", "p, Holm"]
    caption = (
        "Paired changes over the models that both have, accuracy averaged over the axis; reliance is accuracy with the "
        f"own image less accuracy with another one of the modality, each question counting once. {NOTICE}"
    )
    return Table("comparisons", caption, records, head, lines)


def _matrix(matrix: dict[str, Any]) -> Table:
    records, lines = [], []
    base = matrix["base"]
    for value, cell in zip(matrix["values"], base["cells"], strict=True):
        records.append({"trained_on": "base", "tested_on": value, **_cell(cell), **_change_fields(None)})
    lines.append(["base", *map(_percent, base["cells"]), _percent(base["average"])])
    for row in matrix["rows"]:
        for cell in row["cells"]:
            about = {"trained_on": row["trained_on"], "tested_on": cell["tested_on"]}
            records.append({**about, **_cell(cell), **_change_fields(cell["change"])})
        cells = [_percent(cell) + MARKS[cell["change"]["verdict"]] for cell in row["cells"]]
        lines.append([row["trained_on"], *cells, _percent(row["average"])])
    name = re.sub("[^a-z]+", "-", f"matrix {matrix['axis']} {matrix['label']}".lower())
    caption = (
        f"{matrix['label']}: accuracy in percent (95 % interval); lines: trained on, columns: tested on; * differs "
        f"from the base beyond the noise after Holm’s correction over the table. {NOTICE}"
    )
    return Table(name, caption, records, ["trained on", *matrix["values"], "average"], lines)


def _controls(numbers: dict[str, Any]) -> Table:
    records, lines = [], []
    for line in numbers["lines"]:
        seen = {"image": line["own"], **line["controls"], "option text alone": line["prior"]}
        for name, cell in seen.items():
            cost = cell.get("cost")
            about = {"axis": line["axis"], "model": line["label"], "condition": name}
            records.append({**about, **_average_fields(cell), **_change_fields(cost)})
        shown = ("image", *CONTROLS, "option text alone")
        cells = [_percent(seen[name]) if name in seen else "–" for name in shown]
        label = _among(line["label"], len(line["values"]), line["num_values"])
        lines.append([_axis(line["axis"]), label, *cells, percent(line["own"]["chance"])])
    head = ["trained on one", "model", "image", "blank", "no image", "another, same modality", "other modality",
            "option text alone", "guessing"]  # fmt: skip
    caption = f"Accuracy in the own domain with the image and without its evidence (95 % interval). {NOTICE}"
    return Table("controls", caption, records, head, lines)


def _option_order(numbers: dict[str, Any]) -> Table:
    records, lines = [], []
    for model in numbers["order"]:
        text = [model["label"]]
        for condition in ("permuted", "repeat"):
            flips = model[condition] or {"rate": None, "ci95": None, "n": None}
            low, high = flips["ci95"] or (None, None)
            about = {"model": model["label"], "condition": condition}
            records.append({**about, "flip_rate": flips["rate"], "ci_low": low, "ci_high": high, "n": flips["n"]})
            text.append(with_span(flips["rate"], flips["ci95"]))
        lines.append(text)
    caption = f"How often another option is chosen once options are reordered, and once nothing changes. {NOTICE}"
    return Table("option-order", caption, records, ["model", "reordered", "nothing changed"], lines)


def _models(numbers: dict[str, Any]) -> Table:
    records, lines = [], []
    for model in numbers["untrained"]:
        about = {"method": model["method"], "model": model["model"], "mode": model["mode"]}
        whole = {**model["all"], "n": None, "questions": model["all"]["n"]}
        for name, cell in (("all questions", whole), *((axis, model[axis]) for axis in AXES)):
            records.append({**about, "average": name, **_average_fields(cell)})
        lines.append([model["model"], model["mode"], _percent(model["all"]), *(_percent(model[axis]) for axis in AXES)])
    head = ["model", "prompt", "all questions", "average of modalities", "average of question types"]
    return Table("models", f"Models as they are: accuracy (95 % interval). {NOTICE}", records, head, lines)


def _runs(study: StudyResults) -> Table:
    names = ("folder", "axis", "trained_on", "method", "mode", "seed", "steps", "examples", "seconds")
    records = [{name: run[name] for name in names} for run in study.results["runs"]]
    lines = [[str(value) for value in record.values()] for record in records]
    return Table("runs", "Training runs.", records, [name.replace("_", " ") for name in names], lines)


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    low, high = cell["ci95"] or (None, None)
    return {"accuracy": cell["accuracy"], "ci_low": low, "ci_high": high, "n": cell["n"], "chance": cell["chance"]}


def _average_fields(cell: dict[str, Any]) -> dict[str, Any]:
    """Of an average: how many values it is over, and how many questions."""
    fields = _cell(cell)
    num = fields.pop("n")
    return {**fields, "num_values": num, "questions": cell["questions"]}


def _change_fields(change: dict[str, Any] | None) -> dict[str, Any]:
    change = change or {}
    low, high = change.get("ci95") or (None, None)
    return {
        "difference": change.get("difference"),
        "difference_low": low,
        "difference_high": high,
        "p": change.get("p"),
        "holm_p": change.get("holm_p"),
        "verdict": change.get("verdict"),
    }


def _percent(cell: dict[str, Any]) -> str:
    return with_span(cell["accuracy"], cell["ci95"])


def _change(change: dict[str, Any] | None) -> str:
    if change is None:
        return "–"
    return points_with_span(change) + MARKS[change["verdict"]]


def _axis(axis: str) -> str:
    return axis.replace("_", " ")
