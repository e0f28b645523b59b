"""What the check says: the findings in sentences, on the console and as one self-contained HTML page."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medr1.data.records import to_json, write_atomic
from medr1.report.checks.images import MAX_DISTANCE, MIN_CORRELATION, SIDE
from medr1.report.pages import environment, percent, thumbnail, with_span

MAX_PAIRS = 36
"""Pairs of pictures that look alike shown in the page, of all that were found."""
MAX_EXAMPLES = 20
"""Examples shown in the page for any other finding; check.json lists more."""
UNEVEN = 0.001
"""p below which the letters of the right options are called uneven."""

MARKS = {"good": Text("✓", "blue"), "bad": Text("✗", "red"), "open": Text("?", "dim")}


def tell(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings of `check_data` in sentences, each with its worth ("good", "bad", "open"); a bad one says what to do
    now.
    """
    return [*_pictures(report["images"]), *_parts(report["parts"]), *_words(report)]


def _pictures(images: dict[str, Any]) -> list[tuple[str, str]]:
    if not images["read"] and not images["unreadable"]["num"]:
        return [("open", f"None of the {images['num']:,} image files is there: nothing could be checked on them.")]
    story = []
    for name, what, now in (
        ("missing", "are missing", "fetch them, or say by --image-root where they lie"),
        ("unreadable", "cannot be decoded", "fetch or convert them; --skip-unreadable runs without their questions"),
    ):
        if num := images[name]["num"]:
            first = images[name]["listed"][0]
            story.append(("bad", f"{num:,} of {images['num']:,} image files {what}, first {first}. Now: {now}."))
    if not story:
        story.append(("good", f"All {images['num']:,} image files could be read."))
    if not images["read"]:
        return story
    for found in images["warnings"]["listed"]:
        told = f"{_count(found['num'], 'image file')} read with a warning: {found['warning']}, first {found['first']}"
        story.append(("open", f"{told}. Now: look at them."))
    if same := images["pixel_copies"]["num"]:
        kept = f"{_count(same, 'picture')} kept in several files ({images['byte_copies']['num']:,} byte for byte)"
        if across := images["pixel_copies_across_groups"]["num"]:
            told = (
                f"{across:,} under several groups: our split joins them, one by group alone does"
                " not. Now: where you divide by group yourself, give the files of one picture one group"
            )
            story.append(("bad", f"{kept}, {told}."))
        else:
            story.append(("open", f"{kept}; our split keeps them together."))
    else:
        story.append(("good", "No two image files hold the same pixels."))
    if num := images["near_duplicates"]["num"]:
        story.append(
            (
                "open",
                f"{_count(num, 'pair')} of pictures look alike, {images['near_across_groups']:,} across groups and "
                f"{images['near_across_parts']:,} across our own train and test: candidates to look at, not verdicts.",
            )
        )
    else:
        story.append(("good", "No two pictures look alike without being the same."))
    return story


def _parts(parts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not parts:
        return [("open", "Too few groups to divide into train and test.")]
    story = []
    for part in parts:
        image, group, copy = part["image_in_train"], part["group_in_train"], part["copy_in_train"]
        counts = {
            "show an image of train": image,
            "are of a group of train": group if group != image else 0,
            "show the pixels of a train image": copy if copy != image else 0,
            "repeat image and question": part["question_in_train"],
        }
        shared = ", ".join(f"{num:,} {what}" for what, num in counts.items() if num)
        if shared:
            story.append(
                (
                    "bad",
                    f"{part['name']}: of {part['test']:,} test questions {shared}. Now: read results on these parts as"
                    " too good, and take medr1's own split, by group.",
                )
            )
        else:
            story.append(("good", f"{part['name']}: train and test share no image, no group and no question."))
    texts = {part["name"]: part["text_only"] for part in parts if part["text_only"]["n"]}
    if not texts:
        return story
    scores = "; ".join(
        f"{name} {with_span(text['accuracy'], text['ci95'])}, guessing {percent(text['chance'])}"
        for name, text in texts.items()
    )
    gives = any(text["ci95"][0] > text["chance"] for text in texts.values())
    alone = "Option texts alone, without image or question, give"
    if gives:
        now = "hold a model's accuracy against this, not against guessing (`medr1 report` shows both)"
        story.append(("bad", f"{alone} answers away: {scores}. Now: {now}."))
    else:
        story.append(("good", f"{alone} nothing away: {scores}."))
    return story


def _words(report: dict[str, Any]) -> list[tuple[str, str]]:
    found, story = report["questions"], []
    if (refused := report["refused"])["num"]:
        first = refused["listed"][0].rstrip(".")
        story.append(("bad", f"{refused['said']} left out, first {first}. Now: mend them in their file."))
    else:
        story.append(("good", "Every row could be read."))
    if found["conflicting"]["num"]:
        again = _count(found["conflicting"]["num"], "question")
        now = "find out which answer is right, and leave the other out"
        story.append(("bad", f"{again} asked again about the same picture with another right answer. Now: {now}."))
    if found["repeated"]["num"] or found["near_same"]["num"]:
        repeated, near_same = found["repeated"]["num"], found["near_same"]["num"]
        story.append(
            ("open", f"Asked again about the same picture: {repeated:,}; in nearly the same words: {near_same:,}.")
        )
    else:
        story.append(("good", "No question is asked twice about one picture."))
    if num := report["options"]["duplicates"]["num"]:
        now = "reword one of the two"
        story.append(("bad", f"{_count(num, 'question')} with two wrong options that read the same. Now: {now}."))
    else:
        story.append(("good", "No question has two options that read the same."))
    if num := report["options"]["variants"]["num"]:
        spelt = f"{_count(num, 'option text')} spelt in several ways: the spelling may tell the answer"
        story.append(("bad", f"{spelt}. Now: spell each in one way."))
    if num := report["options"]["stem_variants"]["num"]:
        story.append(("open", f"{_count(num, 'question text')} spelt in several ways."))
    if num := report["spellings"]["spaces"]["num"]:
        story.append(("open", f"{_count(num, 'row')} with doubled or outer white space."))
    if rows := report["spellings"]["mended"]:
        story.append(("open", f"{rows:,} spellings of modality, type, key or answer were mended while reading."))
    letters = report["letters"]
    if letters is None:
        return story
    uneven = letters["p"] < UNEVEN
    always = f"always {letters['best']} scores {percent(letters['best_share'])}, guessing {percent(report['chance'])}"
    p = "p < 0.001" if letters["p"] < 0.001 else f"p = {letters['p']:.3f}"
    stands = f"The right option stands {'un' * uneven}evenly over the letters ({p}): {always}."
    now = " Now: mix the options; `medr1 eval --condition permuted` shows whether a model leans on letters." * uneven
    story.append(("bad" if uneven else "good", stands + now))
    return story


def print_check(report: dict[str, Any], console: Console) -> None:
    """Print the findings, counts and answers of a report of `check_data`; the page holds the rest."""
    console.print(
        f"{report['records']:,} questions, {report['images']['num']:,} images, {report['groups']:,} groups, "
        f"{len(report['sources'])} sources: {report['path']}",
        style="bold",
        markup=False,
        highlight=False,
    )
    for worth, sentence in tell(report):
        line = Table.grid(padding=(0, 1))
        line.add_row(MARKS[worth], Text(sentence))
        console.print(line)
    for line in report["refused"]["listed"][:MAX_EXAMPLES]:
        console.print(f"left out: {line}", markup=False, highlight=False)
    for name, counts in report["counts"].items():
        listed = ", ".join(f"{value} ({num:,})" for value, num in counts.items())
        said = "number of options" if name == "num_options" else name.replace("_", " ")
        console.print(f"questions by {said}: {listed}", markup=False, highlight=False)
    table = Table("", "questions", "different answers", "always the commonest", "guessing")
    for kind, line in report["answers"].items():
        shares = (percent(line["majority"]), percent(line["chance"]))
        table.add_row(kind, f"{line['n']:,}", f"{line['distinct']:,}", *shares)
    console.print(table)


def write_check(report: dict[str, Any], out: Path) -> None:
    """Write check.json and check.html into the folder `out`. The page needs no network.

    Raises:
        MedR1Error: the folder cannot be written.
    """
    write_atomic(out / "check.json", to_json(report, indent=1) + "\n")
    near = report["images"]["near_duplicates"]
    shown = [
        pair | {"thumbnails": [thumbnail(Path(report["folder"]) / name) for name in pair["images"]]}
        for pair in (near["listed"] if near else [])[:MAX_PAIRS]
    ]
    page = (
        environment()
        .get_template("check.html.j2")
        .render(
            report=report,
            story=tell(report),
            pairs=shown,
            max_examples=MAX_EXAMPLES,
            max_distance=MAX_DISTANCE,
            min_correlation=MIN_CORRELATION,
            side=SIDE,
        )
    )
    write_atomic(out / "check.html", page)


def _count(num: int, thing: str) -> str:
    return f"{num:,} {thing}{'' if num == 1 else 's'}"
