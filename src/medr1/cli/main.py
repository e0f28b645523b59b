"""The command line: parsing and printing only; each command calls one function of the package."""

import os
import sys
import warnings

import typer
from rich.console import Console

from medr1 import NOTICE
from medr1.cli import ask, data, evaluate, train
from medr1.errors import MedR1Error
from medr1.processes import is_first

app = typer.Typer(
    help=f"Med-R1: reinforcement learning for medical vision-language models, honestly evaluated. {NOTICE}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for commands in (train, evaluate, ask):
    app.add_typer(commands.app)
app.add_typer(data.data_app, name="data")
app.add_typer(train.build_app, name="build")


def main() -> None:
    """Run a command; a `MedR1Error` becomes one line and exit status 1, Ctrl-C status 130."""
    # The package reads local files and named hub models; nothing of transformers' chatter is for the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=True)
    except MedR1Error as error:
        Console(stderr=True, soft_wrap=True).print(f"medr1: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130 and is_first():  # what typer makes of Ctrl-C
            Console(stderr=True).print("medr1: stopped; the same command goes on from what is saved", markup=False)
        raise
