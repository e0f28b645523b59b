"""The estimate against counts by hand, against the real adapter, and its direction."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny_vlms import conversation, picture, tiny_vlm
from transformers import Qwen2VLForConditionalGeneration
from typer.testing import CliRunner

from medr1.cli import app
from medr1.config import Config, load_config
from medr1.errors import MedR1Error
from medr1.policy import four_bit
from medr1.policy.adapters import add_lora
from medr1.policy.encoding import encode_prompts
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, load_vlm
from medr1.training.balance import balance
from medr1.training.plan import (
    GPUS,
    KNOWN,
    LINKS,
    UTILISATION,
    Sizes,
    _counted,
    count,
    gpu_named,
    image_tokens,
    plan,
    published,
    remedy,
    saved_by_layer,
    saved_by_patch,
)

QWEN2_VL_2B = {
    "model_type": "qwen2_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
}


@pytest.fixture
def model_2b(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_VL_2B))
    return str(tmp_path)


def machine(**changes: object) -> dict:
    return {"image_side": 392, "gpu": "a100", "gpus": 1} | changes


def test_counts_are_those_of_the_published_model(model_2b: str) -> None:
    sizes = count(model_2b)
    assert sizes.weights == 2_208_985_600
    layer = 1536 * (1536 + 2 * 256) + 1536 + 2 * 256 + 1536**2 + 3 * 1536 * 8960 + 2 * 1536  # with biases and norms
    assert sizes.text == 28 * layer
    assert sizes.embeddings == 151936 * 1536 + 1536
    assert (sizes.key_value, sizes.token_side, sizes.patches) == (256, 28, 4)


@pytest.mark.parametrize("file", sorted(KNOWN.glob("*.json")), ids=lambda file: file.stem)
def test_models_in_the_package_have_their_published_number_of_weights(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hub, by the names that people give."""
    monkeypatch.setattr("medr1.training.plan.find_model", None)
    facts = json.loads(file.read_text())
    asked = facts.get("names", [f"Qwen/{file.stem}-Instruct"])
    sizes = count(file.stem)
    assert sizes.weights == facts["weights"]
    assert {published(name) for name in [*asked, file.stem.lower(), f"someone/{file.stem}@main"]} == {file}
    assert 0.75 < sizes.linear / sizes.weights < 1 and sizes.vision_width and sizes.vision_layers


MODELS = ("Qwen2-VL-2B", "Qwen2.5-VL-7B", "Qwen3-VL-4B", "MedGemma-4B", "InternVL-8B")


@pytest.mark.parametrize("model", MODELS)
def test_one_gpu_of_16_24_and_80_gb_without_a_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO of 8 prompts with 8 completions of 256 tokens: what must be added for each, and that it then fits."""
    monkeypatch.setattr("medr1.training.plan.find_model", None)
    found = {}
    for memory in (16, 24, 80):
        result = CliRunner().invoke(app, ["plan", "--model", model, "--memory", str(memory), "--json"])
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout.splitlines()[-1])
        assert told["fits"] and told["needed_gb"] <= told["usable_gb"], (memory, told)
        assert f"1 x {memory} GB" in result.output and "Seconds are those of one that is as quick as" in result.output
        found[memory] = told["settings_added"]
    assert "model.quantize=nf4" in found[16] or not re.search("[78]B", model)
    assert "model.quantize=nf4" not in found[80]
    assert "model.lora_rank=64" in found[24]


def test_units_are_those_of_their_number() -> None:
    needs = plan(count("tiny"), load_config(), **machine())
    for hours, said in ((1.0, "1 hour for"), (2.0, "2 hours for"), (0.5, "0.5 hours for")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("medr1.training.plan.remedy", Mock(return_value=([], needs | {"hours_per_epoch": hours})))
            assert said in CliRunner().invoke(app, ["plan", "--model", "tiny"]).output


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("A100", "a100"),
        ("A100 80GB", "a100"),
        ("a100-40gb", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("H100 PCIe", "h100"),
        ("Tesla V100", "v100"),
        ("RTX A5000", "a5000"),
    ],
)
def test_names_of_gpus(said: str, key: str) -> None:
    assert gpu_named(said) == key
    assert all(gpu_named(name) == name for name in GPUS)


def test_the_published_model_is_the_one_in_the_package(model_2b: str) -> None:
    assert count("Qwen/Qwen2-VL-2B-Instruct") == count(model_2b)


@pytest.mark.parametrize(
    ("name", "side", "limits", "tokens"),
    [
        ("Qwen/Qwen2-VL-2B", 384, {}, 196),  # 13.7 tokens a side: 14, 392 pixels
        ("Qwen/Qwen2-VL-2B", 405, {}, 196),
        ("Qwen/Qwen2-VL-2B", 28, {}, 4),  # scaled up to 56 x 56
        ("Qwen/Qwen2-VL-2B", 2000, {}, 484),  # of at most 512, 22 a side
        ("Qwen/Qwen2-VL-2B", 2000, {"model.max_pixels": 384 * 384}, 169),  # 13 a side: 14 would be above it
        ("Qwen/Qwen2-VL-2B", 100, {"model.min_pixels": 384 * 384}, 196),
        ("Qwen/Qwen3-VL-2B", 224, {}, 64),  # of at least 256 x 256, 32 a token
        ("tiny", 28, {}, 4),
        ("tiny", 500, {}, 16),  # of at most 112 x 112
        ("MedGemma-4B", 100, {}, 256),  # any image
        ("LLaVA-1.5-7B", 2000, {}, 576),
        ("InternVL3-8B", 392, {}, 256),
        ("InternVL3-8B", 800, {}, 5 * 256),  # 2 x 2 tiles of 448, and the whole
        ("InternVL3-8B", 4000, {}, 10 * 256),  # a square of at most 12
        ("InternVL3-8B", 4000, {"model.max_pixels": 900_000}, 5 * 256),
        ("SmolVLM2-2.2B", 100, {}, 17 * 81),  # scaled up to 4 x 4
    ],
)
def test_image_tokens_are_the_processors(name: str, side: int, limits: dict[str, int], tokens: int) -> None:
    recipe = load_config(overrides=limits)
    sizes = count(name)
    assert image_tokens(sizes, recipe, side) == tokens
    assert plan(sizes, recipe, **machine(image_side=side), text_tokens=10)["prompt_tokens"] == tokens + 10


def test_image_tokens_of_tiny_are_what_a_model_gets() -> None:
    for side in (30, 64, 100, 300):
        vlm = load_vlm("tiny")
        prompts = encode_prompts(vlm, [conversation("What?", 1)], [[picture(0, side, side)]])
        count_of_image = int(prompts.vision["image_grid_thw"].prod()) // count("tiny").patches
        assert image_tokens(count("tiny"), load_config(), side) == count_of_image


def test_an_adapter_is_counted_as_peft_makes_it() -> None:
    vlm = add_lora(load_vlm("tiny"), rank=3, alpha=6)
    trained = sum(parameter.numel() for parameter in vlm.model.parameters() if parameter.requires_grad)
    assert 3 * count("tiny").linear_ends == trained


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "qwen3_5", "lfm2_vl"])
def test_keys_and_values_are_those_that_a_cache_holds(family: str) -> None:
    """Layers with a state keep none, however long the text is."""
    vlm = tiny_vlm(family)
    cache = vlm.core(input_ids=torch.arange(5, 9)[None], use_cache=True).past_key_values
    kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert _counted(vlm.core, {}).cached * 4 == sum(layer.keys.numel() + layer.values.numel() for layer in kept)


@pytest.mark.parametrize("family", ["gemma4", "blip_2"])
def test_a_model_that_cannot_be_counted_is_one_line(family: str, tmp_path: Path) -> None:
    """Layers whose heads differ, and layers elsewhere than in other families."""
    tiny_vlm(family).core.config.save_pretrained(tmp_path)
    with pytest.raises(MedR1Error, match="its configuration cannot be counted") as caught:
        count(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_memory_and_time_by_hand() -> None:
    """A model of round numbers: 100 text weights, 20 of embeddings, 30 of the tower."""
    sizes = Sizes(100, 20, 30, 10, 2, 4, 8, 4, 1000, 28, 4, 1, 2)
    changes = {"rollout.num_completions": 2, "rollout.max_new_tokens": 5, "optimizer.prompts_per_step": 1}
    needs = plan(sizes, load_config(overrides=changes), text_tokens=6, **machine(image_side=56))
    assert needs["prompt_tokens"] == 4 + 6
    assert needs["fits"]
    big = Sizes(*(10**9 * number for number in (1, 0, 1)), 10, 2, 4, 8, 4, 1000, 28, 4, 1, 2)
    memory = plan(big, load_config(overrides=changes), text_tokens=6, **machine(image_side=56))["memory_gb"]
    assert (memory["weights"], memory["gradients and AdamW"], memory["reference"]) == (8.0, 24.0, 8.0)
    frozen = load_config(overrides=changes | {"model.train_vision": False, "grpo.beta": 0.0})
    memory = plan(big, frozen, text_tokens=6, **machine(image_side=56))["memory_gb"]
    assert (memory["weights"], memory["gradients and AdamW"], memory["reference"]) == (8.0, 12.0, 0.0)
    lora = load_config(overrides=changes | {"model.lora_rank": 10**8, "optimizer.prompts_per_step": 2})
    memory = plan(big, lora, text_tokens=6, **machine(image_side=56, gpus=2, sharded=True))["memory_gb"]
    assert (memory["weights"], memory["gradients and AdamW"]) == (4.0, 6.0)


def needed(**changes: object) -> dict:
    """By the model of round numbers above, with 10**12 text weights, for one prompt of 2 completions of 5 tokens."""
    big = Sizes(*(10**12 * number for number in (1, 0, 1)), 10, 2, 4, 8, 4, 1000, 28, 4, 1, 2)
    settings = {"rollout.num_completions": 2, "rollout.max_new_tokens": 5, "optimizer.prompts_per_step": 1}
    return plan(big, load_config(overrides=settings | changes), text_tokens=6, **machine(image_side=56))


def test_what_a_recipe_does_in_a_step_is_counted() -> None:
    rate = 312e12 * UTILISATION
    plain = needed(**{"grpo.beta": 0.0})
    # A reader of the reasoning is a copy of the policy before training: 4 bytes of 2e12 weights.
    read = needed(**{"grpo.beta": 0.0, "grpo.rewards.consistency": 1.0})
    assert (plain["memory_gb"]["reference"], read["memory_gb"]["reference"]) == (0.0, 8000.0)
    # Of four updates on one set of rollouts one samples and asks the reference, and an epoch has four times the steps.
    one, four = needed(), needed(**{"grpo.num_iterations": 4})
    for name in ("rollout", "reference"):
        assert four["seconds"][name] == pytest.approx(one["seconds"][name] / 4, rel=0.01) != 0
    # What sampling read of a prompt, 2 FLOPs a weight for 10 tokens and 16 patches, is computed again.
    again = (2e12 * 10 + 2e12 * 16) / rate
    assert four["seconds"]["policy"] == pytest.approx(one["seconds"]["policy"] + again, abs=2e-3)
    assert four["hours_per_epoch"] == pytest.approx(71_200 * 4 * four["step_seconds"] / 3600, rel=0.01)


def test_terms_of_another_image_keep_a_graph_each() -> None:
    """Of a model whose activations are large: each graph is as large as the policy's, and all are there at once."""
    sizes = count("Qwen2-VL-2B")

    def of(**changes: object) -> tuple[float, float]:
        needs = plan(sizes, load_config(overrides={"grpo.beta": 0.0, **changes}), **machine())
        return needs["memory_gb"]["activations"], needs["seconds"]["policy"]

    plain, one, two = (
        of(**{"grpo.perception": weight, "grpo.hold_to_chance": other})
        for weight, other in ((0.0, 0.0), (0.05, 0.0), (0.05, 0.2))
    )
    assert one[0] == pytest.approx(2 * plain[0], abs=0.02) and two[0] == pytest.approx(3 * plain[0], abs=0.02)
    assert plain[1] < one[1] - plain[1] == pytest.approx(two[1] - one[1], abs=2e-3)


def test_sft_samples_nothing_and_reads_answers() -> None:
    needs = needed(method="sft", **{"rollout.mode": "no-think", "grpo.rewards": {"consistency": 1.0}})
    assert needs["seconds"]["rollout"] == needs["seconds"]["reference"] == 0
    assert needs["memory_gb"]["reference"] == needs["memory_gb"]["keys and values"] == 0
    assert needs == needed(method="sft", **{"rollout.num_completions": 8, "rollout.max_new_tokens": 99})
    done = CliRunner().invoke(app, ["plan", "--model", "tiny", "--set", "method=sft", "--servers"])
    assert done.exit_code == 1 and "--servers: is for GRPO" in str(done.exception)


def test_a_gpu_without_bfloat16_holds_what_it_computes_in_float32() -> None:
    sizes = count("Qwen2-VL-2B")
    lora = {"model.lora_rank": 16}
    halves, whole, asked = (
        plan(sizes, load_config(overrides=lora | settings), **machine(gpu=gpu))["memory_gb"]["weights"]
        for gpu, settings in (("l4", {}), ("t4", {}), ("t4", {"model.dtype": "bfloat16"}))
    )
    assert whole - halves == pytest.approx(2 * sizes.weights / 1e9, abs=0.01) and asked == halves


# `python benchmarks/rehearsal.py`, as benchmarks/README.md and the README tell it: one LoRA step (rank 16) of
# Qwen2-VL-2B with random bfloat16 weights on two CPU cores, 304 prompt tokens of which 196 are the image's, G = 8, 16
# new tokens.
GIB = 2**30 / 1e9
MEASURED_HELD, MEASURED_PEAK = 5.1 * GIB, 7.6 * GIB
MEASURED_SECONDS = {"rollout": 7.0, "policy": 5.1, "reference": 1.9, "rest": 1.6}
PROCESS = 1.05
"""GB of the same process with the tiny model in place of the large: Python and its libraries, TRL among them."""
REHEARSAL = {
    "model.lora_rank": 16,
    "rollout.num_completions": 8,
    "rollout.max_new_tokens": 16,
    "optimizer.prompts_per_step": 1,
    "grpo.beta": 0.04,
}


def test_memory_agrees_with_the_rehearsal(model_2b: str) -> None:
    """Within 3 % of what was held before the step, and within 6 % of its peak."""
    sizes = count(model_2b)
    needs = plan(sizes, load_config(overrides=REHEARSAL), text_tokens=304 - 196, **machine())
    assert needs["prompt_tokens"] == 304
    assert needs["memory_gb"]["weights"] + PROCESS == pytest.approx(MEASURED_HELD, rel=0.03)
    # What a CPU needs beyond a GPU: without autocast the adapters' inputs are float32 (2 bytes more), and the prompt's
    # keys and values are copied for each completion.
    inputs = 2 * (6 * sizes.hidden + sizes.intermediate) * (304 + 8 * 16) * sizes.layers / 1e9
    copies = 4 * sizes.key_value * 8 * 304 * sizes.layers / 1e9
    assert sum(needs["memory_gb"].values()) + inputs + copies + PROCESS == pytest.approx(MEASURED_PEAK, rel=0.06)


def test_flops_against_the_rehearsals_seconds(model_2b: str) -> None:
    """The tower and the reference pass run at one rate within a third; the policy pass at half of it.

    That pass is what FLOPs of the base leave out most of: adapters in float32, casts for them, and a backward pass over
    the transposed weights. Decoding is bound by reading weights: 16 tokens of 8 rows are 0.4 TFLOP and take most of the
    rollout's 7 s, which is 3.1 GB of weights in 0.4 s a step.
    """
    sizes = count(model_2b)
    needs = plan(sizes, load_config(overrides=REHEARSAL), text_tokens=304 - 196, **machine())
    rate = 312e12 * UTILISATION
    counted = {name: seconds * rate for name, seconds in needs["seconds"].items()}  # rounded to 1e-3 s: 5 %
    tower = 2 * sizes.vision * 196 * 4
    text, head = 2 * sizes.text * (304 + 128), 2 * sizes.vocabulary * sizes.hidden * 128
    assert counted["reference"] == pytest.approx(text + head, rel=0.06)
    assert counted["policy"] == pytest.approx(2 * sizes.text * 128 + head + text + head, rel=0.06)
    speed = {
        "tower": tower / MEASURED_SECONDS["rest"],
        "reference": counted["reference"] / MEASURED_SECONDS["reference"],
        "policy": counted["policy"] / MEASURED_SECONDS["policy"],
    }
    assert speed["tower"] == pytest.approx(speed["reference"], rel=1 / 3)
    assert 0.4 < speed["policy"] / speed["reference"] < 0.6


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_activations_are_what_autograd_saves(lora_rank: int) -> None:
    """One more text layer, one more layer of the tower: bytes of the tensors that a bfloat16 forward pass keeps."""
    hidden, intermediate, kv, rank = 256, 1024, 64, lora_rank
    completions, new = 4, 16

    def saved(layers: int, depth: int) -> tuple[int, int, int]:
        """Bytes, tokens of the prompt, patches."""
        vlm = tiny_vlm("qwen2_vl")
        config = vlm.core.config
        text = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        text |= {"num_key_value_heads": 1, "layer_types": ["full_attention"] * layers}
        for section, values in ((config.text_config, text), (config.vision_config, {"depth": depth})):
            for name, value in values.items():
                setattr(section, name, value)
        config.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
        config.vision_config.embed_dim, config.vision_config.hidden_size = 128, hidden
        config.vision_config.mlp_ratio = 4
        dtype = torch.bfloat16 if rank else torch.float32
        vlm = VLM(Qwen2VLForConditionalGeneration(config).to(dtype), vlm.processor, "wide")
        vlm = add_lora(vlm, rank=rank, alpha=8) if rank else vlm
        prompts = encode_prompts(vlm, [conversation("What is it? " * 5, 1)], [[picture(0, 112, 112)]])
        kept: dict[int, tuple[int, torch.Tensor]] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in vlm.model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        # None begins as another does, and the last tokens are not computed.
        ids = 65 + torch.arange(completions)[:, None].expand(-1, new + 1)
        mask = torch.ones_like(ids)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            result = completion_logprobs(vlm, prompts, ids, mask)
        assert result[0].requires_grad
        patches = int(prompts.vision["image_grid_thw"].prod())
        return sum(size for size, _ in kept.values()), prompts.input_ids_BP.shape[1], patches

    sizes = Sizes(0, 0, 0, 0, 1, hidden, intermediate, kv, 300, 28, 4, 1, 128)
    one, prompt, patches = saved(1, 1)
    tokens = prompt + completions * new
    linear = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate
    ends = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + intermediate)
    beside = 2 * (rank * ends if rank else linear)  # bfloat16 copies, counted apart
    # A CPU copies the prompt's keys and values for each completion, and has all of attention in float32.
    beside += 8 * kv * completions * prompt
    beside += 2 * tokens * (2 * hidden + 2 * kv) + 2 * (prompt**2 + completions * new * (prompt + new))
    beside += 2 * tokens * hidden
    beside += 14 * rank * tokens
    layer = saved(2, 1)[0] - one - beside
    assert layer / tokens == pytest.approx(saved_by_layer(sizes, lora=bool(rank)), rel=0.02)
    if not rank:
        tower = saved(1, 2)[0] - one - 2 * (4 * 128 * 128 + 8 * 128 * 128)
        assert tower / patches == pytest.approx(saved_by_patch(sizes), rel=0.04)


def test_sharded_and_on_several_nodes(model_2b: str) -> None:
    sizes = count(model_2b)
    recipe = load_config(overrides={"optimizer.prompts_per_step": 32, "optimizer.gradient_checkpointing": True})
    alone = plan(sizes, recipe, **machine(gpus=1))
    copies, sharded = plan(sizes, recipe, **machine(gpus=8)), plan(sizes, recipe, **machine(gpus=8, sharded=True))
    nodes = plan(sizes, recipe, **machine(gpus=8, nodes=2, sharded=True))
    assert "between GPUs" not in alone["seconds"]
    gradients = 4 * sizes.weights  # float32; a ring sends each byte twice, but for its own eighth
    assert copies["seconds"]["between GPUs"] == pytest.approx(2 * 7 / 8 * gradients / 250e9, abs=1e-3)
    assert sharded["seconds"]["between GPUs"] > copies["seconds"]["between GPUs"]
    assert nodes["seconds"]["between GPUs"] > 5 * sharded["seconds"]["between GPUs"], "the network is slower"
    for part in ("weights", "gradients and AdamW", "reference"):
        assert sharded["memory_gb"][part] == pytest.approx(copies["memory_gb"][part] / 8, abs=0.01)
        assert nodes["memory_gb"][part] == pytest.approx(copies["memory_gb"][part] / 16, abs=0.01)
    lora = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora_rank": 8})})
    whole = plan(sizes, lora, **machine(gpus=8, sharded=True))["memory_gb"]["bfloat16 copies"]
    assert whole == pytest.approx(2 * sizes.weights / 1e9, abs=0.01), "whole weights while sampling"
    assert alone["hours_per_epoch"] / 8 < copies["hours_per_epoch"] < alone["hours_per_epoch"], (
        "decoding waits for launches, which fewer prompts do not make fewer"
    )


def test_more_costs_more_and_remedies_are_named(model_2b: str) -> None:
    sizes, recipe = count(model_2b), load_config(Path(__file__).parents[1] / "configs" / "omnimedvqa-qwen2vl-2b.toml")
    base = plan(sizes, recipe, **machine())
    longer = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_new_tokens": 512})})
    assert plan(sizes, longer, **machine())["step_seconds"] > base["step_seconds"]
    assert plan(sizes, recipe, **machine(image_side=784))["needed_gb"] > base["needed_gb"]
    assert base["fits"] and remedy(sizes, recipe, **machine())[0] == []
    added, needs = remedy(sizes, recipe, **machine(gpu="rtx4090"))
    assert needs["fits"] and added == ["model.lora_rank=64"]
    assert remedy(sizes, recipe, **machine(gpu="rtx4090", memory=6))[0][-1] == "model.quantize=nf4"
    added, needs = remedy(sizes, recipe, **machine(memory=1))
    assert not needs["fits"] and added[-1] == "model.quantize=nf4"


def test_four_bits_and_targets(model_2b: str) -> None:
    sizes = count(model_2b)
    lora = {"model.lora_rank": 16, "optimizer.prompts_per_step": 1}
    memory = {
        (quantize, targets): plan(
            sizes,
            load_config(overrides=lora | {"model.quantize": quantize, "model.lora_targets": targets}),
            **machine(),
        )["memory_gb"]
        for quantize in ("none", "nf4")
        for targets in ("language", "vision", "both")
    }
    halved = 2 * sizes.weights - (2 - four_bit.BYTES) * sizes.linear
    ends = sizes.linear_ends, sizes.vision_ends
    for targets, trained in zip(("language", "vision", "both"), (*ends, sum(ends)), strict=True):
        assert memory["none", targets]["weights"] == round((2 * sizes.weights + 64 * trained) / 1e9, 2)
        assert memory["nf4", targets]["weights"] == round((halved + 64 * trained) / 1e9, 2)
    assert memory["nf4", "both"]["activations"] > memory["nf4", "language"]["activations"]
    eight = load_config(overrides={"optimizer.name": "adamw_8bit"})
    parts = plan(sizes, eight, **machine())["memory_gb"], plan(sizes, load_config(), **machine())["memory_gb"]
    assert parts[0]["gradients and AdamW"] == pytest.approx(parts[1]["gradients and AdamW"] / 2, abs=0.02)
    with pytest.raises(MedR1Error, match=r"is for a base under LoRA; set model.lora_rank"):
        plan(sizes, load_config(overrides={"model.quantize": "nf4"}), **machine())


def test_the_numbers_in_the_docs_are_what_plan_prints() -> None:
    root = Path(__file__).parents[1]
    docs = " ".join(" ".join(path.read_text() for path in [root / "README.md", *root.glob("docs/*.md")]).split())
    for overrides, where, says in (
        ({"model.lora_rank": 64}, machine(gpu="rtx4090"), "{needed_gb} of 22 GB usable, {hours_per_epoch} hours"),
        ({}, machine(), "({needed_gb} of 72 GB, {hours_per_epoch} hours)"),
        (
            {"optimizer.prompts_per_step": 32},
            machine(gpus=8, sharded=True),
            "({needed_gb} GB each, {hours_per_epoch} h",
        ),
        (
            {"optimizer.prompts_per_step": 64},
            machine(gpus=8, nodes=2, sharded=True),
            "({needed_gb} GB, {hours_per_epoch}",
        ),
    ):
        recipe = load_config(root / "configs" / "omnimedvqa-qwen2vl-2b.toml", overrides)
        needs = plan(count("Qwen/Qwen2-VL-2B-Instruct"), recipe, **where)
        assert needs["fits"] and says.format(**needs) in docs, says.format(**needs)


def test_command_and_mistakes(model_2b: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--model", model_2b, "--gpu", "h100", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["fits"]
    small = CliRunner().invoke(app, ["plan", "--model", "tiny", "--gpu", "T4", "--memory", "8"])
    assert small.exit_code == 0 and "million weights" in small.output and "of 7 GB" in small.output
    assert "has no bfloat16" in small.output
    assert GPUS.keys() == LINKS.keys()
    assert plan(count("tiny"), load_config(), **machine(gpu="b200"), memory=24)["usable_gb"] == 21.6
    with pytest.raises(MedR1Error, match="--gpu tpu: is not known; give its --memory in GB, or choose rtx2080ti"):
        plan(count("tiny"), load_config(), **machine(gpu="tpu"))
    with pytest.raises(MedR1Error, match="8 cannot be divided among 3 GPUs"):
        plan(count("tiny"), load_config(), **machine(gpus=3))
    with pytest.raises(MedR1Error, match="no such folder"):
        count(str(Path(model_2b) / "nowhere"))


REHEARSALS = json.loads((Path(__file__).parents[1] / "benchmarks" / "rehearsal.json").read_text())


@pytest.mark.parametrize("measured", REHEARSALS, ids=lambda measured: measured["model"])
def test_a_rehearsal_in_4_bits_took_what_is_counted(measured: dict) -> None:
    """One step on a CPU of a published shape, adapters on both towers: what was held before it within 3 %, its peak
    within 10 %."""
    name = measured["model"].split(",")[0]
    settings = {"model.dtype": "bfloat16", "model.quantize": "nf4", "model.lora_rank": 16, "model.lora_targets": "both"}
    settings |= {"rollout.num_completions": measured["completions"], "rollout.max_new_tokens": measured["new_tokens"]}
    settings |= {"optimizer.prompts_per_step": 1, "optimizer.gradient_checkpointing": True}
    sizes, recipe = count(name), load_config(overrides=settings)
    text = measured["prompt_tokens"] - image_tokens(sizes, recipe, 392)
    parts = plan(sizes, recipe, **machine(), text_tokens=text)["memory_gb"]
    process, held, peak = (measured[f"{name}_mib"] * 2**20 / 1e9 for name in ("process", "weights", "peak"))
    assert parts["weights"] + process == pytest.approx(held, rel=0.03)
    assert sum(parts.values()) + process == pytest.approx(peak, rel=0.1)


BIG = Sizes(
    text=10**9,
    embeddings=10**8,
    vision=0,
    linear_ends=10**6,
    layers=10,
    hidden=1000,
    intermediate=4000,
    key_value=100,
    vocabulary=10**5,
    token_side=28,
    patches=4,
    vision_layers=0,
    vision_width=0,
)
FLEET = {"image_side": 392, "gpu": "a100"}


def recipe_of(**changes: object) -> Config:
    settings = {"optimizer.prompts_per_step": 4, "rollout.num_completions": 8, "grpo.beta": 0.0}
    return load_config(overrides=settings | changes)


def test_what_a_sampler_takes_by_hand() -> None:
    """One of two GPUs samples 4 prompts of 196 + 110 tokens, 8 completions of 256 tokens each.

    A token of all rows: 2.2e9 bytes of weights; of keys and values 32 rows x 4 x 10 x 100 bytes x (306 + 128) tokens =
    55.6e6; at 2,039 GB/s 1.106 ms. Products: 2 x 32 x 1.1e9 / (312e12 x 0.4) = 0.56 ms. The server's own 3 ms are more:
    256 x 3 ms = 0.768 s. Reading: 4 x 2e9 x 306 / 124.8e12 = 0.020 s. Handing over: 2.2e9 / 250e9 = 0.009 s.
    """
    two = balance(BIG, recipe_of(), 2, **FLEET)
    assert (two["samplers"], two["trainers"], two["prompts"]) == (1, 1, 4)
    assert two["seconds"]["weights"] == 0.009 and two["seconds"]["sampling"] == 0.79
    assert two["limits"] == {"sampling": "scheduling", "training": "products"}
    training = two["seconds"]["training"]
    assert two["step_seconds"] == pytest.approx(0.009 + max(0.788, training), abs=0.011)
    assert two["waiting_seconds"] == pytest.approx(0.009 + 0.788 + training, abs=0.011)
    one = balance(BIG, recipe_of(), 1, **FLEET)
    assert one["samplers"] == 0 and one["step_seconds"] == one["waiting_seconds"]


def test_the_balance_goes_where_the_time_is() -> None:
    """Longer replies take more samplers; where many rows are under way at a time, memory or products bound them."""
    few, many = (balance(BIG, recipe_of(**{"rollout.max_new_tokens": n}), 64, **FLEET) for n in (64, 4096))
    assert few["samplers"] < many["samplers"] and few["samplers"] + few["trainers"] == 64
    wide = balance(BIG, recipe_of(**{"optimizer.prompts_per_step": 64}), 8, **FLEET)
    assert wide["limits"]["sampling"] == "products"
    assert (
        balance(BIG, recipe_of(), 8, **FLEET)["step_seconds"] < balance(BIG, recipe_of(), 8, **FLEET)["waiting_seconds"]
    )
    assert not balance(BIG, recipe_of(), 8, **FLEET, memory=2.0)["fits"]


def test_the_command_shows_three_fleets(model_2b: str) -> None:
    settings = ["--gpu", "h100", "--servers", "--json"]
    done = CliRunner().invoke(app, ["plan", "--model", model_2b, *settings])
    assert done.exit_code == 0, done.output
    fleets = json.loads(done.output.splitlines()[-1])["servers"]
    assert [one["samplers"] + one["trainers"] for one in fleets] == [1, 8, 64]
