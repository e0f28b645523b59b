"""What is done to a model before it is trained: a frozen vision tower, low-rank adapters, compiled layers."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medr1.errors import MedR1Error
from medr1.policy import four_bit
from medr1.policy.vlm import VLM, merged, vision_tower


def freeze_vision(vlm: VLM) -> None:
    """Stop training of the vision tower.

    Raises:
        MedR1Error: this family's tower is unknown here.
    """
    tower = vision_tower(vlm)
    if not tower:
        raise MedR1Error(f"{vlm.name}: its vision tower is not known to medr1; train it, or use a Qwen-VL model")
    for module in tower:
        module.requires_grad_(False)
    for parameter in vlm.core.base_model.parameters(recurse=False):  # LLaVA's token for the end of a line
        parameter.requires_grad_(False)


def compile_text_layers(vlm: VLM, backend: str = "inductor") -> None:
    """Compile each text layer's norms and feed-forward part, on their first call; equal layers share one graph.

    Attention and what carries a state stay out: their layout changes from call to call, and each change would be
    compiled anew.
    """
    for layer in vlm.core.get_decoder().layers:
        for name, part in layer.named_children():
            if "attn" not in name and name != "conv":
                part.compile(backend=backend, dynamic=True)


def lora_layers(core: nn.Module, targets: str) -> dict[str, nn.Linear]:
    """The linear layers that an adapter is for, by name: all but the output head of a transformers model.

    Args:
        targets: "language", "vision" (the tower, and what makes its output tokens), or "both".
    """
    model: Any = core
    language, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and targets in ("both", "language" if module in language else "vision")
    }


def add_lora(
    vlm: VLM, *, rank: int, alpha: float, targets: str = "language", dropout: float = 0.0, seed: int = 0
) -> VLM:
    """Low-rank adapters on every linear layer of `targets` (`lora_layers`; arXiv:2106.09685); all else is frozen.

    Half of an adapter's weights begin as zeros, the others as draws of `seed`, whatever was drawn before.
    The reference policy is then the same model with its adapters off: `with vlm.model.disable_adapter(): …`.

    Raises:
        MedR1Error: there is an adapter already, on a base in 4 bits, which cannot take it up.
    """
    from peft import LoraConfig, get_peft_model

    if vlm.core is not vlm.model and four_bit.is_four_bit(vlm.core):
        raise MedR1Error(
            f"{vlm.name}: is an adapter on a base in 4 bits; `medr1 export {vlm.name} --out FOLDER`, and train FOLDER"
        )
    core = merged(vlm)
    numbered = {re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in lora_layers(core, targets)}  # of one kind, one name
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name).replace(r"\#", r"\d+") for name in sorted(numbered)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[] if vlm.device.type == "cpu" else [vlm.device]):
        torch.manual_seed(seed)
        model = get_peft_model(core, config)
    folder = Path(vlm.name).expanduser()
    is_folder = vlm.name != "tiny" and folder.is_dir()
    # Where the weights came from: a run's folder stands for others once the run goes on.
    config.base_model_name_or_path = str((vlm.folder or folder).resolve()) if is_folder else vlm.name
    return VLM(model, vlm.processor, vlm.name, vlm.folder)
