"""Our loss and gradients against TRL's GRPOTrainer, on the same model, completions, rewards and log-probs.

TRL repeats image and prompt for each completion, pads, and computes its own log-probs; we score packed groups. TRL
scores the whole vocabulary, we leave vision tokens out, so here our list of banned tokens is empty.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlms import conversation, picture, tiny_vlm
from torch import Tensor

from medr1.policy.encoding import encode_prompts
from medr1.policy.shared_prefix import completion_logprobs
from medr1.training.objective import group_advantages, loss_denominator, policy_loss

trl = pytest.importorskip("trl", reason="TRL is a test dependency: pip install 'medr1[test]'")
datasets = pytest.importorskip("datasets")

B, G, T = 2, 4, 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("beta", "kl_by_ratio"), [(0.0, False), (0.04, False), (0.04, True)])
@pytest.mark.parametrize(
    ("loss_type", "aggregate"),
    [("grpo", "sequence"), ("dapo", "token"), ("bnpo", "token"), ("dr_grpo", "dr_grpo")],
)
def test_loss_and_gradients_equal_trl(
    tmp_path: Path, loss_type: str, aggregate: Any, beta: float, kl_by_ratio: bool
) -> None:
    vlm = tiny_vlm("qwen2_vl")
    prompts = encode_prompts(
        vlm,
        [conversation("Which organ?", 1), conversation("Which of the two is a scan of the chest?", 2)],
        [[picture(1)], [picture(2, 112, 84), picture(3, 56, 56)]],
    )
    vlm.__dict__["banned_token_ids"] = []
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([T, 3, 1, T, 7, T, 2, 5])
    mask = torch.arange(T) < lengths[:, None]
    ids = torch.randint(0, 256, mask.shape, generator=generator).masked_fill(~mask, vlm.pad_token_id)
    near = completion_logprobs(vlm, prompts, ids, mask)[0].detach()
    old = near + 0.4 * torch.randn(mask.shape, generator=generator)  # far enough for both clips
    reference = near + 0.3 * torch.randn(mask.shape, generator=generator)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.5, 1.5, 0.0]])
    advantage = group_advantages(rewards).flatten()

    trainer = trl_trainer(tmp_path, copy.deepcopy(vlm.core), vlm.processor, loss_type, beta, kl_by_ratio)
    inputs = trl_inputs(vlm.core.config.image_token_id, prompts, ids, mask, advantage)
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()

    logp, _ = completion_logprobs(vlm, prompts, ids, mask)
    loss, sums = policy_loss(
        logp,
        old,
        advantage,
        mask,
        denominator=loss_denominator(mask, aggregate, max_tokens=T),
        aggregate=aggregate,
        beta=beta,
        ref_logp_NT=reference if beta else None,
        kl_by_ratio=kl_by_ratio,
    )
    loss.backward()

    assert sums["clipped_low"] > 0 and sums["clipped_high"] > 0, "both clips take part in the comparison"
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    ours, theirs = flat_gradients(vlm.core), flat_gradients(trainer.model)
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    metrics = trainer._metrics["train"]
    assert sums["clipped_low"] / sums["tokens"] == pytest.approx(metrics["clip_ratio/low_mean"][0], abs=1e-6)
    assert sums["clipped_high"] / sums["tokens"] == pytest.approx(metrics["clip_ratio/high_mean"][0], abs=1e-6)
    if beta:
        assert sums["kl"] / sums["tokens"] == pytest.approx(metrics["kl"][0], rel=1e-4)


def trl_trainer(folder: Path, model: Any, processor: Any, loss_type: str, beta: float, kl_by_ratio: bool) -> Any:
    """TRL's own trainer; nothing of its generation or reward code runs."""
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)  # where TRL loads its reference model from
    config = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        loss_type=loss_type,
        beta=beta,
        use_bias_correction_kl=kl_by_ratio,
        epsilon=0.2,
        num_generations=G,
        per_device_train_batch_size=B * G,
        gradient_accumulation_steps=1,
        max_completion_length=T,
    )
    rows = datasets.Dataset.from_list([{"prompt": "unused"}] * B)
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda **_: [], args=config, train_dataset=rows, processing_class=processor
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trl_inputs(image_token: int, prompts: Any, ids: Tensor, mask: Tensor, advantage: Tensor) -> dict[str, Any]:
    """Every prompt and image G times, as TRL wants them."""
    single = [prompts.select([index]) for index in range(B) for _ in range(G)]
    prompt_ids = prompts.input_ids_BP.repeat_interleave(G, dim=0)
    whole = torch.cat([prompt_ids, ids], dim=1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompts.attention_mask_BP.repeat_interleave(G, dim=0),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantage,
        "pixel_values": torch.cat([prompt.vision["pixel_values"] for prompt in single]),
        "image_grid_thw": torch.cat([prompt.vision["image_grid_thw"] for prompt in single]),
        "num_images": [prompt.image_counts[0] for prompt in single],
        "mm_token_type_ids": (whole == image_token).int(),
        "num_items_in_batch": mask.sum(),
    }


def flat_gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
