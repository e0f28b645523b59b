"""The maths of GRPO against numbers worked out by hand."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medr1.errors import MedR1Error
from medr1.training.objective import (
    bounded_exp,
    entropy_share,
    group_advantages,
    group_deviation,
    kl_k3,
    loss_denominator,
    policy_loss,
    rollout_weights,
)


def test_advantages_by_hand() -> None:
    # mean 1/4; deviations 3/4, -1/4 x 3; squares 9/16 + 3/16 = 3/4; ddof 1: variance 1/4, std 1/2
    # 0.75 / (0.5 + 1e-4) = 1.49970, -0.25 / 0.5001 = -0.49990
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 0]]))
    assert advantages[0].tolist() == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=5e-5)
    # ddof 0: variance 3/16, std 0.43301; 0.75 / 0.43311 = 1.73165
    population = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), ddof=0)
    assert population[0].tolist() == pytest.approx([1.73165, -0.57722, -0.57722, -0.57722], abs=5e-5)
    centred = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), scale="none")
    assert centred[0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_each_prompt_is_its_own_group() -> None:
    rewards = torch.tensor([[1.0, 0.0], [5.0, 5.0], [2.0, 4.0]])
    # std of (1, 0) is 0.70711: 0.5 / 0.70721 = 0.70701; of (2, 4) 1.41421: 1 / 1.41431 = 0.70706
    expected = [[0.70701, -0.70701], [0.0, 0.0], [-0.70706, 0.70706]]
    for row, want in zip(group_advantages(rewards).tolist(), expected, strict=True):
        assert row == pytest.approx(want, abs=1e-5)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=8),
    st.sampled_from(["group", "none"]),
)
def test_advantages_sum_to_zero_and_equal_rewards_give_exactly_zero(rewards: list[float], scale: str) -> None:
    table = torch.tensor([rewards, [rewards[0]] * len(rewards)])
    advantages = group_advantages(table, scale=scale)  # type: ignore[arg-type]
    assert advantages[0].sum().item() == pytest.approx(0, abs=1e-3)
    assert advantages[1].tolist() == [0.0] * len(rewards)


def test_equal_rewards_that_float32_cannot_average_exactly() -> None:
    assert not group_advantages(torch.full((1, 7), 0.1)).any()


def test_one_completion_is_refused() -> None:
    with pytest.raises(MedR1Error, match="num_completions to 2 or more"):
        group_advantages(torch.tensor([[1.0]]))


def test_kl_by_hand() -> None:
    # d = ref - policy = ln 2: 2 - ln 2 - 1 = 0.306853; d = -ln 2: 0.5 + ln 2 - 1 = 0.193147
    policy = torch.tensor([-2.0, -2.0, -2.0])
    reference = policy + torch.tensor([math.log(2), -math.log(2), 0.0])
    assert kl_k3(policy, reference).tolist() == pytest.approx([0.306853, 0.193147, 0.0], abs=1e-6)


# Two rows, three tokens; the last token of row 2 is padding. Ratios: row 1 (1.5, 1, 0.5), row 2 (0.5, 2, -).
LOG = math.log
LOGP = [[LOG(1.5), 0.0, LOG(0.5)], [LOG(0.5), LOG(2.0), 7.0]]
OLD = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
MASK = [[1, 1, 1], [1, 1, 0]]
ADVANTAGE = [2.0, -1.0]
# Row 1, A = 2, clip 0.2: min(3, 2.4) = 2.4; min(2, 2) = 2; min(1, 1.6) = 1.0         losses -2.4, -2, -1
# Row 2, A = -1: min(-0.5, -0.8) = -0.8; min(-2, -1.2) = -2                            losses 0.8, 2
# sequence: row means -1.8 and 1.4; over 2 rows -0.2.  token: (-5.4 + 2.8) / 5 = -0.52
# dr_grpo with 4 tokens a row: -2.6 / 8 = -0.325


@pytest.mark.parametrize(("aggregate", "expected"), [("sequence", -0.2), ("token", -0.52), ("dr_grpo", -0.325)])
def test_loss_by_hand(aggregate: str, expected: float) -> None:
    logp = torch.tensor(LOGP, requires_grad=True)
    mask = torch.tensor(MASK)
    denominator = loss_denominator(mask, aggregate, max_tokens=4)  # type: ignore[arg-type]
    loss, sums = policy_loss(
        logp,
        torch.tensor(OLD),
        torch.tensor(ADVANTAGE),
        mask,
        denominator=denominator,
        aggregate=aggregate,  # type: ignore[arg-type]
    )
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert sums["tokens"] == 5
    assert sums["ratio"] == pytest.approx(1.5 + 1 + 0.5 + 0.5 + 2, abs=1e-6)
    # Clipped where the bound decides: ratio 1.5 with A > 0, ratio 0.5 with A < 0.
    assert (sums["clipped_high"], sums["clipped_low"]) == (1, 1)
    loss.backward()
    # d/dlogp of -ratio A is -ratio A; 0 where clipped and at padding.
    weight = {"sequence": (1 / 6, 1 / 4), "token": (1 / 5, 1 / 5), "dr_grpo": (1 / 8, 1 / 8)}[aggregate]
    expected_gradient = [[0.0, -2.0 * weight[0], -1.0 * weight[0]], [0.0, 2.0 * weight[1], 0.0]]
    torch.testing.assert_close(logp.grad, torch.tensor(expected_gradient), atol=1e-6, rtol=0)


def test_clip_of_both_signs_with_its_own_bounds() -> None:
    # clip_low 0.1, clip_high 0.3. A > 0: ratio 1.25 is free, 1.5 is held at 1.3, 0.5 is free.
    # A < 0: ratio 0.95 is free, 0.5 is held at 0.9, 1.5 is free.
    ratios = [1.25, 1.5, 0.5]
    low = [0.95, 0.5, 1.5]
    logp = torch.tensor([ratios, low]).log().requires_grad_()
    loss, sums = policy_loss(
        logp,
        torch.zeros(2, 3),
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 3),
        denominator=1,
        aggregate="token",
        clip_low=0.1,
        clip_high=0.3,
    )
    assert loss.item() == pytest.approx(-(1.25 + 1.3 + 0.5) + (0.95 + 0.9 + 1.5), abs=1e-6)
    loss.backward()
    expected = torch.tensor([[-1.25, 0.0, -0.5], [0.95, 0.0, 1.5]])
    torch.testing.assert_close(logp.grad, expected, atol=1e-6, rtol=0)
    assert (sums["clipped_high"], sums["clipped_low"]) == (1, 1)


def test_kl_penalty_by_hand() -> None:
    # One row of two tokens, A = 0, d = (ln 2, -ln 2): beta * mean(0.306853, 0.193147) = 0.04 * 0.25
    logp = torch.zeros(1, 2, requires_grad=True)
    reference = torch.tensor([[LOG(2), -LOG(2)]])
    loss, sums = policy_loss(
        logp, None, torch.zeros(1), torch.ones(1, 2), denominator=1, beta=0.04, ref_logp_NT=reference
    )
    assert loss.item() == pytest.approx(0.01, abs=1e-7)
    assert sums["kl"] == pytest.approx(0.5, abs=1e-6)
    loss.backward()
    # d/dlogp (exp(r - p) - (r - p) - 1) = 1 - exp(r - p): -1 and 0.5, each times 0.04 / 2
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.02, 0.01]]), atol=1e-7, rtol=0)


def test_first_update_needs_no_old_logprobs() -> None:
    """The ratio is 1, and the gradient is that of -A logp."""
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, _ = policy_loss(logp, None, torch.tensor([3.0]), torch.ones(1, 2), denominator=2, aggregate="token")
    loss.backward()
    assert loss.item() == -3.0
    assert logp.grad is not None and logp.grad.tolist() == [[-1.5, -1.5]]


def test_a_row_without_tokens_adds_nothing() -> None:
    logp = torch.zeros(2, 2, requires_grad=True)
    mask = torch.tensor([[1, 1], [0, 0]])
    loss, _ = policy_loss(logp, None, torch.tensor([1.0, 5.0]), mask, denominator=2)
    assert loss.item() == -0.5


def test_rollout_weights_by_hand() -> None:
    # π / μ = 0.4 / 0.5, 0.6 / 0.2 and padding: 0.8, 3 cut to 2, 1. |log ratio|: log 1.25 + log 3 = 0.22314 + 1.09861.
    # k3 of KL(μ ‖ π): 0.8 + 0.22314 - 1 = 0.02314 and 3 - 1.09861 - 1 = 0.90139.
    policy = torch.tensor([[0.4, 0.6, 0.5]], requires_grad=True)
    server = torch.tensor([[0.5, 0.2, 0.9]])
    weights, sums = rollout_weights(policy.log(), server.log(), torch.tensor([[1, 1, 0]]), cap=2.0)
    assert weights.tolist() == [pytest.approx([0.8, 2.0, 1.0])]
    assert not weights.requires_grad
    assert sums == pytest.approx({"mismatch_abs": 1.32176, "mismatch_kl": 0.92453, "capped": 1.0}, abs=1e-5)
    # The clipped terms of the two tokens, -0.8 and -2, and 0.5 times the reference's k3, 0 and 2 - log 2 - 1 = 0.30685.
    reference = torch.tensor([[0.4, 1.2, 0.5]])
    loss, _ = policy_loss(
        policy.log(),
        None,
        torch.tensor([1.0]),
        torch.tensor([[1, 1, 0]]),
        denominator=1.0,
        beta=0.5,
        ref_logp_NT=reference.log(),
        weight_NT=weights,
    )
    assert loss.item() == pytest.approx((-2.8 + 0.5 * 0.30685) / 2, abs=1e-5)


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_weighted_samples_of_another_policy_have_the_gradient_of_our_own(seed: int) -> None:
    """Exactly, by summing over a vocabulary of six: E_μ[w A ∇log π] = ∇ E_π[A] where the cap is out of reach."""
    generator = torch.Generator().manual_seed(seed)
    logits, others, rewards = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, server_logp = logits.log_softmax(0), others.log_softmax(0)
    (expected,) = torch.autograd.grad(-(logp.exp() * rewards).sum(), logits, retain_graph=True)
    mask = torch.ones(6, 1)
    weights, _ = rollout_weights(logp[:, None], server_logp[:, None], mask, cap=math.inf)
    loss, _ = policy_loss(logp[:, None], None, server_logp.exp() * rewards, mask, denominator=1.0, weight_NT=weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, expected)


def test_what_no_reward_applies_to_is_left_out_of_its_group() -> None:
    # of (1, -, 0): mean 1/2, std of (1, 0) 0.70711: 0.5 / 0.70721 = 0.70701; one alone and none have nothing to compare
    rewards = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 3.0, math.nan], [math.nan] * 3, [0.1, 0.1, math.nan]])
    expected = [[0.70701, 0.0, -0.70701], [0.0] * 3, [0.0] * 3, [0.0] * 3]
    for row, want in zip(group_advantages(rewards).tolist(), expected, strict=True):
        assert row == pytest.approx(want, abs=1e-5)
    assert group_advantages(rewards, scale="none")[0].tolist() == [0.5, 0.0, -0.5]
    assert group_deviation(rewards).tolist() == pytest.approx([0.70711, 0, 0, 0], abs=1e-5)


@settings(max_examples=50)
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=6), st.sampled_from(["group", "none"]), st.data())
def test_a_group_with_gaps_is_the_group_without_them(rewards: list[float], scale: str, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(rewards)), max_size=3))
    gaps = list(rewards)
    for place in places:
        gaps.insert(place, math.nan)
    plain = group_advantages(torch.tensor([rewards], dtype=torch.float64), scale=scale)  # type: ignore[arg-type]
    found = group_advantages(torch.tensor([gaps], dtype=torch.float64), scale=scale)[0]  # type: ignore[arg-type]
    apart = torch.tensor(gaps).isnan()
    assert found[~apart].tolist() == pytest.approx(plain[0].tolist(), abs=1e-9)
    assert not found[apart].any()


def test_bounded_exp_is_exp_and_then_its_tangent() -> None:
    below = torch.tensor([-200.0, -1.0, 0.0, 1.0, 19.9, 20.0], dtype=torch.float64)
    assert torch.equal(bounded_exp(below), below.exp())
    above = torch.tensor([20.0, 21.0, 120.0, 1e6], dtype=torch.float64, requires_grad=True)
    bounded_exp(above).sum().backward()
    bound = math.exp(20)
    assert bounded_exp(above).tolist() == pytest.approx([bound, 2 * bound, 101 * bound, (1e6 - 19) * bound])
    assert above.grad is not None and above.grad.tolist() == pytest.approx([bound] * 4)


@pytest.mark.parametrize("distance", [25.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("kl_by_ratio", [False, True])
def test_log_probs_far_apart_overflow_nothing(distance: float, advantage: float, kl_by_ratio: bool) -> None:
    """One token far below the reference, one far above the policy that sampled; both are pulled the right way."""
    logp = torch.tensor([[-distance, -0.1]], requires_grad=True)
    old, reference = torch.tensor([[-distance, -distance]]), torch.tensor([[-0.1, -0.1]])
    mask = torch.ones(1, 2)
    loss, sums = policy_loss(
        logp, old, torch.tensor([advantage]), mask, denominator=1.0, beta=1.0, ref_logp_NT=reference,
        kl_by_ratio=kl_by_ratio,
    )  # fmt: skip
    loss.backward()
    assert logp.grad is not None and bool(logp.grad.isfinite().all()) and bool(loss.isfinite())
    assert all(math.isfinite(value) for value in sums.values())
    assert logp.grad[0, 0] < 0  # towards the reference: its probability must rise
    if advantage < 0:
        assert logp.grad[0, 1] > 0
    weights, mismatch = rollout_weights(logp, old - distance, mask, cap=2.0)
    assert weights.max() == 2 and all(math.isfinite(value) for value in mismatch.values())


exact = partial(torch.tensor, dtype=torch.float64)


def plain_loss(
    logits_NTV: torch.Tensor, ids: list[list[int]], old: torch.Tensor, reference: torch.Tensor, advantages: list[float],
    lengths: list[int], *, objective: str, aggregate: str, clip_low: float, clip_high: float, delta: float, beta: float,
    kl_by_ratio: bool, kl_clamp: float, entropy_bonus: float,
) -> torch.Tensor:  # fmt: skip
    """The objectives as they stand in the papers, a token at a time."""
    rows, entropies = [], []
    for row, length in enumerate(lengths):
        logps = [logits_NTV[row, place].log_softmax(0) for place in range(length)]
        taken = [logp[ids[row][place]] for place, logp in enumerate(logps)]
        entropies += [-(logp.exp() * logp).sum() for logp in logps]
        differences = [new - old[row, place] for place, new in enumerate(taken)]
        terms = []
        for place in range(length):
            ratio = differences[place].exp()
            if objective == "gspo":
                ratio = (sum(differences) / length).exp()
            if objective == "cispo":
                term = -min(ratio.item(), 1 + clip_high) * advantages[row] * taken[place]
            else:
                free = min(ratio, exact(delta)) if delta else ratio
                held = min(max(ratio, exact(1 - clip_low)), exact(1 + clip_high))
                term = -min(free * advantages[row], held * advantages[row])
            distance = reference[row, place] - taken[place]
            kl = distance.exp() - distance - 1
            kl = min(kl, exact(kl_clamp)) if kl_clamp else kl
            terms.append(term + beta * (kl * ratio if kl_by_ratio else kl))
        rows.append(terms)
    loss = {
        "sequence": lambda: sum(sum(terms) / len(terms) for terms in rows if terms) / len(rows),
        "token": lambda: sum(map(sum, rows)) / sum(lengths),
        "dr_grpo": lambda: sum(map(sum, rows)) / (len(rows) * 7),
    }[aggregate]()
    return loss - entropy_bonus * sum(entropies) / len(entropies)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "dr_grpo"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"kl_by_ratio": True},
        {"kl_clamp": 0.1},
        {"kl_clamp": 0.1, "kl_by_ratio": True},
        {"delta": 1.5},
        {"entropy_bonus": 0.3},
        {"objective": "gspo", "clip_low": 0.05, "clip_high": 0.06},
        {"objective": "gspo", "clip_low": 0.05, "clip_high": 0.06, "delta": 1.1, "kl_by_ratio": True},
        {"objective": "cispo", "clip_high": 0.5},
        {"objective": "cispo", "clip_high": 0.5, "kl_by_ratio": True, "kl_clamp": 0.2, "entropy_bonus": 0.1},
    ],
    ids=lambda changed: " ".join(f"{name}={value}" for name, value in changed.items()) or "grpo",
)
def test_each_objective_has_the_loss_and_gradient_of_a_plain_one(changed: dict, aggregate: str) -> None:
    """In float64, through the log-probs, to the logits; a row of its own for each sign and side, and an empty one."""
    settings = {
        "objective": "grpo", "aggregate": aggregate, "clip_low": 0.2, "clip_high": 0.3, "delta": 0.0, "beta": 0.5,
        "kl_by_ratio": False, "kl_clamp": 0.0, "entropy_bonus": 0.0, **changed,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    lengths, advantages = [6, 6, 4, 1, 5, 0], [1.5, -0.7, 0.4, -2.0, -1.0, 3.0]
    logits = torch.randn(6, 6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(9, (6, 6), generator=generator)
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old = logp.detach() + 0.6 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    old += exact([-0.3, 0.3, 0, 0, 0, 0])[:, None]  # so that whole rows are beyond both bounds
    reference = logp.detach() + 0.6 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    expected = plain_loss(logits, ids.tolist(), old, reference, advantages, lengths, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, logits)

    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    bonus = settings.pop("entropy_bonus")
    denominator = loss_denominator(mask, aggregate, max_tokens=7)  # type: ignore[arg-type]
    loss, sums = policy_loss(
        logp * mask, old * mask, exact(advantages), mask, denominator=denominator, ref_logp_NT=reference * mask,
        **settings,
    )  # fmt: skip
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    loss = loss - bonus * entropy_share(entropy, mask, num_tokens=sums["tokens"])
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=0)
    assert sums["clipped_high"] > 0 and (sums["clipped_low"] > 0) is (settings["objective"] != "cispo")


def test_a_bad_completion_that_grew_likely_is_held_at_delta() -> None:
    """The hack of one clip alone: A < 0 and a ratio of 50 is a step of 50, and none with a bound at 4."""
    for delta, weight in ((0.0, 50.0), (4.0, 0.0)):
        logp = torch.tensor([[math.log(50.0)]], requires_grad=True)
        loss, _ = policy_loss(
            logp, torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1), denominator=1.0, delta=delta
        )
        loss.backward()
        assert loss.item() == pytest.approx(delta or 50.0)
        assert logp.grad is not None and logp.grad.item() == pytest.approx(weight)


def test_domains_scale_alike() -> None:
    # Domain 0: groups (1, 0) and (1, 1), std of the four 0.5: 0.5 / 0.5001 = 0.99980. Domain 1: (30, 10), std 14.14214.
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [30.0, 10.0]])
    found = group_advantages(rewards, scale="domain", domain_B=torch.tensor([0, 0, 1]))
    for row, want in zip(found.tolist(), [[0.99980, -0.99980], [0.0, 0.0], [0.70710, -0.70710]], strict=True):
        assert row == pytest.approx(want, abs=1e-5)
    # One domain is TRL's "batch": std of all six, 11.7884, whose groups' means stay their own.
    whole = group_advantages(rewards, scale="domain", domain_B=torch.zeros(3, dtype=torch.long))
    assert whole[2].tolist() == pytest.approx([10 / 11.7885, -10 / 11.7885], abs=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(2, 5))
def test_groups_of_domains_of_their_own_are_scaled_by_themselves(seed: int, count: int) -> None:
    rewards = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)).masked_fill(
        torch.rand(count, 4, generator=torch.Generator().manual_seed(seed + 1)) < 0.2, math.nan
    )
    own = group_advantages(rewards, scale="domain", domain_B=torch.arange(count))
    torch.testing.assert_close(own, group_advantages(rewards), atol=1e-6, rtol=0)
    assert own.sum(1).abs().max() < 1e-4
