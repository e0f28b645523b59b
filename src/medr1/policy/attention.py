"""Attention of G completions to the one prompt they share, without G copies of the prompt.

Registered with transformers under the name `medr1_shared_prefix`: the model's own layers run unchanged, and
only the innermost call (queries, keys and values after rotary embedding) is laid out anew. A layout object
travels as the model argument `shared_prefix`; without one the function is transformers' own `sdpa`, so
`generate`, SFT and every other call behave as before. The layout is an argument and not a global, so that
gradient checkpointing, which repeats a layer during the backward pass, repeats it with the same layout.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, P prompt tokens (left-padded), T
completion tokens, H query heads, K key-value heads, R = H/K, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "medr1_shared_prefix"


class Layout(Protocol):
    """How the tokens of one model call are arranged."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """Attention output (B, tokens, H, D) for query (B, H, tokens, D) and key, value (B, K, tokens, D)."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prefix: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer."""
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return shared_prefix.attend(module, query, key, value, **kwargs), None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prompt_mask(attention_mask_BP: Tensor, queries: int) -> Tensor | None:
    """Causal mask (B, 1, queries, P) of the last `queries` of P tokens, true where attention is allowed.

    None for plain causal attention. A padded query may see itself, since a row of nothing but -inf would make NaN;
    nobody reads its output.
    """
    length = attention_mask_BP.shape[1]
    if queries == length and bool(attention_mask_BP.all()):
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask_BP.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=attention_mask_BP.device)
    return ((causal & attention_mask_BP.bool()[:, None, :]) | itself)[:, None, length - queries :]


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Plain attention, (B, tokens, H, D). On a CPU the kernel itself shares a key-value head between its query
    heads, twice as fast as transformers' copies; on a GPU the kernels that take a mask need the copies."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


@functools.cache
def _fused_flex_attention() -> Callable[..., Tensor]:
    """flex_attention as the one kernel that it becomes when compiled; uncompiled it would make the whole matrix."""
    return torch.compile(flex_attention, dynamic=True)


def tree_mask(real_BP: Tensor, num_completions: int, completion_length: int, *, with_prompt: bool) -> BlockMask:
    """The mask of rows `[prompt | completion 1 | … | completion G]` for `flex_attention`, never made in full.

    Args:
        real_BP: true at prompt tokens, false at padding.
        with_prompt: whether the queries begin with the prompt, or are the completions alone.
    """
    num_prompts, prompt_length = real_BP.shape
    packed, device = num_completions * completion_length, real_BP.device
    # All in tensors: a number in the closure would be compiled in, and each step has other lengths.
    place = torch.arange(prompt_length + packed, device=device)
    group = torch.div(place - prompt_length, completion_length, rounding_mode="floor").clamp(min=-1)  # -1: prompt
    real = torch.cat([real_BP, real_BP.new_ones(num_prompts, packed)], dim=1)
    start = 0 if with_prompt else prompt_length
    query_place, query_group = place[start:], group[start:]

    def allowed(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (group[key] < 0) | (group[key] == query_group[query])
        return real[row, key] & (key <= query_place[query]) & visible

    return create_block_mask(allowed, num_prompts, None, len(query_place), len(place), device=str(device))


class PackedGroups:
    """Rows `[prompt | completion 1 | … | completion G]`: each completion sees its prompt and itself.

    This is the tree mask of one packed row, computed in two calls so that completions are never compared with
    each other: prompt against prompt, and (N, T) completions against their prompt and themselves. With the prompts'
    keys and values at hand (`prefill`), a row is `[completion 1 | … | completion G]` and only the second is done.
    On a GPU it is one call of `flex_attention`, which copies no prompt's keys and skips the blocks that are masked.
    """

    def __init__(
        self,
        attention_mask_BP: Tensor,
        num_completions: int,
        completion_length: int,
        prefill: "Prefill | None" = None,
    ) -> None:
        if prefill is not None:
            attention_mask_BP = prefill.attention_mask_BP
        num_prompts, prompt_length = attention_mask_BP.shape
        self.prefill = prefill
        self.prompt_length = 0 if prefill else prompt_length
        self.groups = (num_completions, completion_length)
        self.tree: BlockMask | None = None
        if attention_mask_BP.is_cuda:
            self.tree = tree_mask(attention_mask_BP.bool(), *self.groups, with_prompt=prefill is None)
            return
        self.prompt_mask = None if prefill else prompt_mask(attention_mask_BP, prompt_length)
        # Completions are right-padded, so causality alone keeps real tokens from seeing padding.
        device = attention_mask_BP.device
        causal = torch.ones(completion_length, completion_length, dtype=torch.bool, device=device).tril()
        prompts = attention_mask_BP.bool()[:, None, None, :].expand(-1, *self.groups, -1)
        own = causal.expand(num_prompts, num_completions, -1, -1)
        self.completion_mask = torch.cat([prompts, own], dim=-1).flatten(0, 1)[:, None]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if self.tree is not None:
            return self._attend_tree(module, query, key, value, kwargs["scaling"])
        length, (num_completions, _) = self.prompt_length, self.groups

        def completions(states: Tensor) -> Tensor:  # (B, heads, G*T, D) -> (N, heads, T, D)
            return states[:, :, length:].unflatten(2, self.groups).transpose(1, 2).flatten(0, 1)

        def with_prompt(prompt: Tensor, states: Tensor) -> Tensor:  # (B, heads, …, D) -> (N, heads, P + T, D)
            return torch.cat([prompt.repeat_interleave(num_completions, dim=0), completions(states)], dim=2)

        if self.prefill:
            layer: int = module.layer_idx  # type: ignore[assignment]
            prompt_key, prompt_value = self.prefill.keys[layer], self.prefill.values[layer]
        else:
            prompt_key, prompt_value = key[:, :, :length], value[:, :, :length]
        completion_out = _sdpa(
            module,
            completions(query),
            with_prompt(prompt_key, key),
            with_prompt(prompt_value, value),
            self.completion_mask,
            **kwargs,
        )
        grouped = completion_out.unflatten(0, (-1, num_completions)).flatten(1, 2)
        if self.prefill:
            return grouped
        prompt_out = _sdpa(module, query[:, :, :length], prompt_key, prompt_value, self.prompt_mask, **kwargs)
        return torch.cat([prompt_out, grouped], dim=1)

    def _attend_tree(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if self.prefill:
            layer: int = module.layer_idx  # type: ignore[assignment]
            key = torch.cat([self.prefill.keys[layer], key], dim=2)
            value = torch.cat([self.prefill.values[layer], value], dim=2)
        attend: Any = _fused_flex_attention() if query.is_cuda else flex_attention
        return attend(query, key, value, block_mask=self.tree, scale=scaling, enable_gqa=True).transpose(1, 2)


class Prefill:
    """The prompts alone; keeps each layer's keys and values (B, K, P, D) for what comes after.

    With `before`, these are the ends of B prompts whose beginnings are read already: row b goes on from row
    `owner_B[b]` of `before`, and what is kept is of the whole prompts.
    """

    attention_mask_BP: Tensor
    """Of the whole prompts: 1 at real tokens."""
    logits_BV: Tensor | None = None
    """Of the first completion token, set by who made the call."""

    def __init__(
        self, attention_mask_BP: Tensor, before: "Prefill | None" = None, owner_B: Tensor | None = None
    ) -> None:
        queries = attention_mask_BP.shape[1]
        if before is not None:
            attention_mask_BP = torch.cat([before.attention_mask_BP[owner_B], attention_mask_BP], dim=1)
        self.attention_mask_BP = attention_mask_BP
        self.mask = prompt_mask(attention_mask_BP, queries)
        self.before, self.owner_B = before, owner_B
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self.before is not None:
            key = torch.cat([self.before.keys[layer][self.owner_B], key], dim=2)
            value = torch.cat([self.before.values[layer][self.owner_B], value], dim=2)
        self.keys[layer], self.values[layer] = key, value
        return _sdpa(module, query, key, value, self.mask, **kwargs)


class Decoding:
    """New tokens for each of N rows, over the prompts' cache (B, K, P, D) and each row's own static cache.

    A call holds M tokens, each a sequence of its own to the model: of each row the newest token, and after it tokens
    that it may go on with (`drafts`), as many as the caller likes; rows need not be equally long. Scores against the
    prompt are one batched product a prompt, scores against the row's own tokens another; one softmax over both. So a
    group reads its prompt's keys once instead of G times. Inside attention a row has C places, as many as the call's
    longest row has tokens.
    """

    def __init__(self, prefill: Prefill, num_completions: int, max_new_tokens: int) -> None:
        self.num_completions = num_completions
        self.prompt_keys = {layer: key.detach().transpose(2, 3).contiguous() for layer, key in prefill.keys.items()}
        self.prompt_values = {layer: value.detach().contiguous() for layer, value in prefill.values.items()}
        self.prompt_bias: Tensor | None = None  # (B, 1, 1, P), -inf at padding
        first = prefill.keys[0]
        mask = prefill.attention_mask_BP
        if not bool(mask.all()):
            bias = torch.zeros(mask.shape, dtype=first.dtype, device=first.device)
            self.prompt_bias = bias.masked_fill(~mask.bool(), -torch.inf)[:, None, None, :]
        num_prompts, kv_heads, _, size = first.shape
        rows = (num_prompts * num_completions, kv_heads)
        # Keys with the head dimension first: products with one query a row are twice as fast on a CPU. Zeros, since
        # places that a row has not reached are masked, and masking does not undo a NaN.
        self.keys = {layer: first.new_zeros(*rows, size, max_new_tokens) for layer in prefill.keys}
        self.values = {layer: first.new_zeros(*rows, max_new_tokens, size) for layer in prefill.keys}

    def expect(self, counts: list[int], cached: list[int]) -> None:
        """Lay out the next call: tokens of each row in it (at least 1), and tokens that its cache holds already."""
        device = self.keys[0].device
        counts_N, cached_N = torch.tensor(counts, device=device), torch.tensor(cached, device=device)
        self.width, self.end = max(counts), max(map(sum, zip(counts, cached, strict=True)))
        offsets = torch.arange(self.width, device=device)
        self.row_M, offset_M = (offsets < counts_N[:, None]).nonzero(as_tuple=True)
        self.place_M = cached_N[self.row_M] + offset_M
        self.slot_M: Tensor | None = (
            None if len(self.row_M) == self.width * len(counts) else (self.row_M * self.width + offset_M)
        )
        self.own_bias: Tensor | None = None  # (N, 1, C, end), -inf at what a token may not see
        if self.width > 1 or min(cached) + 1 < self.end:
            hidden = torch.arange(self.end, device=device) > (cached_N[:, None] + offsets)[..., None]
            zeros = torch.zeros(hidden.shape, dtype=self.keys[0].dtype, device=device)
            self.own_bias = zeros.masked_fill(hidden, -torch.inf)[:, None]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, **kwargs: Any
    ) -> Tensor:
        """For query (M, H, 1, D) and key, value (M, K, 1, D) of the call that `expect` laid out."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        own_keys, own_values = self.keys[layer], self.values[layer]
        own_keys[self.row_M, :, :, self.place_M] = key[:, :, 0].to(own_keys.dtype)
        own_values[self.row_M, :, self.place_M] = value[:, :, 0].to(own_values.dtype)
        num_rows, kv_heads, size, _ = own_keys.shape
        heads, end = query.shape[1], self.end
        prompts, groups = num_rows // self.num_completions, (self.num_completions, heads // kv_heads * self.width)

        def by_prompt(states: Tensor) -> Tensor:  # (N, K, R*C, …) -> (B, K, G*R*C, …): a prompt's rows side by side
            return states.unflatten(0, (prompts, -1)).transpose(1, 2).flatten(2, 3)

        def by_row(states: Tensor) -> Tensor:  # and back
            return states.unflatten(2, groups).transpose(1, 2).flatten(0, 1)

        query = query[:, :, 0] * scaling
        if self.slot_M is not None:  # a place for each of a row's C tokens, empty where it has fewer
            query = query.new_zeros(num_rows * self.width, heads, size).index_copy_(0, self.slot_M, query)
        # (N, C, K, R, D) -> (N, K, R*C, D)
        query = query.view(num_rows, self.width, kv_heads, -1, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        prompt_scores = by_prompt(query) @ self.prompt_keys[layer]
        if self.prompt_bias is not None:
            prompt_scores += self.prompt_bias
        own_scores = query @ own_keys[..., :end]
        if self.own_bias is not None:
            own_scores = (own_scores.unflatten(2, (-1, self.width)) + self.own_bias[:, :, None]).flatten(2, 3)
        scores = torch.cat([prompt_scores, by_prompt(own_scores)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        prompt_weights, own_weights = weights.tensor_split([weights.shape[-1] - end], dim=-1)
        out = by_row(prompt_weights @ self.prompt_values[layer])
        out += by_row(own_weights) @ own_values[:, :, :end]
        out = out.unflatten(2, (-1, self.width)).permute(0, 3, 1, 2, 4).reshape(-1, heads, size)
        return (out if self.slot_M is None else out[self.slot_M])[:, None]

    def keep(self, prompts: Tensor, rows: Tensor, num_completions: int) -> None:
        """Keep only these prompts and rows, by their present indices; num_completions rows a prompt."""
        self.num_completions = num_completions
        if self.prompt_bias is not None:
            self.prompt_bias = self.prompt_bias[prompts]
        for layer in self.keys:
            self.prompt_keys[layer] = self.prompt_keys[layer][prompts]
            self.prompt_values[layer] = self.prompt_values[layer][prompts]
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]
