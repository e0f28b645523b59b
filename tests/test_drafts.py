"""Drafts change how many calls decoding takes, never a token."""

import random

import pytest
import torch
from tiny_vlms import FAMILIES, ragged_prompts, tiny_vlm

from medr1.policy import drafts as module
from medr1.policy.drafts import CONTEXT, Counts, Drafts
from medr1.policy.rollouts import Rollout, sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM


def rows(rollout: Rollout) -> list[list[int]]:
    return [ids[keep].tolist() for ids, keep in zip(rollout.completion_ids_NT, rollout.mask_NT, strict=True)]


def sure(drafts: Drafts) -> Drafts:
    """The same, sure of every guess of the run's, so that all it can guess is guessed."""
    for length in range(1, CONTEXT + 1):
        for share in range(9):
            for seen in range(6):
                drafts.made[0, length, share, seen] = drafts.right[0, length, share, seen] = 10**9
    return drafts


@pytest.fixture(params=[0.0, 9.0], ids=["to the end", "stopping"])
def stop_bias(request: pytest.FixtureRequest) -> float:
    """With a bias completions stop at different lengths, and rows are dropped."""
    return float(request.param)


def biased(vlm: VLM, amount: float) -> VLM:
    stops = torch.tensor(vlm.stop_token_ids)

    def add(head: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., stops] += amount
        return logits

    if amount:
        vlm.core.get_output_embeddings().register_forward_hook(add)
    return vlm


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_plain_decoding(family: str, greedy: bool, stop_bias: float) -> None:
    """Ragged prompts in float64: drafts that are all right, all wrong, right for one row of two, and none."""
    vlm = biased(tiny_vlm(family, dtype=torch.float64), stop_bias)
    prompts = ragged_prompts(vlm)
    settings = {"num_completions": 3, "max_new_tokens": 14, "greedy": greedy, "seed": 5}
    plain = sample(vlm, prompts, **settings)
    written = rows(plain)
    drawn = random.Random(0)
    wrong = [[drawn.choice(written[0]) for _ in range(40)] for _ in range(8)]
    for learned in (written, wrong, written[::2], [row[:4] for row in written], []):
        drafts = Drafts()
        drafts.learn(learned)
        for _ in range(2):  # with what chances the drafts begin with, and sure of themselves
            drafted = sample(vlm, prompts, **settings, drafts=drafts)
            assert rows(drafted) == written
            torch.testing.assert_close(drafted.logp_NT, plain.logp_NT, atol=1e-10, rtol=0)
            assert torch.equal(drafted.finished_N, plain.finished_N) and drafted.texts == plain.texts
            sure(drafts)
        if learned is written:
            assert drafted.num_calls < plain.num_calls or plain.num_calls < 3
    if stop_bias:  # the policy pass takes the head apart
        return
    logp, _ = completion_logprobs(vlm, prompts, drafted.completion_ids_NT, drafted.mask_NT)
    torch.testing.assert_close(drafted.logp_NT, logp.detach(), atol=1e-7, rtol=0)  # rotary angles are float32


def test_known_completions_take_few_calls() -> None:
    """A completion of 40 tokens that was seen before: the first token by the prompt's call, then 9 a call."""
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    prompts = ragged_prompts(vlm).select([0])
    settings = {"num_completions": 1, "max_new_tokens": 40, "seed": 5}
    plain = sample(vlm, prompts, **settings)
    assert plain.num_calls == 39
    drafts = Drafts()
    drafts.learn(rows(plain))
    drafted = sample(vlm, prompts, **settings, drafts=sure(drafts))
    assert rows(drafted) == rows(plain)
    assert drafted.num_calls <= 6  # 39 tokens; a context of four that stood twice may cost one more


def test_a_part_of_the_batch_gets_the_tokens_of_the_whole() -> None:
    """Two processes with a half of the prompts each, their drafts their own."""
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    prompts = ragged_prompts(vlm)
    even = prompts.select([0, 1, 0, 1])
    settings = {"num_completions": 2, "max_new_tokens": 12, "seed": 3}
    whole = rows(sample(vlm, even, **settings))
    drafts = Drafts()
    drafts.learn(whole)
    for part in (0, 1):
        half = sample(vlm, even.select([0, 1]), **settings, part=(part, 2), drafts=sure(drafts))
        assert rows(half) == whole[4 * part : 4 * part + 4]


def test_counts_are_those_of_a_plain_count() -> None:
    """Against a count written down naively, after sequences were added in pieces and taken back."""
    drawn = random.Random(1)
    sequences = [[drawn.randrange(3) for _ in range(drawn.randrange(1, 12))] for _ in range(40)]
    counts = Counts()
    for sequence in sequences:
        cut = drawn.randrange(len(sequence) + 1)
        counts.add(sequence[:cut])
        counts.likeliest(tuple(sequence[:1]))  # what is remembered must be forgotten when counts change
        counts.add(sequence, start=cut)
    for sequence in sequences[:15]:
        counts.add(sequence, times=-1)
    follows: dict[tuple[int, ...], list[int]] = {}
    for sequence in sequences[15:]:
        padded = (-1, *sequence)
        for end in range(1, len(padded)):
            for length in range(1, min(CONTEXT, end) + 1):
                follows.setdefault(padded[end - length : end], []).append(padded[end])
    for context, tokens in follows.items():
        best = min(set(tokens), key=lambda token: (-tokens.count(token), token))
        assert counts.likeliest(context) == (best, tokens.count(best), len(tokens))
    assert counts.likeliest((7,)) is None and len(counts._after) == len(follows)


def test_a_loaded_state_guesses_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the oldest completions have left the window."""
    monkeypatch.setattr(module, "WINDOW", 60)
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    prompts = ragged_prompts(vlm)
    drafts, settings = Drafts(), {"num_completions": 2, "max_new_tokens": 12}
    for seed in range(3):
        rollout = sample(vlm, prompts, **settings, seed=seed, drafts=drafts)
        drafts.learn(rows(rollout), rollout.guesses)
    other = Drafts()
    other.load(drafts.state())
    assert other.state() == drafts.state() and other.counts._after == drafts.counts._after
    ours, theirs = (sample(vlm, prompts, **settings, seed=9, drafts=each) for each in (drafts, other))
    assert rows(ours) == rows(theirs) and ours.guesses == theirs.guesses and ours.num_calls == theirs.num_calls
