"""From evaluation rows to numbers that can be believed: accuracy with its interval, chance and outcomes.

Every function takes the rows that `medr1.evaluation.run` writes and keeps their number as the denominator: a reply
that could not be read is a wrong answer, and its outcome is counted beside it. Undefined is None, never 0. Open
questions are never averaged with multiple choice: `summarise` and `compare` give them under "open".

Rows of questions that the model's own run trained on (`seen_by_run`, see `medr1.data.heldout`) are part of no accuracy,
change or rate here; `summarise` counts them apart.

Intervals (see `medr1.evaluation.intervals`) are 95 % and p-values two-sided, and both count groups (patients, lesions,
images), not rows: several questions about one image are one draw.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy import signal, stats

from medr1.data.records import LETTERS, MODALITIES, QUESTION_TYPES, normalise_answer, normalise_option
from medr1.errors import MedR1Error
from medr1.evaluation.intervals import DIFFERENCE, SHARE, Floats, Interval, interval, mean_interval

Row = dict[str, Any]

AXES = {"modality": MODALITIES, "question_type": QUESTION_TYPES}
"""Fields of a row that divide an evaluation, with their values in order."""
NOT_STATED = "not stated"
"""Cell of the rows whose file names no modality or no question type; it is no part of the macro average."""
OPEN_SCORES = {"yes or no, right": "yes_no", "a text, exactly right": "text", "a text, token F1": "token_f1"}
"""What open questions are scored by, in words, and the parts of `open_table`."""
MIN_N = 30
"""Records below which a cell of a matrix is "too few": it keeps its interval, and is never marked."""
ALPHA = 0.05
"""Family-wise error at which a cell of a matrix is marked."""


def paired_p(differences: Sequence[float], groups: Sequence[Hashable], seed: int = 0) -> float | None:
    """Two-sided p-value of paired differences (-1 to 1 a row) whose rows come in groups; None without rows.

    The sign-flip test over groups (Fisher's randomisation test): under the null each group's sum is as likely its
    negative. Groups of one size of sum flip together as a binomial count. Where all sums are whole numbers, the
    distribution of their total is counted out; so with one row a group it is McNemar's exact test. Else (answers
    averaged over seeds or over an axis) p is (1 + flips as far out) / (1 + 9,999 flips drawn by `seed`).
    """
    if not differences:
        return None
    sums: dict[Hashable, float] = {}
    for difference, group in zip(differences, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + difference
    sum_C = np.array(list(sums.values())).round(9)
    observed = abs(float(sum_C.sum()))
    size_S, count_S = np.unique(np.abs(sum_C[sum_C != 0]), return_counts=True)
    if np.any(size_S % 1):
        rng = np.random.default_rng(seed)
        total_R = np.zeros(9_999)
        for size, count in zip(size_S, count_S, strict=True):
            total_R += size * (2 * rng.binomial(count, 0.5, size=len(total_R)) - count)
        return (1 + int((np.abs(total_R) >= observed - 1e-6).sum())) / (1 + len(total_R))
    positive = np.ones(1)  # chance that the groups with positive sum add up to 0, 1, 2, …
    for size, count in zip(size_S.astype(int), count_S, strict=True):
        step = np.zeros(size * count + 1)
        step[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        positive = signal.convolve(positive, step)  # by Fourier transform where that is faster: exact to about 1e-15
    tail = positive[: (len(positive) - 1 - round(observed)) // 2 + 1].sum()
    return float(np.clip(2 * tail, 0, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for all of them being looked at (Holm, Scand. J. Statist. 1979, 6:65), in the same order."""
    # By hand: statsmodels collects all garbage of the process each time, and takes a second to import.
    p_N = np.array(p_values, dtype=np.float64)
    order = np.argsort(p_N)
    adjusted = np.maximum.accumulate(p_N[order] * np.arange(len(p_N), 0, -1))
    p_N[order] = np.minimum(adjusted, 1)
    return p_N.tolist()


def accuracy_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy of all rows, by modality and by question type: {accuracy, ci95 ([low, high]), n, chance} each.

    Reads `correct` (a bool, or an expected accuracy in [0, 1]), `chance`, `group`, `modality` and
    `question_type`.

    Returns:
        accuracy, ci95, n, chance: over all rows, each counting once (micro average).
        macro: the same four, averaged over the modalities present (n is the number of modalities), see `macro`.
        by_modality, by_question_type: name to the same four, in the order of records.py.
    """
    rows = untrained(rows)
    return {
        **_cell(rows),
        "macro": macro(rows, "modality"),
        **{
            f"by_{axis}": {name: _cell(part) for name, part in _split(rows, axis).items()}
            for axis in ("modality", "question_type")
        },
    }


def macro(rows: Sequence[Row], axis: str) -> dict[str, Any]:
    """Accuracy averaged over the values of an axis, each counting once: {accuracy, ci95, n (values), chance}.

    Rows that state no value are left out. The interval heeds groups that have rows of several values, as an image
    has that is asked about in several question types.

    Args:
        axis: "modality" or "question_type".
    """
    parts = _stated(untrained(rows), axis)
    return {
        "accuracy": _mean([_mean(_values(part)) for part in parts]),
        "ci95": _macro_interval([(_values(part), _groups(part)) for part in parts], SHARE),
        "n": len(parts),
        "chance": _mean([_mean([row["chance"] for row in part]) for part in parts]),
    }


def untrained(rows: Sequence[Row]) -> list[Row]:
    """The rows of questions that the model's run did not train on: all rows of a model that is no run's."""
    return [row for row in rows if row.get("seen_by_run") != "trained on"]


def by_kind(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(rows of multiple choice, rows of open questions, which alone have a token_f1), each in order."""
    return [row for row in rows if "token_f1" not in row], [row for row in rows if "token_f1" in row]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """`accuracy_table` of one evaluation's multiple choice, what became of its replies, and its open questions apart.

    Returns, beside the accuracies, of multiple choice alone:
        outcomes: number of rows by outcome of the extractor, most frequent first.
        unparsed: number of rows without a usable answer.
        truncated: number of replies cut at max_new_tokens.
        format_rate: fraction of replies in exactly the format asked for.
        mean_tokens: tokens a reply, of replies whose tokens are known; None where none are.
        open: `open_table` of the open questions; None where there are none.
        trained_on: accuracy, ci95, n and chance of the questions that the model's run trained on, which are in none of
            the other numbers, and "open": the same of open ones; None where there are none.
    """
    choice, of_own_words = by_kind(untrained(rows))
    known, known_open = by_kind([row for row in rows if row.get("seen_by_run") == "trained on"])
    return {
        **accuracy_table(choice),
        **_replies(choice),
        "open": open_table(of_own_words) if of_own_words else None,
        "trained_on": {**_cell(known), "open": _cell(known_open)} if known or known_open else None,
    }


def open_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Scores of open questions, those that are answered by yes or no (the rows with a `chance`) apart from the others.

    Returns:
        accuracy, ci95, n, chance (None where an item has none): of all rows.
        yes_no, text: the same four, of each kind. An answer is right if it says the right one of yes and no, or is
            the right text up to case, punctuation and articles.
        token_f1: the same four, with the mean of `medr1.data.answers.token_f1` for accuracy, over the rows of "text".
        outcomes, unparsed, truncated, format_rate, mean_tokens: of all rows, see `summarise`.
    """
    rows = untrained(rows)
    yes_no = [row for row in rows if row["chance"] is not None]
    text = [row for row in rows if row["chance"] is None]
    scores = [row["token_f1"] for row in text]
    return {
        **_cell(rows),
        "yes_no": _cell(yes_no),
        "text": _cell(text),
        "token_f1": {
            "accuracy": _mean(scores),
            "ci95": _list(interval(scores, _groups(text))),
            "n": len(text),
            "chance": None,
        },
        **_replies(rows),
    }


def _replies(rows: Sequence[Row]) -> dict[str, Any]:
    outcomes = Counter(row["outcome"] for row in rows)
    return {
        "outcomes": dict(outcomes.most_common()),
        "unparsed": len(rows) - outcomes["letter"] - outcomes["text"],
        "truncated": sum(row["finish"] == "length" for row in rows),
        "format_rate": _mean([row["format_ok"] for row in rows]),
        "mean_tokens": _mean([row["tokens"] for row in rows if row["tokens"] is not None]),
    }


def compare(before: Sequence[Row], after: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Paired change in accuracy between two evaluations of the same records, matched by id.

    Returns, of multiple choice:
        difference, ci95, n, groups, p: over all rows, see `paired_change`.
        macro: the same, averaged over the modalities present (n is the number of modalities).
        by_modality, by_question_type: name to the same.
        gained, lost: number of rows that turned right, that turned wrong.
        open: `paired_change` of the open questions; None where there are none.

    Raises:
        MedR1Error: the two do not cover the same records.
    """
    pairs, open_pairs = by_kind(_pairs(before, after))
    differences = _differences(pairs)
    return {
        **_change(pairs, None, seed),
        "macro": {**_change(pairs, "modality", seed), "n": len(_stated(pairs, "modality"))},
        **{
            f"by_{axis}": {name: _change(part, None, seed) for name, part in _split(pairs, axis).items()}
            for axis in ("modality", "question_type")
        },
        "gained": sum(difference > 0 for difference in differences),
        "lost": sum(difference < 0 for difference in differences),
        "open": _change(open_pairs, None, seed) if open_pairs else None,
    }


def paired_change(
    before: Sequence[Row], after: Sequence[Row], axis: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Change in accuracy between two evaluations of the same records, matched by id.

    Args:
        before, after: rows; `correct` may be a fraction (the mean over seeds). Averaged so, groups still count as one
            draw, and nothing says how another seed would come out.
        axis: None counts each row once (micro average); "modality" or "question_type" counts each of its values once
            (macro average) and leaves out rows that state none.
        seed: of `paired_p`, which draws only where answers are fractions or averages over an axis.

    Returns:
        difference, ci95 (see `intervals.interval`), n (records), groups, p (see `paired_p`).

    Raises:
        MedR1Error: the two do not cover the same records.
    """
    return _change(_pairs(before, after), axis, seed)


def judged(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of one matrix, each what `paired_change` gave, with the verdict that all of them allow.

    Returns:
        The same in the same order, each with
        holm_p: p adjusted (see `holm`) for all the cells of at least MIN_N records; None in a smaller one.
        significant: None in a smaller one ("too few"); else whether holm_p < ALPHA and ci95 excludes 0. So nothing
            inside the noise is marked, neither as a gain nor as a loss.
    """
    enough = [index for index, change in enumerate(changes) if change["n"] >= MIN_N]
    adjusted = dict(zip(enough, holm([changes[index]["p"] for index in enough]), strict=True))
    verdicts = []
    for index, change in enumerate(changes):
        holm_p, significant = adjusted.get(index), None
        if holm_p is not None:
            low, high = change["ci95"]
            significant = holm_p < ALPHA and not low <= 0 <= high
        verdicts.append({**change, "holm_p": holm_p, "significant": significant})
    return verdicts


def flip_rate(rows: Sequence[Row], again: Sequence[Row]) -> dict[str, Any]:
    """Share of records whose chosen option (open: answer) changes between two evaluations: {rate, ci95, n}.

    Options are compared by text (as `normalise_option` reads it), so that an evaluation with the options in another
    order ("permuted") can be set beside one that only asks again ("repeat"), the noise floor. A reply without a
    usable letter counts as an answer of its own: it flips against any option, and not against another such reply.

    Raises:
        MedR1Error: the two do not cover the same records.
    """
    other = _by_id(rows, again)
    rows = untrained(rows)
    flips = [float(chosen(row) != chosen(other[row["id"]])) for row in rows]
    return {"rate": _mean(flips), "ci95": _list(interval(flips, _groups(rows))), "n": len(rows)}


def chosen(row: Row) -> str | None:
    """Text of the chosen option, or of an open question's answer, as two evaluations are compared; None without one."""
    if "token_f1" in row:
        return normalise_answer(row["text"]) if row["text"] else None
    return normalise_option(row["options"][LETTERS.index(row["letter"])]) if row["letter"] else None


def _by_id(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Row]:
    """Rows after by id, once it is certain that they are of the records before."""
    after_by_id = {row["id"]: row for row in after}
    unmatched = {_identity(row) for row in before} ^ {_identity(row) for row in after}
    if unmatched or not len(before) == len(after) == len(after_by_id):
        named = f", such as {min(unmatched)[0]}" if unmatched else ""
        raise MedR1Error(
            f"two evaluations to compare differ in {len(unmatched) or 'repeated'} records{named}; "
            "evaluate both on the same data"
        )
    return after_by_id


def _pairs(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """The rows before, each with the difference that the row after makes; none that either model was trained on."""
    other = _by_id(before, after)
    return [
        {**row, "difference": float(other[row["id"]]["correct"]) - float(row["correct"])}
        for row in untrained(before)
        if untrained([other[row["id"]]])
    ]


def _change(pairs: Sequence[Row], axis: str | None, seed: int) -> dict[str, Any]:
    parts = _stated(pairs, axis) if axis else [pairs] if pairs else []
    counted = [row for part in parts for row in part]
    weighted = [row["difference"] * len(counted) / (len(parts) * len(part)) for part in parts for row in part]
    return {
        "difference": _mean([_mean(_differences(part)) for part in parts]),
        "ci95": _macro_interval([(_differences(part), _groups(part)) for part in parts], DIFFERENCE),
        "n": len(counted),
        "groups": len(set(_groups(counted))),
        "p": paired_p(weighted, _groups(counted), seed),
    }


def _values(rows: Sequence[Row]) -> list[float]:
    return [float(row["correct"]) for row in rows]


def _differences(pairs: Sequence[Row]) -> list[float]:
    return [row["difference"] for row in pairs]


def _groups(rows: Sequence[Row]) -> list[str]:
    return [row["group"] for row in rows]


def _macro_interval(parts: Sequence[tuple[list[float], list[str]]], span: tuple[float, float]) -> list[float] | None:
    """`mean_interval` over parts (values inside `span`, groups), correlated by groups that have rows in several: as
    much as these agree, or where all values of a part are one, so that nothing shows it, as much as they can.
    """
    columns = _columns([groups for _, groups in parts])
    cells = []
    deviation_PC = np.zeros((len(parts), len(columns)))  # P parts, C groups
    for deviation_C, (values, groups) in zip(deviation_PC, parts, strict=True):
        mean = sum(values) / len(values)
        places = [columns[group] for group in groups]
        deviation_C[:] = np.bincount(places, (np.array(values) - mean) / len(values), len(columns))
        ci = interval(values, groups, span)
        assert ci is not None, "a part has rows"
        cells.append((mean, ci))
    covariance_PP = deviation_PC @ deviation_PC.T
    error_P = np.sqrt(np.diag(covariance_PP))
    scale_PP = np.outer(error_P, error_P)
    most_PP = shared_groups([groups for _, groups in parts])
    correlation_PP = np.divide(covariance_PP, scale_PP, out=most_PP, where=scale_PP > 1e-18)
    np.fill_diagonal(correlation_PP, 1)
    return _list(mean_interval(cells, correlation_PP))


def shared_groups(parts: Sequence[Sequence[str]]) -> Floats:
    """The greatest correlation of the means of parts, given the group of each row, as a matrix (parts, parts): the
    cosine of their rows by group. It is 0 where they share no group, and 1 where each group has as many rows in both.
    """
    columns = _columns(parts)
    size_PC = np.zeros((len(parts), len(columns)))
    for size_C, groups in zip(size_PC, parts, strict=True):
        size_C[:] = np.bincount([columns[group] for group in groups], minlength=len(columns))
    length_P = np.linalg.norm(size_PC, axis=1)
    return size_PC @ size_PC.T / np.outer(length_P, length_P)


def _columns(parts: Sequence[Sequence[str]]) -> dict[str, int]:
    """A place for each group of the parts."""
    return {group: place for place, group in enumerate(dict.fromkeys(group for part in parts for group in part))}


def _identity(row: Row) -> tuple[str, ...]:
    return row["id"], str(row["modality"]), str(row["question_type"]), row.get("question", "")


def _cell(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "accuracy": _mean(_values(rows)),
        "ci95": _list(interval(_values(rows), _groups(rows))),
        "n": len(rows),
        "chance": _mean([row["chance"] for row in rows]) if all(row["chance"] is not None for row in rows) else None,
    }


def _split(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row[axis] or NOT_STATED, []).append(row)
    return {name: by_name[name] for name in (*AXES[axis], NOT_STATED) if name in by_name}


def _stated(rows: Sequence[Row], axis: str) -> list[list[Row]]:
    return [part for name, part in _split(rows, axis).items() if name != NOT_STATED]


def _mean(values: Sequence[Any]) -> float | None:
    return sum(values) / len(values) if values else None


def _list(ci: Interval | None) -> list[float] | None:
    return list(ci) if ci else None
