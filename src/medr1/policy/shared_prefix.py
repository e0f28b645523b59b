"""Log-probabilities of G completions that share one prompt, from one packed row a prompt.

A row is `[prompt | c1 | … | cG]`; positions of each completion start anew after the prompt's largest position, each
completion sees the prompt and itself (`attention.PackedGroups`), and the vocabulary projection runs only where a
completion token is predicted. Equal to scoring G repeated rows up to rounding, at the cost of one image and one
prompt. It is one ordinary call of the model, so PEFT, gradient checkpointing and DDP work as they do elsewhere.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, P prompt tokens, T completion tokens, V
vocabulary, M scored tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medr1.policy.attention import PackedGroups, Prefill, laid_out
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
    num_prompts, prompt_length = prompts.input_ids_BP.shape
    num_rows, length = completion_ids_NT.shape
    assert num_rows % num_prompts == 0, "the same number of completions for every prompt"
    num_completions = num_rows // num_prompts
    if length == 1:  # predicted by the prompt alone
        prefill = None

    ids = completion_ids_NT.reshape(num_prompts, -1)
    inputs: dict[str, Any] = {}
    steps = torch.arange(length, device=ids.device).repeat(num_completions)
    positions = (prompts.next_position_B[:, None] + steps).expand(len(prompts.position_ids_ABP), -1, -1)
    if prefill is None:
        ids = torch.cat([prompts.input_ids_BP, ids], dim=1)
        positions = torch.cat([prompts.position_ids_ABP, positions], dim=-1)
        num_tokens = num_completions * length
        mask = nn.functional.pad(prompts.attention_mask_BP, (0, num_tokens), value=1)
        inputs = {"real": mask, **prompts.kinds_before(num_tokens), **prompts.model_inputs()}

    # The last prompt token predicts each completion's first token, token t predicts token t + 1.
    before = 0 if prefill else prompt_length
    rest = before + torch.arange(num_completions * length, device=ids.device).view(num_completions, -1)[:, :-1]
    first = torch.full((num_completions, 1), prompt_length - 1, device=ids.device)
    predictors = (rest if prefill else torch.cat([first, rest], dim=1)).flatten()

    scored = mask_NT.bool()
    here = scored[:, 1:] if prefill else scored  # scored by this call
    targets_M = completion_ids_NT[:, -here.shape[1] :][here]
    text_config = vlm.core.config.get_text_config()
    chunk = max(1, MAX_LOGITS // text_config.vocab_size)
    cap = getattr(text_config, "final_logit_softcapping", None)

    def score_chunk(head: Callable[[Tensor], Tensor], hidden_M: Tensor, targets_M: Tensor) -> Tensor:
        logits = head(hidden_M)
        if cap is not None and head is not identity:
            logits = cap * torch.tanh(logits / cap)
        logits = restrict(logits, temperature, vlm.banned_token_ids)
        normaliser = logits.logsumexp(-1)
        logp = logits.gather(-1, targets_M[:, None])[:, 0] - normaliser
        if not entropy:
            return logp[None]
        with contextlib.nullcontext() if entropy == "gradient" else torch.no_grad():
            entropy_M = entropy_of(logits - normaliser[:, None])
        return torch.stack([logp, entropy_M])

    def score(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        hidden_M = hidden.reshape(*here.shape, -1)[here]
        if len(hidden_M) <= chunk:
            return score_chunk(head, hidden_M, targets_M)
        parts = zip(hidden_M.split(chunk), targets_M.split(chunk), strict=True)
        return torch.cat([checkpoint(score_chunk, head, *part, use_reentrant=False) for part in parts], dim=1)

    with _head_replaced(vlm.core.get_output_embeddings(), score), _uncapped(text_config):
        scores_M = laid_out(
            model or vlm.model,
            PackedGroups(prompts.attention_mask_BP, num_completions, length, prefill),
            input_ids=ids,
            position_ids_ABP=positions,
            logits_to_keep=predictors,
            **inputs,
        ).logits
    if prefill:
        assert prefill.logits_BV is not None
        logits_NV = prefill.logits_BV.repeat_interleave(num_completions, dim=0)
        first_M = score_chunk(identity, logits_NV[scored[:, 0]], completion_ids_NT[:, 0][scored[:, 0]])
        scores = scores_M.new_zeros(len(scores_M), num_rows, length)
        scores[:, :, 0] = scores[:, :, 0].masked_scatter(scored[:, 0], first_M)
        scores[:, :, 1:] = scores[:, :, 1:].masked_scatter(here, scores_M)
        return scores[0], None if not entropy else scores[1] if entropy == "gradient" else scores[1].detach()
    logp_NT = scores_M.new_zeros(num_rows, length).masked_scatter(scored, scores_M[0])
    if not entropy:
        return logp_NT, None
    entropy_NT = logp_NT.new_zeros(num_rows, length).masked_scatter(scored, scores_M[1])
    return logp_NT, entropy_NT if entropy == "gradient" else entropy_NT.detach()


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
