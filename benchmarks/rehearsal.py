"""One LoRA GRPO step of the exact Qwen2-VL-2B architecture (random weights, bfloat16) on this machine's CPU.

    python benchmarks/rehearsal.py          # minutes; needs about 8 GB of memory

Shows that the real size fits and where its time goes before anybody rents a GPU. The vocabulary of 151,936 is the
model's own, the tokenizer is that of the package's tiny model (its ids are valid in it), the image has 392 px. The
last line of stdout is one JSON object.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import torch
from bench import MIB, PARTS, Side, status, timed_functions
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from workload import Workload, write_records

from medr1.policy.names import TINY
from medr1.policy.vlm import VLM

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4}


def build_2b(pixels: int) -> VLM:
    """The architecture of Qwen/Qwen2-VL-2B-Instruct with random weights, bfloat16, 2.2 billion parameters."""
    processor = AutoProcessor.from_pretrained(str(TINY))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": pixels * pixels}
    processor.tokenizer.eos_token = "<|video_pad|>"  # never sampled: every completion has the full length
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={**TEXT, "eos_token_id": ids("<|video_pad|>"), "pad_token_id": ids("<|endoftext|>")},
        vision_config=VISION,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = ids("<|video_pad|>")
    return VLM(model, processor, "tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=392)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8)
    args = parser.parse_args()
    workload = Workload(
        "Qwen2-VL-2B, LoRA 16, bfloat16",
        new_tokens=args.new_tokens,
        num_completions=args.completions,
        num_prompts=1,
        pixels=args.pixels,
        lora_rank=16,
    )
    began = time.perf_counter()
    vlm = build_2b(args.pixels)
    parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    built = time.perf_counter() - began
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
    seconds["rest"] = seconds["step"] - sum(seconds[part] for part in PARTS)
    result = {
        "model": workload.name,
        "parameters": parameters,
        "prompt_tokens": prompt_tokens,
        "completions": args.completions,
        "new_tokens": args.new_tokens,
        "build_seconds": round(built, 1),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "weights_mib": round(held / MIB),
        "peak_mib": round(peak / MIB),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
