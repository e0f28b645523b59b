"""The report of a whole study: one self-contained page, tables to cite, a model card and a TRIPOD-LLM table.

Everything is drawn from the study's folder (results.json, evaluations/, runs/); no model runs and no network is used.
What models wrote is shown as text, never as markup.
"""

import base64
import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from markupsafe import Markup

from medr1.data.records import LETTERS, read_jsonl, to_json, write_atomic
from medr1.evaluation.looking import MEASURES
from medr1.evaluation.metrics import AXES, MIN_N, Row
from medr1.evaluation.rows import read_rows
from medr1.report.pages import environment, p_value, percent, points, span, span_points, thumbnail
from medr1.report.plots import curve_panel, curve_styles, standalone, study_plot
from medr1.report.trust import faithfulness_section
from medr1.study.exports import write_exports
from medr1.study.numbers import LOOKING, Line, StudyResults, study_numbers

MAX_ROWS = 50_000
"""Rows of the viewer (a question and one way of training); of more questions a seeded sample is kept, and said."""
MAX_THUMBNAILS = 240
"""Images in the page, a seeded sample; the viewer shows their questions first."""

WORDS = {"modality": ("modality", "modalities"), "question_type": ("question type", "question types")}
"""An axis in the singular and the plural."""
CONDITIONS = {
    "blank": "image blanked",
    "no_image": "no image",
    "shuffled": "another image, same modality",
    "shuffled_other": "image of another modality",
}
STROKES = {"-": "━━━", "--": "━ ━", "-.": "━ ·", ":": "···"}
"""A dash of matplotlib's as the key writes it."""
SAMPLES = 10
"""Replies in samples.md."""
CODE = " " * 4
"""What stands before each line of Markdown code."""
OUTCOMES = ("letter", "ambiguous", "refusal", "truncated", "invalid", "unparsed")


def write_study_report(folder: Path) -> dict[str, Any]:
    """Write report.html, figures/, tables/, samples.md, model-card.md and tripod-llm.md into a finished study's folder.

    Returns:
        report (path), image ("good", "bad" or "open": whether the image is what is used), verdict (the sentence that
        says so), and for each way of training its accuracy in the own domain as "axis, label".

    Raises:
        MedR1Error: the folder holds no finished study, or a file cannot be read or written.
    """
    study = StudyResults(folder)
    numbers = study_numbers(study)
    verdict, story = tell(numbers)
    viewer = _viewer(study)
    axes = list(dict.fromkeys(line["axis"] for line in numbers["lines"]))
    pages = environment("study")
    pages.filters |= {f.__name__: f for f in (number, cell_class, shade, in_words, is_base)}
    plots = {axis: study_plot(_of(numbers, axis), f"other {WORDS[axis][1]}") for axis in axes}
    curves = _curves(study)
    page = pages.get_template("study.html.j2").render(
        results=study.results,
        settings=json.dumps(study.results["study"], indent=1, ensure_ascii=False),
        numbers=numbers,
        axes=axes,
        words=WORDS,
        conditions={name: words for name, words in CONDITIONS.items() if _asked(numbers, "controls", name)},
        looking=[name for name in LOOKING if _asked(numbers, "looking", name)],
        measures=MEASURES,
        outcomes=OUTCOMES,
        how=_how(study, numbers),
        verdict=verdict,
        story=story,
        plots=plots,
        compared={(c["axis"], c["side"], c["kind"], c["after"]): c for c in numbers["comparisons"]},
        others=[c for c in numbers["comparisons"] if c["kind"] != "base"],
        faithfulness=[(f["cell"], faithfulness_section(f)) for f in study.results.get("faithfulness", ())],
        curves=curves,
        curve_styles=[(colour, STROKES[dash]) for (colour, dash), _ in zip(curve_styles(), study.lines, strict=False)],
        seeds=sorted({run["seed"] for run in study.results["runs"]}),
        viewer=viewer,
        packed=_pack(viewer),
        min_n=MIN_N,
    )
    write_atomic(folder / "report.html", page)
    write_atomic(folder / "samples.md", _samples(study))
    figures = plots | {f"{title} {value}": svg for title, _, panels in curves for value, svg in panels}
    drawn = {f"{re.sub('[^a-z0-9]+', '-', name.lower())}.svg": svg for name, svg in figures.items()}
    for name, svg in drawn.items():
        write_atomic(folder / "figures" / name, standalone(svg))
    for path in (folder / "figures").glob("*.svg"):  # of cells that the study had before
        if path.name not in drawn:
            path.unlink()
    write_exports(study, numbers, verdict, folder)
    own = {f"{line['axis']}, {line['label']}": line["own"]["accuracy"] for line in numbers["lines"]}
    return {"report": str(folder / "report.html"), "image": verdict[0], "verdict": verdict[1], **own}


def tell(numbers: dict[str, Any]) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """The first screen in words: the verdict on the image, and sentences; each with its worth.

    Worth is "good", "bad" or "open". Only what is beyond the noise after Holm's correction counts as better or worse.
    """
    lines = numbers["lines"]
    story = []
    for kind, side, subject in (
        ("base", "own", "Against the base, on what it was trained on"),
        ("base", "others", "Against the base, on what it was not trained on"),
        ("sft", None, "GRPO against SFT"),
        ("think", None, "Thinking first or after, against no-think"),
        ("looking", None, "Looking against plain GRPO"),
        ("reliance", None, "What the own image adds over another one, looking against plain GRPO"),
    ):
        found = [c for c in numbers["comparisons"] if c["kind"] == kind and side in (None, c["side"])]
        if found:
            reached = _range([line[side]["accuracy"] for line in lines], percent) if side else ""
            story.append(_counted(subject, found, f", to {reached}" if reached else ""))
    return _unchanged(numbers["comparisons"], _image(lines)), [*story, *_blanked(lines), *_guessed(lines)]


def _asked(numbers: dict[str, Any], part: str, name: str) -> bool:
    """Whether any way of training, or the base beside it, has this control or measure."""
    return any(name in line.get(part, {}) for line in [*numbers["lines"], *numbers["bases"]])


def number(value: float | None) -> str:
    """0.5 as "50.0", for tables whose head says percent; a dash where undefined."""
    return "–" if value is None else f"{100 * value:.1f}"


def cell_class(cell: dict[str, Any]) -> str:
    """How a cell of a matrix is drawn: "up", "down" or "few"; plain for what is within the noise."""
    return {"up": "up", "down": "down", "too few": "few"}.get(cell["change"]["verdict"], "")


def shade(cell: dict[str, Any]) -> Markup:
    """The background of a cell beyond the noise, stronger for a larger change; white stays for everything else."""
    change = cell["change"]
    if not change["significant"]:
        return Markup("")
    colour = "0, 114, 178" if change["difference"] > 0 else "213, 94, 0"
    return Markup(f' style="background: rgba({colour}, {0.1 + 0.5 * min(1.0, 2 * abs(change["difference"])):.2f})"')


def is_base(table: dict[str, Any]) -> bool:
    """Whether every number of a matrix is the base's: there is nothing to see in it."""
    return all(cell["change"]["difference"] == 0 for row in table["rows"] for cell in row["cells"] if cell["n"])


def in_words(cell: dict[str, Any], trained_on: str) -> str:
    """A cell of a matrix as a sentence."""
    change = cell["change"]
    seeds = f"; by seed {', '.join(map(percent, cell['seeds']))}" if len(cell["seeds"]) > 1 else ""
    meaning = {"too few": "too few questions to say", "noise": "within the noise"}
    verdict = meaning.get(change["verdict"], "beyond the noise")
    return (
        f"trained on {trained_on}, tested on {cell['tested_on']}: {percent(cell['accuracy'])}, 95 % interval "
        f"{span(cell['ci95'])}, n = {cell['n']}, guessing {percent(cell['chance'])}{seeds}; against the base "
        f"({percent(cell['base'])}) {points(change['difference'])} points, {span_points(change['ci95'])}, "
        f"p {p_value(change['p'])}, Holm {p_value(change['holm_p'])}: {verdict}"
    )


def _counted(subject: str, comparisons: Sequence[dict[str, Any]], reached: str) -> tuple[str, str]:
    """How many comparisons go which way, by how much, and what is reached."""
    count = {name: sum(c["verdict"] == name for c in comparisons) for name in ("up", "down", "noise", "too few")}
    words = {"up": "better", "down": "worse", "noise": "within the noise", "too few": "too few questions to say"}
    said = [f"{count[name]} {word}" for name, word in words.items() if count[name]]
    worth = "good" if count["up"] == len(comparisons) else "bad" if count["down"] > count["up"] else "open"
    moved = _range([c["difference"] for c in comparisons], points)
    together = f"all {said[0]}" if len(said) == 1 and len(comparisons) > 1 else ", ".join(said)
    return worth, f"{subject}: {together} ({moved} points{reached})."


def _unchanged(comparisons: Sequence[dict[str, Any]], image: tuple[str, str]) -> tuple[str, str]:
    """The verdict on the image; where training bettered nothing, that comes first, and what is used is no success."""
    worth, said = image
    found = [c for c in comparisons if c["kind"] == "base"]
    moved = _range([c["difference"] for c in found], points)
    worse = sum(c["verdict"] == "down" for c in found)
    if found and all(c["difference"] == 0 for c in found):
        news = f"Training changed nothing: {moved} points everywhere."
    elif not found or worth != "good" or any(c["verdict"] == "up" for c in found):
        return image
    elif worse:
        news = f"Training lowered accuracy in {worse} of {len(found)} comparisons with the base, and raised it in none."
    else:
        news = f"Nothing shows that training changed accuracy: {moved} points, none of it beyond the noise."
    return ("open" if worth == "good" else worth), f"{news} {said}"


def _image(lines: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The verdict: is it the image?"""
    tested = [line for line in lines if "blank" in line["controls"]]
    blind = [line for line in tested if not _uses_image(line)]
    text = [line for line in lines if line["prior"]["accuracy"] is not None]
    guessable = [line for line in text if line["prior"]["ci95"][0] > line["prior"]["chance"] and not _beats_text(line)]
    axes = list(dict.fromkeys(line["axis"] for line in text))
    if guessed := [axis for axis in axes if all(line in guessable for line in text if line["axis"] == axis)]:
        where = f" within one {WORDS[guessed[0]][0]}" if len(guessed) == 1 else ""
        unused = ", and nothing shows that the image is used" if tested and len(blind) == len(tested) else ""
        return "bad", f"The answers can be guessed from the text alone{where}{unused}."
    if tested and len(blind) == len(tested):
        return "bad", "Nothing here shows that the image is used."
    if guessable or blind:
        doubtful = [line for line in lines if line in blind or line in guessable]
        return (
            "open",
            f"Nothing shows that the image is what is used in {len(doubtful)} of {len(lines)} ways of training.",
        )
    if not tested:
        return "open", "Whether the image is used is not known: no blank-image control was run."
    return "good", "The image is used."


def _blanked(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    tested = [line for line in lines if "blank" in line["controls"]]
    if not tested:
        return []
    costs = [-line["controls"]["blank"]["cost"]["difference"] for line in tested]
    used = sum(map(_uses_image, tested))
    worth = "good" if used == len(tested) else "bad" if not used else "open"
    num_changed = sum(line["controls"]["blank"]["cost"]["verdict"] in ("up", "down") for line in tested)
    beyond = f"beyond the noise in {num_changed} of {len(tested)} ways of training"
    return [(worth, f"With the image blanked, accuracy changes by {_range(costs, points)} points, {beyond}.")]


def _guessed(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    text = [line for line in lines if line["prior"]["accuracy"] is not None]
    if not text:
        return [("open", "No text-only prior was learned: the options may give the answers away.")]
    alone = _range([line["prior"]["accuracy"] for line in text], percent)
    guessing = _range([line["prior"]["chance"] for line in text], percent)
    above = sum(map(_beats_text, text))
    worth = "good" if above == len(text) else "bad" if not above else "open"
    trained = f"trained models score above that in {above} of {len(text)} ways of training"
    return [(worth, f"Option texts alone, without image or question, score {alone} (guessing {guessing}); {trained}.")]


def _uses_image(line: dict[str, Any]) -> bool:
    """Whether the image adds to accuracy beyond the noise."""
    return line["controls"]["blank"]["cost"]["verdict"] == "up"


def _beats_text(line: dict[str, Any]) -> bool:
    """Whether the two intervals part."""
    return bool(line["own"]["ci95"] and line["own"]["ci95"][0] > line["prior"]["ci95"][1])


def _range(values: Sequence[float | None], form: Any) -> str:
    known = [value for value in values if value is not None]
    low, high = (form(pick(known, default=None)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _of(numbers: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    return [line for line in numbers["lines"] if line["axis"] == axis]


def _how(study: StudyResults, numbers: dict[str, Any]) -> str:
    """What was trained, in a few sentences."""
    runs = study.results["runs"]
    ways: dict[str, list[str]] = {}
    for line in numbers["lines"]:
        whole = len(line["values"]) == line["num_values"]
        on = f"each of {line['num_values']} {WORDS[line['axis']][1]}" if whole else ", ".join(line["values"])
        ways.setdefault(on, []).append(line["label"])
    parts: dict[str, list[str]] = {}
    for on, labels in ways.items():
        parts.setdefault("; ".join(labels), []).append(on)
    trained = " ".join(f"On {' and on '.join(on)}: {labels}." for labels, on in parts.items())
    seeds = sorted({run["seed"] for run in runs})
    cells = {(run["axis"], run["trained_on"], run["method"], run["mode"]) for run in runs}
    uneven = " (not of all)" if len(runs) < len(cells) * len(seeds) else ""
    asked = max((model["all"]["n"] for model in numbers["untrained"]), default=0)
    return (
        f"{trained} Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{uneven}. {len(runs)} trained "
        f"models, each tested on the same {asked:,} held-out questions."
    )


def _curves(study: StudyResults) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
    """(title, names of the curves, (value, SVG) of each panel): averages over seeds of what the logs hold."""
    figures = []
    for key, title, share in (("reward_accuracy", "right answers sampled", True), ("loss", "loss of SFT", False)):
        for axis in AXES:
            lines = [line for line in study.lines if line.axis == axis and (line.method != "sft") == share]
            panels = []
            for value in AXES[axis]:
                curves = {line.label: _curve(study, line, value, key) for line in lines}
                if any(curves.values()):
                    panels.append((value, curve_panel(curves, value, share=share)))
            if panels:
                figures.append((f"By {WORDS[axis][0]} trained on: {title}", [line.label for line in lines], panels))
    return figures


def _curve(study: StudyResults, line: Line, value: str, key: str) -> list[tuple[float, float]]:
    by_step: dict[float, list[float]] = {}
    for run in study.results["runs"]:
        if (run["axis"], run["method"], run["mode"], run["trained_on"]) == (line.axis, line.method, line.mode, value):
            for entry in read_jsonl(study.folder / run["folder"] / "log.jsonl"):
                if key in entry:
                    by_step.setdefault(entry["step"], []).append(entry[key])
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


def _viewer(study: StudyResults) -> dict[str, Any]:
    """The viewer's data in columns, one place a question; every text stands once in `texts` and is named by its place.

    Returns:
        packed: texts; id, modality, question_type, source, question, options, gold, images (places in `thumbnails`,
            -1 for one not kept), one a question; sets: columns of replies, text -1 where there is none; ways: label,
            and which set holds the replies before and after.
        thumbnails: data URIs; None for a file that cannot be read.
        asked, shown, pictures: numbers of questions and of their images.
    """
    base = {mode: _replies(study, "base", mode) for mode in dict.fromkeys(line.mode for line in study.lines)}
    asked = {name: row for rows in base.values() for name, row in rows.items()}
    kept = random.Random(0).sample(sorted(asked), min(len(asked), MAX_ROWS // max(1, len(study.lines))))
    paths = sorted({path for name in kept for path in asked[name]["images"]})
    pictured = random.Random(0).sample(paths, min(len(paths), MAX_THUMBNAILS))
    places = {path: place for place, path in enumerate(pictured)}
    kept.sort(key=lambda name: not places.keys() & set(asked[name]["images"]))  # stable: those with an image first
    rows = [asked[name] for name in kept]

    texts: dict[str, int] = {}

    def column(values: Sequence[str | None]) -> list[int]:
        return [-1 if value is None else texts.setdefault(value, len(texts)) for value in values]

    def replies(of: dict[str, Row]) -> dict[str, list[int]]:
        found = [of.get(name) for name in kept]
        return {
            **{
                field: column([row[field] if row else None for row in found])
                for field in ("reply", "letter", "outcome")
            },
            "correct": [int(bool(row and row["correct"])) for row in found],
            "cut": [int(bool(row and row["finish"] == "length")) for row in found],
            "tokens": [row["tokens"] if row else 0 for row in found],
        }

    sets = [replies(of) for of in base.values()]
    ways = []
    for line in study.lines:
        ways.append({"label": f"{line.label}, own {WORDS[line.axis][0]}", "before": list(base).index(line.mode)})
        ways[-1]["after"] = len(sets)
        sets.append(replies(_replies(study, line.method, line.mode, line.axis)))
    packed = {
        "id": kept,
        **{name: column([row[name] for row in rows]) for name in ("modality", "question_type", "source", "question")},
        "options": [column(row["options"]) for row in rows],
        "gold": [row["gold"] for row in rows],
        "images": [[places.get(path, -1) for path in row["images"]] for row in rows],
        "sets": sets,
        "ways": ways,
        "texts": list(texts),
    }
    folder = study.folder / "evaluations"
    return {
        "packed": packed,
        "thumbnails": [thumbnail(folder / path) for path in pictured],
        "asked": len(asked),
        "shown": len(kept),
        "pictures": len(paths),
    }


def _samples(study: StudyResults) -> str:
    """Replies of the first way of training that thinks, or of the first, as Markdown."""
    line = next((line for line in study.lines if line.mode == "think"), study.lines[0])
    before, after = _replies(study, "base", line.mode), _replies(study, line.method, line.mode, line.axis)
    seed = study.results["study"]["recipe"]["data"]["split_seed"]
    drawn = random.Random(seed).sample(sorted(after), min(SAMPLES, len(after)))
    parts = [
        f"# {study.results['study']['name']}: {len(drawn)} replies before and after",
        f"{line.label}; after training on the question's own {WORDS[line.axis][0]}, first seed. Drawn by seed {seed},"
        f" not by hand, from {len(after)} held-out questions. Research use only, not for clinical use.",
    ]
    for name in drawn:
        row = after[name]
        options = [f"{letter}) {text}" for letter, text in zip(LETTERS, row["options"], strict=False)]
        asked = "\n".join([row["question"], *options, f"right: {row['gold']}"])
        stated = filter(None, (name, row["modality"], row["question_type"]))
        parts += [f"## {', '.join(stated)}", indent(asked, CODE)]
        for when, of in (("Before", before[name]), ("After", row)):
            parts += [f"{when}, {'right' if of['correct'] else 'wrong'}:", indent(of["reply"], CODE)]
    return "\n\n".join(parts) + "\n"


def _replies(study: StudyResults, method: str, mode: str, axis: str | None = None) -> dict[str, Row]:
    """Whole rows by question: the base's, or those of the first seed's model trained on the question's value."""
    entries = [e for e in study.entries if (e.method, e.mode, e.axis, e.condition) == (method, mode, axis, "image")]
    firsts = {e.trained_on: e for e in sorted(entries, key=lambda entry: entry.seed or 0, reverse=True)}
    return {
        row["id"]: row
        for entry in firsts.values()
        for row in read_rows(entry.file)
        if axis is None or row[axis] == entry.trained_on
    }


def _pack(viewer: dict[str, Any]) -> str:
    """Compact JSON, gzip, base64: a tenth of the text for replies that are much alike."""
    text = to_json(viewer["packed"], separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
