"""Commands that measure: eval, score, calibrate, faithfulness, explain, report."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from medr1.cli.options import (
    CalibrationOption,
    DataOption,
    JsonOption,
    ModalityOption,
    ModelOption,
    ModeOption,
    SetOption,
    SkipOption,
    TypeOption,
    asked,
    limited,
)
from medr1.cli.printing import console, finish, interval, numbers_span, percent, print_answered, print_summary
from medr1.config import RECIPE, load_config
from medr1.errors import MedR1Error

app = typer.Typer()


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
    from medr1.data.parts import leave_out_unreadable, load_parts
    from medr1.data.records import write_jsonl
    from medr1.evaluation.calibration import answered, applied, calibrating, read_calibration
    from medr1.evaluation.metrics import summarise
    from medr1.evaluation.run import evaluate
    from medr1.policy.vlm import load_vlm

    more = {"data.skip_unreadable": skip_unreadable or None, "rollout.mode": mode}
    resolved = asked(model, data, modality, question_type, settings, more)
    train_records, test_records = load_parts(resolved.data)
    parts = {"test": test_records, "train": train_records, "all": train_records + test_records}
    if part not in parts:
        raise MedR1Error(f"--part {part}: choose {', '.join(parts)}")
    if calibration and not (score_options or samples):
        raise MedR1Error("--calibration needs options that are weighed; add --score-options or --samples")
    thresholds = read_calibration(calibration) if calibration else None
    if score_options and samples:
        raise MedR1Error("--score-options and --samples are two ways to weigh options; give one of them")
    records = limited(parts[part], limit, resolved)
    if resolved.data.skip_unreadable:
        records = leave_out_unreadable(records, out)
    if model.startswith("openai:"):
        if score_options or samples:
            raise MedR1Error(f"{model}: a server's options cannot be weighed; use a local model")
        from medr1.evaluation.remote import evaluate_remote, token_totals

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
        print_summary(summarise(rows) | totals, as_json)
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
        print_answered(answered(calibrating(rows, thresholds.share, thresholds.seed)[1]))
    print_summary(summarise(rows), as_json)


@app.command("score")
def score_command(
    answers: Annotated[Path, typer.Argument(help="a .jsonl file that `medr1 eval` wrote")],
    as_json: JsonOption = False,
) -> None:
    """Score stored replies again with this version's extractor, without running the model."""
    from medr1.data.records import read_jsonl
    from medr1.evaluation.metrics import summarise
    from medr1.evaluation.run import score

    print_summary(summarise(score(read_jsonl(answers))), as_json)


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
    from medr1.data.records import read_jsonl
    from medr1.evaluation.calibration import assess, calibrate, write_calibration

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
                words, *(f"{side[name]['value']:.3f} ({numbers_span(side[name]['ci95'])})" for side in (before, after))
            )
        table.add_row("ECE of a perfect model", *(f"{side['ece']['floor']:.3f}" for side in (before, after)))
        table.add_row("n", str(before["n"]), str(after["n"]))
        Console().print(table)
        print_answered(judged["answered"])
    finish({"calibration": str(out), **found.model_dump(), "judged": judged}, as_json)


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
    from medr1.data.parts import load_parts
    from medr1.policy.vlm import load_vlm
    from medr1.trust.faithfulness import KEPT, measure_faithfulness

    resolved = asked(model, data, modality, question_type, settings)
    held_out = load_parts(resolved.data)[1]
    records = [record for record in held_out if not record.is_open]
    if len(records) < len(held_out):
        console.print(f"{len(held_out) - len(records)} open questions have no options to compare and are left out")
    numbers = measure_faithfulness(
        load_vlm(model, dtype=resolved.model.dtype),
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
    Console().print(
        f"the reasoning is {numbers['verdict']}: {percent(load['value'])} points, 95 % interval {interval(load)}"
        if numbers["verdict"] != "cannot be told"
        else f"whether the reasoning is used cannot be told: {percent(load['value'])} points, {interval(load)}",
        highlight=False,
        soft_wrap=True,
    )
    finish(numbers, as_json)


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
    from medr1.data.parts import image_folder, load_parts
    from medr1.data.regions import read_regions
    from medr1.policy.vlm import load_vlm
    from medr1.report.heatmaps import tell, write_heatmaps_page
    from medr1.trust.fidelity import measure_heatmaps

    resolved = asked(model, data, modality, question_type, settings, {"rollout.mode": mode})
    rows, numbers = measure_heatmaps(
        load_vlm(model, dtype=resolved.model.dtype),
        limited(load_parts(resolved.data)[1], limit, resolved),
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
    finish({"page": str(out / "explain.html"), **numbers}, as_json)


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
    from medr1.data.parts import load_parts
    from medr1.evaluation.controls import text_only_prior
    from medr1.report.run import report_from_files

    prior = text_only_prior(*load_parts(load_config(run / RECIPE).data)) if run else None
    finish(
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
