"""The command line: parsing and printing only; each command calls one function of the package."""

import difflib
import os
import re
import sys
import warnings
from contextlib import suppress
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer
from rich.console import Console

from medr1 import NOTICE
from medr1.cli import ask, data, engines, evaluate, train
from medr1.cli.options import Group, examples, help_when_alone
from medr1.errors import MedR1Error
from medr1.processes import Interrupts, is_first, num_launched, say_stopped

app = typer.Typer(
    cls=Group,
    help=f"Med-R1: reinforcement learning for medical vision-language models, honestly evaluated. {NOTICE}",
    epilog=examples(
        "medr1 demo",
        "medr1 data check DATA --out check",
        "medr1 run --preset omnimedvqa-qwen2vl-2b --data DATA --out runs/first",
        "medr1 ask scan.png 'Which finding is shown?' --option Nodule --option None",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
for commands in (train, evaluate, ask):
    app.add_typer(commands.app)
app.add_typer(data.data_app, name="data", rich_help_panel="Data")
app.add_typer(engines.engines_app, name="engines", rich_help_panel="Measure")
app.add_typer(train.build_app, name="build", rich_help_panel="Models")


def _say_version(asked: bool) -> None:
    if asked:
        python = ".".join(map(str, sys.version_info[:3]))
        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        typer.echo(f"medr1 {version('medr1')} (Python {python}, {others})")
        raise typer.Exit


@app.callback()
def medr1(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print versions and leave")
    ] = False,
) -> None:
    help_when_alone(context)
    named, processes = context.invoked_subcommand, num_launched()
    if named != "train" and processes > 1:
        if not is_first():  # said once
            raise typer.Exit(1)
        raise MedR1Error(
            f"medr1 {named} is for one process, and a launcher started {processes}; only `medr1 train` shares its work"
            " among them. Start the others by themselves, `medr1 study` once a GPU"
        )


def main() -> None:
    """Run a command; a `MedR1Error` becomes one line and exit status 1, wrong usage 2, Ctrl-C status 130."""
    # The package reads local files and named hub models; nothing of transformers' chatter is for the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):  # of a terminal that is not UTF-8; None where there is none
        if isinstance(stream, TextIOWrapper):
            with suppress(OSError):  # "Illegal seek" of some that were a pipe's
                stream.reconfigure(errors="replace")
    try:
        status = app(standalone_mode=False, prog_name="medr1") or 0
    except MedR1Error as error:
        _complain(str(error))
        status = 1
    except typer.TyperException as error:
        _complain(_usage(error))
        status = error.exit_code
    except Exception:
        if not Interrupts.pressed:
            raise
        status = 130  # what Ctrl-C became on its way through a library
    if status == 130:
        say_stopped()
    sys.exit(status)


def _complain(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"medr1: {line}", style="bold red", markup=False, highlight=False)


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the words of a command, in one line, with the nearest word that can be meant."""
    line = " ".join(error.format_message().split()).rstrip(".")
    line = re.sub(r"^Invalid value for '(.*?)': (Value error, )?", r"\1: ", line)
    said, choices = "", list[str]()
    if " is not one of " in line:
        said, *choices = re.findall(r"'([^']*)'", line)
    elif found := re.fullmatch(r"No such option: (\S+) \(Possible options: (.*)\)", line):
        said, choices, line = found[1], found[2].split(", "), f"no such option {found[1]}"
    if near := difflib.get_close_matches(said, choices, n=1, cutoff=0.6):
        line += f"; did you mean {near[0]}?"
    context = getattr(error, "ctx", None)
    return f"{line[:1].lower()}{line[1:]}; see `{context.command_path if context else 'medr1'} --help`"
