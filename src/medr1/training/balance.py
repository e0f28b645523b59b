"""How many GPUs should sample and how many train, where servers sample a step ahead; counted, not measured.

    medr1 plan --preset omnimedvqa-qwen2vl-2b --gpu h100 --servers

A sampler is a GPU with a vLLM server and all weights in bfloat16. For each token of its rows it takes the longest of
three: reading the weights and the rows' keys and values, the products, and VLLM_STEP. Rows whose keys and values do not
fit beside the weights wait for others. Trainers take what `plan` counts.
"""

import math
from typing import TYPE_CHECKING, Any

from medr1.training.plan import GB, GPUS, LINKS, NETWORK, UTILISATION, Sizes, gpu_named, image_tokens, plan

if TYPE_CHECKING:
    from medr1.config import Config

FLEETS = (1, 8, 64)
NODE = 8
"""GPUs of a machine."""
VLLM_STEP = 3e-3
"""Seconds that a server takes for a token of all its rows at least: its scheduler, and launching a recorded graph. An
assumption as the constants of `plan` are; no GPU was measured."""


def balance(sizes: Sizes, config: "Config", gpus: int, **machine: Any) -> dict[str, Any]:
    """The division of so many GPUs into samplers and trainers that learns from most prompts an hour.

    Args:
        config: a GRPO recipe; its prompts_per_step are those of each trainer.
        machine: image_side, gpu, and what else `plan` takes but numbers of GPUs.

    Returns:
        samplers (0: the one GPU samples and trains in turn), trainers, prompts (of a step), fits; seconds of "weights"
        (handed over), "sampling" and "training"; step_seconds, with samplers those of `rollout.ahead = 1`;
        waiting_seconds, those of 0; limits: what sampling and training spend most of their time on.
    """
    found = [_divided(sizes, config, gpus - trainers, trainers, **machine) for trainers in range(1, max(2, gpus))]
    return min(found, key=lambda one: (not one["fits"], one["step_seconds"] / one["prompts"]))


def _divided(sizes: Sizes, config: "Config", samplers: int, trainers: int, **machine: Any) -> dict[str, Any]:
    prompts, gpu = config.optimizer.prompts_per_step * trainers, gpu_named(machine["gpu"])
    engine = config.rollout.model_copy(update={"engine": "vllm"})
    optimizer = config.optimizer.model_copy(update={"prompts_per_step": prompts})
    wanted = config.model_copy(update={"optimizer": optimizer, "rollout": engine})
    near = samplers + trainers <= NODE
    trained = plan(sizes, wanted, gpus=trainers if near else 1, nodes=1 if near else trainers, **machine)
    training = {name: value for name, value in trained["seconds"].items() if name != "rollout"}

    group, new_tokens, prompt = config.rollout.num_completions, config.rollout.max_new_tokens, trained["prompt_tokens"]
    _, tflops, gigabytes = GPUS[gpu]
    rate, bandwidth = tflops * 1e12 * UTILISATION, gigabytes * GB
    servers = samplers or 1
    rows = math.ceil(prompts / servers) * group
    of_token = 2 * sizes.cached  # bytes of keys and values
    free = GB * (trained["usable_gb"] - (0 if samplers else trained["needed_gb"])) - 2 * sizes.weights
    at_once = min(rows, int(free / (of_token * (prompt / group + new_tokens))))  # a group's prompt is there once
    fits = trained["fits"] and at_once > 0
    read = 2 * (sizes.weights - sizes.vision) + at_once * of_token * (prompt + new_tokens / 2)
    a_token = {
        "memory bandwidth": read / bandwidth,
        "products": 2 * at_once * (sizes.text + sizes.vocabulary * sizes.hidden) / rate,
        "scheduling": VLLM_STEP,
    }
    image = 2 * sizes.vision * image_tokens(sizes, config, machine["image_side"]) * sizes.patches
    prompts_read = math.ceil(prompts / servers) * (2 * sizes.text * prompt + image) / rate
    decoding = math.ceil(rows / max(1, at_once)) * new_tokens * max(a_token.values())
    sampling = prompts_read + decoding

    lora = config.model.lora_rank
    given = 2 * (lora * (sizes.linear_ends + sizes.vision_ends) if lora else sizes.weights)
    handed = given / (bandwidth if not samplers else GB * (LINKS[gpu] if near else min(LINKS[gpu], NETWORK)))
    spent = sum(training.values())
    waiting = handed + sampling + spent
    return {
        "samplers": samplers,
        "trainers": trainers,
        "prompts": prompts,
        "fits": fits,
        "seconds": {"weights": round(handed, 3), "sampling": round(sampling, 2), "training": round(spent, 2)},
        "step_seconds": round(handed + max(sampling, spent) if samplers else waiting, 2),
        "waiting_seconds": round(waiting, 2),
        "limits": {
            "sampling": "reading prompts" if prompts_read > decoding else max(a_token, key=lambda name: a_token[name]),
            "training": "network" if training.get("between GPUs", 0) > spent / 2 else "products",
        },
    }
