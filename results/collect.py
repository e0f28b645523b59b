"""Keep what is small of a finished study: tables, figures, samples, logs, and every reply in one table.

    python results/collect.py runs/study-small results/small

Questions and images stay with the data set, where `id` finds them.
"""

import csv
import gzip
import io
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from medr1.records import read_jsonl

FIELDS = ("id", "modality", "question_type", "group", "gold", "letter", "correct", "outcome", "tokens", "reply")


def main() -> None:
    study, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in ("tables", "figures"):
        shutil.copytree(study / name, out / name, dirs_exist_ok=True)
    for name in ("samples.md", "study.json"):
        shutil.copy(study / name, out / name)
    for log in sorted(study.glob("runs/*/log.jsonl")):
        (out / "logs").mkdir(exist_ok=True)
        shutil.copy(log, out / "logs" / f"{log.parent.name}.jsonl")
    keep_rows(sorted((study / "evaluations").glob("*.jsonl")), out / "rows.csv.gz")


def keep_rows(evaluations: Iterable[Path], out: Path) -> None:
    """One row a reply, by evaluation and id; equal evaluations give equal bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("evaluation", *FIELDS))
    for path in evaluations:
        for row in sorted(read_jsonl(path), key=lambda row: row["id"]):
            writer.writerow((path.stem, *(row[field] for field in FIELDS)))
    out.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


if __name__ == "__main__":
    main()
