"""The study: its file, its plan, and that killed and resumed it gives what it gives undisturbed."""

import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from test_results import count_again, kept_cells
from typer.testing import CliRunner

import medr1.evaluation.remote
import medr1.study.run as module
from medr1.cli import app
from medr1.cli.presets import presets
from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.prompts import MODES
from medr1.data.records import append_jsonl, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.controls import CONDITIONS, text_only_prior
from medr1.processes import alone
from medr1.study.run import Cell, Plan, Study, cell_recipe, list_cells, load_study, make_plan, run_study

ROOT = Path(__file__).parents[1]
MICRO = """
name = "micro"
axes = ["modality"]
methods = ["sft", "grpo", "looking"]
modes = ["think"]
cells = ["*-ct-*", "*-oct-grpo-*"]
controls = ["blank", "shuffled_other"]
max_new_tokens = { think = 6, no-think = 6 }
batch_size = 3
faithfulness = 5

[recipe.data]
modalities = ["CT", "OCT"]
test_fraction = 0.4

[recipe.rollout]
num_completions = 2

[recipe.grpo]
beta = 0.0

[recipe.optimizer]
steps = 2
prompts_per_step = 2
learning_rate = 1e-3

[recipe.log]
save_every = 1

[grpo.optimizer]
learning_rate = 1e-4
"""
LOOKING = """
[looking.draws]
weights = "needs_image"
"""
"""Of few questions, none of which has another image."""
MICRO += LOOKING


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=40, seed=4)


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "micro.toml"
    path.write_text(MICRO)
    return path


@pytest.fixture(scope="module")
def study(study_file: Path, phantoms: Path) -> Study:
    return load_study(study_file, str(phantoms))


@pytest.fixture(scope="module")
def plan(study: Study) -> Plan:
    return make_plan(study)


@pytest.fixture(scope="module")
def whole(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro study, undisturbed."""
    out = tmp_path_factory.mktemp("out") / "whole"
    run_study(study, out)
    return out


def load(text: str, folder: Path) -> Study:
    path = folder / "study.toml"
    path.write_text(text)
    return load_study(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("batch_size", "batchsize"), r"unknown key batchsize; did you mean batch_size\?"),
        (("[recipe.log]\nsave_every", "[recipe.log]\nsafe_every"), r"did you mean recipe\.log\.save_every\?"),
        (
            ("[grpo.optimizer]\nlearning", "[grpo.optimizer]\nlerning"),
            r"unknown key grpo\.optimizer\.lerning_rate; did you mean grpo\.optimizer\.learning_rate\?",
        ),
        (('["modality"]', '["source"]'), r"axes\.0 = 'source'"),
        (('["modality"]', '["modality", "modality"]'), "axes names modality twice"),
        (('["modality"]', "[]"), r"axes = \[\]"),
        (("think = 6, no-think", "no-think"), "max_new_tokens lacks think"),
        (("think = 6, no-think", "loud"), "max_new_tokens.loud"),
        (("[grpo.optimizer]", "[grpo.optimizer]\nsteps = 3"), "sft would not see as many questions as grpo"),
        (("[grpo.optimizer]", "[grpo.optimizer]\nprompts_per_step = 4"), "sft would not see"),
        (
            ("[grpo.optimizer]", "[looking.optimizer]\nsteps = 3\n[grpo.optimizer]"),
            "sft would not see as .* as looking",
        ),
        (('"needs_image"', '""'), r"\[looking\] changes nothing in GRPO's recipe"),
        (
            ("[grpo.optimizer]", "[looking.rollout]\nmode = 'think'\n[grpo.optimizer]"),
            r"looking\.rollout\.mode has no pl",
        ),
        (('"*-ct-*"', '"*-oct-grpo-*"'), r"cells names \*-oct-grpo-\* twice"),
        (("[recipe.optimizer]", "[recipe.optimizer]\nseed = 1"), r"recipe\.optimizer\.seed has no place here"),
        (("[grpo.optimizer]", '[grpo.data]\npath = "x"\n[grpo.optimizer]'), r"grpo\.data has no place here; all meth"),
        (("[grpo.optimizer]", '[sft.model]\nname = "x"\n[grpo.optimizer]'), r"sft\.model\.name has no place here"),
        (("[recipe.rollout]", "[recipe]\nrollout = 3\n[sft.rollout]"), r"recipe\.rollout = 3"),
        (('name = "micro"', ""), "name is missing"),
        (('name = "micro"', 'name = "micro"\nseeds = [0, -1]'), r"seeds\.1 = -1"),
        (
            ('name = "micro"', 'name = "micro"\nbaselines = ["runs/a-1", "tiny", "runs/A_1"]'),
            r"baselines: runs/a-1 and runs/A_1 would have the same files",
        ),
        (('name = "micro"', "name = = 1"), "not TOML"),
        (('name = "micro"', 'name = "micro"\nsft = 3'), "sft is a value, not a table"),
    ],
)
def test_mistakes_are_one_line(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = MICRO.replace(*change)
    assert text != MICRO
    with pytest.raises(MedR1Error, match=message) as error:
        load(text, tmp_path)
    assert "study.toml: " in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_missing_data(study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=r"no\.toml: no such file"):
        load_study(tmp_path / "no.toml")
    with pytest.raises(MedR1Error, match="nowhere: no such file or folder"):
        run_study(load_study(study_file, "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_field_is_explained() -> None:
    assert all(field.description for field in Study.model_fields.values())


def test_modes_and_conditions_are_those_of_prompts_and_controls() -> None:
    assert module.MODES == MODES
    assert {"image", *get_args(module.Control), *module.FLIPS} == set(CONDITIONS)


def test_methods_lay_their_changes_over_the_recipe(study: Study) -> None:
    assert study.sft.optimizer.learning_rate == 1e-3 and study.grpo.optimizer.learning_rate == 1e-4
    assert study.sft.optimizer.steps == study.grpo.optimizer.steps == 2
    assert study.sft.data == study.grpo.data == study.recipe.data
    recipe = cell_recipe(study, Cell("grpo", "think", axis="modality", trained_on="CT", seed=3))
    assert (recipe.method, recipe.rollout.mode, recipe.rollout.max_new_tokens) == ("grpo", "think", 6)
    assert (recipe.data.modalities, recipe.optimizer.seed, recipe.rollout.num_completions) == (("CT",), 3, 2)


def test_looking_is_grpo_with_what_keeps_it_looking(tmp_path: Path) -> None:
    """The advised draws over GRPO's recipe; a table of one's own takes their place."""
    study = load(MICRO.replace(LOOKING, ""), tmp_path)
    cell = Cell("looking", "think", axis="modality", trained_on="CT", seed=0)
    plain, recipe = (cell_recipe(study, replace(cell, method=method)) for method in ("grpo", "looking"))
    assert recipe.method == "grpo" and recipe.optimizer.learning_rate == 1e-4
    assert (recipe.draws.exchanged_images, recipe.draws.weights) == (1, "needs_image")
    assert recipe.model_copy(update={"draws": plain.draws}) == plain
    own = load(MICRO.replace(LOOKING, "[looking.grpo]\nhold_to_chance = 0.2\n"), tmp_path).looking
    assert own.grpo.hold_to_chance == 0.2 and own.draws == plain.draws and own.grpo.beta == 0


def test_cells_are_named_and_trained_in_that_order(phantoms: Path, tmp_path: Path) -> None:
    def names(cells: str) -> list[str]:
        text = MICRO.replace('cells = ["*-ct-*", "*-oct-grpo-*"]', f"seeds = [0, 1]\ncells = {cells}")
        plan = make_plan(load_study(_write(tmp_path, text), str(phantoms)))
        assert [cell.name for cell in plan.cells if cell.flips and cell.axis] == _firsts(plan)
        return [cell.name.removeprefix("modality-") for cell in plan.cells if cell.axis]

    assert names('["*-looking-*-seed0", "modality-ct-*-seed[01]"]') == [
        "ct-looking-think-seed0", "oct-looking-think-seed0", "ct-sft-no-think-seed0", "ct-grpo-think-seed0",
        "ct-sft-no-think-seed1", "ct-grpo-think-seed1", "ct-looking-think-seed1",
    ]  # fmt: skip
    assert len(names("[]")) == 2 * 2 * 3
    with pytest.raises(
        MedR1Error,
        match=r"'modality-oct-grpo-seed0', which is no cell's .*; nearest: modality-oct-grpo-think-seed0",
    ):
        names('["*-ct-*", "modality-oct-grpo-seed0"]')


def _firsts(plan: Plan) -> list[str]:
    """The first cell of each method that is trained, in the order of the plan."""
    by_method = {cell.method: cell.name for cell in reversed(plan.cells) if cell.axis}
    return [cell.name for cell in plan.cells if cell.name in by_method.values()]


def test_a_cell_without_other_images_stops_the_study_at_once(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match="modality-ct-looking-think-seed0 cannot be trained: no two of its questions"):
        make_plan(load_study(_write(tmp_path, MICRO.replace(LOOKING, "")), str(phantoms)))


def test_two_updates_on_a_batch_need_twice_the_steps(tmp_path: Path) -> None:
    text = MICRO.replace("beta = 0.0", "beta = 0.0\nnum_iterations = 2").replace("save_every = 1", "save_every = 2")
    with pytest.raises(MedR1Error, match="sft would not see"):
        load(text, tmp_path)
    assert load(text.replace("[grpo.optimizer]", "[grpo.optimizer]\nsteps = 4"), tmp_path).grpo.optimizer.steps == 4


def test_shipped_studies_are_valid() -> None:
    studies = {path.stem: load_study(path) for path in (ROOT / "configs").glob("study-*.toml")}
    assert studies.keys() == {f"study-{name}" for name in presets("study")}
    published = load_config(ROOT / "configs" / "omnimedvqa-qwen2vl-2b.toml")
    ours = cell_recipe(studies["study-omnimedvqa"], Cell("grpo", "think", axis="modality", trained_on="CT", seed=0))
    assert ours.model_copy(update={"data": published.data}) == published


def test_the_ready_tiny_study_has_the_shape_of_the_published_one(phantoms: Path, tmp_path: Path) -> None:
    ready = (ROOT / "configs" / "study-tiny.toml").read_text()
    plan = make_plan(
        load_study(_write(tmp_path, ready.replace("test_fraction = 0.1", "test_fraction = 0.4")), str(phantoms))
    )
    counts = Counter((cell.method, cell.axis, cell.mode) for cell in plan.cells)
    for axis, number in (("modality", 8), ("question_type", 5)):
        assert counts["sft", axis, "no-think"] == number
        assert all(counts["grpo", axis, mode] == number for mode in MODES)
    assert all(counts["base", None, mode] == 1 for mode in MODES)
    assert counts.total() == 3 + (8 + 5) * 4
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)


def test_a_cell_trains_on_its_value_and_is_tested_on_all(plan: Plan, study: Study) -> None:
    ct = next(cell for cell in plan.cells if cell.method == "grpo" and cell.trained_on == "CT")
    train, test = load_parts(cell_recipe(study, ct).data)
    assert train == [record for record in plan.train if record.modality == "CT"]
    asked = dict(plan.asked(ct))
    assert list(asked) == ["image", "blank", "shuffled_other", "permuted", "repeat"]
    assert asked["image"] == asked["permuted"] == asked["repeat"] == plan.test
    assert asked["blank"] == asked["shuffled_other"] == test
    assert {record.modality for record in plan.test} == {"CT", "OCT"}
    assert {record.group for record in train}.isdisjoint(record.group for record in plan.test)
    oct_cell = next(cell for cell in plan.cells if cell.method == "grpo" and cell.trained_on == "OCT")
    assert list(dict(plan.asked(oct_cell))) == ["image", "blank", "shuffled_other"]  # flips: one model a method
    base = next(cell for cell in plan.cells if cell.method == "base")
    assert all(records == plan.test for _, records in plan.asked(base))


def test_the_cap_draws_from_each_cell(phantoms: Path, tmp_path: Path) -> None:
    text = MICRO.replace('["modality"]', '["modality", "question_type"]').replace('modalities = ["CT", "OCT"]', "")
    full = make_plan(load_study(_write(tmp_path, text), str(phantoms)))
    capped = make_plan(load_study(_write(tmp_path, "records_per_cell = 1\n" + text), str(phantoms)))
    again = make_plan(load_study(_write(tmp_path, "records_per_cell = 1\n" + text), str(phantoms)))
    counts = Counter((record.modality, record.question_type) for record in capped.test)
    assert set(counts) == {(record.modality, record.question_type) for record in full.test}
    assert set(counts.values()) == {1} and len(capped.test) < len(full.test)
    assert capped.test == again.test and capped.train == full.train


def _write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


def test_some_values_are_trained_on_and_all_are_tested(phantoms: Path, tmp_path: Path) -> None:
    text = MICRO.replace('"sft", "grpo", "looking"', '"sft"').replace('"*-ct-*", "*-oct-grpo-*"', "")
    text = text.replace('name = "micro"', 'name = "micro"\ntrained_on = ["OCT"]')
    text = text.replace("faithfulness = 5\n", "")
    study = load_study(_write(tmp_path, text), str(phantoms))
    plan = make_plan(study)
    assert [cell.trained_on for cell in plan.cells if cell.axis] == ["OCT"]
    assert {record.modality for record in plan.test} == {"CT", "OCT"}
    run_study(study, tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [prior["trained_on"] for prior in results["priors"]] == ["OCT"]  # the bar of what was trained, nothing else
    rows = list(csv.DictReader((tmp_path / "out/tables/matrix-modality-sft-no-think.csv").open()))
    assert [(row["trained_on"], row["tested_on"]) for row in rows if row["trained_on"] == "OCT"][:2] == [
        ("OCT", "CT"),
        ("OCT", "OCT"),
    ]
    misspelt = load_study(_write(tmp_path, text.replace('["OCT"]', '["oct"]')), str(phantoms))
    with pytest.raises(MedR1Error, match="trained_on names 'oct'; these can be trained on: CT, OCT"):
        make_plan(misspelt)


def test_a_control_that_cannot_be_made_stops_the_study_at_once(phantoms: Path, tmp_path: Path) -> None:
    path = _write(tmp_path, MICRO.replace('modalities = ["CT", "OCT"]', 'modalities = ["CT"]'))
    with pytest.raises(MedR1Error, match="a modality other than CT"):
        run_study(load_study(path, str(phantoms)), tmp_path / "out")


def timeless(value: Any) -> Any:
    """Without the fields that hold seconds, and without Trainer's mean loss since the last resume."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not re.search("second|runtime|train_loss", key)}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def content(study: Study, out: Path) -> dict[str, Any]:
    """Each file of a finished study, its report drawn again as if every cell had taken a second."""
    for path in (out / "cells").iterdir():
        path.write_text('{"done": true, "seconds": 1.0}')
    run_study(study, out)
    files: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        files[name] = timeless(read_jsonl(path)) if path.suffix == ".jsonl" else path.read_text()
        if name.startswith("evaluations/"):  # a resumed evaluation may ask in another order
            files[name].sort(key=lambda row: row["key"])
    return files


def test_killed_twice_and_resumed_gives_the_same(whole: Path, study: Study, study_file: Path, phantoms: Path) -> None:
    out = whole.parent / "killed"
    command = [sys.executable, "-m", "medr1", "study", str(study_file), "--data", str(phantoms), "--out", str(out)]
    for landmark in (
        "runs/modality-ct-sft-no-think-seed0/checkpoint-1",
        "evaluations/modality-ct-grpo-think-seed0-image.jsonl",
    ):
        process = subprocess.Popen(command, cwd=ROOT / "src", stderr=subprocess.DEVNULL)
        while not (out / landmark).exists():
            assert process.poll() is None, f"ended before {landmark}"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "results.json").exists()
    run_study(study, out)
    assert content(study, out) == content(study, whole)


def test_two_processes_share_the_cells(whole: Path, study: Study, study_file: Path, phantoms: Path) -> None:
    """The same command twice at once: each cell is made once, and the last to end writes what one would have."""
    out = whole.parent / "shared"
    command = [sys.executable, "-m", "medr1", "study", str(study_file), "--data", str(phantoms), "--out", str(out)]
    both = [
        subprocess.Popen(command, cwd=ROOT / "src", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    made = [re.findall("; now (\\S+)", errors) for _, errors in said]
    assert all(made) and Counter(itertools.chain(*made)) == Counter(
        path.stem for path in (whole / "cells").glob("*.json")
    )
    assert any("report.html" in printed for printed, _ in said)
    assert not [*out.rglob(".*.lock")]
    assert content(study, out) == content(study, whole)


def test_what_others_are_at_is_left_to_them(
    whole: Path, study: Study, study_file: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with folders of their own and one where cells are kept; the last to end writes the report."""
    no_model(monkeypatch)
    keep, out, name = tmp_path / "kept", tmp_path / "out", "modality-ct-grpo-think-seed0"
    run_study(study, whole, keep)
    command = ["study", study_file, "--data", phantoms, "--out", out, "--keep", keep]
    with alone(keep / "cells" / name):
        assert run_study(study, out, keep) == {"elsewhere": [name]}
        said = CliRunner().invoke(app, [*map(str, command)])
    assert said.exit_code == 0 and f"with other processes: {name}. The last to end writes the report" in said.stdout
    assert not (out / "report.html").exists() and len([*(out / "cells").glob("*.json")]) == 5
    assert run_study(study, out, keep)["report"] == str(out / "report.html")


def test_ctrl_c_leaves_whole_files_and_the_time_spent(
    study: Study, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_vlm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path)
    first = plan.cells[0]
    count = json.loads((tmp_path / "cells" / f"{first.name}.json").read_text())
    assert count["done"] is False and count["seconds"] >= 0
    assert {cell["state"] for cell in list_cells(study, tmp_path)} == {"waiting"}


def test_finished_cells_are_skipped_without_a_model(whole: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    before = (whole / "results.json").read_text()
    monkeypatch.setattr(module, "load_vlm", fail)
    monkeypatch.setattr(module, "train", fail)
    run_study(study, whole)
    assert (whole / "results.json").read_text() == before


def test_results_say_what_was_done(whole: Path, plan: Plan, study: Study) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["study"] == study.model_dump(mode="json")
    assert [(run["method"], run["trained_on"]) for run in results["runs"]] == [
        ("sft", "CT"), ("grpo", "CT"), ("looking", "CT"), ("grpo", "OCT"),
    ]  # fmt: skip
    assert {(run["steps"], run["examples"]) for run in results["runs"]} == {(2, 4)}  # SFT examples are GRPO's prompts
    assert all((whole / run["folder"] / "log.jsonl").is_file() for run in results["runs"])
    assert len(results["evaluations"]) == 2 * 5 + 3 * 5 + 3
    for entry in results["evaluations"]:
        rows = read_jsonl(whole / entry["rows"])
        own = [r for r in plan.test if entry["trained_on"] in (None, r.modality)]
        expected = plan.test if entry["condition"] in ("image", "permuted", "repeat") else own
        assert [row["id"] for row in sorted(rows, key=lambda row: row["id"])] == [record.id for record in expected]
        assert {(row["condition"], row["mode"]) for row in rows} == {(entry["condition"], entry["mode"])}
        assert {row["model"] for row in rows}.isdisjoint({str(whole)})
    ct = [record for record in plan.train if record.modality == "CT"]
    assert results["priors"][0] == {
        "axis": "modality", "trained_on": "CT", "table": text_only_prior(ct, plan.test),
    }  # fmt: skip
    assert results["examples"]["modality"]["CT"]["train"] == len(ct)


def test_weights_go_and_logs_stay(whole: Path, study: Study, tmp_path: Path) -> None:
    assert not [*(whole / "runs").glob("*/model"), *(whole / "runs").glob("*/checkpoint-*")]
    assert len([*(whole / "runs").glob("*-grpo-*/completions.jsonl")]) == 2
    looking = load_config(whole / "runs/modality-ct-looking-think-seed0/recipe.toml")
    assert (looking.method, looking.draws.weights) == ("grpo", "needs_image")
    cell = Cell("grpo", "think", axis="modality", trained_on="CT", seed=0)
    for name in ("model", "checkpoint-2", ".model.saving"):
        (tmp_path / "runs" / cell.name / name).mkdir(parents=True)
    module._discard(study.model_copy(update={"keep_models": True}), cell, tmp_path)
    assert [path.name for path in (tmp_path / "runs" / cell.name).iterdir()] == ["model"]


def test_another_study_or_other_data_is_refused(whole: Path, study_file: Path, phantoms: Path, tmp_path: Path) -> None:
    path = _write(tmp_path, MICRO.replace("1e-4", "2e-4"))
    with pytest.raises(MedR1Error, match=r"whole: holds results of another study \(see study\.json\)"):
        run_study(load_study(path, str(phantoms)), whole)
    text = 'baselines = ["openai:one@http://localhost:1/v1"]\n' + MICRO
    states = {
        cell["cell"]: cell["state"] for cell in list_cells(load_study(_write(tmp_path, text), str(phantoms)), whole)
    }
    assert Counter(states.values()) == {"done": 6, "waiting": 2}
    file = phantoms / "QA_information" / "Open-access" / "Phantom CT.json"
    before = file.read_text()
    try:
        file.write_text(before.replace("What ", "Which ", 1))
        assert file.read_text() != before
        with pytest.raises(MedR1Error, match="holds results of other data"):
            list_cells(load_study(study_file, str(phantoms)), whole)
    finally:
        file.write_text(before)


def test_the_weights_of_a_local_base_are_part_of_the_study(plan: Plan, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    recipe = plan.study.recipe
    local = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(base)})})
    plan = replace(plan, study=plan.study.model_copy(update={"recipe": local}))
    for folder in (base, out):
        folder.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    (out / "study.json").write_text(there := module._identity(plan, out))
    assert module._identity(plan, out) == there
    (base / "model.safetensors").write_bytes(b"built anew")
    with pytest.raises(MedR1Error, match=r"out: holds results of another base .*; choose another --out"):
        module._identity(plan, out)
    for foreign in ("[]", '{"a": 1}', '{"study": {}, "data_sha256": ""}'):
        (out / "study.json").write_text(foreign)
        with pytest.raises(MedR1Error, match="out: holds results of another study"):
            module._identity(plan, out)


def test_a_model_sees_images_as_large_as_in_its_training(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def loaded(name: str, **settings: Any) -> None:
        asked[name] = settings["max_pixels"]
        raise InterruptedError

    monkeypatch.setattr(module, "load_vlm", loaded)
    text = MICRO + "[recipe.model]\nmax_pixels = 9000\n[grpo.model]\nmax_pixels = 5000\n"
    plan = make_plan(load_study(_write(tmp_path, text), str(phantoms)))
    for cell in plan.cells:
        (tmp_path / "runs" / cell.name / "model").mkdir(parents=True)
        with pytest.raises(InterruptedError):
            module._answer(plan, cell, tmp_path)
    assert {Path(name).parent.name: pixels for name, pixels in asked.items()} == {
        "": 9000,
        "modality-ct-sft-no-think-seed0": 9000,
        "modality-ct-grpo-think-seed0": 5000,
        "modality-ct-looking-think-seed0": 5000,
        "modality-oct-grpo-think-seed0": 5000,
    }


def test_list_tells_the_states(whole: Path, study: Study, study_file: Path, phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "evaluations" / "modality-ct-sft-no-think-seed0-blank.jsonl").unlink()
    for folder in ("runs", "faithfulness"):
        shutil.rmtree(out / folder / "modality-ct-looking-think-seed0")
    for name in ("modality-ct-looking-think-seed0", "modality-oct-grpo-think-seed0"):
        (out / "cells" / f"{name}.json").unlink()
        for path in (out / "evaluations").glob(f"{name}-*"):
            path.unlink()
    cells = {cell["cell"]: cell for cell in list_cells(study, out)}
    assert {name: cell["state"] for name, cell in cells.items()} == {
        "base-think": "done",
        "base-no-think": "done",
        "modality-ct-sft-no-think-seed0": "evaluating",
        "modality-ct-grpo-think-seed0": "done",
        "modality-ct-looking-think-seed0": "waiting",
        "modality-oct-grpo-think-seed0": "training",
    }
    assert cells["base-think"]["seconds"] > 0 and cells["base-think"]["disk_bytes"] > 1000
    assert cells["modality-ct-looking-think-seed0"]["seconds"] is None
    arguments = ["study", str(study_file), "--data", str(phantoms), "--out", str(out), "--list", "--json"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0 and "3 of 6 cells done" in said.stdout
    assert json.loads(said.stdout.splitlines()[-1])["cells"] == list(cells.values())


def test_a_server_that_cannot_be_named_so_stops_the_study_at_once(phantoms: Path, tmp_path: Path) -> None:
    """Before anything is trained, and before a password stands in a file."""
    text = 'baselines = ["openai:Big/One@http://me:secret@localhost:1/v1"]\n' + MICRO
    with pytest.raises(MedR1Error, match="baselines openai:Big/One@…: name the URL without password") as caught:
        run_study(load_study(_write(tmp_path, text), data=str(phantoms)), tmp_path / "out", tmp_path / "kept")
    assert "secret" not in str(caught.value) and sorted(tmp_path.iterdir()) == [tmp_path / "study.toml"]


def test_baselines_go_to_their_server_in_every_mode(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'baselines = ["openai:Big/One@http://localhost:1/v1"]\n' + MICRO
    plan = make_plan(load_study(_write(tmp_path, text), str(phantoms)))
    cells = [cell for cell in plan.cells if cell.method == "baseline"]
    assert [cell.mode for cell in cells] == ["think", "no-think"]
    calls = []

    def record_call(name: str, records: list, *, out: Path, **settings: Any) -> None:
        calls.append((name, len(records), out.name, settings))
        append_jsonl(out, [{"key": "1"}])

    monkeypatch.setattr(medr1.evaluation.remote, "evaluate_remote", record_call)
    (tmp_path / "evaluations").mkdir()
    module._answer(plan, cells[0], tmp_path)
    name = "baseline-openai-big-one-http-localhost-1-v1-think"
    settings = {"mode": "think", "max_new_tokens": 6, "condition": "image", "seed": 0, "max_pixels": 0}
    assert calls == [("openai:Big/One@http://localhost:1/v1", len(plan.test), f"{name}-image.jsonl", settings)]


def test_a_studys_page_says_what_it_is_not_for(whole: Path) -> None:
    assert "not for clinical use" in (whole / "report.html").read_text()


def test_reasoning_is_edited_where_the_study_asks_for_it(whole: Path, plan: Plan, study: Study) -> None:
    """Of the base and of the first GRPO and looking models, on the same questions."""
    found = json.loads((whole / "results.json").read_text())["faithfulness"]
    trained = [f"modality-ct-{method}-think-seed0" for method in ("grpo", "looking")]
    assert [entry["cell"] for entry in found] == ["base-think", *trained]
    assert {entry["n"] for entry in found} == {5}
    assert "Is the reasoning used?" in (whole / "report.html").read_text(encoding="utf-8")
    plain = replace(plan, study=study.model_copy(update={"faithfulness": 0}))
    assert not any(plain.edited(cell) for cell in plan.cells)


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a model was loaded")

    for name in ("load_vlm", "train"):
        monkeypatch.setattr(module, name, fail)


def test_kept_cells_are_taken_up_elsewhere(
    whole: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pages and tables to the byte without a model; and both tables again, counted from what is kept."""
    no_model(monkeypatch)
    keep, out = tmp_path / "kept", tmp_path / "another/place"
    run_study(study, whole, keep)
    kept = {path.name: path.read_bytes() for path in (keep / "cells").iterdir()}
    assert {cell["state"] for cell in list_cells(study, out, keep)} == {"kept"}
    run_study(study, out, keep)
    pages = [*(whole / "tables").iterdir(), *(whole / name for name in ("report.html", "samples.md", "results.json"))]
    for path in (*pages, whole / "model-card.md", whole / "tripod-llm.md"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    for path in (whole / "evaluations").iterdir():
        before, after = (
            {row["id"]: _known(row, folder) for row in read_jsonl(folder / path.name)}
            for folder in (path.parent, out / "evaluations")
        )
        assert before == after
    assert kept == {path.name: path.read_bytes() for path in (keep / "cells").iterdir()}
    assert study.recipe.data.path not in (keep / "study.json").read_text()
    count_again(keep, out / "tables")
    name = "modality-ct-grpo-think-seed0"
    with pytest.raises(AssertionError):  # it can fail
        count_again(keep, out / "tables", {name: kept_cells(keep)[name, "image"][1:]})


def test_what_is_done_stays_done_whichever_cell_is_first(
    whole: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first GRPO cell more is asked; another one that is done is not trained again for that, here or kept."""
    no_model(monkeypatch)
    done, keep, name = tmp_path / "done", tmp_path / "kept", "modality-ct-grpo-think-seed0"
    shutil.copytree(whole, done)
    run_study(study, done, keep)
    kept = {path.name: path.read_bytes() for path in (keep / "cells").iterdir()}
    for out in (done, tmp_path / "new"):
        turned = study.model_copy(update={"cells": study.cells[::-1]})
        assert {cell["state"] for cell in list_cells(turned, out, keep)} <= {"done", "kept"}
        run_study(turned, out, keep)
        results = json.loads((out / "results.json").read_text())
        permuted = [entry["rows"] for entry in results["evaluations"] if entry["condition"] == "permuted"]
        assert f"evaluations/{name}-permuted.jsonl" in permuted and len(permuted) == 5  # still of that cell
        assert name in [entry["cell"] for entry in results["faithfulness"]]
        assert "was asked so: the first" not in (out / "report.html").read_text(encoding="utf-8")
        run_study(study.model_copy(update={"cells": ("*-oct-grpo-*", "*-ct-sft-*")}), out, keep)
        assert "No model trained by GRPO was asked so: the first" in (out / "report.html").read_text(encoding="utf-8")
    assert kept == {path.name: path.read_bytes() for path in (keep / "cells").iterdir()}


def test_a_part_of_what_a_first_cell_is_asked_is_no_number(
    whole: Path, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while its options were permuted, and then another cell was put first, here and where it is kept."""
    monkeypatch.setattr(module, "_answer", lambda *arguments: None)  # all else is answered
    out, keep, name = tmp_path / "out", tmp_path / "kept", "modality-ct-grpo-think-seed0"
    shutil.copytree(whole, out)
    (out / "cells" / f"{name}.json").unlink()
    (out / "evaluations" / f"{name}-repeat.jsonl").unlink()
    begun = out / "evaluations" / f"{name}-permuted.jsonl"
    part = "".join(begun.read_text().splitlines(keepends=True)[:2])
    begun.write_text(part)
    turned = study.model_copy(update={"cells": study.cells[::-1]})
    run_study(turned, out, keep)
    other = tmp_path / "other/evaluations"
    other.mkdir(parents=True)
    (other / begun.name).write_text(part)
    run_study(turned, other.parent, keep)
    for folder in (out, other.parent):
        evaluations = json.loads((folder / "results.json").read_text())["evaluations"]
        asked = {e["condition"] for e in evaluations if e["rows"].startswith(f"evaluations/{name}-")}
        assert asked == {"image", "blank", "shuffled_other"}


def _known(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    images = [(folder / path).resolve() for path in row["images"]]
    return {**row, "images": images, "key": None, "seconds": None}


def test_a_cell_is_kept_as_it_is_done_and_not_trained_again(
    whole: Path, study: Study, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "kept"
    shutil.copytree(whole, tmp_path / "begun")
    (tmp_path / "begun/cells/modality-oct-grpo-think-seed0.json").unlink()  # as if killed there
    no_model(monkeypatch)
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_study(study, tmp_path / "begun", keep)
    assert len([*(keep / "cells").iterdir()]) == len(plan.cells) - 1
    states = Counter(cell["state"] for cell in list_cells(study, tmp_path / "new", keep))
    assert states == {"kept": len(plan.cells) - 1, "waiting": 1}
    more = study.model_copy(
        update={"cells": ("*-oct-looking-*", *study.cells)}
    )  # then its options are permuted instead
    states = {cell["cell"]: cell["state"] for cell in list_cells(more, tmp_path / "new", keep)}
    assert {name for name, state in states.items() if state == "waiting"} == {
        "modality-oct-looking-think-seed0",
        "modality-oct-grpo-think-seed0",
    }
    (keep / "cells/base-think.json.gz").write_bytes(b"torn")
    with pytest.raises(MedR1Error, match=r"base-think\.json\.gz: cannot be read as a kept cell") as error:
        run_study(study, tmp_path / "new", keep)
    assert "\n" not in str(error.value)


def test_cells_of_another_study_are_not_taken_up(whole: Path, study: Study, phantoms: Path, tmp_path: Path) -> None:
    there = json.loads((whole / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps(there | {"base_sha256": "of other weights"}))
    with pytest.raises(MedR1Error, match=r"holds results of another base .*; choose another --keep"):
        list_cells(study, tmp_path / "out", tmp_path)
    other = load_study(_write(tmp_path, MICRO.replace("1e-4", "2e-4")), str(phantoms))
    with pytest.raises(MedR1Error, match=r"holds results of another study \(see study\.json\); choose another --keep"):
        run_study(other, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_where_data_lie_and_which_cells_there_are_may_change(whole: Path, study_file: Path, phantoms: Path) -> None:
    moved = phantoms.parent / "moved"
    shutil.copytree(phantoms, moved)
    there = json.loads((whole / "study.json").read_text())
    del there["study"]["grpo"]["grpo"]["kl_clamp"]  # as written before that field was there
    (whole / "study.json").write_text(json.dumps(there))
    fewer = load_study(study_file, str(moved)).model_copy(update={"cells": ("*-ct-*",)})
    assert [cell["state"] for cell in list_cells(fewer, whole)] == ["done"] * 5
