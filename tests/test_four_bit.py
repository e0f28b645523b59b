"""A base in 4 bits under an adapter, 8-bit AdamW, and places of the reference: one policy wherever it is computed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_export import logits, save
from test_training import LETTERS, StopAfter, recipe
from tiny_vlms import FAMILIES, plain_logprobs, ragged_prompts, tiny_vlm
from transformers import AutoModelForImageTextToText

from medr1.bases.export import export_model
from medr1.config import Config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.run import weights_fingerprint
from medr1.policy import four_bit
from medr1.policy.adapters import add_lora, lora_layers
from medr1.policy.rollouts import sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, load_vlm
from medr1.training.grpo import GRPOTrainer
from medr1.training.run import train

ADAPTER = {"model.quantize": "nf4", "model.lora_rank": 2}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("data") / "phantoms", num_images=24, seed=1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model for each family."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        save(tiny_vlm(family), root / family)
    return root


def adapted(folder: Path, targets: str = "both", **settings: str) -> VLM:
    """An adapter of size on a base in 4 bits."""
    vlm = add_lora(load_vlm(str(folder), device="cpu", quantize="nf4", **settings), rank=4, alpha=8, targets=targets)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return vlm


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_but_the_head_is_in_4_bits_and_the_policy_is_one(bases: Path, family: str) -> None:
    vlm = adapted(bases / family)
    linear = [
        module for name, module in vlm.core.named_modules() if type(module) is torch.nn.Linear and "lora" not in name
    ]
    assert linear == [vlm.core.get_output_embeddings()]
    prompts = ragged_prompts(vlm)
    rollout = sample(vlm, prompts, num_completions=3, max_new_tokens=6, seed=1)  # in evaluation mode, without gradient
    ids, mask = rollout.completion_ids_NT, rollout.mask_NT
    vlm.model.train()
    logp, _ = completion_logprobs(vlm, prompts, ids, mask)
    torch.testing.assert_close(logp.detach(), rollout.logp_NT, atol=2e-5, rtol=0)
    torch.testing.assert_close(logp, plain_logprobs(vlm, prompts, ids, mask), atol=2e-5, rtol=0)
    logp.sum().backward()
    gradients = {name: p.grad for name, p in vlm.model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradients[name].abs().sum() > 0 for name in gradients if ".layers.0.self_attn.v_proj" in name)
    # What the codes stand for, in a model of transformers' own layers, gives the same gradients.
    deep = adapted(bases / family)
    merged = four_bit.dequantised(deep.model.unload())
    plain = add_lora(VLM(merged, deep.processor, "plain"), rank=4, alpha=8, targets="both")
    plain.model.load_state_dict(
        {name: p for name, p in vlm.model.state_dict().items() if "lora_" in name}, strict=False
    )
    completion_logprobs(plain, prompts, ids, mask)[0].sum().backward()
    for name, parameter in plain.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_where_the_adapter_is(bases: Path) -> None:
    core = load_vlm(str(bases / "qwen2_vl"), device="cpu").core
    language, vision = (set(lora_layers(core, targets)) for targets in ("language", "vision"))
    assert "model.visual.merger.mlp.0" in vision and "lm_head" not in language
    assert all(name.startswith("model.language_model.") for name in language)
    assert set(lora_layers(core, "both")) == language | vision
    model = adapted(bases / "qwen2_vl", "vision").model
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{name}" for name in vision}


def make_trainer(config: Config, out: Path) -> GRPOTrainer:
    vlm = load_vlm(config.model.name, **config.model.loading, device="cpu")
    return GRPOTrainer(vlm, config, *load_parts(config.data), out)


@pytest.mark.parametrize(
    "overrides",
    [
        ADAPTER | {"grpo.beta": 0.1},
        ADAPTER | {"model.lora_targets": "both", "optimizer.gradient_checkpointing": True, "log.eval_every": 2},
        ADAPTER | {"optimizer.name": "adamw_8bit", "model.lora_rank": 80},  # 8 bits from 4,096 weights a tensor
        {"optimizer.name": "adamw_8bit", "grpo.reference": "bfloat16", "grpo.beta": 0.1},
    ],
    ids=["reference", "both-checkpointed", "8-bit-optimizer", "full"],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    overrides: dict[str, object], phantoms: Path, bases: Path, tmp_path: Path
) -> None:
    small = {"log.eval_records": 2, "optimizer.prompts_per_forward": 1}
    config = recipe(phantoms, **LETTERS, **{"model.name": str(bases / "qwen2_vl")}, **small, **overrides)
    whole = make_trainer(config, tmp_path / "whole")
    before = weights_fingerprint(whole.vlm.model)
    whole.run()
    after = weights_fingerprint(whole.vlm.model)
    assert after != before

    stopped = make_trainer(config, tmp_path / "stopped")
    assert weights_fingerprint(stopped.vlm.model) == before
    stopped.add_callback(StopAfter)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make_trainer(config, tmp_path / "stopped")
    resumed.run()
    assert weights_fingerprint(resumed.vlm.model) == after
    if config.optimizer.name == "adamw_8bit":
        states = [state for state in resumed._bare_optimizer.state.values() if "state1" in state]
        assert any(state["state1"].dtype == torch.uint8 for state in states)
    # The folder alone, which says that its base was in 4 bits, is the model that was trained.
    assert weights_fingerprint(load_vlm(str(tmp_path / "whole" / "model"), device="cpu").model) == after


@pytest.mark.parametrize("place", ["bfloat16", "cpu"])
def test_places_of_the_reference(place: str, phantoms: Path, bases: Path, tmp_path: Path) -> None:
    lines = []
    for name in ("float32", place):
        settings = {"grpo.reference": name, "grpo.beta": 0.1, "optimizer.steps": 2, "log.save_every": 9}
        config = recipe(phantoms, **LETTERS, **{"model.name": str(bases / "qwen2_vl")}, **settings)
        trainer = make_trainer(config, tmp_path / name)
        weights = list(trainer.reference.parameters())
        assert weights[0].dtype is (torch.bfloat16 if name == "bfloat16" else torch.float32)
        assert all(buffer.dtype is torch.float32 for buffer in trainer.reference.buffers())
        trainer.run()
        lines.append(read_jsonl(tmp_path / name / "log.jsonl")[:2])
    assert lines[0][0]["kl"] == pytest.approx(0, abs=1e-6)
    if place == "cpu":
        assert [line["kl"] for line in lines[0]] == [line["kl"] for line in lines[1]]
    else:
        assert 0 < lines[1][0]["kl"] < 1e-2, "its log-probs are rounded"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_what_the_4_bits_stand_for(bases: Path, family: str, tmp_path: Path) -> None:
    trained = adapted(bases / family)
    trained.model.save_pretrained(tmp_path / "adapter")
    trained.processor.save_pretrained(tmp_path / "adapter")
    trained.core.config.save_pretrained(tmp_path / "adapter")
    result = export_model(str(tmp_path / "adapter"), tmp_path / "out")
    assert result["merged"] and result["dequantised"]
    assert "dequantised in\nfloat32" in (tmp_path / "out" / "README.md").read_text()
    plain, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    torch.testing.assert_close(logits(trained, plain), logits(trained, trained.model), atol=1e-4, rtol=0)
    # A base that was saved in 4 bits is loaded so, and exported without an adapter.
    load_vlm(str(bases / family), device="cpu", quantize="nf4").model.save_pretrained(tmp_path / "saved")
    trained.processor.save_pretrained(tmp_path / "saved")
    saved = load_vlm(str(tmp_path / "saved"), device="cpu")
    assert four_bit.is_four_bit(saved.core)
    export_model(str(tmp_path / "saved"), tmp_path / "out")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(saved, plain), logits(saved, saved.model), atol=1e-4, rtol=0)


def test_mistakes_are_one_line(bases: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(phantoms, **LETTERS, **{"model.name": str(bases / "qwen2_vl"), "model.quantize": "nf4"})
    with pytest.raises(MedR1Error, match=r"4 bits and cannot be trained themselves; add --set model.lora_rank=16"):
        train(config, tmp_path / "run")
    vlm = adapted(bases / "qwen2_vl")
    with pytest.raises(MedR1Error, match=r"an adapter on a base in 4 bits; `medr1 export .* --out FOLDER`"):
        add_lora(vlm, rank=2, alpha=4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MedR1Error, match=r"model.quantize = nf4 needs bitsandbytes: pip install 'medr1\[4bit\]'"):
        load_vlm(str(bases / "qwen2_vl"), quantize="nf4")
    config = recipe(phantoms, **LETTERS, **{"model.name": str(bases / "qwen2_vl"), "optimizer.name": "adamw_8bit"})
    with pytest.raises(MedR1Error, match=r"optimizer.name = adamw_8bit needs bitsandbytes"):
        train(config, tmp_path / "run")


def test_an_adapter_over_4_bits_learns_as_one_over_the_base(phantoms: Path, bases: Path, tmp_path: Path) -> None:
    """The reward of the last five of 25 steps; on phantoms it takes minutes, see benchmarks/four_bit.py."""
    last = {}
    for quantize in ("none", "nf4"):
        settings = {"model.quantize": quantize, "model.lora_rank": 8, "model.lora_targets": "both", "grpo.beta": 0.0}
        settings |= {"optimizer.steps": 25, "optimizer.learning_rate": 1e-2, "rollout.num_completions": 8}
        settings |= {"model.name": str(bases / "qwen2_vl"), "log.save_every": 99}
        make_trainer(recipe(phantoms, **LETTERS, **settings), tmp_path / quantize).run()
        rewards = [row["reward"] for row in read_jsonl(tmp_path / quantize / "log.jsonl") if "reward" in row]
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
        last[quantize] = sum(rewards[-5:]) / 5
    assert last["nf4"] == pytest.approx(last["none"], abs=0.15)
