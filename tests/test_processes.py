"""Two processes (gloo, CPU) against one: DDP and FSDP2, GRPO and SFT, checkpoints across them, and what may go wrong.

Models are float64, so that rounding of another order of sums cannot change a sampled token or hide a real difference.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes_worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_training import LETTERS, LOOKING, OBJECTIVES
from tiny_vlms import tiny_vlm

from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.errors import MedR1Error
from medr1.processes import agree, gather, is_first

ROOT = Path(__file__).parents[1]
BASE = {"optimizer.prompts_per_step": 4, "log.eval_every": 2, "log.eval_records": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": LETTERS | {"grpo.beta": 0.0, "data.test_fraction": 0.7, "log.looking_every": 2, "log.looking_records": 3},
    "reference": LETTERS | {"grpo.beta": 0.1, "optimizer.gradient_checkpointing": True},
    "lora": {"model.lora_rank": 2, "grpo.beta": 0.1, "grpo.rewards": {"processes_worker:unlike_the_step": 1.0}},
    "two-updates": LETTERS
    | {
        "grpo.num_iterations": 2,
        "grpo.beta": 0.0,
        "grpo.aggregate": "token",
        "model.train_vision": False,
        "optimizer.prompts_per_forward": 1,
    },
    "sft": {"method": "sft", "rollout.mode": "no-think", "optimizer.prompts_per_forward": 1},
    **OBJECTIVES,
    "looking": LOOKING | {"optimizer.prompts_per_forward": 1},
}
RESUMED = ("reference", "sft")
WHOLE = ("gspo", "cispo", "draws")
"""Recipes that are not sharded too: what is new in them is the loss alone, or which prompts are drawn."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of images and questions; the model to start from lies beside it, since loaded models are saved alike."""
    folder = tmp_path_factory.mktemp("data")
    tiny_vlm("qwen2_vl", dtype=torch.float64).core.save_pretrained(folder / "base")
    return write_phantoms(folder / "phantoms", num_images=24, seed=1)


def launch(*command: str | Path, sharded: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in two processes; its launcher must end within twenty minutes."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        env=os.environ | settings | (SHARDED if sharded else {}) | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def launch_jobs(jobs: list[dict[str, Any]], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return launch(ROOT / "tests" / "processes_worker.py", folder / "jobs.json", **options)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall("medr1: .*", done.stderr)


@pytest.fixture(scope="module")
def one(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs of one process, by name of the recipe."""
    folder = tmp_path_factory.mktemp("one")
    for name, recipe in RECIPES.items():
        processes_worker.run({"data": str(phantoms), "recipe": BASE | recipe, "out": str(folder / name)})
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request: pytest.FixtureRequest, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with the same runs of two processes, one that they left at step 3, and one process's that they end."""
    folder = tmp_path_factory.mktemp(request.param)
    jobs = [
        {"data": str(phantoms), "recipe": BASE | recipe, "out": str(folder / name)}
        for name, recipe in RECIPES.items()
        if request.param == "ddp" or name not in WHOLE
    ]
    for name in RESUMED:
        left = {"data": str(phantoms), "recipe": BASE | RECIPES[name], "out": str(folder / f"one-left-{name}")}
        processes_worker.run(left | {"stop": True})
        jobs += [left, left | {"stop": True, "out": str(folder / f"two-left-{name}")}]
    short = BASE | {"grpo.beta": 0.0, "optimizer.steps": 2, "log.eval_every": 0}
    recipe = short | {"grpo.rewards": {"processes_worker:only_second_learns": 1.0}}
    jobs.append({"data": str(phantoms), "recipe": recipe, "out": str(folder / "only-second-learns")})
    spoil = {"spoil": "small_beside_large_image", "out": str(folder / "ragged")}
    jobs.append({"data": str(phantoms), "recipe": short | LETTERS} | spoil)
    done = launch_jobs(jobs, folder, sharded=request.param == "fsdp2")
    assert done.returncode == 0, done.stderr[-4000:]
    yield folder


def assert_same_run(expected: Path, run: Path, bound: float = 1e-5) -> None:
    """The same curves, rollouts, evaluations and weights."""
    rows, expected_rows = read_jsonl(run / "log.jsonl"), read_jsonl(expected / "log.jsonl")
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        timeless = [name for name in row if not re.search("second|runtime|flos|train_loss", name)]
        assert [row[name] for name in timeless] == pytest.approx([expected_row[name] for name in timeless], abs=bound)
        assert row.keys() == expected_row.keys()
    if (expected / "completions.jsonl").exists():
        assert read_jsonl(run / "completions.jsonl") == read_jsonl(expected / "completions.jsonl")
    for step in (2, 4):
        answers, expected_answers = (read_jsonl(path / f"eval-step-{step}.jsonl") for path in (run, expected))
        assert {row["id"]: row["reply"] for row in answers} == {row["id"]: row["reply"] for row in expected_answers}
        assert len(answers) == len(expected_answers)
    weights, expected_weights = (load_file(next((path / "model").glob("*.safetensors"))) for path in (run, expected))
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=bound, rtol=0)
    left = {path.name for path in run.iterdir()}
    assert left == {path.name for path in expected.iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_do_what_one_does(name: str, one: Path, two: Path) -> None:
    if (two / name).exists() or name not in WHOLE:  # sharded, the loss is that of DDP and is not run again
        assert_same_run(one / name, two / name)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_one_left_is_ended_by_two(name: str, one: Path, two: Path) -> None:
    assert_same_run(one / name, two / f"one-left-{name}")


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_two_left_is_ended_by_one(name: str, one: Path, two: Path, phantoms: Path) -> None:
    run = two / f"two-left-{name}"
    assert not (run / "model").exists() and (run / "checkpoint-2" / "rng_state_1.pth").exists()
    processes_worker.run({"data": str(phantoms), "recipe": BASE | RECIPES[name], "out": str(run)})
    assert_same_run(one / name, run)


def test_groups_that_learn_in_one_process_only(two: Path) -> None:
    rows = [row for row in read_jsonl(two / "only-second-learns" / "log.jsonl") if "reward" in row]
    assert len(rows) == 2
    assert all(0.5 <= row["zero_variance_groups"] < 1 for row in rows)
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in rows)


def test_one_token_beside_many_and_a_small_beside_a_large_image(two: Path) -> None:
    rows = [row for row in read_jsonl(two / "ragged" / "log.jsonl") if "reward" in row]
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    lengths = [row["tokens"] for row in read_jsonl(two / "ragged" / "completions.jsonl") if row["step"] == 1]
    assert lengths[:6] == [1] * 6 and max(lengths[6:]) > 1  # two prompts with three completions in each process


def test_a_killed_process_ends_all_and_the_run_goes_on(phantoms: Path, one: Path, tmp_path: Path) -> None:
    job = {"data": str(phantoms), "recipe": BASE | RECIPES["reference"], "out": str(tmp_path / "run")}
    done = launch_jobs([job | {"spoil": "killed_in_step_3"}], tmp_path)
    assert done.returncode != 0
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and not (tmp_path / "run" / "model").exists()
    processes_worker.run(job)
    assert_same_run(one / "reference", tmp_path / "run")


MISTAKES = {
    "": "optimizer.prompts_per_step = 3 cannot be divided among 2 processes",
    "second_cannot_read_an_image": "gone.png",
    "second_rewards_nan": "step 1: reward 'judge' gave nan for a reply to record",
    "second_has_no_loss": "step 1: the loss is nan, at records",
    "first_has_a_full_disk": "checkpoint-2: cannot be written",
}
"""What spoils a run (nothing: its recipe), and what the one line says. A full disk stays full, and is the last."""


def test_a_mistake_of_one_process_ends_all_with_one_line(phantoms: Path, tmp_path: Path) -> None:
    """One run after the other, in processes that must agree that one is over before the next begins."""
    recipes = [BASE | RECIPES["grpo"] | ({} if spoil else {"optimizer.prompts_per_step": 3}) for spoil in MISTAKES]
    jobs = [
        {"data": str(phantoms), "recipe": recipe, "out": str(tmp_path / f"run-{spoil}"), "goes_on": True}
        | ({"spoil": spoil} if spoil else {})
        for spoil, recipe in zip(MISTAKES, recipes, strict=True)
    ]
    del jobs[-1]["goes_on"]
    done = launch_jobs(jobs, tmp_path)
    assert done.returncode != 0
    assert len(said(done)) == len(MISTAKES), done.stderr[-4000:]
    for line, expected in zip(said(done), MISTAKES.values(), strict=True):
        assert expected in line
    assert not [path for path in tmp_path.rglob("*checkpoint*")]


def test_the_command_in_two_processes(tmp_path: Path) -> None:
    train = ["-m", "medr1", "train", "--mode", "no-think", "--steps", "1", "--out", str(tmp_path / "run"), "--json"]
    for setting in ("data.num_phantoms=40", "rollout.max_new_tokens=4", "rollout.num_completions=2"):
        train += ["--set", setting]
    cache = {"MEDR1_CACHE": str(tmp_path / "cache")}
    done = launch(*train, "--set", "optimizer.prompts_per_step=2", **cache)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["steps"] == 1
    assert done.stderr.count("Research use only") == 1
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_alone_everything_is_direct() -> None:
    def mistaken() -> None:
        raise MedR1Error("a.png: is gone; bring it back")

    assert is_first() and gather(3) == [3] and agree(lambda: 4) == 4
    with pytest.raises(MedR1Error, match=r"a\.png: is gone; bring it back"):
        agree(mistaken)


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("one-gpu", DistributedType.NO, 1, 1),
        ("ddp", DistributedType.MULTI_GPU, 8, 1),
        ("fsdp2", DistributedType.FSDP, 8, 1),
        ("fsdp2-two-nodes", DistributedType.FSDP, 16, 2),
        ("zero2", DistributedType.DEEPSPEED, 8, 1),
        ("zero3", DistributedType.DEEPSPEED, 8, 1),
    ],
)
def test_accelerate_reads_each_configuration(name: str, kind: DistributedType, processes: int, machines: int) -> None:
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    if kind == DistributedType.FSDP:
        settings = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
        assert settings["version"] == 2 and settings["reshard_after_forward"]
        assert not settings["cpu_ram_efficient_loading"]
    if kind == DistributedType.DEEPSPEED:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_each_configuration_is_tested() -> None:
    files = {path.stem for path in (ROOT / "configs" / "accelerate").iterdir()}
    assert files == {"one-gpu", "ddp", "fsdp2", "fsdp2-two-nodes", "zero2", "zero3"}


def test_the_slurm_example_is_a_script() -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "configs" / "slurm" / "train.sbatch")]).returncode == 0
