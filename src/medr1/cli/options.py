"""Options that several commands share, and how they become a recipe."""

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from medr1.config import Config, load_config, parse_override
from medr1.data.records import Record

ModelOption = Annotated[str, typer.Option("--model", help="hub name, local folder, or 'tiny'")]
DATA_HELP = "a data set's folder or table, hub:OWNER/NAME, or 'phantoms'"
DataOption = Annotated[str, typer.Option("--data", help=DATA_HELP)]
ModeOption = Annotated[str, typer.Option("--mode", help="think, no-think or think-after")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="a TOML recipe; `medr1 config` prints one")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE for any field of the recipe; may be repeated")
]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="a file of `medr1 calibrate`: abstain below its threshold")
]
ModalityOption = Annotated[list[str] | None, typer.Option("--modality", help="keep this modality; may be repeated")]
SkipOption = Annotated[
    bool, typer.Option("--skip-unreadable", help="leave out, count and list records whose images cannot be read")
]
TypeOption = Annotated[
    list[str] | None, typer.Option("--question-type", help="keep this question type; may be repeated")
]
PathArgument = Annotated[str, typer.Argument(help=DATA_HELP)]
ImageRootOption = Annotated[
    Path | None, typer.Option("--image-root", help="folder that image paths start from, where it is not the data's own")
]
LanguageOption = Annotated[str, typer.Option("--language", help="of rows that say theirs (SLAKE); 'all' keeps each")]


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

    filters = {"data.path": data, "data.modalities": modality, "data.question_types": question_type}
    return resolve(None, filters | split_of_run(model, data) | (more or {}), settings)


def limited(records: list[Record], limit: int, config: Config) -> list[Record]:
    """So many records (0: all), drawn by the split seed."""
    return random.Random(config.data.split_seed).sample(records, limit) if 0 < limit < len(records) else records


def data_path(path: str) -> str:
    from medr1.data.parts import phantom_folder

    return str(phantom_folder(400)) if path == "phantoms" else path
