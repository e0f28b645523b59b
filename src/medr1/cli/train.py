"""Commands that change or make a model: demo, run, train, study, config, plan, export, build."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from medr1.cli.options import (
    DATA_HELP,
    MODEL_HELP,
    OUTPUT,
    RECIPE_PANEL,
    WHAT,
    Command,
    ConfigOption,
    Group,
    JsonOption,
    Method,
    ModalityOption,
    Mode,
    SetOption,
    SkipOption,
    TypeOption,
    examples,
    help_when_alone,
    known_model,
    recipe_file,
    resolve,
)
from medr1.cli.presets import presets
from medr1.cli.printing import console, finish, finish_run, megabytes, shown
from medr1.config import load_config, parse_override, to_toml
from medr1.errors import MedR1Error
from medr1.processes import is_first, leave

app = typer.Typer()
start = partial(app.command, cls=Command, rich_help_panel="Start here")
command = partial(app.command, cls=Command, rich_help_panel="Train")
model_command = partial(app.command, cls=Command, rich_help_panel="Models")
build_app = typer.Typer(
    cls=Group, help="Make a base model from parts.", invoke_without_command=True, callback=help_when_alone
)

PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="a recipe that comes with the package, by name", rich_help_panel=RECIPE_PANEL),
]
RecipeModelOption = Annotated[
    str | None, typer.Option("--model", help=MODEL_HELP, callback=known_model, rich_help_panel=WHAT)
]
RecipeDataOption = Annotated[str | None, typer.Option("--data", help=DATA_HELP, rich_help_panel=WHAT)]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", help="optimizer steps; more than a run has had extend it", rich_help_panel=RECIPE_PANEL),
]
ExtendOption = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="extend a run also where its schedule has come down to its old end",
        rich_help_panel=RECIPE_PANEL,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="seed of the data order and of sampling", rich_help_panel=RECIPE_PANEL)
]


@start(epilog=examples("medr1 demo", "medr1 demo --seed 1 --out runs/demo-1"))
def demo(
    out: Annotated[
        Path, typer.Option("--out", help="folder for everything the demo makes", rich_help_panel=OUTPUT)
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="seed of the data order and of sampling")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train the tiny model with GRPO on phantoms, evaluate before and after, write a report. Minutes on a CPU."""
    from medr1.study.demo import demo_config, run_demo
    from medr1.study.pipeline import completed

    complete = completed(demo_config(seed), out) is not None
    finish_run(run_demo(out, seed=seed), out, as_json, complete=complete)


@command(
    epilog=examples(
        "medr1 run recipe.toml --data DATA --out runs/first",
        "medr1 run --preset omnimedvqa-qwen2vl-2b --data DATA --modality CT --out runs/ct",
    )
)
def run(
    *,
    recipe: Annotated[Path | None, typer.Argument(help="a TOML recipe; `medr1 config` prints one")] = None,
    preset: PresetOption = None,
    model: RecipeModelOption = None,
    data: RecipeDataOption = None,
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    steps: StepsOption = None,
    extend: ExtendOption = False,
    seed: SeedOption = None,
    settings: SetOption = None,
    limit: Annotated[
        int,
        typer.Option("--limit", min=0, help="ask so many held-out records, drawn by the split seed; 0: all"),
    ] = 0,
    out: Annotated[
        Path,
        typer.Option("--out", help="folder for all of it; an unfinished one is gone on with", rich_help_panel=OUTPUT),
    ],
    as_json: JsonOption = False,
) -> None:
    """Ask the base, train, ask again with controls, and write the report, in one go; it resumes by itself."""
    from medr1.study.pipeline import completed, run_recipe

    overrides = {
        "model.name": model,
        "data.path": data,
        "data.modalities": modality,
        "data.question_types": question_type,
        "optimizer.steps": steps,
        "optimizer.seed": seed,
    }
    resolved = resolve(recipe_file(recipe, preset), overrides, settings)
    known_model(resolved.model.name)
    complete = completed(resolved, out, limit=limit, extend=extend) is not None
    finish_run(run_recipe(resolved, out, limit=limit, extend=extend), out, as_json, complete=complete)


@command(
    epilog=examples(
        "medr1 train --model tiny --data phantoms --mode no-think --steps 100 --out runs/first",
        "medr1 train --config recipe.toml --data DATA --modality CT --out runs/ct",
        "medr1 train --method sft --data DATA --set optimizer.learning_rate=1e-5 --out runs/sft",
        "medr1 train --config recipe.toml --data DATA --dry-run",
    )
)
def train(
    *,
    config: ConfigOption = None,
    preset: PresetOption = None,
    method: Annotated[
        Method | None, typer.Option("--method", help="reinforcement, or supervised", rich_help_panel=RECIPE_PANEL)
    ] = None,
    model: RecipeModelOption = None,
    data: RecipeDataOption = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            "--mode", help="reasoning then answer, answer alone, or answer then reasoning", rich_help_panel=RECIPE_PANEL
        ),
    ] = None,
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    steps: StepsOption = None,
    extend: ExtendOption = False,
    seed: SeedOption = None,
    skip_unreadable: SkipOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only see whether the longest step fits into memory", rich_help_panel=OUTPUT),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder of the run; an unfinished run there is resumed", rich_help_panel=OUTPUT),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model with GRPO or SFT; stop it with Ctrl-C and run the same command to go on."""
    from medr1.training.folder import check_recipe, finished, place_trackers

    overrides = {
        "method": method,
        "model.name": model,
        "data.path": data,
        "rollout.mode": mode or ("no-think" if method == "sft" and not (config or preset) else None),
        "data.modalities": modality,
        "data.question_types": question_type,
        "data.skip_unreadable": skip_unreadable or None,
        "optimizer.steps": steps,
        "optimizer.seed": seed,
    }
    resolved = resolve(recipe_file(config, preset), overrides, settings)
    known_model(resolved.model.name)
    if dry_run:
        from medr1.training.run import dry_run as step

        measured = step(resolved)
        leave()
        if is_first():
            told = f"fits: {measured['peak_gb']:.2f} of {measured['memory_gb']:.1f} GB at its peak; nothing was trained"
            finish(measured, as_json, said=[told])
        return
    if out is None:
        raise MedR1Error("--out is missing: name the folder of the run")
    check_recipe(resolved, out, extend=extend)
    trackers = place_trackers(resolved.log.trackers, out)
    if result := finished(resolved, out):
        told = f"complete: {result['model']} had its {result['steps']:,} steps; a larger --steps extends it"
    else:
        from medr1.training.run import train as run  # torch, which a complete run does not need

        result = run(resolved, out, extend=extend)
        leave()
        told = f"trained {result['steps']:,} steps on {result['train_records']:,} questions"
    if is_first():
        rollout = resolved.rollout
        then = (
            f"medr1 eval --model {shown(out)} --data {shown(resolved.data.path)} --mode {rollout.mode}"
            f" --max-new-tokens {rollout.max_new_tokens} --out answers.jsonl"
        )
        finish(result, as_json, said=[told], made=_made_by_run(out, trackers), then=then)


def _made_by_run(out: Path, trackers: dict[str, str]) -> dict[str, str]:
    """What lies in a run's folder, and what it takes."""
    from medr1.policy.names import checkpoints
    from medr1.training.folder import disk_bytes, only_for_going_on

    made = {"model": f"{out / 'model'} ({megabytes(disk_bytes(out / 'model'))})", "log": str(out / "log.jsonl")}
    if kept := checkpoints(out):
        size, spare = sum(map(disk_bytes, kept)), only_for_going_on(out)
        made["checkpoints"] = (
            f"{out}/checkpoint-* ({len(kept)}, {megabytes(size)}, of which {megabytes(spare)} serve only to extend the"
            " run: log.keep_checkpoints says how many stay, and they may be deleted)"
        )
    return made | trackers


@command(
    "study",
    epilog=examples(
        "medr1 study --preset tiny --out runs/study",
        "medr1 study my-study.toml --data DATA --out runs/study --list",
        "medr1 study my-study.toml --data DATA --out runs/study --keep results/study",
    ),
)
def study_command(
    *,
    study: Annotated[Path | None, typer.Argument(help="a study in TOML, such as configs/study-tiny.toml")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="a study that comes with the package, by name")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="data set in place of recipe.data.path", rich_help_panel=WHAT)
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="show each cell's state, seconds and disk use")] = False,
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="folder of the study; an unfinished one there is gone on with", rich_help_panel=OUTPUT
        ),
    ],
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            help="folder where each finished cell is kept, small and without weights; those there are not run again",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train on each modality and question type, test on all with controls, write the report; resumes by itself."""
    path = recipe_file(study, preset, "study")
    if path is None:
        raise MedR1Error(f"no study is named; give a TOML file, or --preset with one of {', '.join(presets('study'))}")
    from medr1.study.run import list_cells, load_study, run_study

    loaded = load_study(path, data)
    if not only_list:
        result = run_study(loaded, out, keep)
        if elsewhere := result.get("elsewhere"):
            told = f"nothing is left to take; with other processes: {', '.join(elsewhere)}. The last to end writes the"
            finish(result, as_json, said=[f"{told} report"])
            return
        made = {"page": result["report"], "tables": out / "tables", "answers": out / "evaluations"}
        finish(result, as_json, made=made, then="open the page in a browser; it needs no network")
        return
    cells = list_cells(loaded, out, keep)
    table = Table(title=f"{sum(cell['state'] == 'done' for cell in cells)} of {len(cells)} cells done")
    for heading in ("cell", "state", "seconds", "MB"):
        table.add_column(heading, justify="left" if heading in ("cell", "state") else "right")
    for cell in cells:
        seconds = "–" if cell["seconds"] is None else f"{cell['seconds']:.0f}"
        table.add_row(cell["cell"], cell["state"], seconds, f"{cell['disk_bytes'] / 1e6:.1f}")
    Console().print(table)
    named = f"--preset {preset}" if preset else shown(path)
    again = f"medr1 study {named}{f' --data {shown(data)}' if data else ''} --out {shown(out)}"
    again += f" --keep {shown(keep)}" if keep else ""
    waiting = any(cell["state"] != "done" for cell in cells)
    finish({"cells": cells}, as_json, then=f"{again} goes on" if waiting else None)


@command(
    "plan",
    epilog=examples(
        "medr1 plan --preset omnimedvqa-qwen2vl-2b --gpu a100",
        "medr1 plan --model MedGemma-4B --set model.lora_rank=64 --set model.quantize=nf4 --gpu rtx4090",
        "medr1 plan --model OWNER/NAME --memory 24",
        "medr1 plan --preset omnimedvqa-qwen2vl-2b --gpu h100 --servers",
    ),
)
def plan_command(
    config: ConfigOption = None,
    preset: PresetOption = None,
    overrides: SetOption = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="in place of the recipe's: MedGemma-4B, Qwen2.5-VL-7B, …, a folder or a hub name"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="its name, such as t4, rtx4090, l4, a100 or h100; a100 if no --memory is given"),
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=1, help="GB of a GPU, in place of --gpu's own")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="how many in a node, each with a copy of the model")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="how many machines")] = 1,
    sharded: Annotated[bool, typer.Option("--sharded", help="one copy divided over all GPUs (FSDP2, ZeRO-3)")] = False,
    servers: Annotated[
        bool, typer.Option("--servers", help="also how many of 1, 8 and 64 GPUs should sample, and what limits each")
    ] = False,
    image_side: Annotated[
        int, typer.Option("--image-side", min=28, help="side of a square image in pixels, before it is scaled")
    ] = 392,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, seconds a step and hours an epoch from counted bytes and FLOPs; nothing is run."""
    from medr1.training.plan import NO_BFLOAT16, count, gpu_named, gpu_of, remedy

    values = dict(parse_override(text) for text in overrides or [])
    values |= {"model.name": model} if model else {}
    recipe = load_config(recipe_file(config, preset), values)
    if servers and (recipe.method == "sft" or recipe.grpo.num_iterations > 1):
        raise MedR1Error("--servers: is for GRPO with grpo.num_iterations = 1, sampled a step ahead; leave it out")
    named = gpu is not None
    gpu = gpu_of(memory) if memory and not named else gpu_named(gpu or "a100")
    sizes = count(recipe.model.name)
    added, needs = remedy(
        sizes, recipe, image_side=image_side, gpu=gpu, gpus=gpus, nodes=nodes, sharded=sharded, memory=memory
    )
    card = f"{memory:g} GB" if memory and not named else gpu
    machine = f"{nodes} x {gpus} x {card}" if nodes > 1 else f"{gpus} x {card}"
    billions = sizes.weights / 1e9
    weights = f"{billions:.2f} billion" if billions >= 0.01 else f"{1000 * billions:.2g} million"
    table = Table(title=f"{recipe.model.name}, {weights} weights, {machine}: an estimate")
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
    unit = "hour" if needs["hours_per_epoch"] == 1 else "hours"
    hours = f"{needs['hours_per_epoch']:g} {unit} for an epoch of OmniMedVQA" if needs["fits"] else "try --sharded"
    Console().print(f"It {verdict}{how}; {hours}.", highlight=False, soft_wrap=True)
    if memory and not named:
        Console().print(f"Seconds are those of one that is as quick as {gpu}.", highlight=False)
    elif gpu in NO_BFLOAT16:
        Console().print(f"{gpu} has no bfloat16: it will be slower than this.")
    balances: list[dict[str, Any]] = []
    if servers:
        from medr1.training.balance import FLEETS, balance

        changed = load_config(recipe_file(config, preset), values | dict(map(parse_override, added)))
        settings: dict[str, Any] = {"image_side": image_side, "gpu": gpu, "sharded": sharded, "memory": memory}
        balances = [balance(sizes, changed, fleet, **settings) for fleet in FLEETS]
        _print_balances(balances, FLEETS)
    finish({"settings_added": added, **needs, **({"servers": balances} if servers else {})}, as_json)


def _print_balances(balances: list[dict[str, Any]], fleets: Sequence[int]) -> None:
    table = Table(title="Samplers and trainers, sampling a step ahead: an estimate")
    for heading in ("GPUs", "sample", "train", "prompts a step", "sampling", "training", "a step", "without ahead"):
        table.add_column(heading, justify="right")
    table.add_column("sampling is limited by")
    table.add_column("training by")
    for fleet, one in zip(fleets, balances, strict=True):
        counts = (one["samplers"] or "in turn", one["trainers"], one["prompts"])
        spent = (one["seconds"]["sampling"], one["seconds"]["training"], one["step_seconds"], one["waiting_seconds"])
        limits = one["limits"].values() if one["fits"] else ("does not fit", "")
        table.add_row(str(fleet), *map(str, counts), *(f"{value:.2f} s" for value in spent), *limits)
    Console().print(table)


@model_command("export", epilog=examples("medr1 export runs/ct --out exported --dtype bfloat16 --answers ct.jsonl"))
def export_command(
    model: Annotated[str, typer.Argument(help="a run's folder, a model or adapter folder, or a hub name")],
    out: Annotated[Path, typer.Option("--out", help="a new folder; one of an earlier export is replaced")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="of the weights")
    ] = "float32",
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
    base = "; its base's 4 bits dequantised in float32" if result["dequantised"] else ""
    made = {"model": f"{out} ({result['bytes'] / 1e9:.2f} GB, {dtype}{base})", "card": str(out / "README.md")}
    if push:
        with console.status(f"uploading to {push}"):
            result["commit"] = push_to_hub(out, push, public=public)
        made["on the hub"] = result["commit"]
    finish(result, as_json, made=made, then=f"medr1 app --model {shown(out)}")


@command(
    "config",
    epilog=examples(
        "medr1 config > recipe.toml",
        "medr1 config --preset omnimedvqa-qwen2vl-2b",
        "medr1 config --set optimizer.learning_rate=1e-5",
    ),
)
def config_command(config: ConfigOption = None, preset: PresetOption = None, settings: SetOption = None) -> None:
    """Print a whole recipe as TOML, every field with its meaning."""
    typer.echo(to_toml(resolve(recipe_file(config, preset), {}, settings)), nl=False)


@build_app.command(
    "small",
    cls=Command,
    epilog=examples(
        "medr1 build small --data DATA --out runs/small",
        "medr1 build small --learned results/small-whole/learned.safetensors --out runs/small",
    ),
)
def build_small(
    out: Annotated[Path, typer.Option("--out", help="folder for the state, the learning curve and the model")],
    data: RecipeDataOption = None,
    learned: Annotated[
        Path | None,
        typer.Option(
            "--learned",
            help="instead: learned.safetensors of another build, whose model is made again in a minute, to the bit",
            rich_help_panel=WHAT,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of weights, batches and crops")] = 0,
    answering_steps: Annotated[
        int,
        typer.Option("--answering-steps", min=1, help="of the last stage; after 320 GRPO has little left to teach"),
    ] = 80,
    as_json: JsonOption = False,
) -> None:
    """SmolLM2-135M given eyes, from the training part of a data set: half an hour on two cores; it resumes."""
    from medr1.bases.small.build import build, restore

    if learned is not None and data is None:
        folder = restore(learned, out)
    elif data is not None and learned is None:
        folder = build(load_config(overrides={"data.path": data}).data, out, seed=seed, answering_steps=answering_steps)
    else:
        raise MedR1Error("give either --data, to build, or --learned, to make again what was built")
    then = f"medr1 train --model {shown(folder)} --data {shown(data or 'DATA')} --out runs/first"
    finish({"model": str(folder)}, as_json, made={"model": folder}, then=then)
