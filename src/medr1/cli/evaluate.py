"""Commands that measure: eval, score, report, calibrate, explain, faithfulness."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from medr1.cli.options import (
    DATA_HELP,
    HOW,
    MODEL_HELP,
    OUTPUT,
    WHAT,
    CalibrationOption,
    Command,
    Condition,
    DataOption,
    JsonOption,
    ModalityOption,
    Mode,
    ModelOption,
    ModeOption,
    SetOption,
    SkipOption,
    TokensOption,
    TypeOption,
    asked,
    examples,
    known_model,
    model_or_run,
    not_trained_on,
    run_asked,
)
from medr1.cli.printing import (
    console,
    finish,
    interval,
    numbers_span,
    percent,
    print_answered,
    print_checkpoints,
    print_summary,
    shown,
)
from medr1.config import Config, recipe_of
from medr1.errors import MedR1Error

app = typer.Typer()
command = partial(app.command, cls=Command, rich_help_panel="Measure")


@command(
    "eval",
    epilog=examples(
        "medr1 eval --model tiny --data DATA --out base.jsonl",
        "medr1 eval --model runs/ct --data DATA --condition blank --out blank.jsonl",
        "medr1 eval --model runs/ct --data DATA --out ct.jsonl --looking",
        "medr1 eval runs/ct --checkpoints",
        "medr1 eval --model openai:MODEL@http://localhost:8000/v1 --data DATA --out server.jsonl",
    ),
)
def evaluate_command(
    *,
    run: Annotated[str | None, typer.Argument(help="a run's folder, in place of --model")] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help=f"{MODEL_HELP}, or openai:MODEL@URL for a server",
            callback=known_model,
            rich_help_panel=WHAT,
        ),
    ] = "tiny",
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help=f"{DATA_HELP}; default: phantoms, with --checkpoints the run's own", rich_help_panel=WHAT
        ),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            "--mode",
            help="reasoning then answer, answer alone, or answer then reasoning; default: think, with --checkpoints the"
            " run's own",
            rich_help_panel=HOW,
        ),
    ] = None,
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    part: Annotated[
        Literal["test", "train", "all"],
        typer.Option("--part", help="held out, trained on, or both", rich_help_panel=WHAT),
    ] = "test",
    condition: Annotated[
        Condition,
        typer.Option(
            "--condition", help="the image, the same asked again, or a control in its place", rich_help_panel=HOW
        ),
    ] = "image",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="replies are cut here; default: 256, with --checkpoints the run's own",
            rich_help_panel=HOW,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="prompts decoded together", rich_help_panel=HOW)
    ] = 32,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="requests at a time to a server", rich_help_panel=HOW)
    ] = 8,
    limit: Annotated[
        int,
        typer.Option("--limit", min=0, help="so many records, drawn by the split seed; 0: all", rich_help_panel=WHAT),
    ] = 0,
    score_options: Annotated[
        bool,
        typer.Option(
            "--score-options",
            help="weigh the options: a probability each; in no-think without generating",
            rich_help_panel=HOW,
        ),
    ] = False,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            min=0,
            help="answer by the vote of so many sampled replies; 0: one greedy reply",
            rich_help_panel=HOW,
        ),
    ] = 0,
    calibration: CalibrationOption = None,
    reader: Annotated[
        str | None,
        typer.Option(
            "--reader",
            help="openai:MODEL@URL: reads again what is unparsed or ambiguous; told apart from the accuracy",
            rich_help_panel=HOW,
        ),
    ] = None,
    looking: Annotated[
        bool,
        typer.Option(
            "--looking",
            help="ask also with other images, with the reasoning kept and removed, and a reader without the image: does"
            " it look?",
            rich_help_panel=HOW,
        ),
    ] = False,
    skip_unreadable: SkipOption = False,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints", help="ask the base and every checkpoint of the run, in one table", rich_help_panel=WHAT
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="a .jsonl file, one row a sample; an unfinished one is resumed. With --checkpoints a folder (default:"
            " RUN/evaluations)",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer every held-out question greedily; print accuracy by modality and question type with intervals."""
    model = model_or_run(model, run)
    if out is None and not checkpoints:
        raise MedR1Error("--out is missing: a .jsonl file for the rows, such as --out answers.jsonl")
    from medr1.evaluation.named import evaluate_checkpoints, evaluate_named

    out = out or Path(model) / "evaluations"
    own = recipe_of(model) if checkpoints else None
    rollout = own.rollout if own else Config().rollout
    data, mode = data or (own.data.path if own else "phantoms"), mode or rollout.mode
    cut_at = max_new_tokens or rollout.max_new_tokens
    more = {"data.skip_unreadable": skip_unreadable or None, "rollout.mode": mode}
    resolved = asked(model, data, modality, question_type, settings, more)
    how: dict[str, Any] = {
        "run": run_asked(model, settings),
        "part": part,
        "condition": condition,
        "limit": limit,
        "max_new_tokens": cut_at,
        "batch_size": batch_size,
        "score_options": score_options,
        "num_samples": samples,
        "reader": reader,
        "looking": looking,
        "concurrency": concurrency,
    }
    if checkpoints:
        if calibration:
            raise MedR1Error(f"--calibration {calibration}: is of one model, not of all checkpoints; leave it out")
        summaries = evaluate_checkpoints(Path(model), resolved, out, **how)
        print_checkpoints(summaries, as_json, cut_at=cut_at, out=out)
        return
    summary = evaluate_named(model, resolved, out, calibration=calibration, **how)
    then = f"medr1 report --base BASE.jsonl --trained {shown(out)}" if condition == "image" else None
    print_summary(summary, as_json, cut_at=cut_at, made={"rows": out}, then=then)


@command("score", epilog=examples("medr1 score answers.jsonl", "medr1 score answers.jsonl --json"))
def score_command(
    answers: Annotated[Path, typer.Argument(help="a .jsonl file that `medr1 eval` wrote")],
    as_json: JsonOption = False,
) -> None:
    """Score stored replies again with this version's extractor, without running the model."""
    from medr1.evaluation.metrics import summarise
    from medr1.evaluation.rows import read_rows
    from medr1.evaluation.scoring import score
    from medr1.processes import num_cores

    print_summary(summarise(score(read_rows(answers), num_cores())), as_json, then=f"medr1 calibrate {shown(answers)}")


@command(
    "report",
    epilog=examples(
        "medr1 report --base base.jsonl --trained trained.jsonl --run runs/ct --control blank=blank.jsonl",
        "medr1 report --base base.jsonl --trained sft=sft.jsonl --trained grpo=grpo.jsonl --out models.html",
    ),
)
def report_command(
    base: Annotated[
        Path, typer.Option("--base", help="answers of the base model (.jsonl)", rich_help_panel="What is shown")
    ],
    trained: Annotated[
        list[str],
        typer.Option(
            "--trained",
            help="answers of the trained model (.jsonl), or NAME=FILE; repeated: several models in one page",
            rich_help_panel="What is shown",
        ),
    ],
    run: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            help="folder of the training run: curve, recipe, text-only prior; of several models one each",
            rich_help_panel="What stands beside it",
        ),
    ] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            help="NAME=FILE with the trained model's answers, e.g. blank=blank.jsonl; may be repeated: a file is of the"
            " model that its rows state",
            rich_help_panel="What stands beside it",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="a file of `medr1 calibrate` for the trained model",
            rich_help_panel="What stands beside it",
        ),
    ] = None,
    faithfulness: Annotated[
        Path | None,
        typer.Option(
            "--faithfulness",
            help="a folder of `medr1 faithfulness` for the trained model",
            rich_help_panel="What stands beside it",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="the HTML file to write", rich_help_panel=OUTPUT)] = Path(
        "report.html"
    ),
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page from stored answers: before, after, controls, curve, every sample."""
    named = [_named(given) for given in trained]
    if len(named) > 1:
        if only_one := next(filter(None, (calibration, faithfulness)), None):
            raise MedR1Error(f"{only_one}: is of one model; leave it out, or write a report of that model alone")
        from medr1.report.several import VERDICTS, several_from_files

        result = several_from_files(base, named, runs=run or [], controls=controls or [], out=out)
        said = [f"base {percent(result['base_macro'])} % on {result['n']:,} questions"]
        for name, model in result["models"].items():
            change = model["change"]
            said.append(
                f"{name} {percent(model['macro'])} %: {100 * change['difference']:+.1f} points,"
                f" {VERDICTS[model['verdict']]}"
            )
    else:
        if run and len(run) > 1:
            raise MedR1Error(f"--run is given {len(run)} times for one model; give its own")
        from medr1.report.run import report_from_files

        ((name, path),) = named
        result = report_from_files(
            base,
            path,
            run=run[0] if run else None,
            controls=controls or [],
            calibration=calibration,
            faithfulness=faithfulness,
            name=name,
            out=out,
        )
        gain = result["gain_points"]
        story = f"before {percent(result['base_macro'])} %, after {percent(result['trained_macro'])} %"
        if gain is not None:
            story += f": {gain:+.1f} points"
        said = [story]
    finish(result, as_json, said=said, made={"page": out}, then="open the page in a browser; it needs no network")


def _named(given: str) -> tuple[str | None, Path]:
    """FILE or NAME=FILE; what is there as a whole is a FILE, whatever its folders are called."""
    name, equals, file = given.partition("=")
    if not equals or Path(given).exists():
        return None, Path(given)
    if not name or not file:
        raise MedR1Error(f"--trained {given}: write FILE or NAME=FILE, for example sft=sft.jsonl")
    return name, Path(file)


@command("calibrate", epilog=examples("medr1 calibrate scored.jsonl --coverage 0.8 --out calibration.json"))
def calibrate_command(
    answers: Annotated[Path, typer.Argument(help="a .jsonl file of `medr1 eval --score-options` or `--samples`")],
    out: Annotated[Path, typer.Option("--out", help="the JSON file to write", rich_help_panel=OUTPUT)] = Path(
        "calibration.json"
    ),
    coverage: Annotated[
        float, typer.Option("--coverage", help="share of the questions to answer", rich_help_panel="What is aimed at")
    ] = 0.8,
    accuracy: Annotated[
        float | None,
        typer.Option(
            "--accuracy",
            help="in place of --coverage: share of the answers to be right",
            rich_help_panel="What is aimed at",
        ),
    ] = None,
    share: Annotated[
        float,
        typer.Option(
            "--share", help="share of the groups to fit on; the rest judges", rich_help_panel="What is fitted on"
        ),
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="which groups", rich_help_panel="What is fitted on")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a temperature and a threshold to abstain below on a part of the groups; judge both on the others."""
    from medr1.evaluation.calibration import assess, calibrate, write_calibration
    from medr1.evaluation.metrics import untrained
    from medr1.evaluation.rows import read_rows

    rows = read_rows(answers)
    if num := len(rows) - len(untrained(rows)):
        console.print(f"{num} of {len(rows)} questions were trained on by the model's run and are left out")
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
                words, *(f"{side[name]['value']:.3f} ({numbers_span(side[name]['ci95'])})" for side in (before, after))
            )
        table.add_row("ECE of a perfect model", *(f"{side['ece']['floor']:.3f}" for side in (before, after)))
        table.add_row("n", str(before["n"]), str(after["n"]))
        Console().print(table)
        print_answered(judged["answered"])
    finish(
        {"calibration": str(out), **found.model_dump(), "judged": judged},
        as_json,
        made={"calibration": out},
        then=f"medr1 app --model MODEL --calibration {shown(out)}",
    )


@command(
    "explain",
    epilog=examples(
        "medr1 explain --model runs/demo/train --mode think --out runs/heatmaps",
        "medr1 explain --data DATA --method gradient --limit 20 --out runs/gradient",
    ),
)
def explain_command(
    *,
    model: ModelOption = "tiny",
    data: DataOption = "phantoms",
    method: Annotated[
        Literal["occlusion", "gradient"],
        typer.Option("--method", help="cells painted over, or integrated gradients", rich_help_panel=HOW),
    ] = "occlusion",
    mode: ModeOption = "no-think",
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            min=0,
            help="so many held-out records, drawn by the split seed; 0: all",
            rich_help_panel=WHAT,
        ),
    ] = 100,
    seed: Annotated[int, typer.Option("--seed", help="of random orders and shuffled weights", rich_help_panel=HOW)] = 0,
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="folder for maps and page; an unfinished one is gone on with", rich_help_panel=OUTPUT
        ),
    ],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Heatmaps of the model's answers, and what they are worth: pointing, hiding, shuffled weights."""
    from medr1.data.parts import image_folder, load_parts
    from medr1.data.regions import REGIONS, num_unmatched, read_regions
    from medr1.evaluation.named import limited
    from medr1.policy.vlm import load_vlm
    from medr1.report.heatmaps import tell, write_heatmaps_page
    from medr1.trust.fidelity import measure_heatmaps

    resolved = asked(model, data, modality, question_type, settings, {"rollout.mode": mode})
    train, test = load_parts(resolved.data, run_asked(model, settings))
    regions = read_regions(image_folder(resolved.data))
    if num := num_unmatched(regions, train, test):
        boxes = sum(map(len, regions.values()))
        console.print(f"{REGIONS}: {num} of {boxes} boxes are of an image that none of these questions shows")
    rows, numbers = measure_heatmaps(
        load_vlm(model, **resolved.model.loading),
        limited(not_trained_on(model, test), limit, resolved),
        out=out,
        method=method,
        mode=mode,
        regions=regions,
        max_new_tokens=resolved.rollout.max_new_tokens,
        seed=seed,
    )
    write_heatmaps_page(rows, numbers, out)
    page, said = out / "explain.html", [sentence for _, sentence in tell(numbers)]
    if left := numbers["left_out"]:
        said.append(f"{left} questions without an image, options or a chosen option were left out")
    finish(
        {"page": str(page), **numbers},
        as_json,
        said=said,
        made={"page": page, "maps": out / "overlays", "numbers": out / "heatmaps.json"},
        then="open the page in a browser; it needs no network",
    )


@command(
    "faithfulness",
    epilog=examples("medr1 faithfulness --model runs/demo/train --max-new-tokens 64 --out runs/faithfulness"),
)
def faithfulness_command(
    *,
    model: ModelOption = "tiny",
    data: DataOption = "phantoms",
    modality: ModalityOption = None,
    question_type: TypeOption = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            min=0,
            help="so many held-out records, drawn by the split seed; 0: all",
            rich_help_panel=WHAT,
        ),
    ] = 200,
    max_new_tokens: TokensOption = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="prompts computed together", rich_help_panel=HOW)
    ] = 16,
    seed: Annotated[int, typer.Option("--seed", help="of the edits", rich_help_panel=HOW)] = 0,
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="folder for rows and numbers; an unfinished one is gone on with", rich_help_panel=OUTPUT
        ),
    ],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Edit a model's reasoning and see whether its answers follow: load-bearing, decorative, or cannot be told."""
    from medr1.data.parts import load_parts
    from medr1.evaluation.named import limited
    from medr1.policy.vlm import load_vlm
    from medr1.trust.faithfulness import KEPT, NUMBERS, measure_faithfulness

    resolved = asked(model, data, modality, question_type, settings)
    held_out = not_trained_on(model, load_parts(resolved.data, run_asked(model, settings))[1])
    records = [record for record in held_out if not record.is_open]
    if len(records) < len(held_out):
        console.print(f"{len(held_out) - len(records)} open questions have no options to compare and are left out")
    numbers = measure_faithfulness(
        load_vlm(model, **resolved.model.loading),
        limited(records, limit, resolved),
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
        table.add_row(words, percent(cell["value"]), interval(cell), str(cell["n"]))
    Console().print(table)
    verdict = (
        f"the reasoning is {numbers['verdict']}: {percent(load['value'])} points, 95 % interval {interval(load)}"
        if numbers["verdict"] != "cannot be told"
        else f"whether the reasoning is used cannot be told: {percent(load['value'])} points, {interval(load)}"
    )
    finish(
        numbers,
        as_json,
        said=[verdict],
        made={"numbers": out / NUMBERS, "rows": out},
        then=f"medr1 report --base BASE.jsonl --trained TRAINED.jsonl --faithfulness {shown(out)}",
    )
