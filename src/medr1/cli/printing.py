"""What commands print: tables on stdout, the disclaimer on stderr, one JSON line where it is asked for."""

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from medr1 import NOTICE

console = Console(stderr=True)
LISTED = 20
"""Lines of a list that are printed; --json has all."""


def finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    console.print(NOTICE, style="dim")


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    table = Table(
        title=f"accuracy {percent(summary['accuracy'])}, 95 % interval {interval(summary)}, n = {summary['n']}"
    )
    for heading in ("", "accuracy", "95 % interval", "chance", "n"):
        table.add_column(heading, justify="left" if not heading else "right")
    for part in ("by_modality", "by_question_type"):
        for name, cell in summary[part].items():
            table.add_row(name, percent(cell["accuracy"]), interval(cell), percent(cell["chance"]), str(cell["n"]))
        table.add_section()
    table.add_row(
        "all",
        percent(summary["accuracy"]),
        interval(summary),
        percent(summary["chance"]),
        str(summary["n"]),
    )
    if summary["n"]:
        Console().print(table)
    if summary["open"]:
        Console().print(_open_table(summary["open"]))
    finish(summary, as_json)


def print_answered(cell: dict[str, Any]) -> None:
    Console().print(
        f"on groups not calibrated on: answers {percent(cell['coverage'])} % of the questions; "
        f"accuracy of these {percent(cell['accuracy'])}, "
        f"95 % interval {interval(cell)}",
        highlight=False,
        soft_wrap=True,
    )


def _open_table(found: dict[str, Any]) -> Table:
    from medr1.evaluation.metrics import OPEN_SCORES

    table = Table("", title=f"open questions, n = {found['n']}")
    for heading in ("score", "95 % interval", "chance", "n"):
        table.add_column(heading, justify="right")
    for name, part in OPEN_SCORES.items():
        if (cell := found[part])["n"]:
            table.add_row(name, percent(cell["accuracy"]), interval(cell), percent(cell["chance"]), str(cell["n"]))
    return table


def numbers_span(ci: list[float] | None) -> str:
    return "–" if ci is None else f"{ci[0]:.3f} to {ci[1]:.3f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def interval(cell: dict[str, Any]) -> str:
    return "–" if cell["ci95"] is None else f"{percent(cell['ci95'][0])} to {percent(cell['ci95'][1])}"
