"""What is measured: one model, the same prompts, images, rewards and optimizer for Med-R1 and for TRL's GRPOTrainer.

The model is a Qwen2-VL of about 10 million random weights. Its end-of-turn token is `<|video_pad|>`, which both sides
are told never to sample (Med-R1 by itself, TRL by `suppress_tokens`), so that every completion has exactly
`new_tokens` tokens on both sides and no luck of sampling enters a time.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    ProgressCallback,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from trl import GRPOConfig
from trl import GRPOTrainer as TRLTrainer

from medr1 import GRPOTrainer, load_config, load_vlm
from medr1.data.phantoms import draw_options, draw_phantom
from medr1.data.prompts import build_messages
from medr1.data.records import LETTERS, QUESTION_TYPES, Record
from medr1.policy.names import TINY
from medr1.policy.vlm import VLM
from medr1.training.rewards import load_rewards

MODE = "think"
LEARNING_RATE = 1e-6
LORA_ALPHA = 32
CONTEXT = (
    "A patient was sent for this examination after several weeks of complaints; earlier images are not at hand, and"
    " the report rests on what is seen here. "
)
"""Prompts of about 170 tokens at 224 pixels, as long as those of the published recipe; `short_prompt` leaves it out."""


@dataclass(frozen=True)
class Workload:
    """One GRPO setting; the defaults are the one that all others differ from in one thing."""

    name: str
    new_tokens: int = 48
    num_completions: int = 8
    """G, completions a prompt."""
    num_prompts: int = 4
    pixels: int = 224
    """Side of the square images."""
    beta: float = 0.04
    lora_rank: int = 0
    """0: all weights, vision tower included, are trained."""
    checkpointing: bool = False
    """Gradient checkpointing."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of our recipe."""
    short_prompt: bool = False
    questions: int = 1
    """Questions an image."""
    small: bool = False
    """A model of a few thousand weights, for tests."""
    model: str = ""
    """A model folder to measure in place of the random weights."""


def share_of_e(reply: str, record: Record, mode: str) -> float:
    """Share of the letter e: a reward that differs between random replies, so that no group is skipped."""
    return reply.count("e") / max(1, len(reply))


REWARDS = {"accuracy": 1.0, "format": 0.5, "workload:share_of_e": 1.0}


def write_model(folder: Path, *, pixels: int, small: bool = False) -> Path:
    """A Qwen2-VL with random weights (10.8 M, float32) and the processor of the package's tiny model.

    Weights of the tower and of the text layers stand nearly as in Qwen2-VL-2B (0.47 to 1; there 0.51 to 1).
    """
    processor = AutoProcessor.from_pretrained(str(TINY))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": pixels * pixels}
    tokenizer = processor.tokenizer
    tokenizer.eos_token = "<|video_pad|>"
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64 if small else 320,
        "intermediate_size": 96 if small else 896,
        "num_hidden_layers": 2 if small else 6,
        "num_attention_heads": 2 if small else 10,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids("<|video_pad|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "initializer_range": 0.05,  # logits far enough apart for greedy replies to be well defined
    }
    depth, width = (2, 32) if small else (6, 192)
    vision = {
        "depth": depth,
        "embed_dim": width,
        "hidden_size": text["hidden_size"],
        "num_heads": width // 32,
        "mlp_ratio": 4,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids("<|video_pad|>")
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def copy_model(source: str, folder: Path) -> Path:
    """A model (float32) with the end-of-turn token of the other workloads."""
    vlm = load_vlm(source, dtype="float32", device="cpu")
    vlm.tokenizer.eos_token = "<|video_pad|>"
    end = vlm.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    vlm.core.config.get_text_config().eos_token_id = vlm.core.generation_config.eos_token_id = end
    vlm.core.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def write_records(
    folder: Path, *, count: int, pixels: int, short_prompt: bool = False, questions: int = 1
) -> list[Record]:
    """Phantoms of this size on disk, so many questions an image."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        if number % questions == 0:
            phantom = draw_phantom(rng, size=pixels)
            path = folder / f"{number}.png"
            phantom.image.save(path)
        kind = QUESTION_TYPES[number % len(QUESTION_TYPES)]
        options = draw_options(rng, phantom.facts, kind)
        records.append(
            Record(
                id=str(number),
                images=(path,),
                question=("" if short_prompt else CONTEXT) + "What does the image show?",
                options=tuple(options),
                answer=LETTERS[options.index(phantom.facts[kind])],
                modality=phantom.facts["Modality Recognition"],
                question_type=kind,
                source="phantom",
                group=path.stem,
            )
        )
    return records


def write_files(workload: Workload, folder: Path) -> list[Record]:
    """Model and records of a workload, in `folder/model` and `folder/images`."""
    if workload.model:
        copy_model(workload.model, folder / "model")
    else:
        write_model(folder / "model", pixels=workload.pixels, small=workload.small)
    return write_records(
        folder / "images",
        count=workload.num_prompts,
        pixels=workload.pixels,
        short_prompt=workload.short_prompt,
        questions=workload.questions,
    )


def only_ends_by_eos(vlm: VLM) -> VLM:
    """The same model, which goes on after the end of a turn, as TRL and `generate` do: so completions are as long."""
    vars(vlm)["stop_token_ids"] = [vlm.tokenizer.eos_token_id]
    return vlm


def our_trainer(workload: Workload, records: list[Record], folder: Path, vlm: VLM | None = None) -> GRPOTrainer:
    """Med-R1's trainer, as `medr1 train` makes it, by default of the model in `folder`; one step a `train()`."""
    vlm = vlm or load_vlm(str(folder / "model"), device="cpu")
    config = load_config(
        overrides={
            "model.name": vlm.name,
            "model.lora_rank": workload.lora_rank,
            "model.lora_alpha": LORA_ALPHA,
            "rollout.mode": MODE,
            "rollout.num_completions": workload.num_completions,
            "rollout.max_new_tokens": workload.new_tokens,
            "grpo.rewards": REWARDS,
            "grpo.beta": workload.beta,
            "optimizer.steps": 1,
            "optimizer.prompts_per_step": workload.num_prompts,
            "optimizer.learning_rate": LEARNING_RATE,
            "optimizer.gradient_checkpointing": workload.checkpointing,
            **workload.settings,
        }
    )
    trainer = GRPOTrainer(vlm, config, records, [], folder / "ours")
    only_ends_by_eos(trainer.vlm)  # with its adapter
    return _quiet(trainer)


def trl_trainer(workload: Workload, records: list[Record], folder: Path) -> TRLTrainer:
    """TRL's trainer with its own generation (`generate` of transformers) and its defaults, except where said.

    Its KL is set to GRPO's as published, computation is float32 as ours, gradient checkpointing as in the workload.
    """
    vlm = load_vlm(str(folder / "model"), device="cpu")  # for the list of banned tokens only
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    peft_config = None
    if workload.lora_rank:
        peft_config = LoraConfig(
            r=workload.lora_rank,
            lora_alpha=LORA_ALPHA,
            target_modules=r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            task_type="CAUSAL_LM",
        )
    rows = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": build_messages(record, MODE)[0]["content"][-1]["text"]}],
                "image": str(record.images[0]),
                "index": index,
            }
            for index, record in enumerate(records)
        ]
    ).cast_column("image", datasets.Image())
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=workload.checkpointing,
        max_steps=1,
        per_device_train_batch_size=workload.num_prompts * workload.num_completions,
        num_generations=workload.num_completions,
        max_completion_length=workload.new_tokens,
        generation_kwargs={"suppress_tokens": vlm.banned_token_ids},
        learning_rate=LEARNING_RATE,
        beta=workload.beta,
        loss_type="grpo",
        use_bias_correction_kl=False,
        reward_weights=list(REWARDS.values()),
        logging_steps=1,
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = TRLTrainer(
        model=model,
        reward_funcs=_trl_rewards(records),
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    return _quiet(trainer)


def _trl_rewards(records: list[Record]) -> list[Any]:
    def wrapped(name: str, reward: Any) -> Any:
        def call(completions: list[Any], index: list[int], **_: Any) -> list[float]:
            return [reward(reply[0]["content"], records[i], MODE) for reply, i in zip(completions, index, strict=True)]

        call.__name__ = name
        return call

    return [wrapped(name, reward) for name, reward, _ in load_rewards(REWARDS)]


def _quiet(trainer: Any) -> Any:
    """Without progress bars and without a checkpoint at the end, on both sides."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, (ProgressCallback, PrinterCallback)):
            trainer.remove_callback(callback)
    trainer.args.save_strategy = "no"
    return trainer


def to_json(workload: Workload) -> str:
    return json.dumps(asdict(workload))


def from_json(text: str) -> Workload:
    return Workload(**json.loads(text))
