"""Each family, through what is not tested by family elsewhere; also those that cannot share a prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image
from test_shared_prefix import G, gradients, grpo_loss
from tiny_families import BUILDERS
from tiny_vlms import FAMILIES, conversation, picture, plain_logprobs, ragged_prompts, tiny_smolvlm, tiny_vlm
from torch import Tensor

from medr1.bases.export import export_model
from medr1.config import load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.run import evaluate
from medr1.policy.adapters import add_lora, freeze_vision
from medr1.policy.drafts import Drafts
from medr1.policy.encoding import FeatureCache, encode_prompts, image_cells, render_prompt, with_vision_features
from medr1.policy.rollouts import sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, load_vlm
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


T = 9
"""Tokens of a completion; the windows are shorter, and each prompt is longer than both."""
HALF = ("qwen3_vl_moe", "qwen3_5")
"""Families with layers that have no float64."""
NOT_SHARED = ("mllama", "blip_2")


def questions(vlm: VLM) -> tuple[list[list[dict[str, Any]]], list[list[Image]]]:
    """Of three lengths: about one picture, two of other sizes, and none, where the family can have that."""
    images = [[picture(1)], [picture(2, 112, 84), picture(3, 56, 56)], []]
    if vlm.name == "paligemma":
        images[2] = [picture(4)]
    if vlm.name == "blip_2":
        images = [[picture(1)], [picture(2, 112, 84)], [picture(3, 56, 56)]]
    texts = ["What?", "Which of the two shows a lesion?", "A question without an image."]
    return [conversation(text, len(group)) for text, group in zip(texts, images, strict=True)], images


def inputs_of(vlm: VLM, messages: list[dict[str, Any]], images: list[Image]) -> dict[str, Tensor]:
    """What the family's own processor makes of one prompt."""
    text, bos = render_prompt(vlm, messages), vlm.tokenizer.bos_token
    once = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    made = vlm.processor(text=[text], images=[images] if images else None, return_tensors="pt", **once)
    return {name: tensor for name, tensor in made.items() if isinstance(tensor, Tensor) and name != "labels"}


def reference(vlm: VLM, asked: Any, ids_NT: Tensor, mask_NT: Tensor, temperature: float) -> Tensor:
    """The slow definition: one call of the model per completion, from what the processor made of its prompt alone."""
    logp = torch.zeros(ids_NT.shape, dtype=vlm.core.dtype)
    for row, (ids, keep) in enumerate(zip(ids_NT, mask_NT, strict=True)):
        made = inputs_of(vlm, *(part[row // G] for part in asked))
        prompt = made.pop("input_ids")
        length = int(keep.sum())
        made["attention_mask"] = torch.ones(1, prompt.shape[1] + length, dtype=torch.long)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in made:  # PaliGemma calls what follows the prompt 1
                made[name] = torch.nn.functional.pad(made[name], (0, length), value=int(vlm.name == "paligemma"))
        if (seen := made.get("cross_attention_mask")) is not None:
            made["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, length, -1, -1)], dim=1)
        whole = torch.cat([prompt, ids[None, :length]], dim=1)
        logits = vlm.model(input_ids=whole, **made, use_cache=False).logits[0] / temperature
        logits[:, [token for token in vlm.banned_token_ids if token < logits.shape[-1]]] = -torch.inf
        chosen = logits[prompt.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids[:length, None])[:, 0]
        logp[row, :length] = chosen
    return logp


@pytest.mark.parametrize("trained", ["weights", "adapter"])
@pytest.mark.parametrize("family", BUILDERS)
def test_log_probs_and_gradients_are_those_of_one_call_a_completion(family: str, trained: str) -> None:
    """Ragged prompts, a loss with beta > 0; all weights, or an adapter under gradient checkpointing."""
    exact = family not in HALF
    vlm = tiny_vlm(family, dtype=torch.float64 if exact else torch.float32)
    if trained == "adapter":
        vlm = add_lora(vlm, rank=2, alpha=4)
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        vlm.core.activation_checkpointing_enable()
        vlm.core.enable_input_require_grads()
        vlm.model.train()
    asked = questions(vlm)
    prompts = encode_prompts(vlm, *asked)
    rollout = sample(vlm, prompts, num_completions=G, max_new_tokens=T, seed=0, temperature=0.8)
    ids, mask = rollout.completion_ids_NT, rollout.mask_NT
    expected = reference(vlm, asked, ids, mask, 0.8)
    found, _ = completion_logprobs(vlm, prompts, ids, mask, temperature=0.8)
    tolerance = 5e-6 if exact else 1e-5  # rotary angles are float32; PaliGemma's begin at 1 there and at 0 here
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    # a token at a time and all at once add up in another order: 1.3e-5 on one core in the linear attention of Qwen3.5
    rounding = 3e-5 if family == "qwen3_5" else 1e-5
    torch.testing.assert_close(rollout.logp_NT, expected.float().detach(), atol=rounding, rtol=0, check_dtype=False)
    slow = gradients(vlm, grpo_loss(expected, mask, expected + 0.1))
    fast = gradients(vlm, grpo_loss(found, mask, expected + 0.1))
    assert slow.norm() > 1e-3
    assert (fast - slow).norm() / slow.norm() < (1e-5 if exact else 1e-4)
    chosen = prompts.select([2, 1])
    rows = torch.tensor([prompt * G + g for prompt in (2, 1) for g in range(G)])
    part, _ = completion_logprobs(vlm, chosen, ids[rows], mask[rows], temperature=0.8)
    torch.testing.assert_close(part, found[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", BUILDERS)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    """Also with drafts, and from prompts that are kept for the policy pass, whose log-probs then are the same."""
    vlm = tiny_vlm(family)
    asked = questions(vlm)
    prompts = encode_prompts(vlm, *asked)
    settings: dict[str, Any] = {"num_completions": 1, "max_new_tokens": 12, "greedy": True, "seed": 0}
    rollout = sample(vlm, prompts, **settings)
    assert (vlm.not_shared is None) == (family not in NOT_SHARED)
    for place, tokens in enumerate(rollout.tokens):
        made = inputs_of(vlm, *(part[place] for part in asked))
        banned = [token for token in vlm.banned_token_ids if token < vlm.core.get_output_embeddings().out_features]
        written = vlm.core.generate(
            **made, do_sample=False, max_new_tokens=12, suppress_tokens=banned, eos_token_id=vlm.stop_token_ids
        )[0]
        assert written[-len(tokens) :].tolist() == tokens, "generate gives the prompt too, but for BLIP"
    shown = [picture(5)]
    both = encode_prompts(vlm, [conversation(text, 1) for text in ("What is it?", "Where?")], [shown, shown])
    alone = [sample(vlm, both.select([index]), **settings).tokens[0] for index in (0, 1)]
    assert sample(vlm, both, **settings).tokens == alone, "two questions about one picture"
    if vlm.not_shared:
        return
    drafts = Drafts()
    drafts.learn(rollout.tokens)
    assert sample(vlm, prompts, **settings, drafts=drafts).tokens == rollout.tokens
    kept = sample(vlm, prompts, **settings, keep_prefill=True)
    assert kept.tokens == rollout.tokens
    ids, mask = kept.completion_ids_NT, kept.mask_NT
    again, _ = completion_logprobs(vlm, prompts, ids, mask)
    gone_on, _ = completion_logprobs(vlm, prompts, ids, mask, prefill=kept.prefill)
    torch.testing.assert_close(gone_on, again, atol=1e-5, rtol=0)
    slow, fast = gradients(vlm, again.sum()), gradients(vlm, gone_on.sum())
    assert (fast - slow).norm() / slow.norm() < 1e-4
    freeze_vision(vlm)
    ready = with_vision_features(vlm, prompts, FeatureCache())
    assert ready.features is not None
    for name in ready.vision:  # not looked at again
        ready.vision[name] = torch.full_like(ready.vision[name], -1)
    seen, _ = completion_logprobs(vlm, ready, ids, mask)
    torch.testing.assert_close(seen, again, atol=1e-5, rtol=0)
    part, _ = completion_logprobs(vlm, ready.select([2, 1]), ids[[2, 1]], mask[[2, 1]])
    torch.testing.assert_close(part, again[[2, 1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", BUILDERS)
def test_two_steps_are_those_of_the_repeated_way(family: str, tmp_path: Path) -> None:
    """GRPO with a reference; then the model that was saved, and its export, say what the trained one says."""
    settings = {
        "data.path": str(write_phantoms(tmp_path / "phantoms", num_images=8, seed=1)),
        "data.test_fraction": 0.34,
        "rollout.num_completions": 3,
        "rollout.max_new_tokens": 5,
        "optimizer.steps": 2,
        "optimizer.prompts_per_step": 2,
        "optimizer.learning_rate": 1e-3,
        "grpo.beta": 0.1,
        "grpo.rewards": {"test_training:letters_reward": 1.0},
    }
    config = load_config(overrides=settings)
    train, test = load_parts(config.data)
    runs = []
    for way in ("repeated",) if family in NOT_SHARED else ("shared", "repeated"):
        vlm = tiny_vlm(family)
        vlm.not_shared = vlm.not_shared or ("the test" if way == "repeated" else None)
        runs.append(GRPOTrainer(vlm, config, train, test, tmp_path / way))
        runs[-1].run()
    begun, *ended = [
        torch.cat([weight.detach().flatten() for weight in model.parameters()])
        for model in (tiny_vlm(family).model, *(run.vlm.model for run in runs))
    ]
    moved = (ended[0] - begun).norm()
    assert moved > 0.01
    # An update of Adam's is a gradient over itself: where it is rounding alone, it is anything up to the rate.
    assert (ended[0] - ended[-1]).norm() / moved < 0.03
    logs = [read_jsonl(run.out / "log.jsonl") for run in runs]
    for row, other in zip(logs[0], logs[-1], strict=True):
        for name in {"loss", "grad_norm", "kl", "entropy", "reward"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    prompts = encode_prompts(runs[0].vlm, *questions(runs[0].vlm))
    rollout = sample(runs[0].vlm, prompts, num_completions=1, max_new_tokens=5, seed=0)
    export_model(str(runs[0].out), tmp_path / "out")
    for folder in (runs[0].out / "model", tmp_path / "out"):
        loaded = load_vlm(str(folder), device="cpu")
        again = encode_prompts(loaded, *questions(runs[0].vlm))
        logp, _ = completion_logprobs(loaded, again, rollout.completion_ids_NT, rollout.mask_NT)
        torch.testing.assert_close(logp, rollout.logp_NT.float(), atol=1e-3, rtol=0)


TITLES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "qwen3_5": "Qwen3.5",
    "gemma3": "Gemma 3 (MedGemma)",
    "gemma4": "Gemma 4",
    "paligemma": "PaliGemma",
    "internvl": "InternVL",
    "llava": "LLaVA",
    "llava_onevision": "LLaVA-OneVision",
    "glm46v": "GLM-4.6V",
    "mistral3": "Mistral 3",
    "lfm2_vl": "LFM2-VL",
    "aya_vision": "Aya Vision",
    "idefics3": "Idefics3, SmolVLM",
    "mllama": "Llama 3.2 Vision (Mllama)",
    "blip_2": "BLIP-2",
}
"""What the families are called in the documentation's table."""


def test_the_table_of_families_says_what_is_tested() -> None:
    lines = ["| Family | `model_type` | Text layers | A group's prompt |", "|---|---|---|---|"]
    for family, title in TITLES.items():
        vlm = tiny_vlm(family)
        text = vlm.core.config.get_text_config()
        kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
        if getattr(text, "sliding_window", None) and "sliding_attention" not in kinds:
            kinds = ["sliding_attention"]
        said = f"read by each: {vlm.not_shared.strip(',')}" if vlm.not_shared else "shared"
        kind = "–" if vlm.not_shared else ", ".join(kinds).replace("_attention", "").replace("_", " ")
        lines.append(f"| {title} | {vlm.core.config.model_type} | {kind} | {said} |")
    assert set(TITLES) == {*FAMILIES, *BUILDERS}
    table = "\n".join(lines)
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert table in page, f"docs/scale.md should hold:\n{table}"


def test_a_template_that_opens_the_reasoning() -> None:
    """The reply is read with the tag; where no reasoning is asked for, the tag is closed before the reply begins."""
    for family, opening, closed in (
        ("qwen3_5", "<think>\n", "<think>\n\n</think>\n\n"),  # by the template's own enable_thinking
        ("qwen3_vl_moe", "<think>\n", "<think>\n\n</think>\n\n"),
        ("glm46v", "<think>", "<think>\n\n</think>\n\n"),
        ("gemma3", "", ""),
    ):
        vlm = tiny_vlm(family)
        messages, images = [conversation("What?", 1)], [[picture(1)]]
        prompts = encode_prompts(vlm, messages, images)
        assert prompts.opened == [opening] and prompts.select([0]).opened == [opening]
        [text] = sample(vlm, prompts, num_completions=1, max_new_tokens=3, seed=0).texts
        assert text.startswith(opening)
        answering = encode_prompts(vlm, messages, images, thinking=False)
        assert answering.opened == [""]
        assert vlm.tokenizer.decode(answering.input_ids_BP[0]).endswith(closed)


def test_a_template_without_a_system_role() -> None:
    """The system text goes to the head of the user's turn."""
    vlm = tiny_vlm("gemma3")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    text = render_prompt(vlm, [system, *conversation("What?", 1)])
    assert text == "<bos><start_of_turn>user\nBe brief.\n\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\n"
    prompts = encode_prompts(vlm, [conversation("What?", 1)], [[picture(1)]])
    assert int((prompts.input_ids_BP == vlm.tokenizer.bos_token_id).sum()) == 1, "the template's, and not one more"


def test_turns_end_replies_without_a_generation_configuration() -> None:
    vlm = tiny_vlm("gemma3")  # whose tokenizer ends at <eos> alone
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.stop_token_ids) == ["<eos>", "<end_of_turn>"]


def test_loading_says_in_one_line_what_is_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_vlm("mllama")
    base.core.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    vlm = load_vlm(str(tmp_path / "base"), device="cpu")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "sharing" in line]
    assert "mllama_text_model" in line and "G times" in line
    with pytest.raises(MedR1Error, match="its chat template takes no such conversation"):
        vlm.processor.chat_template = "{{ raise_exception('No.') }}"
        render_prompt(vlm, conversation("What?", 1))


@pytest.mark.parametrize(("family", "side"), [("gemma3", 2), ("paligemma", 4)])
def test_cells_of_square_images(family: str, side: int) -> None:
    vlm = tiny_vlm(family)
    prompt = encode_prompts(vlm, [conversation("Which of the two?", 2)], [[picture(1), picture(2)]])
    cells = image_cells(vlm, prompt)
    assert cells.grids == [(side, side)] * 2
    cell_of = cells.cell_of.expand_as(prompt.vision["pixel_values"])
    assert cell_of[0, 0, 0, 0] == 0 and cell_of[0, 2, 0, -1] == side - 1 and cell_of[1, 0, -1, -1] == 2 * side**2 - 1
    assert cell_of.flatten().bincount().unique().tolist() == [3 * (32 // side) ** 2]


def test_pixels_of_other_families_are_not_guessed() -> None:
    for family in ("lfm2_vl", "mistral3", "llava", "internvl"):
        vlm = tiny_vlm(family)
        with pytest.raises(MedR1Error, match="which pixels an image token stands for"):
            image_cells(vlm, encode_prompts(vlm, [conversation("What?", 1)], [[picture(1)]]))
