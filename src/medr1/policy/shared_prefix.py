"""Log-probabilities of G completions that share one prompt, from one packed row a prompt.

A row is `[prompt | c1 | … | cG]` without padding, and what several completions begin with stands in it once
(`attention.Tree`). Positions of each completion start anew after the prompt's largest position, each completion sees
the prompt and itself (`attention.PackedGroups`), and the vocabulary projection runs once for each token that predicts
one or several. Equal to scoring G repeated rows up to rounding, at the cost of one image and one prompt. It is one
ordinary call of the model, so PEFT, gradient checkpointing and DDP work as they do elsewhere.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, P prompt tokens, T completion tokens, V
vocabulary, M scored tokens, C tokens that predict them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medr1.policy.attention import PackedGroups, Prefill, Tree, laid_out
from medr1.policy.encoding import PromptBatch
from medr1.policy.repeated import repeated_logprobs
from medr1.policy.vlm import VLM, entropy_of, restrict

MAX_LOGITS = 2**25
"""Largest number of logits alive at once (128 MiB in float32); more are computed in chunks, again in backward."""


def completion_logprobs(
    vlm: VLM,
    prompts: PromptBatch,
    completion_ids_NT: Tensor,
    mask_NT: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool | Literal["gradient"] = False,
    model: nn.Module | None = None,
    prefill: Prefill | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each completion token under the policy that `rollouts.sample` samples from.

    That policy is softmax(logits / temperature) over the vocabulary without image, video and vision-boundary tokens.

    Args:
        completion_ids_NT: right-padded completions, the G of the first prompt first.
        mask_NT: 1 at tokens to score, 0 at padding.
        entropy: also return the policy's entropy before each token, in nats; without gradient unless it is "gradient".
        model: the same model as a trainer wrapped it (DDP); default `vlm.model`.
        prefill: what `rollouts.sample` kept of these prompts: then only the completions are computed here, and the
            gradient flows through the call that sampling has made.

    Returns:
        Log-probabilities (N, T) in float32 (float64 for a float64 model), 0 where the mask is 0, with gradient; and
        entropies (N, T) or None.
    """
    if vlm.not_shared:
        settings: dict[str, Any] = {"temperature": temperature, "entropy": entropy, "model": model}
        return repeated_logprobs(vlm, prompts, completion_ids_NT, mask_NT, **settings)
    num_prompts, (num_rows, length) = len(prompts), completion_ids_NT.shape
    assert num_rows % num_prompts == 0, "the same number of completions for every prompt"
    num_completions = num_rows // num_prompts

    # A token is computed for what it predicts: the last that is scored, and what stands after it, is not.
    scored_NT, steps_T = mask_NT.bool(), torch.arange(length, device=mask_NT.device)
    lengths_N = (scored_NT * steps_T).amax(1)
    if not lengths_N.any():  # all are predicted by the prompts alone
        lengths_N[0] = 1
    tree = Tree(completion_ids_NT, lengths_N, num_prompts)
    ids, inputs = tree.ids_BL, dict[str, Any]()
    positions = (prompts.next_position_B[:, None] + tree.step_BL).expand(len(prompts.position_ids_ABP), -1, -1)
    if prefill is None:
        ids = torch.cat([prompts.input_ids_BP, ids], dim=1)
        positions = torch.cat([prompts.position_ids_ABP, positions], dim=-1)
        mask = nn.functional.pad(prompts.attention_mask_BP, (0, tree.length), value=1)
        inputs = {"real": mask, **prompts.kinds_before(tree.length), **prompts.model_inputs()}

    # The last prompt token predicts each completion's first token, token t predicts token t + 1.
    kept = tree.length if prefill else 1 + tree.length
    predictors = torch.arange(ids.shape[1] - kept, ids.shape[1], device=ids.device)
    row_N = torch.arange(num_rows, device=ids.device) // num_completions
    place_NT = row_N[:, None] * kept + nn.functional.pad(kept - tree.length + tree.column_NT, (1, 0))
    later_NT = scored_NT.clone()  # scored by this call
    later_NT[:, 0] &= prefill is None
    place_C, owner_M, count_C = place_NT[:, :length][later_NT[:, : place_NT.shape[1]]].unique(
        return_inverse=True, return_counts=True
    )
    order_M = owner_M.argsort(stable=True)
    text_config = vlm.core.config.get_text_config()
    chunk = max(1, MAX_LOGITS // text_config.vocab_size)
    cap = getattr(text_config, "final_logit_softcapping", None)

    def score_chunk(head: Callable[[Tensor], Tensor], hidden_C: Tensor, owner_M: Tensor, targets_M: Tensor) -> Tensor:
        logits = head(hidden_C)
        if cap is not None and head is not identity:
            logits = cap * torch.tanh(logits / cap)
        logits = restrict(logits, temperature, vlm.banned_token_ids)
        normaliser_C = logits.logsumexp(-1)
        logp_M = logits[owner_M, targets_M] - normaliser_C[owner_M]
        if not entropy:
            return logp_M[None]
        with contextlib.nullcontext() if entropy == "gradient" else torch.no_grad():
            entropy_C = entropy_of(logits - normaliser_C[:, None])
        return torch.stack([logp_M, entropy_C[owner_M]])

    def score(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        hidden_C, targets_M = hidden.flatten(0, 1)[place_C], completion_ids_NT[later_NT][order_M]
        sizes = [int(count.sum()) for count in count_C.split(chunk)]
        parts = [
            (hidden_c, owner_m - number * chunk, targets_m)
            for number, (hidden_c, owner_m, targets_m) in enumerate(
                zip(hidden_C.split(chunk), owner_M[order_M].split(sizes), targets_M.split(sizes), strict=True)
            )
        ]
        if len(parts) == 1:
            return score_chunk(head, *parts[0])
        return torch.cat([checkpoint(score_chunk, head, *part, use_reentrant=False) for part in parts], dim=1)

    with _head_replaced(vlm.core.get_output_embeddings(), score), _uncapped(text_config):
        scores_M = laid_out(
            model or vlm.model,
            PackedGroups(prompts.attention_mask_BP, tree, prefill),
            input_ids=ids,
            position_ids_ABP=positions,
            logits_to_keep=predictors,
            **inputs,
        ).logits
    scores_M = scores_M[:, order_M.argsort()]
    scores = scores_M.new_zeros(len(scores_M), num_rows, length).masked_scatter(later_NT, scores_M)
    if prefill:
        assert prefill.logits_BV is not None
        first_NT = scored_NT & ~later_NT
        first_M = score_chunk(identity, prefill.logits_BV, row_N[first_NT[:, 0]], completion_ids_NT[first_NT])
        scores = scores.masked_scatter(first_NT, first_M)
    if not entropy:
        return scores[0], None
    return scores[0], scores[1] if entropy == "gradient" else scores[1].detach()


def identity(logits: Tensor) -> Tensor:
    """The head of what are logits already."""
    return logits


@contextlib.contextmanager
def _uncapped(text_config: Any) -> Iterator[None]:
    """Within this block a model that caps its logits (Gemma 4) leaves what its head returns as it is."""
    cap = getattr(text_config, "final_logit_softcapping", None)
    if cap is not None:
        text_config.final_logit_softcapping = None
    try:
        yield
    finally:
        if cap is not None:
            text_config.final_logit_softcapping = cap


@contextlib.contextmanager
def _head_replaced(head: nn.Module, score: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """Within this block the model's vocabulary projection returns `score(hidden, projection)`.

    So that a call of the whole model, through whatever wraps it, never makes logits of all its tokens at once.
    """
    projection, patched = head.forward, head.__dict__.get("forward")
    head.forward = lambda hidden: score(hidden, projection)
    try:
        yield
    finally:
        del head.forward
        if patched is not None:  # others (accelerate's hooks) put their own forward on the instance too
            head.forward = patched
