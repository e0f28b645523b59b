"""What a GRPO step will need: memory and time by part, counted from a model's configuration before a GPU is rented.

    medr1 plan --config configs/omnimedvqa-qwen2vl-2b.toml --gpu a100 --gpus 8

Bytes and FLOPs are counted, not measured: a product with a matrix of N weights costs 2N FLOPs a token forward and 4N
backward; attention and norms are left out, products are taken to reach UTILISATION of the peak, a decoding step takes
no less than EAGER_LAYER a layer, and what GPUs send each other waits for the computation and is not hidden behind it.
These constants are assumptions; no GPU was measured here. What was measured, one step on two CPU cores and the tensors
that autograd saves, is held against these counts in tests/test_plan.py. The shared prefix is counted as it is computed:
P prompt tokens once and G*T completion tokens for a group.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from medr1.errors import MedR1Error
from medr1.policy.names import find_model
from medr1.policy.pixels import PUBLISHED
from medr1.policy.shared_prefix import MAX_LOGITS

if TYPE_CHECKING:
    from medr1.config import Config

KNOWN = Path(__file__).parent / "plan_configs"
"""Configurations of published models, a file each: weights (their published number, which ours must equal), min_pixels
(of an image, by their processor) and config. So a plan for them needs no network."""
GPUS = {
    "t4": (16, 65, 320),
    "v100": (32, 125, 900),
    "rtx3090": (24, 71, 936),
    "rtx4090": (24, 165, 1008),
    "a6000": (48, 155, 768),
    "l4": (24, 121, 300),
    "l40s": (48, 362, 864),
    "a100": (80, 312, 2039),
    "a100-40": (40, 312, 1555),
    "h100": (80, 989, 3350),
    "h200": (141, 989, 4800),
    "b200": (180, 2250, 8000),
}
"""Name to memory in GB, dense bfloat16 TFLOP/s (float16 where there is no bfloat16) and memory bandwidth in GB/s, from
the vendors' data sheets."""
NO_BFLOAT16 = ("t4", "v100")
LINKS = dict.fromkeys(GPUS, 25) | {
    "t4": 12,
    "v100": 120,
    "a100": 250,
    "a100-40": 250,
    "h100": 375,
    "h200": 375,
    "b200": 720,
}
"""GB/s that a GPU sends to its neighbours in a node: of the data sheets' PCIe or NVLink (a direction), about 80 %."""
NETWORK = 40
"""GB/s that a node sends to others: 400 Gbit/s, of which 80 %."""
UTILISATION = 0.4
EAGER_LAYER = 0.8e-3
"""Seconds in which Python launches one layer's kernels; what decoding waits for with so few rows."""
USABLE = 0.9
"""Share of a GPU's memory that a step may plan with; the rest is the allocator's and the libraries'."""
PROMPT_TEXT = 110
"""Tokens of a prompt beside its image: a typical question with four options and the instruction."""
OMNIMEDVQA = 71_200
"""Training questions of an 80 % split of OmniMedVQA's open part (88,996)."""
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights, and the widths that activations come from."""

    text: int
    """Of the text layers, without embeddings."""
    embeddings: int
    vision: int
    linear_ends: int
    """Sum of inputs and outputs of all linear layers in the text layers: weights of a LoRA adapter of rank 1."""
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    """Width of all keys of a token, and of all values."""
    vocabulary: int
    token_side: int
    """Side of the square of pixels behind one image token."""
    patches: int
    """Patches of the vision tower behind one image token."""
    vision_layers: int
    vision_width: int
    min_pixels: int = 56 * 56
    """Of an image, which the processor scales up to them; those of Qwen2-VL."""
    max_pixels: int = PUBLISHED
    """Of an image, which the processor scales down to them."""

    @property
    def weights(self) -> int:
        return self.text + self.embeddings + self.vision


def count(model: str) -> Sizes:
    """Count a model's weights from its configuration; no weights are loaded.

    Raises:
        MedR1Error: no such model, or none of a known layout.
    """
    try:
        config, limits = _described(model)
        with torch.device("meta"):
            network: Any = AutoModelForImageTextToText.from_config(config)
        text, vision = config.get_text_config(), config.vision_config
        merge, token_side = vision.spatial_merge_size, vision.patch_size * vision.spatial_merge_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MedR1Error(f"{model}: its configuration cannot be counted ({reason}); name a Qwen-VL model") from error
    parts = {"text": 0, "embeddings": 0, "vision": 0}
    for name, parameter in network.named_parameters():
        part = "vision" if ".visual." in name else "text" if ".layers." in name else "embeddings"
        parts[part] += parameter.numel()
    layers = [layer for name, layer in network.named_modules() if ".layers." in name and ".visual." not in name]
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        **parts,
        linear_ends=sum(layer.in_features + layer.out_features for layer in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        key_value=text.num_key_value_heads * head,
        vocabulary=text.vocab_size,
        token_side=token_side,
        patches=merge**2,
        vision_layers=vision.depth,
        vision_width=getattr(vision, "embed_dim", vision.hidden_size),
        **limits,
    )


def _described(model: str) -> tuple[Any, dict[str, int]]:
    """A model's configuration, and the limits of its images where they are known: of KNOWN, of a folder, of the hub."""
    known = KNOWN / f"{re.sub('-(Instruct|Thinking)$', '', model.removeprefix('Qwen/'))}.json"
    if model.startswith("Qwen/") and known.is_file():
        facts = json.loads(known.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**facts["config"]), {"min_pixels": facts["min_pixels"]}
    place = find_model(model, weights=False)
    config = AutoConfig.from_pretrained(str(place.weights))
    try:
        size = AutoImageProcessor.from_pretrained(str(place.processor)).size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": min(size["longest_edge"], PUBLISHED)}
    except (OSError, ValueError, KeyError):  # a configuration alone
        limits = {}
    return config, limits


def image_tokens(sizes: Sizes, config: "Config", image_side: int) -> int:
    """Tokens of a square image, as the processor scales it: within the limits, to the nearest whole tokens."""
    most = config.model.max_pixels or sizes.max_pixels
    least = config.model.min_pixels or min(sizes.min_pixels, most)
    height, width = smart_resize(image_side, image_side, sizes.token_side, least, most)
    return height * width // sizes.token_side**2


def plan(
    sizes: Sizes,
    config: "Config",
    *,
    image_side: int,
    gpu: str,
    gpus: int,
    nodes: int = 1,
    sharded: bool = False,
    memory: float | None = None,
    text_tokens: int = PROMPT_TEXT,
) -> dict[str, Any]:
    """Memory of a GPU and time of a step.

    Args:
        config: a GRPO recipe; the GPUs divide its `prompts_per_step`.
        image_side: pixels of a square image's side, before the processor scales it.
        gpu: a key of GPUS.
        gpus: GPUs of a node.
        sharded: weights, gradients, optimizer and reference are divided over all GPUs (FSDP2). While it samples, each
            GPU holds all weights once, in bfloat16.
        memory: GB of a GPU where it has not what GPUS says.

    Returns:
        memory_gb: bytes by part / 1e9; needed_gb, usable_gb, fits; seconds: by part of a step;
        step_seconds; prompt_tokens; hours_per_epoch (of OMNIMEDVQA questions, over all GPUs).

    Raises:
        MedR1Error: an unknown GPU, or prompts that the GPUs cannot divide evenly.
    """
    if gpu not in GPUS:
        raise MedR1Error(f"--gpu {gpu}: is not known; choose {', '.join(GPUS)}")
    processes = gpus * nodes
    known, tflops, bandwidth = GPUS[gpu]
    memory = memory or known
    lora, optimizer = config.model.lora_rank, config.optimizer
    group, new_tokens = config.rollout.num_completions, config.rollout.max_new_tokens
    shown = image_tokens(sizes, config, image_side)
    prompt = shown + text_tokens
    completions = group * new_tokens
    tokens = prompt + completions
    num_prompts, rest = divmod(optimizer.prompts_per_step, processes)
    if rest:
        raise MedR1Error(
            f"optimizer.prompts_per_step = {optimizer.prompts_per_step} cannot be divided among {processes} GPUs;"
            f" add --set optimizer.prompts_per_step={math.ceil(optimizer.prompts_per_step / processes) * processes}"
        )
    in_forward = min(optimizer.prompts_per_forward or num_prompts, num_prompts)
    whole = not optimizer.gradient_checkpointing and in_forward == num_prompts and processes == 1
    trains_vision = config.model.train_vision and not lora
    reference = config.grpo.beta > 0

    # Full fine-tuning keeps float32 weights and a bfloat16 copy while it computes; LoRA's base is bfloat16.
    trained = lora * sizes.linear_ends if lora else sizes.weights - (0 if trains_vision else sizes.vision)
    held = {
        "weights": 2 * sizes.weights + 4 * trained if lora else 4 * sizes.weights,
        "gradients and AdamW": 12 * trained,
        "reference": 0 if lora or not reference else 4 * sizes.weights,
    }
    copies = 2 * sizes.weights if sharded or not lora else 0
    layer = saved_by_layer(sizes, lora=bool(lora))
    saved = layer * sizes.layers
    if optimizer.gradient_checkpointing:
        saved = 2 * sizes.hidden * sizes.layers + layer
    scored = min(in_forward * completions, max(1, MAX_LOGITS // sizes.vocabulary))
    vision = VISION_SAVED * sizes.vision_width * sizes.vision_layers * shown * sizes.patches if trains_vision else 0
    parts = {name: value / (processes if sharded else 1) for name, value in held.items()} | {
        "bfloat16 copies": copies,
        "activations": in_forward * (tokens * saved + vision),
        "logits": 12 * scored * sizes.vocabulary,
        "keys and values": 4 * num_prompts * tokens * sizes.layers * sizes.key_value,
    }
    needed = sum(parts.values()) / GB

    image = 2 * sizes.vision * shown * sizes.patches
    head = 2 * sizes.vocabulary * sizes.hidden * completions
    read = 2 * sizes.text * prompt + image
    forward = 2 * sizes.text * tokens + head + (image if trains_vision else 0)  # a frozen tower runs once, in `read`
    backward = 4 * sizes.text * tokens + 2 * head + (2 * image if trains_vision else 0)
    if lora:  # no gradient of the base's weights, and none of the image
        backward = 2 * sizes.text * tokens + head
    again = forward if optimizer.gradient_checkpointing else 0
    read_before = 2 * sizes.text * prompt + (image if trains_vision else 0)
    policy = (forward - read_before if whole else forward) + backward + again
    rate = tflops * 1e12 * UTILISATION
    weights_read = 2 * (sizes.text + sizes.embeddings) * new_tokens / (bandwidth * 1e9)
    launches = EAGER_LAYER * sizes.layers * new_tokens
    decode = max(weights_read, launches, num_prompts * (2 * sizes.text * completions + head) / rate)
    seconds = {
        "rollout": num_prompts * read / rate + decode,
        "policy": num_prompts * policy / rate,
        "reference": num_prompts * forward / rate if reference else 0.0,
    }
    if processes > 1:
        seconds["between GPUs"] = _sent(
            sizes, trained, processes, sharded, reference, -(-num_prompts // in_forward)
        ) / (1e9 * (LINKS[gpu] if nodes == 1 else min(LINKS[gpu], NETWORK)))
    step = sum(seconds.values())
    return {
        "prompt_tokens": prompt,
        "memory_gb": {name: round(value / GB, 2) for name, value in parts.items()},
        "needed_gb": round(needed, 1),
        "usable_gb": round(memory * USABLE, 1),
        "fits": needed <= memory * USABLE,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "step_seconds": round(step, 2),
        "hours_per_epoch": round(OMNIMEDVQA / optimizer.prompts_per_step * step / 3600, 1),
    }


VISION_SAVED = 46
"""Bytes a layer of the tower saves for backward for a patch, over the layer's width; counted as `saved_by_layer`."""


def saved_by_layer(sizes: Sizes, *, lora: bool) -> int:
    """Bytes that a text layer saves for backward for a token, computing in bfloat16.

    The inputs of the seven products (12 h + 2 i), queries, keys, values and output of attention (4 h + 4 k), what the
    MLP multiplies (6 i), and the norms' float32 tensors (16 h; where their weights are frozen, 8 h).
    """
    norms = 8 if lora else 16
    return (norms + 16) * sizes.hidden + 4 * sizes.key_value + 8 * sizes.intermediate


def _sent(sizes: Sizes, trained: int, processes: int, sharded: bool, reference: bool, forwards: int) -> float:
    """Bytes that a GPU sends in a step, by rings: float32 gradients, and where weights are sharded bfloat16 weights."""
    share = (processes - 1) / processes
    if not sharded:
        return 2 * share * 4 * trained
    # Weights are gathered once to sample, and for each forward and backward pass; so are those of the reference.
    gathered = 2 * sizes.weights * (1 + forwards * (3 if reference else 2))
    return share * (gathered + forwards * 4 * trained)


def remedy(sizes: Sizes, config: "Config", **machine: Any) -> tuple[list[str], dict[str, Any]]:
    """Settings to add, in the order of what they cost, until a step fits; and the plan with them (fitting or not)."""
    said: list[str] = []
    tried = plan(sizes, config, **machine)
    changes: list[tuple[str, str, dict[str, Any]]] = [
        ("optimizer.gradient_checkpointing=true", "optimizer", {"gradient_checkpointing": True}),
        ("optimizer.prompts_per_forward=1", "optimizer", {"prompts_per_forward": 1}),
        ("model.lora_rank=64", "model", {"lora_rank": 64}),
    ]
    for setting, section, update in changes:
        if tried["fits"]:
            break
        changed = getattr(config, section).model_copy(update=update)
        if changed == getattr(config, section):
            continue
        config = config.model_copy(update={section: changed})
        said.append(setting)
        tried = plan(sizes, config, **machine)
    return said, tried
