"""What a base model answers, beside the option texts and its own answers to blanked images, by modality.

    python results/base.py DATA runs/small-image.jsonl runs/small-blank.jsonl results/small

Both evaluations are of the held-out part of DATA, divided by default (no recipe beside the model). Writes base.md and
base.svg, and base-rows.csv.gz with every reply.
"""

import sys
from pathlib import Path
from typing import Any

from collect import keep_rows
from tabulate import tabulate

from medr1.config import DataConfig
from medr1.data.parts import load_parts
from medr1.data.records import read_jsonl, write_atomic
from medr1.evaluation.controls import text_only_prior
from medr1.evaluation.metrics import accuracy_table, compare
from medr1.report.pages import percent, points_with_span, with_span
from medr1.report.plots import change_plot, standalone

HEAD = (
    "", "n", "chance", "option texts", "image blanked", "image shown", "shown minus blanked, paired", "intervals apart",
)  # fmt: skip


def main() -> None:
    data, shown_file, blank_file, out = sys.argv[1], *map(Path, sys.argv[2:])
    shown, blank = list(read_jsonl(shown_file)), list(read_jsonl(blank_file))
    train, test = load_parts(DataConfig(path=data))
    assert {record.id for record in test} == {row["id"] for row in shown}, "the evaluations are of another division"
    tables = text_only_prior(train, test), accuracy_table(blank), accuracy_table(shown), compare(blank, shown)
    lines, plot = [], []
    for name in ("all", *tables[2]["by_modality"]):
        prior, blanked, seen, change = (_of(table, name) for table in tables)
        apart = seen["ci95"][0] > max(prior["ci95"][1], blanked["ci95"][1])
        cells = [with_span(cell["accuracy"], cell["ci95"]) for cell in (prior, blanked, seen)]
        about = name, f"{seen['n']:,}", percent(seen["chance"])
        lines.append([*about, *cells, points_with_span(change), "yes" if apart else "no"])
        plot.append((name, blanked, seen))
    table = tabulate(lines, HEAD, tablefmt="github", disable_numparse=True)
    print(table)
    write_atomic(out / "base.md", table + "\n")
    svg = change_plot(plot, "Accuracy with the image blanked and with it shown")
    write_atomic(out / "base.svg", standalone(svg))
    keep_rows({path.stem: path for path in (shown_file, blank_file)}, out / "base-rows.csv.gz")


def _of(table: dict[str, Any], name: str) -> dict[str, Any]:
    return table if name == "all" else table["by_modality"][name]


if __name__ == "__main__":
    main()
