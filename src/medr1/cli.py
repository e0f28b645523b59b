"""The command line: parsing and printing only; each command calls one function of the package."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medr1 import NOTICE
from medr1.config import RECIPE, Config, load_config, parse_override, to_toml
from medr1.errors import MedR1Error
from medr1.processes import is_first, leave
from medr1.records import Record

if TYPE_CHECKING:
    from medr1.ask import Case

app = typer.Typer(
    help=f"Med-R1: reinforcement learning for medical vision-language models, honestly evaluated. {NOTICE}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Look into a data set before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
build_app = typer.Typer(help="Make a base model from parts.", no_args_is_help=True)
app.add_typer(build_app, name="build")
console = Console(stderr=True)
LISTED = 20
"""Lines of a list that are printed; --json has all."""

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


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder for everything the demo makes")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="seed of the data order and of sampling")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train the tiny model with GRPO on phantoms, evaluate before and after, write a report. Minutes on a CPU."""
    from medr1.demo import run_demo

    summary = run_demo(out, seed=seed)
    _finish(summary, as_json)


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
    resolved = _resolve(config, overrides, settings)
    result = run(resolved, out)
    leave()
    if is_first():
        _finish(result, as_json)


@app.command("eval")
def evaluate_command(
    out: Annotated[Path, typer.Option("--out", help="a .jsonl file, one row a sample; an unfinished one is resumed")],
    model: Annotated[
        str, typer.Option("--model", help="hub name, local folder, 'tiny', or openai:MODEL@URL for a server")
    ] = "tiny",
    data: DataOption = "phantoms",
    mode: ModeOption = "think",
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    part: Annotated[str, typer.Option("--part", help="test (held out), train, or all")] = "test",
    condition: Annotated[
        str,
        typer.Option(
            "--condition", help="image, repeat, or a control: blank, shuffled, shuffled_other, no_image, permuted"
        ),
    ] = "image",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="replies are cut here")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="prompts decoded together")] = 32,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="requests at a time to a server")] = 8,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="evaluate so many records, drawn by the split seed; 0: all")
    ] = 0,
    score_options: Annotated[
        bool,
        typer.Option("--score-options", help="weigh the options: a probability each; in no-think without generating"),
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="answer by the vote of so many sampled replies; 0: one greedy reply")
    ] = 0,
    calibration: CalibrationOption = None,
    skip_unreadable: SkipOption = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer every held-out question greedily; print accuracy by modality and question type with intervals."""
    from medr1.calibration import answered, applied, calibrating, read_calibration
    from medr1.data import leave_out_unreadable, load_parts
    from medr1.evaluation import evaluate
    from medr1.metrics import summarise
    from medr1.models import load_vlm
    from medr1.records import write_jsonl

    more = {"data.skip_unreadable": skip_unreadable or None, "rollout.mode": mode}
    resolved = _asked(model, data, modality, question_type, settings, more)
    train_records, test_records = load_parts(resolved.data)
    parts = {"test": test_records, "train": train_records, "all": train_records + test_records}
    if part not in parts:
        raise MedR1Error(f"--part {part}: choose {', '.join(parts)}")
    if calibration and not (score_options or samples):
        raise MedR1Error("--calibration needs options that are weighed; add --score-options or --samples")
    thresholds = read_calibration(calibration) if calibration else None
    if score_options and samples:
        raise MedR1Error("--score-options and --samples are two ways to weigh options; give one of them")
    records = _limited(parts[part], limit, resolved)
    if resolved.data.skip_unreadable:
        records = leave_out_unreadable(records, out)
    if model.startswith("openai:"):
        if score_options or samples:
            raise MedR1Error(f"{model}: a server's options cannot be weighed; use a local model")
        from medr1.remote import evaluate_remote, token_totals

        rows = evaluate_remote(
            model,
            records,
            mode=mode,
            out=out,
            max_new_tokens=max_new_tokens,
            condition=condition,
            concurrency=concurrency,
        )
        totals = token_totals(rows)
        counts = (f"{name.replace('_', ' ')}: {'–' if num is None else num}" for name, num in totals.items())
        console.print(", ".join(counts), highlight=False)
        _print_summary(summarise(rows) | totals, as_json)
        return
    rows = evaluate(
        load_vlm(model, dtype=resolved.model.dtype),
        records,
        mode=mode,
        out=out,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        condition=condition,
        scoring="votes" if samples else "options" if score_options else "reply",
        num_samples=samples,
    )
    if thresholds:
        rows = applied(rows, thresholds)
        write_jsonl(out, rows)
        _print_answered(answered(calibrating(rows, thresholds.share, thresholds.seed)[1]))
    _print_summary(summarise(rows), as_json)


@app.command("score")
def score_command(
    answers: Annotated[Path, typer.Argument(help="a .jsonl file that `medr1 eval` wrote")],
    as_json: JsonOption = False,
) -> None:
    """Score stored replies again with this version's extractor, without running the model."""
    from medr1.evaluation import score
    from medr1.metrics import summarise
    from medr1.records import read_jsonl

    _print_summary(summarise(score(read_jsonl(answers))), as_json)


@app.command("calibrate")
def calibrate_command(
    answers: Annotated[Path, typer.Argument(help="a .jsonl file of `medr1 eval --score-options` or `--samples`")],
    out: Annotated[Path, typer.Option("--out", help="the JSON file to write")] = Path("calibration.json"),
    coverage: Annotated[float, typer.Option("--coverage", help="share of the questions to answer")] = 0.8,
    accuracy: Annotated[
        float | None, typer.Option("--accuracy", help="in place of --coverage: share of the answers to be right")
    ] = None,
    share: Annotated[float, typer.Option("--share", help="share of the groups to fit on; the rest judges")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="which groups")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a temperature and a threshold to abstain below on a part of the groups; judge both on the others."""
    from medr1.calibration import assess, calibrate, write_calibration
    from medr1.records import read_jsonl

    rows = read_jsonl(answers)
    target: Any = ("coverage", coverage) if accuracy is None else ("accuracy", accuracy)
    found = calibrate(rows, target=target[0], target_value=target[1], share=share, seed=seed)
    judged = assess(rows, found)
    write_calibration(out, found)
    table = Table(title=f"temperature {found.temperature:.3f}, abstain below {found.threshold:.3f}")
    for heading in ("on the groups not fitted on", "before", "after"):
        table.add_column(heading, justify="right" if table.columns else "left")
    before, after = judged["before"], judged["after"]
    if before:
        for name, words in (("ece", "calibration error (ECE)"), ("brier", "Brier"), ("nll", "NLL"), ("aurc", "AURC")):
            table.add_row(
                words, *(f"{side[name]['value']:.3f} ({_numbers(side[name]['ci95'])})" for side in (before, after))
            )
        table.add_row("ECE of a perfect model", *(f"{side['ece']['floor']:.3f}" for side in (before, after)))
        table.add_row("n", str(before["n"]), str(after["n"]))
        Console().print(table)
        _print_answered(judged["answered"])
    _finish({"calibration": str(out), **found.model_dump(), "judged": judged}, as_json)


@app.command("faithfulness")
def faithfulness_command(
    out: Annotated[Path, typer.Option("--out", help="folder for rows and numbers; an unfinished one is gone on with")],
    model: ModelOption = "tiny",
    data: DataOption = "phantoms",
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="so many held-out records, drawn by the split seed; 0: all")
    ] = 200,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="replies are cut here")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="prompts computed together")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="of the edits")] = 0,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Edit a model's reasoning and see whether its answers follow: load-bearing, decorative, or cannot be told."""
    from medr1.data import load_parts
    from medr1.faithfulness import KEPT, measure_faithfulness
    from medr1.models import load_vlm

    resolved = _asked(model, data, modality, question_type, settings)
    held_out = load_parts(resolved.data)[1]
    records = [record for record in held_out if not record.is_open]
    if len(records) < len(held_out):
        console.print(f"{len(held_out) - len(records)} open questions have no options to compare and are left out")
    numbers = measure_faithfulness(
        load_vlm(model, dtype=resolved.model.dtype),
        _limited(records, limit, resolved),
        out=out,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    load = numbers["load"]
    table = Table(title=f"{numbers['n']} questions of {numbers['groups']} groups")
    for heading in ("answers", "share", "95 % interval", "n"):
        table.add_column(heading, justify="left" if heading == "answers" else "right")
    lines = [
        ("follow reasoning of another question", numbers["swapped"]),
        ("follow a planted mistake", numbers["planted"]),
        ("change when the reasoning is only repeated", numbers["repeated"]),
        *((f"are there with {kept:.0%} of the reasoning", numbers["kept"][str(kept)]) for kept in KEPT),
        ("are those of mode no-think", numbers["no_think"]),
        ("turn to a hint in the prompt", numbers["hinted"]),
        ("… and the reasoning mentions it", numbers["mentioned"]),
    ]
    for words, cell in lines:
        table.add_row(words, _percent(cell["value"]), _interval(cell), str(cell["n"]))
    Console().print(table)
    Console().print(
        f"the reasoning is {numbers['verdict']}: {_percent(load['value'])} points, 95 % interval {_interval(load)}"
        if numbers["verdict"] != "cannot be told"
        else f"whether the reasoning is used cannot be told: {_percent(load['value'])} points, {_interval(load)}",
        highlight=False,
        soft_wrap=True,
    )
    _finish(numbers, as_json)


@app.command("explain")
def explain_command(
    out: Annotated[Path, typer.Option("--out", help="folder for maps and page; an unfinished one is gone on with")],
    model: ModelOption = "tiny",
    data: DataOption = "phantoms",
    method: Annotated[str, typer.Option("--method", help="occlusion or gradient")] = "occlusion",
    mode: ModeOption = "no-think",
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="so many held-out records, drawn by the split seed; 0: all")
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", help="of random orders and shuffled weights")] = 0,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Heatmaps of the model's answers, and what they are worth: pointing, hiding, shuffled weights."""
    from medr1.data import image_folder, load_parts
    from medr1.fidelity import measure_heatmaps
    from medr1.models import load_vlm
    from medr1.regions import read_regions
    from medr1.report.heatmaps import tell, write_heatmaps_page

    resolved = _asked(model, data, modality, question_type, settings, {"rollout.mode": mode})
    rows, numbers = measure_heatmaps(
        load_vlm(model, dtype=resolved.model.dtype),
        _limited(load_parts(resolved.data)[1], limit, resolved),
        out=out,
        method=method,
        mode=mode,
        regions=read_regions(image_folder(resolved.data)),
        max_new_tokens=resolved.rollout.max_new_tokens,
        seed=seed,
    )
    write_heatmaps_page(rows, numbers, out)
    for _, sentence in tell(numbers):
        Console().print(sentence, highlight=False, soft_wrap=True)
    _finish({"page": str(out / "explain.html"), **numbers}, as_json)


@app.command("report")
def report_command(
    base: Annotated[Path, typer.Option("--base", help="answers of the base model (.jsonl)")],
    trained: Annotated[Path, typer.Option("--trained", help="answers of the trained model (.jsonl)")],
    run: Annotated[
        Path | None, typer.Option("--run", help="folder of the training run: curve, recipe, text-only prior")
    ] = None,
    controls: Annotated[
        list[str] | None, typer.Option("--control", help="NAME=FILE with the trained model's answers, e.g. blank=…")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="a file of `medr1 calibrate` for the trained model")
    ] = None,
    faithfulness: Annotated[
        Path | None, typer.Option("--faithfulness", help="a folder of `medr1 faithfulness` for the trained model")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="the HTML file to write")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page from stored answers: before, after, controls, curve, every sample."""
    from medr1.controls import text_only_prior
    from medr1.data import load_parts
    from medr1.report import report_from_files

    prior = text_only_prior(*load_parts(load_config(run / RECIPE).data)) if run else None
    _finish(
        report_from_files(
            base,
            trained,
            run=run,
            controls=controls or [],
            text_only=prior,
            calibration=calibration,
            faithfulness=faithfulness,
            out=out,
        ),
        as_json,
    )


@app.command("study")
def study_command(
    study: Annotated[Path, typer.Argument(help="a study in TOML, such as configs/study-tiny.toml")],
    out: Annotated[Path, typer.Option("--out", help="folder of the study; an unfinished one there is gone on with")],
    data: Annotated[str | None, typer.Option("--data", help="data set in place of recipe.data.path")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="show each cell's state, seconds and disk use")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train on each modality and question type, test on all with controls, write the report; resumes by itself."""
    from medr1.study import list_cells, load_study, run_study

    loaded = load_study(study, data)
    if not only_list:
        _finish(run_study(loaded, out), as_json)
        return
    cells = list_cells(loaded, out)
    table = Table(title=f"{sum(cell['state'] == 'done' for cell in cells)} of {len(cells)} cells done")
    for heading in ("cell", "state", "seconds", "MB"):
        table.add_column(heading, justify="left" if heading in ("cell", "state") else "right")
    for cell in cells:
        seconds = "–" if cell["seconds"] is None else f"{cell['seconds']:.0f}"
        table.add_row(cell["cell"], cell["state"], seconds, f"{cell['disk_bytes'] / 1e6:.1f}")
    Console().print(table)
    _finish({"cells": cells}, as_json)


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
    from medr1.plan import count, remedy

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
    _finish({"settings_added": added, **needs}, as_json)


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
    from medr1.export import export_model, push_to_hub

    with console.status("exporting"):
        result = export_model(model, out, dtype=dtype, answers=answers or [], name=push)
    console.print(f"{out}: {result['bytes'] / 1e9:.2f} GB, {dtype}", highlight=False, soft_wrap=True)
    if push:
        with console.status(f"uploading to {push}"):
            result["commit"] = push_to_hub(out, push, public=public)
        console.print(result["commit"], highlight=False, soft_wrap=True)
    _finish(result, as_json)


@app.command()
def ask(
    image: Annotated[list[Path], typer.Argument(help="image file(s), then the question")],
    question: Annotated[str, typer.Argument(help="the question")],
    option: Annotated[
        list[str] | None, typer.Option("--option", help="an answer to choose from: two or more, or none to ask openly")
    ] = None,
    model: ModelOption = "tiny",
    compare: Annotated[
        list[str] | None, typer.Option("--compare", help="another model to ask the same, such as the base; repeatable")
    ] = None,
    mode: ModeOption = "think",
    modality: Annotated[str | None, typer.Option("--modality", help="of the image, to warn where it is new")] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="replies drawn to see how many agree")] = 0,
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", help="a .png file: what in the image speaks for the answer")
    ] = None,
    calibration: CalibrationOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="an .html file: the case as a page, without names")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="the reply is cut here")] = 256,
    as_json: JsonOption = False,
) -> None:
    """Ask one question about an image: reasoning, answer, its probability, and what speaks against trusting it."""
    from medr1.ask import ask as run
    from medr1.ask import load_respondent, question_about
    from medr1.case import write_case, write_heatmaps

    record = question_about(image, question, option or [], modality)
    settings: dict[str, Any] = {"mode": mode, "num_samples": samples, "max_new_tokens": max_new_tokens}
    models = [load_respondent(model, calibration), *map(load_respondent, compare or [])]
    cases = [run(each, record, heatmap=bool(heatmap), **settings) for each in models]
    if heatmap:
        paths = write_heatmaps(cases, heatmap)
        console.print(f"heatmap: {', '.join(map(str, paths))}", highlight=False, markup=False)
    if out:
        write_case(cases, out)
    if not as_json:
        for case in cases:
            _print_case(case)
    first, *others = (case.as_dict() for case in cases)
    _finish(first | ({"compared": others} if others else {}), as_json)


def _print_case(case: "Case") -> None:
    said = Console(highlight=False, markup=False, soft_wrap=True)
    said.print(f"{case.model}\n{case.reply}\n")
    answer = f"{case.letter}) {case.answer}" if case.letter else case.answer
    said.print(f"answer: {answer}" if answer else f"no answer: {case.outcome}", style="bold")
    if case.abstained and case.calibration:
        said.print(f"but it abstains: less sure than {_percent(case.calibration.threshold)} %", style="bold yellow")
    table = Table()
    for heading in ("option", "probability", *([f"votes of {case.num_samples}"] if case.votes else [])):
        table.add_column(heading, justify="left" if heading == "option" else "right")
    for letter, text, probability in zip(
        case.record.letters, case.record.options, case.probabilities or (), strict=True
    ):
        votes = [str(case.votes.get(letter, 0))] if case.votes else []
        table.add_row(Text(f"{letter}) {text}"), f"{_percent(probability)} %", *votes)
    if case.record.options:
        said.print(table)
    for warning in case.warnings or ():
        said.print(f"! {warning}", style="yellow")


@app.command("app")
def app_command(
    model: ModelOption = "tiny",
    compare: Annotated[
        list[str] | None, typer.Option("--compare", help="another model, shown beside it; may be repeated")
    ] = None,
    calibration: CalibrationOption = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on; 0.0.0.0 lets other machines in")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="default: the first free one from 7860")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="replies are cut here")] = 256,
    max_upload_mb: Annotated[int, typer.Option("--max-upload-mb", min=1, help="largest upload, in MB")] = 64,
    requests_per_minute: Annotated[
        int, typer.Option("--requests-per-minute", min=1, help="limit for each client address")
    ] = 60,
) -> None:
    """Open a page in the browser to ask about images; on this machine only, nothing is stored."""
    from medr1.app import LOOPBACK, running

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


@build_app.command("small")
def build_small(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="folder for the state, the learning curve and the model")],
    seed: Annotated[int, typer.Option("--seed", help="of weights, batches and crops")] = 0,
    as_json: JsonOption = False,
) -> None:
    """SmolLM2-135M given eyes, from the training part of a data set: half an hour on two cores; it resumes."""
    from medr1.small.build import build

    folder = build(load_config(overrides={"data.path": data}).data, out, seed=seed)
    if not as_json:
        typer.echo(f"{folder}: a model folder; medr1 train --model {folder} …")
    _finish({"model": str(folder)}, as_json)


PathArgument = Annotated[str, typer.Argument(help=DATA_HELP)]
ImageRootOption = Annotated[
    Path | None, typer.Option("--image-root", help="folder that image paths start from, where it is not the data's own")
]
LanguageOption = Annotated[str, typer.Option("--language", help="of rows that say theirs (SLAKE); 'all' keeps each")]


@data_app.command("check")
def data_check(
    path: PathArgument,
    out: Annotated[Path | None, typer.Option("--out", help="folder for check.json and check.html")] = None,
    image_root: ImageRootOption = None,
    language: LanguageOption = "en",
    as_json: JsonOption = False,
) -> None:
    """Find copies and look-alikes of images, what train and test share, refused rows, defects of questions."""
    from medr1.checks import check_data, print_check, write_check

    report = check_data(_data_path(path), image_root=image_root, language=language)
    if not as_json:
        print_check(report, Console())
    if out:
        write_check(report, out)
    _finish(report, as_json)


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
    from medr1.datasets import load_records
    from medr1.datasets.convert import convert

    refused: list[str] = []
    records = load_records(_data_path(path), image_root=image_root, language=language, refused=refused)
    result = convert(records, to, out)
    result["refused"] = [*refused, *result["refused"]]
    if not as_json:
        typer.echo(f"{out}: {result['records']:,} questions, {result['images']:,} images")
        for line in result["refused"][:LISTED]:
            typer.echo(f"left out: {line}")
        if (more := len(result["refused"]) - LISTED) > 0:
            typer.echo(f"left out: {more:,} more; --json lists all")
    _finish(result, as_json)


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
    from medr1.datasets import load_records
    from medr1.report.show import write_samples

    refused: list[str] = []
    records = load_records(
        _data_path(path), image_root=image_root, language=language, refused=refused, check_images=False
    )
    _finish(write_samples(records, out, name=path, num=num, seed=seed, refused=refused), as_json)


def _data_path(path: str) -> str:
    from medr1.data import phantom_folder

    return str(phantom_folder(400)) if path == "phantoms" else path


@app.command("config")
def config_command(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Print a whole recipe as TOML, every field with its meaning."""
    typer.echo(to_toml(_resolve(config, {}, settings)), nl=False)


def _resolve(path: Path | None, options: dict[str, Any], settings: list[str] | None) -> Config:
    overrides = {key: value for key, value in options.items() if value is not None}
    return load_config(path, overrides | dict(map(parse_override, settings or [])))


def _asked(
    model: str,
    data: str,
    modality: list[str] | None,
    question_type: list[str] | None,
    settings: list[str] | None,
    more: dict[str, Any] | None = None,
) -> Config:
    """The recipe of a command that asks a model: held out is what the model's own run held out."""
    from medr1.data import split_of_run

    filters = {"data.path": data, "data.modalities": modality, "data.question_types": question_type}
    return _resolve(None, filters | split_of_run(model, data) | (more or {}), settings)


def _limited(records: list[Record], limit: int, config: Config) -> list[Record]:
    """So many records (0: all), drawn by the split seed."""
    return random.Random(config.data.split_seed).sample(records, limit) if 0 < limit < len(records) else records


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    console.print(NOTICE, style="dim")


def _print_summary(summary: dict[str, Any], as_json: bool) -> None:
    table = Table(
        title=f"accuracy {_percent(summary['accuracy'])}, 95 % interval {_interval(summary)}, n = {summary['n']}"
    )
    for heading in ("", "accuracy", "95 % interval", "chance", "n"):
        table.add_column(heading, justify="left" if not heading else "right")
    for part in ("by_modality", "by_question_type"):
        for name, cell in summary[part].items():
            table.add_row(name, _percent(cell["accuracy"]), _interval(cell), _percent(cell["chance"]), str(cell["n"]))
        table.add_section()
    table.add_row(
        "all",
        _percent(summary["accuracy"]),
        _interval(summary),
        _percent(summary["chance"]),
        str(summary["n"]),
    )
    if summary["n"]:
        Console().print(table)
    if summary["open"]:
        Console().print(_open_table(summary["open"]))
    _finish(summary, as_json)


def _print_answered(cell: dict[str, Any]) -> None:
    Console().print(
        f"on groups not calibrated on: answers {_percent(cell['coverage'])} % of the questions; "
        f"accuracy of these {_percent(cell['accuracy'])}, "
        f"95 % interval {_interval(cell)}",
        highlight=False,
        soft_wrap=True,
    )


def _numbers(ci: list[float] | None) -> str:
    return "–" if ci is None else f"{ci[0]:.3f} to {ci[1]:.3f}"


def _open_table(found: dict[str, Any]) -> Table:
    from medr1.metrics import OPEN_SCORES

    table = Table("", title=f"open questions, n = {found['n']}")
    for heading in ("score", "95 % interval", "chance", "n"):
        table.add_column(heading, justify="right")
    for name, part in OPEN_SCORES.items():
        if (cell := found[part])["n"]:
            table.add_row(name, _percent(cell["accuracy"]), _interval(cell), _percent(cell["chance"]), str(cell["n"]))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _interval(cell: dict[str, Any]) -> str:
    return "–" if cell["ci95"] is None else f"{_percent(cell['ci95'][0])} to {_percent(cell['ci95'][1])}"
