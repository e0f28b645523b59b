"""A run's folder, as far as it can be read and kept without torch: its recipe, whether it is complete, whether it can
be extended, and where trackers write.

    RUN/recipe.toml          what was asked for; a folder holds one run
    RUN/extensions.jsonl     {"step", "from_steps", "to_steps", "schedule"} for each time that more steps were asked for
    RUN/log.jsonl            numbers of each logged step
    RUN/completions.jsonl    what was sampled (GRPO)
    RUN/eval-step-N.jsonl    held-out answers on the way
    RUN/looking-image-step-N.jsonl, looking-shuffled-step-N.jsonl
                             the same of fewer records, with their own image and with another one of the modality
    RUN/checkpoint-N/        a plain model folder, and what is needed to go on from there
    RUN/model/               the trained model
    RUN/result.json          {"steps", "train_records", "test_records"}; there once the run is complete
"""

import os
from pathlib import Path
from typing import Any

from medr1.config import RECIPE, Config, differences, load_config, to_toml
from medr1.data.records import append_jsonl, read_json, read_jsonl, write_atomic
from medr1.errors import MedR1Error
from medr1.policy.names import checkpoints, step_of

LOG = "log.jsonl"
COMPLETIONS = "completions.jsonl"
MODEL = "model"
RESULT = "result.json"
EXTENSIONS = "extensions.jsonl"
PLACES = {"rollout.vllm_url"}
"""Fields in which one run may differ from session to session: where servers are."""
LENGTH = {"optimizer.steps", "optimizer.epochs"}
"""Fields that may grow: the run goes on with them."""
STATELESS = "constant_with_warmup"
"""The schedule of which a longer run begins exactly as a shorter one."""
TRACKER_FOLDERS = {
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", "tensorboard"),
    "wandb": ("WANDB_DIR", "."),
    "trackio": ("TRACKIO_DIR", "trackio"),
}
"""Tracker to the variable that says where it writes, and the place in a run's folder where that is not set. MLflow's is
the address of a store, which it chooses itself.
"""
_placed: dict[str, str] = {}
"""What was set here, for the run before; anything else in a variable is the user's."""


def finished(config: Config, out: Path) -> dict[str, Any] | None:
    """What `train` returned when the run in `out` came to its end by this recipe; None if it did not.

    Raises:
        MedR1Error: the folder holds a run of another recipe that this one does not extend; see `check_recipe`.
    """
    path = out / RESULT
    if check_recipe(config, out, extend=True) or not (path.is_file() and (out / MODEL).is_dir()):
        return None
    return {"model": str(out / MODEL), **read_json(path), "last": last_line(out)}


def last_line(run: Path) -> dict[str, Any]:
    """The last line in the log of a run that came to its end.

    Raises:
        MedR1Error: the log ends before.
    """
    rows = read_jsonl(run / LOG)
    if not rows or "train_loss" not in rows[-1]:
        raise MedR1Error(f"{run / LOG}: ends before the run did; restore it, or choose another --out")
    return rows[-1]


def check_recipe(config: Config, out: Path, *, extend: bool = False) -> dict[str, Any] | None:
    """What a recipe changes in the one that the run in `out` began with; None for a new run or the same recipe.

    More steps (or epochs) are allowed: with a constant schedule the longer run is the one that it would have been from
    the start. Any other schedule has already come down towards the old end, so there `extend` must ask for it.

    Returns:
        {"from_steps", "to_steps", "schedule"}, of steps or, where steps is 0, of epochs.

    Raises:
        MedR1Error: another recipe; each field that differs is named with both values.
    """
    path = out / RECIPE
    if not path.exists() or path.read_text(encoding="utf-8") == to_toml(config):
        return None
    there = load_config(path)
    one, other = there.optimizer, config.optimizer
    unread = {"optimizer.epochs"} if one.steps and other.steps else set()
    changed = {key: values for key, values in differences(there, config).items() if key not in PLACES | unread}
    if not changed:  # or written by a version that had other fields or other words
        return None
    listed = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in changed.items())
    if set(changed) - LENGTH:
        raise MedR1Error(f"{out}: holds a run of another recipe: {listed}. Choose another --out, or give the same")
    name = "steps" if one.steps else "epochs"
    if bool(one.steps) != bool(other.steps):
        raise MedR1Error(
            f"{out}: {listed}; it was counted in {name}, so extend it by optimizer.{name}, or choose another --out"
        )
    before, after = getattr(one, name), getattr(other, name)
    if before > after:
        raise MedR1Error(f"{out}: {listed}; a run can be extended, not shortened. Choose another --out")
    schedule = config.optimizer.schedule
    ended = f"{schedule} schedule came down to 0" if schedule != STATELESS else ""
    if len(set(config.draws.curriculum)) > 1:
        ended = ended or "curriculum came to its last pass rate"
    if ended and not extend:
        raise MedR1Error(
            f"{out}: {listed}; its {ended} at the old end, so that going on is not the run"
            f" that {after} {name} from the start would be. Add --extend to go on all the same, or choose another --out"
        )
    return {"from_steps": before, "to_steps": after, "schedule": schedule}


def write_recipe(config: Config, out: Path, *, extend: bool = False) -> None:
    """Write the recipe into a run's folder, or check that it is the one that the run began with, or more of it.

    Raises:
        MedR1Error: the folder holds a run of another recipe, see `check_recipe`.
    """
    if extension := check_recipe(config, out, extend=extend):
        (out / RESULT).unlink(missing_ok=True)  # first, so that no other process takes the run for complete
        append_jsonl(out / EXTENSIONS, [{"step": _last_step(out), **extension}])
    write_atomic(out / RECIPE, to_toml(config))


def _last_step(out: Path) -> int:
    return max(map(step_of, checkpoints(out)), default=0)


FOR_GOING_ON = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "global_step*")
"""What a checkpoint holds beside the model."""


def only_for_going_on(out: Path) -> int:
    """Bytes in a run's checkpoints that nobody needs who will not extend the run."""
    places = [place for kept in checkpoints(out) for pattern in FOR_GOING_ON for place in kept.glob(pattern)]
    return sum(map(disk_bytes, places))


def disk_bytes(place: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = [place] if place.is_file() else place.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def place_trackers(names: tuple[str, ...], out: Path) -> dict[str, str]:
    """Let trackers write into the run's folder, but where their own variables say another place.

    Returns:
        Tracker to where it writes.
    """
    places = {}
    for name in names:
        if name not in TRACKER_FOLDERS:
            continue
        variable, folder = TRACKER_FOLDERS[name]
        if os.environ.get(variable) in (None, _placed.get(variable)):
            os.environ[variable] = _placed[variable] = str((out / folder).resolve())
        places[name] = os.environ[variable]
    return places
