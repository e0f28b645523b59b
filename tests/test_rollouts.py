"""Sampling: the policy's own distribution, the same tokens as `generate` when greedy, and honest log-probs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tiny_vlms import FAMILIES, conversation, picture, ragged_prompts, tiny_vlm, token_kinds
from torch import Tensor

from medr1.policy import rollouts
from medr1.policy.adapters import add_lora
from medr1.policy.drafts import Drafts, GroupDrafts, Guess
from medr1.policy.encoding import PromptBatch, encode_prompts
from medr1.policy.rollouts import Rollout, read_shared, sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM


@contextmanager
def bias(vlm: VLM, tokens: list[int], amount: float) -> Iterator[None]:
    """Within this block the model likes these tokens more."""
    liked = torch.tensor(tokens)

    def add(module: torch.nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        logits[..., liked] += amount
        return logits

    hook = vlm.core.get_output_embeddings().register_forward_hook(add)
    yield
    hook.remove()


def rows(rollout: Rollout) -> list[list[int]]:
    return [ids[keep].tolist() for ids, keep in zip(rollout.completion_ids_NT, rollout.mask_NT, strict=True)]


def first_logits(vlm: VLM, prompts: PromptBatch) -> Tensor:
    """(B, V) before the first token, by a plain padded call."""
    ids = prompts.input_ids_BP
    with torch.no_grad():
        return vlm.model(
            input_ids=ids,
            attention_mask=prompts.attention_mask_BP,
            **token_kinds(vlm, ids),
            **prompts.vision,
            logits_to_keep=1,
        ).logits[:, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_images_that_several_prompts_ask_about_are_read_once(family: str) -> None:
    """Two sets of images, ragged questions in mixed order; the same tokens, log-probs and gradients as read each."""
    vlm = tiny_vlm(family, dtype=torch.float64)
    sets = [[picture(0)], [picture(1, 56, 112), picture(2)]]
    owners = [0, 1, 0, 1, 1]
    messages = [conversation("is it round " * (1 + index), 1 + owner) for index, owner in enumerate(owners)]
    shared = encode_prompts(vlm, messages, [sets[owner] for owner in owners])
    apart = encode_prompts(vlm, messages, [[image.copy() for image in sets[owner]] for owner in owners])
    split = shared.split_after_images(vlm.core.config)
    assert split is not None and split[2] == owners and len(split[0]) == 2
    assert apart.split_after_images(vlm.core.config) is None
    results = []
    for prompts in (shared, apart):
        rollout = sample(vlm, prompts, num_completions=2, max_new_tokens=9, seed=3, keep_prefill=True)
        ids, mask = rollout.completion_ids_NT, rollout.mask_NT
        logp, _ = completion_logprobs(vlm, prompts, ids, mask, prefill=rollout.prefill)
        loss = (logp * torch.arange(10.0)[:, None]).sum()
        parameters = list(vlm.model.parameters())
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])
        results.append((rows(rollout), rollout.logp_NT, flat))
    fast, plain = results
    assert read_shared(vlm, apart) is None
    again, _ = completion_logprobs(vlm, shared, ids, mask, prefill=read_shared(vlm, shared))
    torch.testing.assert_close(again, logp, atol=1e-10, rtol=0)
    loss = (again * torch.arange(10.0)[:, None]).sum()
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)])
    assert (flat - plain[2]).norm() / plain[2].norm() < 1e-6
    assert fast[0] == plain[0]
    torch.testing.assert_close(fast[1], plain[1], atol=1e-10, rtol=0)
    assert (fast[2] - plain[2]).norm() / plain[2].norm() < 1e-6  # rotary angles are float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stop_bias", [0.0, 9.0])
def test_greedy_equals_generate(family: str, stop_bias: float) -> None:
    """Ragged left-padded batch; with the bias, completions stop at different lengths and rows are dropped."""
    vlm = tiny_vlm(family)
    prompts = ragged_prompts(vlm)
    with bias(vlm, vlm.stop_token_ids, stop_bias):
        ours = sample(vlm, prompts, num_completions=2, max_new_tokens=40, greedy=True, seed=0)
        theirs = vlm.model.generate(
            input_ids=prompts.input_ids_BP,
            attention_mask=prompts.attention_mask_BP,
            **token_kinds(vlm, prompts.input_ids_BP),
            **prompts.vision,
            do_sample=False,
            max_new_tokens=40,
            suppress_tokens=vlm.banned_token_ids,
        )
    expected = theirs[:, prompts.input_ids_BP.shape[1] :].repeat_interleave(2, dim=0)
    stops = torch.tensor(vlm.stop_token_ids)
    before_stop = torch.isin(expected, stops).cumsum(1) - torch.isin(expected, stops).long() == 0
    assert ours.completion_ids_NT.shape == expected.shape
    assert rows(ours) == [ids[keep].tolist() for ids, keep in zip(expected, before_stop, strict=True)]
    assert ours.finished_N.tolist() == torch.isin(expected, stops).any(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampling_logprobs_are_the_policys(family: str, temperature: float) -> None:
    vlm = tiny_vlm(family)
    prompts = ragged_prompts(vlm)
    with bias(vlm, vlm.stop_token_ids, 3.0):
        rollout = sample(vlm, prompts, num_completions=8, max_new_tokens=30, temperature=temperature, seed=3)
    assert rollout.finished_N.any(), "some rows stop early, so that dropping rows is part of the test"
    lengths = rollout.mask_NT.sum(1)
    assert lengths.max() == rollout.completion_ids_NT.shape[1] and lengths.min() < lengths.max()
    plain = sample(vlm, prompts, num_completions=16, max_new_tokens=30, temperature=temperature, seed=3)
    again, _ = completion_logprobs(vlm, prompts, plain.completion_ids_NT, plain.mask_NT, temperature=temperature)
    torch.testing.assert_close(plain.logp_NT, again.detach(), atol=1e-5, rtol=0)


def test_lora_rollouts_use_the_adapter() -> None:
    vlm = add_lora(tiny_vlm("qwen2_vl"), rank=4, alpha=8, dropout=0.5)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    vlm.model.train()  # dropout must be off while sampling, and the mode must come back
    prompts = ragged_prompts(vlm)
    rollout = sample(vlm, prompts, num_completions=2, max_new_tokens=6, seed=0)
    assert vlm.model.training
    vlm.model.eval()
    again, _ = completion_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
    torch.testing.assert_close(rollout.logp_NT, again.detach(), atol=1e-5, rtol=0)


def test_completions_of_a_group_differ_whatever_the_generation_config_says() -> None:
    vlm = tiny_vlm("qwen2_vl")
    config = vlm.core.generation_config
    config.do_sample, config.top_k, config.temperature, config.repetition_penalty = True, 1, 0.01, 1.05
    prompts = ragged_prompts(vlm)
    rollout = sample(vlm, prompts, num_completions=4, max_new_tokens=12, seed=0)
    for prompt in range(len(prompts)):
        group = [tuple(row) for row in rows(rollout)[4 * prompt : 4 * prompt + 4]]
        assert len(set(group)) == 4


@pytest.mark.parametrize("greedy", [False, True])
def test_no_vision_token_is_ever_sampled(greedy: bool) -> None:
    vlm = tiny_vlm("qwen2_vl")
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    vision = [vlm.tokenizer.convert_tokens_to_ids(name) for name in names]
    assert sorted(vision) == vlm.banned_token_ids
    with bias(vlm, vision, 50.0):  # nothing else would be sampled
        rollout = sample(vlm, ragged_prompts(vlm), num_completions=8, max_new_tokens=16, greedy=greedy, seed=0)
    assert not torch.isin(rollout.completion_ids_NT, torch.tensor(vision)).any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_first_tokens_follow_the_policy(temperature: float) -> None:
    """Chi-square of 8000 first tokens against softmax(logits / temperature) without vision tokens."""
    vlm = tiny_vlm("qwen2_vl")
    prompts = encode_prompts(vlm, [conversation("What?", 1)], [[picture(4)]])
    logits = first_logits(vlm, prompts)[0].double() / temperature
    logits[vlm.banned_token_ids] = -torch.inf
    probability = logits.softmax(0)
    draws = 8000
    rollout = sample(vlm, prompts, num_completions=draws, max_new_tokens=1, temperature=temperature, seed=11)
    counts = torch.bincount(rollout.completion_ids_NT[:, 0], minlength=len(probability))
    assert counts[probability == 0].sum() == 0
    common = probability * draws >= 5  # the test's usual condition; the rest is one cell
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    expected = [*(probability[common] * draws).tolist(), float(probability[~common].sum() * draws)]
    assert len(observed) > 10
    assert chisquare(observed, expected).pvalue > 1e-3


def test_a_seed_fixes_the_completions_and_dropping_rows_does_not_change_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = tiny_vlm("qwen2_vl")
    prompts = ragged_prompts(vlm)

    def run(seed: int) -> tuple[Rollout, int]:
        calls = 0

        def count(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal calls
            calls += len(args[0])

        hook = vlm.core.get_output_embeddings().register_forward_pre_hook(count)
        with bias(vlm, vlm.stop_token_ids, 4.0):
            rollout = sample(vlm, prompts, num_completions=6, max_new_tokens=40, seed=seed)
        hook.remove()
        return rollout, calls

    shared, _ = run(0)
    monkeypatch.setattr(rollouts, "_together", lambda *args: 1)  # what is left out for another reason is not measured
    first, rows_computed = run(0)
    assert rows(first) == rows(shared)
    assert rows(first) == rows(run(0)[0])
    assert rows(first) != rows(run(1)[0])
    monkeypatch.setattr(rollouts, "COMPACT_BELOW", 0.0)
    whole, all_rows = run(0)
    assert rows(first) == rows(whole)
    torch.testing.assert_close(first.logp_NT, whole.logp_NT, atol=1e-5, rtol=0)
    assert rows_computed < 0.7 * all_rows


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_written_the_same_are_computed_once(
    family: str, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold draws begin alike and part later; each row is what it is when every row is computed."""
    vlm = tiny_vlm(family, dtype=torch.float64)
    prompts = ragged_prompts(vlm)
    learned = Drafts()
    settings: dict[str, Any] = {"num_completions": 6, "max_new_tokens": 12, "temperature": 0.4, "seed": 3}
    computed: list[int] = []
    head = vlm.core.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: computed.append(len(args[0])))

    def run() -> Rollout:
        computed.clear()
        with bias(vlm, vlm.stop_token_ids, 2.0):
            return sample(vlm, prompts, **settings, drafts=learned if drafts else None)

    if drafts:
        learned.learn(rows(run()))
    shared = run()
    num_shared = sum(computed)
    monkeypatch.setattr(rollouts, "_together", lambda *args: 1)
    alone = run()
    assert rows(shared) == rows(alone)
    torch.testing.assert_close(shared.logp_NT, alone.logp_NT, atol=1e-9, rtol=0)
    if vlm.not_shared or vlm.carries_state:
        return
    assert num_shared < sum(computed)
    if not drafts:
        groups = [rows(shared)[start : start + 6] for start in range(0, len(rows(shared)), 6)]
        longest = max(map(len, rows(shared)))
        beginnings = [
            sum(max(1, len({tuple(row[:step]) for row in group if len(row) > step})) for group in groups)
            for step in range(1, longest)
        ]
        assert max(beginnings) > len(prompts), "they part"
        assert num_shared <= len(prompts) + sum(beginnings), "no more than there are, and one of a group that has ended"


def test_a_branch_parts_at_the_first_wrong_guess_and_at_a_stop() -> None:
    """Five rows have written 4, and 5 and 6 were guessed; 0 stops. A place a line: what each row draws there."""
    guessed = [Guess(0.9, 5, (0, 1, 8, 1)), Guess(0.8, 6, (1, 2, 4, 2))]
    branch = rollouts._Branch(1, [8, 9, 10, 11, 12], [4], [-0.5], guessed)
    drawn = [
        ([5, 5, 0, 5, 7], [-0.1, -0.1, -3.0, -0.1, -2.0]),
        ([6, 2, 6, 6, 6], [-0.2, -1.0, -0.2, -0.2, -0.2]),
        ([3, 3, 3, 3, 3], [-0.3, -0.3, -0.3, -0.3, -0.3]),
    ]
    parts = branch.grown(drawn, {0})
    assert [(part.rows, part.ids, part.logp) for part in parts] == [
        ([8, 11], [4, 5, 6, 3], [-0.5, -0.1, -0.2, -0.3]),
        ([9], [4, 5, 2], [-0.5, -0.1, -1.0]),
        ([10], [4, 0], [-0.5, -3.0]),
        ([12], [4, 7], [-0.5, -2.0]),
    ]
    assert {part.prompt for part in parts} == {1} and not any(part.guessed or part.ended for part in parts)
    group = GroupDrafts(Drafts(), 2)
    for part in parts:
        group.add(1, part.ids, 1, guessed, times=len(part.rows))
    first, second = (guess.kind for guess in guessed)
    assert group.outcomes == {(first, True): 3, (first, False): 2, (second, True): 2, (second, False): 1}
    assert group._groups[1].likeliest((4,)) == (5, 3, 5) and group._groups[0].likeliest((4,)) is None


def test_padding_stops_and_texts() -> None:
    vlm = tiny_vlm("qwen2_vl")
    prompts = ragged_prompts(vlm)
    tag = vlm.tokenizer.convert_tokens_to_ids("<think>")
    with bias(vlm, [tag], 100.0):
        endless = sample(vlm, prompts, num_completions=2, max_new_tokens=3, seed=0)
    assert endless.texts == ["<think>" * 3] * 6
    assert not endless.finished_N.any() and endless.mask_NT.all()
    with bias(vlm, [vlm.tokenizer.eos_token_id], 100.0):
        silent = sample(vlm, prompts, num_completions=2, max_new_tokens=3, seed=0)
    assert silent.texts == [""] * 6 and silent.finished_N.all()
    assert silent.mask_NT.shape == (6, 1), "the stop token counts, and nothing is padded beyond it"


def test_on_step_sees_each_token_when_it_is_sampled_and_changes_nothing() -> None:
    vlm = tiny_vlm("qwen2_vl")
    prompts = ragged_prompts(vlm)
    plain = sample(vlm, prompts, num_completions=2, max_new_tokens=12, seed=1)
    seen: list[Tensor] = []
    watched = sample(
        vlm, prompts, num_completions=2, max_new_tokens=12, seed=1, on_step=lambda ids: seen.append(ids.clone())
    )
    assert rows(watched) == rows(plain)
    assert [ids.shape[1] for ids in seen] == list(range(1, len(seen) + 1))
    for ids in seen:
        assert torch.equal(ids, watched.completion_ids_NT[:, : ids.shape[1]])
    assert torch.equal(seen[-1], watched.completion_ids_NT)

    def stop(ids: Tensor) -> None:
        if ids.shape[1] == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(vlm, prompts, num_completions=2, max_new_tokens=12, seed=1, on_step=stop)
