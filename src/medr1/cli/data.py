"""Commands that look into a data set: check, convert, show."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from medr1.cli.options import ImageRootOption, JsonOption, LanguageOption, PathArgument, data_path
from medr1.cli.printing import LISTED, finish

data_app = typer.Typer(help="Look into a data set before training on it.", no_args_is_help=True)


@data_app.command("check")
def data_check(
    path: PathArgument,
    out: Annotated[Path | None, typer.Option("--out", help="folder for check.json and check.html")] = None,
    image_root: ImageRootOption = None,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Find copies and look-alikes of images, what train and test share, refused rows, defects of questions."""
    from medr1.report.checks import check_data, print_check, write_check

    report = check_data(data_path(path), image_root=image_root, language=language)
    if not as_json:
        print_check(report, Console())
    if out:
        write_check(report, out)
    finish(report, as_json)


@data_app.command("convert")
def data_convert(
    path: PathArgument,
    to: Annotated[str, typer.Option("--to", help="omnimedvqa, csv or jsonl")],
    out: Annotated[Path, typer.Option("--out", help="a new folder for the questions and their images")],
    image_root: ImageRootOption = None,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Write a data set anew, in OmniMedVQA's layout or as a table, with its images."""
    from medr1.data.datasets import load_records
    from medr1.data.datasets.convert import convert

    refused: list[str] = []
    records = load_records(data_path(path), image_root=image_root, language=language, refused=refused)
    result = convert(records, to, out)
    result["refused"] = [*refused, *result["refused"]]
    if not as_json:
        typer.echo(f"{out}: {result['records']:,} questions, {result['images']:,} images")
        for line in result["refused"][:LISTED]:
            typer.echo(f"left out: {line}")
        if (more := len(result["refused"]) - LISTED) > 0:
            typer.echo(f"left out: {more:,} more; --json lists all")
    finish(result, as_json)


@data_app.command("show")
def data_show(
    path: PathArgument,
    out: Annotated[Path, typer.Option("--out", help="the HTML file to write")],
    num: Annotated[int, typer.Option("--n", min=1, help="questions to draw")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="of the draw")] = 0,
    image_root: ImageRootOption = None,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Draw questions at random into one self-contained HTML page, the right answer marked."""
    from medr1.data.datasets import load_records
    from medr1.report.show import write_samples

    refused: list[str] = []
    records = load_records(
        data_path(path), image_root=image_root, language=language, refused=refused, check_images=False
    )
    finish(write_samples(records, out, name=path, num=num, seed=seed, refused=refused), as_json)
