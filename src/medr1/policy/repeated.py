"""The plain way, for models whose completions cannot share their prompt: each is computed with its own.

The same calls as for all others (`rollouts.sample`, `shared_prefix.completion_logprobs`) come here by themselves. What
differs is time and memory: an image and a prompt are read once for each completion, not for each group. Rows are
computed a few at a time, in a backward pass again, so that memory is bounded by these few.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, T completion tokens, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, LogitsProcessor

from medr1.policy.encoding import PromptBatch
from medr1.policy.vlm import VLM, entropy_of, restrict

ROWS_AT_ONCE = 4
"""Completions of one prompt in a call of the model."""
Choose = Callable[[Tensor, list[int], list[list[int]]], tuple[Tensor, Tensor]]
"""Tokens and their log-probabilities (M, R), of logits (M, V), the tokens' places, and the R rows that draw there."""


def decode_repeated(
    vlm: VLM,
    prompts: PromptBatch,
    num_completions: int,
    max_new_tokens: int,
    choose: Choose,
    on_step: Callable[[Tensor], None] | None,
) -> tuple[list[list[int]], Tensor, int]:
    """Sample by transformers' own `generate`: token ids of each row, log-probabilities (N, T), calls of the model."""
    num_rows, device = len(prompts) * num_completions, prompts.input_ids_BP.device
    stops = set(vlm.stop_token_ids)
    written: list[list[int]] = [[] for _ in range(num_rows)]
    logp = torch.zeros(num_rows, max_new_tokens, device=device)
    num_calls = 0

    class Chosen(LogitsProcessor):
        """Leaves one token possible in each row: the one that is chosen for it."""

        def __init__(self, rows: list[int]) -> None:
            self.rows, self.place = rows, 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            nonlocal num_calls
            if self.place == max_new_tokens:  # BLIP counts one more
                return scores
            tokens_M1, logp_M1 = choose(scores, [self.place] * len(self.rows), [[row] for row in self.rows])
            for row, token, value in zip(self.rows, tokens_M1[:, 0].tolist(), logp_M1[:, 0], strict=True):
                if not stops & set(written[row][-1:]):
                    written[row].append(token)
                    logp[row, self.place] = value
            if on_step is not None:
                on_step(padded(written, vlm.pad_token_id, device))
            self.place, num_calls = self.place + 1, num_calls + 1
            return torch.full_like(scores, -torch.inf).scatter(1, tokens_M1, 0.0)

    with _plain_generation(vlm, max_new_tokens):
        for rows in _few_at_once(len(prompts), num_completions):
            prompt = prompts.select([rows[0] // num_completions] * len(rows))
            vlm.core.generate(
                input_ids=prompt.input_ids_BP,
                attention_mask=prompt.attention_mask_BP,
                logits_processor=[Chosen(rows)],
                **prompt.kinds,
                **prompt.vision,
            )
    return written, logp, num_calls


def repeated_logprobs(
    vlm: VLM,
    prompts: PromptBatch,
    completion_ids_NT: Tensor,
    mask_NT: Tensor,
    *,
    temperature: float,
    entropy: bool | Literal["gradient"],
    model: nn.Module | None,
) -> tuple[Tensor, Tensor | None]:
    """See `shared_prefix.completion_logprobs`."""
    num_completions = len(completion_ids_NT) // len(prompts)
    forward = vlm.core.forward
    groups = list(_few_at_once(len(prompts), num_completions))

    def score(rows: list[int]) -> Tensor:  # (2, rows, T): log-probabilities and entropies
        prompt = prompts.select([rows[0] // num_completions] * len(rows))
        ids, scored = completion_ids_NT[rows], mask_NT[rows].bool()
        logits = restrict(_logits(vlm, forward, prompt, ids, scored), temperature, vlm.banned_token_ids)
        logits = logits.log_softmax(-1)
        logp = logits.gather(-1, ids[..., None])[..., 0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
            spread = entropy_of(logits) if entropy else torch.zeros_like(logp)
        return torch.stack([logp, spread]).where(scored, 0.0)

    def score_all(*args: Any, **kwargs: Any) -> Tensor:
        if len(groups) == 1 or not torch.is_grad_enabled():
            return torch.cat([score(rows) for rows in groups], dim=1)
        return torch.cat([checkpoint(score, rows, use_reentrant=False) for rows in groups], dim=1)

    # In place of the model's own call, so that whatever wraps it sees one call.
    patched = vlm.core.__dict__.get("forward")
    vlm.core.forward = score_all
    try:
        scores = (model or vlm.model)(input_ids=prompts.input_ids_BP)
    finally:
        del vlm.core.forward
        if patched is not None:
            vlm.core.forward = patched
    return scores[0], None if not entropy else scores[1] if entropy == "gradient" else scores[1].detach()


def up_to_stop(tokens: list[int], stops: Set[int]) -> list[int]:
    """The tokens up to the first that stops, that included; all where none does."""
    return tokens[: next((place for place, token in enumerate(tokens, 1) if token in stops), None)]


def padded(
    sequences: Sequence[Sequence[float]], pad: float, device: torch.device, dtype: torch.dtype = torch.long
) -> Tensor:
    """Token ids, or a number of each, as one tensor, right-padded to the longest."""
    longest = max(map(len, sequences))
    rows = [[*values, *[pad] * (longest - len(values))] for values in sequences]
    return torch.tensor(rows, device=device, dtype=dtype)


def _few_at_once(num_prompts: int, num_completions: int) -> Iterator[list[int]]:
    for first in range(0, num_prompts * num_completions, num_completions):
        for start in range(first, first + num_completions, ROWS_AT_ONCE):
            yield list(range(start, min(start + ROWS_AT_ONCE, first + num_completions)))


def _logits(vlm: VLM, forward: Callable[..., Any], prompt: PromptBatch, ids_RT: Tensor, scored_RT: Tensor) -> Tensor:
    """Logits (rows, T, V) of each completion token, before it is known."""
    num_tokens = ids_RT.shape[1]
    mask = prompt.attention_mask_BP
    if vlm.core.config.is_encoder_decoder:
        start = vlm.core.generation_config.decoder_start_token_id
        before = torch.full_like(ids_RT[:, :1], vlm.core.config.decoder_start_token_id if start is None else start)
        return forward(
            input_ids=prompt.input_ids_BP,
            attention_mask=mask,
            decoder_input_ids=torch.cat([before, ids_RT[:, :-1]], dim=1),
            use_cache=False,
            **prompt.kinds,
            **prompt.vision,
        ).logits
    first = mask.shape[1] - 1
    kept = torch.arange(first, first + num_tokens, device=mask.device)  # not a number: Gemma 4 would cut its masks
    logits = forward(
        input_ids=torch.cat([prompt.input_ids_BP, ids_RT], dim=1),
        attention_mask=torch.cat([mask, scored_RT.to(mask.dtype)], dim=1),
        use_cache=False,
        **({"logits_to_keep": kept} if vlm.takes("logits_to_keep") else {}),
        **prompt.kinds_before(num_tokens),
        **prompt.vision,
    ).logits
    return logits if logits.shape[1] == num_tokens else logits[:, kept]


@contextlib.contextmanager
def _plain_generation(vlm: VLM, max_new_tokens: int) -> Iterator[None]:
    """Within this block `generate` takes the likeliest token, whatever a generation_config says; BLIP has a second."""
    able = [module for module in vlm.core.modules() if getattr(module, "generation_config", None) is not None]
    own = [module.generation_config for module in able]
    for module, configured in zip(able, own, strict=True):
        module.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=vlm.stop_token_ids,
            pad_token_id=vlm.pad_token_id,
            bos_token_id=configured.bos_token_id,
            decoder_start_token_id=configured.decoder_start_token_id,
        )
    try:
        yield
    finally:
        for module, configured in zip(able, own, strict=True):
            module.generation_config = configured
