"""What commands print: tables on stdout, the disclaimer on stderr, one JSON line where it is asked for.

Each command ends in the same way: what came out, where it lies, what to do next.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medr1 import NOTICE
from medr1.data.records import to_json

console = Console(stderr=True)
LISTED = 20
"""Lines of a list that are printed; --json has all."""
FEW_LEFT = 0.1
"""Share of replies without a usable answer from which the remedy is told."""


def finish(
    result: Mapping[str, Any],
    as_json: bool,
    *,
    said: Sequence[str] = (),
    made: Mapping[str, Path | str] | None = None,
    then: str | None = None,
) -> None:
    """End a command: the disclaimer, then the JSON line, or what came out.

    Args:
        said: the outcome in sentences.
        made: what came out -> where it lies.
        then: what to do next, a command where there is one.
    """
    console.print(NOTICE, style="dim")
    if as_json:
        typer.echo(to_json(result))
        return
    for sentence in said:
        Console().print(sentence, highlight=False, markup=False, soft_wrap=True)
    lines = {name: str(place) for name, place in (made or {}).items()} | ({"next": then} if then else {})
    width = max(map(len, lines), default=0)
    for name, text in lines.items():  # no table: a path that is broken over two lines cannot be copied
        line = Text.assemble((name.ljust(width), "bold"), "  ", text)
        Console().print(line, soft_wrap=True)


def finish_run(result: Mapping[str, Any], out: Path, as_json: bool, *, complete: bool) -> None:
    """The end of `demo` and `run`: before and after, the controls, the page, the next command."""
    limits = result["ci95"]
    over = f", averaged over {num} modalities" if (num := result["num_modalities"]) > 1 else ""
    table = Table(title=f"accuracy on {result['n']:,} held-out questions{over}", title_justify="left")
    for heading in ("", "%", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right")
    lines = (
        ("guessing", "chance"),
        ("before training", "base_macro"),
        (f"after {result['steps']:,} steps", "trained_macro"),
        ("  option texts alone", "text_only"),
        ("  trained, image blanked", "blank"),
        ("  trained, another image of the modality", "shuffled"),
    )
    for words, name in lines:
        if result.get(name) is not None:
            table.add_row(words, percent(result[name]), interval({"ci95": limits.get(name)}))
    if not as_json:
        Console().print(table)
    said = [f"complete: {out} (another --out, or none of its files, begins anew)"] if complete else []
    if (gain := result["gain_points"]) is not None:
        span = limits["gain_points"]
        said.append(
            f"training changed it by {gain:+.1f} points" + (f" ({span[0]:+.1f} to {span[1]:+.1f})" if span else "")
        )
    if (looking := result.get("looking")) and (cell := looking["after"].get("reliance")):
        before = looking["before"].get("reliance")
        adds = f"its own image adds {100 * cell['value']:+.1f} points over another image of the modality"
        said.append(
            f"{adds} ({interval(cell)})" + (f"; before training {100 * before['value']:+.1f}" if before else "")
        )
    if apart := result.get("num_apart"):  # none in a result of an earlier version
        said.append(
            f"{apart:,} more held-out questions, open or of no stated modality, are counted apart in the report"
        )
    model = shown(result["model"])
    made = {"report": result["report"], "model": result["model"], "answers": f"{out}/*.jsonl"}
    finish(result, as_json, said=said, made=made, then=f"open the report, or ask the model: medr1 app --model {model}")


def shown(path: Path | str) -> str:
    """A path as it may stand in a command."""
    return shlex.quote(str(path))


def print_summary(
    summary: dict[str, Any],
    as_json: bool,
    *,
    cut_at: int | None = None,
    made: Mapping[str, Path | str] | None = None,
    then: str | None = None,
) -> None:
    """An evaluation: accuracies with intervals, what became of the replies, and the end of the command."""
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
    if "prompt_tokens" in summary:
        names = ("prompt_tokens", "completion_tokens")
        counts = (f"{name.replace('_', ' ')}: {'–' if (num := summary[name]) is None else num}" for name in names)
        console.print(", ".join(counts), highlight=False)
    if cell := summary.get("answered"):
        print_answered(cell)
    if found := summary.get("looking"):
        Console().print(_looking_table(found))
    if cell := summary.get("reader"):
        console.print(
            f"with the reader {cell['model']}: {percent(cell['accuracy'])} ({interval(cell)}), {cell['read']} read,"
            f" {cell['settled']} of them settled; not in the accuracy above",
            highlight=False,
        )
    finish(summary, as_json, said=outcome_lines(summary, cut_at), made=made, then=then)


def print_checkpoints(summaries: Sequence[dict[str, Any]], as_json: bool, *, cut_at: int, out: Path) -> None:
    """One line a checkpoint, and the outcomes of the last."""
    table = Table(title="the same questions, asked of each")
    looked = ["the image adds"] if any("looking" in summary for summary in summaries) else []
    for heading in ("", "step", "accuracy", "95 % interval", "no answer", "n", *looked):
        table.add_column(heading, justify="left" if not heading else "right")
    for summary in summaries:
        cell = summary if summary["n"] else summary["open"] or summary
        numbers = [percent(cell["accuracy"]), interval(cell), f"{cell['unparsed']:,}", f"{cell['n']:,}"]
        if looked:
            numbers.append(percent(summary["looking"].get("reliance", {}).get("value")))
        table.add_row(summary["name"], f"{summary['step']:,}", *numbers)
    if not as_json:
        Console().print(table)
    asked = " ".join(f"--trained {shown(out / summary['name'])}.jsonl" for summary in summaries[1:])
    then = f"medr1 report --base {shown(out / 'base.jsonl')} {asked}"
    said = outcome_lines(summaries[-1], cut_at)
    finish({"checkpoints": list(summaries)}, as_json, said=said, made={"rows": f"{out}/*.jsonl"}, then=then)


def outcome_lines(summary: Mapping[str, Any], cut_at: int | None = None) -> list[str]:
    """What became of the replies, in words, with the remedy where many came to nothing.

    Args:
        cut_at: tokens after which replies were cut, where it is known.
    """
    lines = []
    for kind, part in (("", summary), (" to open questions", summary["open"])):
        if not part or not part["n"]:
            continue
        counts = ", ".join(f"{count:,} {OUTCOMES.get(name, name)}" for name, count in part["outcomes"].items())
        lines.append(f"replies{kind}: {counts}")
        lost, cut = part["unparsed"], part["truncated"]
        if lost >= FEW_LEFT * part["n"]:
            where = f" at {cut_at} tokens" if cut_at else ""
            remedy = (
                "raise --max-new-tokens"
                if cut >= lost / 2
                else "ask in the mode that the model was trained in (--mode), and read some of the rows"
            )
            lines.append(f"{lost:,} of {part['n']:,} replies{kind} had no answer ({cut:,} cut{where}): {remedy}")
    known = summary["trained_on"]
    for kind, cell in (("", known), (" open", known["open"])) if known else ():
        if cell["n"]:
            of_them = f"accuracy {percent(cell['accuracy'])}, 95 % interval {interval(cell)}"
            lines.append(f"counted apart: {cell['n']:,}{kind} questions that the model's run trained on, {of_them}")
    return lines


OUTCOMES = {
    "letter": "chose an option",
    "text": "answered in words",
    "unparsed": "said no answer",
    "ambiguous": "named several",
    "truncated": "were cut before an answer",
    "invalid": "chose what is not there",
    "refusal": "refused",
}
"""An extractor's outcome in words."""


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


def _looking_table(found: dict[str, Any]) -> Table:
    from medr1.evaluation.looking import MEASURES

    table = Table("", title="does it look?")
    for heading in ("%", "95 % interval", "n"):
        table.add_column(heading, justify="right")
    for name, (words, _) in MEASURES.items():
        if (cell := found.get(name)) and cell["n"]:
            table.add_row(words, percent(cell["value"]), interval(cell), str(cell["n"]))
    return table


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def numbers_span(ci: list[float] | None) -> str:
    return "–" if ci is None else " to ".join(f"{round(limit, 3) + 0.0:.3f}" for limit in ci)  # + 0.0: no -0.000


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def interval(cell: dict[str, Any]) -> str:
    return "–" if cell["ci95"] is None else f"{percent(cell['ci95'][0])} to {percent(cell['ci95'][1])}"
