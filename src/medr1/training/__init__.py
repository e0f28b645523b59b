"""GRPO and SFT on transformers' Trainer."""

from medr1.training.grpo import GRPOTrainer
from medr1.training.sft import SFTTrainer

__all__ = ["GRPOTrainer", "SFTTrainer"]
