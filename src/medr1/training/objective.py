"""GRPO (arXiv:2402.03300): the maths alone, on tensors.

Where published codes differ, the choice is an argument with a name. Every loss divides by a `denominator` of
the whole optimizer step, so that micro-batches of any size add up to the gradient of the whole batch.

Shapes: B prompts, G completions each, N = B*G rows, T completion tokens.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from medr1.errors import MedR1Error

Scale = Literal["group", "none"]
Aggregate = Literal["sequence", "token", "dr_grpo"]


def group_advantages(rewards_BG: Tensor, *, scale: Scale = "group", ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """How much better each completion is than its group: (B, G), centred in each row.

    "group": (r - mean) / (std + eps) (arXiv:2402.03300, eq. 4.1.1; ddof=1 and eps=1e-4 as in R1-V and TRL).
    "none": r - mean (Dr. GRPO, arXiv:2503.20783: dividing by std favours too easy and too hard questions).
    A group of equal rewards gets exactly 0. Rewards (1, 0, 0, 0) give (1.4997, -0.4999, -0.4999, -0.4999).
    NaN is a completion that no reward applies to: it gets 0, and mean and deviation are those of the others, as in TRL
    1.16. Rewards (1, NaN, 0) give (0.7070, 0, -0.7070); one that is alone in its group gets 0.

    Raises:
        MedR1Error: G = 1, where there is nothing to compare with.
    """
    if rewards_BG.shape[1] < 2:
        raise MedR1Error(
            "GRPO compares the completions of one prompt, and there is only one; set num_completions to 2 or more"
        )
    apart = rewards_BG.isnan()
    # Rounding of the mean must not turn equal rewards into a tiny advantage over a tiny deviation.
    least_B = rewards_BG.masked_fill(apart, torch.inf).amin(dim=1, keepdim=True)
    equal_B = least_B >= rewards_BG.masked_fill(apart, -torch.inf).amax(dim=1, keepdim=True)
    centred = (rewards_BG - rewards_BG.nanmean(dim=1, keepdim=True)).masked_fill(apart | equal_B, 0.0)
    if scale == "none":
        return centred
    return centred / (group_deviation(rewards_BG, ddof=ddof)[:, None] + eps)


def group_deviation(rewards_BG: Tensor, *, ddof: int = 1) -> Tensor:
    """Standard deviation of each group's rewards (B,), NaN left out; 0 where no more than `ddof` are left."""
    centred = (rewards_BG - rewards_BG.nanmean(dim=1, keepdim=True)).nan_to_num(0.0)
    count_B = (~rewards_BG.isnan()).sum(1) - ddof
    return (centred.square().sum(1) / count_B.clamp(min=1)).sqrt()


MAX_EXPONENT = 20.0
"""Nats beyond which `bounded_exp` goes on as a straight line."""


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp(x) for x up to MAX_EXPONENT, above it its tangent there, exp(20) (x - 19): no log-probs overflow it.

    verl cuts at the same bound (`clamp(kl, -20, 20)` in verl/trainer/ppo/core_algos.py), and so gives the tokens that
    are furthest off no gradient; here they keep the bound's, 4.9e8, and the gradient is cut by its norm as always.
    """
    tangent = math.exp(MAX_EXPONENT) * (1 + exponent - MAX_EXPONENT)
    return torch.where(exponent < MAX_EXPONENT, exponent.clamp(max=MAX_EXPONENT).exp(), tangent)


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(policy ‖ reference) at each sampled token, never negative: exp(d) - d - 1 with d = ref_logp - logp.

    Source: estimator k3 of http://joschu.net/blog/kl-approx.html, as in arXiv:2402.03300, eq. 4; exp is `bounded_exp`.
    """
    difference = ref_logp - logp
    return bounded_exp(difference) - difference - 1


def rollout_weights(
    logp_NT: Tensor, rollout_logp_NT: Tensor, mask_NT: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, float]]:
    """Truncated importance weights of tokens that another engine sampled: min(π / μ, cap), without gradient.

    A server computes the policy π with other kernels and types, so that what it samples from is some μ beside π. The
    weight puts the expectation right but for the part above the cap, which bounds the variance (Ionides 2008,
    doi:10.1198/106186008X320456). Each token has its own, as in https://fengyao.notion.site/off-policy-rl, cap 2.
    A token of π = 2/5 that was sampled with μ = 1/2 gets 0.8; one of π = 3/5, μ = 1/5 gets 2 of its 3.

    Args:
        logp_NT: of the policy with the weights that the server had.
        rollout_logp_NT: of the server.
        mask_NT: 1 at tokens that count.

    Returns:
        Weights (N, T), and sums over tokens for the log: "mismatch_abs" |log π - log μ|, "mismatch_kl" KL(μ ‖ π)
        by `kl_k3`, "capped".
    """
    mask = mask_NT.to(logp_NT.dtype)
    difference = (logp_NT.detach() - rollout_logp_NT) * mask
    ratio = bounded_exp(difference)
    sums = {
        "mismatch_abs": difference.abs().sum(),
        "mismatch_kl": (kl_k3(torch.zeros_like(difference), difference) * mask).sum(),
        "capped": (ratio > cap).to(mask.dtype).mul(mask).sum(),
    }
    return ratio.clamp(max=cap), {name: float(value) for name, value in sums.items()}


def loss_denominator(mask_NT: Tensor, aggregate: Aggregate, max_tokens: int | None = None) -> float:
    """What `policy_loss` divides by, for the rows of the whole step (add it over processes, micro-batches).

    "sequence": rows; "token": tokens; "dr_grpo": rows times max_tokens.
    """
    if aggregate == "token":
        return float(mask_NT.sum())
    if aggregate == "sequence":
        return float(len(mask_NT))
    assert max_tokens is not None, "dr_grpo divides by max_tokens"
    return float(len(mask_NT) * max_tokens)


def policy_loss(
    logp_NT: Tensor,
    old_logp_NT: Tensor | None,
    advantage_N: Tensor,
    mask_NT: Tensor,
    *,
    denominator: float,
    aggregate: Aggregate = "sequence",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    ref_logp_NT: Tensor | None = None,
    kl_by_ratio: bool = False,
    weight_NT: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped objective with a KL penalty, to minimise (arXiv:2402.03300, eq. 3).

    clip_high may differ from clip_low (arXiv:2503.14476).
    Per token: -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) + beta k3, with ρ = exp(logp - old_logp)
    (`bounded_exp`).
    Then, over the denominator (see `loss_denominator`):
        "sequence": mean over the tokens of each row, summed over rows (GRPO as published);
        "token": sum over all tokens (DAPO, arXiv:2503.14476);
        "dr_grpo": the same sum over a constant number of tokens (arXiv:2503.20783).

    Args:
        logp_NT: of the policy, with gradient.
        old_logp_NT: of the policy that sampled; None on the first update after sampling: it is logp itself.
        mask_NT: 1 at tokens that count.
        ref_logp_NT: of the reference; needed if beta > 0.
        kl_by_ratio: weight the KL term by ρ, which makes its gradient that of the true KL (arXiv:2512.02556;
            the default of TRL 1.16); False is GRPO as published.
        weight_NT: factor of each token's clipped term, not of its KL; see `rollout_weights`.

    Returns:
        The loss, and sums over tokens for the log: "tokens", "clipped_low", "clipped_high", "ratio", and "kl"
        where a reference is given (divide by "tokens" for means).
    """
    mask = mask_NT.to(logp_NT.dtype)
    old = logp_NT.detach() if old_logp_NT is None else old_logp_NT
    ratio = bounded_exp((logp_NT - old) * mask)
    advantage = advantage_N.to(logp_NT.dtype)[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss_NT = -torch.minimum(ratio * advantage, clipped * advantage)
    if weight_NT is not None:
        loss_NT = loss_NT * weight_NT
    sums = {
        "tokens": mask.sum(),
        "ratio": (ratio * mask).sum(),
        "clipped_low": ((ratio < 1 - clip_low) & (advantage < 0)).to(mask.dtype).mul(mask).sum(),
        "clipped_high": ((ratio > 1 + clip_high) & (advantage > 0)).to(mask.dtype).mul(mask).sum(),
    }
    if ref_logp_NT is not None:
        if kl_by_ratio:  # ρ k3 multiplied out, so that its gradient, -ρ d, is right beyond MAX_EXPONENT too
            kl_NT = (bounded_exp(ref_logp_NT - old) - ratio * (ref_logp_NT - logp_NT + 1)) * mask
        else:
            kl_NT = kl_k3(logp_NT, ref_logp_NT) * mask
        sums["kl"] = kl_NT.sum()
        if beta != 0:
            loss_NT = loss_NT + beta * kl_NT
    assert beta == 0 or ref_logp_NT is not None, "beta > 0 needs the reference's log-probs"

    loss_N = (loss_NT * mask).sum(dim=1)
    if aggregate == "sequence":
        loss_N = loss_N / mask.sum(dim=1).clamp(min=1)
    return loss_N.sum() / denominator, {name: float(value.detach()) for name, value in sums.items()}
