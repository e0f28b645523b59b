"""Med-R1: reinforcement learning with verifiable rewards for medical vision-language models.

The names below are the public API. They are imported on first use, so that `import medr1` and `medr1 --help` are quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from medr1.errors import MedR1Error

NOTICE = "Research use only. Not a medical device, not for clinical use."
"""Stands on every page and under every answer."""

if TYPE_CHECKING:
    from medr1.config import load_config
    from medr1.data.answers import Answer, extract_answer
    from medr1.data.datasets import load_records
    from medr1.data.images import read_image
    from medr1.data.records import Record
    from medr1.data.splits import split_by_group
    from medr1.evaluation.controls import text_only_prior
    from medr1.evaluation.intervals import interval
    from medr1.evaluation.metrics import compare, summarise
    from medr1.evaluation.run import evaluate
    from medr1.evaluation.scoring import score
    from medr1.policy.encoding import encode_prompts
    from medr1.policy.rollouts import sample
    from medr1.policy.shared_prefix import completion_logprobs
    from medr1.policy.vlm import load_vlm
    from medr1.training.grpo import GRPOTrainer
    from medr1.training.sft import SFTTrainer

_LAZY = {
    "Answer": "data.answers",
    "GRPOTrainer": "training.grpo",
    "Record": "data.records",
    "SFTTrainer": "training.sft",
    "compare": "evaluation.metrics",
    "completion_logprobs": "policy.shared_prefix",
    "encode_prompts": "policy.encoding",
    "evaluate": "evaluation.run",
    "extract_answer": "data.answers",
    "interval": "evaluation.intervals",
    "load_config": "config",
    "load_records": "data.datasets",
    "load_vlm": "policy.vlm",
    "read_image": "data.images",
    "sample": "policy.rollouts",
    "score": "evaluation.scoring",
    "split_by_group": "data.splits",
    "summarise": "evaluation.metrics",
    "text_only_prior": "evaluation.controls",
}

__all__ = [
    "NOTICE",
    "Answer",
    "GRPOTrainer",
    "MedR1Error",
    "Record",
    "SFTTrainer",
    "compare",
    "completion_logprobs",
    "encode_prompts",
    "evaluate",
    "extract_answer",
    "interval",
    "load_config",
    "load_records",
    "load_vlm",
    "read_image",
    "sample",
    "score",
    "split_by_group",
    "summarise",
    "text_only_prior",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'medr1' has no attribute {name!r}")
    return getattr(importlib.import_module(f"medr1.{_LAZY[name]}"), name)
