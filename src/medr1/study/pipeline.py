"""One recipe from beginning to end: the base asked, a model trained, asked again with controls, and a report.

What lies in the folder is not done again, so that the same command goes on where it stopped:

    OUT/base.jsonl                      the base on the held-out part
    OUT/train/                          the training run
    OUT/trained.jsonl, blank.jsonl …    the trained model, and with controls in the image's place
    OUT/base.looking/, trained.looking/ the other ways of asking of `medr1.evaluation.looking`, of LOOKED questions
    OUT/report.html
    OUT/result.json                     the recipe, and what `run_recipe` returned; there once all of it is complete
"""

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from medr1.config import Config, to_toml
from medr1.data.records import read_json, read_jsonl, write_atomic
from medr1.processes import make_folder
from medr1.training.folder import check_recipe

CONTROLS = ("blank", "shuffled")
"""Conditions under which the trained model is asked beside the image."""
LOOKED = 200
"""Held-out records on which is measured whether base and trained model look, drawn by the split seed."""
SECONDS = "seconds.json"
RESULT = "result.json"


def completed(config: Config, out: Path, *, limit: int = 0, extend: bool = False) -> dict[str, Any] | None:
    """What `run_recipe` returned when it came to its end in `out` with this recipe; None if it did not.

    Raises:
        MedR1Error: the folder holds a run of another recipe, which this one does not extend; see `check_recipe`.
    """
    check_recipe(config, out / "train", extend=extend)
    path = out / RESULT
    if not path.is_file():
        return None
    there = read_json(path)
    whole = there["recipe"] == to_toml(config) and there["limit"] == limit and (out / "report.html").is_file()
    places = {"report": str(out / "report.html"), "model": str(out / "train" / "model")}  # a folder may be moved
    return {**there["result"], **places} if whole else None


def run_recipe(
    config: Config, out: Path, *, limit: int = 0, batch_size: int = 64, forced: bool = True, extend: bool = False
) -> dict[str, Any]:
    """Evaluate the recipe's base, train, evaluate with controls, report; or go on with what is in `out`.

    Args:
        limit: so many held-out records, drawn by the split seed; 0: all.
        batch_size: prompts decoded together in evaluation.
        forced: ask also with the reasoning kept, removed and read by the base, which costs more than the replies do
            where a model is small.
        extend: whether a run there may get more steps under any schedule, see `check_recipe`.

    Returns:
        base_macro, trained_macro, chance, text_only, and one for each of CONTROLS that can be asked: accuracies in
        [0, 1] averaged over modalities (over all rows where no modality is stated); gain_points; ci95 (of each of these
        by name, in [0, 1]; of gain_points in points); looking (see `write_report`; None without); n (questions
        that the accuracies are of), num_apart (others that were asked: open ones beside multiple choice, those of no
        stated modality), num_modalities, steps, seconds (of all calls together), model, report.

    Raises:
        MedR1Error: bad data, another recipe in the folder, or what the parts raise.
    """
    if found := completed(config, out, limit=limit, extend=extend):
        return found
    from medr1.data.heldout import split_of
    from medr1.data.parts import leave_out_unreadable, load_parts  # and torch, which a complete run does not need
    from medr1.evaluation.controls import can_be_asked, text_only_prior
    from medr1.evaluation.looking import folder_of, look
    from medr1.evaluation.metrics import compare, summarise
    from medr1.evaluation.named import limited
    from medr1.evaluation.run import evaluate, weights_fingerprint
    from medr1.policy.vlm import load_vlm
    from medr1.report.run import num_counted, overall, report_from_files
    from medr1.training.folder import finished
    from medr1.training.run import train

    began = time.perf_counter()
    make_folder(out)
    train_records, held_out = load_parts(config.data, split_of(out / "train"))  # gone on with: by its own list
    if config.data.skip_unreadable:
        held_out = leave_out_unreadable(held_out, out / "base.jsonl")
    records = limited(held_out, limit, config)
    settings: dict[str, Any] = {
        "mode": config.rollout.mode,
        "max_new_tokens": config.rollout.max_new_tokens,
        "batch_size": batch_size,
    }
    possible = [name for name in CONTROLS if can_be_asked(records, name, held_out)]  # before hours of training
    sample = limited(records, LOOKED, config)
    base = load_vlm(config.model.name, **config.model.loading)
    before = evaluate(base, records, out=out / "base.jsonl", **settings)
    ask: Any = partial(evaluate, donors=held_out, **settings)
    more: dict[str, Any] = {"donors": held_out, "batch_size": batch_size}
    own = base if forced else None
    look(before, sample, partial(ask, base), out=folder_of(out / "base.jsonl"), vlm=own, reader=own, **more)
    del base, own
    run = finished(config, out / "train") or train(config, out / "train", extend=extend)
    vlm = load_vlm(run["model"], **config.model.loading)
    fingerprint = weights_fingerprint(vlm.model)
    _forget_others(out, fingerprint)
    after = evaluate(vlm, records, out=out / "trained.jsonl", fingerprint=fingerprint, **settings)
    controls = {name: ask(vlm, records, out=out / f"{name}.jsonl", condition=name) for name in possible}
    more |= {"given": controls}
    if forced:
        more |= {"vlm": vlm, "reader": load_vlm(config.model.name, **config.model.loading)}
    look(after, sample, partial(ask, vlm), out=folder_of(out / "trained.jsonl"), **more)
    prior = text_only_prior(train_records, records)
    page = report_from_files(
        out / "base.jsonl",
        out / "trained.jsonl",
        run=out / "train",
        controls=[f"{name}={out / f'{name}.jsonl'}" for name in possible],
        out=out / "report.html",
    )
    table = summarise(after)
    cells = {"base_macro": overall(summarise(before)), "trained_macro": overall(table)}
    cells |= {"text_only": overall(prior)} | {name: overall(summarise(rows)) for name, rows in controls.items()}
    change = overall(compare(before, after))
    gain = change["difference"]
    result = {
        **{name: cell["accuracy"] for name, cell in cells.items()},
        "chance": cells["trained_macro"]["chance"],
        "gain_points": None if gain is None else 100 * gain,
        "ci95": {
            **{name: cell["ci95"] for name, cell in cells.items()},
            "gain_points": change["ci95"] and [100 * end for end in change["ci95"]],
        },
        "looking": page.get("looking"),
        "n": num_counted(table),
        "num_apart": len(after) - num_counted(table),
        "num_modalities": table["macro"]["n"],
        "steps": run["steps"],
        "seconds": _add_seconds(out / SECONDS, time.perf_counter() - began),
        "model": run["model"],
        "report": str(out / "report.html"),
    }
    write_atomic(out / RESULT, json.dumps({"recipe": to_toml(config), "limit": limit, "result": result}))
    return result


def _forget_others(out: Path, fingerprint: str) -> None:
    """Take away what the run's model answered before it was extended, with which no evaluation goes on."""
    from medr1.evaluation.looking import folder_of

    trained = out / "trained.jsonl"
    if trained.exists() and any(not fingerprint.startswith(row.get("weights", "")) for row in read_jsonl(trained)):
        shutil.rmtree(folder_of(trained), ignore_errors=True)
        for name in (*CONTROLS, "trained"):  # that one last, since it tells
            (out / f"{name}.jsonl").unlink(missing_ok=True)


def _add_seconds(path: Path, seconds: float) -> float:
    """Seconds of this call and of those that it went on from."""
    earlier = read_json(path) if path.exists() else 0.0
    write_atomic(path, json.dumps(earlier + seconds))
    return round(earlier + seconds, 1)
