"""Vision-language models: loading, prompts as tensors, and everything that differs between model families.

Any model of transformers for image-text-to-text. Completions share their prompt where its text layers are of the kinds
in `layers`; else each is computed with its own (`repeated`). docs/scale.md lists the families that are tested.

Shapes: B prompts, P prompt tokens, A rotary axes (3 with M-RoPE, else 1).
"""

import contextlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from medr1.errors import MedR1Error, NotFiniteError
from medr1.policy import attention, four_bit, layers
from medr1.policy.names import NO_SHIPPED_CODE, check_name, find_model
from medr1.policy.pixels import limit_as_published, limit_pixels
from medr1.processes import tell, tell_once

MEDIA = re.compile(r"(image|img|video|vision|audio|\b[be]o[iav])(_\w+)?_token")
"""What configurations, tokenizers and processors call the tokens that stand for images, videos or sounds."""
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>")
"""Tokens that end a turn of a chat, whether or not a generation configuration lies beside the weights."""
VISION_TOKENS = (
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),  # Qwen-VL
    *("<image>", "<fake_token_around_image>", "<global-img>"),  # Idefics3, SmolVLM; they cut into 6 x 6 tiles at most
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
"""Tokens that stand for images, or mark where one begins and ends."""


@dataclass
class VLM:
    """A model with its processor.

    Example: `vlm = load_vlm("tiny"); vlm.model.train()`
    """

    model: nn.Module
    """A transformers model for image-text-to-text, or a PEFT model around one."""
    processor: Any
    name: str
    """As the user gave it: hub id, folder, or "tiny"."""
    folder: Path | None = None
    """Where its weights lie; None where they were not loaded."""

    not_shared: str | None = field(init=False)
    """What keeps completions from sharing their prompt, where something does; see `layers`."""
    carries_state: bool = field(init=False, default=False)
    """Whether layers carry a state from token to token."""
    not_held: str | None = field(init=False, default=None)
    """What keeps a GPU from holding a step of decoding, once that was found; see `held`."""

    def __post_init__(self) -> None:
        self.not_shared = layers.not_shared(self.core)
        if self.not_shared is None:
            self.core.set_attn_implementation({"text_config": attention.NAME})
            self.carries_state = layers.lay_out_states(self.core)
        for module in self.core.modules():
            if type(module) is nn.Conv3d and module.kernel_size == module.stride and not any(module.padding):
                module.__class__ = PatchProjection

    @property
    def core(self) -> Any:
        """The transformers model itself, without PEFT around it (its linear layers may still carry adapters)."""
        model: Any = self.model
        peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        return model.get_base_model() if peft else model

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def takes(self, name: str) -> bool:
        """Whether a call of the model has this argument."""
        kind: Any = type(self.core)
        return name in layers.arguments(kind)

    @property
    def prompt_sees_itself(self) -> bool:
        """Whether all of a prompt is seen both ways, not its images alone."""
        return self.core.config.model_type == "paligemma"

    @cached_property
    def banned_token_ids(self) -> list[int]:
        """Image, video and vision-boundary tokens: never sampled, and left out of the scored distribution too."""
        ids = {value for name, value in self.core.config.to_dict().items() if MEDIA.search(name)}
        added = self.tokenizer.get_added_vocab()
        named = {**self.tokenizer.special_tokens_map, **vars(self.processor)}
        marks = (str(value) for name, value in named.items() if MEDIA.search(name))
        ids |= {added[mark] for mark in (*marks, *VISION_TOKENS) if mark in added}
        return sorted(token for token in ids if isinstance(token, int))

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a completion: the model's and the tokenizer's end tokens, and those that end a turn."""
        ids: set[int | None] = {self.tokenizer.eos_token_id}
        configured = getattr(self.core.generation_config, "eos_token_id", None)
        ids |= set(configured) if isinstance(configured, list) else {configured}
        added = self.tokenizer.get_added_vocab()
        ids |= {added.get(token) for token in TURN_ENDS}
        return sorted(token for token in ids if token is not None)

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.stop_token_ids[0] if pad is None else pad


class PatchProjection(nn.Conv3d):
    """A convolution over single patches, as the one matrix product that it is: seven times faster on a CPU."""

    def forward(self, patches: Tensor) -> Tensor:
        if patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def load_vlm(
    name: str,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    quantize: str = "none",
    min_pixels: int = 0,
    max_pixels: int = 0,
) -> VLM:
    """Load a vision-language model and its processor.

    Args:
        name: a local folder (a model, a LoRA adapter that names its base, or a training run), "tiny" for the one in
            the package, or a model of the hub ("Qwen/Qwen2-VL-2B-Instruct", "OWNER/NAME/FOLDER@REVISION"); see
            `medr1.policy.names`.
        dtype: "auto" (bfloat16 on a GPU that has it, else float32), "float32", "bfloat16" or "float16".
        device: default is the first GPU, else the CPU.
        quantize: "nf4" keeps linear layers in 4 bits (see `medr1.policy.four_bit`). An adapter that was trained on
            such a base gets one in any case.
        min_pixels: of an image, which is scaled up to them; 0: the model's own.
        max_pixels: of an image, which is scaled down to them; 0: the model's own, see
            `pixels.limit_as_published`.

    Raises:
        MedR1Error: no such model, the hub cannot be reached, it is not a vision-language model, limits of pixels that
            it cannot have, weights that are not finite numbers, or "nf4" without bitsandbytes.
    """
    vlm = _load(name, dtype, device, quantize)
    limit_pixels(vlm.processor, name, min_pixels=min_pixels, max_pixels=max_pixels)
    return vlm


def _load(name: str, dtype: str, device: str | torch.device | None, quantize: str) -> VLM:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = find_model(name)
    folder, source = place.weights, str(place.weights)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(name, folder, dtype, device, quantize)
    loader: Any = AutoModelForImageTextToText
    settings: dict[str, Any] = {"dtype": _torch_dtype(dtype, device), "use_safetensors": True, **NO_SHIPPED_CODE}
    if is_saved_quantised(folder):
        quantize = "as saved"
    elif quantize == "nf4":
        four_bit.require("model.quantize = nf4")
        settings["quantization_config"] = four_bit.nf4(settings["dtype"])
    if quantize != "none":
        settings["device_map"] = {"": device}
    try:
        processor = _load_processor(place.processor)
        model, loading = loader.from_pretrained(source, **settings, output_loading_info=True)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MedR1Error(_load_failure(name, folder, error)) from error
    if loading["missing_keys"]:  # transformers would go on with random weights in their place
        first = sorted(loading["missing_keys"])[0]
        raise MedR1Error(
            f"{name}: {len(loading['missing_keys'])} weights are missing, such as {first}; save the model again"
        )
    if not hasattr(processor, "image_processor"):
        raise MedR1Error(f"{name}: its processor takes no images; choose a vision-language model")
    if four_bit.is_four_bit(model):
        four_bit.keep_codes(model)
    refuse_not_finite(model, name)
    limit_as_published(processor, name, folder)
    vlm = VLM(model.to(device), processor, name, folder)
    if vlm.not_shared:
        tell(
            f"{name}: {vlm.not_shared} keeps the completions of a question from sharing its images and text; each reads"
            " its own, exact but slower: G completions cost about G times the prompt's time"
        )
    return vlm


def _load_processor(folder: Path) -> Any:
    """The processor in a folder; of those whose chat template lies in the tokenizer alone, with that one."""
    processor: Any = AutoProcessor.from_pretrained(str(folder), **NO_SHIPPED_CODE)
    tokenizer: Any = getattr(processor, "tokenizer", None)
    if getattr(processor, "chat_template", None) is None and getattr(tokenizer, "chat_template", None):
        processor.chat_template = tokenizer.get_chat_template()
    if not getattr(processor, "chat_template", None):
        tell_once(f"{folder}: holds no chat template; a prompt is its image marks and texts alone", "yellow")
    return processor


def is_saved_quantised(folder: Path) -> bool:
    """Whether the weights in a folder are quantised, or of an adapter those of its base when it was trained."""
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # an adapter need not have one; a damaged one is told when it is read
        return False


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; of one that is sharded, this process reads its part."""
    for name, tensor in tensors:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        if part.is_floating_point() and part.numel() and not bool(torch.stack(part.aminmax()).isfinite().all()):
            return name
    return None


def refuse_not_finite(model: nn.Module, name: str) -> None:
    """Raise NotFiniteError where a weight is NaN or infinite: nothing that such a model says means anything."""
    if tensor := first_not_finite(model.state_dict().items()):
        raise NotFiniteError(
            f"{name}: {tensor} holds numbers that are not finite; take the checkpoint before, or another model or dtype"
        )


def _load_failure(name: str, folder: Path, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    if isinstance(error, ImportError):  # such as num2words, which SmolVLM's processor asks for
        return f"{name}: needs a package that is not installed ({reason})"
    return f"{name}: not a readable vision-language model ({reason}); choose another folder or save it again"


def _load_adapter(name: str, folder: Path, dtype: str, device: str | torch.device, quantize: str) -> VLM:
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise MedR1Error(_load_failure(name, folder, error)) from error
    base = config.base_model_name_or_path
    if not base:
        raise MedR1Error(f"{folder}: adapter_config.json names no base model; add base_model_name_or_path")
    try:
        if check_name(base) is None and config.revision and "@" not in base:
            base = f"{base}@{config.revision}"
    except MedR1Error as error:
        raise MedR1Error(f"{folder / 'adapter_config.json'}: base_model_name_or_path is {error}") from error
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would unpickle adapter_model.bin
        raise MedR1Error(f"{folder}: holds no adapter_model.safetensors; save the adapter as safetensors")
    vlm = load_vlm(base, dtype=dtype, device=device, quantize="nf4" if is_saved_quantised(folder) else quantize)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # it goes on with zeros in their place
            model = PeftModel.from_pretrained(merged(vlm), str(folder))
        loading = model.load_adapter(str(folder), "default")  # once more, since this says what had no place
        # As the adapter was trained: its folder says how large images are.
        has_processor = any((folder / file).is_file() for file in ("processor_config.json", "preprocessor_config.json"))
        processor = _load_processor(folder) if has_processor else vlm.processor
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MedR1Error(_load_failure(name, folder, error)) from error
    if lost := sorted([*loading.missing_keys, *loading.unexpected_keys]):
        raise MedR1Error(
            f"{name}: {len(lost)} weights of the adapter do not fit {base}, such as {lost[0]}; take the base that it"
            " was trained on, and save it with the present transformers and peft"
        )
    refuse_not_finite(model, name)
    limit_as_published(processor, name, folder)
    return VLM(model, processor, name, folder)


def merged(vlm: VLM) -> Any:
    """The transformers model with an adapter that it already carries added to its weights.

    A base in 4 bits becomes float32 first, since codes are too coarse for what an adapter adds.
    """
    model: Any = vlm.model
    if vlm.core is model:
        return model
    if four_bit.is_four_bit(vlm.core):
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        config, adapter = model.peft_config["default"], get_peft_model_state_dict(model)
        model = get_peft_model(four_bit.dequantised(model.unload()), config)
        set_peft_model_state_dict(model, adapter)
    _untie(model.get_base_model())
    return model.merge_and_unload()


def _untie(core: Any) -> None:
    """Give the head weights of its own where an adapter lies on them or on the embeddings: merged, it would be added
    to both."""
    head, embeddings = core.get_output_embeddings(), core.get_input_embeddings()
    bases = [getattr(module, "base_layer", module) for module in (head, embeddings)]
    if bases != [head, embeddings] and bases[0].weight is bases[1].weight:
        bases[0].weight = nn.Parameter(bases[0].weight.detach().clone())
        core.config.tie_word_embeddings = False


def computes_in_bfloat16(dtype: str, device: str | torch.device) -> bool:
    """Whether a recipe's dtype means bfloat16 on this device: "auto" does on a GPU that has it."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "bfloat16" or (dtype == "auto" and on_gpu)


def _torch_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if computes_in_bfloat16(dtype, device) else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise MedR1Error(f"dtype {dtype!r} is unknown; choose auto, {', '.join(names)}")
    return names[dtype]


def vision_tower(vlm: VLM) -> list[nn.Module]:
    """The modules that turn pixels into image tokens: all but the text model and the vocabulary projection."""
    core = vlm.core
    text = {core.get_decoder(), core.get_output_embeddings()}
    return [module for module in core.base_model.children() if not text & set(module.modules())]


def restrict(logits: Tensor, temperature: float, banned: list[int]) -> Tensor:
    """The policy's logits (…, V), at least float32: over temperature, and -inf at banned tokens."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    banned = [token for token in banned if token < logits.shape[-1]]  # some families have none for their images
    return logits.index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf) if banned else logits


def entropy_of(logp: Tensor) -> Tensor:
    """Entropy in nats (…) of log-probabilities (…, V)."""
    # 0 times a finite number where a token has no chance, so that neither the sum nor its gradient is NaN.
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


@contextlib.contextmanager
def disk_errors(folder: Path, remedy: str = "free space and run again") -> Iterator[None]:
    """Within this block what a library cannot write into a folder ends in one line.

    Raises:
        MedR1Error: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
        reason = str(error).split("\n")[0]
        raise MedR1Error(f"{folder}: cannot be written ({reason}); {remedy}") from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients, and back to the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
