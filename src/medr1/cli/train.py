"""Commands that change or make a model: demo, train, study, plan, export, config, build."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from medr1.cli.options import (
    DATA_HELP,
    ConfigOption,
    DataOption,
    JsonOption,
    ModalityOption,
    SetOption,
    SkipOption,
    TypeOption,
    resolve,
)
from medr1.cli.printing import console, finish
from medr1.config import load_config, parse_override, to_toml
from medr1.processes import is_first, leave

app = typer.Typer()
build_app = typer.Typer(help="Make a base model from parts.", no_args_is_help=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for everything the demo makes")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="seed of the data order and of sampling")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train the tiny model with GRPO on phantoms, evaluate before and after, write a report. Minutes on a CPU."""
    from medr1.study.demo import run_demo

    summary = run_demo(out, seed=seed)
    finish(summary, as_json)


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="folder of the run; an unfinished run there is resumed")],
    config: ConfigOption = None,
    method: Annotated[str | None, typer.Option("--method", help="grpo or sft")] = None,
    model: Annotated[str | None, typer.Option("--model", help="hub name, local folder, or 'tiny'")] = None,
    data: Annotated[str | None, typer.Option("--data", help=DATA_HELP)] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="think, no-think or think-after")] = None,
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    steps: Annotated[int | None, typer.Option("--steps", help="optimizer steps")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="seed of the data order and of sampling")] = None,
    skip_unreadable: SkipOption = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model with GRPO or SFT; stop it with Ctrl-C and run the same command to go on."""
    from medr1.training.run import train as run

    overrides = {
        "method": method,
        "model.name": model,
        "data.path": data,
        "rollout.mode": mode or ("no-think" if method == "sft" and config is None else None),
        "data.modalities": modality,
        "data.question_types": question_type,
        "data.skip_unreadable": skip_unreadable or None,
        "optimizer.steps": steps,
        "optimizer.seed": seed,
    }
    resolved = resolve(config, overrides, settings)
    result = run(resolved, out)
    leave()
    if is_first():
        finish(result, as_json)


@app.command("study")
def study_command(
    study: Annotated[Path, typer.Argument(help="a study in TOML, such as configs/study-tiny.toml")],
    out: Annotated[Path, typer.Option("--out", help="folder of the study; an unfinished one there is gone on with")],
    data: Annotated[str | None, typer.Option("--data", help="data set in place of recipe.data.path")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="show each cell's state, seconds and disk use")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train on each modality and question type, test on all with controls, write the report; resumes by itself."""
    from medr1.study.run import list_cells, load_study, run_study

    loaded = load_study(study, data)
    if not only_list:
        finish(run_study(loaded, out), as_json)
        return
    cells = list_cells(loaded, out)
    table = Table(title=f"{sum(cell['state'] == 'done' for cell in cells)} of {len(cells)} cells done")
    for heading in ("cell", "state", "seconds", "MB"):
        table.add_column(heading, justify="left" if heading in ("cell", "state") else "right")
    for cell in cells:
        seconds = "–" if cell["seconds"] is None else f"{cell['seconds']:.0f}"
        table.add_row(cell["cell"], cell["state"], seconds, f"{cell['disk_bytes'] / 1e6:.1f}")
    Console().print(table)
    finish({"cells": cells}, as_json)


@app.command("plan")
def plan_command(
    config: ConfigOption = None,
    overrides: SetOption = None,
    model: Annotated[str | None, typer.Option("--model", help="in place of the recipe's: hub name or folder")] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="rtx4090, l40s, a100 or h100")] = "a100",
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="how many in a node, each with a copy of the model")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="how many machines")] = 1,
    sharded: Annotated[bool, typer.Option("--sharded", help="one copy divided over all GPUs (FSDP2, ZeRO-3)")] = False,
    image_side: Annotated[int, typer.Option("--image-side", min=28, help="side of a square image in pixels")] = 392,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, seconds a step and hours an epoch from counted bytes and FLOPs; nothing is run."""
    from medr1.training.plan import count, remedy

    values = dict(parse_override(text) for text in overrides or [])
    recipe = load_config(config, values | ({"model.name": model} if model else {}))
    sizes = count(recipe.model.name)
    added, needs = remedy(sizes, recipe, image_side=image_side, gpu=gpu, gpus=gpus, nodes=nodes, sharded=sharded)
    machine = f"{nodes} x {gpus} x {gpu}" if nodes > 1 else f"{gpus} x {gpu}"
    table = Table(title=f"{recipe.model.name}, {sizes.weights / 1e9:.2f} billion weights, {machine}: an estimate")
    for heading in ("part", "GB", "seconds a step"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, value in needs["memory_gb"].items():
        table.add_row(name, f"{value:.2f}", "")
    table.add_section()
    for name, value in needs["seconds"].items():
        table.add_row(name, "", f"{value:.2f}")
    table.add_section()
    table.add_row(f"all, of {needs['usable_gb']:.0f} GB", f"{needs['needed_gb']:.1f}", f"{needs['step_seconds']:.2f}")
    Console().print(table)
    verdict = "fits" if needs["fits"] else "does not fit"
    how = f" with {' '.join(f'--set {setting}' for setting in added)}" if added else ""
    hours = f"{needs['hours_per_epoch']:g} hours for an epoch of OmniMedVQA" if needs["fits"] else "try --sharded"
    Console().print(f"It {verdict}{how}; {hours}.", highlight=False, soft_wrap=True)
    finish({"settings_added": added, **needs}, as_json)


@app.command("export")
def export_command(
    model: Annotated[str, typer.Argument(help="a run's folder, a model or adapter folder, or a hub name")],
    out: Annotated[Path, typer.Option("--out", help="a new folder; one of an earlier export is replaced")],
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16")] = "float32",
    answers: Annotated[
        list[Path] | None, typer.Option("--answers", help="a file of `medr1 eval` for the model card; may be repeated")
    ] = None,
    push: Annotated[str | None, typer.Option("--push-to-hub", help="OWNER/NAME to upload the folder to")] = None,
    public: Annotated[bool, typer.Option("--public", help="make that repository public; private otherwise")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter, write a plain Hugging Face folder with its model card, upload it if asked."""
    from medr1.bases.export import export_model, push_to_hub

    with console.status("exporting"):
        result = export_model(model, out, dtype=dtype, answers=answers or [], name=push)
    console.print(f"{out}: {result['bytes'] / 1e9:.2f} GB, {dtype}", highlight=False, soft_wrap=True)
    if push:
        with console.status(f"uploading to {push}"):
            result["commit"] = push_to_hub(out, push, public=public)
        console.print(result["commit"], highlight=False, soft_wrap=True)
    finish(result, as_json)


@app.command("config")
def config_command(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Print a whole recipe as TOML, every field with its meaning."""
    typer.echo(to_toml(resolve(config, {}, settings)), nl=False)


@build_app.command("small")
def build_small(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="folder for the state, the learning curve and the model")],
    seed: Annotated[int, typer.Option("--seed", help="of weights, batches and crops")] = 0,
    as_json: JsonOption = False,
) -> None:
    """SmolLM2-135M given eyes, from the training part of a data set: half an hour on two cores; it resumes."""
    from medr1.bases.small.build import build

    folder = build(load_config(overrides={"data.path": data}).data, out, seed=seed)
    if not as_json:
        typer.echo(f"{folder}: a model folder; medr1 train --model {folder} …")
    finish({"model": str(folder)}, as_json)
