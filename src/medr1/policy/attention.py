"""Attention of G completions to the one prompt they share, without G copies of the prompt.

Registered with transformers under the name `medr1_shared_prefix`: the model's own layers run unchanged, and
only the innermost call (queries, keys and values after rotary embedding) is laid out anew. A layout object
travels as the model argument `shared_prefix`; without one the function is transformers' own `sdpa`, so
`generate` and every other call behave as before. The layout is an argument and not a global, so that
gradient checkpointing, which repeats a layer during the backward pass, repeats it with the same layout.

Who sees whom is the model's own affair: it hands transformers a function of two places for each kind of layer (causal,
within a window or chunk, both ways within an image), and the layout asks that function of the places that tokens would
have if each completion stood alone behind its prompt. So no kind of mask is known here by name.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, P prompt tokens (left-padded), T
completion tokens, H query heads, K key-value heads, R = H/K, D head size.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from medr1.policy.layers import State

NAME = "medr1_shared_prefix"
ROWS_TOGETHER = 8
"""Completions that are decoded over one cache. With fewer a product has few rows; with more, most of it is masked."""
PROMPT_COLUMNS = 128
"""Prompts that are decoded in fixed shape are padded to a multiple of this many columns."""
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether a query sees a key, of (row, head, query's place, key's place); transformers' mask functions are such."""
Run = Callable[..., Tensor]
"""A layer with a state, of (hidden states, State, real tokens or None)."""


class Layout(Protocol):
    """How the tokens of one model call are arranged."""

    def mask(self, sees: Sees) -> Any:
        """What `attend` needs to know of one kind of layer; once a call and kind."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **kwargs: Any
    ) -> Tensor:
        """Attention output (B, tokens, H, D) for query (B, H, tokens, D) and key, value (B, K, tokens, D)."""

    def carry(self, layer: int, run: Run, hidden_states: Tensor) -> Tensor:
        """Output (B, tokens, …) of a layer that carries a state, for its input (B, tokens, …)."""


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def arranged_by(layout: Layout) -> Iterator[None]:
    """Within this block masks are of this layout: they are made before layers, where no argument of ours is at hand.

    `laid_out` sees to it itself, but a step that is held may not.
    """
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def laid_out(
    model: nn.Module,
    layout: Layout,
    *,
    input_ids: Tensor,
    position_ids_ABP: Tensor,
    real: Tensor | None = None,
    **inputs: Any,
) -> Any:
    """Call a model whose tokens, real ones and padding, are arranged by a layout."""
    # Without a mask of the tokens transformers would look for sequences of its own in their positions.
    mask = torch.ones_like(input_ids) if real is None else real
    # Models with one rotary axis take positions without that dimension.
    inputs["position_ids"] = position_ids_ABP if len(position_ids_ABP) > 1 else position_ids_ABP[0]
    with contextlib.nullcontext() if _current.get() is layout else arranged_by(layout):
        return model(input_ids=input_ids, attention_mask=mask, use_cache=False, shared_prefix=layout, **inputs)


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
    return shared_prefix.attend(module, query, key, value, attention_mask, **kwargs), None


def shared_prefix_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask function that transformers calls once for each kind of layer."""
    layout = _current.get()
    return (
        sdpa_mask(*args, **kwargs) if layout is None else layout.mask(kwargs.get("mask_function", causal_mask_function))
    )


def _passed_on(parts: Any, device: torch.device) -> Tensor:
    """A tensor in the place of a mask (models ask masks for their dimensions, and pass them on), with its parts."""
    mask: Any = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask.parts = parts
    return mask


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, shared_prefix_mask)


def dense(sees: Sees, query_BQ: Tensor, key_BK: Tensor, real_BK: Tensor) -> Tensor:
    """The mask (B, Q, K) of queries and keys at these places, true where attention is allowed; only at real keys."""
    row = torch.arange(len(query_BQ), device=query_BQ.device)[:, None, None]
    return sees(row, torch.zeros_like(row), query_BQ[:, :, None], key_BK[:, None, :]) & real_BK[:, None, :]


def prompt_mask(sees: Sees, real_BP: Tensor, queries: int, places_BP: Tensor) -> Tensor | None:
    """Mask (B, 1, queries, P) of the last `queries` of P prompt tokens at these places.

    None for plain causal attention. A padded query may see itself, since a row of nothing but -inf would make NaN;
    nobody reads its output.
    """
    length = real_BP.shape[1]
    if sees is causal_mask_function and queries == length and bool(real_BP.all()):
        return None
    itself = torch.eye(length, dtype=torch.bool, device=real_BP.device)[length - queries :]
    return (dense(sees, places_BP[:, length - queries :], places_BP, real_BP) | itself)[:, None]


def places_in_row(real_BP: Tensor) -> Tensor:
    """Of each token: how many real ones stand before it; what padding gets is nobody's affair."""
    return (real_BP.long().cumsum(1) - 1).clamp(min=0)


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
    with torch.autocast("cpu", enabled=False):  # which would narrow what `_wide` has widened
        out = nn.functional.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=True,
        )
    return out.transpose(1, 2)


def _wide(states: Tensor) -> Tensor:
    """In float32 where bfloat16 learns on a CPU: the kernel's way back takes five times as long in bfloat16, and what
    completions add to a token that they share is rounded once."""
    narrow = states.device.type == "cpu" and states.dtype is torch.bfloat16 and torch.is_grad_enabled()
    return states.float() if narrow else states


@functools.cache
def _fused_flex_attention() -> Callable[..., Tensor]:
    """flex_attention as the one kernel that it becomes when compiled; uncompiled it would make the whole matrix."""
    return torch.compile(flex_attention, dynamic=True)


def tree_mask(sees: Sees, real_BP: Tensor, places_BP: Tensor, tree: "Tree", *, with_prompt: bool) -> BlockMask:
    """The mask of rows `[prompt | tree of completions]` for `flex_attention`, never made in full.

    Args:
        sees: which places a token sees.
        real_BP: true at prompt tokens, false at padding.
        places_BP: of the prompt's tokens; completions follow the last.
        with_prompt: whether the queries begin with the prompt, or are the completions alone.
    """
    # All in tensors: a number in the closure would be compiled in, and each step has other lengths.
    group = torch.cat([torch.full_like(places_BP, -1), tree.group_BL], dim=1)  # -1: prompt
    step = torch.cat([torch.zeros_like(places_BP), tree.step_BL], dim=1)
    places = torch.cat([places_BP, places_BP[:, -1:] + 1 + tree.step_BL], dim=1)
    real, first = torch.cat([real_BP, tree.real_BL], dim=1), tree.first_BGT
    start = 0 if with_prompt else real_BP.shape[1]
    query_place, query_group = places[:, start:], group[:, start:]

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        asking = query_group[row, query]
        own = first[row, asking.clamp(min=0), step[row, key]] == group[row, key]
        visible = (group[row, key] < 0) | (own & (asking >= 0))
        return real[row, key] & visible & sees(row, head, query_place[row, query], places[row, key])

    return create_block_mask(
        allowed, len(group), None, query_place.shape[1], group.shape[1], device=str(real_BP.device)
    )


class Tree:
    """Completions of each prompt laid side by side in one row, beginnings that several have in common once.

    What a token is computed from is its prompt and what stands before it, so that tokens of a group with equal
    beginnings are one token, also in the gradient. Each belongs to the first completion that has it.

    Args:
        ids_NT: the G completions of the first prompt first.
        lengths_N: of how many tokens each is laid out; of one at least not 0.
        num_prompts: B.
    """

    def __init__(self, ids_NT: Tensor, lengths_N: Tensor, num_prompts: int) -> None:
        self.longest = longest = int(lengths_N.max())
        ids_BGT = ids_NT[:, :longest].unflatten(0, (num_prompts, -1))
        device, num_completions = ids_NT.device, ids_BGT.shape[1]
        steps, groups = torch.arange(longest, device=device), torch.arange(num_completions, device=device)
        real_BGT = steps < lengths_N.view(num_prompts, -1, 1)
        equal_BGGT = (ids_BGT[:, :, None] == ids_BGT[:, None]).to(torch.uint8).cumprod(-1)
        self.first_BGT = (equal_BGGT * real_BGT[:, None]).argmax(2)
        """The first completion with the same beginning up to this token."""
        own_BGT = real_BGT & (self.first_BGT == groups[:, None])
        column_BGT = own_BGT.flatten(1).cumsum(1).unflatten(1, own_BGT.shape[1:]) - 1
        self.length = int(column_BGT.max()) + 1
        """L, the tokens of the row with the most."""
        self.column_NT = column_BGT.gather(1, self.first_BGT).where(real_BGT, 0).flatten(0, 1)
        """Where each token of the completions lies in its row; padding: the first token, where nobody looks for it."""
        row_M, group_M, step_M = own_BGT.nonzero(as_tuple=True)
        column_M = column_BGT[own_BGT]
        # Padding of a row repeats the first token of a completion, which every model can read.
        self.group_BL, self.step_BL = torch.zeros(2, num_prompts, self.length, dtype=torch.long, device=device)
        self.real_BL = torch.zeros(num_prompts, self.length, dtype=torch.bool, device=device)
        for each_BL, value_M in ((self.group_BL, group_M), (self.step_BL, step_M), (self.real_BL, True)):
            each_BL[row_M, column_M] = value_M
        first_token_B = torch.arange(num_prompts, device=device)[:, None] * num_completions
        self.token_BL = (first_token_B + self.group_BL) * longest + self.step_BL
        """Where each token of a row stands among (N, longest)."""
        self.ids_BL = ids_BGT.flatten()[self.token_BL]


@dataclass(frozen=True)
class GroupMask:
    """Who sees whom in rows `[prompt | completion 1 | … | completion G]`, in two parts."""

    prompt: Tensor | None
    """(B, 1, P, P), or None for plain causal attention."""
    completions: Tensor
    """(N, 1, T, P + T)."""


class PackedGroups:
    """Rows `[prompt | tree of G completions]`: each completion sees its prompt and itself.

    This is the tree mask of one packed row, computed in two calls so that completions are never compared with
    each other: prompt against prompt, and (N, T) completions against their prompt and themselves. With the prompts'
    keys and values at hand (`prefill`), a row holds the completions alone and only the second is done. On a GPU it is
    one call of `flex_attention`, which copies no prompt's keys and skips the blocks that are masked.
    """

    def __init__(self, attention_mask_BP: Tensor, tree: Tree, prefill: "Prefill | None" = None) -> None:
        if prefill is not None:
            attention_mask_BP = prefill.attention_mask_BP
        num_prompts, prompt_length = attention_mask_BP.shape
        self.prefill, self.tree = prefill, tree
        self.real_BP = attention_mask_BP.bool()
        self.prompt_length = 0 if prefill else prompt_length
        self.num_completions = len(tree.column_NT) // num_prompts
        self.as_tree = attention_mask_BP.is_cuda
        # In a call with the prompts a model knows tokens by their columns; without them there is no padding.
        columns = torch.arange(prompt_length, device=attention_mask_BP.device).expand(num_prompts, -1)
        self.places_BP = places_in_row(self.real_BP) if prefill else columns
        row_N = torch.arange(len(tree.column_NT), device=columns.device) // self.num_completions
        self.place_NT = row_N[:, None] * (self.prompt_length + tree.length) + self.prompt_length + tree.column_NT
        """Of each token of the completions, where it is among (B, P + L)."""

    def mask(self, sees: Sees) -> Tensor | BlockMask:
        if self.as_tree:
            return tree_mask(sees, self.real_BP, self.places_BP, self.tree, with_prompt=self.prefill is None)
        # Completions are right-padded, so that no real token comes after padding.
        own_BT = self.places_BP[:, -1:] + 1 + torch.arange(self.tree.longest, device=self.places_BP.device)
        keys_BK = torch.cat([self.places_BP, own_BT], dim=1)
        real_BK = torch.cat([self.real_BP, torch.ones_like(own_BT, dtype=torch.bool)], dim=1)
        completions = dense(sees, own_BT, keys_BK, real_BK).repeat_interleave(self.num_completions, dim=0)[:, None]
        prompt = None if self.prefill else prompt_mask(sees, self.real_BP, self.prompt_length, self.places_BP)
        return _passed_on(GroupMask(prompt, completions), own_BT.device)

    def _completions(self, states: Tensor) -> Tensor:
        """(B, P + L, …) -> (N, T, …). What completions add to a token that they share is summed in float32."""
        wide = states.float() if states.dtype in (torch.bfloat16, torch.float16) and states.requires_grad else states
        chosen = wide.flatten(0, 1).index_select(0, self.place_NT.flatten()).to(states.dtype)
        return chosen.unflatten(0, self.place_NT.shape)

    def _packed(self, states: Tensor) -> Tensor:
        """(N, T, …) -> (B, L, …)."""
        token_BL = self.tree.token_BL
        return states.flatten(0, 1).index_select(0, token_BL.flatten()).unflatten(0, token_BL.shape)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        if self.as_tree:
            return self._attend_tree(module, query, key, value, mask, kwargs["scaling"])
        length, dtype = self.prompt_length, value.dtype
        query, key, value = _wide(query), _wide(key), _wide(value)

        def completions(states: Tensor) -> Tensor:  # (B, heads, P + L, D) -> (N, heads, T, D)
            return self._completions(states.transpose(1, 2)).transpose(1, 2)

        def with_prompt(prompt: Tensor, states: Tensor) -> Tensor:  # (B, heads, …, D) -> (N, heads, P + T, D)
            return torch.cat([prompt.repeat_interleave(self.num_completions, dim=0), completions(states)], dim=2)

        if self.prefill:
            layer: int = module.layer_idx  # type: ignore[assignment]
            prompt_key, prompt_value = _wide(self.prefill.keys[layer]), _wide(self.prefill.values[layer])
        else:
            prompt_key, prompt_value = key[:, :, :length], value[:, :, :length]
        completion_out = _sdpa(
            module,
            completions(query),
            with_prompt(prompt_key, key),
            with_prompt(prompt_value, value),
            mask.parts.completions,
            **kwargs,
        )
        packed = self._packed(completion_out)
        if self.prefill:
            return packed.to(dtype)
        prompt_out = _sdpa(module, query[:, :, :length], prompt_key, prompt_value, mask.parts.prompt, **kwargs)
        return torch.cat([prompt_out, packed], dim=1).to(dtype)

    def _attend_tree(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float
    ) -> Tensor:
        if self.prefill:
            layer: int = module.layer_idx  # type: ignore[assignment]
            key = torch.cat([self.prefill.keys[layer], key], dim=2)
            value = torch.cat([self.prefill.values[layer], value], dim=2)
        attend: Any = _fused_flex_attention() if query.is_cuda else flex_attention
        return attend(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)

    def carry(self, layer: int, run: Run, hidden_states: Tensor) -> Tensor:
        each = torch.arange(len(self.place_NT), device=hidden_states.device) // self.num_completions
        if self.prefill:
            return self._packed(run(self._completions(hidden_states), self.prefill.states[layer].of_rows(each)))
        state = State()
        prompt = run(hidden_states[:, : self.prompt_length], state, self.real_BP)
        completions = run(self._completions(hidden_states), state.of_rows(each))
        return torch.cat([prompt, self._packed(completions)], dim=1)


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
        self.queries = queries
        self.before, self.owner_B = before, owner_B
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.states: dict[int, State] = {}
        """Of the layers that carry one, after the prompts."""

    def mask(self, sees: Sees) -> Tensor | None:
        real_BP = self.attention_mask_BP.bool()
        columns = torch.arange(real_BP.shape[1], device=real_BP.device).expand(len(real_BP), -1)
        # Ends are known to the model without what stands before them, and so without its padding.
        places_BP = columns if self.before is None else places_in_row(real_BP)
        return prompt_mask(sees, real_BP, self.queries, places_BP)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self.before is not None:
            key = torch.cat([self.before.keys[layer][self.owner_B], key], dim=2)
            value = torch.cat([self.before.values[layer][self.owner_B], value], dim=2)
        self.keys[layer], self.values[layer] = key, value
        return _sdpa(module, _wide(query), _wide(key), _wide(value), mask, **kwargs).to(value.dtype)

    def carry(self, layer: int, run: Run, hidden_states: Tensor) -> Tensor:
        assert self.before is None, "a state does not skip the padding between a beginning and its end"
        state = self.states[layer] = State()
        return run(hidden_states, state, self.attention_mask_BP.bool())


@dataclass(frozen=True)
class DecodingMask:
    """What is added to the scores of one call of `Decoding`: 0, and -inf where a token does not see."""

    start: int
    """The first column that any token sees."""
    added: Tensor
    """(B, 1, C, end - start)."""


class Decoding:
    """New tokens for each of N rows, over one cache a prompt: its own tokens, then those of its G rows, place by place.

    Place t of row g is column P + t*G + g. A call holds M tokens, each a sequence of its own to the model: of each row
    the newest token, and after it tokens that it may go on with (`drafts`), as many as the caller likes; rows need not
    be equally long. Rows that have written the same so far are computed once, and each is given what was computed.
    Inside attention the tokens of a prompt's rows lie side by side in C places, as many as the prompt with the most has
    tokens, and are compared in one product with the prompt and with all that these rows have written, others' tokens
    masked. So a group reads its prompt's keys once instead of G times. A group of 16, 24, … rows is several of
    ROWS_TOGETHER here, each with a copy of the prompt.

    With `fixed` a call is laid out by tensors alone, prompts have one of few lengths, and as long as `advance` lays out
    the next call and `reached` stays, each does the same with the same memory (`held`).
    """

    def __init__(self, prefill: Prefill, num_completions: int, max_new_tokens: int, *, fixed: bool = False) -> None:
        each = torch.arange(len(prefill.attention_mask_BP), device=prefill.attention_mask_BP.device)
        self.states = {
            layer: state.detached().of_rows(each.repeat_interleave(num_completions))
            for layer, state in prefill.states.items()
        }
        self.fixed = fixed
        parts = 1 if num_completions % ROWS_TOGETHER else num_completions // ROWS_TOGETHER
        self.num_completions = num_completions // parts
        padding = -prefill.attention_mask_BP.shape[1] % (PROMPT_COLUMNS if fixed else 1)
        real_BP = nn.functional.pad(prefill.attention_mask_BP.bool(), (padding, 0))
        self.real_BP = real_BP.repeat_interleave(parts, dim=0)
        self.places_BP, self.device = places_in_row(self.real_BP), self.real_BP.device
        self.dtype = next(iter(prefill.keys.values())).dtype
        self.columns, self.reached = self.real_BP.shape[1] + self.num_completions * max_new_tokens, 0

        def cache(states: Tensor) -> Tensor:  # (B, K, P, D) -> (B, columns, K, D)
            states = states.detach().transpose(1, 2).repeat_interleave(parts, dim=0)
            # Zeros, since places that a row has not reached are masked, and masking does not undo a NaN.
            return nn.functional.pad(states, (0, 0, 0, 0, padding, self.columns - padding - states.shape[1]))

        self.keys = {layer: cache(key) for layer, key in prefill.keys.items()}
        self.values = {layer: cache(value) for layer, value in prefill.values.items()}

    def expect(self, counts: list[int], cached: list[int], leaders: list[int] | None = None) -> None:
        """Lay out the next call.

        Args:
            counts: tokens of each row in it; 0 for a row that has those of another, or none; of a prompt at least 1.
            cached: tokens of each row that its cache holds already.
            leaders: for each row the one of its prompt whose tokens it has; default: all have their own.
        """
        counts_N, cached_N = torch.tensor(counts), torch.tensor(cached)
        rows_N = torch.arange(len(counts))
        counts_B = counts_N.view(-1, self.num_completions).sum(1)
        first_N, first_B = counts_N.cumsum(0) - counts_N, counts_B.cumsum(0) - counts_B
        row_M, token_M = rows_N.repeat_interleave(counts_N), torch.arange(sum(counts))
        place_M = cached_N[row_M] + token_M - first_N[row_M]
        prompt_M, group_M = row_M // self.num_completions, row_M % self.num_completions
        self.width, self.reached = int(counts_B.max()), int(place_M.max()) + 1
        # An empty place repeats the prompt's last token, and nobody reads its output there.
        token_BC = first_B[:, None] + torch.arange(self.width).minimum(counts_B[:, None] - 1)
        slot_M = prompt_M * self.width + token_M - first_B[prompt_M]
        row_W, source_W = row_M, token_M  # what is written: each token, for each row that has it
        if leaders is not None:
            leader_N = torch.tensor(leaders)
            each_N = counts_N[leader_N]
            row_W = rows_N.repeat_interleave(each_N)
            source_W = first_N[leader_N[row_W]] + torch.arange(len(row_W)) - (each_N.cumsum(0) - each_N)[row_W]
        place_W, prompt_W = place_M[source_W], row_W // self.num_completions
        column_W = self.real_BP.shape[1] + place_W * self.num_completions + row_W % self.num_completions
        self.row_M, self.place_M, self.group_M = (each.to(self.device) for each in (row_M, place_M, group_M))
        self.token_BC, self.slot_M = token_BC.to(self.device), slot_M.to(self.device)
        self.cell_W = (prompt_W * self.columns + column_W).to(self.device)
        self.source_W = None if leaders is None else source_W.to(self.device)

    def advance(self) -> None:
        """Lay out the next call as the one before, every row one token further, in the same memory."""
        self.place_M.add_(1)
        self.cell_W.add_(self.num_completions)

    def mask(self, sees: Sees) -> Tensor:
        length_B1 = self.real_BP.sum(1, keepdim=True)
        query_BC, own_BT = (
            length_B1 + self.place_M[self.token_BC],
            length_B1 + torch.arange(self.reached, device=self.device),
        )
        prompt = dense(sees, query_BC, self.places_BP, self.real_BP)
        own = dense(sees, query_BC, own_BT, torch.ones_like(own_BT, dtype=torch.bool))
        of_row = self.group_M[self.token_BC][..., None] == torch.arange(self.num_completions, device=self.device)
        seen = torch.cat([prompt, (own[..., None] & of_row[:, :, None]).flatten(2)], dim=2)[:, None]
        whole = self.fixed or sees is causal_mask_function  # else the mask is looked at, which a GPU would wait for
        start = 0 if whole else int(seen.flatten(0, 2).any(0).to(torch.uint8).argmax())
        added = torch.zeros((), dtype=self.dtype, device=self.device).where(seen[..., start:], -torch.inf)
        return _passed_on(DecodingMask(start, added), self.device)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **kwargs: Any
    ) -> Tensor:
        """For query (M, H, 1, D) and key, value (M, K, 1, D) of the call that `expect` laid out."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        start, added = mask.parts.start, mask.parts.added
        prompts, _, width, length = added.shape
        kv_heads = key.shape[1]

        def written(cache: Tensor, states: Tensor) -> Tensor:  # (B, K, columns that are seen, D)
            states = states[:, :, 0] if self.source_W is None else states[:, :, 0].index_select(0, self.source_W)
            cache.flatten(0, 1).index_copy_(0, self.cell_W, states.to(cache.dtype))
            return cache[:prompts, start : start + length].transpose(1, 2)

        # (M, H, D) -> (B, K, R*C, D): query heads of one key-value head are further queries to it.
        query = query[:, :, 0].index_select(0, self.token_BC.flatten()).unflatten(0, (prompts, width))
        query = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        shared = query.shape[2]
        out = nn.functional.scaled_dot_product_attention(
            query.flatten(2, 3),
            written(self.keys[layer], key),
            written(self.values[layer], value),
            attn_mask=added[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3),
            scale=scaling,
        )
        out = out.unflatten(2, (shared, width)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
        return out.index_select(0, self.slot_M)[:, None]

    def carry(self, layer: int, run: Run, hidden_states: Tensor) -> Tensor:
        assert len(hidden_states) == len(self.real_BP) * self.num_completions, "a state holds no token that is a guess"
        return run(hidden_states, self.states[layer])

    def keep(self, prompts: Tensor, rows: Tensor, num_completions: int) -> None:
        """Keep only these prompts and rows, by their present indices; num_completions rows a prompt."""
        length, kept_BG = self.real_BP.shape[1], (rows % self.num_completions).view(-1, num_completions)
        places_T = torch.arange(self.reached, device=self.device) * self.num_completions
        own_BT = (length + places_T[:, None] + kept_BG[:, None]).flatten(1)
        columns_B = torch.cat([torch.arange(length, device=self.device).expand(len(own_BT), -1), own_BT], dim=1)
        for cache in (*self.keys.values(), *self.values.values()):
            cache[: len(prompts), : columns_B.shape[1]] = cache[prompts[:, None], columns_B]
        self.num_completions = num_completions
        self.real_BP, self.places_BP = self.real_BP[prompts], self.places_BP[prompts]
        self.states = {layer: state.of_rows(rows) for layer, state in self.states.items()}
