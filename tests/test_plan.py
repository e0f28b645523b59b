"""The estimate against counts by hand, against the real adapter, and its direction."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medr1.cli import app
from medr1.config import load_config
from medr1.errors import MedR1Error
from medr1.models import add_lora, load_vlm
from medr1.plan import Sizes, count, plan, remedy

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


def test_an_adapter_is_counted_as_peft_makes_it() -> None:
    vlm = add_lora(load_vlm("tiny"), rank=3, alpha=6)
    trained = sum(parameter.numel() for parameter in vlm.model.parameters() if parameter.requires_grad)
    assert 3 * count("tiny").linear_ends == trained


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


def test_more_costs_more_and_remedies_are_named(model_2b: str) -> None:
    sizes, recipe = count(model_2b), load_config(Path(__file__).parents[1] / "configs" / "omnimedvqa-qwen2vl-2b.toml")
    base = plan(sizes, recipe, **machine())
    longer = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_new_tokens": 512})})
    assert plan(sizes, longer, **machine())["step_seconds"] > base["step_seconds"]
    assert plan(sizes, recipe, **machine(image_side=784))["needed_gb"] > base["needed_gb"]
    assert base["fits"] and remedy(sizes, recipe, **machine())[0] == []
    added, needs = remedy(sizes, recipe, **machine(gpu="rtx4090"))
    assert needs["fits"] and added == ["optimizer.prompts_per_forward=1", "model.lora_rank=64"]


def test_command_and_mistakes(model_2b: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--model", model_2b, "--gpu", "h100", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["fits"]
    with pytest.raises(MedR1Error, match="--gpu tpu: is not known; choose rtx4090"):
        plan(count("tiny"), load_config(), **machine(gpu="tpu"))
    with pytest.raises(MedR1Error, match="8 cannot be divided among 3 GPUs"):
        plan(count("tiny"), load_config(), **machine(gpus=3))
    with pytest.raises(MedR1Error, match="cannot be counted"):
        count(str(Path(model_2b) / "nowhere"))
