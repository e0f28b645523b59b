"""From names to rows: which model is asked which part of which data, and how. What lies between a command and
`evaluate` or `evaluate_remote`.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medr1.config import RECIPE, Config, recipe_of
from medr1.data.heldout import RunSplit, split_of, tell_seen
from medr1.data.parts import leave_out_unreadable, load_parts
from medr1.data.records import Record, read_json, write_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.calibration import answered, applied, calibrating, read_calibration
from medr1.evaluation.controls import SHUFFLED
from medr1.evaluation.looking import folder_of, look, measure
from medr1.evaluation.metrics import summarise
from medr1.evaluation.run import Row, evaluate, leave_out_too_long
from medr1.policy.names import checkpoints, step_of
from medr1.policy.vlm import VLM, load_vlm
from medr1.processes import alone, make_folder, tell

Part = Literal["test", "train", "all"]

REMOTE = "openai:"
"""How the name of a model on a server begins."""


def evaluate_named(
    model: str,
    config: Config,
    out: Path,
    *,
    run: RunSplit | None = None,
    part: Part = "test",
    condition: str = "image",
    limit: int = 0,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    concurrency: int = 8,
    score_options: bool = False,
    num_samples: int = 0,
    calibration: Path | None = None,
    reader: str | None = None,
    looking: bool = False,
) -> dict[str, Any]:
    """Ask a model, by name, a part of the recipe's data in the recipe's mode; rows go to `out`.

    Args:
        model: what `load_vlm` takes, or openai:MODEL@URL.
        run: whose list says what was held out (see `load_parts`); None divides as the recipe says.
        part: held out, trained on, or both.
        limit: so many records, drawn by the split seed; 0: all.
        score_options, num_samples: weigh the options, or let so many sampled replies vote; see `evaluate`.
        calibration: what `medr1 calibrate` wrote; rows then say `abstained`.
        reader: openai:MODEL@URL, which reads again what is unparsed or ambiguous (see `medr1.evaluation.reader`).
        looking: ask in the other ways of `medr1.evaluation.looking` too; rows go to `looking.folder_of(out)`.

    Returns:
        `summarise` of the rows; from a server its tokens too (`token_totals`), with `calibration` under "answered" what
        is answered of the groups that it was not fitted on, with `reader` under "reader" what `with_reader` counts, and
        with `looking` under "looking" what `looking.measure` gives.

    Raises:
        MedR1Error: settings that exclude each other, bad data, or what the evaluation raises.
    """
    if out.is_dir():
        raise MedR1Error(f"{out}: is a folder; name a .jsonl file for the rows, such as {out / 'answers.jsonl'}")
    if score_options and num_samples:
        raise MedR1Error("--score-options and --samples are two ways to weigh options; give one of them")
    weighed = score_options or num_samples > 0
    if calibration and not weighed:
        raise MedR1Error("--calibration needs options that are weighed; add --score-options or --samples")
    if model.startswith(REMOTE) and weighed:
        raise MedR1Error(f"{model}: a server's options cannot be weighed; use a local model")
    if looking and condition != "image":
        raise MedR1Error(
            f"--looking asks with the image and with others in its place; leave --condition {condition} out"
        )
    if reader:
        from medr1.evaluation.remote import parse_name

        parse_name(reader, "--reader")  # before the model is asked anything
    thresholds = read_calibration(calibration) if calibration else None
    train_records, test_records = load_parts(config.data, run)
    asked = _of_part(part, train_records, test_records)
    records: Sequence[Record] = limited(asked, limit, config)
    make_folder(out.parent)
    if config.data.skip_unreadable:
        records = leave_out_unreadable(records, out)
    settings: dict[str, Any] = {
        "mode": config.rollout.mode,
        "out": out,
        "max_new_tokens": max_new_tokens,
        "condition": condition,
        "donors": _donors(config, run, part, asked, out) if looking or condition in SHUFFLED else None,
    }
    if model.startswith(REMOTE):
        from medr1.evaluation.remote import evaluate_remote, token_totals  # its client is an extra

        ask = partial(evaluate_remote, model, max_pixels=config.model.max_pixels, concurrency=concurrency)
        rows = ask(records, **settings)
        found = _looking(ask, rows, records, settings, None) if looking else {}
        return summarise(rows) | token_totals(rows) | _read_again(reader, rows, out, concurrency) | found
    if split := split_of(model):
        tell_seen(split, split.seen(records), "they are counted apart")
    vlm = load_vlm(model, **config.model.loading)
    if config.data.skip_unreadable:
        records = leave_out_too_long(vlm, records, mode=config.rollout.mode, max_new_tokens=max_new_tokens, out=out)
    scoring = "votes" if num_samples else "options" if score_options else "reply"
    ask = partial(evaluate, vlm, batch_size=batch_size, scoring=scoring, num_samples=num_samples)
    rows = ask(records, **settings)
    found = _looking(ask, rows, records, settings, vlm, model, batch_size) if looking else {}
    if thresholds is None:
        return summarise(rows) | _read_again(reader, rows, out, concurrency) | found
    rows = applied(rows, thresholds)
    with alone(out):
        write_jsonl(out, rows)
    judged = answered(calibrating(rows, thresholds.share, thresholds.seed)[1])
    return {**summarise(rows), "answered": judged, **_read_again(reader, rows, out, concurrency), **found}


def _looking(
    ask: Callable[..., list[Row]],
    rows: list[Row],
    records: Sequence[Record],
    settings: dict[str, Any],
    vlm: VLM | None,
    model: str = "",
    batch_size: int = 32,
) -> dict[str, Any]:
    """Under "looking" what the other ways of asking give."""
    asked = look(
        rows,
        records,
        partial(ask, **{name: value for name, value in settings.items() if name not in ("condition", "out")}),
        out=folder_of(settings["out"]),
        vlm=vlm,
        reader=reader_of(model, vlm) if vlm else None,
        donors=settings["donors"],
        batch_size=batch_size,
    )
    return {"looking": measure(asked)}


def reader_of(model: str, vlm: VLM) -> VLM | None:
    """Who reads a model's reasoning without the image: the model that its run began with, or the model itself where no
    run made it. None, and a line on stderr, where that cannot be loaded.
    """
    recipe = recipe_of(model)
    if recipe is None:
        return vlm
    try:
        return load_vlm(recipe.model.name, **recipe.model.loading)
    except MedR1Error as error:
        line = f"whether answers follow from their reasoning is left out, the run's base cannot be loaded: {error}"
        tell(line, "yellow")
        return None


def _read_again(reader: str | None, rows: Sequence[Row], out: Path, concurrency: int) -> dict[str, Any]:
    """Under "reader" what a second reading gives; nothing without a reader."""
    if reader is None:
        return {}
    from medr1.evaluation.reader import read_again, with_reader  # its client is an extra

    with alone(out):
        read = read_again(reader, rows, out, concurrency=concurrency)
    return {"reader": with_reader(read)}


def evaluate_checkpoints(folder: Path, config: Config, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Ask the base, every checkpoint and the model of a run the same questions; rows go to files in the folder `out`.

    Args:
        settings: as of `evaluate_named`, but for calibration.

    Returns:
        `summarise` of each with name ("base", "checkpoint-N", "model") and step, in order; those without the training
        state of a run are models all the same.

    Raises:
        MedR1Error: `folder` is no run's, or has no checkpoint and no model.
    """
    recipe = recipe_of(str(folder))
    if recipe is None or not (folder / RECIPE).is_file():
        raise MedR1Error(f"{folder}: no folder of a run (it holds no {RECIPE}); --checkpoints needs one")
    kept = [(place.name, step_of(place), str(place)) for place in checkpoints(folder)]
    model, result = folder / "model", folder / "result.json"
    if model.is_dir() and (result.is_file() or not kept):  # while a run is extended its model is that of the old end
        last = read_json(result)["steps"] if result.is_file() else 0
        kept = [place for place in kept if place[1] != last] + [("model", last, str(model))]
    if not kept:
        raise MedR1Error(f"{folder}: a run without a checkpoint yet; let `medr1 train` go on first")
    return [
        {"name": name, "step": step, **evaluate_named(place, config, out / f"{name}.jsonl", **settings)}
        for name, step, place in [("base", 0, recipe.model.name), *kept]
    ]


def _of_part(part: Part, train: Sequence[Record], test: Sequence[Record]) -> Sequence[Record]:
    return [*train, *test] if part == "all" else train if part == "train" else test


def _donors(config: Config, run: RunSplit | None, part: Part, asked: Sequence[Record], out: Path) -> Sequence[Record]:
    """Whose images the shuffled controls show: of the whole part, whatever --limit leaves and --modality asks about."""
    if config.data.modalities:
        with suppress(MedR1Error):  # the images of other modalities are not there: those of this one still are
            asked = _of_part(part, *load_parts(config.data.model_copy(update={"modalities": ()}), run))
    if config.data.skip_unreadable:
        asked = leave_out_unreadable(asked, out.with_name(f"{out.name.removesuffix('.jsonl')}.donors.jsonl"))
    return asked


def limited(records: Sequence[Record], limit: int, config: Config) -> list[Record]:
    """So many records (0: all), drawn by the split seed."""
    if not 0 < limit < len(records):
        return [*records]
    return random.Random(config.data.split_seed).sample(records, limit)
