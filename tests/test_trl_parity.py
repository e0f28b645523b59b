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
from medr1.training.objective import entropy_share, group_advantages, loss_denominator, policy_loss

trl = pytest.importorskip("trl", reason="TRL is a test dependency: pip install 'medr1[test]'")
datasets = pytest.importorskip("datasets")

B, G, T = 2, 4, 10


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (loss_type, aggregate, {"beta": beta, "kl_by_ratio": by_ratio}, {"beta": beta, "use_bias_correction_kl": by_ratio})
    for loss_type, aggregate in (("grpo", "sequence"), ("dapo", "token"), ("bnpo", "token"), ("dr_grpo", "dr_grpo"))
    for beta, by_ratio in ((0.0, False), (0.04, False), (0.04, True))
]
GSPO = {"objective": "gspo", "clip_low": 0.03, "clip_high": 0.04}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04}
CASES += [
    ("grpo", "sequence", {"delta": 1.3, "kl_by_ratio": True}, {"delta": 1.3}),
    ("dapo", "token", {"entropy_bonus": 0.05, "kl_by_ratio": True}, {"entropy_coef": 0.05}),
    ("grpo", "sequence", {"truncated": True, "kl_by_ratio": True}, {}),
    ("dapo", "token", {"truncated": True, "kl_by_ratio": True}, {}),
    ("grpo", "sequence", GSPO, SEQUENCE | {"use_bias_correction_kl": False}),
    (
        "grpo",
        "sequence",
        GSPO | {"delta": 1.05, "beta": 0.04, "kl_by_ratio": True},
        SEQUENCE | {"delta": 1.05, "beta": 0.04},
    ),
    ("dapo", "token", GSPO, SEQUENCE),
    ("cispo", "token", {"objective": "cispo", "clip_high": 0.3}, {"epsilon_high": 1.3}),
    (
        "cispo",
        "token",
        {"objective": "cispo", "clip_high": 4.0, "beta": 0.04, "kl_by_ratio": True},
        {"epsilon_high": 5.0, "beta": 0.04},
    ),
]
"""TRL's name of the loss, our aggregate, our settings and TRL's."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss_type", "aggregate", "ours", "theirs"), CASES)
def test_loss_and_gradients_equal_trl(
    tmp_path: Path, loss_type: str, aggregate: Any, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    beta, bonus = ours.get("beta", 0.0), ours.get("entropy_bonus", 0.0)
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
    ids = torch.randint(0, 256, mask.shape, generator=generator)
    ids[:, :3] %= 2  # they often begin alike
    ids = ids.masked_fill(~mask, vlm.pad_token_id)
    near = completion_logprobs(vlm, prompts, ids, mask)[0].detach()
    old = near + 0.4 * torch.randn(mask.shape, generator=generator)  # far enough for both clips
    reference = near + 0.3 * torch.randn(mask.shape, generator=generator)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.5, 1.5, 0.0]])
    advantage = group_advantages(rewards).flatten()

    if ours.get("truncated"):  # as both leave out what ran into the limit
        mask &= lengths[:, None] < T
    trainer = trl_trainer(tmp_path, copy.deepcopy(vlm.core), vlm.processor, loss_type=loss_type, **theirs)
    inputs = trl_inputs(vlm.core.config.image_token_id, prompts, ids, mask, advantage)
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": reference}
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()

    logp, entropy = completion_logprobs(vlm, prompts, ids, mask, entropy="gradient")
    loss, sums = policy_loss(
        logp,
        old,
        advantage,
        mask,
        denominator=loss_denominator(mask, aggregate, max_tokens=T),
        aggregate=aggregate,
        ref_logp_NT=reference if beta else None,
        **{name: value for name, value in ours.items() if name not in ("entropy_bonus", "truncated")},
    )
    if bonus:
        assert entropy is not None
        loss = loss - bonus * entropy_share(entropy, mask, num_tokens=sums["tokens"])
    loss.backward()

    if ours.get("objective") != "cispo":
        assert sums["clipped_low"] > 0 and sums["clipped_high"] > 0, "both clips take part in the comparison"
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    gradient, expected_gradient = flat_gradients(vlm.core), flat_gradients(trainer.model)
    assert expected_gradient.norm() > 1e-3
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-4
    metrics = trainer._metrics["train"]
    if "objective" not in ours:  # else TRL counts rows, or another side
        assert sums["clipped_low"] / sums["tokens"] == pytest.approx(metrics["clip_ratio/low_mean"][0], abs=1e-6)
        assert sums["clipped_high"] / sums["tokens"] == pytest.approx(metrics["clip_ratio/high_mean"][0], abs=1e-6)
    if beta:
        assert sums["kl"] / sums["tokens"] == pytest.approx(metrics["kl"][0], rel=1e-4)


def trl_trainer(folder: Path, model: Any, processor: Any, **settings: Any) -> Any:
    """TRL's own trainer; nothing of its generation or reward code runs."""
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)  # where TRL loads its reference model from
    config = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        num_generations=G,
        per_device_train_batch_size=B * G,
        gradient_accumulation_steps=1,
        max_completion_length=T,
        **settings,
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
