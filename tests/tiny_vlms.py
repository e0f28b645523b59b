"""Random models of a few thousand parameters for each family, with a byte tokenizer and real processors."""

from typing import Any

import torch
from PIL import Image
from tiny_families import BUILDERS
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.vlm import VLM

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3")
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TILES = (
    "<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>",
)  # fmt: skip
TILES_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tiny_tokenizer(special: tuple[str, ...] = SPECIAL) -> Any:
    """A byte is a token; then a family's special tokens (the third one ends a turn) and the reply tags."""
    return byte_tokenizer(special, special[2])


def byte_tokenizer(special: tuple[str, ...], end: str, **named: str) -> Any:
    """A byte is a token; then special tokens (the first one pads), some by a name of their own, and the reply tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bos = named.pop("bos_token", None)
    tokenizer = Qwen2TokenizerFast(
        vocab={byte: index for index, byte in enumerate(alphabet)},
        merges=[],
        bos_token=bos,
        eos_token=end,
        pad_token=special[0],
        padding_side="left",
        extra_special_tokens=named,
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    return tokenizer


def tiny_vlm(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> VLM:
    """A model of this family with two text layers, hidden size 64 and sharp enough logits to tell tokens apart."""
    if family in BUILDERS:
        torch.manual_seed(seed)
        model, processor = BUILDERS[family](byte_tokenizer)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        return VLM(model.to(dtype).eval(), processor, family)
    if family == "idefics3":
        return _tiny_idefics3(dtype, seed)
    tokenizer = tiny_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "initializer_range": 0.15,
    }
    special = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": True,
    }
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    config: Any
    torch.manual_seed(seed)
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **special)
        model: Any = Qwen2VLForConditionalGeneration(config)
        processor: Any = Qwen2VLProcessor(
            Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=TEMPLATE
        )
    elif family == "qwen2_5_vl":
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
        model = Qwen2_5_VLForConditionalGeneration(config)
        processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=TEMPLATE
        )
    elif family == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": text["rope_parameters"] | {"mrope_interleaved": True}}
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **special)
        model = Qwen3VLForConditionalGeneration(config)
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessor(size=size, patch_size=16),
            tokenizer,
            Qwen3VLVideoProcessor(size=size),
            chat_template=TEMPLATE,
        )
    else:
        raise ValueError(family)
    model.generation_config.eos_token_id = [ids("<|im_end|>"), ids("<|endoftext|>")]
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return VLM(model.to(dtype).eval(), processor, family)


def _tiny_idefics3(dtype: torch.dtype, seed: int) -> VLM:
    tokenizer = tiny_tokenizer(TILES)
    torch.manual_seed(seed)
    model: Any = Idefics3ForConditionalGeneration(Idefics3Config(**_tiles(tokenizer)))
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor: Any = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TILES_TEMPLATE)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<end_of_utterance>", "<|endoftext|>"])
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return VLM(model.to(dtype).eval(), processor, "idefics3")


def tiny_smolvlm() -> VLM:
    """SmolVLM2's own classes, otherwise as Idefics3."""
    tokenizer = tiny_tokenizer(TILES)
    torch.manual_seed(0)
    model: Any = SmolVLMForConditionalGeneration(SmolVLMConfig(**_tiles(tokenizer)))
    images = SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor: Any = SmolVLMProcessor(
        images, tokenizer, SmolVLMVideoProcessor(), image_seq_len=4, chat_template=TILES_TEMPLATE
    )
    return VLM(model.eval(), processor, "smolvlm")


def _tiles(tokenizer: Any) -> dict[str, Any]:
    """Tiles of 32 pixels, four image tokens each; any image becomes a 1 x 2, 2 x 1 or 2 x 2 of them and itself."""
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": ids("<|im_start|>"),
        "eos_token_id": ids("<end_of_utterance>"),
        "pad_token_id": ids("<|endoftext|>"),
        "initializer_range": 0.15,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.15,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "scale_factor": 2,
        "image_token_id": ids("<image>"),
        "pad_token_id": ids("<|endoftext|>"),
        "tie_word_embeddings": True,
    }


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def ragged_images() -> list[list[Image.Image]]:
    return [[picture(1)], [picture(2, 112, 84), picture(3, 56, 56)], []]


def ragged_prompts(vlm: VLM) -> PromptBatch:
    """One image, two images of different sizes, and no image; three lengths, so two prompts are padded."""
    images = ragged_images()
    texts = ["What?", "Which of the two shows a lesion?", "A question without an image."]
    return encode_prompts(
        vlm, [conversation(text, len(group)) for text, group in zip(texts, images, strict=True)], images
    )


def conversation(text: str, num_images: int) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def token_kinds(vlm: VLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model with M-RoPE must be told of its tokens."""
    has_axes = hasattr(vlm.core.base_model, "get_rope_index")
    return {"mm_token_type_ids": (ids == vlm.core.config.image_token_id).int()} if has_axes else {}


def plain_logprobs(
    vlm: VLM, prompts: PromptBatch, completion_ids: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """The slow definition: one call of the model per completion, nothing padded, nothing shared, all logits."""
    num_completions = len(completion_ids) // len(prompts)
    logp = torch.zeros(completion_ids.shape, dtype=vlm.core.dtype)
    for row, (completion, keep) in enumerate(zip(completion_ids, mask.bool(), strict=True)):
        prompt = prompts.select([row // num_completions])
        ids = torch.cat([prompt.input_ids_BP[0], completion[keep]])[None]
        kinds = token_kinds(vlm, ids) if prompt.vision else {}
        logits = vlm.model(input_ids=ids, **prompt.vision, **kinds, use_cache=False).logits[0] / temperature
        logits[:, vlm.banned_token_ids] = -torch.inf
        start, length = prompt.input_ids_BP.shape[1], int(keep.sum())
        chosen = logits[start - 1 : -1].log_softmax(-1).gather(-1, completion[keep][:, None])[:, 0]
        logp[row, :length] = chosen
    return logp
