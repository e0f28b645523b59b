"""One LoRA GRPO step of a published architecture (random weights) on this machine's CPU.

    python benchmarks/rehearsal.py                                       # Qwen2-VL-2B in bfloat16: a minute, 8 GB
    python benchmarks/rehearsal.py --model Qwen2.5-VL-7B --four-bit      # adapters on both towers, checkpointing
    python benchmarks/rehearsal.py --model MedGemma-4B --four-bit

Shows that the real size fits and where its time goes before anybody rents a GPU, and what `medr1 plan` counts for the
same step. The vocabulary is the model's own, the tokenizer that of the package's tiny model (its ids are valid in it),
the image has 392 px. The last line of stdout is one JSON object.

Layers of one shape share their random weights, quantised once: so a model is there in a minute, and never whole in 16
bits. The peak is of memory in use: glibc is told to give freed blocks back at once (`MMAP_THRESHOLD`), which by itself
keeps a gigabyte of them for a 7B step.
"""

import argparse
import copy
import ctypes
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bench import MIB, PARTS, Side, status, timed_functions
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ImageProcessor,
    Gemma3Processor,
)
from workload import Workload, write_records

from medr1.policy import four_bit
from medr1.policy.names import TINY
from medr1.policy.vlm import VLM
from medr1.training.plan import count, described, image_tokens, plan

END = "<|video_pad|>"
"""Never sampled: every completion has the full length."""
MMAP_THRESHOLD = -3, 2**16
"""Of mallopt(3): larger blocks are mapped one by one, instead of from up to 32 MB on once such were freed."""
GEMMA = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def build(name: str, pixels: int, *, in_four_bits: bool) -> VLM:
    """A published architecture with random weights, in bfloat16 or with its linear layers in 4 bits."""
    config, _ = described(name)
    processor = AutoProcessor.from_pretrained(str(TINY))
    tokenizer = processor.tokenizer
    tokenizer.eos_token = END
    ids = tokenizer.convert_tokens_to_ids
    if config.model_type == "gemma3":
        named = dict(zip(("boi_token", "eoi_token", "image_token"), GEMMA, strict=True))
        tokenizer = AutoTokenizer.from_pretrained(str(TINY), eos_token=END, **named)
        tokenizer.add_tokens(list(GEMMA), special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids
        config.boi_token_index, config.eoi_token_index, config.image_token_index = map(ids, GEMMA)
        images = Gemma3ImageProcessor(size={"height": 896, "width": 896})
        template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", GEMMA[0])
        processor = Gemma3Processor(images, tokenizer, image_seq_length=256, chat_template=template)
    else:
        processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": pixels * pixels}
        for kind in ("image_pad", "video_pad", "vision_start", "vision_end"):
            setattr(config, f"{kind.removesuffix('_pad')}_token_id", ids(f"<|{kind}|>"))
    for part in (config, config.get_text_config()):
        part.eos_token_id, part.pad_token_id = ids(END), ids("<|endoftext|>")
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):  # rotary frequencies are computed, weights are not made
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    _fill(model, in_four_bits)
    model.tie_weights()
    model.generation_config.eos_token_id = ids(END)
    return VLM(model.eval(), processor, name)


def _fill(model: Any, in_four_bits: bool) -> None:
    """Weights in place of those on the meta device: ones in norms, else normal draws, the same for every shape."""
    if in_four_bits:
        from bitsandbytes.nn import Linear4bit, Params4bit

        model.is_loaded_in_4bit = True
    codes: dict[tuple[int, int], Any] = {}
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if in_four_bits and type(module) is nn.Linear and module is not head:
            shape = module.out_features, module.in_features
            if shape not in codes:
                values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
                codes[shape] = Params4bit(values, requires_grad=False, quant_type="nf4").to("cpu")
            layer = Linear4bit(
                shape[1], shape[0], module.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
            )
            layer.weight = copy.deepcopy(codes[shape])
            layer.quant_state = layer.weight.quant_state
            if layer.bias is not None:
                layer.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.bfloat16))
            model.set_submodule(name, layer)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                values = torch.empty(weight.shape, dtype=torch.bfloat16)
                is_norm = "norm" in type(module).__name__.lower() and name == "weight"
                setattr(module, name, nn.Parameter(values.fill_(1.0) if is_norm else values.normal_(std=0.02)))
    if in_four_bits:
        four_bit.keep_codes(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2-VL-2B")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--pixels", type=int, default=392)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8)
    args = parser.parse_args()
    settings = {"model.dtype": "bfloat16", "model.quantize": "nf4", "model.lora_targets": "both"}
    workload = Workload(
        f"{args.model}, LoRA 16, {'4 bits' if args.four_bit else 'bfloat16'}",
        new_tokens=args.new_tokens,
        num_completions=args.completions,
        num_prompts=1,
        pixels=args.pixels,
        lora_rank=16,
        checkpointing=args.four_bit,
        settings=settings if args.four_bit else {},
    )
    ctypes.CDLL(None).mallopt(*MMAP_THRESHOLD)
    gc.collect()
    process = status("VmRSS")
    began = time.perf_counter()
    vlm = build(args.model, args.pixels, in_four_bits=args.four_bit)
    built = time.perf_counter() - began
    sizes = count(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_records(folder / "images", count=1, pixels=args.pixels)
        side = Side("ours", workload, records, folder, vlm)
        prompt_tokens = side.trainer.encode(records).input_ids_BP.shape[1]
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        held = status("VmRSS")
        with timed_functions(side):
            seconds = side.step()
        peak = status("VmHWM")
    seconds["rest"] = seconds["step"] - sum(seconds.get(part, 0.0) for part in PARTS)
    text = prompt_tokens - image_tokens(sizes, side.trainer.config, args.pixels)
    counted = plan(sizes, side.trainer.config, image_side=args.pixels, gpu="a100", gpus=1, text_tokens=text)
    planned = sum(counted["memory_gb"].values()) * 1e9
    result = {
        "model": workload.name,
        "parameters": sizes.weights,
        "prompt_tokens": prompt_tokens,
        "completions": args.completions,
        "new_tokens": args.new_tokens,
        "build_seconds": round(built, 1),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "process_mib": round(process / MIB),
        "weights_mib": round(held / MIB),
        "peak_mib": round(peak / MIB),
        "planned_mib": round(planned / MIB),
        "planned_over_peak": round((planned + process) / peak, 3),
        "planned_gb": counted["memory_gb"],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
