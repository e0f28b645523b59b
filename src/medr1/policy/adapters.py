"""What is done to a model before it is trained: a frozen vision tower, low-rank adapters, compiled layers."""

from pathlib import Path

import torch
from torch import nn

from medr1.errors import MedR1Error
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


def compile_text_layers(vlm: VLM, backend: str = "inductor") -> None:
    """Compile each text layer's norms and feed-forward part, on their first call; equal layers share one graph.

    Attention stays out: its layout changes from call to call, and each change would be compiled anew.
    """
    for layer in vlm.core.get_decoder().layers:
        for name, part in layer.named_children():
            if "attn" not in name:
                part.compile(backend=backend, dynamic=True)


def add_lora(vlm: VLM, *, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0) -> VLM:
    """Low-rank adapters on every linear layer of the text model (arXiv:2106.09685); all else is frozen.

    Half of an adapter's weights begin as zeros, the others as draws of `seed`, whatever was drawn before.
    The reference policy is then the same model with its adapters off: `with vlm.model.disable_adapter(): …`.
    """
    from peft import LoraConfig, get_peft_model

    core = merged(vlm)
    decoder = core.get_decoder()
    linear = {name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    text_model = next(name for name, module in core.named_modules() if module is decoder).rsplit(".", 1)[-1]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=rf".*{text_model}\..*\.({'|'.join(sorted(linear))})",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[] if vlm.device.type == "cpu" else [vlm.device]):
        torch.manual_seed(seed)
        model = get_peft_model(core, config)
    folder = Path(vlm.name).expanduser()
    is_folder = vlm.name != "tiny" and folder.is_dir()
    config.base_model_name_or_path = str(folder.resolve()) if is_folder else vlm.name
    return VLM(model, vlm.processor, vlm.name, vlm.folder)
