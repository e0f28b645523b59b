"""Options that several commands share, how they become a recipe, and what all commands do alike."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup, TyperOption

from medr1.cli.presets import Kind, preset
from medr1.config import Config, load_config, parse_override
from medr1.errors import MedR1Error

if TYPE_CHECKING:
    from medr1.data.heldout import RunSplit
    from medr1.data.records import Record

Mode = Literal["think", "no-think", "think-after"]
Method = Literal["grpo", "sft"]
Condition = Literal["image", "repeat", "blank", "shuffled", "shuffled_other", "no_image", "permuted"]

WHAT = "What is asked"
HOW = "How it is asked"
RECIPE_PANEL = "Recipe"
OUTPUT = "Output"

MODEL_HELP = "'tiny', a folder, a run's folder, or OWNER/NAME of the hub (OWNER/NAME/FOLDER@REVISION)"


def known_model(name: Any) -> Any:
    """An option's model, or models, once their names can be right: told before anything slow is imported."""
    from medr1.policy.names import check_name

    for one in name if isinstance(name, list) else [name]:
        if one and not one.startswith("openai:"):
            check_name(one)
    return name


ModelOption = Annotated[str, typer.Option("--model", help=MODEL_HELP, callback=known_model, rich_help_panel=WHAT)]
DATA_HELP = "a data set's folder or table, hub:OWNER/NAME, or 'phantoms'"
DataOption = Annotated[str, typer.Option("--data", help=DATA_HELP, rich_help_panel=WHAT)]
ModeOption = Annotated[
    Mode,
    typer.Option("--mode", help="reasoning then answer, answer alone, or answer then reasoning", rich_help_panel=HOW),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="print one JSON object as the last line of stdout", rich_help_panel=OUTPUT)
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="a TOML recipe; `medr1 config` prints one", rich_help_panel=RECIPE_PANEL)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE for any field of the recipe; may be repeated", rich_help_panel=RECIPE_PANEL),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="a file of `medr1 calibrate`: abstain below its threshold", rich_help_panel=HOW),
]
ModalityOption = Annotated[
    list[str] | None, typer.Option("--modality", help="keep this modality; may be repeated", rich_help_panel=WHAT)
]
SkipOption = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable",
        help="leave out, count and list records whose images cannot be read",
        rich_help_panel=WHAT,
    ),
]
TypeOption = Annotated[
    list[str] | None,
    typer.Option("--question-type", help="keep this question type; may be repeated", rich_help_panel=WHAT),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="replies are cut here", rich_help_panel=HOW)]
PathArgument = Annotated[str, typer.Argument(help=DATA_HELP)]
ImageRootOption = Annotated[
    Path | None, typer.Option("--image-root", help="folder that image paths start from, where it is not the data's own")
]
LanguageOption = Annotated[str, typer.Option("--language", help="of rows that say theirs (SLAKE); 'all' keeps each")]


TWICE = {
    "--data": ": lay tables of questions into one folder, which is read as one data set",
    "--model": ": --compare, where there is one, names another",
}
"""What to do in place of giving an option twice."""


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the parser would drop the first without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = Counter(self.make_parser(ctx).parse_args(args=list(args))[2])
        for parameter, count in given.items():
            if count > 1 and isinstance(parameter, TyperOption) and not (parameter.multiple or parameter.is_flag):
                name = parameter.opts[0]
                ctx.fail(f"{name} is given {count} times, and takes one value{TWICE.get(name, '')}")
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """Commands in the order of the job."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def help_when_alone(context: typer.Context) -> None:
    """A group of commands named alone prints its help and is no mistake."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit


def examples(*lines: str) -> str:
    """The end of a command's help: how it is used."""
    return "\n".join(["[bold]For example[/bold]", *(f"  {escape(line)}" for line in lines)])


def model_or_run(model: str, run: str | None) -> str:
    """The model that is asked: a run named first, or that of --model.

    Raises:
        MedR1Error: both are given, or the run is none.
    """
    if run is None:
        return model
    if model != "tiny":
        raise MedR1Error(f"{run} and --model {model} are two models; give one")
    return str(known_model(run))


def recipe_file(path: Path | None, name: str | None, kind: Kind = "recipe") -> Path | None:
    """The TOML file that a command is given: by its path, or as a preset by name.

    Raises:
        MedR1Error: both are given, or no preset has this name.
    """
    if path and name:
        raise MedR1Error(f"{path} and --preset {name} are two recipes; give one, and --set what differs")
    return preset(name, kind) if name else path


def resolve(path: Path | None, options: dict[str, Any], settings: list[str] | None) -> Config:
    overrides = {key: value for key, value in options.items() if value is not None}
    return load_config(path, overrides | dict(map(parse_override, settings or [])))


def asked(
    model: str,
    data: str,
    modality: list[str] | None,
    question_type: list[str] | None,
    settings: list[str] | None,
    more: dict[str, Any] | None = None,
) -> Config:
    """The recipe of a command that asks a model: held out is what the model's own run held out."""
    from medr1.data.parts import split_of_run

    said = {key: value for key, value in (more or {}).items() if value is not None}
    filters = {"data.path": data, "data.modalities": modality, "data.question_types": question_type}
    return resolve(None, filters | split_of_run(model, data) | said, settings)


def run_asked(model: str, settings: list[str] | None) -> "RunSplit | None":
    """The run by whose list a model is asked: its own, unless the user sets another division. Rows say all the same
    which questions it trained on.
    """
    from medr1.data.heldout import split_of
    from medr1.data.parts import tell_older

    run = split_of(model)
    if run is None:
        tell_older(model)
    divided = {"data.test_fraction", "data.split_seed"} & {parse_override(text)[0] for text in settings or []}
    return None if divided else run


def not_trained_on(model: str, records: "Sequence[Record]") -> "Sequence[Record]":
    """The records that the model's run did not train on; the others are left out, and counted on stderr."""
    from medr1.data.heldout import split_of, tell_seen

    run = split_of(model)
    seen = run.seen(records) if run else []
    tell_seen(run, seen, "left out")
    return [record for record, one in zip(records, seen, strict=True) if one != "trained on"] if run else records


def data_path(path: str) -> str:
    from medr1.data.parts import phantom_folder

    return str(phantom_folder(400)) if path == "phantoms" else path
