"""What a step will need: memory and time by part, counted from a model's configuration before a GPU is rented.

    medr1 plan --config configs/omnimedvqa-qwen2vl-2b.toml --gpu a100 --gpus 8
    medr1 plan --model MedGemma-4B --memory 24

Bytes and FLOPs are counted, not measured: a product with a matrix of N weights costs 2N FLOPs a token forward and 4N
backward; attention and norms are left out, products are taken to reach UTILISATION of the peak, a decoding step takes
no less than EAGER_LAYER a layer, and what GPUs send each other waits for the computation and is not hidden behind it.
These constants are assumptions; no GPU was measured here. What was measured, one step on two CPU cores and the tensors
that autograd saves, is held against these counts in tests/test_plan.py. The shared prefix is counted as it is computed:
P prompt tokens once and G*T completion tokens for a group. Left out is what nobody knows before: how often
`draws.redraws` samples again, and how long rewards take, the reading of `consistency` among them.
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
from medr1.policy import four_bit
from medr1.policy.adapters import lora_layers
from medr1.policy.layers import CARRIES
from medr1.policy.names import NO_SHIPPED_CODE, find_model
from medr1.policy.pixels import PUBLISHED, is_tiled, limits, most_pixels, scales_by_pixels
from medr1.policy.shared_prefix import MAX_LOGITS

if TYPE_CHECKING:
    from medr1.config import Config

KNOWN = Path(__file__).parent / "plan_configs"
"""Configurations of published models, a file each: names (of the hub), weights (their published number, which ours must
equal), config, and of their processor min_pixels (of an image) or tiles (at most, of one). So a plan for them needs no
network."""
GPUS = {
    "rtx2080ti": (11, 54, 616),
    "rtx3060": (12, 25, 360),
    "rtx3080": (10, 59, 760),
    "rtx3090": (24, 71, 936),
    "rtx4060ti": (16, 44, 288),
    "rtx4080": (16, 97, 717),
    "rtx4090": (24, 165, 1008),
    "rtx5080": (16, 112, 960),
    "rtx5090": (32, 209, 1792),
    "rtx6000ada": (48, 364, 960),
    "rtxpro6000": (96, 503, 1792),
    "p100": (16, 21, 732),
    "t4": (16, 65, 320),
    "v100-16": (16, 125, 900),
    "v100": (32, 125, 900),
    "a10": (24, 125, 600),
    "a10g": (24, 70, 600),
    "a30": (24, 165, 933),
    "a40": (48, 150, 696),
    "a4000": (16, 77, 448),
    "a5000": (24, 111, 768),
    "a6000": (48, 155, 768),
    "l4": (24, 121, 300),
    "l40": (48, 181, 864),
    "l40s": (48, 362, 864),
    "a100-40": (40, 312, 1555),
    "a100": (80, 312, 2039),
    "h20": (96, 148, 4000),
    "h100": (80, 989, 3350),
    "gh200": (96, 989, 4000),
    "h200": (141, 989, 4800),
    "b200": (180, 2250, 8000),
    "mi300x": (192, 1307, 5300),
}
"""Name to memory in GB, dense bfloat16 TFLOP/s (float16 where there is no bfloat16) and memory bandwidth in GB/s, from
the vendors' data sheets."""
NO_BFLOAT16 = ("rtx2080ti", "p100", "t4", "v100-16", "v100")
LINKS = dict.fromkeys(GPUS, 25) | {
    "t4": 12,
    "v100": 120,
    "v100-16": 120,
    "a100": 250,
    "a100-40": 250,
    "h20": 375,
    "h100": 375,
    "gh200": 375,
    "h200": 375,
    "b200": 720,
    "mi300x": 360,
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
ANSWER = 16
"""Tokens that SFT learns of a record: a typical option, the tags around it and the end token."""
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
    """Side of the square of pixels behind one image token; 0 where images are cut into tiles."""
    patches: int
    """Patches of the vision tower behind one image token."""
    vision_layers: int
    vision_width: int
    min_pixels: int = 56 * 56
    """Of an image, which the processor scales up to them; those of Qwen2-VL."""
    max_pixels: int = PUBLISHED
    """Of an image, which the processor scales down to them."""
    query: int = 0
    """Width of all queries of a token; 0: hidden."""
    norms: int = 0
    """Sum of the widths of a text layer's norms; 0: two of hidden."""
    linear: int = 0
    """Weights of all linear layers but the head: those that 4 bits can hold."""
    vision_ends: int = 0
    """As `linear_ends`, of all that is no text layer."""
    vision_intermediate: int = 0
    """Width within a tower's feed-forward part; 0: four times its own."""
    vision_gated: bool = False
    """Whether that part multiplies two projections."""
    tile: int = 0
    """Side in pixels of the tiles that every image is scaled to, or cut into."""
    tile_tokens: int = 0
    tiles: int = 1
    """At most, of an image; where they are several, the whole image is one more."""
    tiled_always: bool = False
    """Whether a small image is scaled up to that many."""
    stateful: int = 0
    """Text layers that carry a state of one size in place of keys and values."""

    @property
    def weights(self) -> int:
        return self.text + self.embeddings + self.vision

    @property
    def cached(self) -> int:
        """Keys and values of a token, in numbers."""
        return 2 * (self.layers - self.stateful) * self.key_value


def count(model: str) -> Sizes:
    """Count a model's weights from its configuration; no weights are loaded.

    Args:
        model: a name of KNOWN, with or without its owner ("MedGemma-4B", "OpenGVLab/InternVL3-8B-hf"), a folder, or a
            model of the hub.

    Raises:
        MedR1Error: no such model, or none that transformers can count.
    """
    try:
        config, facts = described(model)
        with torch.device("meta"):
            network: Any = AutoModelForImageTextToText.from_config(config, **NO_SHIPPED_CODE)
        return _counted(network, facts)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:  # the last of Gemma 4
        reason = str(error).strip().split("\n")[0]
        known = ", ".join(sorted(file.stem for file in KNOWN.glob("*.json")))
        raise MedR1Error(
            f"{model}: its configuration cannot be counted ({reason}); of the same size may be one of {known}"
        ) from error


def _counted(network: Any, facts: dict[str, Any]) -> Sizes:
    """Sizes of a model that may lie on the meta device; `facts` are fields that its configuration does not tell."""
    text: Any = network.config.get_text_config()
    vision: Any = network.config.vision_config
    layers = {name: lora_layers(network, name) for name in ("language", "vision")}
    decoder = network.get_decoder()
    parts: dict[str, Any] = {"text": 0, "embeddings": 0, "vision": 0}
    in_layers = {id(weight) for weight in decoder.layers.parameters()}
    beside = {id(weight) for module in (decoder, network.get_output_embeddings()) for weight in module.parameters()}
    for weight in network.parameters():
        part = "text" if id(weight) in in_layers else "embeddings" if id(weight) in beside else "vision"
        parts[part] += weight.numel()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query, key = text.num_attention_heads * head, (text.num_key_value_heads or text.num_attention_heads) * head
    norms = [
        (name, weight.numel())
        for name, weight in decoder.layers[0].named_parameters()
        if weight.ndim == 1 and "norm" in name and name.endswith("weight")
    ]
    depth: Any = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", 0)
    width: Any = getattr(vision, "embed_dim", None) or getattr(vision, "hidden_size", 0)
    inner: Any = getattr(vision, "intermediate_size", None) or int(width * getattr(vision, "mlp_ratio", 4))
    return Sizes(
        **parts,
        linear_ends=_ends(layers["language"]),
        vision_ends=_ends(layers["vision"]),
        linear=sum(layer.in_features * layer.out_features for part in layers.values() for layer in part.values()),
        layers=text.num_hidden_layers,
        stateful=sum(kind in CARRIES for kind in getattr(text, "layer_types", None) or ()),
        hidden=text.hidden_size,
        query=query,
        norms=sum({head: query if "q_" in name else key}.get(size, size) for name, size in norms),
        intermediate=getattr(text, "intermediate_size", None) or text.moe_intermediate_size * text.num_experts_per_tok,
        key_value=key,
        vocabulary=text.vocab_size,
        vision_layers=depth,
        vision_width=width,
        vision_intermediate=inner,
        vision_gated=any(name.endswith("gate_proj") for name in layers["vision"]),
        **_image(network.config) | facts,
    )


def _ends(layers: dict[str, torch.nn.Linear]) -> int:
    return sum(layer.in_features + layer.out_features for layer in layers.values())


def _image(config: Any) -> dict[str, Any]:
    """How an image becomes tokens, as far as a configuration says it: by its size, or in tiles of one size."""
    vision = config.vision_config
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    if merge:
        return {"token_side": patch * merge, "patches": merge**2}
    tile = getattr(vision, "image_size", None) or 224
    tile = tile if isinstance(tile, int) else tile[0]
    patches = (tile // patch) ** 2
    tokens = getattr(config, "mm_tokens_per_image", None) or getattr(config, "image_seq_length", None)
    tokens = tokens or patches // getattr(config, "scale_factor", 1) ** 2
    pinpoints = getattr(config, "image_grid_pinpoints", None) or [[tile, tile]]
    tiles = min(9, max(height * width for height, width in pinpoints) // tile**2)
    return {"token_side": 0, "patches": patches // tokens, "tile": tile, "tile_tokens": tokens, "tiles": tiles}


def published(model: str) -> Path | None:
    """The file of KNOWN that a name means: without owner, revision, and what is added for a way of training."""

    def bare(name: str) -> str:
        return re.sub(r"(-(instruct|thinking|it|pt|hf|base|ov))+$", "", name.split("@")[0].split("/")[-1].lower())

    for file in KNOWN.glob("*.json"):
        names = [file.stem, *json.loads(file.read_text(encoding="utf-8")).get("names", [])]
        if bare(model) in map(bare, names):
            return file
    return None


def described(model: str) -> tuple[Any, dict[str, Any]]:
    """A model's configuration, and fields of Sizes for its images where they are known beyond it."""
    if not Path(model).expanduser().exists() and (known := published(model)):
        facts = json.loads(known.read_text(encoding="utf-8"))
        images = {name: facts[name] for name in ("min_pixels", "tiles", "tiled_always") if name in facts}
        return AutoConfig.for_model(**facts["config"]), images
    place = find_model(model, weights=False)
    config = AutoConfig.from_pretrained(str(place.weights), **NO_SHIPPED_CODE)
    try:
        images = AutoImageProcessor.from_pretrained(str(place.processor), **NO_SHIPPED_CODE)
    except (OSError, ValueError, KeyError):  # a configuration alone
        return config, {}
    if scales_by_pixels(images):
        return config, {"min_pixels": limits(images)[0], "max_pixels": most_pixels(images)}
    if is_tiled(images):
        across = images.size["longest_edge"] // images.max_image_size["longest_edge"]
        return config, {"tiles": across**2, "tiled_always": True}
    return config, {"tiles": images.max_patches} if getattr(images, "max_patches", None) else {}


def image_tokens(sizes: Sizes, config: "Config", image_side: int) -> int:
    """Tokens of a square image, as the processor scales it: within the limits, to the nearest whole tokens or tiles."""
    most = config.model.max_pixels or sizes.max_pixels
    if sizes.tile:
        across = math.isqrt(sizes.tiles)
        if config.model.max_pixels:
            across = max(1, min(across, math.isqrt(config.model.max_pixels) // sizes.tile))
        if not sizes.tiled_always:
            across = min(across, math.ceil(image_side / sizes.tile))
        return sizes.tile_tokens * (across**2 + (across > 1))
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
        config: of GRPO or SFT; the GPUs divide its `prompts_per_step`.
        image_side: pixels of a square image's side, before the processor scales it.
        gpu: a name of GPUS, see `gpu_named`.
        gpus: GPUs of a node.
        sharded: weights, gradients, optimizer and reference are divided over all GPUs (FSDP2). While it samples, each
            GPU holds all weights once, in bfloat16.
        memory: GB of a GPU where it has not what GPUS says.

    Returns:
        memory_gb: bytes by part / 1e9; needed_gb, usable_gb, fits; seconds: by part of a step;
        step_seconds (of several updates on one set of rollouts the mean); prompt_tokens; hours_per_epoch (of
        OMNIMEDVQA questions, over all GPUs).

    Raises:
        MedR1Error: an unknown GPU, 4 bits without an adapter, or prompts that the GPUs cannot divide evenly.
    """
    gpu = gpu_named(gpu)
    processes = gpus * nodes
    known, tflops, bandwidth = GPUS[gpu]
    memory = memory or known
    lora, optimizer = config.model.lora_rank, config.optimizer
    if config.model.quantize != "none" and not lora:
        raise MedR1Error(f"model.quantize = {config.model.quantize}: is for a base under LoRA; set model.lora_rank")
    objective, sft = config.grpo, config.method == "sft"
    group, new_tokens = (1, ANSWER) if sft else (config.rollout.num_completions, config.rollout.max_new_tokens)
    updates = 1 if sft else objective.num_iterations
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
    whole &= config.rollout.engine == "local" and not sft  # who has read the prompts already
    whole &= updates == 1 and not config.draws.redraws
    targets = config.model.lora_targets
    trains_vision = targets != "language" if lora else config.model.train_vision
    asks_reference = objective.beta > 0 and not sft
    reference = asks_reference or ("consistency" in objective.rewards and not sft)
    # Each of these terms reads another image's prompt with completions; all graphs are there until the one backward.
    views = 1 if sft else 1 + (objective.perception > 0) + (objective.hold_to_chance > 0)

    # Full fine-tuning keeps float32 weights and a bfloat16 copy while it computes; LoRA's base is bfloat16.
    dtype = "float32" if config.model.dtype == "auto" and gpu in NO_BFLOAT16 else config.model.dtype
    width = 4 if dtype == "float32" else 2
    ends = {"language": sizes.linear_ends, "vision": sizes.vision_ends}
    trained = lora * (ends.get(targets) or sum(ends.values())) if lora else sizes.weights
    if not lora and not trains_vision:
        trained -= sizes.vision
    four_bits = lora and config.model.quantize == "nf4"
    base = width * sizes.weights - (four_bits and (width - four_bit.BYTES) * sizes.linear)
    held = {
        "weights": base + 4 * trained if lora else 4 * sizes.weights,
        "gradients and AdamW": (6 if optimizer.name == "adamw_8bit" else 12) * trained,
        "reference": 0
        if lora or not reference
        else {"float32": 4, "bfloat16": 2, "cpu": 0}[objective.reference] * sizes.weights,
    }
    copies = width * sizes.weights if sharded or not lora else 0
    if four_bits:  # one layer's weights, while it is computed
        copies += width * sizes.hidden * sizes.intermediate
    layer = saved_by_layer(sizes, lora=bool(lora), width=width)
    patch = saved_by_patch(sizes, width=width) if trains_vision else 0
    if optimizer.gradient_checkpointing:
        saved = views * width * sizes.hidden * sizes.layers + layer
        of_patch = (views * width * sizes.vision_width * sizes.vision_layers + patch) if trains_vision else 0
    else:
        saved, of_patch = views * layer * sizes.layers, views * patch * sizes.vision_layers
    scored = min(in_forward * completions, max(1, MAX_LOGITS // sizes.vocabulary))
    parts = {name: value / (processes if sharded else 1) for name, value in held.items()} | {
        "bfloat16 copies": copies,
        "activations": in_forward * (tokens * saved + shown * sizes.patches * of_patch),
        "logits": 12 * scored * sizes.vocabulary,
        "keys and values": 0 if sft else width * num_prompts * tokens * sizes.cached,
    }
    needed = sum(parts.values()) / GB

    image = 2 * sizes.vision * shown * sizes.patches
    head = 2 * sizes.vocabulary * sizes.hidden * completions
    read = 2 * sizes.text * prompt + image
    forward = 2 * sizes.text * tokens + head + (image if trains_vision else 0)  # a frozen tower runs once, in `read`
    backward = 4 * sizes.text * tokens + 2 * head + (2 * image if trains_vision else 0)
    if lora:  # no gradient of the base's weights
        backward = 2 * sizes.text * tokens + head + (image if trains_vision else 0)
    again = forward if optimizer.gradient_checkpointing else 0
    read_before = 2 * sizes.text * prompt + (image if trains_vision else 0)
    policy = views * (forward + backward + again) - (read_before if whole else 0)
    if not trains_vision and (sft or views > 1):  # no rollout has seen these images
        policy += image
    rate = tflops * 1e12 * UTILISATION
    weights_read = (
        (base if lora else 2 * sizes.weights) * (1 - sizes.vision / sizes.weights) * new_tokens / (bandwidth * 1e9)
    )
    launches = EAGER_LAYER * sizes.layers * new_tokens
    decode = max(weights_read, launches, num_prompts * (2 * sizes.text * completions + head) / rate)
    seconds = {
        "rollout": 0.0 if sft else (num_prompts * read / rate + decode) / updates,
        "policy": num_prompts * policy / rate,
        "reference": num_prompts * forward / rate / updates if asks_reference else 0.0,
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
        "hours_per_epoch": round(OMNIMEDVQA / optimizer.prompts_per_step * updates * step / 3600, 1),
    }


VISION_SAVED = 30
"""Bytes a layer of the tower saves for backward for a patch, over the layer's width, beside its feed-forward part."""


def saved_by_patch(sizes: Sizes, *, width: int = 2) -> int:
    """Bytes that a layer of the tower saves for backward for a patch; counted as `saved_by_layer`."""
    inner = (sizes.vision_intermediate or 4 * sizes.vision_width) * (8 if sizes.vision_gated else 4)
    return (VISION_SAVED * sizes.vision_width + inner) * width // 2


def saved_by_layer(sizes: Sizes, *, lora: bool, width: int = 2) -> int:
    """Bytes that a text layer saves for backward for a token, computing in numbers of `width` bytes (bfloat16: 2).

    For bfloat16: the inputs of the seven products (10 h + 2 q + 2 i), queries, keys, values and output of attention
    (4 q + 4 k), what the MLP multiplies (6 i), and the norms' float32 tensors (8 for each of their numbers; where their
    weights are frozen, 4).
    """
    query, norms = sizes.query or sizes.hidden, sizes.norms or 2 * sizes.hidden
    products = 10 * sizes.hidden + 6 * query + 4 * sizes.key_value + 8 * sizes.intermediate
    return products * width // 2 + (4 if lora else 8) * norms


def gpu_named(name: str) -> str:
    """The key of GPUS that a name means: "RTX 4090", "4090", "A100 80GB".

    Raises:
        MedR1Error: none.
    """

    def bare(text: str) -> str:
        return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla|rtx|gb|sxm\d?|pcie", "", text.lower())

    sized = {bare(f"{key}{'' if '-' in key else memory}"): key for key, (memory, _, _) in GPUS.items()}
    found = {bare(key): key for key in GPUS} | sized
    if bare(name) not in found:
        raise MedR1Error(f"--gpu {name}: is not known; give its --memory in GB, or choose {', '.join(GPUS)}")
    return found[bare(name)]


def gpu_of(memory: float) -> str:
    """The slowest GPU of GPUS with nearly this memory that has bfloat16, for the time that a step takes."""
    return min(GPUS, key=lambda name: (abs(GPUS[name][0] - memory), name in NO_BFLOAT16, GPUS[name][1]))


def _sent(sizes: Sizes, trained: int, processes: int, sharded: bool, reference: bool, forwards: int) -> float:
    """Bytes that a GPU sends in a step, by rings: float32 gradients, and where weights are sharded bfloat16 weights."""
    share = (processes - 1) / processes
    if not sharded:
        return 2 * share * 4 * trained
    # Weights are gathered once to sample, and for each forward and backward pass; so are those of the reference.
    gathered = 2 * sizes.weights * (1 + forwards * (3 if reference else 2))
    return share * (gathered + forwards * 4 * trained)


Change = tuple[str, str, dict[str, Any]]
"""A setting as `--set` takes it, and its section and fields."""


def remedy(sizes: Sizes, config: "Config", **machine: Any) -> tuple[list[str], dict[str, Any]]:
    """Settings to add until a step fits, the dear ones last and none that is not needed; and the plan with them.

    Where nothing makes it fit, all of them and the plan that still does not.
    """
    changes = _changes(config)

    def planned(added: list[Change]) -> dict[str, Any]:
        return plan(sizes, _changed(config, added), **machine)

    added = next((changes[:n] for n in range(len(changes) + 1) if planned(changes[:n])["fits"]), changes)
    if planned(added)["fits"]:
        for change in list(added):
            without = [other for other in added if other is not change]
            model = _changed(config, without).model
            if (model.lora_rank or model.quantize == "none") and planned(without)["fits"]:
                added = without
    return [setting for setting, _, _ in added], planned(added)


def remedies(config: "Config") -> list[str]:
    """All settings that make a step smaller and that a recipe does not have yet, the dear ones last."""
    return [setting for setting, _, _ in _changes(config)]


def _changes(config: "Config") -> list[Change]:
    changes: list[Change] = [
        ("optimizer.gradient_checkpointing=true", "optimizer", {"gradient_checkpointing": True}),
        ("optimizer.prompts_per_forward=1", "optimizer", {"prompts_per_forward": 1}),
        ("model.lora_rank=64", "model", {"lora_rank": 64}),
        ("model.quantize=nf4", "model", {"quantize": "nf4"}),
    ]
    if config.model.lora_rank:
        del changes[2]
    return [change for change in changes if _changed(config, [change]) != config]


def _changed(config: "Config", added: list[Change]) -> "Config":
    for _, section, update in added:
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=update)})
    return config
