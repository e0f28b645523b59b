"""Nothing that is not a number reaches weights: rewards, losses, gradients, checkpoints, loaded models and logs."""

import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import LETTERS, StopAfter, make_trainer, recipe, weights
from tiny_vlms import ragged_prompts, tiny_vlm
from transformers import TrainerCallback

from medr1.bases.export import export_model
from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, append_jsonl, read_jsonl, to_json, write_jsonl
from medr1.errors import MedR1Error, NotFiniteError
from medr1.policy.adapters import add_lora
from medr1.policy.rollouts import sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import load_vlm
from medr1.training import grpo
from medr1.training.checkpoints import FILES, newest_whole
from medr1.training.rewards import rewards_of

RECORD = Record(
    id="case-7", images=(), question="Which?", options=("CT", "MRI"), answer="B", modality=None, question_type=None,
    source="s", group="g",
)  # fmt: skip


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=24, seed=1)


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array([0.5]), 0.5),
        (torch.tensor(0.75), 0.75),
        (torch.tensor([3], dtype=torch.int64), 3.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (Decimal("0.5"), 0.5),
        (None, None),
    ],
)
def test_numbers_of_all_libraries_are_rewards(value: Any, number: float | None) -> None:
    assert rewards_of("mine", lambda *_: value, ["B"], [RECORD], "no-think") == [number]


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        1e39,  # no float32
        10**400,
        "1.0",
        b"1",
        [1.0],
        (1.0,),
        {"score": 1.0},
        1j,
        Decimal("NaN"),
        np.float32("nan"),
        np.array([0.0, 1.0]),
        np.array("1"),
        torch.tensor([0.0, 1.0]),
        torch.tensor(math.inf),
        object(),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_finite_number_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(MedR1Error, match=r"reward 'mine' gave .* record case-7") as error:
        rewards_of("mine", lambda *_: value, ["B"], [RECORD], "no-think")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_an_exception_names_reward_record_and_place() -> None:
    def broken(reply: str, record: Record, mode: str) -> float:
        return {}["a\nb"]

    with pytest.raises(MedR1Error, match=r"reward 'mine' raised KeyError.* at test_finite.py:\d+ .*case-7") as error:
        rewards_of("mine", broken, ["B"], [RECORD], "no-think")
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, KeyError)


def nan_at_ct(reply: str, record: Record, mode: str) -> float:
    return math.nan


def divides(reply: str, record: Record, mode: str) -> float:
    return 1 / 0


def for_some(reply: str, record: Record, mode: str) -> float | None:
    """Applies to replies of an even number of characters."""
    return None if len(reply) % 2 else len(reply) % 5 * 0.25


def never(reply: str, record: Record, mode: str) -> float | None:
    return None


def from_numpy(reply: str, record: Record, mode: str) -> Any:
    return np.float32(len(reply) % 2)


@pytest.mark.parametrize(("function", "said"), [("nan_at_ct", "gave nan"), ("divides", "raised ZeroDivisionError")])
def test_a_bad_reward_ends_the_run_with_its_step_before_anything_is_written(
    function: str, said: str, phantoms: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(
        recipe(phantoms, **{"grpo.rewards": {"accuracy": 1.0, f"test_finite:{function}": 1.0}}), tmp_path
    )
    before = weights(trainer).clone()
    with pytest.raises(MedR1Error, match=rf"step 1: reward 'test_finite:{function}' {said}.* record ") as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert torch.equal(before, weights(trainer))
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model").exists()
    if function == "divides":
        assert "ZeroDivisionError" in (tmp_path / "reward-error.txt").read_text()


def test_none_is_left_out_of_its_group(phantoms: Path, tmp_path: Path) -> None:
    config = recipe(phantoms, **{"grpo.rewards": {"test_finite:for_some": 2.0}, "rollout.num_completions": 6})
    make_trainer(config, tmp_path).run()
    rows = read_jsonl(tmp_path / "completions.jsonl")
    assert {row["reward"] is None for row in rows} == {True, False}
    for start in range(0, len(rows), 6):
        group = rows[start : start + 6]
        assert [row["reward"] is None for row in group] == [len(row["reply"]) % 2 == 1 for row in group]
        assert all(row["advantage"] == 0 for row in group if row["reward"] is None)
        scored = [row["reward"] for row in group if row["reward"] is not None]
        expected = [0.0] * len(scored)
        if len(set(scored)) > 1:
            deviation = np.std(scored, ddof=1) + 1e-4
            expected = [(reward - np.mean(scored)) / deviation for reward in scored]
        found = [row["advantage"] for row in group if row["reward"] is not None]
        assert found == pytest.approx(expected, abs=1e-5)
    for line in read_jsonl(tmp_path / "log.jsonl"):
        if "unscored_rate" in line:
            here = [row["reward"] for row in rows if row["step"] == line["step"]]
            assert line["unscored_rate"] == pytest.approx(here.count(None) / len(here))
            assert line["reward"] == pytest.approx(np.mean([reward for reward in here if reward is not None]))


def test_rewards_that_never_apply_change_nothing_and_say_so(
    phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(phantoms, **{"grpo.rewards": {"test_finite:never": 1.0}, "grpo.beta": 0.0})
    trainer = make_trainer(config, tmp_path)
    before = weights(trainer).clone()
    trainer.run()
    assert torch.equal(before, weights(trainer))
    assert capsys.readouterr().err.count("every reward gave None") == 1
    assert all("NaN" not in path.read_text() for path in tmp_path.glob("*.jsonl"))


def test_numpy_rewards_are_written_as_numbers(phantoms: Path, tmp_path: Path) -> None:
    make_trainer(recipe(phantoms, **{"grpo.rewards": {"test_finite:from_numpy": 1.0}}), tmp_path).run()
    rows = read_jsonl(tmp_path / "completions.jsonl")
    assert all(type(row["rewards"]["test_finite:from_numpy"]) is float for row in rows)


def test_a_public_reward_ends_in_one_line(shared: Path, tmp_path: Path) -> None:
    """As reported: the NaN of a failed judge ended in weights of nothing but NaN and exit status 0."""
    source, inputs = Path(__file__).parents[1] / "src", shared / "findings" / "inputs"
    command = [sys.executable, "-m", "medr1", "train", "--model", "tiny", "--data", "phantoms", "--mode", "no-think"]
    command += ["--steps", "1", "--set", "data.num_phantoms=40", "--set", "rollout.max_new_tokens=4"]
    command += ["--set", 'grpo.rewards={"accuracy"=1.0,"public_rewards:one_nan"=1.0}', "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{inputs}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = "medr1: step 1: reward 'public_rewards:one_nan' gave nan for a reply to record"
    assert done.stderr.count(said) == 1 and done.stderr.count("medr1: ") == 1
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("checkpoint-*"))


# --- losses, gradients, weights --------------------------------------------------------------------------------------


class Spoil(TrainerCallback):
    """Gives the weights of the model an infinity after step 2, or its gradients a NaN before the update of step 3."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.what == "weights" and state.global_step == 2:
            with torch.no_grad():
                next(kwargs["model"].parameters()).view(-1)[0] = math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.what == "update" and state.global_step == 4:
            with torch.no_grad():
                next(kwargs["model"].parameters()).view(-1)[0] = math.nan


def assert_all_finite(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path
    for path in folder.rglob("*.json*"):
        for line in path.read_text().splitlines():
            assert "NaN" not in line and "Infinity" not in line, path


@pytest.mark.parametrize(
    ("what", "overrides"),
    [
        ("weights", LETTERS),
        ("update", LETTERS),
        ("gradient", LETTERS),
        ("loss", LETTERS),
        ("weights", {"method": "sft", "rollout.mode": "no-think"}),
    ],
    ids=["weights", "update", "gradient", "loss", "sft"],
)
def test_what_is_not_finite_ends_the_run_before_it_is_written(
    what: str, overrides: dict[str, object], phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names step, records and the last good checkpoint, and the same command then ends as if nothing had been."""
    config = recipe(phantoms, **overrides)
    whole = make_trainer(config, tmp_path / "whole")
    whole.run()

    spoilt = make_trainer(config, tmp_path / "run")
    spoilt.add_callback(Spoil(what))
    learn = type(spoilt).learn

    def wrong(self: Any, model: Any, records: list[Record]) -> torch.Tensor:
        loss = learn(self, model, records)
        if self.state.global_step == 2 and what == "gradient":
            next(p for p in self.vlm.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
        return loss * math.inf if self.state.global_step == 2 and what == "loss" else loss

    with monkeypatch.context() as patch:
        patch.setattr(type(spoilt), "learn", wrong)
        with pytest.raises(MedR1Error) as error:
            spoilt.run()
    said = str(error.value)
    step = 4 if what == "update" else 3
    assert f"step {step}: " in said and "at records " in said and f"{tmp_path / 'run' / 'checkpoint-2'}" in said
    assert "\n" not in said
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "model").exists()
    assert_all_finite(tmp_path / "run")

    resumed = make_trainer(config, tmp_path / "run")
    resumed.run()
    assert torch.equal(weights(whole), weights(resumed))


def test_a_learning_rate_of_100_ends_in_one_line(phantoms: Path, tmp_path: Path) -> None:
    settings = LETTERS | {"optimizer.learning_rate": 1e38, "optimizer.schedule": "constant_with_warmup"}
    with pytest.raises(MedR1Error, match=r"step \d.* at records .*lower optimizer.learning_rate"):
        make_trainer(recipe(phantoms, **settings), tmp_path).run()
    assert_all_finite(tmp_path)


def test_a_policy_without_probabilities_is_not_sampled() -> None:
    vlm = tiny_vlm("qwen2_vl")
    with torch.no_grad():
        next(vlm.core.get_decoder().layers[0].parameters()).fill_(math.nan)
    for greedy in (True, False):
        with pytest.raises(NotFiniteError, match="next token are not finite"):
            sample(vlm, ragged_prompts(vlm), num_completions=2, max_new_tokens=3, seed=0, greedy=greedy)


# --- models that are loaded ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with one infinity in the tensor that its file calls last."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    vlm = tiny_vlm("qwen2_vl")
    vlm.core.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[max(tensors)].view(-1)[-1] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite_are_not_loaded(broken: Path, tmp_path: Path) -> None:
    for use in (lambda: load_vlm(str(broken)), lambda: export_model(str(broken), tmp_path / "out")):
        with pytest.raises(MedR1Error, match=r"(visual|model)\.\S+ holds numbers that are not finite") as error:
            use()
        assert "\n" not in str(error.value)


def test_an_adapter_that_is_not_finite_or_damaged_is_not_loaded(tmp_path: Path) -> None:
    base = tiny_vlm("qwen2_vl")
    base.core.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    vlm = add_lora(load_vlm(str(tmp_path / "base"), device="cpu"), rank=2, alpha=4)
    vlm.model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    whole = file.read_bytes()
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, file)
    with pytest.raises(MedR1Error, match=r"lora_.* holds numbers that are not finite"):
        load_vlm(str(tmp_path / "adapter"))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MedR1Error, match="adapter") as error:
        load_vlm(str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)


def test_weights_too_large_for_half_precision_are_not_exported(tmp_path: Path) -> None:
    vlm = tiny_vlm("qwen2_vl")
    with torch.no_grad():
        next(vlm.core.get_decoder().layers[0].parameters()).view(-1)[0] = 1e5  # float16 ends at 65504
    vlm.core.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "float32")
    with pytest.raises(MedR1Error, match=r"in float16: .* not finite"):
        export_model(str(tmp_path / "model"), tmp_path / "float16", dtype="float16")


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def stopped(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path, torch.Tensor]:
    """A recipe, a run of it that was left after step 3 with checkpoints of steps 1, 2 and 3, and how it should end."""
    folder = tmp_path_factory.mktemp("stopped")
    overrides: dict[str, object] = LETTERS | {"log.save_every": 1, "log.keep_checkpoints": 3, "grpo.beta": 0.0}
    whole = make_trainer(recipe(phantoms, **overrides), folder / "whole")
    whole.run()
    trainer = make_trainer(recipe(phantoms, **overrides), folder / "run")
    trainer.add_callback(StopAfter())
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return overrides, folder / "run", weights(whole)


def test_a_damaged_checkpoint_is_passed_over_whatever_is_damaged(
    stopped: tuple[dict[str, object], Path, torch.Tensor], tmp_path: Path
) -> None:
    _, left, _ = stopped
    names = sorted(path.name for path in (left / "checkpoint-2").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", FILES} <= {
        *names
    }
    for name in names:
        for harm in (half, flipped, empty, Path.unlink):
            run = tmp_path / f"{name}-{harm.__name__}"
            shutil.copytree(left, run)
            harm(run / "checkpoint-2" / name)
            found, lines = newest_whole(run)
            assert found == run / "checkpoint-1", (name, harm)
            assert len(lines) == 1 and name in lines[0]
    shutil.copytree(left, tmp_path / "untouched")
    assert newest_whole(tmp_path / "untouched") == (tmp_path / "untouched" / "checkpoint-2", [])


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    stopped: tuple[dict[str, object], Path, torch.Tensor],
    phantoms: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, left, expected = stopped
    run = tmp_path / "run"
    shutil.copytree(left, run)
    half(run / "checkpoint-2" / "optimizer.pt")
    trainer = make_trainer(recipe(phantoms, **overrides), run)
    trainer.run()
    assert torch.equal(weights(trainer), expected)
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and "checkpoint-2: optimizer.pt is damaged; going on from checkpoint-1" in said[0]
    assert [row["step"] for row in read_jsonl(run / "log.jsonl")][:4] == [1, 2, 3, 4]

    for path in run.glob("checkpoint-*"):
        (path / "model.safetensors").unlink()
    with pytest.raises(MedR1Error, match=r"checkpoint-4: model.safetensors is missing, and no other") as error:
        make_trainer(recipe(phantoms, **overrides), run).run()
    assert "\n" not in str(error.value)


# --- the same twice --------------------------------------------------------------------------------------------------


def test_the_same_command_gives_the_same_adapter_and_another_seed_another(phantoms: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)  # as whatever was drawn before
        config = recipe(phantoms, **LETTERS, **{"model.lora_rank": 2, "optimizer.seed": seed, "optimizer.steps": 1})
        trainer = make_trainer(config, tmp_path / str(number))
        trainer.run()
        found.append(load_file(tmp_path / str(number) / "model" / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_adapters_are_drawn_beside_the_stream_of_others() -> None:
    vlm = tiny_vlm("qwen2_vl")
    state = torch.get_rng_state()
    add_lora(vlm, rank=2, alpha=2, seed=9)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(MedR1Error, match=r"optimizer.seed"):
        load_config(overrides={"optimizer.seed": seed})


@pytest.mark.parametrize("log_every", [1, 3])
def test_the_log_of_a_resumed_run_is_that_of_a_whole_one(log_every: int, phantoms: Path, tmp_path: Path) -> None:
    """Also where a line spans the break: a line each 3 steps, a checkpoint each 2."""
    config = recipe(phantoms, **LETTERS, **{"log.log_every": log_every, "optimizer.steps": 5, "grpo.beta": 0.1})
    make_trainer(config, tmp_path / "whole").run()
    stopped = make_trainer(config, tmp_path / "stopped")
    stopped.add_callback(StopAfter())
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    make_trainer(config, tmp_path / "stopped").run()
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k and "runtime" not in k and "flos" not in k} for row in rows]
        for rows in (read_jsonl(tmp_path / run / "log.jsonl") for run in ("whole", "stopped"))
    ]
    assert timeless[0] == timeless[1]
    assert "train_loss" in timeless[0][-1]
    if log_every == 1:
        losses = [row["loss"] for row in timeless[0] if "loss" in row]
        assert timeless[0][-1]["train_loss"] == pytest.approx(sum(losses) / 5)


def test_a_run_that_was_killed_after_its_last_step_ends_once(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of the log is there, the model is not: the line was written a second time."""
    config = recipe(phantoms, **LETTERS, **{"optimizer.steps": 2})
    trainer = make_trainer(config, tmp_path)
    write = trainer._write_folder

    def killed(folder: Path, *, training_state: bool) -> None:
        if folder.name == "model":
            raise KeyboardInterrupt
        write(folder, training_state=training_state)

    monkeypatch.setattr(trainer, "_write_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    before = read_jsonl(tmp_path / "log.jsonl")
    assert "train_loss" in before[-1]
    make_trainer(config, tmp_path).run()
    after = read_jsonl(tmp_path / "log.jsonl")
    assert [row["step"] for row in after] == [row["step"] for row in before] == [1, 2, 2]
    assert after[-1]["train_loss"] == before[-1]["train_loss"]
    assert (tmp_path / "model").is_dir()


# --- what is computed ------------------------------------------------------------------------------------------------


def test_the_first_update_in_bfloat16_has_a_ratio_of_exactly_1(phantoms: Path, tmp_path: Path) -> None:
    """Old log-probs are the first update's own; the decoder's have other roundings."""
    settings = {"model.dtype": "bfloat16", "grpo.num_iterations": 2, "grpo.beta": 0.0, "optimizer.learning_rate": 1e-8}
    make_trainer(recipe(phantoms, **LETTERS, **settings), tmp_path).run()
    rows = [row for row in read_jsonl(tmp_path / "log.jsonl") if "ratio" in row]
    assert len(rows) == 4
    assert rows[0]["ratio"] == rows[2]["ratio"] == 1
    assert rows[1]["ratio"] == pytest.approx(1, abs=0.01)


def test_the_reference_is_asked_once_for_each_rollout(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(vlm: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("model") is None)
        return completion_logprobs(vlm, *args, **kwargs)

    monkeypatch.setattr(grpo, "completion_logprobs", counted)
    config = recipe(phantoms, **LETTERS, **{"grpo.num_iterations": 2, "grpo.beta": 0.1})
    make_trainer(config, tmp_path).run()
    assert asked.count(False) == 4 and asked.count(True) == 2


def some_groups(reply: str, record: Record, mode: str) -> float:
    """Differs within the groups of every second record alone."""
    return len(set(reply)) * 0.1 if zlib.crc32(record.id.encode()) % 2 else 0.3


@pytest.mark.parametrize("per_forward", [0, 1, 2])
def test_groups_without_a_difference_are_neither_read_nor_passed_through(
    per_forward: int, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradient is that of the plain way, float64; the vision tower's backward sees the other prompts' images."""
    settings = {
        "grpo.rewards": {"test_finite:some_groups": 1.0},
        "grpo.beta": 0.0,
        "optimizer.steps": 1,
        "optimizer.prompts_per_step": 12,
        "optimizer.prompts_per_forward": per_forward,
        "rollout.num_completions": 4,
        "rollout.max_new_tokens": 8,
    }
    config = recipe(phantoms, **settings)
    train, test = load_parts(config.data)
    trainer = grpo.GRPOTrainer(tiny_vlm("qwen2_vl", dtype=torch.float64), config, train, test, tmp_path)
    trainer.vlm.stop_token_ids = [*trainer.vlm.stop_token_ids, *range(60, 180)]  # replies of different lengths
    passed: list[int] = []
    shapes: list[tuple[int, int]] = []
    embed = trainer.vlm.core.base_model.visual.patch_embed
    embed.register_full_backward_hook(lambda module, _, grads: passed.append(len(grads[0])))

    def seen(vlm: Any, prompts: Any, ids: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append((ids.shape[1], int(mask.sum(1).max())))
        return completion_logprobs(vlm, prompts, ids, mask, **kwargs)

    monkeypatch.setattr(grpo, "completion_logprobs", seen)
    state = {name: value.clone() for name, value in trainer.vlm.model.state_dict().items()}
    gradients: dict[str, torch.Tensor] = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, control_state: Any, control: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()

    trainer.args.max_grad_norm = 1e9  # as they are
    trainer.add_callback(Take())
    trainer.run()
    experience = trainer.experience
    learning = experience.advantages_BG.abs().sum(1) > 0
    assert 2 < int(learning.sum()) < 12
    patches = [int(grid.prod()) for grid in experience.prompts.vision["image_grid_thw"]]
    learned, keys = learning.nonzero()[:, 0].tolist(), experience.prompts.image_keys
    chunks = [learned[start : start + (per_forward or 12)] for start in range(0, len(learned), per_forward or 12)]
    assert sum(passed) == sum(sum({keys[prompt]: patches[prompt] for prompt in chunk}.values()) for chunk in chunks)
    assert all(length == max(1, longest) for length, longest in shapes)
    if per_forward == 1:
        assert len({length for length, _ in shapes}) > 1

    plain = tiny_vlm("qwen2_vl", dtype=torch.float64)
    plain.model.load_state_dict(state)
    rollout, advantages = experience.rollout, experience.advantages_BG.flatten().double()
    prompts = trainer.encode(trainer.step_records)
    logp, _ = completion_logprobs(plain, prompts, rollout.completion_ids_NT, rollout.mask_NT)
    mask = rollout.mask_NT.double()
    per_row = -((logp - logp.detach()).exp() * advantages[:, None] * mask).sum(1) / mask.sum(1)
    (per_row.sum() / len(mask)).backward()
    for name, parameter in plain.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-6)


# --- files -----------------------------------------------------------------------------------------------------------


def test_json_lines_are_json_whatever_numbers_they_hold(tmp_path: Path) -> None:
    row = {"a": math.nan, "b": [1.0, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": True, "f": None, "g": 0.1 + 0.2}
    expected = {"a": None, "b": [1.0, None, {"c": [None, 2]}], "d": "NaN", "e": True, "f": None, "g": 0.1 + 0.2}
    append_jsonl(tmp_path / "new" / "a.jsonl", [row])
    write_jsonl(tmp_path / "b.jsonl", [row])

    def refuse(token: str) -> None:
        raise AssertionError(token)

    for text in (
        (tmp_path / "new" / "a.jsonl").read_text(),
        (tmp_path / "b.jsonl").read_text(),
        to_json(row, indent=1),
    ):
        assert json.loads(text, parse_constant=refuse) == expected


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_in_which_updates_vanish_are_not_trained(rank: int, phantoms: Path, tmp_path: Path) -> None:
    """A whole model in bfloat16 would end a run as it began it; an adapter over one is in float32."""
    config = recipe(phantoms, **{"model.lora_rank": rank, "optimizer.steps": 1})
    made = partial(grpo.GRPOTrainer, tiny_vlm("qwen2_vl", dtype=torch.bfloat16), config, *load_parts(config.data))
    if rank:
        made(tmp_path)
    else:
        with pytest.raises(MedR1Error, match=r"qwen2_vl: its weights are in bfloat16.*float32"):
            made(tmp_path)
