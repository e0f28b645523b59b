"""Commands about who samples: engines check."""

from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medr1.cli.options import (
    HOW,
    MODEL_HELP,
    WHAT,
    Command,
    DataOption,
    Group,
    JsonOption,
    ModalityOption,
    Mode,
    SetOption,
    TypeOption,
    asked,
    examples,
    help_when_alone,
    known_model,
    run_asked,
)
from medr1.cli.printing import LISTED, finish
from medr1.config import Config, recipe_of
from medr1.errors import MedR1Error

engines_app = typer.Typer(
    cls=Group,
    help="Engines that sample for training.",
    epilog=examples("medr1 engines check runs/ct --url http://127.0.0.1:8000/v1"),
    invoke_without_command=True,
    callback=help_when_alone,
)


@engines_app.command(
    "check",
    cls=Command,
    epilog=examples(
        "medr1 engines check runs/ct --data DATA --url http://127.0.0.1:8000/v1",
        "medr1 engines check Qwen/Qwen2-VL-2B-Instruct --data DATA --engine vllm-colocate --n 200",
    ),
)
def engines_check(
    *,
    model: Annotated[str, typer.Argument(help=MODEL_HELP, callback=known_model)],
    url: Annotated[
        str | None,
        typer.Option("--url", help="of a vLLM server that has this model, up to and with /v1", rich_help_panel=WHAT),
    ] = None,
    engine: Annotated[
        Literal["vllm", "vllm-colocate"],
        typer.Option("--engine", help="a server, or vLLM in this process", rich_help_panel=WHAT),
    ] = "vllm",
    data: DataOption = "phantoms",
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    count: Annotated[
        int, typer.Option("--n", min=1, help="held-out records, drawn by the split seed", rich_help_panel=WHAT)
    ] = 50,
    served: Annotated[
        str,
        typer.Option(
            "--served",
            help="the server's name of the model, such as an adapter's; default: the one that it was started with",
            rich_help_panel=WHAT,
        ),
    ] = "",
    mode: Annotated[
        Mode | None,
        typer.Option(
            "--mode",
            help="reasoning then answer, answer alone, or answer then reasoning; default: the run's own, or think",
            rich_help_panel=HOW,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="replies are cut here", rich_help_panel=HOW)
    ] = 64,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask transformers and vLLM the same, greedily: where do they part, and why? Exit status 1 if they do."""
    if (url is None) == (engine == "vllm"):
        raise MedR1Error("give --url of a vLLM server, such as http://127.0.0.1:8000/v1, or --engine vllm-colocate")
    from medr1.evaluation.engines import check_engine

    own = recipe_of(model) or Config()
    more = {"rollout.mode": mode or own.rollout.mode}
    config = asked(model, data, modality, question_type, settings, more)
    found = check_engine(
        model,
        config,
        url=url,
        run=run_asked(model, settings),
        limit=count,
        max_new_tokens=max_new_tokens,
        served=served,
    )
    if not as_json:
        _print(found)
    agree = f"{url or 'vLLM'} computes what transformers computes, on {found['n']} records"
    finish(found, as_json, said=[] if found["causes"] else [agree])
    if found["causes"]:
        raise MedR1Error("; ".join(f"{cause}: {seen}" for cause, seen in found["causes"].items()))


def _print(found: dict[str, Any]) -> None:
    table = Table(title="transformers and the engine", title_justify="left")
    for heading in ("", "agree", "of"):
        table.add_column(heading, justify="left" if not heading else "right")
    number = "-" if found["gap"] is None else f"{found['gap']:.1e} nats a token, at most {found['max_gap']:.1e}"
    for words, name, of in (
        ("prompt tokens", "prompts", "n"),
        (f"log-probs ({number})", "logps", "compared"),
        ("greedy replies", "replies", "n"),
        ("outcomes", "outcomes", "n"),
    ):
        table.add_row(words, str(found[name]), str(found[of]))
    Console().print(table)
    if found["partings"]:
        parted = Table(title="where replies part (log-prob here / there)", title_justify="left")
        for heading in ("record", "token", "transformers", "engine"):
            parted.add_column(heading, justify="right" if heading == "token" else "left")
        for parting in found["partings"][:LISTED]:
            parted.add_row(
                Text(parting["id"]), str(parting["position"]), _token(parting["ours"]), _token(parting["theirs"])
            )
        Console().print(parted)


def _token(token: dict[str, Any]) -> Text:
    if token["text"] is None:
        return Text("(ended)")
    sides = ("-" if token[side] is None else f"{token[side]:.3f}" for side in ("here", "there"))
    return Text(f"{token['text']!r} {' / '.join(sides)}")
