"""The packed pass against the slow definition: one unpadded call of the model per completion."""

from typing import Any

import pytest
import torch
from tiny_vlms import FAMILIES, conversation, picture, plain_logprobs, ragged_prompts, tiny_vlm
from torch import Tensor
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from medr1.policy import shared_prefix
from medr1.policy.adapters import add_lora, compile_text_layers, freeze_vision
from medr1.policy.attention import Decoding, PackedGroups, Prefill, Tree, tree_mask
from medr1.policy.encoding import FeatureCache, PromptBatch, encode_prompts, with_vision_features
from medr1.policy.rollouts import sample
from medr1.policy.shared_prefix import completion_logprobs, restrict
from medr1.policy.vlm import VLM, vision_tower
from medr1.training.objective import policy_loss

G, T = 3, 7


def completions(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random text tokens that often begin alike, right-padded to different lengths (one row has a single token)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (num_rows, T), generator=generator)
    ids[:, : T // 2] %= 2
    lengths = torch.arange(num_rows) % T + 1
    mask = torch.arange(T) < lengths[:, None]
    return ids.masked_fill(~mask, 256), mask


def gradients(vlm: VLM, loss: Tensor) -> Tensor:
    vlm.model.zero_grad()
    loss.backward()
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def grpo_loss(logp: Tensor, mask: Tensor, reference: Tensor) -> Tensor:
    """beta > 0, old log-probs that differ from the new ones, advantages of both signs."""
    generator = torch.Generator().manual_seed(5)
    old = logp.detach() + 0.3 * torch.randn(logp.shape, generator=generator)
    advantage = torch.randn(len(logp), generator=generator)
    loss, _ = policy_loss(logp, old, advantage, mask, denominator=len(logp), beta=0.04, ref_logp_NT=reference.detach())
    return loss


def assert_same(vlm: VLM, prompts: PromptBatch, reference_vlm: VLM | None = None, temperature: float = 1.0) -> None:
    ids, mask = completions(len(prompts) * G)
    expected = plain_logprobs(vlm, prompts, ids, mask, temperature)
    packed, entropy = completion_logprobs(vlm, prompts, ids, mask, temperature=temperature)
    assert entropy is None
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)
    reference = expected + 0.1 if reference_vlm is None else plain_logprobs(reference_vlm, prompts, ids, mask)
    slow = gradients(vlm, grpo_loss(expected, mask, reference))
    fast = gradients(vlm, grpo_loss(packed, mask, reference))
    assert slow.norm() > 1e-3
    assert (fast - slow).norm() / slow.norm() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prompts_with_none_one_and_two_images(family: str) -> None:
    vlm = tiny_vlm(family)
    assert_same(vlm, ragged_prompts(vlm), temperature=0.7)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64(family: str) -> None:
    """Norms and rotary angles stay float32 inside transformers, so 1e-6 and not 1e-15."""
    vlm = tiny_vlm(family, dtype=torch.float64)
    prompts = ragged_prompts(vlm)
    ids, mask = completions(len(prompts) * G)
    expected = plain_logprobs(vlm, prompts, ids, mask)
    packed, _ = completion_logprobs(vlm, prompts, ids, mask)
    assert packed.dtype == torch.float64
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradient_checkpointing_and_reference(family: str) -> None:
    base = tiny_vlm(family)
    vlm = add_lora(base, rank=4, alpha=8)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would make policy and reference equal
            torch.nn.init.normal_(parameter, std=0.1)
    vlm.core.activation_checkpointing_enable()
    vlm.core.enable_input_require_grads()
    vlm.model.train()
    prompts = ragged_prompts(vlm)
    ids, mask = completions(len(prompts) * G)
    with vlm.model.disable_adapter(), torch.no_grad():
        expected = plain_logprobs(vlm, prompts, ids, mask)
        reference, _ = completion_logprobs(vlm, prompts, ids, mask)
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(reference, plain_logprobs(tiny_vlm(family), prompts, ids, mask), atol=1e-5, rtol=0)
    policy, _ = completion_logprobs(vlm, prompts, ids, mask)
    assert (policy - reference).abs().max() > 0.01
    assert_same(vlm, prompts, reference_vlm=tiny_vlm(family))


def test_gradient_checkpointing_of_the_whole_model() -> None:
    vlm = tiny_vlm("qwen2_vl")
    vlm.core.activation_checkpointing_enable()
    vlm.model.train()
    runs = []
    vlm.core.base_model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    prompts = ragged_prompts(vlm)
    ids, mask = completions(len(prompts) * G)
    completion_logprobs(vlm, prompts, ids, mask)[0].sum().backward()
    assert len(runs) == 2, "each layer runs again in the backward pass"
    assert_same(vlm, prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_tower_runs_once_for_sampling_policy_and_reference(family: str) -> None:
    vlm = tiny_vlm(family)
    prompts = ragged_prompts(vlm)
    assert with_vision_features(vlm, prompts).features is None, "a trained tower must see the pixels again"
    freeze_vision(vlm)
    calls = []
    vision_tower(vlm)[0].register_forward_hook(lambda *_: calls.append(1))
    ready = with_vision_features(vlm, prompts)
    assert_same(vlm, prompts)
    calls.clear()
    ids, mask = completions(len(prompts) * G)
    fresh, _ = completion_logprobs(vlm, prompts, ids, mask)
    assert len(calls) == 1
    for _ in range(2):  # the features must survive a call
        reused, _ = completion_logprobs(vlm, ready, ids, mask)
        torch.testing.assert_close(reused, fresh, atol=1e-6, rtol=0)
    order = [2, 1]
    rows = torch.tensor([prompt * G + g for prompt in order for g in range(G)])
    part, _ = completion_logprobs(vlm, ready.select(order), ids[rows], mask[rows])
    torch.testing.assert_close(part, fresh[rows], atol=1e-5, rtol=0)
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_features_are_kept_from_one_epoch_to_the_next(family: str) -> None:
    vlm = tiny_vlm(family)
    freeze_vision(vlm)
    prompts = ragged_prompts(vlm)  # none, one and two images
    calls: list[int] = []
    vision_tower(vlm)[0].register_forward_hook(lambda *_: calls.append(1))
    cache = FeatureCache()
    first = with_vision_features(vlm, prompts, cache)
    assert len(calls) == len(cache) == sum(prompts.image_counts)
    ids, mask = completions(len(prompts) * G)
    fresh, _ = completion_logprobs(vlm, prompts, ids, mask)
    calls.clear()
    again = with_vision_features(vlm, prompts.select([2, 0, 1]), cache)
    assert not calls
    rows = torch.tensor([prompt * G + g for prompt in (2, 0, 1) for g in range(G)])
    for ready, expected, order in ((first, fresh, slice(None)), (again, fresh[rows], rows)):
        kept, _ = completion_logprobs(vlm, ready, ids[order], mask[order])
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=0)
    two = prompts.image_counts.index(2)
    alone = with_vision_features(vlm, prompts.select([two]), FeatureCache())  # as after a resume, in another batch
    place = sum(prompts.image_counts[:two])
    for one, other in zip(alone.features.pooler_output, first.features.pooler_output[place : place + 2], strict=True):
        assert torch.equal(one, other)


def test_the_oldest_features_go_first() -> None:
    vlm = tiny_vlm("qwen2_vl")
    freeze_vision(vlm)
    images = [[picture(seed)] for seed in range(3)]
    prompts = encode_prompts(vlm, [conversation("What is it?", 1)] * 3, images)
    size = with_vision_features(vlm, prompts).features.pooler_output[0].nbytes
    cache = FeatureCache(max_bytes=2 * size)
    with_vision_features(vlm, prompts, cache)
    assert (len(cache), cache.num_bytes) == (2, 2 * size)
    calls: list[int] = []
    vision_tower(vlm)[0].register_forward_hook(lambda *_: calls.append(1))
    with_vision_features(vlm, prompts.select([1, 2]), cache)
    assert not calls
    with_vision_features(vlm, prompts.select([0]), cache)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "qwen3_5"])
def test_flex_attention_of_the_tree_mask(family: str, with_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that a GPU takes, on the CPU, where flex_attention has no backward pass."""

    class Tree(PackedGroups):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.as_tree = True

    vlm = tiny_vlm(family)
    prompts = ragged_prompts(vlm)
    rollout = sample(vlm, prompts, num_completions=G, max_new_tokens=T, seed=0, keep_prefill=not with_prompt)
    prefill = rollout.prefill
    with torch.no_grad():
        arguments = (vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
        expected, _ = completion_logprobs(*arguments, prefill=prefill)
        monkeypatch.setattr(shared_prefix, "PackedGroups", Tree)
        flex, _ = completion_logprobs(*arguments, prefill=prefill)
    torch.testing.assert_close(flex, expected, atol=1e-5, rtol=0)


def test_tree_mask_by_hand() -> None:
    """One padded prompt of two tokens, three completions of which two begin alike: who sees whom."""
    real = torch.tensor([[False, True, True]])
    ids, lengths = torch.tensor([[5, 6, 7], [5, 6, 8], [9, 6, 0]]), torch.tensor([3, 3, 2])
    tree = Tree(ids, lengths, 1)
    assert tree.ids_BL.tolist() == [[5, 6, 7, 8, 9, 6]]
    assert tree.step_BL.tolist() == [[0, 1, 2, 2, 0, 1]]
    assert tree.column_NT.tolist() == [[0, 1, 2], [0, 1, 3], [4, 5, 0]]
    whole = [[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]]
    completions_see = [
        [0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 1, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 0, 0, 1, 1],
    ]
    for with_prompt, rows in ((True, whole + completions_see), (False, completions_see)):
        allowed = tree_mask(causal_mask_function, real, torch.arange(3)[None], tree, with_prompt=with_prompt).mask_mod
        index = torch.tensor(0)
        seen = [
            [int(allowed(index, index, torch.tensor(query), torch.tensor(key))) for key in range(9)]
            for query in range(len(rows))
        ]
        assert seen == rows


def test_what_completions_begin_with_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as differ, and no padding, and as many logits as tokens that predict."""
    vlm = tiny_vlm("qwen2_vl")
    prompts = ragged_prompts(vlm)
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 9, 5], [1, 7, 3, 4, 0]]).repeat(len(prompts), 1) + 20
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).repeat(len(prompts), 1).bool()
    lengths: list[int] = []
    vlm.core.get_decoder().layers[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    predicting: list[int] = []

    def counted(logits: Tensor, *args: Any) -> Tensor:
        predicting.append(len(logits))
        return restrict(logits, *args)

    monkeypatch.setattr(shared_prefix, "restrict", counted)
    completion_logprobs(vlm, prompts, ids, mask)
    # 1 2 3 (4 | 9), 7 3: the last token that is scored is not computed
    assert lengths == [prompts.input_ids_BP.shape[1] + 7]
    assert predicting == [len(prompts) * (1 + 7)]


def test_bfloat16_rounds_what_is_shared_once() -> None:
    """Completions that begin alike and pull in opposite directions: what is left is that of float32."""
    found = []
    for narrow in (False, True):
        vlm = tiny_vlm("qwen2_vl")
        prompts = ragged_prompts(vlm)
        ids, mask = completions(len(prompts) * 8)
        signs = 1 - 2 * (torch.arange(len(ids)) % 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logp, _ = completion_logprobs(vlm, prompts, ids, mask)
        found.append(gradients(vlm, (logp * signs[:, None]).sum()))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999


@pytest.mark.parametrize("kind", ["window", "chunk", "image"])
def test_masks_are_those_of_a_completion_alone_behind_its_prompt(kind: str) -> None:
    """What transformers' own mask of the unpadded row says, for windows and chunks by position, and seen both ways."""
    lengths, longest = [3, 8, 5], 8
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    padding = longest - torch.tensor(lengths)

    def sees(left: Tensor) -> Any:
        if kind == "chunk":
            return chunked_causal_mask_function(4, left)
        if kind == "window":
            return sliding_window_causal_mask_function(4)
        blocks = torch.full((len(left), longest + G * T), -1)
        for row, start in enumerate(left.tolist()):
            blocks[row, start + 1 : start + 3] = 0
        return or_masks(causal_mask_function, blockwise_overlay(blocks))

    alone = [
        sdpa_mask(1, length + T, length + T, mask_function=sees(torch.zeros(1, dtype=int)), allow_is_causal_skip=False)
        for length in lengths
    ]
    tree = Tree(torch.arange(len(lengths) * G * T).view(-1, T), torch.full((len(lengths) * G,), T), len(lengths))
    packed = PackedGroups(real.long(), tree).mask(sees(padding)).parts  # type: ignore[union-attr]
    prefill = Prefill(real.long())
    prefill.keys = prefill.values = {0: torch.zeros(len(lengths), 1, longest, 4)}
    whole = prefill.mask(sees(padding))
    decoding_of = Decoding(prefill, G, T)
    for row, (mask, length) in enumerate(zip(alone, lengths, strict=True)):
        for prompt in (packed.prompt, whole):
            assert torch.equal(prompt[row, 0, -length:, -length:], mask[0, 0, :length, :length])
            assert not prompt[row, 0, -length:, :-length].any()
        for completion in packed.completions[row * G : (row + 1) * G, 0]:
            assert torch.equal(completion[:, -length - T :], mask[0, 0, length:])
    if kind == "image":  # no longer at hand when a reply is decoded, and of no effect on it
        return
    zeros = torch.zeros(len(lengths) * G * 2, dtype=int)
    after = PackedGroups(real.long(), tree, prefill).mask(sees(zeros)).parts  # type: ignore[union-attr]
    assert torch.equal(after.completions, packed.completions)
    decoding_of.expect([2] * len(lengths) * G, [1, 3, 4] * len(lengths))
    decoding = decoding_of.mask(sees(zeros)).parts  # type: ignore[attr-defined]
    for row, (mask, length) in enumerate(zip(alone, lengths, strict=True)):
        seen = torch.nn.functional.pad(decoding.added[row, 0] == 0, (decoding.start, 0))  # (2 G, P + 6 G)
        own = seen[:, longest:].unflatten(1, (-1, G))
        for group, cached in enumerate([1, 3, 4]):
            for offset in (0, 1):
                expected, query = mask[0, 0, length + cached + offset], 2 * group + offset
                assert torch.equal(own[query, :, group], expected[length : length + decoding_of.reached])
                assert int(own[query].sum()) == int(own[query, :, group].sum()), "another row's"
                assert torch.equal(seen[query, longest - length : longest], expected[:length])
                assert not seen[query, : longest - length].any(), "padding"


def test_compiled_layers_change_nothing() -> None:
    """Capture and gradient of the compiled path; the code generator itself is torch's own affair."""
    vlm = add_lora(tiny_vlm("qwen2_vl"), rank=4, alpha=8)
    for name, parameter in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = ragged_prompts(vlm)

    def results() -> list[Tensor]:
        rollout = sample(vlm, prompts, num_completions=G, max_new_tokens=T, seed=0)
        logp, _ = completion_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
        with vlm.model.disable_adapter(), torch.no_grad():  # type: ignore[operator]
            reference, _ = completion_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
        return [rollout.completion_ids_NT, logp.detach(), reference, gradients(vlm, logp.sum())]

    expected = results()
    assert (expected[1] - expected[2]).abs().max() > 1e-3
    compile_text_layers(vlm, backend="aot_eager")
    before = sum(torch._dynamo.utils.counters["stats"].values())
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert sum(torch._dynamo.utils.counters["stats"].values()) > before, "nothing was compiled"


def test_text_alone() -> None:
    vlm = tiny_vlm("qwen2_vl")
    assert_same(vlm, encode_prompts(vlm, [conversation("What is it?", 0), conversation("Why?", 0)], [[], []]))


def test_one_prompt_without_padding_and_one_token() -> None:
    vlm = tiny_vlm("qwen2_5_vl")
    prompts = encode_prompts(vlm, [conversation("What?", 1)], [[picture(4)]])
    ids, mask = torch.tensor([[65], [66]]), torch.ones(2, 1)
    expected = plain_logprobs(vlm, prompts, ids, mask)
    torch.testing.assert_close(completion_logprobs(vlm, prompts, ids, mask)[0], expected, atol=1e-5, rtol=0)


def test_logits_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers and gradients when only four tokens' logits may be alive at once."""
    vlm = tiny_vlm("qwen3_vl")
    sizes = []

    def counted(logits: Tensor, temperature: float, banned: list[int]) -> Tensor:
        sizes.append(logits.numel())
        return restrict(logits, temperature, banned)

    monkeypatch.setattr(shared_prefix, "MAX_LOGITS", 4 * 300)
    monkeypatch.setattr(shared_prefix, "restrict", counted)
    assert_same(vlm, ragged_prompts(vlm))
    assert len(sizes) > 1 and max(sizes) <= 4 * 300


@pytest.mark.parametrize("max_logits", [2**25, 1])
def test_entropy_and_its_gradient(max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the vocabulary without vision tokens, whose log-prob is -inf and may make no gradient NaN."""
    monkeypatch.setattr(shared_prefix, "MAX_LOGITS", max_logits)
    vlm = tiny_vlm("qwen2_vl", dtype=torch.float64)
    prompts = encode_prompts(vlm, [conversation("What?", 1)], [[picture(4)]])
    ids, mask = torch.tensor([[65, 66, 67]]), torch.tensor([[1, 1, 0]])
    _, entropy = completion_logprobs(vlm, prompts, ids, mask, entropy=True)
    assert entropy is not None and not entropy.requires_grad
    _, with_gradient = completion_logprobs(vlm, prompts, ids, mask, entropy="gradient")
    assert with_gradient is not None and torch.equal(with_gradient, entropy)
    text = torch.cat([prompts.input_ids_BP, ids[:, :2]], dim=1)
    kinds = (text == vlm.core.config.image_token_id).int()
    logits = vlm.model(input_ids=text, mm_token_type_ids=kinds, **prompts.vision).logits[0, -3:-1]
    allowed = [token for token in range(logits.shape[1]) if token not in vlm.banned_token_ids]
    assert len(allowed) < logits.shape[1]
    expected = torch.distributions.Categorical(logits=logits[:, allowed]).entropy()
    torch.testing.assert_close(entropy[0, :2], expected, atol=1e-10, rtol=0)
    assert entropy[0, 2] == 0
    slow, fast = gradients(vlm, expected.sum()), gradients(vlm, with_gradient.sum())
    assert slow.norm() > 1e-3 and (fast - slow).norm() / slow.norm() < 1e-10


def test_micro_batches_add_up_to_the_whole_gradient() -> None:
    """Split by prompt, and inside a group: the loss divides by the whole step's denominator."""
    vlm = tiny_vlm("qwen2_vl")
    prompts = ragged_prompts(vlm)
    ids, mask = completions(len(prompts) * G)
    advantage = torch.randn(len(ids), generator=torch.Generator().manual_seed(1))
    reference = plain_logprobs(tiny_vlm("qwen2_vl", seed=1), prompts, ids, mask).detach()

    def gradient(pieces: list[tuple[list[int], list[int]]], aggregate: str, denominator: float) -> Tensor:
        total = torch.tensor(0.0)
        for chosen, rows in pieces:
            logp, _ = completion_logprobs(vlm, prompts.select(chosen), ids[rows], mask[rows])
            loss, _ = policy_loss(
                logp,
                None,
                advantage[rows],
                mask[rows],
                denominator=denominator,
                aggregate=aggregate,  # type: ignore[arg-type]
                beta=0.04,
                ref_logp_NT=reference[rows],
            )
            total = total + loss
        return gradients(vlm, total)

    whole = [([0, 1, 2], list(range(9)))]
    split = [([1], [3, 4]), ([1], [5]), ([0, 2], [0, 1, 2, 6, 7, 8])]
    for aggregate, denominator in (("sequence", 9), ("token", float(mask.sum())), ("dr_grpo", 9 * T)):
        expected = gradient(whole, aggregate, denominator)
        torch.testing.assert_close(gradient(split, aggregate, denominator), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_from_the_prompts_that_sampling_read(family: str) -> None:
    """Log-probs, entropies and gradients as if the prompts were read again."""
    vlm = tiny_vlm(family, dtype=torch.float64)
    prompts = ragged_prompts(vlm)
    rollout = sample(vlm, prompts, num_completions=G, max_new_tokens=T, seed=0, keep_prefill=True)
    arguments = (vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
    mask = rollout.mask_NT
    again, entropy_again = completion_logprobs(*arguments, entropy="gradient")
    kept, entropy_kept = completion_logprobs(*arguments, entropy="gradient", prefill=rollout.prefill)
    assert entropy_again is not None and entropy_kept is not None
    slow = gradients(vlm, grpo_loss(again, mask, again + 0.1) - entropy_again.mean())
    torch.testing.assert_close(kept, again, atol=1e-10, rtol=0)
    torch.testing.assert_close(entropy_kept, entropy_again, atol=1e-10, rtol=0)
    fast = gradients(vlm, grpo_loss(kept, mask, again + 0.1) - entropy_kept.mean())
    assert slow.norm() > 1e-3
    assert (fast - slow).norm() / slow.norm() < 1e-10
