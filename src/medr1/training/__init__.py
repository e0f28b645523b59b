"""GRPO and SFT on transformers' Trainer; the trainers are imported on first use, since they need torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medr1.training.grpo import GRPOTrainer
    from medr1.training.sft import SFTTrainer

__all__ = ["GRPOTrainer", "SFTTrainer"]

_LAZY = {"GRPOTrainer": "grpo", "SFTTrainer": "sft"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'medr1.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medr1.training.{_LAZY[name]}"), name)
