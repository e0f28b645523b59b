"""A family that cuts images into tiles, through everything that is not tested by family elsewhere."""

from pathlib import Path

import pytest
import torch
from tiny_vlms import conversation, picture, plain_logprobs, ragged_prompts, tiny_smolvlm, tiny_vlm

from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.run import evaluate
from medr1.policy.encoding import encode_prompts
from medr1.policy.rollouts import sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import load_vlm
from medr1.training import GRPOTrainer


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_idefics3_is_trained_saved_loaded_and_evaluated(lora_rank: int, tmp_path: Path) -> None:
    """Two GRPO steps with a reference and a frozen tower; the saved model answers as the trained one does."""
    base = tiny_vlm("idefics3")
    if lora_rank:  # an adapter names its base
        base.core.save_pretrained(tmp_path / "base")
        base.processor.save_pretrained(tmp_path / "base")
        base = load_vlm(str(tmp_path / "base"), device="cpu")
    settings = {
        "data.path": str(write_phantoms(tmp_path / "phantoms", num_images=24, seed=1)),
        "data.test_fraction": 0.34,
        "model.lora_rank": lora_rank,
        "model.train_vision": False,
        "rollout.num_completions": 3,
        "rollout.max_new_tokens": 5,
        "optimizer.steps": 2,
        "optimizer.prompts_per_step": 2,
        "optimizer.learning_rate": 1e-2 if lora_rank else 1e-3,
        "grpo.beta": 0.1,
        "grpo.rewards": {"test_training:letters_reward": 1.0},
    }
    config = load_config(overrides=settings)
    train, test = load_parts(config.data)
    trainer = GRPOTrainer(base, config, train, test, tmp_path / "run")
    trainer.run()
    log = [row for row in read_jsonl(tmp_path / "run" / "log.jsonl") if "kl" in row]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[1]["kl"] > 1e-6
    loaded = load_vlm(str(tmp_path / "run" / "model"), device="cpu")
    replies = {}
    for condition in ("image", "blank", "no_image"):
        for name, vlm in (("trained", trainer.vlm), ("loaded", loaded)):
            out = tmp_path / f"{name}-{condition}.jsonl"
            rows = evaluate(vlm, test[:6], mode="think", out=out, max_new_tokens=8, condition=condition)
            replies[name, condition] = [row["reply"] for row in rows]
        assert replies["trained", condition] == replies["loaded", condition]
    assert len(set(map(tuple, replies.values()))) == 3


def test_smolvlm() -> None:
    """The second model class of the kind, whose processor wants its images by prompt."""
    pytest.importorskip("num2words", reason="SmolVLM's processor in transformers needs num2words")
    vlm = tiny_smolvlm()
    prompts = ragged_prompts(vlm)
    rollout = sample(vlm, prompts, num_completions=3, max_new_tokens=7, seed=0)
    ids, mask = rollout.completion_ids_NT, rollout.mask_NT
    expected = plain_logprobs(vlm, prompts, ids, mask)
    torch.testing.assert_close(rollout.logp_NT, expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(completion_logprobs(vlm, prompts, ids, mask)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "mark"), [("idefics3", "<image>"), ("qwen2_vl", "<|image_pad|>")])
def test_a_question_may_not_hold_what_means_an_image(family: str, mark: str) -> None:
    vlm = tiny_vlm(family)
    with pytest.raises(MedR1Error, match=f"What is in .*: holds {mark.replace('|', '.')}, an image to {family}"):
        encode_prompts(vlm, [conversation(f"What is in {mark}?", 1)], [[picture(1)]])
