"""Tiny random models of families beside Qwen-VL and Idefics3: each of its own classes, with its own processor."""

from collections.abc import Callable
from typing import Any

import transformers as hf

HIDDEN, VOCABULARY = 32, 320
Built = tuple[Any, Any]
"""A model and its processor."""


def text_sizes(tokenizer: Any, end: str, **more: Any) -> dict[str, Any]:
    """Two layers with two key-value heads, and logits sharp enough to tell tokens apart."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(end),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
        **more,
    }


def siglip(size: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 8,
        **more,
    }


def _plain_template(mark: str, start: str, end: str, reply: str, roles: str = "") -> str:
    """`start` role, the parts, `end`; then what begins the reply."""
    return (
        roles + "{% for message in messages %}" + start + "{% for part in message.content %}"
        "{% if part.type == 'image' %}" + mark + "{% else %}{{ part.text }}{% endif %}{% endfor %}" + end + "\n"
        "{% endfor %}{% if add_generation_prompt %}" + reply + "{% endif %}"
    )


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
GEMMA = _plain_template(
    "<start_of_image>",
    "{% if loop.first %}<bos>{% endif %}<start_of_turn>{{ message.role }}\n",
    "<end_of_turn>",
    "<start_of_turn>model\n",
    NO_SYSTEM,
)
CHATML = ("<|im_start|>{{ message.role }}\n", "<|im_end|>", "<|im_start|>assistant\n")
THINKS = CHATML[2] + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
OPENS = CHATML[2] + "<think>\n"


def gemma3(tokenizer_of: Callable[..., Any]) -> Built:
    special = ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image>")
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
    tokenizer = tokenizer_of(special, "<eos>", bos_token="<bos>", **named)
    ids = tokenizer.convert_tokens_to_ids
    text = text_sizes(
        tokenizer,
        "<eos>",
        num_hidden_layers=3,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=siglip(vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=ids("<image>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        initializer_range=0.3,
    )
    images = hf.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(images, tokenizer, chat_template=GEMMA, image_seq_length=4)
    return hf.Gemma3ForConditionalGeneration(config), processor


def gemma4(tokenizer_of: Callable[..., Any]) -> Built:
    named = {
        **{"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"},
        **{"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"},
    }
    special = ("<eos>", "<bos>", "<|turn>", "<turn|>", "<|video|>", *named.values())
    tokenizer = tokenizer_of(special, "<eos>", bos_token="<bos>", **named)
    ids = tokenizer.convert_tokens_to_ids
    text = text_sizes(
        tokenizer,
        "<eos>",
        num_hidden_layers=4,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2,
        global_head_dim=16,
        final_logit_softcapping=30.0,
        use_bidirectional_attention="vision",
    )
    vision = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 8, "patch_size": 8, "pooling_kernel_size": 2},
        **{"position_embedding_size": 64},
    }
    config = hf.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=None,
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        audio_token_id=ids("<|audio|>"),
        boi_token_id=ids("<|image>"),
        eoi_token_id=ids("<image|>"),
        initializer_range=0.3,
    )
    images = hf.Gemma4ImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    processor = hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        images,
        tokenizer,
        hf.Gemma4VideoProcessor(),
        chat_template=_plain_template(
            "<|image|>", "{% if loop.first %}<bos>{% endif %}<|turn>{{ message.role }}\n", "<turn|>", "<|turn>model\n"
        ),
        image_seq_length=70,
    )
    return hf.Gemma4ForConditionalGeneration(config), processor


def qwen3_5(tokenizer_of: Callable[..., Any]) -> Built:
    return _qwen3("5", tokenizer_of)


def qwen3_vl_moe(tokenizer_of: Callable[..., Any]) -> Built:
    return _qwen3("moe", tokenizer_of)


def _qwen3(kind: str, tokenizer_of: Callable[..., Any]) -> Built:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    tokenizer = tokenizer_of((*special, "<|image_pad|>", "<|video_pad|>"), "<|im_end|>")
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = text_sizes(tokenizer, "<|im_end|>", rope_parameters=rope)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": HIDDEN,
        "num_heads": 2,
        "num_position_embeddings": 64,
    }
    marks = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    if kind == "5":
        text |= {
            "num_hidden_layers": 3,
            "initializer_range": 0.15,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": rope | {"partial_rotary_factor": 1.0},
        }
        model: Any = hf.Qwen3_5ForConditionalGeneration(
            hf.Qwen3_5Config(text_config=text, vision_config=vision, **marks)
        )
        reply = THINKS
    else:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
        vision |= {"deepstack_visual_indexes": [0, 1]}
        model = hf.Qwen3VLMoeForConditionalGeneration(
            hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **marks)
        )
        reply = OPENS
    size = {"shortest_edge": 64 * 64, "longest_edge": 96 * 96}
    template = _plain_template("<|vision_start|><|image_pad|><|vision_end|>", CHATML[0], CHATML[1], reply)
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer,
        hf.Qwen3VLVideoProcessor(size=size),
        chat_template=template,
    )
    return model, processor


def internvl(tokenizer_of: Callable[..., Any]) -> Built:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_of(special, "<|im_end|>", **named)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [32, 32],
        "patch_size": [8, 8],
    }
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer, "<|im_end|>")},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = hf.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = hf.InternVLProcessor(
        images,
        tokenizer,
        hf.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=_plain_template("<IMG_CONTEXT>\n", *CHATML),
    )
    return hf.InternVLForConditionalGeneration(config), processor


def llava(tokenizer_of: Callable[..., Any]) -> Built:
    tokenizer = tokenizer_of(("<unk>", "<s>", "</s>", "<image>"), "</s>", bos_token="<s>")
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", **text_sizes(tokenizer, "</s>")},
        vision_config={"model_type": "clip_vision_model", **siglip()},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_plain_template("<image>\n", "{{ message.role | upper }}: ", "</s>", "ASSISTANT:"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_onevision(tokenizer_of: Callable[..., Any]) -> Built:
    tokenizer = tokenizer_of(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"), "<|im_end|>")
    ids, grid = tokenizer.convert_tokens_to_ids, [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_sizes(tokenizer, "<|im_end|>")},
        vision_config={"model_type": "siglip_vision_model", **siglip(vision_use_head=False)},
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=grid,
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=grid),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_plain_template("<image>\n", *CHATML),
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def glm46v(tokenizer_of: Callable[..., Any]) -> Built:
    special = (
        *("<|endoftext|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>", "<|image|>"),
        *("<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
    )
    tokenizer = tokenizer_of(special, "<|user|>")
    ids = tokenizer.convert_tokens_to_ids
    rope = {
        **{"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "partial_rotary_factor": 1.0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": HIDDEN,
        "num_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    }
    config = hf.Glm46VConfig(
        text_config={"model_type": "glm4v_text", **text_sizes(tokenizer, "<|user|>", rope_parameters=rope)},
        vision_config={"model_type": "glm4v_vision", **vision},
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 2 * 64 * 64}
    processor = hf.Glm46VProcessor(
        hf.Glm46VImageProcessor(size=size, patch_size=8),
        tokenizer,
        hf.Glm46VVideoProcessor(),
        chat_template=_plain_template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|{{ message.role }}|>\n", "", "<|assistant|>\n<think>"
        ),
    )
    return hf.Glm46VForConditionalGeneration(config), processor


def mistral3(tokenizer_of: Callable[..., Any]) -> Built:
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = tokenizer_of(special, "</s>", bos_token="<s>")
    config = hf.Mistral3Config(
        text_config={"model_type": "mistral", **text_sizes(tokenizer, "</s>", sliding_window=6)},
        vision_config={
            "model_type": "pixtral",
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"head_dim": 8, "image_size": 64, "patch_size": 8},
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=_plain_template("[IMG]", "{% if loop.first %}<s>{% endif %}[INST]", "[/INST]", ""),
    )
    return hf.Mistral3ForConditionalGeneration(config), processor


def lfm2_vl(tokenizer_of: Callable[..., Any]) -> Built:
    special = (
        *("<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>"),
        "<|img_thumbnail|>",
        *(f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)),
    )
    tokenizer = tokenizer_of(special, "<|im_end|>", bos_token="<|startoftext|>", image_token="<image>")
    text = text_sizes(
        tokenizer,
        "<|im_end|>",
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
    )
    config = hf.Lfm2VlConfig(
        text_config={"model_type": "lfm2", **text},
        vision_config={
            "model_type": "siglip2_vision_model",
            **siglip(num_patches=16, vision_use_head=False),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=24,
    )
    images = hf.Lfm2VlImageProcessor(
        encoder_patch_size=8, tile_size=32, min_image_tokens=1, max_image_tokens=4, max_tiles=4, max_num_patches=16
    )
    processor = hf.Lfm2VlProcessor(
        images,
        tokenizer,
        chat_template=_plain_template(
            "<image>", "{% if loop.first %}<|startoftext|>{% endif %}" + CHATML[0], *CHATML[1:]
        ),
    )
    return hf.Lfm2VlForConditionalGeneration(config), processor


def paligemma(tokenizer_of: Callable[..., Any]) -> Built:
    tokenizer = tokenizer_of(("<pad>", "<eos>", "<bos>", "<image>"), "<eos>", bos_token="<bos>", image_token="<image>")
    images = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)
    vocabulary = len(tokenizer)  # the processor adds tokens for places
    config = hf.PaliGemmaConfig(
        text_config={"model_type": "gemma", **text_sizes(tokenizer, "<eos>"), "vocab_size": vocabulary},
        vision_config={"model_type": "siglip_vision_model", **siglip(vision_use_head=False)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def mllama(tokenizer_of: Callable[..., Any]) -> Built:
    special = ("<|finetune_right_pad_id|>", "<|begin_of_text|>", "<|eot_id|>", "<|image|>", "<|python_tag|>")
    tokenizer = tokenizer_of(special, "<|eot_id|>", bos_token="<|begin_of_text|>")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 32,
        "image_size": 32,
        "patch_size": 8,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    text = text_sizes(tokenizer, "<|eot_id|>", num_hidden_layers=3, cross_attention_layers=[1])
    del text["head_dim"]
    text["bos_token_id"] = tokenizer.bos_token_id
    config = hf.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<|image|>")
    )
    processor = hf.MllamaProcessor(
        hf.MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4),
        tokenizer,
        chat_template=_plain_template(
            "<|image|>", "{% if loop.first %}<|begin_of_text|>{% endif %}", "<|eot_id|>", "assistant\n"
        ),
    )
    return hf.MllamaForConditionalGeneration(config), processor


def blip_2(tokenizer_of: Callable[..., Any]) -> Built:
    tokenizer = tokenizer_of(("<pad>", "</s>", "<image>"), "</s>", bos_token="</s>")
    processor = hf.Blip2Processor(
        hf.BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer, num_query_tokens=4
    )
    text = {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "init_std": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dropout": 0.0,
    }
    config = hf.Blip2Config(
        text_config=text,
        vision_config={**siglip(), "patch_size": 8},
        qformer_config={
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"encoder_hidden_size": 16, "vocab_size": 8, "hidden_dropout_prob": 0.0},
            "attention_probs_dropout_prob": 0.0,
        },
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.Blip2ForConditionalGeneration(config), processor


def aya_vision(tokenizer_of: Callable[..., Any]) -> Built:
    special = (
        *("<pad>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"),
        *("<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL", "<image>"),
    )
    tokenizer = tokenizer_of(special, "<|END_OF_TURN_TOKEN|>")
    text = text_sizes(
        tokenizer,
        "<|END_OF_TURN_TOKEN|>",
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        logit_scale=1.0,
    )
    config = hf.AyaVisionConfig(
        text_config={"model_type": "cohere2", **text},
        vision_config={"model_type": "siglip_vision_model", **siglip(vision_use_head=False)},
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        alignment_intermediate_size=24,
    )
    images = hf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    processor = hf.AyaVisionProcessor(
        images,
        tokenizer,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=_plain_template(
            "<image>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"
        ),
    )
    return hf.AyaVisionForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[Callable[..., Any]], Built]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "qwen3_5": qwen3_5,
    "qwen3_vl_moe": qwen3_vl_moe,
    "internvl": internvl,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "glm46v": glm46v,
    "mistral3": mistral3,
    "lfm2_vl": lfm2_vl,
    "paligemma": paligemma,
    "aya_vision": aya_vision,
    "mllama": mllama,
    "blip_2": blip_2,
}
