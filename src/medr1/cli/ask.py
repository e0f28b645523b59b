"""Commands about one case: ask, app."""

import contextlib
import signal
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medr1 import NOTICE
from medr1.cli.options import (
    HOW,
    OUTPUT,
    WHAT,
    CalibrationOption,
    Command,
    JsonOption,
    ModelOption,
    ModeOption,
    TokensOption,
    examples,
    known_model,
)
from medr1.cli.printing import LISTED, console, finish, percent, shown
from medr1.errors import MedR1Error

if TYPE_CHECKING:
    from medr1.ask.ask import Case

app = typer.Typer()
command = partial(app.command, cls=Command, rich_help_panel="Start here")


@command(
    epilog=examples(
        "medr1 ask scan.png 'Which finding is shown?' --option Nodule --option None --samples 8",
        "medr1 ask 'scan.dcm#window=lung' 'What is seen?' --model runs/ct --out case.html",
    )
)
def ask(
    image: Annotated[
        list[Path], typer.Argument(help="image file(s) or the folder of a DICOM series, then the question")
    ],
    question: Annotated[str, typer.Argument(help="the question")],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="an answer to choose from: two or more, or none to ask openly", rich_help_panel=WHAT
        ),
    ] = None,
    model: ModelOption = "tiny",
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="another model to ask the same, such as the base; may be repeated",
            callback=known_model,
            rich_help_panel=WHAT,
        ),
    ] = None,
    mode: ModeOption = "think",
    modality: Annotated[
        str | None, typer.Option("--modality", help="of the image, to warn where it is new", rich_help_panel=WHAT)
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="replies drawn to see how many agree", rich_help_panel=HOW)
    ] = 0,
    heatmap: Annotated[
        Path | None,
        typer.Option("--heatmap", help="a .png file: what in the image speaks for the answer", rich_help_panel=OUTPUT),
    ] = None,
    calibration: CalibrationOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="an .html file: the case as a page, without names", rich_help_panel=OUTPUT),
    ] = None,
    max_new_tokens: TokensOption = 256,
    as_json: JsonOption = False,
) -> None:
    """Ask one question about an image: reasoning, answer, its probability, and what speaks against trusting it."""
    from medr1.ask.ask import ask as run
    from medr1.ask.ask import load_respondent, question_about
    from medr1.ask.case import png_file, write_case, write_heatmaps
    from medr1.data.images import expand_reference
    from medr1.report.pages import html_file

    if out:
        html_file(out)
    if heatmap:
        png_file(heatmap)
    images = [one for each in image for one in expand_reference(each)]
    record = question_about(images, question, option or [], modality)
    settings: dict[str, Any] = {"mode": mode, "num_samples": samples, "max_new_tokens": max_new_tokens}
    models = [load_respondent(model, calibration), *map(load_respondent, compare or [])]
    cases = [run(each, record, heatmap=bool(heatmap), **settings) for each in models]
    made: dict[str, str] = {}
    failed: MedR1Error | None = None  # what was answered is said first
    try:
        if out:
            write_case(cases, out)
            made["page"] = str(out)
        if heatmap:
            made["heatmap"] = ", ".join(map(str, write_heatmaps(cases, heatmap)))
    except MedR1Error as error:
        failed = error
    if not as_json:
        for case in cases:
            _print_case(case)
    first, *others = (case.as_dict() for case in cases)
    then = None if out else f"the same with --out case.html for a page, or medr1 app --model {shown(model)}"
    first |= {"left_out": cases[0].left_out} | ({"compared": others} if others else {})
    finish(first, as_json, made=made, then=then)
    if failed:
        raise failed


def _print_case(case: "Case") -> None:
    from medr1.ask.case import votes_apart

    said = Console(highlight=False, markup=False, soft_wrap=True)
    said.print(f"{case.model}\n{case.reply}\n")
    for number, caption in enumerate(case.captions, start=1):
        said.print(f"image {number}: {caption}", style="dim")
    if case.voided:
        said.print("THIS ANSWER MEANS NOTHING FOR A PATIENT:", style="bold yellow")
    for warning in case.warnings or ():
        said.print(f"! {warning}", style="bold yellow" if warning in case.voided else "yellow")
    for name in case.left_out[:LISTED]:
        said.print(f"left out: {name} cannot be read", style="yellow")
    if (more := len(case.left_out) - LISTED) > 0:
        said.print(f"left out: {more:,} more; --json lists all", style="yellow")
    answer = f"{case.letter}) {case.answer}" if case.letter else case.answer
    style = "dim" if case.voided else "bold"
    said.print(f"answer: {answer}" if answer else f"no answer: {case.outcome}", style=style)
    if case.abstained and case.calibration:
        said.print(f"but it abstains: less sure than {percent(case.calibration.threshold)} %", style="bold yellow")
    table = Table()
    for heading in ("option", "probability", *([f"votes of {case.num_samples}"] if case.votes else [])):
        table.add_column(heading, justify="left" if heading == "option" else "right")
    for letter, text, probability in zip(
        case.record.letters, case.record.options, case.probabilities or (), strict=True
    ):
        votes = [str(case.votes.get(letter, 0))] if case.votes else []
        table.add_row(Text(f"{letter}) {text}"), f"{percent(probability)} %", *votes)
    if case.record.options:
        said.print(table)
    if case.votes:
        said.print(votes_apart(case), style="dim")


@command("app", epilog=examples("medr1 app", "medr1 app --model runs/demo/train --compare tiny"))
def app_command(
    model: ModelOption = "tiny",
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="another model, shown beside it; may be repeated",
            callback=known_model,
            rich_help_panel=WHAT,
        ),
    ] = None,
    calibration: CalibrationOption = None,
    host: Annotated[
        str,
        typer.Option("--host", help="address to listen on; 0.0.0.0 lets other machines in", rich_help_panel="Server"),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=1, max=65535, help="default: the first free one from 7860", rich_help_panel="Server"
        ),
    ] = None,
    max_new_tokens: TokensOption = 256,
    max_upload_mb: Annotated[
        int, typer.Option("--max-upload-mb", min=1, help="largest upload, in MB", rich_help_panel="Server")
    ] = 64,
    requests_per_minute: Annotated[
        int,
        typer.Option("--requests-per-minute", min=1, help="limit for each client address", rich_help_panel="Server"),
    ] = 60,
) -> None:
    """Open a page in the browser to ask about images; on this machine only, nothing is stored."""
    from medr1.ask.app import LOOPBACK, running

    if host not in LOOPBACK:
        console.print(
            f"{host}: other machines can reach this app. It has no login and no encryption: put nothing in"
            " that names a patient, and stop it when you are done.",
            style="bold yellow",
            soft_wrap=True,
        )
    with running(
        [model, *(compare or [])],
        calibration=calibration,
        host=host,
        port=port,
        max_new_tokens=max_new_tokens,
        max_upload_mb=max_upload_mb,
        requests_per_minute=requests_per_minute,
    ) as url:
        typer.echo(f"{url}  (Ctrl-C ends it)")
        console.print(NOTICE, style="dim")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: uploads are removed
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
