"""Training: data order, resume, whole checkpoints, the log, and that the reward goes up."""

import itertools
import json
import re
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rewards import RECORD
from tiny_vlms import tiny_vlm
from tokenizers.processors import TemplateProcessing
from transformers import TrainerCallback

from medr1.config import Config, load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.looking import measure
from medr1.policy import attention
from medr1.policy.shared_prefix import completion_logprobs
from medr1.training import GRPOTrainer, SFTTrainer
from medr1.training.base import RecordOrder, RecordTrainer
from medr1.training.draws import draw_order
from medr1.training.folder import check_recipe, write_recipe
from medr1.training.looking import longest_choices


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


def some_differ(reply: str, record: Record, mode: str) -> float:
    """The same for all replies to about half of the records."""
    return letters_reward(reply, record, mode) if zlib.crc32(record.id.encode()) % 2 else 0.5


LETTERS = {"grpo.rewards": {"test_training:letters_reward": 1.0}}
OBJECTIVES: dict[str, dict[str, object]] = {
    "gspo": LETTERS
    | {
        "grpo.objective": "gspo",
        "grpo.num_iterations": 2,
        "grpo.clip_low": 0.001,
        "grpo.clip_high": 0.001,
        "grpo.delta": 1.01,
        "grpo.entropy_bonus": 0.05,
        "grpo.advantage_scale": "modality",
        "grpo.beta": 0.0,
    },
    "cispo": LETTERS
    | {
        "grpo.objective": "cispo",
        "grpo.num_iterations": 2,
        "grpo.aggregate": "token",
        "grpo.clip_high": 0.01,
        "grpo.advantage_scale": "batch",
        "grpo.beta": 0.1,
        "grpo.kl_by_ratio": True,
        "grpo.kl_clamp": 0.01,
    },
    "draws": {
        "grpo.rewards": {"test_training:some_differ": 1.0},
        "draws.redraws": 2,
        "draws.curriculum": [0.6, 0.4],
        "draws.balance": "modality",
        "grpo.advantage_scale": "question_type",
        "grpo.beta": 0.0,
    },
}


LOOKING: dict[str, object] = {
    "grpo.rewards": {"test_training:letters_reward": 1.0, "image_margin": 1.0, "consistency": 0.5},
    "grpo.beta": 0.0,
    "grpo.perception": 0.1,
    "grpo.perception_entropy": 0.01,
    "grpo.hold_to_chance": 0.1,
    "draws.exchanged_images": 0.5,
    "draws.weights": "needs_image",
}
ACCOUNT = ("drawn", "used", "thrown_away", "left_aside")


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
        LETTERS | {"grpo.beta": 0.1, "data.test_fraction": 0.7, "log.looking_every": 1, "log.looking_records": 3},
        LETTERS | {"grpo.num_iterations": 2, "grpo.beta": 0.0},
        LETTERS | {"model.lora_rank": 2, "grpo.beta": 0.1},
        {"method": "sft", "rollout.mode": "no-think", "draws.balance": "question_type", "draws.exchanged_images": 0.5},
        *OBJECTIVES.values(),
        LOOKING,
    ],
    ids=["grpo", "reference", "two-updates", "lora", "sft", *OBJECTIVES, "looking"],
)
def test_a_stopped_run_resumes_to_the_same_weights_and_logs(
    overrides: dict[str, object], phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the stopped run reads its records from a file, as it would very many, and the whole one has lists."""
    config = recipe(phantoms, **overrides)
    whole = make_trainer(config, tmp_path / "whole")
    before = weights(whole).clone()
    whole.run()
    assert not torch.equal(before, weights(whole))

    monkeypatch.setattr("medr1.data.kept.LIMIT", 10)
    stopped = make_trainer(config, tmp_path / "stopped")
    assert not isinstance(stopped.train_records, list)
    stopped.add_callback(StopAfter)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make_trainer(config, tmp_path / "stopped")
    resumed.run()

    assert torch.equal(weights(whole), weights(resumed))
    if "draws.redraws" in overrides:
        assert whole.draws.state() == resumed.draws.state()
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
            assert [row for row in timeless[0] if "looking_reliance" in row] == [
                row for row in timeless[1] if "looking_reliance" in row
            ]
            if name == "completions.jsonl":
                assert timeless[0] == timeless[1]
            else:
                accounts = [[row.get(name) for name in ACCOUNT] for row in timeless[0]]
                assert accounts == [[row.get(name) for name in ACCOUNT] for row in timeless[1]]


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


def test_bfloat16_gives_every_weight_its_gradient(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether prompts are read with gradient beside tokens sampled without, or apart: casts of weights are kept."""
    monkeypatch.setattr(attention, "_wide", lambda states: states)  # else other tokens are drawn, by rounding
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


@pytest.mark.parametrize("skipped", [False, True])
def test_questions_of_a_step_share_their_image(skipped: bool, phantoms: Path, tmp_path: Path) -> None:
    """Four questions, one image: the tower sees it once in sampling, and once more for the reference, or where a group
    teaches nothing and the others are read again."""
    config = recipe(
        phantoms,
        **LETTERS,
        **{"optimizer.steps": 1, "optimizer.prompts_per_step": 4, "grpo.beta": 0.0 if skipped else 0.1},
    )
    trainer = make_trainer(config, tmp_path)
    first = trainer.train_dataset[0]
    records = [first.model_copy(update={"id": f"{n}", "question": f"What is it? {'Say. ' * n}"}) for n in range(4)]
    number = itertools.count()
    trainer.rewards = [("later", lambda reply, record, _: 0.0 if record.id == "0" else float(next(number)), 1.0)]
    patches: list[int] = []
    for model in filter(None, (trainer.vlm.core, trainer.reference)):
        model.base_model.visual.patch_embed.register_forward_hook(lambda module, args, out: patches.append(len(out)))
    trainer.training_step(trainer.model, {"records": records})
    carries = trainer.experience.advantages_BG.abs().sum(1) > 0
    assert carries.tolist() == [False, True, True, True]
    one = int(trainer.experience.prompts.vision["image_grid_thw"][0].prod())
    assert patches == [one] * 2


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


def test_sft_learns_no_token_that_a_tokenizer_puts_before_a_text(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(recipe(phantoms, method="sft", **{"rollout.mode": "no-think"}), tmp_path)
    tokenizer = trainer.vlm.tokenizer
    first = "<|endoftext|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids(first)
    learned = []

    def keep(vlm: Any, prompts: Any, ids_NT: torch.Tensor, mask_NT: torch.Tensor, **settings: Any) -> Any:
        learned.extend(tokenizer.decode(ids[mask]) for ids, mask in zip(ids_NT, mask_NT, strict=True))
        return completion_logprobs(vlm, prompts, ids_NT, mask_NT, **settings)

    monkeypatch.setattr("medr1.training.sft.completion_logprobs", keep)
    records = list(trainer.train_records[:2])
    trainer.learn(trainer.model, records)
    assert learned == [f"<answer> {record.gold}</answer>{tokenizer.eos_token}" for record in records]


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


def test_a_line_of_the_log_is_of_all_steps_since_the_line_before(phantoms: Path, tmp_path: Path) -> None:
    """Whatever was evaluated between; and an epoch is a pass over the training part, not the run."""
    settings = {"log.log_every": 4, "log.eval_every": 2, "log.eval_records": 2, "optimizer.steps": 5}
    trainer = make_trainer(recipe(phantoms, **LETTERS, **settings), tmp_path)
    trainer.run()
    log, completions = read_jsonl(tmp_path / "log.jsonl"), read_jsonl(tmp_path / "completions.jsonl")
    lines = [row for row in log if "reward" in row]
    assert [(row["step"], "loss" in row, "train_loss" in row) for row in lines] == [
        (1, True, False),
        (4, True, False),
        (5, False, True),
    ]
    for row, steps in zip(lines, ((1,), (2, 3, 4), (5,)), strict=True):
        rewards = [one["reward"] for one in completions if one["step"] in steps]
        assert row["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
    assert [row["step"] for row in log if "eval_accuracy" in row] == [2, 4, 5]
    assert all(row["epoch"] == row["step"] * 2 / trainer.num_records for row in log)
    assert not any("total_flos" in row for row in log)


def test_an_epoch_counts_what_was_drawn(phantoms: Path, tmp_path: Path) -> None:
    """Two updates on one set of rollouts draw once; records that were drawn again count."""
    twice = make_trainer(
        recipe(phantoms, **LETTERS, **{"grpo.num_iterations": 2, "optimizer.steps": 4}), tmp_path / "twice"
    )
    again = make_trainer(recipe(phantoms, **OBJECTIVES["draws"]), tmp_path / "again")
    for trainer in (twice, again):
        trainer.run()
    epochs = [
        [row["epoch"] * trainer.num_records for row in read_jsonl(trainer.out / "log.jsonl") if "loss" in row]
        for trainer in (twice, again)
    ]
    assert epochs[0] == pytest.approx([2, 2, 4, 4])
    drawn = [row["drawn"] for row in read_jsonl(again.out / "log.jsonl") if "drawn" in row]
    assert epochs[1] == pytest.approx([*itertools.accumulate(drawn)]) and sum(drawn) > 8


class StopAtOnce(TrainerCallback):
    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        raise KeyboardInterrupt


def test_whether_the_policy_looks_is_measured_on_the_way(phantoms: Path, tmp_path: Path, capsys: Any) -> None:
    settings = {
        "data.test_fraction": 0.7,
        "log.looking_every": 2,
        "log.looking_records": 6,
        "log.log_every": 3,
        "log.eval_every": 4,
    }
    config = recipe(phantoms, **settings)
    stopped = make_trainer(config, tmp_path)
    stopped.add_callback(StopAtOnce)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    trainer = make_trainer(config, tmp_path)
    trainer.run()
    log = read_jsonl(tmp_path / "log.jsonl")
    rows = [row for row in log if "looking_reliance" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert [row["step"] for row in log if "eval_accuracy" in row] == [4]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("step 0: the image adds") == 2 and "of answers change with it" in told
    for row in rows:
        own, other = (read_jsonl(tmp_path / f"looking-{way}-step-{row['step']}.jsonl") for way in ("image", "shuffled"))
        assert measure({"image": own, "shuffled": other})["reliance"]["value"] == row["looking_reliance"]
        assert row["looking_reliance"] == pytest.approx(row["looking_accuracy"] - row["looking_accuracy_other"])
        assert row["looking_reliance_low"] <= row["looking_reliance"] <= row["looking_reliance_high"]
        assert 0 <= row["looking_sensitivity"] <= 1
        assert {one["id"] for one in own} == {one["id"] for one in other} == {r.id for r in trainer.looking_records}
        for one, two in zip(own, other, strict=True):
            assert one["id"] == two["id"] and one["images"] != two["images"] and one["modality"] == two["modality"]
    held_out = {record.id for record in load_parts(config.data)[1]}
    assert {record.id for record in trainer.looking_records} <= held_out


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
        (
            {"grpo.num_iterations": 2, "optimizer.steps": 5},
            "optimizer.steps = 5 is no multiple of grpo.num_iterations = 2; set it to 6,",
        ),
        ({"method": "sft"}, "use --mode no-think"),
        (
            {"log.looking_every": 1, "data.test_fraction": 0.2},
            "log.looking_every: no held-out record has another image of its modality to show; set it to 0",
        ),
    ],
)
def test_mistakes_are_named(overrides: dict[str, object], message: str, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=message) as error:
        make_trainer(recipe(phantoms, **overrides), tmp_path)
    assert "\n" not in str(error.value)


def test_epochs_end_with_the_last_update_on_a_set_of_rollouts(phantoms: Path, tmp_path: Path) -> None:
    """An odd number of records, 2 a step, takes half as many sets of rollouts, rounded up, each with two updates."""
    trainer = make_trainer(recipe(phantoms, **{"optimizer.steps": 0, "grpo.num_iterations": 2}), tmp_path)
    assert trainer.num_records % 2
    assert trainer.num_steps == trainer.num_records + 1


def test_a_run_is_extended_by_what_it_was_counted_in(phantoms: Path, tmp_path: Path) -> None:
    """Five epochs may be fewer than 40 steps, and epochs are not read where steps are given."""
    constant = {"optimizer.schedule": "constant_with_warmup"}

    def length(steps: int, epochs: float) -> Config:
        return recipe(phantoms, **constant, **{"optimizer.steps": steps, "optimizer.epochs": epochs})

    write_recipe(length(40, 1.0), tmp_path / "steps")
    with pytest.raises(
        MedR1Error, match=r"it was counted in steps, so extend it by optimizer\.steps, or choose another"
    ):
        check_recipe(length(0, 5.0), tmp_path / "steps")
    assert check_recipe(length(40, 0.5), tmp_path / "steps") is None
    found = check_recipe(length(50, 0.5), tmp_path / "steps")
    assert found == {"from_steps": 40, "to_steps": 50, "schedule": "constant_with_warmup"}
    write_recipe(length(0, 1.0), tmp_path / "epochs")
    with pytest.raises(MedR1Error, match=r"it was counted in epochs, so extend it by optimizer\.epochs"):
        check_recipe(length(40, 1.0), tmp_path / "epochs")
    with pytest.raises(MedR1Error, match="can be extended, not shortened"):
        check_recipe(length(0, 0.5), tmp_path / "epochs")


class Rates(TrainerCallback):
    """What the optimizer's rate is in each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])  # type: ignore[attr-defined]


def test_an_extended_run_has_the_rates_of_its_new_length_from_its_first_step_on(phantoms: Path, tmp_path: Path) -> None:
    """Linear from 1e-3 over 4 steps: the third has half of it, and not the 0 that two steps had come down to."""
    make_trainer(recipe(phantoms, **LETTERS, **{"optimizer.steps": 2}), tmp_path).run()
    longer = recipe(phantoms, **LETTERS, **{"optimizer.steps": 4})
    write_recipe(longer, tmp_path, extend=True)
    trainer = make_trainer(longer, tmp_path)
    trainer.add_callback(rates := Rates())
    trainer.run()
    assert rates.seen == pytest.approx([5e-4, 2.5e-4])
    logged = [row["learning_rate"] for row in read_jsonl(tmp_path / "log.jsonl") if "learning_rate" in row]
    assert logged == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


def test_what_else_lies_in_the_folder_is_the_users(phantoms: Path, tmp_path: Path) -> None:
    """Answers where the docs tell to put them, a table with steps in it, and names that are nearly the run's."""
    kept = {
        "image.jsonl": '{"key": "a", "reply": "A"}\n',
        "mine.jsonl": '{"step": 99}\n{"step": "last"}\n',
        "x-step-by.jsonl": "{}\n",
        "my-eval-step-9.jsonl": "{}\n",
    }
    for name, content in kept.items():
        (tmp_path / name).write_text(content)
    config = recipe(phantoms, **LETTERS, **{"optimizer.schedule": "constant_with_warmup"})
    make_trainer(
        config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"steps": 2})}), tmp_path
    ).run()
    of_run = ("eval-step-2.jsonl", "eval-step-3.jsonl", "looking-shuffled-step-3.1.jsonl")
    for name in of_run:
        (tmp_path / name).write_text("{}\n")
    make_trainer(config, tmp_path).run()
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert [name for name in of_run if (tmp_path / name).exists()] == ["eval-step-2.jsonl"]
    assert [row["step"] for row in read_jsonl(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 4]


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


# --- prompts drawn as it goes --------------------------------------------------------------------------------------


def test_groups_without_a_difference_are_drawn_again_and_all_accounted_for(phantoms: Path, tmp_path: Path) -> None:
    config = recipe(
        phantoms,
        **OBJECTIVES["draws"] | {"draws.curriculum": [], "draws.balance": "off", "optimizer.prompts_per_step": 4},
    )
    trainer = make_trainer(config, tmp_path)
    trainer.run()
    rows = read_jsonl(tmp_path / "completions.jsonl")
    by_step = [[row for row in rows if row["step"] == step] for step in (1, 2, 3, 4)]
    order = trainer.order()
    for line, of_step in zip(read_jsonl(tmp_path / "log.jsonl"), by_step, strict=False):
        groups = [of_step[start : start + 3] for start in range(0, len(of_step), 3)]
        used, thrown = ([group for group in groups if group[0]["used"] is used] for used in (True, False))
        assert [line[name] for name in ACCOUNT] == [len(groups), 4, len(thrown), 0] and len(used) == 4
        assert line["drawn"] == line["used"] + line["thrown_away"] + line["left_aside"]
        for group in thrown:
            assert len({row["reward"] for row in group}) == 1 and {row["advantage"] for row in group} == {0.0}
        for group in used:  # the last of two redraws stays, whatever it is
            assert group[0]["redraw"] == 2 or any(row["advantage"] for row in group)
        assert line["zero_variance_groups"] == pytest.approx(
            sum(not any(row["advantage"] for row in group) for group in groups) / len(groups)
        )
        # The places of a round get the order's next records, and nobody is skipped.
        sampled = sorted(used + thrown, key=lambda group: group[0]["redraw"])
        expected = [trainer.train_records[next(order)].id for _ in groups]
        assert sorted(group[0]["id"] for group in sampled[:4]) == sorted(expected[:4])
        assert sorted(group[0]["id"] for group in sampled) == sorted(expected)
    assert any(line.get("thrown_away") for line in read_jsonl(tmp_path / "log.jsonl"))


def test_without_redraws_a_run_says_nothing_of_them(phantoms: Path, tmp_path: Path) -> None:
    make_trainer(recipe(phantoms, **LETTERS, **{"optimizer.steps": 1}), tmp_path).run()
    assert not {*ACCOUNT} & read_jsonl(tmp_path / "log.jsonl")[0].keys()
    assert not {"used", "redraw"} & read_jsonl(tmp_path / "completions.jsonl")[0].keys()


def test_a_redrawn_step_learns_what_its_prompts_alone_would_teach(phantoms: Path, tmp_path: Path) -> None:
    """Replies of another round, of other lengths, joined: scored again they have the log-probs they were drawn with."""
    config = recipe(phantoms, **OBJECTIVES["draws"] | {"optimizer.steps": 1, "optimizer.prompts_per_step": 4})
    trainer = make_trainer(config, tmp_path)
    # So that replies end at different lengths.
    trainer.vlm.stop_token_ids = list(range(0, 512, 4))
    trainer.run()
    experience = trainer.experience
    rollout = experience.rollout
    assert len(set(rollout.mask_NT.sum(1).tolist())) > 1
    assert any(row["redraw"] and row["used"] for row in read_jsonl(tmp_path / "completions.jsonl"))
    learned = (experience.advantages_BG != 0).any(1).repeat_interleave(3)
    assert learned.any()
    torch.testing.assert_close(
        experience.old_logp_NT[learned], rollout.logp_NT[learned][:, : rollout.mask_NT.shape[1]], atol=1e-4, rtol=0
    )


def test_truncated_completions_teach_nothing(phantoms: Path, tmp_path: Path) -> None:
    for stops, learns in (([], False), (list(range(0, 512, 4)), True)):
        config = recipe(phantoms, **LETTERS, **{"grpo.mask_truncated": True, "grpo.beta": 0.1, "optimizer.steps": 1})
        trainer = make_trainer(config, tmp_path / str(learns))
        trainer.vlm.stop_token_ids = stops
        before = weights(trainer).clone()
        trainer.run()
        assert torch.equal(before, weights(trainer)) is not learns


def test_truncated_completions_teach_nothing_of_other_images_either(phantoms: Path, tmp_path: Path) -> None:
    """Whatever the last reply of the first group says, and whatever all of the second say: both are cut."""
    terms = {"grpo.perception": 0.1, "grpo.perception_entropy": 0.1, "grpo.hold_to_chance": 0.1, "grpo.beta": 0.0}
    trainer = make_trainer(recipe(phantoms, **LETTERS, **terms, **{"grpo.mask_truncated": True}), tmp_path)
    assert isinstance(trainer, GRPOTrainer)
    records = list(trainer.train_records[:2])
    experience = trainer.collect(records)
    owners = [record for record in records for _ in range(3)]
    finished_N = torch.tensor([True, True, False, False, False, False])
    found = []
    for token in (65, 66):
        rollout = experience.rollout
        ids_NT = rollout.completion_ids_NT.where(finished_N[:, None], torch.full_like(rollout.completion_ids_NT, token))
        rollout = replace(rollout, completion_ids_NT=ids_NT, finished_N=finished_N, prefill=None)
        said = longest_choices(trainer.vlm, [ids.tolist() for ids in ids_NT], owners)
        other = replace(experience.other, mask_NT=rollout.mask_NT, choices=said)
        trainer.sums = {}
        trainer.model.zero_grad()
        trainer._update(trainer.model, replace(experience, rollout=rollout, other=other))
        gradient = torch.cat(
            [weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None]
        )
        found.append((gradient, dict(trainer.sums)))
    assert found[0][0].norm() > 0
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[0][1]["other_tokens"] == float(experience.rollout.mask_NT[:2].sum()) and found[0][1]["other_rows"] == 2


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"grpo.delta": 1.1}, r"grpo.delta = 1.1 is not above 1 \+ grpo.clip_high = 1.2; set a larger one"),
        ({"grpo.delta": 4.0, "grpo.objective": "cispo"}, "set it to 0 with grpo.objective = cispo"),
        ({"grpo.objective": "gpso"}, "did you mean gspo"),
        ({"draws.curriculum": [0.0]}, "draws.curriculum.0 = 0.0: .*greater than 0"),
        ({"draws.curriculum": [0.8, 0.6, 0.4]}, "draws.curriculum = .*at most 2"),
        ({"draws.balance": "modalities"}, "did you mean modality"),
        ({"draws.redraws": 1, "method": "sft"}, "leave them out of method = sft"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: dict[str, object], line: str) -> None:
    with pytest.raises(MedR1Error, match=line) as error:
        load_config(overrides=overrides)
    assert "\n" not in str(error.value)


def test_a_moving_curriculum_is_extended_only_by_asking(phantoms: Path, tmp_path: Path) -> None:
    moving = {"draws.curriculum": [0.8, 0.4], "optimizer.schedule": "constant_with_warmup"}
    write_recipe(recipe(phantoms, **moving), tmp_path)
    longer = recipe(phantoms, **moving, **{"optimizer.steps": 8})
    with pytest.raises(MedR1Error, match="its curriculum came to its last pass rate at the old end"):
        write_recipe(longer, tmp_path)
    write_recipe(longer, tmp_path, extend=True)
