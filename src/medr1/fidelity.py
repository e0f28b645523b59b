"""What a heatmap is worth: does hiding what it marks change the answer, and does it depend on the weights at all?

- Deletion and insertion (Petsiuk et al., arXiv:1806.07421): hide the cells, hottest first, or show them so on the image
  in its mean colour (where the paper blurs), and follow the answer's probability. A map that finds what the answer
  rests on has a small area under the first curve and a large one under the second; cells in random order say what
  small and large mean.
- Randomised weights (Adebayo et al., arXiv:1810.03292): a map that looks the same for a model that knows nothing shows
  the image, not the model.

Shapes: C cells of all images of a record, S steps, R random orders.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from medr1.explain import Heatmap, Subject
from medr1.models import VLM
from medr1.records import LETTERS

STEPS = 8
"""Parts in which cells are hidden, or fewer where there are fewer cells."""
RANDOM_ORDERS = 4
"""A record; it is their mean over many records that counts."""


def curves(subject: Subject, maps: Sequence[Heatmap], *, seed: int) -> dict[str, Any]:
    """The answer's probability as cells are hidden and shown by their score, and in RANDOM_ORDERS drawn by `seed`.

    Returns:
        fraction: (S + 1,) of the cells that are hidden or shown, 0 to 1.
        deletion, insertion, random: (S + 1,) probabilities among the options; random is of hiding, the mean of the
            orders. (Showing a random order is hiding its reverse, so the two have one mean area.)
        deletion_auc, insertion_auc, random_auc: areas under them, trapezoids, in [0, 1].
    """
    score_C = np.concatenate([heatmap.scores.ravel() for heatmap in maps])
    num_cells = len(score_C)
    counts = np.unique(np.linspace(0, num_cells, min(STEPS, num_cells) + 1).round().astype(int))
    rng = np.random.default_rng(seed)
    orders = [np.argsort(-score_C, kind="stable"), *(rng.permutation(num_cells) for _ in range(RANDOM_ORDERS))]
    rank_OC = np.argsort(orders, axis=1)
    hidden_OSC = rank_OC[:, None, :] < counts[:, None]
    shown_SC = ~hidden_OSC[0]  # insertion: what deletion hides is what it shows
    masks = np.concatenate([hidden_OSC, shown_SC[None]]).reshape(-1, num_cells)
    different, which = np.unique(masks, axis=0, return_inverse=True)  # all curves share their ends
    logp = subject.logprobs_without(torch.from_numpy(different))[:, LETTERS.index(maps[0].letter)]
    probability_OS = logp.exp().numpy()[which].reshape(len(orders) + 1, -1)
    fraction = counts / num_cells
    named = {
        "deletion": probability_OS[0],
        "insertion": probability_OS[-1],
        "random": probability_OS[1:-1].mean(0),
    }
    return {
        "fraction": fraction.tolist(),
        **{name: curve.tolist() for name, curve in named.items()},
        **{f"{name}_auc": float(np.trapezoid(curve, fraction)) for name, curve in named.items()},
    }


def randomised(vlm: VLM, *, seed: int) -> VLM:
    """A copy of the model whose every weight tensor has its values in another order, drawn by `seed`.

    So nothing learned is left, and sizes of weights are as they were: activations neither die nor explode.
    """
    model = copy.deepcopy(vlm.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # tied ones once
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
            weight.copy_(weight.flatten()[order].view_as(weight))
    return dataclasses.replace(vlm, model=model, name=f"{vlm.name}, weights shuffled")


def rank_correlation(maps: Sequence[Heatmap], others: Sequence[Heatmap]) -> float | None:
    """Spearman's correlation of two maps' scores over all cells of a record; None where one is flat."""
    pair = [np.concatenate([heatmap.scores.ravel() for heatmap in group]) for group in (maps, others)]
    if any(np.ptp(scores) == 0 for scores in pair):
        return None
    rho = float(stats.spearmanr(*pair).statistic)
    return None if math.isnan(rho) else rho
