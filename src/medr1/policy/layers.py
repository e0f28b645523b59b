"""Kinds of text layers, and what each asks of completions that share one prompt.

A layer that compares tokens is laid out by `attention`, and its mask says who may see whom by position, whatever it
is: causal, within a window, within a chunk, both ways within an image. A layer that carries a state from token to
token (a gated delta net, a short convolution) runs over the prompt once, and goes on from there in each completion.
All others are computed the plain way, each completion with its own image and prompt (`repeated`).
"""

import functools
import inspect
from typing import Any, Self

import torch
from torch import Tensor, nn

SEES = {"full_attention": "all before", "sliding_attention": "a window before", "chunked_attention": "its chunk"}
"""Kinds of attention, and what a token sees; the model's own mask says it, by position."""
CARRIES = {"linear_attention": "GatedDeltaNet", "conv": "ShortConv"}
"""Kinds of layers with a state, and how the names of their classes end."""
TEXT_MODELS = (
    *("llama", "mistral", "ministral3", "gemma", "gemma3_text", "gemma4_text", "cohere2", "lfm2"),
    *("qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text", "qwen3_vl_moe_text"),
    *("qwen3_5_text", "qwen3_5_moe_text", "glm4v_text"),
)
"""Text models whose layers ask for nothing else."""


def not_shared(core: Any) -> str | None:
    """What keeps this model's completions from sharing their prompt; None where nothing does."""
    text = core.config.get_text_config()
    if core.config.is_encoder_decoder:
        return "its encoder"
    if text.model_type not in TEXT_MODELS:
        return f"its text model, {text.model_type},"
    kinds = set(getattr(text, "layer_types", None) or ()) - {*SEES, *CARRIES}
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers"
    if getattr(text, "attn_logit_softcapping", None):
        return "its attention with capped scores"
    kind: Any = type(core)
    return None if {"position_ids", "logits_to_keep"} <= arguments(kind) else "its way of placing images"


@functools.cache
def arguments(model: Any) -> frozenset[str]:
    """What a call of this class of models takes, by name."""
    return frozenset(inspect.signature(model.forward).parameters)


class State:
    """What one layer carries from token to token; in the place of transformers' cache, but with its gradient.

    Of a gated delta net both tensors, of a short convolution the first alone.
    """

    def __init__(self, inputs: Tensor | None = None, memory: Tensor | None = None) -> None:
        self.inputs, self.memory = inputs, memory
        """The convolution's last inputs (rows, channels, kernel); the recurrent state (rows, heads, keys, values)."""

    def of_rows(self, rows: Tensor) -> Self:
        """A copy for these rows, each as often as it comes."""
        return type(self)(*(None if part is None else part[rows] for part in (self.inputs, self.memory)))

    def detached(self) -> Self:
        """The same without gradient."""
        return type(self)(*(None if part is None else part.detach() for part in (self.inputs, self.memory)))

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The last inputs."""
        return self.inputs

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The memory."""
        return self.memory

    def is_recording_past(self, *args: Any) -> bool:
        """Whether a layer may not overwrite the tensors in place."""
        return torch.is_grad_enabled()

    def update_conv_state(self, inputs: Tensor, *args: Any, conv_kernel_size: int, **kwargs: Any) -> Tensor:
        """Take in further inputs (rows, channels, tokens); these with the ones before them."""
        before = inputs.new_zeros(*inputs.shape[:2], conv_kernel_size) if self.inputs is None else self.inputs
        whole = torch.cat([before, inputs], dim=-1)
        self.inputs = whole[..., -conv_kernel_size:]
        return whole

    def update_recurrent_state(self, memory: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Take in the new memory."""
        self.memory = memory
        return memory


class CarriesState(nn.Module):
    """Mixed into a layer with a state: a call that is laid out (`attention.Layout`) says which tokens follow which."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        shared_prefix: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        layer: Any = super().forward
        if shared_prefix is None:
            return layer(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)

        def run(hidden_states: Tensor, state: State, real: Tensor | None = None) -> Tensor:
            return layer(hidden_states, cache=state, attention_mask=real, **kwargs)

        return shared_prefix.carry(self.layer_idx, run, hidden_states)


@functools.cache
def _with_state(layer: type) -> type:
    return type(layer.__name__, (CarriesState, layer), {})


def lay_out_states(core: Any) -> bool:
    """Let a model's layers with a state heed layouts; whether it has any."""
    endings = tuple(CARRIES.values())
    found = [module for module in core.get_decoder().modules() if type(module).__name__.endswith(endings)]
    for module in found:
        if not isinstance(module, CarriesState):
            module.__class__ = _with_state(type(module))  # type: ignore[arg-type]  # a class is hashable
    return bool(found)
