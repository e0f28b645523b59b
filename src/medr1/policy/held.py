"""Decoding of fixed shape: each step is the same kernels over the same memory, so that a CUDA graph holds it.

Decoding token by token a GPU waits for Python to launch each kernel. A graph is launched at once. For that a step may
depend on what was drawn by tensors alone: rows that have ended go along until all have, every row's next token stands
one place further, no number comes back to Python but every LOOK tokens, and a step compares with the columns of SPAN
places at a time, reached or not. On a GPU `rollouts.sample` comes here by itself.

A graph lives within one call of `sample`: capturing it should take about as long as a few tokens without it, and
nothing that it reads can move meanwhile (gathered weights, adapters, autocast's copies of weights). Compiled layers are
part of it. Drafts are not: what to guess is looked up by Python after every call, for which the GPU would wait again.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, T completion tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from medr1.policy.attention import Decoding, Prefill, arranged_by, laid_out
from medr1.policy.encoding import PromptBatch
from medr1.policy.repeated import padded, up_to_stop
from medr1.policy.vlm import VLM
from medr1.processes import tell

LEAST = 16
"""With fewer new tokens a step is not worth holding."""
LOOK = 16
"""Tokens after which it is looked whether all rows have ended."""
SPAN = 256
"""Places that a step compares with beyond those that are reached, at most; then a longer one is held."""
Step = Callable[[], None]
"""Decodes one more token of every row."""


def holds(vlm: VLM, max_new_tokens: int) -> bool:
    """Whether decoding is of fixed shape: on a GPU, unless something is known to keep it from that."""
    if vlm.device.type != "cuda" or max_new_tokens < LEAST:
        return False
    if vlm.device.index != torch.cuda.current_device():  # a graph would not see its kernels
        return False
    if vlm.carries_state and not vlm.not_held:
        _give_up(vlm, "layers that carry a state")
    return vlm.not_held is None


def capture(step: Step) -> Step:
    """The step as one CUDA graph. It must have run before, so that kernels are chosen and compiled."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (data workers) may go on. The outer context comes back to this stream from a capture that failed.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def decode_held(
    vlm: VLM,
    prompts: PromptBatch,
    prefill: Prefill,
    num_completions: int,
    max_new_tokens: int,
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    on_step: Callable[[Tensor], None] | None,
) -> tuple[list[list[int]], Tensor, int]:
    """Token ids of each row, log-probabilities (N, T), 0 after a row's end, and calls of the model.

    Args:
        choose: tokens (N) and their log-probabilities, of logits (N, V) and the tokens' place (1), without looking at
            a number.
        on_step: see `rollouts.sample`; it looks after every token.
    """
    assert prefill.logits_BV is not None
    logits_NV = prefill.logits_BV.repeat_interleave(num_completions, dim=0)
    num_rows, device = len(logits_NV), logits_NV.device
    decoding = Decoding(prefill, num_completions, max_new_tokens, fixed=True)
    decoding.expect([1] * num_rows, [0] * num_rows)
    place_1 = decoding.place_M[:1]  # of all rows' newest tokens
    next_position_N = prompts.next_position_B.repeat_interleave(num_completions)
    axes = len(prompts.position_ids_ABP)
    tokens_N, logp_N = choose(logits_NV, place_1)
    ids_NT = torch.zeros(num_rows, max_new_tokens, dtype=torch.long, device=device).index_copy(
        1, place_1, tokens_N[:, None]
    )
    logp_NT = logp_N.new_zeros(num_rows, max_new_tokens).index_copy(1, place_1, logp_N[:, None])

    def step() -> None:
        logits_NV = laid_out(
            vlm.model,
            decoding,
            input_ids=ids_NT.index_select(1, place_1),
            position_ids_ABP=(next_position_N + place_1).expand(axes, -1)[:, :, None],
        ).logits[:, -1]
        decoding.advance()
        tokens_N, logp_N = choose(logits_NV, place_1)
        ids_NT.index_copy_(1, place_1, tokens_N[:, None])
        logp_NT.index_copy_(1, place_1, logp_N[:, None])

    stops = set(vlm.stop_token_ids)
    run = step
    with arranged_by(decoding):
        for done in range(1, max_new_tokens + 1):
            if on_step is not None or done % LOOK == 0 or done == max_new_tokens:
                written = [up_to_stop(row, stops) for row in ids_NT[:, :done].tolist()]
                if on_step is not None:
                    on_step(padded(written, vlm.pad_token_id, device))
                if done == max_new_tokens or all(row[-1] in stops for row in written):
                    break
            if done % SPAN == 1:
                decoding.reached, run = min(done - 1 + SPAN, max_new_tokens), step
            elif done % SPAN == 2:
                run = _held(vlm, step)
            run()
    lengths_N1 = torch.tensor([[len(row)] for row in written], device=device)
    return written, logp_NT.where(torch.arange(max_new_tokens, device=device) < lengths_N1, 0.0), done - 1


def _held(vlm: VLM, step: Step) -> Step:
    if vlm.not_held is None:
        try:
            return capture(step)
        except RuntimeError as error:  # whatever a model does that a graph cannot hold
            _give_up(vlm, str(error).split("\n")[0])
    return step


def _give_up(vlm: VLM, reason: str) -> None:
    """Say it once: this model is decoded the plain way from now on."""
    vlm.not_held = reason
    tell(
        f"{vlm.name}: decoding is not held in a CUDA graph ({reason}); each kernel is launched by itself, exact but"
        " slower"
    )
