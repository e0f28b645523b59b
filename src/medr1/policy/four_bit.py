"""A base in 4 bits under an adapter: bitsandbytes' NF4 with double quantisation (arXiv:2305.14314).

Of each linear layer 64 weights are codes of 4 bits and one scale of 8 bits, and 256 scales have one of 32 bits: 0.516
bytes a weight. Embeddings, the output head, norms, convolutions and experts that are no linear layers stay as they are.
"""

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import get_logger

from medr1.errors import MedR1Error

BYTES = 1 / 2 + (1 + 4 / 256) / 64
"""A quantised weight takes so many."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it tells of CPU kernels that it did not find


def require(setting: str) -> None:
    """That bitsandbytes is there.

    Raises:
        MedR1Error: it is not; the line names the setting that asks for it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MedR1Error(f"{setting} needs bitsandbytes: pip install 'medr1[4bit]'")


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """How `from_pretrained` quantises; products are computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_four_bit(model: Any) -> bool:
    """Whether this transformers model is kept in 4 bits."""
    return getattr(model, "is_loaded_in_4bit", False)


def layers(model: Any) -> list[Any]:
    """The layers that are kept in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def keep_codes(model: Any) -> None:
    """Keep bitsandbytes from laying codes out anew in a CPU's first call without gradient.

    Its kernel for CPUs with bfloat16 rounds the scales to bfloat16, for good, and gives no gradient (0.50).
    """
    for layer in layers(model):
        layer.support_avx512bf16_for_cpu = False


def dequantised(model: PreTrainedModel) -> Any:
    """The same model with float32 weights: what its codes and scales stand for, exactly."""
    for layer in layers(model):
        layer.weight.quant_state.dtype = torch.float32  # else of the type that it was quantised from
    logger = get_logger("transformers.integrations.bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it warns of is what we say
    try:
        plain: Any = model.dequantize(dtype=torch.float32)
    finally:
        logger.setLevel(level)
    plain.is_loaded_in_4bit = False
    return plain.float()
