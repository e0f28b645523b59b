"""95 % intervals of means whose rows come in groups (patients, lesions, images), the only ones of this package.

Several questions about one image are one draw, so every interval counts groups and not rows, and holds where these are
uneven, few, or all right. benchmarks/coverage.py measures in simulation how often each covers, docs/statistics.md has
its table.

Shapes: N rows, C groups, J different (size, mean) among the groups, K statistics.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from medr1.errors import MedR1Error

Interval = tuple[float, float]
Floats = NDArray[np.float64]

TAIL = 0.025
"""Chance beyond either limit."""
FEW = 2_000
"""Of more groups the means are rounded to 0.001, so that a hundred thousand of them take no minutes."""
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""What a value may be: a score of a row, and the difference of two."""


def interval(values: Sequence[float], groups: Sequence[Hashable], span: tuple[float, float] = SHARE) -> Interval | None:
    """95 % interval (low, high) of the mean of values whose rows come in groups; None without rows.

    The lower limit is Gaffke's (Mathematical Methods of Statistics 2005, 14:451; Phan, Thomas and Learned-Miller,
    arXiv:2106.03163): one more group is added whose rows all have the least value that there is, every group gets a
    random weight (exponential: the Bayesian bootstrap), and the limit is the 2.5 % quantile of the weighted mean of all
    rows, the upper one likewise. Of single rows that are right or wrong it is Clopper and Pearson's exact interval; of
    single paired differences (-1, 0 or 1) it leaves 0 out just where McNemar's exact test has p < 0.05. Deviation, for
    groups of several sizes: a group weighs as much as its rows, and the added one as the group that a row is in has on
    average (Kish's sum of squared sizes over the sum of sizes). No variance is estimated, so it has a width where all
    groups agree, and nothing lies outside of `span`.

    A higher value never lowers a limit, neither the order of rows nor the names of groups count, and `1 - value`
    mirrors it. Simulated (benchmarks/coverage.py: accuracy 0.3, 0.9, 0.99; correlation in groups 0.1, 0.3, 0.9; equal,
    one large, six large, Zipf, 2 to 5 groups) it covers 95 % or more in each, which costs width: least with many groups
    and highly correlated rows, most with few groups whose rows hardly agree.

    Args:
        values: N numbers inside `span`.
        groups: N names; rows of one name are one draw.
        span: the least and the greatest value that there is: SHARE, or DIFFERENCE.

    Raises:
        MedR1Error: another number of groups than of values, or a value outside of `span` or not a number.
    """
    value_N = np.asarray(values, dtype=np.float64)
    low, high = span
    if len(value_N) != len(groups):
        raise MedR1Error(f"interval: {len(value_N)} values and {len(groups)} groups; give one group a value")
    if not np.all(np.abs(value_N - (low + high) / 2) <= (high - low) / 2 + 1e-9):  # NaN is not
        raise MedR1Error(f"interval: a value is not between {low:g} and {high:g}; give the span of the values")
    if not len(value_N):
        return None
    size_C, sum_C = _by_group(value_N.clip(low, high), groups)
    mean = float(sum_C.sum() / size_C.sum())
    mean_C = (sum_C / size_C).round(12 if len(size_C) <= FEW else 3)
    (size_J, mean_J), count_J = np.unique([size_C, mean_C], axis=1, return_counts=True)
    return (
        min(mean, low + _lower_limit(size_J, mean_J - low, count_J)),
        max(mean, high - _lower_limit(size_J, high - mean_J, count_J)),
    )


def mean_interval(cells: Sequence[tuple[float, Interval]], correlation_PP: Floats | None = None) -> Interval | None:
    """Interval of the plain average of estimates, each with its own interval; None for no cells.

    MOVER (Zou and Donner, Statistics in Medicine 2008, 27:1693): distances from estimate to limit add like standard
    errors. Unlike a bootstrap it keeps a width where a cell is all right or all wrong.

    Args:
        cells: (estimate, its interval) each.
        correlation_PP: correlations between the estimates, shape (cells, cells), float64; None for independent ones.
    """
    if not cells:
        return None
    correlation_PP = np.eye(len(cells)) if correlation_PP is None else correlation_PP
    below_C, above_C = np.array([(estimate - low, high - estimate) for estimate, (low, high) in cells]).T
    centre = sum(estimate for estimate, _ in cells) / len(cells)
    below, above = (math.sqrt(max(0.0, side_C @ correlation_PP @ side_C)) / len(cells) for side_C in (below_C, above_C))
    return centre - below, centre + above


def jackknife_interval(
    values: Sequence[float], groups: Sequence[Hashable], span: tuple[float, float] = (-math.inf, math.inf)
) -> Interval | None:
    """95 % interval of the mean of values that know no greatest one, as a log-likelihood, or that keep far from their
    limits, as areas under curves: there `interval`, which thinks of the worst, would be uselessly wide.

    Student's t on the delete-one-group jackknife (Bell and McCaffrey's CV3; MacKinnon, Nielsen and Webb, J. Appl.
    Econometrics 2023, 38:671) with the degrees of freedom of `freedom`. It has no width where all groups agree, and is
    None where one group outweighs the others together.
    """
    if not len(values):
        return None
    size_C, sum_C = _by_group(np.asarray(values, dtype=np.float64), groups)
    degrees = freedom(size_C)
    if degrees < 1 - 1e-9:
        return None
    mean = sum_C.sum() / size_C.sum()
    without_C = (sum_C.sum() - sum_C) / (size_C.sum() - size_C)
    error = math.sqrt((len(size_C) - 1) / len(size_C) * ((without_C - mean) ** 2).sum())
    half = float(stats.t.ppf(1 - TAIL, degrees)) * error
    return max(span[0], float(mean - half)), min(span[1], float(mean + half))


def bootstrap(
    statistics: Callable[[NDArray[np.int64]], Floats], groups: Sequence[Hashable], seed: int
) -> tuple[Floats, float] | None:
    """Statistics that are no means, of 1,000 resamples of whole groups (Efron and Tibshirani 1993).

    Args:
        statistics: of rows, given by their indices (int64, repeated where a group is drawn again), to shape (K,).

    Returns:
        (1000, K), and the share of resamples beyond either limit of a 95 % interval: Phi(-t sqrt((F + 1) / F)) with t
        of F degrees of freedom (Hesterberg, American Statistician 2015, 69:371; see `freedom`), since plain ones cover
        88 to 94 % with 10 to 30. None where one group outweighs the others together.
    """
    group_N = np.unique([*map(str, groups)], return_inverse=True)[1]
    row_N, size_C = np.argsort(group_N, kind="stable"), np.bincount(group_N)
    num, start_C, degrees = len(size_C), np.cumsum(size_C) - size_C, freedom(size_C)
    if degrees < 1 - 1e-9:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(1000):
        picks_C = rng.integers(num, size=num)
        size_P = size_C[picks_C]
        before_P = np.cumsum(size_P) - size_P
        found.append(statistics(row_N[np.repeat(start_C[picks_C] - before_P, size_P) + np.arange(size_P.sum())]))
    t = stats.t.ppf(TAIL, degrees) * math.sqrt((degrees + 1) / degrees)
    return np.array(found), float(stats.norm.cdf(t))


def worth(size_C: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """Equal groups that these are worth, at most C: (sum n)^2 / sum n^2 (Kish, Survey Sampling, 1965)."""
    return float(size_C.sum() ** 2 / (size_C.astype(np.float64) ** 2).sum()) if len(size_C) else 0.0


def freedom(size_C: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """Degrees of freedom of a variance between groups, at most C - 1: Satterthwaite's, for variances that go as n^2."""
    return worth(size_C.astype(np.float64) ** 2) - 1


def _by_group(value_N: Floats, groups: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """Size and sum of each group."""
    names = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    group_N = np.array([names[group] for group in groups], dtype=np.int64)
    return np.bincount(group_N).astype(np.float64), np.bincount(group_N, weights=value_N).astype(np.float64)


def _lower_limit(size_J: Floats, value_J: Floats, count_J: NDArray[np.integer[Any]]) -> float:
    """TAIL quantile of the randomly weighted mean of values of at least 0, a group of value 0 added; see `interval`.

    Args:
        size_J, value_J, count_J: rows and mean of a group, and how many groups are so.
    """
    greatest = float(value_J.max())
    if greatest <= 0:
        return 0.0
    weight_J, value_J, count_J = with_worst(size_J, value_J, count_J)

    def beyond(limit: float) -> float:  # as a normal quantile, which is almost a straight line
        chance = chance_below_zero(weight_J * (value_J - limit), count_J)
        return float(special.ndtri(min(max(chance, 1e-12), 1 - 1e-12)) - special.ndtri(TAIL))

    return float(optimize.brentq(beyond, 1e-9 * greatest, (1 - 1e-9) * greatest, xtol=1e-10))


def with_worst(
    size_J: Floats, value_J: Floats, count_J: NDArray[np.integer[Any]]
) -> tuple[Floats, Floats, NDArray[np.integer[Any]]]:
    """The groups and one of value 0 more, as large as the group that a row is in has on average."""
    added = (count_J * size_J**2).sum() / (count_J * size_J).sum()
    return np.append(size_J, added), np.append(value_J, 0.0), np.append(count_J, 1)


STEP = 0.125
NODES = np.split(np.arange(0, 18, STEP), 9)


def chance_below_zero(scale_J: Floats, count_J: NDArray[np.integer[Any]]) -> float:
    """P(sum of scale * Gamma(count) <= 0), to about 1e-9; scales of both signs.

    The inversion integral of the characteristic function along the line through the saddle point, by the trapezoidal
    rule after t = sinh u (Rice, SIAM J. Sci. Stat. Comput. 1980, 1:438).
    """
    least, greatest = 1 / scale_J.min(), 1 / scale_J.max()  # the transform is finite between these

    def slope(s: float) -> float:
        return float(count_J @ (scale_J / (1 - s * scale_J)))

    saddle = float(optimize.brentq(slope, least * (1 - 1e-12), greatest * (1 - 1e-12), rtol=1e-3))
    unit = 1 / math.sqrt(count_J @ (scale_J / (1 - saddle * scale_J)) ** 2)
    if abs(saddle) < unit / 2:  # too near to the pole at 0
        saddle = max(-unit / 2, least / 2)
    height = -float(count_J @ np.log1p(-saddle * scale_J))
    ratio_J = scale_J / (1 - saddle * scale_J)
    total = 0.0
    for nodes in NODES:
        along = unit * np.sinh(nodes)
        turn_JS = np.multiply.outer(ratio_J, along)
        transform = np.exp(height - count_J @ (np.log1p(turn_JS**2) / 2 - 1j * np.arctan(turn_JS)))
        parts = (transform / (saddle + 1j * along)).real * unit * np.cosh(nodes)
        total += float(parts.sum()) - (float(parts[0]) / 2 if nodes[0] == 0 else 0)
        if abs(transform[-1]) < 1e-13:
            break
    chance = -total * STEP / math.pi
    return chance + 1 if saddle > 0 else chance
