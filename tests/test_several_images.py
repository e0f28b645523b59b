"""Items with two images, such as slices or views: one GRPO and one SFT step against the slow definition, evaluation
with its controls."""

from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from tiny_vlms import picture, plain_logprobs, tiny_vlm
from torch import Tensor, nn

from medr1.config import load_config
from medr1.data.records import Record
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import VLM
from medr1.training import GRPOTrainer, SFTTrainer
from medr1.training.objective import loss_denominator, policy_loss


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Two questions about one pair of images, one about another pair of other sizes, one open, one with one image."""
    for number, size in enumerate(((84, 56), (56, 84), (112, 56), (56, 56), (84, 84), (56, 56))):
        picture(number, *size).save(tmp_path / f"{number}.png")

    def item(id: str, images: str, question: str, options: tuple[str, ...], answer: str) -> Record:
        paths = tuple(tmp_path / f"{number}.png" for number in images)
        return Record(id=id, images=paths, question=question, options=options, answer=answer, modality="CT",
                      question_type="Disease Diagnosis", source="made", group=images)  # fmt: skip

    return [
        item("1", "01", "Which view shows it?", ("the first", "the second"), "B"),
        item("2", "01", "What is it?", ("a cyst", "a tumour", "a scar"), "A"),
        item("3", "23", "Did it grow?", (), "yes"),
        item("4", "45", "What is new?", ("nothing", "a nodule"), "B"),
        item("5", "4", "What is it?", ("bone", "lung"), "A"),
    ]


def gradient(vlm: VLM) -> Tensor:
    parameters = list(vlm.model.parameters())
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def trainer_of(method: str, records: list[Record], out: Path, **settings: object) -> GRPOTrainer | SFTTrainer:
    defaults = {
        "method": method,
        "rollout.mode": "no-think",
        "rollout.num_completions": 3,
        "rollout.max_new_tokens": 5,
        "optimizer.steps": 1,
        "optimizer.prompts_per_step": len(records),
        "grpo.beta": 0.0,
        "grpo.rewards": {"test_training:letters_reward": 1.0},
    }
    kind = GRPOTrainer if method == "grpo" else SFTTrainer
    return kind(tiny_vlm("qwen2_vl"), load_config(overrides=defaults | settings), records, records, out)


@pytest.mark.parametrize("prompts_per_forward", [0, 2])
def test_a_grpo_step_is_the_slow_definition(records: list[Record], tmp_path: Path, prompts_per_forward: int) -> None:
    """Images once a group, groups packed, against one call of the model for each completion, its images repeated."""
    settings = {"optimizer.prompts_per_forward": prompts_per_forward}
    trainer = cast(GRPOTrainer, trainer_of("grpo", records, tmp_path / "run", **settings))
    model = cast(nn.Module, trainer.vlm.model)
    experience = trainer.collect(records)
    assert experience.prompts.image_counts == [2, 2, 2, 2, 1]
    assert (experience.advantages_BG.abs().sum(1) > 0).any()
    model.zero_grad()
    loss = trainer._update(model, experience)
    fast = gradient(trainer.vlm)

    rollout, objective = experience.rollout, trainer.config.grpo
    model.zero_grad()
    logp_NT = plain_logprobs(trainer.vlm, trainer.encode(records), rollout.completion_ids_NT, rollout.mask_NT)
    slow_loss, _ = policy_loss(
        logp_NT, None, experience.advantages_BG.flatten(), rollout.mask_NT,
        denominator=loss_denominator(rollout.mask_NT, objective.aggregate, 5), aggregate=objective.aggregate,
        clip_low=objective.clip_low, clip_high=objective.clip_high, beta=0.0, ref_logp_NT=None,
    )  # fmt: skip
    slow_loss.backward()
    slow = gradient(trainer.vlm)
    torch.testing.assert_close(loss, slow_loss.detach(), atol=1e-6, rtol=1e-5)
    assert slow.norm() > 1e-3
    assert (fast - slow).norm() / slow.norm() < 1e-4


def test_an_sft_step_is_the_slow_definition(records: list[Record], tmp_path: Path) -> None:
    trainer = trainer_of("sft", records, tmp_path / "run")
    vlm = trainer.vlm
    loss = trainer.training_step(cast(nn.Module, vlm.model), {"records": records})
    targets = [
        [*vlm.tokenizer(f"<answer> {record.gold}</answer>")["input_ids"], vlm.tokenizer.eos_token_id]
        for record in records
    ]
    longest = max(map(len, targets))
    ids_NT = torch.tensor([target + [0] * (longest - len(target)) for target in targets])
    mask_NT = torch.tensor([[1] * len(target) + [0] * (longest - len(target)) for target in targets])
    logp_NT = plain_logprobs(vlm, trainer.encode(records), ids_NT, mask_NT)
    torch.testing.assert_close(loss, (-logp_NT.sum() / mask_NT.sum()).detach(), atol=1e-5, rtol=1e-5)


def test_evaluation_batches_change_nothing(records: list[Record], tmp_path: Path) -> None:
    vlm = tiny_vlm("qwen2_vl")
    together = evaluate(vlm, records, mode="no-think", out=tmp_path / "a.jsonl", max_new_tokens=6, batch_size=5)
    alone = evaluate(vlm, records, mode="no-think", out=tmp_path / "b.jsonl", max_new_tokens=6, batch_size=1)
    assert [row["reply"] for row in together] == [row["reply"] for row in alone]
    assert [row["images"] for row in together] == [[path.name for path in record.images] for record in records]


def test_controls_show_as_many_images(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Image.Image]] = []

    from medr1.evaluation import run as evaluation

    encode = evaluation.encode_prompts

    def watched(vlm: VLM, messages: list, images: list[list[Image.Image]], **more: bool) -> object:
        seen.extend(images)
        return encode(vlm, messages, images, **more)

    monkeypatch.setattr(evaluation, "encode_prompts", watched)
    pairs, vlm = records[:4], tiny_vlm("qwen2_vl")
    for condition, count in (("blank", 2), ("shuffled", 2), ("no_image", 0)):
        seen.clear()
        rows = evaluate(vlm, pairs, mode="no-think", out=tmp_path / f"{condition}.jsonl", max_new_tokens=2,
                        condition=condition)  # fmt: skip
        assert [len(images) for images in seen] == [count] * 4
        assert all(len(row["images"]) == count for row in rows)
        if condition == "blank":
            assert all(len(image.getcolors() or ()) == 1 for images in seen for image in images)
        if condition == "shuffled":
            own = {record.id: [path.name for path in record.images] for record in pairs}
            assert all(set(row["images"]).isdisjoint(own[row["id"]]) for row in rows)
