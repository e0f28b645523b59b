"""Commands that look into a data set: check, convert, show."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from medr1.cli.options import (
    OUTPUT,
    Command,
    Group,
    ImageRootOption,
    JsonOption,
    LanguageOption,
    PathArgument,
    data_path,
    examples,
    help_when_alone,
)
from medr1.cli.printing import LISTED, finish, shown
from medr1.processes import make_folder

data_app = typer.Typer(
    cls=Group,
    help="Look into a data set before training on it.",
    epilog=examples("medr1 data check DATA --out check", "medr1 data show DATA --out questions.html"),
    invoke_without_command=True,
    callback=help_when_alone,
)
command = partial(data_app.command, cls=Command)


def _given(image_root: Path | None, language: str, *, of_recipe: bool = False) -> str:
    """These two as options of the next command on the data, or as settings of its recipe, where they were given."""
    given = {"image_root": image_root, "language": language if language != "en" else None}
    return "".join(
        f" --set {shown(f'data.{name}={value}')}" if of_recipe else f" --{name.replace('_', '-')} {shown(value)}"
        for name, value in given.items()
        if value
    )


@command("check", epilog=examples("medr1 data check OmniMedVQA --out check", "medr1 data check questions.csv --json"))
def data_check(
    path: PathArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for check.json and check.html", rich_help_panel=OUTPUT)
    ] = None,
    image_root: ImageRootOption = None,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Find copies and look-alikes of images, what train and test share, refused rows, defects of questions."""
    from medr1.report.checks import check_data, print_check, write_check

    if out:
        make_folder(out)  # rather than be told after all the work that it cannot be
    report = check_data(data_path(path), image_root=image_root, language=language)
    if not as_json:
        print_check(report, Console())
    if out:
        write_check(report, out)
    again = f"medr1 data check {shown(path)}{_given(image_root, language)} --out check" if out is None else None
    finish(
        report,
        as_json,
        made={"page": out / "check.html", "numbers": out / "check.json"} if out else None,
        then=again
        or f"medr1 train --data {shown(path)}{_given(image_root, language, of_recipe=True)} --out runs/first",
    )


@command(
    "convert",
    epilog=examples("medr1 data convert hub:flaviagiammarino/vqa-rad --to jsonl --out vqa-rad"),
)
def data_convert(
    path: PathArgument,
    to: Annotated[
        Literal["omnimedvqa", "csv", "jsonl"], typer.Option("--to", help="the layout", rich_help_panel=OUTPUT)
    ],
    out: Annotated[
        Path, typer.Option("--out", help="a new folder for the questions and their images", rich_help_panel=OUTPUT)
    ],
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
            Console().print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
        if (more := len(result["refused"]) - LISTED) > 0:
            typer.echo(f"left out: {more:,} more; --json lists all")
    finish(result, as_json, made={"data": out}, then=f"medr1 data check {shown(out)}")


@command("show", epilog=examples("medr1 data show OmniMedVQA --n 50 --out questions.html"))
def data_show(
    path: PathArgument,
    out: Annotated[Path, typer.Option("--out", help="the HTML file to write", rich_help_panel=OUTPUT)],
    num: Annotated[int, typer.Option("--n", min=1, help="questions to draw")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="of the draw")] = 0,
    image_root: ImageRootOption = None,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Draw questions at random into one self-contained HTML page, the right answer marked."""
    from medr1.data.datasets import load_records, num_refused
    from medr1.report.show import write_samples

    refused: list[str] = []
    records = load_records(
        data_path(path), image_root=image_root, language=language, refused=refused, check_images=False
    )
    result = write_samples(records, out, name=path, num=num, seed=seed, refused=refused)
    drawn = f"{result['shown']:,} of {result['records']:,} questions"
    if lost := result["lost_images"]:
        drawn += f"; {lost:,} of their images cannot be read"
    if refused:
        drawn += f"; {num_refused(refused, result['records'])} are left out"
    check = f"medr1 data check {shown(path)}{_given(image_root, language)}"
    then = f"open the page in a browser; `{check}` looks at all of them"
    finish(result, as_json, said=[drawn], made={"page": out}, then=then)


@command(
    "phantoms",
    epilog=examples(
        "medr1 data phantoms --n 400 --out phantoms",
        "medr1 data phantoms --shortcut 0.95 --shortcut-in texts --out planted",
    ),
)
def data_phantoms(
    out: Annotated[Path, typer.Option("--out", help="a new folder for the questions and their images")],
    num: Annotated[int, typer.Option("--n", min=16, help="images to draw, five questions each")] = 1600,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of every draw")] = 0,
    shortcut: Annotated[
        float | None,
        typer.Option(
            "--shortcut",
            min=0,
            max=1,
            help="plant one: without the image the right option is told in this share of OUT/train, and by chance"
            " alone in OUT/test",
        ),
    ] = None,
    shortcut_in: Annotated[
        Literal["positions", "texts"],
        typer.Option("--shortcut-in", help="the right option stands first, or is the same one nearly always"),
    ] = "texts",
    as_json: JsonOption = False,
) -> None:
    """Draw phantoms into a folder, on request with a shortcut past the image, to see whether training takes it."""
    from medr1.data.phantoms import Shortcut, write_phantoms, write_planted
    from medr1.data.records import new_folder

    if shortcut is None:
        with new_folder(out):
            write_phantoms(out, num_images=num, seed=seed)
        finish(
            {"data": str(out)}, as_json, made={"data": out}, then=f"medr1 data show {shown(out)} --out phantoms.html"
        )
        return
    with new_folder(out):
        write_planted(out, num_images=num, seed=seed, shortcut=Shortcut(shortcut_in, shortcut))
    train, test = out / "train", out / "test"
    then = f"medr1 train --data {shown(train)} --out runs/planted; medr1 eval --data {shown(test)} asks what it learned"
    finish({"train": str(train), "test": str(test)}, as_json, made={"to train on": train, "to ask": test}, then=then)
