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

Scale = Literal["group", "domain", "none"]
Objective = Literal["grpo", "gspo", "cispo"]
Aggregate = Literal["sequence", "token", "dr_grpo"]


def group_advantages(
    rewards_BG: Tensor, *, scale: Scale = "group", domain_B: Tensor | None = None, ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """How much better each completion is than its group: (B, G), centred in each row.

    "group": (r - mean) / (std + eps) (arXiv:2402.03300, eq. 4.1.1; ddof=1 and eps=1e-4 as in R1-V and TRL).
    "none": r - mean (Dr. GRPO, arXiv:2503.20783: dividing by std favours too easy and too hard questions).
    "domain": (r - mean) / (std + eps) with the std of all rewards of the group's domain: of the whole step where that
    is one domain (arXiv:2508.08221; "batch" in TRL 1.16), else so that each modality or question type pulls alike.
    A group of equal rewards gets exactly 0. Rewards (1, 0, 0, 0) give (1.4997, -0.4999, -0.4999, -0.4999).
    NaN is a completion that no reward applies to: it gets 0, and mean and deviation are those of the others, as in TRL
    1.16. Rewards (1, NaN, 0) give (0.7070, 0, -0.7070); one that is alone in its group gets 0.

    Args:
        domain_B: number of each group's domain, for "domain".

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
    if scale == "group":
        return centred / (group_deviation(rewards_BG, ddof=ddof)[:, None] + eps)
    assert domain_B is not None, "each group's domain"
    deviation_B = torch.zeros_like(rewards_BG[:, 0])
    for domain in domain_B.unique():
        here_B = domain_B == domain
        deviation_B[here_B] = group_deviation(rewards_BG[here_B].view(1, -1), ddof=ddof)
    return centred / (deviation_B[:, None] + eps)


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


def importance_ratio(logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, objective: Objective) -> Tensor:
    """ρ, how much more probable the policy makes what the old one sampled: (N, T), or of whole rows (N, 1) for "gspo".

    Of a token exp(logp - old_logp), of a row the exp of its tokens' mean difference (GSPO, arXiv:2507.18071, section
    4.1): tokens of 2, 1/2 and 1 make a row of 1. exp is `bounded_exp`.
    """
    mask = mask_NT.to(logp_NT.dtype)
    difference_NT = (logp_NT - old_logp_NT) * mask
    if objective == "gspo":
        return bounded_exp(difference_NT.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1))
    return bounded_exp(difference_NT)


def policy_loss(
    logp_NT: Tensor,
    old_logp_NT: Tensor | None,
    advantage_N: Tensor,
    mask_NT: Tensor,
    *,
    denominator: float,
    objective: Objective = "grpo",
    aggregate: Aggregate = "sequence",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float = 0.0,
    beta: float = 0.0,
    ref_logp_NT: Tensor | None = None,
    kl_by_ratio: bool = False,
    kl_clamp: float = 0.0,
    weight_NT: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped objective with a KL penalty, to minimise (arXiv:2402.03300, eq. 3).

    Per token, with ρ of `importance_ratio` and sg the value without its gradient:
        "grpo", "gspo": -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) + beta k3;
        "cispo": -sg(min(ρ, 1 + clip_high)) A logp + beta k3 (arXiv:2506.13585, section 3.1): a token beyond the bound
            keeps the bound's gradient, where the others give it none, and there is no lower bound.
    clip_high may differ from clip_low (arXiv:2503.14476).
    Then, over the denominator (see `loss_denominator`):
        "sequence": mean over the tokens of each row, summed over rows (GRPO as published);
        "token": sum over all tokens (DAPO, arXiv:2503.14476);
        "dr_grpo": the same sum over a constant number of tokens (arXiv:2503.20783).

    Args:
        logp_NT: of the policy, with gradient.
        old_logp_NT: of the policy that sampled; None on the first update after sampling: it is logp itself.
        mask_NT: 1 at tokens that count.
        delta: ρ is cut here for worse completions too, whose -ρ A knows no other bound (two-sided clip,
            arXiv:2505.07291, section 4.1); above 1 + clip_high. 0: it is not.
        ref_logp_NT: of the reference; needed if beta > 0.
        kl_by_ratio: weight the KL term by ρ, which makes its gradient that of the true KL where ρ is a token's
            (arXiv:2512.02556; `use_bias_correction_kl` and the default of TRL 1.16); False is GRPO as published.
        kl_clamp: k3 is cut here, so that a token far from the reference has no gradient from it and cannot rule the
            step (`kl_penalty` "low_var_kl" in verl/trainer/ppo/core_algos.py cuts at 10). 0: it is not.
        weight_NT: factor of each token's clipped term, not of its KL; see `rollout_weights`.

    Returns:
        The loss, and sums over tokens for the log: "tokens", "clipped_low", "clipped_high", "ratio", and "kl"
        where a reference is given (divide by "tokens" for means).
    """
    mask = mask_NT.to(logp_NT.dtype)
    old = logp_NT.detach() if old_logp_NT is None else old_logp_NT
    ratio = importance_ratio(logp_NT, old, mask_NT, objective)
    advantage = advantage_N.to(logp_NT.dtype)[:, None]
    if objective == "cispo":
        loss_NT = -ratio.clamp(max=1 + clip_high).detach() * advantage * logp_NT
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        bounded = ratio.clamp(max=delta) if delta else ratio
        loss_NT = -torch.minimum(bounded * advantage, clipped * advantage)
    if weight_NT is not None:
        loss_NT = loss_NT * weight_NT
    below = (ratio < 1 - clip_low) & (advantage < 0) & (objective != "cispo")
    sums = {
        "tokens": mask.sum(),
        "ratio": (ratio * mask).sum(),
        "clipped_low": (below * mask).sum(),
        "clipped_high": (((ratio > 1 + clip_high) & (advantage > 0)) * mask).sum(),
    }
    if ref_logp_NT is not None:
        if kl_by_ratio and ratio.shape == mask.shape and not kl_clamp:
            # ρ k3 multiplied out, so that its gradient, -ρ d, is right beyond MAX_EXPONENT too
            kl_NT = bounded_exp(ref_logp_NT - old) - ratio * (ref_logp_NT - logp_NT + 1)
        else:
            kl_NT = kl_k3(logp_NT, ref_logp_NT).clamp(max=kl_clamp or torch.inf)
            kl_NT = ratio * kl_NT if kl_by_ratio else kl_NT
        sums["kl"] = (kl_NT * mask).sum()
        if beta != 0:
            loss_NT = loss_NT + beta * kl_NT
    assert beta == 0 or ref_logp_NT is not None, "beta > 0 needs the reference's log-probs"

    loss_N = row_means(loss_NT, mask_NT) if aggregate == "sequence" else (loss_NT * mask).sum(1)
    return loss_N.sum() / denominator, {name: float(value.detach()) for name, value in sums.items()}


def entropy_share(entropy_NT: Tensor, mask_NT: Tensor, *, num_tokens: float) -> Tensor:
    """These rows' part of the mean entropy over the step's tokens (nats), for a bonus: loss - bonus * mean.

    A mean over tokens whatever the loss is divided by, as `entropy_coef` of TRL 1.16 (arXiv:2505.22312), so that one
    bonus means the same in each objective.

    Args:
        entropy_NT: with gradient.
        num_tokens: that count, of the whole step.
    """
    return (entropy_NT * mask_NT).sum() / num_tokens


def perception_term(
    logp_NT: Tensor, other_logp_NT: Tensor, mask_NT: Tensor, *, cap: float, denominator: float
) -> tuple[Tensor, float]:
    """How much the policy's tokens owe to the image, to be made large: a mean over each row's tokens, rows summed.

    Per token `kl_k3` of the policy under the row's own image from the policy under another one (PAPO, arXiv:2507.06448,
    the implicit perception loss, whose other image is the own one with patches masked). It has no upper bound and can
    be driven up for ever by what nobody would say of the other image, so each token's is cut at `cap` nats, beyond
    which there is nothing to gain.

    Args:
        mask_NT: 1 at tokens of rows that have another image.
        denominator: rows of the whole step.

    Returns:
        The term, with gradient from both images' log-probs, and its sum over tokens for the log, uncut.
    """
    mask = mask_NT.to(logp_NT.dtype)
    kl_NT = kl_k3(logp_NT, other_logp_NT) * mask
    return row_means(kl_NT.clamp(max=cap), mask_NT).sum() / denominator, float(kl_NT.detach().sum())


def row_means(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Mean over each row's tokens (N,); 0 of a row without one."""
    mask = mask_NT.to(values_NT.dtype)
    return (values_NT * mask).sum(1) / mask.sum(1).clamp(min=1)


def above_chance(logp_NO: Tensor, offered_NO: Tensor, chosen_N: Tensor, *, denominator: float) -> tuple[Tensor, float]:
    """How much likelier than chance an answer is under another image, to be made small: nats, summed over rows.

    Per row max(0, log q + log O), with q the share of the chosen option among the O that are offered, each where the
    reply first says its own (`looking.choices`): 1.386 of an answer among four that is certain whatever is shown. It
    is a share, so that what an answer loses goes to the other options, and not to replies that say none. At chance the
    gradient ends, so that nothing is driven on without end.

    Args:
        logp_NO: log-probability of each option under the other image, in the reply's place of its answer.
        offered_NO: which of them there are.
        chosen_N: the one that the reply says; rows of -1 count nothing.
        denominator: rows of the whole step.

    Returns:
        The term, with gradient, and the number of rows above chance.
    """
    rows = chosen_N >= 0
    logq_MO = logp_NO[rows].masked_fill(~offered_NO[rows], -torch.inf).log_softmax(-1)
    logq_M = logq_MO.gather(1, chosen_N[rows, None])[:, 0]
    above_M = (logq_M + offered_NO[rows].sum(1).log()).clamp(min=0)
    return above_M.sum() / denominator, float((above_M > 0).sum())
