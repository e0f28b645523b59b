"""Sampling G completions a prompt: the prompt is read once, then each call decodes a token of every row, or several.

Sampling is from softmax(logits / temperature) itself: no top-k, no top-p, no repetition penalty, whatever the model's
generation_config says (Qwen2-VL's top_k = 1 would make all completions of a group equal), and never an image, video
or vision-boundary token. So the log-probabilities kept here are those of `shared_prefix.completion_logprobs`.

Draws are fixed beforehand by row and place. Tokens that a row is likely to go on with (`drafts`) are decoded in the
same call as its newest one, and stay as long as each is the token that the draw takes: the completions are those of
decoding token by token, up to rounding, in fewer calls.

Shapes: B prompts, G completions each, N = B*G rows in prompt-major order, T completion tokens, V vocabulary, M tokens
of one call.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from medr1.errors import NotFiniteError
from medr1.policy.attention import Decoding, Prefill, laid_out
from medr1.policy.drafts import Drafts, GroupDrafts, Guess, Kind
from medr1.policy.encoding import PromptBatch
from medr1.policy.held import decode_held, holds
from medr1.policy.repeated import decode_repeated, padded
from medr1.policy.vlm import VLM, evaluating, restrict

COMPACT_BELOW = 0.75
"""Finished rows are dropped when this share of the rows, or less, would remain."""


Completion = tuple[list[int], list[float], bool]
"""Token ids, log-probs and whether it ended by itself, as vLLM gives them."""


@dataclass(frozen=True)
class Rollout:
    """N sampled completions; row b*G + g is completion g of prompt b."""

    completion_ids_NT: Tensor
    """Right-padded to the longest."""
    mask_NT: Tensor
    """1 at sampled tokens, the stop token included; 0 at padding. Boolean."""
    logp_NT: Tensor
    """Log-probability of each token when it was sampled, 0 at padding."""
    finished_N: Tensor
    """Whether the completion ended with a stop token; False means it ran into max_new_tokens."""
    texts: list[str]
    """Without special tokens; tags such as <think> are text and stay, also one that the template has opened."""
    num_calls: int = 0
    """Calls of the model that decoded them, the prompts' own not counted."""
    guesses: Mapping[tuple[Kind, bool], int] = field(default_factory=dict)
    """How many guesses of each kind were checked, right and wrong; for `Drafts.learn`."""
    samplers: list[str] = field(default_factory=list)
    """Who drew each completion, where it was not this process's own model."""
    prefill: Prefill | None = None
    """The prompts' keys, values and first logits with gradient, where `sample` was asked to keep them."""

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each completion."""
        return [ids[kept].tolist() for ids, kept in zip(self.completion_ids_NT, self.mask_NT, strict=True)]

    def select(self, rows: slice) -> "Rollout":
        """The completions of these rows, without what tells how they were decoded."""
        return Rollout(
            self.completion_ids_NT[rows],
            self.mask_NT[rows],
            self.logp_NT[rows],
            self.finished_N[rows],
            self.texts[rows],
            samplers=self.samplers[rows],
        )

    @classmethod
    def joined(cls, parts: "Sequence[Rollout]", pad: int) -> "Rollout":
        """The completions of several calls as one batch, right-padded to the longest."""
        longest = max(part.mask_NT.shape[1] for part in parts)

        def stacked(tensors: Iterable[Tensor], value: float = 0) -> Tensor:
            return torch.cat([nn.functional.pad(rows, (0, longest - rows.shape[1]), value=value) for rows in tensors])

        return cls(
            stacked((part.completion_ids_NT for part in parts), pad),
            stacked(part.mask_NT for part in parts),
            stacked(part.logp_NT for part in parts),
            torch.cat([part.finished_N for part in parts]),
            [text for part in parts for text in part.texts],
            samplers=[name for part in parts for name in part.samplers],
        )


def sample(
    vlm: VLM,
    prompts: PromptBatch,
    *,
    num_completions: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int | Sequence[int],
    part: tuple[int, int] = (0, 1),
    keep_prefill: bool = False,
    drafts: Drafts | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Rollout:
    """Sample completions from the policy, or take its most likely token at each step (greedy).

    Args:
        num_completions: G, completions a prompt.
        max_new_tokens: a completion without a stop token ends here.
        seed: of a generator that this call owns, so that the same call gives the same completions; several are one a
            prompt, whose completions then do not depend on the prompts beside it, but for the rounding of logits, which
            a batch may change in the last digits.
        part: (i, n): these prompts are the i-th of n equal parts of a batch that n processes share, and get the draws
            that they would get in a call with the whole batch.
        keep_prefill: read the prompts with gradient, so that `completion_logprobs` need not read them again. One
            backward pass only, before the weights change, and it goes through all of them: where some are left out of
            what is learned from, it is quicker to read the others again.
        drafts: what to guess the next tokens from; it is read, and learns only by `Drafts.learn`. None guesses none;
            nor are there guesses where a GPU holds the step (`held`).
        on_step: called after each call of the model with all ids so far (N, T), padding after a row's newest token;
            what it raises ends the call.

    Raises:
        NotFiniteError: the policy gives NaN for a token.
    """
    num_rows = len(prompts) * num_completions
    device = prompts.input_ids_BP.device
    # All draws at once on the CPU: a row's draws depend neither on the device nor on which rows have finished.
    if isinstance(seed, int):
        index, parts = part
        uniform = _uniform(seed, max_new_tokens, parts * num_rows)[:, index * num_rows :][:, :num_rows].to(device)
    else:
        uniform = torch.cat([_uniform(of_prompt, max_new_tokens, num_completions) for of_prompt in seed], 1).to(device)
    stops = set(vlm.stop_token_ids)
    if vlm.carries_state:  # which holds no token that a row may not go on with
        drafts = None

    def take(logits_MV: Tensor, uniform_MR: Tensor) -> tuple[Tensor, Tensor]:
        return _greedy(logits_MV, uniform_MR.shape[1]) if greedy else _draw(logits_MV, uniform_MR)

    def choose(logits_MV: Tensor, place_M: list[int], rows_MR: list[list[int]]) -> tuple[Tensor, Tensor]:
        uniform_MR = uniform[torch.tensor(place_M)[:, None], torch.tensor(rows_MR)]
        return take(restrict(logits_MV, temperature, vlm.banned_token_ids), uniform_MR)

    if vlm.not_shared:
        with evaluating(vlm.model):
            written, logp, num_calls = decode_repeated(vlm, prompts, num_completions, max_new_tokens, choose, on_step)
        return _rollout(vlm, prompts, written, logp, num_calls=num_calls)
    group = None if drafts is None else GroupDrafts(drafts, len(prompts))
    num_calls = 0

    with evaluating(vlm.model):
        with torch.set_grad_enabled(keep_prefill):
            prefill = read_shared(vlm, prompts) or _call(vlm, prompts, Prefill(prompts.attention_mask_BP))
        assert prefill.logits_BV is not None
        if holds(vlm, max_new_tokens):
            barred_V = restrict(torch.zeros_like(prefill.logits_BV[0]), 1.0, vlm.banned_token_ids)  # 0, and -inf

            def choose_at(logits_NV: Tensor, place_1: Tensor) -> tuple[Tensor, Tensor]:
                uniform_N1 = uniform.index_select(0, place_1)[0, :, None]
                tokens_N1, logp_N1 = take(restrict(logits_NV, temperature, []) + barred_V, uniform_N1)
                return tokens_N1[:, 0], logp_N1[:, 0]

            written, logp, num_calls = decode_held(
                vlm, prompts, prefill, num_completions, max_new_tokens, choose_at, on_step
            )
            return _rollout(vlm, prompts, written, logp, num_calls=num_calls, prefill=prefill if keep_prefill else None)
        decoding = Decoding(prefill, num_completions, max_new_tokens)
        next_position_N = prompts.next_position_B.repeat_interleave(num_completions)
        axes = len(prompts.position_ids_ABP)
        rows = list(range(num_rows))  # of the completions still in the decoder
        together = _together(vlm, decoding)
        asked = [
            _Branch(start // num_completions, rows[start : start + together]) for start in range(0, num_rows, together)
        ]
        logits_MV = prefill.logits_BV.repeat_interleave(num_completions // together, dim=0)
        branch_of = [branch for branch in asked for _ in branch.rows]
        while True:
            most = max(len(branch.rows) for branch in asked)
            place_M: list[int] = []
            rows_MR: list[list[int]] = []
            for branch in asked:
                for further in range(1 + len(branch.guessed)):
                    # The last of these may be past the end; what is drawn there is not used.
                    place_M.append(min(len(branch.ids) + further, max_new_tokens - 1))
                    rows_MR.append(branch.rows + branch.rows[:1] * (most - len(branch.rows)))
            tokens_MR, logp_MR = choose(logits_MV, place_M, rows_MR)
            drawn = zip(tokens_MR.tolist(), logp_MR.tolist(), strict=True)
            live: list[_Branch] = []
            for branch in asked:
                of_branch = list(itertools.islice(drawn, 1 + len(branch.guessed)))
                if branch.ended:
                    continue
                for grown in branch.grown(of_branch, stops):
                    if group is not None:
                        group.add(grown.prompt, grown.ids, len(branch.ids), branch.guessed, times=len(grown.rows))
                    grown.ended = grown.ids[-1] in stops or len(grown.ids) == max_new_tokens
                    if not grown.ended:
                        live.append(grown)
                    for row in grown.rows:
                        branch_of[row] = grown
            if on_step is not None:
                on_step(padded([branch.ids for branch in branch_of], vlm.pad_token_id, device))
            if not live:
                break
            kept = _compact(decoding, [branch_of[row].ended for row in rows])
            rows = rows if kept is None else [rows[place] for place in kept]
            if group is not None:
                for branch in live:
                    limit = max_new_tokens - len(branch.ids) - 1
                    branch.guessed = group.guess(branch.prompt, branch.ids, len(live), limit)
            asked = _expect(decoding, [branch_of[row] for row in rows], alone=together == 1)
            inputs = [
                token for branch in asked for token in (branch.ids[-1], *(guess.token for guess in branch.guessed))
            ]
            positions_M = next_position_N[torch.tensor(rows, device=device)][decoding.row_M] + decoding.place_M
            logits_MV = laid_out(
                vlm.model,
                decoding,
                input_ids=torch.tensor(inputs, device=device)[:, None],
                position_ids_ABP=positions_M.expand(axes, -1)[:, :, None],
            ).logits[:, -1]
            num_calls += 1

    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    return _rollout(
        vlm,
        prompts,
        [branch.ids for branch in branch_of],
        padded([branch.logp for branch in branch_of], 0.0, device, wide),
        num_calls=num_calls,
        guesses={} if group is None else group.outcomes,
        prefill=prefill if keep_prefill else None,
    )


@dataclass
class _Branch:
    """Completions of one prompt that have written the same so far: what is computed for one is for all."""

    prompt: int
    rows: list[int]
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    guessed: list[Guess] = field(default_factory=list)
    """What was asked about after the newest token."""
    ended: bool = False

    def grown(self, drawn: list[tuple[list[int], list[float]]], stops: Set[int]) -> "list[_Branch]":
        """What it parts into. Drawn are after its newest token and after each guess a token and its log-prob a row;
        those after a wrong guess or a stop are nobody's."""
        parts: dict[tuple[int, ...], list[int]] = {}
        for rank in range(len(self.rows)):
            new: list[int] = []
            for place, (tokens, _) in enumerate(drawn):
                token = tokens[rank]
                new.append(token)
                if token in stops or (place < len(self.guessed) and self.guessed[place].token != token):
                    break
            parts.setdefault(tuple(new), []).append(rank)
        return [
            _Branch(
                self.prompt,
                [self.rows[rank] for rank in ranks],
                [*self.ids, *new],
                [*self.logp, *(logp[ranks[0]] for _, logp in drawn[: len(new)])],
            )
            for new, ranks in parts.items()
        ]


def _rollout(vlm: VLM, prompts: PromptBatch, written: list[list[int]], logp_NT: Tensor, **more: Any) -> Rollout:
    if not bool(logp_NT.isfinite().all()):
        raise NotFiniteError(f"{vlm.name}: the probabilities of its next token are not finite numbers")
    device, stops = logp_NT.device, set(vlm.stop_token_ids)
    lengths = torch.tensor([len(row) for row in written], device=device)
    ids = padded(written, vlm.pad_token_id, device)
    return Rollout(
        completion_ids_NT=ids,
        mask_NT=torch.arange(ids.shape[1], device=device) < lengths[:, None],
        logp_NT=logp_NT[:, : ids.shape[1]],
        finished_N=torch.tensor([row[-1] in stops for row in written], device=device),
        texts=reply_texts(vlm, prompts, written),
        **more,
    )


def rollout_of(vlm: VLM, prompts: PromptBatch, completions: Sequence[Completion], samplers: list[str]) -> Rollout:
    """Completions in prompt-major order as a rollout; `samplers` names who drew each."""
    device = prompts.input_ids_BP.device
    rows = [torch.tensor(ids) for ids, _, _ in completions]
    ids_NT = pad_sequence(rows, batch_first=True, padding_value=vlm.pad_token_id)
    logp_NT = pad_sequence([torch.tensor(logp) for _, logp, _ in completions], batch_first=True)
    mask_NT = torch.arange(ids_NT.shape[1]) < torch.tensor([[len(row)] for row in rows])
    finished_N: Tensor = torch.tensor([finished for _, _, finished in completions])
    texts = reply_texts(vlm, prompts, [ids for ids, _, _ in completions])
    return Rollout(
        ids_NT.to(device), mask_NT.to(device), logp_NT.to(device), finished_N.to(device), texts, samplers=samplers
    )


def seeds_of(seed: int | Sequence[int], count: int, part: tuple[int, int]) -> Sequence[int]:
    """A seed for each of `count` prompts, where they are not given: drawn for all parts, and those of this one."""
    if not isinstance(seed, int):
        return seed
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(2**31, (part[1], count), generator=generator)[part[0]].tolist()
    return drawn


def reply_texts(vlm: VLM, prompts: PromptBatch, written: list[list[int]]) -> list[str]:
    """The replies as text, with what their prompts' template has begun them with."""
    texts = vlm.tokenizer.batch_decode(written, skip_special_tokens=True)
    num_completions = len(texts) // len(prompts)
    return [prompts.opened[row // num_completions] + text for row, text in enumerate(texts)]


def _uniform(seed: int, num_steps: int, num_rows: int) -> Tensor:
    return torch.rand(num_steps, num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def read_shared(vlm: VLM, prompts: PromptBatch) -> Prefill | None:
    """Prompts as `sample` keeps them for `completion_logprobs`, where several ask about the same images: these, and the
    text before them, are read only once. None where no two do.
    """
    shared = _beginnings(vlm, prompts)
    if shared is None:
        return None
    beginnings, ends, owners = shared
    before = _call(vlm, beginnings, Prefill(beginnings.attention_mask_BP))
    owner_B = torch.tensor(owners, device=prompts.input_ids_BP.device)
    return _call(vlm, ends, Prefill(ends.attention_mask_BP, before, owner_B))


def _beginnings(vlm: VLM, prompts: PromptBatch) -> tuple[PromptBatch, PromptBatch, list[int]] | None:
    """`split_after_images`; not where a beginning sees its end, or a state would not skip the padding between them."""
    if vlm.prompt_sees_itself or vlm.carries_state:
        return None
    return prompts.split_after_images(vlm.core.config)


def _call(vlm: VLM, prompts: PromptBatch, prefill: Prefill) -> Prefill:
    prefill.logits_BV = laid_out(
        vlm.model,
        prefill,
        input_ids=prompts.input_ids_BP,
        real=prompts.attention_mask_BP if prefill.before is None else None,
        position_ids_ABP=prompts.position_ids_ABP,
        logits_to_keep=torch.tensor([prompts.input_ids_BP.shape[1] - 1], device=prompts.input_ids_BP.device),
        **prompts.kinds,
        **prompts.model_inputs(),
    ).logits[:, -1]
    return prefill


def _together(vlm: VLM, decoding: Decoding) -> int:
    """Rows that are computed as one as long as they have written the same; where each carries a state, it needs all."""
    return 1 if vlm.carries_state else decoding.num_completions


def _expect(decoding: Decoding, branches: list[_Branch], *, alone: bool) -> list[_Branch]:
    """Lay out the next call, given the branch of each row, and say which branches are computed in it, in order.

    An ended one is where it is all that is left of a prompt, which needs a token in each call; alone all are.
    """
    reached = max(len(branch.ids) for branch in branches) - 1
    first: dict[int, int] = {}  # of each branch that goes on, by its first row
    counts, cached, leaders = [0] * len(branches), [], []
    for place, branch in enumerate(branches):
        cached.append(reached if branch.ended else len(branch.ids) - 1)
        leaders.append(place if branch.ended else first.setdefault(branch.rows[0], place))
        if alone or (leaders[-1] == place and not branch.ended):
            counts[place] = 1 + len(branch.guessed)
    for start in range(0, len(branches), decoding.num_completions):
        if not any(counts[start : start + decoding.num_completions]):
            counts[start] = 1
    decoding.expect(counts, cached, leaders)
    return [branch for branch, count in zip(branches, counts, strict=True) if count]


def _greedy(logits_MV: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The most likely token of each row and its log-probability, (M, draws) each."""
    best_M1, tokens_M1 = logits_MV.max(-1, keepdim=True)
    return tokens_M1.expand(-1, draws), (best_M1 - logits_MV.logsumexp(-1, keepdim=True)).expand(-1, draws)


def _draw(logits_MV: Tensor, uniform_MR: Tensor) -> tuple[Tensor, Tensor]:
    """R tokens of each row by inversion of the cumulative distribution, and their log-probabilities, (M, R) each.

    A token of probability 0 is never drawn: its cumulative value equals that of the token before it. Of a distribution
    that is NaN, any token with log-probability NaN.
    """
    shifted = logits_MV - logits_MV.amax(-1, keepdim=True)
    cumulative = shifted.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    tokens_MR = torch.searchsorted(cumulative, uniform_MR * total, right=True).clamp(max=logits_MV.shape[-1] - 1)
    return tokens_MR, (shifted.gather(-1, tokens_MR) - total.log()).to(logits_MV.dtype)


def _compact(decoding: Decoding, ended: list[bool]) -> list[int] | None:
    """Drop ended rows from the decoder when enough have ended; the indices of the rows that stay, or None.

    The decoder needs the same number of rows a prompt, so the slowest group decides, and shorter groups keep some
    ended rows as filler. Prompts without other rows go entirely.
    """
    grouped = torch.tensor(ended).view(-1, decoding.num_completions)
    going_on = (~grouped).sum(1)
    prompts = going_on.nonzero()[:, 0]
    num_completions = int(going_on.max())
    if len(prompts) * num_completions > COMPACT_BELOW * grouped.numel():
        return None
    order = grouped[prompts].to(torch.uint8).argsort(dim=1, stable=True)[:, :num_completions]
    rows = (prompts[:, None] * decoding.num_completions + order).flatten()
    decoding.keep(prompts.to(decoding.device), rows.to(decoding.device), num_completions)
    return rows.tolist()
