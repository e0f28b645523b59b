"""Training: data order, resume, whole checkpoints, the log, and that the reward goes up."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_rewards import RECORD
from tiny_vlms import tiny_vlm
from transformers import TrainerCallback

from medr1.config import Config, load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.training import GRPOTrainer, SFTTrainer
from medr1.training.base import RecordOrder, RecordTrainer
from medr1.training.draws import draw_order


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=24, seed=1)


def recipe(phantoms: Path, **overrides: object) -> Config:
    defaults = {
        "data.path": str(phantoms),
        "data.test_fraction": 0.34,
        "rollout.num_completions": 3,
        "rollout.max_new_tokens": 5,
        "optimizer.steps": 4,
        "optimizer.prompts_per_step": 2,
        "optimizer.learning_rate": 1e-3,
        "log.save_every": 2,
    }
    return load_config(overrides=defaults | overrides)


def letters_reward(reply: str, record: Record, mode: str) -> float:
    """A toy reward that any model can earn: the share of lower-case letters in the reply."""
    return len(re.findall("[a-z]", reply)) / max(1, len(reply))


LETTERS = {"grpo.rewards": {"test_training:letters_reward": 1.0}}


def make_trainer(config: Config, out: Path) -> RecordTrainer:
    train, test = load_parts(config.data)
    trainer = GRPOTrainer if config.method == "grpo" else SFTTrainer
    return trainer(tiny_vlm("qwen2_vl"), config, train, test, out)


def weights(trainer: RecordTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.vlm.model.parameters()])


class StopAfter(TrainerCallback):
    """As a kill would: after step 3, between the checkpoints of steps 2 and 4."""

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "overrides",
    [
        LETTERS | {"grpo.beta": 0.0},
        LETTERS | {"grpo.beta": 0.1},
        LETTERS | {"grpo.num_iterations": 2, "grpo.beta": 0.0},
        LETTERS | {"model.lora_rank": 2, "grpo.beta": 0.1},
        {"method": "sft", "rollout.mode": "no-think"},
    ],
    ids=["grpo", "reference", "two-updates", "lora", "sft"],
)
def test_a_stopped_run_resumes_to_the_same_weights_and_logs(
    overrides: dict[str, object], phantoms: Path, tmp_path: Path
) -> None:
    config = recipe(phantoms, **overrides)
    whole = make_trainer(config, tmp_path / "whole")
    before = weights(whole).clone()
    whole.run()
    assert not torch.equal(before, weights(whole))

    stopped = make_trainer(config, tmp_path / "stopped")
    stopped.add_callback(StopAfter)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make_trainer(config, tmp_path / "stopped")
    resumed.run()

    assert torch.equal(weights(whole), weights(resumed))
    for name in ("log.jsonl", "completions.jsonl"):
        if (tmp_path / "whole" / name).exists():
            timeless = [
                [
                    {k: v for k, v in row.items() if "second" not in k and "runtime" not in k}
                    for row in read_jsonl(tmp_path / run / name)
                ]
                for run in ("whole", "stopped")
            ]
            assert [row["step"] for row in timeless[0]] == [row["step"] for row in timeless[1]]
            if name == "completions.jsonl":
                assert timeless[0] == timeless[1]


def test_splitting_a_step_into_forwards_changes_nothing(phantoms: Path, tmp_path: Path) -> None:
    results = []
    for size in (0, 1):
        config = recipe(
            phantoms,
            **LETTERS,
            **{"optimizer.prompts_per_step": 3, "optimizer.steps": 1, "optimizer.prompts_per_forward": size},
        )
        trainer = make_trainer(config, tmp_path / str(size))
        trainer.run()
        results.append(weights(trainer))
    # Adam's first step is the sign of the gradient, so that any real difference would be of the size of the step.
    assert (results[0] - results[1]).abs().median() < 1e-7


class Gradients(TrainerCallback):
    """What the optimizer is given in the first step."""

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        model: torch.nn.Module = kwargs["model"]  # type: ignore[assignment]
        self.by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_bfloat16_gives_every_weight_its_gradient(phantoms: Path, tmp_path: Path) -> None:
    """Whether prompts are read with gradient beside tokens sampled without, or apart: casts of weights are kept."""
    found = []
    for once in (True, False):
        settings = {
            "model.dtype": "bfloat16",
            "optimizer.steps": 1,
            "grpo.beta": 0.0,
            "optimizer.prompts_per_step": 1,
            "rollout.num_completions": 8,
        }
        trainer = make_trainer(recipe(phantoms, **LETTERS, **settings), tmp_path / str(once))
        assert trainer.reads_prompts_once
        trainer.reads_prompts_once = once
        trainer.add_callback(gradients := Gradients())
        trainer.run()
        found.append(gradients.by_name)
        assert all(parameter.dtype == torch.float32 for parameter in trainer.vlm.model.parameters())
    assert found[0].keys() == found[1].keys()
    once, apart = (torch.cat([gradient.flatten() for gradient in of.values()]) for of in found)
    assert torch.nn.functional.cosine_similarity(once, apart, dim=0) > 0.999


def test_reward_goes_up(phantoms: Path, tmp_path: Path) -> None:
    config = recipe(
        phantoms,
        **LETTERS,
        **{
            "optimizer.steps": 25,
            "optimizer.learning_rate": 3e-3,
            "rollout.num_completions": 8,
            "grpo.beta": 0.0,
        },
    )
    trainer = make_trainer(config, tmp_path)
    trainer.run()
    rewards = [row["reward"] for row in read_jsonl(tmp_path / "log.jsonl") if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_sft_learns_the_answer_format(phantoms: Path, tmp_path: Path) -> None:
    settings = {"rollout.mode": "no-think", "optimizer.steps": 60, "optimizer.learning_rate": 3e-3}
    config = recipe(phantoms, method="sft", **settings)
    trainer = make_trainer(config, tmp_path)
    trainer.run()
    losses = [row["loss"] for row in read_jsonl(tmp_path / "log.jsonl") if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_log_and_completions_say_what_happened(phantoms: Path, tmp_path: Path) -> None:
    config = recipe(phantoms, **{"log.eval_every": 2, "log.eval_records": 4, "grpo.beta": 0.04})
    make_trainer(config, tmp_path).run()
    rows = read_jsonl(tmp_path / "log.jsonl")
    first = rows[0]
    for name in (
        "loss", "reward", "reward_accuracy", "reward_format", "zero_variance_groups", "kl", "entropy", "clipped_low",
        "clipped_high", "completion_tokens", "truncated_rate", "unparsed_rate", "format_rate", "tokens_per_second",
    ):  # fmt: skip
        assert name in first, name
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the policy is still the reference
    assert first["ratio"] == 1
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [2, 4]
    assert len(read_jsonl(tmp_path / "eval-step-4.jsonl")) == 4
    completions = read_jsonl(tmp_path / "completions.jsonl")
    assert len(completions) == 4 * 2 * 3  # steps, prompts, completions
    assert {"step", "id", "reply", "outcome", "reward", "advantage"} <= completions[0].keys()


def test_groups_without_a_difference_change_nothing(phantoms: Path, tmp_path: Path) -> None:
    config = recipe(phantoms, **{"grpo.rewards": {"test_training:equal_reward": 1.0}, "grpo.beta": 0.0})
    trainer = make_trainer(config, tmp_path)
    before = weights(trainer).clone()
    trainer.run()
    assert torch.equal(before, weights(trainer))
    assert all(row["zero_variance_groups"] == 1 for row in read_jsonl(tmp_path / "log.jsonl") if "reward" in row)


def equal_reward(reply: str, record: Record, mode: str) -> float:
    return 0.1


def test_frozen_vision_stays_and_the_rest_moves(phantoms: Path, tmp_path: Path) -> None:
    config = recipe(phantoms, **LETTERS, **{"model.train_vision": False, "grpo.beta": 0.0})
    trainer = make_trainer(config, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.vlm.model.named_parameters()}
    trainer.run()
    moved = {
        name for name, parameter in trainer.vlm.model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert moved and not any("visual" in name for name in moved)


def test_order_drops_no_record_and_repeats_batches() -> None:
    def passes() -> Iterator[int]:
        return draw_order([RECORD] * 5, torch.ones(5), "off", seed=3)

    order = list(RecordOrder(passes, num_steps=5, batch=2, repeats=1))
    assert len(order) == 10
    assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]  # two whole passes, whatever the batch
    twice = list(RecordOrder(passes, num_steps=4, batch=2, repeats=2))
    assert twice == [*order[:2], *order[:2], *order[2:4], *order[2:4]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rollout.num_completions": 1}, "num_completions is 1"),
        ({"grpo.rewards": {"nonsense": 1.0}}, "unknown reward"),
        ({"grpo.num_iterations": 3}, "multiple of grpo.num_iterations"),
        ({"method": "sft"}, "use --mode no-think"),
    ],
)
def test_mistakes_are_named(overrides: dict[str, object], message: str, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=message) as error:
        make_trainer(recipe(phantoms, **overrides), tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_takes_one_recipe(phantoms: Path, tmp_path: Path) -> None:
    make_trainer(recipe(phantoms), tmp_path)
    with pytest.raises(MedR1Error, match="another recipe"):
        make_trainer(recipe(phantoms, **{"optimizer.seed": 7}), tmp_path)


def test_filters_that_leave_nothing(phantoms: Path) -> None:
    with pytest.raises(MedR1Error, match="no question with source 'Phantom MRI' is left"):
        load_parts(recipe(phantoms, **{"data.modalities": ["CT"], "data.sources": ["Phantom MRI"]}).data)


def test_full_disk_leaves_whole_checkpoints_only(phantoms: Path, tmp_path: Path) -> None:
    """Files may grow to 200 kB, less than the optimizer state: the first checkpoint fails inside the library."""
    code = f"""
import sys, pathlib
sys.path[:0] = ["tests", "src"]
import test_training as t
from medr1.errors import MedR1Error
config = t.recipe(pathlib.Path({str(phantoms)!r}), **t.LETTERS)
trainer = t.make_trainer(config, pathlib.Path({str(tmp_path / "run")!r}))
try:
    trainer.run()
except MedR1Error as error:
    print("said:", error)
"""
    limit = 200_000
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert re.search(r"said: .*checkpoint-2: cannot be written", done.stdout), done.stdout + done.stderr
    left = [path.name for path in (tmp_path / "run").iterdir()]
    assert not any("checkpoint" in name or "saving" in name for name in left), left
    json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
