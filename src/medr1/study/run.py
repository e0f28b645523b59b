"""The whole study in one command: train on each modality and each question type, test on all, controls beside it.

A study is TOML: a training recipe (the same sections as `medr1.config`), what each method changes in it, and what is
crossed. For every value of an axis (eight modalities, five question types), method, mode and seed there is a cell: a
model trained on the training part of that value alone and evaluated on the held-out part of all, one row of the 8x8
or 5x5 matrix. Before the cells stands the base model in every mode, after them other models as baselines.

Differences from the published study (arXiv:2503.13939): train and test share no image and no group; SFT and GRPO take
the same questions in the same order; every trained model is asked again without its image. A second arm of GRPO,
`looking`, takes as many questions in as many steps, which by its draws are other ones.

    medr1 study configs/study-tiny.toml --out runs/study           # the same command goes on where it stopped
    medr1 study configs/study-tiny.toml --out runs/study --list
    medr1 study configs/study-tiny.toml --out runs/study --keep results/tiny    # see `medr1.study.keep`

Started again beside itself, on another GPU or machine, it shares the cells, see `run_study`.

What is done is decided by the folder alone:

    OUT/study.json           the resolved study and digests of its data and base; another one is refused
    OUT/cells/CELL.json      {"done", "seconds"}; seconds of a call that was killed are not counted
    OUT/runs/CELL/           the training run; its weights go when the cell is done, its logs stay
    OUT/evaluations/CELL-CONDITION.jsonl
    OUT/faithfulness/CELL/          where the study asks for it
    OUT/results.json         all of it, for `medr1.study.report`, and then the report itself
"""

import difflib
import hashlib
import importlib
import json
import math
import random
import re
import shutil
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from medr1.config import Config, known_keys, mistakes
from medr1.data.parts import load_parts
from medr1.data.records import (
    MODALITIES,
    QUESTION_TYPES,
    Record,
    read_json,
    to_json,
    write_atomic,
    write_jsonl,
)
from medr1.errors import MedR1Error
from medr1.evaluation.controls import as_shown, text_only_prior
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.processes import if_free
from medr1.report.pages import package_versions
from medr1.study.keep import keep_cell, kept_cell, kept_file, whole_rows
from medr1.study.report import write_study_report
from medr1.training.folder import LOG, last_line
from medr1.training.looking import OtherImages
from medr1.training.run import train
from medr1.trust.faithfulness import NUMBERS, measure_faithfulness, read_faithfulness

Axis = Literal["modality", "question_type"]
Method = Literal["sft", "grpo", "looking"]
Mode = Literal["think", "no-think", "think-after"]
Control = Literal["blank", "shuffled", "shuffled_other", "no_image"]

MODES: tuple[Mode, ...] = ("think", "no-think", "think-after")
SFT_MODES: tuple[Mode, ...] = ("no-think",)
VALUES: dict[Axis, tuple[str, ...]] = {"modality": MODALITIES, "question_type": QUESTION_TYPES}
FILTERS: dict[Axis, str] = {"modality": "modalities", "question_type": "question_types"}
FLIPS = ("permuted", "repeat")
REMOTE = "openai:"
STUDY = "study.json"
TABLES = ("recipe", "sft", "grpo", "looking")
ADVISED = {"draws": {"exchanged_images": 1.0, "weights": "needs_image"}}
"""What `looking` changes where a study does not say it: the objective that docs/looking.md advises first."""

SET_BY_STUDY = ("method", "rollout.mode", "rollout.max_new_tokens", "optimizer.seed")
"""Fields of a recipe that the cells differ in."""
SHARED = ("data", "model.name")
"""Fields that all methods of a study have in common: they belong into [recipe]."""


class Study(BaseModel):
    """A whole study.

    `sft`, `grpo` and `looking` hold complete recipes once loaded; in the file they say only what differs from `recipe`,
    `looking` from `grpo`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="title of the report")
    axes: tuple[Axis, ...] = Field(("modality", "question_type"), min_length=1, description="what is trained apart")
    trained_on: tuple[str, ...] = Field((), description="train on these values of the axes only; empty: on each")
    methods: tuple[Method, ...] = Field(
        ("sft", "grpo"),
        min_length=1,
        description="sft: in no-think alone; grpo; looking: GRPO with what [looking] changes, beside the plain one",
    )
    modes: tuple[Mode, ...] = Field(MODES, min_length=1, description="modes of GRPO, and of looking")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (0,), min_length=1, description="training seeds; each repeats every cell"
    )
    cells: tuple[str, ...] = Field(
        (),
        description="cells to train, by the names that --list shows or patterns such as 'modality-*-grpo-think-seed0',"
        " in this order; for a second seed of some, or what matters first; empty: all, seed by seed",
    )
    baselines: tuple[str, ...] = Field(
        (), description="other models, evaluated as they are: hub names, folders, or openai:MODEL@URL"
    )
    controls: tuple[Control, ...] = Field(
        ("blank", "shuffled", "shuffled_other", "no_image"),
        description="asked of the base on all test records, of a trained model on those of its own value",
    )
    max_new_tokens: dict[Mode, PositiveInt] = Field(
        {"think": 256, "no-think": 32, "think-after": 256},
        description="a reply is cut here, in training and in evaluation",
    )
    records_per_cell: int = Field(
        0,
        ge=0,
        description="at most so many test records of each value (two axes: of each pair of values), drawn by the"
        " split seed; 0: all",
    )
    batch_size: PositiveInt = Field(32, description="prompts decoded together in evaluation")
    faithfulness: int = Field(
        0,
        ge=0,
        description="test records on which the reasoning of the base and of the first GRPO and looking models that"
        " think is edited (see `medr1 faithfulness`); 0: none",
    )
    keep_models: bool = Field(False, description="keep the trained models of finished cells")
    recipe: Config = Field(Config(), description="what all training runs have in common; its model is the base")
    sft: Config = Field(Config(), description="what SFT changes in the recipe")
    grpo: Config = Field(Config(), description="what GRPO changes in the recipe")
    looking: Config = Field(
        Config(),
        description="what looking changes in GRPO's recipe; without this table draws.exchanged_images = 1 and"
        " draws.weights = 'needs_image'",
    )

    @model_validator(mode="before")
    @classmethod
    def _lay_over(cls, values: dict[str, Any]) -> dict[str, Any]:
        recipe = values.get("recipe", {})
        for table in TABLES:
            for key in SET_BY_STUDY if table == "recipe" else SET_BY_STUDY + SHARED:
                section, _, field = key.partition(".")
                found = values.get(table, {}).get(section)
                if found is not None and (not field or (isinstance(found, dict) and field in found)):
                    place = "the study sets it for each cell" if key in SET_BY_STUDY else "all methods share [recipe]'s"
                    raise ValueError(f"{table}.{key} has no place here; {place}")
        sft, grpo = (_over(recipe, values.get(method, {})) for method in ("sft", "grpo"))
        return values | {"sft": sft, "grpo": grpo, "looking": _over(grpo, values.get("looking", ADVISED))}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("axes", "methods", "modes", "seeds", "cells", "baselines", "controls"):
            if twice := [item for item, count in Counter(getattr(self, name)).items() if count > 1]:
                raise ValueError(f"{name} names {twice[0]} twice")
        by_file: dict[str, str] = {}
        for model in self.baselines:
            other = by_file.setdefault(Cell("baseline", MODES[0], model=model).name, model)
            if other != model:
                raise ValueError(
                    f"baselines: {other} and {model} would have the same files, since only a to z and 0 to 9 count in"
                    " their names; give one by another path, such as a link"
                )
        if absent := [mode for mode in self.base_modes if mode not in self.max_new_tokens]:
            raise ValueError(f"max_new_tokens lacks {absent[0]}")
        first, *others = self.methods
        for other in others:
            if self._seen_by(other) != self._seen_by(first):
                raise ValueError(
                    f"{first} would not see as many questions as {other}: optimizer.epochs and prompts_per_step must"
                    " agree, and optimizer.steps (of GRPO divided by grpo.num_iterations)"
                )
        if "looking" in self.methods and self.looking == self.grpo:
            raise ValueError("[looking] changes nothing in GRPO's recipe; leave the table out, or change something")
        return self

    def recipe_of(self, method: str) -> Config:
        """The complete recipe of a method."""
        recipe: Config = getattr(self, method)
        return recipe

    def _seen_by(self, method: Method) -> tuple[float, ...]:
        config = self.recipe_of(method)
        updates = config.grpo.num_iterations if method != "sft" else 1
        return config.optimizer.steps / updates, config.optimizer.epochs, config.optimizer.prompts_per_step

    @property
    def base_modes(self) -> tuple[Mode, ...]:
        """Modes that the base is asked in: those of the trained models."""
        return tuple(mode for mode in MODES if any(mode in self.modes_of(method) for method in self.methods))

    def modes_of(self, method: Method) -> tuple[Mode, ...]:
        """Modes that a method is trained in."""
        return SFT_MODES if method == "sft" else self.modes


def _over(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's table with the fields of its sections replaced; what is no section is left for pydantic to refuse."""
    both = {name for name in recipe.keys() & changes.keys() if isinstance(recipe[name], dict)}
    sections = {name: recipe[name] | changes[name] for name in both if isinstance(changes[name], dict)}
    return {**recipe, **changes, **sections}


@dataclass(frozen=True)
class Cell:
    """One model in one mode, with everything that is asked of it.

    Example: `Cell("grpo", "think", model="runs/…/model", axis="modality", trained_on="CT", seed=0)`
    """

    method: Literal["base", "sft", "grpo", "looking", "baseline"]
    mode: Mode
    model: str | None = None
    """Name of a model that is not trained here."""
    axis: Axis | None = None
    trained_on: str | None = None
    seed: int | None = None
    flips: bool = False
    """Whether the options are also permuted: the base, and the first model of each method. What is done without stays
    done: another was first then."""

    @property
    def name(self) -> str:
        """Of its files, such as "modality-ct-grpo-think-seed0"."""
        if self.axis:
            parts = [self.axis, self.trained_on, self.method, self.mode, f"seed{self.seed}"]
        else:
            parts = [self.method, self.model if self.method == "baseline" else None, self.mode]
        return re.sub("[^a-z0-9]+", "-", " ".join(filter(None, parts)).lower())


@dataclass(frozen=True)
class Plan:
    """A study with its data: what there is to do."""

    study: Study
    train: list[Record]
    test: list[Record]
    donors: list[Record]
    """All that is held out, whose images the shuffled controls show: more than `test` where a study asks a part."""
    values: dict[Axis, list[str]]
    """Axis to the values that have training and test records, in the order of records.py."""
    cells: list[Cell]
    data_sha256: str
    """Of all records, their images' bytes aside."""

    def edited(self, cell: Cell) -> list[Record]:
        """Test records on which a cell's reasoning is edited, drawn by the split seed."""
        thinkers = [c for c in self.cells if c.mode == "think"]
        methods = ("base", "grpo", "looking")
        if cell not in [next((c for c in thinkers if c.method == method), None) for method in methods]:
            return []
        listed = [record for record in self.test if not record.is_open]
        draw = random.Random(self.study.recipe.data.split_seed)
        return draw.sample(listed, min(self.study.faithfulness, len(listed)))

    def asked(self, cell: Cell) -> list[tuple[str, list[Record]]]:
        """(condition, records) of each evaluation of a cell that is not done."""
        study = self.study
        own = [record for record in self.test if not cell.axis or getattr(record, cell.axis) == cell.trained_on]
        controls = [] if cell.method == "baseline" else [(control, own) for control in study.controls]
        return [("image", self.test), *controls, *((flip, self.test) for flip in FLIPS if cell.flips)]


def load_study(path: Path, data: str | None = None) -> Study:
    """A study from TOML; `data` takes the place of recipe.data.path.

    Raises:
        MedR1Error: no such file, not TOML, an unknown key (the nearest known one is named), a value out of range, or
            methods that would not see the same questions.
    """
    if not path.is_file():
        raise MedR1Error(f"{path}: no such file; give a study, such as configs/study-tiny.toml")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MedR1Error(f"{path}: not TOML ({error}); see configs/study-tiny.toml") from error
    for table in TABLES:
        if not isinstance(values.get(table, {}), dict):
            raise MedR1Error(f"{path}: {table} is a value, not a table; write [{table}.optimizer] and the like")
    if data is not None:
        values["recipe"] = _over(values.get("recipe", {}), {"data": {"path": data}})
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise MedR1Error(f"{path}: {mistakes(error, known_keys(Study))}") from error


def make_plan(study: Study) -> Plan:
    """Read the data and list the cells, the base first, then seed by seed or as the study orders them, baselines last.

    Raises:
        MedR1Error: bad data, none of an axis, a pattern that is no cell's, or records for which a control or another
            image to train on cannot be had.
    """
    data = study.recipe.data
    train_records, test_records = map(list, load_parts(data))
    if num_open := sum(record.is_open for record in [*train_records, *test_records]):
        raise MedR1Error(
            f"{data.path}: {num_open} open questions; a study compares multiple choice, "
            "use `medr1 train` and `medr1 eval` for them"
        )
    values: dict[Axis, list[str]] = {}
    for axis in study.axes:
        trainable, testable = ({getattr(record, axis) for record in part} for part in (train_records, test_records))
        values[axis] = [value for value in VALUES[axis] if value in trainable & testable]
        if not values[axis]:
            raise MedR1Error(f"{data.path}: no {axis.replace('_', ' ')} with training and test records; drop the axis")
    known = [value for axis in study.axes for value in values[axis]]
    if unknown := [value for value in study.trained_on if value not in known]:
        raise MedR1Error(f"{data.path}: trained_on names {unknown[0]!r}; these can be trained on: {', '.join(known)}")
    donors = test_records
    test_records = _capped(study, test_records)
    for control in study.controls:  # now, rather than after hours of training
        as_shown(test_records, control, data.split_seed, donors)
    if any(name.startswith(REMOTE) for name in study.baselines):
        importlib.import_module("medr1.evaluation.remote")
    base = [Cell("base", mode, model=study.recipe.model.name, flips=True) for mode in study.base_modes]
    trained = [
        Cell(method, mode, axis=axis, trained_on=value, seed=seed)
        for seed in study.seeds
        for axis in study.axes
        for value in values[axis]
        if not study.trained_on or value in study.trained_on
        for method in study.methods
        for mode in study.modes_of(method)
    ]
    trained = _chosen(study, trained)
    for cell in {(cell.method, cell.axis, cell.trained_on): cell for cell in trained}.values():
        _can_exchange(study, cell, train_records)
    firsts = [next((cell for cell in trained if cell.method == method), None) for method in study.methods]
    trained = [replace(cell, flips=cell in firsts) for cell in trained]
    baselines = [Cell("baseline", mode, model=model) for model in study.baselines for mode in study.base_modes]
    digest = hashlib.sha256()
    for record in [*train_records, *test_records]:
        digest.update(record.model_dump_json(exclude={"images", "licence", "groups"}, exclude_defaults=True).encode())
    return Plan(study, train_records, test_records, donors, values, [*base, *trained, *baselines], digest.hexdigest())


def _chosen(study: Study, cells: list[Cell]) -> list[Cell]:
    """Those that `cells` names, each once, in the order of its patterns; all where it names none."""
    if not study.cells:
        return cells
    chosen: dict[str, Cell] = {}
    for pattern in study.cells:
        found = {cell.name: cell for cell in cells if fnmatchcase(cell.name, pattern)}
        if not found:
            near = difflib.get_close_matches(pattern, [cell.name for cell in cells], n=1, cutoff=0)
            raise MedR1Error(f"cells names {pattern!r}, which is no cell's name or pattern; nearest: {near[0]}")
        chosen |= found  # what is there keeps its place
    return [*chosen.values()]


def _capped(study: Study, records: list[Record]) -> list[Record]:
    """At most `records_per_cell` records of each combination of the axes' values, in the order given."""
    if not study.records_per_cell:
        return records
    draw, taken, kept = random.Random(study.recipe.data.split_seed), Counter[tuple[str, ...]](), set()
    for record in draw.sample(records, len(records)):
        cell = tuple(getattr(record, axis) for axis in study.axes)
        taken[cell] += 1
        if taken[cell] <= study.records_per_cell:
            kept.add(record.id)
    return [record for record in records if record.id in kept]


def _can_exchange(study: Study, cell: Cell, train_records: Sequence[Record]) -> None:
    """Refuse a cell none of whose questions has another image, before the hours that others take."""
    if not cell_recipe(study, cell).draws.exchanged_images:
        return
    own = [record for record in train_records if getattr(record, str(cell.axis)) == cell.trained_on]
    if not any(map(OtherImages(own).pool, own)):
        raise MedR1Error(
            f"{study.recipe.data.path}: {cell.name} cannot be trained: no two of its questions are the same with the"
            " same options and other right ones, which draws.exchanged_images needs; leave it out by `cells`, or give"
            f" [{cell.method}] another objective"
        )


def cell_recipe(study: Study, cell: Cell) -> Config:
    """The training recipe of a cell that is trained."""
    assert cell.axis
    config = study.recipe_of(cell.method)
    rollout = {"mode": cell.mode, "max_new_tokens": study.max_new_tokens[cell.mode]}
    return config.model_copy(
        update={
            "method": "sft" if cell.method == "sft" else "grpo",
            "data": config.data.model_copy(update={FILTERS[cell.axis]: (cell.trained_on,)}),
            "rollout": config.rollout.model_copy(update=rollout),
            "optimizer": config.optimizer.model_copy(update={"seed": cell.seed}),
        }
    )


def run_study(study: Study, out: Path, keep: Path | None = None) -> dict[str, Any]:
    """Run a study or go on with it; cells that are done are skipped without loading a model.

    Several processes may run one study at once, in one `out` or each in its own with one `keep`: each takes the next
    cell that nobody has, and the last to end writes the report.

    Args:
        keep: a folder where each finished cell is kept, see `medr1.study.keep`; those that are there are taken up.

    Returns:
        What the report says of itself, see `medr1.study.report.write_study_report`; or {"elsewhere": names of the cells
        that other processes are at}, where there is nothing left to take and no report yet.

    Raises:
        MedR1Error: a baseline that is no server's name, bad data, another study or other data in `out` or `keep`, or
            what training and evaluation raise. What was done until then is whole and used again.
    """
    if served := [model for model in study.baselines if model.startswith(REMOTE)]:
        from medr1.evaluation.remote import parse_name  # its client is an extra

        for model in served:  # before hours of training, and before a password is written down
            parse_name(model, "baselines")
    plan = make_plan(study)
    if keep:
        write_atomic(keep / STUDY, _identity(plan, keep, "--keep"))
    write_atomic(out / STUDY, _identity(plan, out))
    waiting = plan.cells
    while waiting:
        taken = {cell for cell in waiting if _take(plan, cell, out, keep)}
        waiting = [cell for cell in waiting if cell not in taken]
        if waiting and not taken:
            return {"elsewhere": [cell.name for cell in waiting]}
    write_atomic(out / "results.json", to_json(_results(plan, out), indent=1))
    return write_study_report(out)


def _take(plan: Plan, cell: Cell, out: Path, keep: Path | None) -> bool:
    """See to it that a cell is done and kept; False where another process is at it."""
    with if_free((keep or out) / "cells" / cell.name) as free:
        if not free:
            return False
        if _state(plan, cell, out) != "done":
            kept = _kept(plan, cell, keep) if keep else None
            for flip in {*FLIPS} - ({} if kept else dict(plan.asked(cell))).keys():
                _file(cell, flip, out).unlink(missing_ok=True)  # begun when this cell was first: a part is no number
            if kept:
                _take_up(plan, cell, out, kept)
            else:
                print(f"study: {_progress(plan, out, keep)}; now {cell.name}", file=sys.stderr)
                _run_cell(plan, cell, out)
        _finish(plan, cell, out, keep)  # also of what was done: a kill may have come between the last answer and this
    return True


def list_cells(study: Study, out: Path, keep: Path | None = None) -> list[dict[str, Any]]:
    """cell, state ("waiting", "kept", "training", "evaluating" or "done"), seconds (None before any) and disk_bytes.

    Raises:
        MedR1Error: bad data, or another study or other data in `out` or `keep`.
    """
    plan = make_plan(study)
    _identity(plan, out)
    if keep:
        _identity(plan, keep, "--keep")
    states = {cell: _state(plan, cell, out) for cell in plan.cells}
    if keep:
        states |= {cell: "kept" for cell in plan.cells if states[cell] != "done" and _kept(plan, cell, keep)}
    return [
        {
            "cell": cell.name,
            "state": states[cell],
            "seconds": _count(cell, out).get("seconds"),
            "disk_bytes": _disk_bytes([out / "runs" / cell.name, *_files(plan, cell, out).values()]),
        }
        for cell in plan.cells
    ]


def _identity(plan: Plan, folder: Path, option: str = "--out") -> str:
    """Content of study.json; refuses a folder that holds another.

    It says which weights a local base has, since that may have been built anew. What is kept does not say where the
    data lie.
    """
    path, weights = folder / STUDY, hashlib.sha256()
    study = plan.study.model_dump(mode="json")
    for file in sorted(Path(plan.study.recipe.model.name).glob("*.safetensors")):
        with file.open("rb") as content:
            weights.update(hashlib.file_digest(content, "sha256").digest())
    if path.exists():
        there = read_json(path)
        try:
            same_study = _rested_on(there["study"]) == _rested_on(study)
        except (ValidationError, LookupError, TypeError):  # a field of its recipe is gone, or it is no study's file
            same_study, there = False, {}
        differing = {
            "another study": not same_study,
            "other data": there.get("data_sha256") != plan.data_sha256,
            "another base": there.get("base_sha256", weights.hexdigest()) != weights.hexdigest(),
        }
        if what := [name for name, differs in differing.items() if differs]:
            raise MedR1Error(f"{folder}: holds results of {what[0]} (see {STUDY}); choose another {option}")
    identity = {
        "study": _rested_on(study) if option == "--keep" else study,
        "data_sha256": plan.data_sha256,
        "base_sha256": weights.hexdigest(),
    }
    return json.dumps(identity, ensure_ascii=False, indent=1)


def _rested_on(study: dict[str, Any]) -> dict[str, Any]:
    """Of a dumped study what cells rest on: not which there are beside them, nor where the data lie.

    A field of a recipe that is younger than the folder has its default there.
    """
    tables = {}
    for table in (name for name in TABLES if name != "looking" or "looking" in study["methods"]):
        tables[table] = Config.model_validate(study[table]).model_dump(mode="json")
        for field in ("path", "image_root"):
            del tables[table]["data"][field]
    rest = {name: value for name, value in study.items() if name not in ("baselines", "cells", *TABLES)}
    return {"faithfulness": 0, "trained_on": [], **rest, **tables}


def _run_cell(plan: Plan, cell: Cell, out: Path) -> None:
    began, earlier, done = time.perf_counter(), _count(cell, out).get("seconds", 0.0), False
    try:
        _answer(plan, cell, out)
        done = True
    finally:
        count = {"done": done, "seconds": round(earlier + time.perf_counter() - began, 1)}
        write_atomic(out / "cells" / f"{cell.name}.json", json.dumps(count))


def _answer(plan: Plan, cell: Cell, out: Path) -> None:
    """Train where the cell is trained, then evaluate; each goes on from what it left."""
    study, run = plan.study, out / "runs" / cell.name
    files = {condition: _file(cell, condition, out) for condition, _ in plan.asked(cell)}
    settings: dict[str, Any] = {
        "mode": cell.mode,
        "max_new_tokens": study.max_new_tokens[cell.mode],
        "seed": study.recipe.data.split_seed,
    }
    if cell.model and cell.model.startswith(REMOTE):
        from medr1.evaluation.remote import evaluate_remote  # its client is an extra

        settings["max_pixels"] = study.recipe.model.max_pixels
        for condition, records in plan.asked(cell):
            evaluate_remote(cell.model, records, out=files[condition], condition=condition, **settings)
        return
    if cell.axis and not (run / "model").is_dir():
        train(cell_recipe(study, cell), run)
    recipe = study.recipe_of(cell.method) if cell.axis else study.recipe  # images as large as in training
    vlm = load_vlm(cell.model or str(run / "model"), **recipe.model.loading)
    vlm.name = cell.model or cell.name  # rows shall not name this machine's folders
    settings |= {"batch_size": study.batch_size, "donors": plan.donors}
    for condition, records in plan.asked(cell):
        evaluate(vlm, records, out=files[condition], condition=condition, **settings)
    if edited := plan.edited(cell):
        measure_faithfulness(
            vlm,
            edited,
            out=out / "faithfulness" / cell.name,
            max_new_tokens=study.max_new_tokens["think"],
            batch_size=study.batch_size,
            seed=study.recipe.data.split_seed,
        )


def _file(cell: Cell, condition: str, out: Path) -> Path:
    return out / "evaluations" / f"{cell.name}-{condition}.jsonl"


def _files(plan: Plan, cell: Cell, out: Path) -> dict[str, Path]:
    """Of what is asked of a cell; of one that is done the flips that it has, whichever cell is first now."""
    asked = {condition: _file(cell, condition, out) for condition, _ in plan.asked(cell)}
    if not _count(cell, out).get("done"):
        return asked
    flips = {flip: file for flip in FLIPS if (file := _file(cell, flip, out)).exists()}
    return {condition: file for condition, file in asked.items() if condition not in FLIPS} | flips


def _edited(cell: Cell, out: Path) -> Path | None:
    """The folder of what became of a cell's edited reasoning; None where it was not edited."""
    folder = out / "faithfulness" / cell.name
    return folder if (folder / NUMBERS).exists() else None


def _count(cell: Cell, out: Path) -> dict[str, Any]:
    path = out / "cells" / f"{cell.name}.json"
    return read_json(path) if path.exists() else {}


def _state(plan: Plan, cell: Cell, out: Path) -> str:
    there = [path.exists() for path in _files(plan, cell, out).values()]
    if _count(cell, out).get("done") and all(there):
        return "done"
    run = out / "runs" / cell.name
    if any(there) or (run / "model").is_dir():
        return "evaluating"
    return "training" if run.is_dir() else "waiting"


def _finish(plan: Plan, cell: Cell, out: Path, keep: Path | None) -> None:
    """Keep a finished cell and remove its weights; the logs, the completions and the recipe stay."""
    if keep and not _kept(plan, cell, keep):
        keep_cell(
            kept_file(keep, cell.name),
            seconds=_count(cell, out)["seconds"],
            evaluations=_files(plan, cell, out),
            log=out / "runs" / cell.name / LOG if cell.axis else None,
            faithfulness=_edited(cell, out),
        )
    _discard(plan.study, cell, out)


def _kept(plan: Plan, cell: Cell, keep: Path) -> dict[str, Any] | None:
    """What is kept of a cell, if it is all that the plan asks of each."""
    kept = kept_cell(kept_file(keep, cell.name))
    if not kept:
        return None
    needed = [(condition, records) for condition, records in plan.asked(cell) if condition not in FLIPS]
    asked = {condition: sorted(record.id for record in records) for condition, records in needed}
    there = {condition: columns["id"] for condition, columns in kept["evaluations"].items()}
    return kept if asked.items() <= there.items() else None


def _take_up(plan: Plan, cell: Cell, out: Path, kept: dict[str, Any]) -> None:
    """Put a kept cell into the study's folder, as if it had been trained there."""
    seed = plan.study.recipe.data.split_seed
    for condition, records in plan.asked(replace(cell, flips=True)):
        if condition in kept["evaluations"]:
            shown, file = as_shown(records, condition, seed, plan.donors), _file(cell, condition, out)
            write_jsonl(file, whole_rows(kept["evaluations"][condition], shown, file.parent))
    if kept["log"]:
        write_jsonl(out / "runs" / cell.name / LOG, kept["log"])
    if kept["faithfulness"]:
        write_atomic(out / "faithfulness" / cell.name / NUMBERS, to_json(kept["faithfulness"], indent=1) + "\n")
    write_atomic(out / "cells" / f"{cell.name}.json", json.dumps({"done": True, "seconds": kept["seconds"]}))


def _discard(study: Study, cell: Cell, out: Path) -> None:
    for pattern in ("checkpoint-*", ".*.saving", *(() if study.keep_models else ("model",))):
        for folder in (out / "runs" / cell.name).glob(pattern):
            shutil.rmtree(folder)


def _progress(plan: Plan, out: Path, keep: Path | None) -> str:
    """How many cells are done, here or kept, and an estimate of the time that the rest takes one process."""
    seconds = {cell: count["seconds"] for cell in plan.cells if (count := _count(cell, out)).get("done")}
    done = {cell for cell in plan.cells if cell in seconds or (keep and kept_file(keep, cell.name).exists())}
    said = f"{len(done)} of {len(plan.cells)} cells done"
    trained = [cell for cell in plan.cells if cell.axis]
    if not (known := [seconds[cell] for cell in trained if cell in seconds]):
        return said
    left = timedelta(seconds=round(sum(known) / len(known) * sum(cell not in done for cell in trained)))
    return f"{said}, about {left} left"


def _disk_bytes(places: Sequence[Path]) -> int:
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def _results(plan: Plan, out: Path) -> dict[str, Any]:
    """All that the report needs, in the order of the cells."""
    study = plan.study
    evaluations: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for cell in plan.cells:
        folder = f"runs/{cell.name}"
        identity = {
            "method": cell.method,
            "mode": cell.mode,
            "axis": cell.axis,
            "trained_on": cell.trained_on,
            "seed": cell.seed,
        }
        model = cell.model or f"{folder}/model"
        for condition, path in _files(plan, cell, out).items():
            rows = path.relative_to(out).as_posix()
            evaluations.append({**identity, "model": model, "condition": condition, "rows": rows})
        if cell.axis:
            config = cell_recipe(study, cell)
            steps = last_line(out / folder)["step"]
            updates = config.grpo.num_iterations if config.method == "grpo" else 1
            examples = math.ceil(steps / updates) * config.optimizer.prompts_per_step
            seconds = _count(cell, out)["seconds"]
            runs.append({"folder": folder, **identity, "seconds": seconds, "steps": steps, "examples": examples})
    parts = {
        (axis, value): tuple(
            [record for record in part if getattr(record, axis) == value] for part in (plan.train, plan.test)
        )
        for axis, values in plan.values.items()
        for value in values
    }
    resolved = study.model_dump(mode="json")
    return {
        "study": resolved,
        "evaluations": evaluations,
        "priors": [
            {"axis": axis, "trained_on": value, "table": text_only_prior(own_train, plan.test)}
            for (axis, value), (own_train, _) in parts.items()
            if any((cell.axis, cell.trained_on) == (axis, value) for cell in plan.cells)
        ],
        "runs": runs,
        "examples": {
            axis: {value: {"train": len(parts[axis, value][0]), "test": len(parts[axis, value][1])} for value in values}
            for axis, values in plan.values.items()
        },
        "faithfulness": [
            {"cell": cell.name, **read_faithfulness(numbers)} for cell in plan.cells if (numbers := _edited(cell, out))
        ],
        "versions": package_versions(),
        # Logs hold seconds, whose digits differ between two equal studies: whole megabytes do not.
        "disk_bytes": math.ceil(_disk_bytes([out / "runs", out / "evaluations"]) / 1e6) * 1_000_000,
        "recipe_hash": hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest(),
        "data_sha256": plan.data_sha256,
    }
