"""From evaluation rows to numbers that can be believed: accuracy with its interval, chance and outcomes.

Every function takes the rows that `medr1.evaluation` writes and keeps their number as the denominator: a reply
that could not be read is a wrong answer, and its outcome is counted beside it. Undefined is None, never 0.

Intervals are 95 % and count groups (patients, lesions, images), not rows: several questions about one image
are one draw. Where each row has its own group they are Wilson's. Paired differences are bootstrapped by
group.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from medr1.errors import MedR1Error
from medr1.records import MODALITIES, QUESTION_TYPES

Row = dict[str, Any]
Interval = tuple[float, float]

NOT_STATED = "not stated"
"""Cell of the rows whose file names no modality or no question type; it is no part of the macro average."""


def wilson(k: float, n: float, level: float = 0.95) -> Interval | None:
    """Wilson's score interval for k right of n (JASA 1927, 22:209); None where n is 0.

    k and n may be fractions (expected accuracy under ties, effective sample sizes), which scipy's
    `binomtest(k, n).proportion_ci(method="wilson")` refuses; for whole numbers the two agree.
    """
    if n <= 0:
        return None
    z = float(stats.norm.ppf((1 + level) / 2))
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(values: Sequence[float], groups: Sequence[Hashable], level: float = 0.95) -> Interval | None:
    """Interval of the mean of values in [0, 1] whose rows come in groups; None where there are no rows.

    Wilson's interval at the effective sample size: rows over Kish's design effect (the variance of the mean
    between groups over the binomial one), corrected for few groups by the ratio of t quantiles (Korn and
    Graubard, Survey Methodology 1998, 24:193). Deviation: the effective size never exceeds the number of
    rows, and where all groups agree (no variance to estimate) it is the number of groups. With one row a
    group it is Wilson's interval.
    """
    n = len(values)
    if n == 0:
        return None
    mean = sum(values) / n
    deviations: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        deviations[group] = deviations.get(group, 0.0) + value - mean
    num_groups = len(deviations)
    if num_groups == n:
        return wilson(mean * n, n, level)
    between = sum(deviation**2 for deviation in deviations.values()) / n**2
    if num_groups == 1 or between == 0:
        return wilson(mean * num_groups, num_groups, level)
    between *= num_groups / (num_groups - 1)
    quantile = (1 + level) / 2
    few = float(stats.t.ppf(quantile, n - 1) / stats.t.ppf(quantile, num_groups - 1)) ** 2
    effective = min(n, mean * (1 - mean) / between * few)
    return wilson(mean * effective, effective, level)


def mean_interval(cells: Sequence[tuple[float, Interval]]) -> Interval | None:
    """Interval of the plain average of independent accuracies, each with its own interval; None for no cells.

    MOVER (Zou and Donner, Statistics in Medicine 2008, 27:1693): distances from estimate to limit add in
    squares. Unlike a bootstrap it keeps a width where a cell is all right or all wrong.
    """
    if not cells:
        return None
    centre = sum(estimate for estimate, _ in cells) / len(cells)
    below = math.sqrt(sum((estimate - low) ** 2 for estimate, (low, _) in cells)) / len(cells)
    above = math.sqrt(sum((high - estimate) ** 2 for estimate, (_, high) in cells)) / len(cells)
    return max(0.0, centre - below), min(1.0, centre + above)


def cluster_bootstrap(values: Sequence[float], clusters: Sequence[Hashable], seed: int) -> Interval | None:
    """95 % percentile interval of the mean of `values`, resampling whole clusters (Efron, Tibshirani 1993).

    None where resampling has nothing to vary: no rows, one cluster, or the same mean in every cluster.
    """
    return _percentiles(_bootstrap_means(values, clusters, np.random.default_rng(seed)))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided McNemar p-value of paired answers: binomial on the discordant pairs, 1 without any.

    It takes rows as independent: where a group has several rows, trust the bootstrapped difference instead.
    """
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def accuracy_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy of all rows, by modality and by question type: {accuracy, ci95 ([low, high]), n, chance} each.

    Reads `correct` (a bool, or an expected accuracy in [0, 1]), `chance`, `group`, `modality` and
    `question_type`.

    Returns:
        accuracy, ci95, n, chance: over all rows, each counting once.
        macro: the same four, averaged over the modalities present (n is the number of modalities).
        by_modality, by_question_type: name to the same four, in the order of records.py.
    """
    by_modality = {name: _cell(part) for name, part in _split(rows, "modality", MODALITIES).items()}
    stated = [cell for name, cell in by_modality.items() if name != NOT_STATED]
    return {
        **_cell(rows),
        "macro": {
            "accuracy": _mean([cell["accuracy"] for cell in stated]),
            "ci95": _list(mean_interval([(cell["accuracy"], cell["ci95"]) for cell in stated])),
            "n": len(stated),
            "chance": _mean([cell["chance"] for cell in stated]),
        },
        "by_modality": by_modality,
        "by_question_type": {name: _cell(part) for name, part in _split(rows, "question_type", QUESTION_TYPES).items()},
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """`accuracy_table` of one evaluation, and what became of its replies.

    Returns, beside the accuracies:
        outcomes: number of rows by outcome of the extractor, most frequent first.
        unparsed: number of rows without a usable letter.
        truncated: number of replies cut at max_new_tokens.
        format_rate: fraction of replies in exactly the format asked for.
        mean_tokens: tokens a reply.
    """
    outcomes = Counter(row["outcome"] for row in rows)
    return {
        **accuracy_table(rows),
        "outcomes": dict(outcomes.most_common()),
        "unparsed": len(rows) - outcomes["letter"],
        "truncated": sum(row["finish"] == "length" for row in rows),
        "format_rate": _mean([row["format_ok"] for row in rows]),
        "mean_tokens": _mean([row["tokens"] for row in rows]),
    }


def compare(before: Sequence[Row], after: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Paired change in accuracy between two evaluations of the same records, matched by id.

    Returns:
        difference, ci95, n: over all rows.
        macro: the same, averaged over the modalities present, each modality's groups resampled apart.
        by_modality, by_question_type: name to {difference, ci95, n}.
        gained, lost: number of rows that turned right, that turned wrong.
        mcnemar_p: see `mcnemar`.

    Raises:
        MedR1Error: the two do not cover the same records.
    """
    after_by_id = {row["id"]: row for row in after}
    unmatched = {_identity(row) for row in before} ^ {_identity(row) for row in after}
    if unmatched or not len(before) == len(after) == len(after_by_id):
        named = f", such as {min(unmatched)[0]}" if unmatched else ""
        raise MedR1Error(
            f"two evaluations to compare differ in {len(unmatched) or 'repeated'} records{named}; "
            "evaluate both on the same data"
        )
    pairs = [{**row, "difference": float(after_by_id[row["id"]]["correct"]) - float(row["correct"])} for row in before]
    rng = np.random.default_rng(seed)

    def draws(rows: Sequence[Row]) -> np.ndarray:
        return _bootstrap_means([row["difference"] for row in rows], [row["group"] for row in rows], rng)

    def change(rows: Sequence[Row], draws_R: np.ndarray) -> dict[str, Any]:
        return {
            "difference": _mean([row["difference"] for row in rows]),
            "ci95": _list(_percentiles(draws_R)),
            "n": len(rows),
        }

    modalities = _split(pairs, "modality", MODALITIES)
    modality_draws = {name: draws(part) for name, part in modalities.items()}
    by_modality = {name: change(part, modality_draws[name]) for name, part in modalities.items()}
    stated = [name for name in modalities if name != NOT_STATED]
    macro_draws = sum((modality_draws[name] for name in stated), np.zeros(1)) / max(1, len(stated))
    return {
        **change(pairs, draws(pairs)),
        "macro": {
            "difference": _mean([by_modality[name]["difference"] for name in stated]),
            "ci95": _list(_percentiles(macro_draws)),
            "n": len(stated),
        },
        "by_modality": by_modality,
        "by_question_type": {
            name: change(part, draws(part)) for name, part in _split(pairs, "question_type", QUESTION_TYPES).items()
        },
        "gained": sum(row["difference"] > 0 for row in pairs),
        "lost": sum(row["difference"] < 0 for row in pairs),
        "mcnemar_p": mcnemar([row["correct"] for row in before], [after_by_id[row["id"]]["correct"] for row in before]),
    }


def _identity(row: Row) -> tuple[str, str, str]:
    return row["id"], str(row["modality"]), str(row["question_type"])


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    values = [float(row["correct"]) for row in rows]
    return {
        "accuracy": _mean(values),
        "ci95": _list(interval(values, [row["group"] for row in rows])),
        "n": len(rows),
        "chance": _mean([row["chance"] for row in rows]),
    }


def _split(rows: Sequence[Row], field: str, order: Sequence[str]) -> dict[str, list[Row]]:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row[field] or NOT_STATED, []).append(row)
    return {name: by_name[name] for name in (*order, NOT_STATED) if name in by_name}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _list(ci: Interval | None) -> list[float] | None:
    return list(ci) if ci else None


def _bootstrap_means(
    values: Sequence[float], clusters: Sequence[Hashable], rng: np.random.Generator, num_resamples: int = 2000
) -> np.ndarray:
    """Means of resampled clusters, shape (num_resamples,), float64; (1,) where no resample could differ."""
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    counts = Counter(clusters)
    sum_C = np.array([sums[cluster] for cluster in counts])
    size_C = np.array([counts[cluster] for cluster in counts], dtype=np.float64)
    if not counts or np.ptp(sum_C / size_C) == 0:
        return np.array([sum_C.sum() / max(1.0, size_C.sum())])
    at_once = max(1, 4_000_000 // len(counts))  # 32 MB of indices, however large the evaluation
    means = []
    for start in range(0, num_resamples, at_once):
        picks_RC = rng.integers(len(counts), size=(min(at_once, num_resamples - start), len(counts)))
        means.append(sum_C[picks_RC].sum(1) / size_C[picks_RC].sum(1))
    return np.concatenate(means)


def _percentiles(draws: np.ndarray) -> Interval | None:
    if draws.size == 1:
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
