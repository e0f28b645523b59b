"""Keep what is small of a finished study: tables, figures, samples, logs, gains by question type, and every reply.

    python results/collect.py runs/study-small results/small

Where `medr1 study --keep results/small` has kept its cells, logs and replies are in these. Questions and images stay
with the data set, where `id` finds them.
"""

import csv
import gzip
import io
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

from medr1.data.records import read_jsonl, write_atomic
from medr1.evaluation.metrics import accuracy_table, compare
from medr1.report.pages import percent, points_with_span, with_span
from medr1.study.numbers import StudyResults, asked_too

FIELDS = ("id", "modality", "question_type", "group", "gold", "letter", "correct", "outcome", "tokens", "reply")


def main() -> None:
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in ("tables", "figures"):
        shutil.rmtree(out / name, ignore_errors=True)  # of cells that the study had before
        shutil.copytree(study / name, out / name)
    shutil.copy(study / "samples.md", out / "samples.md")
    found = StudyResults(study)
    about = {name: found.results[name] for name in ("versions", "data_sha256", "examples")}
    rows = [Path(entry["rows"]).stem for entry in found.results["evaluations"] if entry["condition"] == "image"]
    about["cells"] = sorted(name.removesuffix("-image") for name in rows)  # more may be kept before the next tables
    write_atomic(out / "about.json", json.dumps(about, indent=1) + "\n")
    write_atomic(out / "gains.md", gains(found))
    if (out / "cells").is_dir():  # of `medr1 study --keep`, with every log and reply
        return
    for log in sorted(study.glob("runs/*/log.jsonl")):
        (out / "logs").mkdir(exist_ok=True)
        shutil.copy(log, out / "logs" / f"{log.parent.name}.jsonl")
    keep_rows({path.stem: path for path in sorted((study / "evaluations").glob("*.jsonl"))}, out / "rows.csv.gz")


def gains(study: StudyResults) -> str:
    """What each way of training changed on the questions of its own domain, by question type, as a Markdown table."""
    lines = []
    for line in study.lines:
        own = study.own(line)
        base = asked_too(study.base(line.mode), own)
        before, after, change = (
            t["by_question_type"] for t in (accuracy_table(base), accuracy_table(own), compare(base, own))
        )
        for kind, cell in after.items():
            shown = [with_span(c["accuracy"], c["ci95"]) for c in (before[kind], cell)]
            label = f"{line.label}, one {line.axis.replace('_', ' ')}"
            about = label, kind, str(cell["n"]), percent(cell["chance"])
            lines.append([*about, *shown, points_with_span(change[kind])])
    head = ["", "question type", "n", "guessing", "base", "trained", "change, paired"]
    return tabulate(lines, head, tablefmt="github", disable_numparse=True) + "\n"


def keep_rows(evaluations: Mapping[str, Path], out: Path) -> None:
    """One row a reply, by evaluation (its name and its rows) and id; equal evaluations give equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("evaluation", *FIELDS))
    for name, path in evaluations.items():
        for row in sorted(read_jsonl(path), key=lambda row: row["id"]):
            writer.writerow((name, *(row[field] for field in FIELDS)))
    out.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


if __name__ == "__main__":
    main()
