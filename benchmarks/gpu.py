"""What only a GPU can tell: equality there, times of a GRPO step at real sizes, memory against `medr1 plan`.

    python benchmarks/gpu.py                          # one H100 or H200, at most eight minutes: gpu/CARD.json
    python benchmarks/gpu.py --device cpu --tiny      # the same road with tiny models, a minute

Needs the repository and torch >= 2.11, transformers >= 5.17, peft >= 0.18, as they are on a borrowed machine: no
installation and no network. With trl there too, its trainer makes the step beside ours. Models have the published
shapes and random weights, and an end token that is never sampled, so that every completion has its full length.

Each part is written down when it ends; one that fails, or for which no time is left, says so in its place. The last
line of stdout is one JSON object.
"""

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PrinterCallback
from transformers.masking_utils import causal_mask_function

from medr1.policy import attention, held, rollouts
from medr1.policy.adapters import add_lora, compile_text_layers
from medr1.policy.drafts import Drafts
from medr1.policy.encoding import PromptBatch, encode_prompts, with_vision_features
from medr1.policy.names import TINY
from medr1.policy.rollouts import Rollout, sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, evaluating
from medr1.training import plan as planned
from medr1.training.objective import group_advantages, policy_loss

HERE = Path(__file__).resolve().parent
SMALLER, LARGER = "Qwen2-VL-2B", "Qwen2.5-VL-7B"
LORA = 64
BETA = 0.04
QUESTION = "What abnormality does this image of the chest show, if there is any? Think first, then name one option. "
PARTS = ("rollout", "reference", "policy")


class Machine:
    """Where the models run, how large they are, and how long there is."""

    def __init__(self, device: str, tiny: bool, minutes: float) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.began, self.minutes = time.monotonic(), minutes
        self.on_gpu = self.device.type == "cuda"
        self.card = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        self.kind = next((kind for kind in planned.GPUS if kind in self.card.lower()), None)
        self.new_tokens = 6 if tiny else 256
        self.groups = (2, 3) if tiny else (8, 16)
        self.sides = (56, 84) if tiny else (392, 1000)
        self.prompt_text = 20 if tiny else planned.PROMPT_TEXT

    def has_time(self, seconds: float) -> bool:
        return time.monotonic() - self.began + seconds < 60 * self.minutes

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        began = self.now()
        work()
        return self.now() - began

    def autocast(self) -> Any:
        """As a recipe's dtype "auto" computes: bfloat16 on a GPU."""
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.on_gpu else contextlib.nullcontext()

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def peak_gb(self) -> float | None:
        """Of memory since the last call, in GB."""
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated() / planned.GB
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)


def build(machine: Machine, name: str, dtype: torch.dtype) -> VLM:
    """A published model's shape (`--tiny`: two narrow layers of its family) with random weights."""
    facts = json.loads((planned.KNOWN / f"{name}.json").read_text())["config"]
    text, vision = facts["text_config"], facts["vision_config"]
    if machine.tiny:
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "vocab_size": 512}
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        vision |= {"depth": 2, "num_heads": 2}
        vision |= {key: 64 for key in ("embed_dim", "intermediate_size", "out_hidden_size") if key in vision}
        vision |= {"hidden_size": 64} | ({"fullatt_block_indexes": [1]} if "window_size" in vision else {})
    processor = AutoProcessor.from_pretrained(str(TINY))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": machine.sides[-1] ** 2}
    tokenizer = processor.tokenizer
    tokenizer.eos_token = "<|video_pad|>"
    for token in ("image", "video"):
        facts[f"{token}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{token}_pad|>")
    for end in ("start", "end"):
        facts[f"vision_{end}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>")
    text |= {"eos_token_id": facts["video_token_id"], "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if machine.tiny:
        text |= {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    with machine.device:
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**facts), dtype=dtype)
    model.generation_config.eos_token_id = facts["video_token_id"]
    return VLM(model.eval(), processor, name)


def ask(machine: Machine, vlm: VLM, *sides: int) -> PromptBatch:
    """A prompt for each side of a square image, all with a text of the same length."""
    generator = torch.Generator().manual_seed(0)
    length = len(vlm.tokenizer(QUESTION)["input_ids"])
    text = QUESTION * max(1, round(machine.prompt_text / length))
    images = [
        [Image.fromarray(torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=generator).numpy())]
        for side in sides
    ]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return encode_prompts(vlm, [[turn]] * len(sides), images)


def repeated(prompts: PromptBatch, num_completions: int) -> PromptBatch:
    """Every prompt and its image once a completion, with nothing shared: the usual way."""
    rows = [prompt for prompt in range(len(prompts)) for _ in range(num_completions)]
    return replace(prompts.select(rows), image_keys=list(range(len(rows))))


def apart(one: Tensor, other: Tensor, mask: Tensor) -> dict[str, float]:
    """Greatest and mean distance of log-probabilities."""
    difference = (one.float() - other.float()).abs()[mask]
    return {"max": float(difference.max()), "mean": float(difference.mean())}


def equality(machine: Machine) -> dict[str, Any]:
    """Log-probs of shared prompts against repeated ones in float32, and of both in bfloat16 against float32; tokens
    sampled over shared prompts against those over repeated ones, with drafts against those without, and with a graph of
    each step against those without."""
    vlm, group = build(machine, SMALLER, torch.float32), machine.groups[0] // 2
    prompts = ask(machine, vlm, *machine.sides)
    settings: dict[str, Any] = {"max_new_tokens": min(machine.new_tokens, 64), "seed": 1}
    drafts = Drafts()
    with decoding_by(machine, "kernels"):
        rollout = sample(vlm, prompts, num_completions=group, **settings)
        other = sample(vlm, repeated(prompts, group), num_completions=1, **settings)
        drafts.learn(rollout.tokens)
        drafted = sample(vlm, prompts, num_completions=group, **settings, drafts=drafts)
    held_steps = []
    for way in ("graph", "fixed"):
        with decoding_by(machine, way):
            held_steps.append(sample(vlm, prompts, num_completions=group, **settings))
    mask = rollout.mask_NT.clone()
    mask[::2, mask.shape[1] // 2 :] = False  # ragged

    def score() -> dict[str, Tensor]:
        with torch.no_grad():
            asked = {"shared": prompts, "repeated": repeated(prompts, group)}
            scored = {key: completion_logprobs(vlm, asked[key], rollout.completion_ids_NT, mask)[0] for key in asked}
        return scored

    exact = score()
    vlm.model.to(torch.bfloat16)
    rounded = score()
    found: dict[str, Any] = {
        "float32: shared against repeated": apart(exact["shared"], exact["repeated"], mask),
        "bfloat16 shared against float32": apart(rounded["shared"], exact["shared"], mask),
        "bfloat16 repeated against float32": apart(rounded["repeated"], exact["repeated"], mask),
        "float32: sampler's log-probs against scored": apart(rollout.logp_NT, exact["shared"], mask),
        "tokens equal, shared and repeated": same(rollout, other),
        "tokens equal, with and without drafts": same(rollout, drafted),
        "tokens equal, steps in a graph and plain": same(rollout, held_steps[0]),
        "tokens equal, steps in a graph and launched": same(*held_steps),
        "not in a graph": vlm.not_held,
        "calls, without and with drafts": [rollout.num_calls, drafted.num_calls],
    }
    bfloat16 = [found[f"bfloat16 {key} against float32"]["mean"] for key in ("shared", "repeated")]
    found["passed"] = (
        found["float32: shared against repeated"]["max"] < 2e-3
        and found["float32: sampler's log-probs against scored"]["max"] < 2e-3
        and bfloat16[0] < 1.5 * bfloat16[1] + 1e-3
        and min(value for key, value in found.items() if key.startswith("tokens equal")) > 0.97
        and found["tokens equal, steps in a graph and launched"] == 1
        and vlm.not_held is None
    )
    return found


@contextlib.contextmanager
def decoding_by(machine: Machine, way: str) -> Iterator[None]:
    """Within this block rows are decoded in fixed shape, each step as a "graph" (of which a CPU has none) or as the
    same kernels launched one by one ("fixed"), or as it is without ("kernels")."""
    capture = held.capture if way == "graph" and machine.on_gpu else lambda step: step
    holds = lambda vlm, max_new_tokens: way != "kernels" and vlm.not_held is None  # noqa: E731
    with mock.patch.object(rollouts, "holds", holds), mock.patch.object(held, "capture", capture):
        yield


def same(one: Rollout, other: Rollout) -> float:
    """Share of tokens that are equal; after one that rounding has turned, a completion is another."""
    return float((one.completion_ids_NT == other.completion_ids_NT).float().mean())


def flex(machine: Machine) -> dict[str, Any]:
    """flex_attention under the tree mask against dense attention with the same mask: outputs, gradients, seconds.

    On a CPU it has no backward pass.
    """
    heads, kv_heads, size = (4, 2, 16) if machine.tiny else (12, 2, 128)
    group, length = machine.groups[0], machine.new_tokens
    prompt = 4 * machine.prompt_text
    real = torch.ones(2, prompt, dtype=torch.bool, device=machine.device)
    real[0, : prompt // 5] = False
    ids = torch.arange(2 * group, device=machine.device)[:, None].expand(-1, length)  # none begins as another does
    completions = attention.Tree(ids, torch.full_like(ids[:, 0], length), 2)
    tree = attention.tree_mask(causal_mask_function, real, attention.places_in_row(real), completions, with_prompt=True)
    total = prompt + group * length
    dense = create_mask(tree.mask_mod, 2, None, total, total, device=str(machine.device))
    dense = dense | torch.eye(total, dtype=torch.bool, device=machine.device)  # padding: nobody reads it
    read = torch.cat([real, real.new_ones(2, group * length)], 1)[:, None, :, None]
    fused: Any = attention._fused_flex_attention() if machine.on_gpu else flex_attention
    torch.manual_seed(0)
    drawn = [torch.randn(2, n, total, size, device=machine.device) for n in (heads, kv_heads, kv_heads, heads)]
    seconds: dict[str, float] = {}

    def run(name: str, dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [tensor.to(torch.bfloat16).to(dtype).requires_grad_(machine.on_gpu) for tensor in drawn[:3]]
        upstream = (drawn[3] * read).to(torch.bfloat16).to(dtype)

        def once() -> list[Tensor]:
            out = attend(*inputs)
            outputs = [out.detach() * read]
            if machine.on_gpu:
                outputs += torch.autograd.grad(out, inputs, upstream)
            return outputs

        first = once()
        seconds[name] = machine.seconds(once)
        return first

    def by_flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fused(query, key, value, block_mask=tree, enable_gqa=True)

    def by_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, enable_gqa=True)

    exact = run("dense, float32", torch.float32, by_mask)
    names = ("output", "query's gradient", "key's gradient", "value's gradient")[: len(exact)]
    errors = {
        way: [float((a.float() - b).abs().mean()) for a, b in zip(run(way, torch.bfloat16, call), exact, strict=True)]
        for way, call in (("dense", by_mask), ("flex", by_flex))
    }
    return {
        "mean error in bfloat16": {way: dict(zip(names, error, strict=True)) for way, error in errors.items()},
        "seconds": seconds,
        "passed": all(ours < 1.5 * dense + 1e-6 for ours, dense in zip(errors["flex"], errors["dense"], strict=True)),
    }


def decoding(machine: Machine) -> dict[str, Any]:
    """Seconds of a decoded token by rows, with a graph of each step and without (the constant EAGER_LAYER), and what a
    call of all right guesses saves."""
    vlm = build(machine, SMALLER, torch.bfloat16)
    prompts, tokens = ask(machine, vlm, machine.sides[0]), min(machine.new_tokens - 1, 63)
    settings: dict[str, Any] = {"seed": 1}
    sample(vlm, prompts, num_completions=2, max_new_tokens=2, **settings)
    found: dict[str, Any] = {"seconds a token": {}, "seconds a token, steps in a graph": {}}
    for of_rows, way in zip(found.values(), ("kernels", "graph"), strict=True):
        for rows in (1, *machine.groups, 4 * machine.groups[-1]):
            with decoding_by(machine, way):
                read, whole = (
                    machine.seconds(
                        lambda n=n, rows=rows: sample(vlm, prompts, num_completions=rows, max_new_tokens=n, **settings)
                    )
                    for n in (1, 1 + tokens)
                )
            of_rows[rows] = (whole - read) / tokens
    layers = vlm.core.config.get_text_config().num_hidden_layers
    found["EAGER_LAYER"] = {"measured": found["seconds a token"][machine.groups[0]] / layers}
    found["EAGER_LAYER"]["planned"] = planned.EAGER_LAYER
    settings |= {"num_completions": machine.groups[0], "max_new_tokens": tokens}
    drafts = Drafts()
    rollouts_by: dict[str, Rollout] = {}
    seconds_by: dict[str, float] = {}
    for name, way in (("plain", "kernels"), ("graph", "graph"), ("drafts", "kernels")):
        more: dict[str, Any] = {"drafts": drafts} if name == "drafts" else {}
        with decoding_by(machine, way):
            began = machine.now()
            rollouts_by[name] = sample(vlm, prompts, **settings, **more)
            seconds_by[name] = machine.now() - began
        drafts.learn(rollouts_by[name].tokens)
    plain = rollouts_by.pop("plain")
    found["completions seen before"] = {
        "seconds": seconds_by,
        "calls, without and with drafts": [plain.num_calls, rollouts_by["drafts"].num_calls],
        "tokens equal in bfloat16": {name: same(plain, other) for name, other in rollouts_by.items()},
    }
    return found


class Trained:
    """A policy, its reference and optimizer: full fine-tuning in float32 under autocast, or LoRA on bfloat16."""

    def __init__(self, machine: Machine, name: str, *, lora: bool) -> None:
        dtype = torch.bfloat16 if lora and machine.on_gpu else torch.float32
        vlm = build(machine, name, dtype)
        self.machine, self.reference = machine, None
        if lora:
            vlm = add_lora(vlm, rank=LORA, alpha=LORA)
        else:
            self.reference = copy.deepcopy(vlm.model).requires_grad_(False)
        self.vlm = vlm
        trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=machine.on_gpu)
        self.sizes = self._sizes()

    def _sizes(self) -> planned.Sizes:
        with tempfile.TemporaryDirectory() as folder:
            self.vlm.core.config.save_pretrained(folder)
            return planned.count(folder)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[VLM]:
        if self.reference is not None:
            with torch.no_grad():
                yield replace(self.vlm, model=self.reference)
        else:
            with evaluating(self.vlm.model), self.vlm.model.disable_adapter():  # type: ignore[operator]
                yield self.vlm

    def step(self, side: int, group: int, new_tokens: int, *, ours: bool) -> dict[str, float]:
        """Seconds by part of a step on one prompt, as the trainer makes it, or with everything repeated."""
        machine, vlm = self.machine, self.vlm
        prompts = with_vision_features(
            vlm, ask(machine, vlm, side) if ours else repeated(ask(machine, vlm, side), group)
        )
        seconds: dict[str, float] = {}
        began = machine.now()

        def lap(part: str) -> None:
            seconds[part] = machine.now() - began - sum(seconds.values())

        settings = {"num_completions": group if ours else 1, "max_new_tokens": new_tokens, "seed": 1}
        vlm.model.train()
        with machine.autocast():
            rollout = sample(vlm, prompts, **settings, keep_prefill=ours)
            lap("rollout")
            scored = (prompts, rollout.completion_ids_NT, rollout.mask_NT)
            with self.as_reference() as reference:
                ref_logp, _ = completion_logprobs(reference, *scored)
            lap("reference")
            logp, _ = completion_logprobs(vlm, *scored, entropy=True, prefill=rollout.prefill)
            advantages = group_advantages(torch.arange(float(group), device=logp.device)[None])[0]
            loss, _ = policy_loss(
                logp, None, advantages, rollout.mask_NT, denominator=group, beta=BETA, ref_logp_NT=ref_logp
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("policy")
        assert bool((rollout.mask_NT.sum(1) == new_tokens).all()), "no completion ends early"
        return seconds

    def measure(self, side: int, group: int, *, ours: bool) -> dict[str, Any]:
        """Seconds by part and peak memory of a step, beside what `plan` says of ours; or why there is none."""
        machine = self.machine
        machine.free()
        machine.peak_gb()
        try:
            seconds = self.step(side, group, machine.new_tokens, ours=ours)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            return {"left out": "not enough memory"}
        found: dict[str, Any] = {"step": sum(seconds.values()), **seconds, "peak_gb": machine.peak_gb()}
        if ours:
            config = recipe(group, machine.new_tokens, lora=self.reference is None, pixels=max(machine.sides) ** 2)
            gpu = machine.kind or "h100"
            expected = planned.plan(
                self.sizes, config, image_side=side, gpu=gpu, gpus=1, text_tokens=machine.prompt_text
            )
            found["planned"] = {**expected["seconds"], "needed_gb": expected["needed_gb"]}
            if machine.kind:
                found["UTILISATION"] = planned.UTILISATION * expected["seconds"]["policy"] / seconds["policy"]
        return found


def recipe(group: int, new_tokens: int, *, lora: bool, pixels: int) -> Any:
    """What `plan` reads of a recipe; its own class needs pydantic."""
    return SimpleNamespace(
        model=SimpleNamespace(
            lora_rank=LORA if lora else 0,
            lora_targets="language",
            quantize="none",
            dtype="auto",
            train_vision=True,
            min_pixels=0,
            max_pixels=pixels,
        ),
        method="grpo",
        rollout=SimpleNamespace(engine="local", num_completions=group, max_new_tokens=new_tokens),
        draws=SimpleNamespace(redraws=0),
        grpo=SimpleNamespace(
            beta=BETA, reference="float32", rewards={}, num_iterations=1, perception=0.0, hold_to_chance=0.0
        ),
        optimizer=SimpleNamespace(
            name="adamw", prompts_per_step=1, prompts_per_forward=0, gradient_checkpointing=False
        ),
    )


def steps(machine: Machine, name: str, *, lora: bool) -> dict[str, Any]:
    """GRPO steps of ours at each size, and with everything repeated; compiled layers at the first."""
    if machine.on_gpu and not lora:
        usable = torch.cuda.get_device_properties(0).total_memory / planned.GB * planned.USABLE
        smallest = recipe(machine.groups[0], machine.new_tokens, lora=False, pixels=max(machine.sides) ** 2)
        needed = planned.plan(
            planned.count(f"Qwen/{name}"), smallest, image_side=machine.sides[0], gpu=machine.kind or "h100", gpus=1
        )["needed_gb"]
        if needed > usable:
            return {"left out": f"needs {needed} GB by plan, and {usable:.1f} are usable"}
    trained = Trained(machine, name, lora=lora)
    found: dict[str, Any] = {"weights": trained.sizes.weights}
    for ours in (True, False):  # kernels are compiled and chosen, the optimizer gets its state
        trained.step(machine.sides[0], machine.groups[0], 4, ours=ours)
    for side in machine.sides:
        for group in machine.groups:
            key = f"{side} px, G = {group}"
            found[key] = {"ours": trained.measure(side, group, ours=True)} if machine.has_time(20) else {}
            # Full fine-tuning is set beside the repeated way at the first size only: so much time there is not.
            if machine.has_time(30) and (lora or (side, group) == (machine.sides[0], machine.groups[0])):
                found[key]["repeated"] = trained.measure(side, group, ours=False)
                pair = [found[key][way].get("step") for way in ("ours", "repeated")]
                found[key]["ratio"] = None if None in pair else pair[1] / pair[0]
    if machine.on_gpu and lora and name == SMALLER and machine.has_time(120):
        compile_text_layers(trained.vlm)
        sizes = (machine.sides[0], machine.groups[0])
        first = machine.seconds(lambda: trained.step(*sizes, 4, ours=True))
        found["compiled layers"] = {"seconds of compiling": first, "ours": trained.measure(*sizes, ours=True)}
    return found


def beside_trl(machine: Machine) -> dict[str, Any]:
    """The step of TRL's trainer (its own generation) at the first size with LoRA."""
    try:
        import datasets
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        return {"left out": f"trl is not there ({error})"}
    vlm = build(machine, SMALLER, torch.bfloat16 if machine.on_gpu else torch.float32)
    side, group = machine.sides[0], machine.groups[0]
    policy = add_lora(vlm, rank=LORA, alpha=LORA)
    text = QUESTION * max(1, round(machine.prompt_text / len(vlm.tokenizer(QUESTION)["input_ids"])))
    image = Image.new("RGB", (side, side), (90, 90, 90))
    rows = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "image": image}])
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=not machine.on_gpu,
            bf16=machine.on_gpu,
            gradient_checkpointing=False,
            max_steps=1,
            per_device_train_batch_size=group,
            num_generations=group,
            max_completion_length=machine.new_tokens,
            generation_kwargs={"suppress_tokens": vlm.banned_token_ids},
            learning_rate=1e-6,
            beta=BETA,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=lambda completions, **_: [float(index) for index, _ in enumerate(completions)],
            args=arguments,
            train_dataset=rows,
            processing_class=vlm.processor,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        machine.free()
        machine.peak_gb()
        trainer.train()
    seconds = [log["step_time"] for log in trainer.state.log_history if "step_time" in log][-1]
    return {"version": importlib.metadata.version("trl"), "step": seconds, "peak_gb": machine.peak_gb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models: only to see that it runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit into them is left out")
    parser.add_argument("--out", type=Path, default=HERE / "gpu", help="folder for CARD.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    machine = Machine(args.device, args.tiny, args.minutes)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    found: dict[str, Any] = {"card": machine.card, "tiny": args.tiny, "python": platform.python_version(), **versions}
    parts: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {  # with the seconds that one needs at least
        "equality": (60, lambda: equality(machine)),
        "flex_attention": (45, lambda: flex(machine)),
        "decoding": (30, lambda: decoding(machine)),
        f"{SMALLER}, LoRA {LORA}": (40, lambda: steps(machine, SMALLER, lora=True)),
        f"{LARGER}, LoRA {LORA}": (60, lambda: steps(machine, LARGER, lora=True)),
        f"{SMALLER}, full": (60, lambda: steps(machine, SMALLER, lora=False)),
        "TRL": (60, lambda: beside_trl(machine)),
        f"{LARGER}, full": (60, lambda: steps(machine, LARGER, lora=False)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{re.sub(r'[^A-Za-z0-9]+', '-', machine.card).strip('-').lower()}.json"
    for name, (least, part) in parts.items():
        machine.free()
        began = machine.now()
        if not machine.has_time(least):
            found[name] = {"left out": "no time left"}
        else:
            try:
                found[name] = part()
            except Exception as error:  # whatever it is, the other parts are worth their minutes
                traceback.print_exc()
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:2000], "passed": False}
            found[name]["seconds_of_part"] = round(machine.now() - began, 1)
        print(name, json.dumps(found[name]), flush=True)
        found["passed"] = all(value.get("passed", True) for value in found.values() if isinstance(value, dict))
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({"card": machine.card, "passed": found["passed"], "file": str(path)}))


if __name__ == "__main__":
    main()
