"""Whether a confidence means what it says, and when to abstain: read from rows that have `option_probs`.

Confidence is the probability of the option that was chosen, or 0 where the reply chose none. A temperature and a
threshold are taken from one part of the groups (patients, images) and judged on the others, never on the same. Rows
without a usable answer stay in every denominator: they are wrong, and the first to be abstained from.

    medr1 eval --model runs/mine/model --mode no-think --score-options --out rows.jsonl
    medr1 calibrate rows.jsonl --out calibration.json
    medr1 eval --model runs/mine/model --mode no-think --score-options --out rows.jsonl --calibration calibration.json

Shapes: N rows, K bins.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import optimize, special

from medr1.data.records import LETTERS, normalise_option, write_atomic
from medr1.errors import MedR1Error
from medr1.evaluation.intervals import Interval, bootstrap, interval, jackknife_interval, worth
from medr1.evaluation.metrics import MIN_N, Row, untrained
from medr1.evaluation.rows import differing, said

NUM_BINS = 15
TEMPERATURES = (0.05, 20.0)
"""Range of the fitted temperature."""
COVERAGE = 0.8
"""Share of the questions at which accuracy among the most confident answers is given."""


class Calibration(BaseModel):
    """What `medr1 calibrate` found on its part of the groups, as stored in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weights: str | None = None
    """As the rows name them; None where they did not."""
    mode: str
    scoring: str
    """"options" or "votes": another way of weighing options needs another calibration."""
    temperature: float = Field(gt=0)
    """Log-probabilities of options are divided by it."""
    threshold: float
    """Answers with a lower confidence, at that temperature, are abstained from."""
    target: Literal["accuracy", "coverage"]
    target_value: float
    share: float
    seed: int
    """Which groups it was fitted on, see `calibrating`."""
    n: int
    """Rows of these."""
    coverage: float
    """Share of these rows that are answered."""
    accuracy: float
    """Of the answered ones."""
    ci95: Interval


def abstains(confidence: float | None, threshold: float) -> bool:
    """Whether an answer of this confidence (None: no option was chosen) is not to be given."""
    return confidence is None or confidence < threshold


def tempered(option_probs: Sequence[float], temperature: float) -> list[float]:
    """softmax(log p / temperature): the same order of options, the surer the lower the temperature."""
    if temperature == 1:
        return list(option_probs)  # to the last digit
    logp = _log(np.array(option_probs)) / temperature
    weights = np.exp(logp - logp.max())
    return (weights / weights.sum()).tolist()


def with_confidence(row: Row) -> Row:
    """The row with the confidence of its letter and, if it has a threshold, whether it is abstained from."""
    if "option_probs" not in row:
        return row
    probs = tempered(row["option_probs"], row.get("temperature", 1.0))
    confidence = probs[LETTERS.index(row["letter"])] if row["letter"] else None
    abstained = {"abstained": abstains(confidence, row["threshold"])} if "threshold" in row else {}
    return {**row, "confidence": confidence, **abstained}


def applied(rows: Sequence[Row], calibration: Calibration) -> list[Row]:
    """The rows at the calibration's temperature, each with whether it is abstained from.

    Raises:
        MedR1Error: the rows have no option_probs, or were made by another model, in another mode or way.
    """
    about = calibration.model_dump()
    for row in _weighed(rows):
        if differing(about, row, ("model",)):
            raise MedR1Error(
                f"the calibration is of {said(about, 'model')}, these rows are of {said(row, 'model')}; calibrate such"
                " rows first"
            )
        made, wanted = (row["mode"], row["scoring"]), (calibration.mode, calibration.scoring)
        if made != wanted:
            raise MedR1Error(
                f"the calibration is for mode {wanted[0]} scored by {wanted[1]}, these rows are mode {made[0]} scored"
                f" by {made[1]}; calibrate such rows first"
            )
    settings = {"temperature": calibration.temperature, "threshold": calibration.threshold}
    return [with_confidence({**row, **settings}) for row in rows]


def calibrating(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to fit on, rows to judge on): about `share` of the groups, by seed and group alone.

    So rows of other models and conditions divide in the same way. Questions that the model's run trained on are in
    neither part.
    """
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in untrained(rows):
        draw = int.from_bytes(hashlib.sha256(f"{seed} {row['group']}".encode()).digest()[:8]) / 2**64
        parts[draw >= share].append(row)
    return parts


def calibrate(
    rows: Sequence[Row],
    *,
    target: Literal["accuracy", "coverage"] = "coverage",
    target_value: float = COVERAGE,
    share: float = 0.5,
    seed: int = 0,
) -> Calibration:
    """Fit a temperature and choose a threshold on `share` of the groups.

    Args:
        rows: of one evaluation.
        target: what the threshold is chosen for: at most so much is answered ("coverage"), or as much as can be with
            so much of it right ("accuracy").

    Raises:
        MedR1Error: no option_probs, fewer than MIN_N rows to fit on, or an accuracy that no threshold reaches.
    """
    if rows and (condition := rows[0].get("condition", "image")) != "image":
        raise MedR1Error(f"these rows are of condition {condition}; calibrate on rows of condition image")
    fitted = calibrating(_weighed(rows), share, seed)[0]
    if len(fitted) < MIN_N:
        raise MedR1Error(
            f"only {len(fitted)} of {len(rows)} rows are there to calibrate on, of {MIN_N} needed; evaluate more"
            " records or raise --share"
        )
    temperature = fit_temperature(fitted)
    at_temperature = [with_confidence({**row, "temperature": temperature}) for row in fitted]
    threshold = choose_threshold(at_temperature, target, target_value)
    cell = answered([with_confidence({**row, "threshold": threshold}) for row in at_temperature])
    assert cell["ci95"], "at least MIN_N rows are answered"
    return Calibration(
        **{name: fitted[0].get(name) for name in ("model", "weights", "mode", "scoring")},
        temperature=temperature,
        threshold=threshold,
        target=target,
        target_value=target_value,
        share=share,
        seed=seed,
        n=len(fitted),
        **cell,
    )


def fit_temperature(rows: Sequence[Row]) -> float:
    """The temperature of the least negative log-likelihood of the right options (Guo et al., arXiv:1706.04599).

    Not lower or higher than TEMPERATURES. Where every right option is the most probable one, it stays 1: any lower one
    would fit better, which does not say how low, and the lowest would make all answers equally certain.
    """

    options = logp_NO, right_NO = _options(rows)
    if (np.where(right_NO, logp_NO, -np.inf).max(1) >= logp_NO.max(1)).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(_nll(*options, float(np.exp(log_temperature))).mean())

    found = optimize.minimize_scalar(
        loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(found.x))


def choose_threshold(rows: Sequence[Row], target: Literal["accuracy", "coverage"], value: float) -> float:
    """A confidence below which to abstain, see `calibrate`; equal confidences are answered or abstained together.

    Raises:
        MedR1Error: the value is not above 0 and at most 1, or no threshold reaches it with at least MIN_N answers.
    """
    if not 0 < value <= 1:
        raise MedR1Error(f"target {target} is {value}; give a number above 0 and at most 1")
    confidence_N, correct_N = _sorted(rows)
    answered_N = np.arange(1, len(rows) + 1)
    ends = np.append(confidence_N[1:] < confidence_N[:-1], True)  # the last of each run of equal confidences
    reached = (
        answered_N <= value * len(rows) + 1e-9 if target == "coverage" else np.cumsum(correct_N) / answered_N >= value
    )
    possible = np.flatnonzero(ends & reached & (answered_N >= min(MIN_N, len(rows))))
    if not len(possible):
        best = np.max((np.cumsum(correct_N) / answered_N)[min(MIN_N, len(rows)) - 1 :])
        alike = int((confidence_N == confidence_N[0]).sum())
        told = f" ({alike} answers share the highest confidence)" if alike > value * len(rows) else ""
        raise MedR1Error(
            f"no threshold answers {MIN_N} or more of {len(rows)} questions with {target} {value}"
            + (f" (the best is {best:.3f}); lower the target" if target == "accuracy" else f"; raise the target{told}")
        )
    return float(confidence_N[possible[-1]])


def answered(rows: Sequence[Row]) -> dict[str, Any]:
    """{coverage (share answered), accuracy among these, ci95} of rows with `abstained`."""
    kept = [row for row in rows if not row["abstained"]]
    correct = [float(row["correct"]) for row in kept]
    return {
        "coverage": len(kept) / len(rows) if rows else None,
        "accuracy": sum(correct) / len(kept) if kept else None,
        "ci95": interval(correct, [row["group"] for row in kept]),
    }


def assess(rows: Sequence[Row], calibration: Calibration) -> dict[str, Any]:
    """How a calibration does on the rows that it was not fitted on.

    Returns:
        before, after: `measure` at temperature 1 and at the calibration's; None without such rows.
        answered: see `answered`, at the calibration's threshold.
    """
    judged = calibrating(rows, calibration.share, calibration.seed)[1]
    at_temperature = applied(judged, calibration)
    plain = [with_confidence({**row, "temperature": 1.0}) for row in judged]
    return {
        "before": measure(plain) if judged else None,
        "after": measure(at_temperature) if judged else None,
        "answered": answered(at_temperature),
    }


def measure(rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """How well confidence foretells being right. Intervals count groups, see `medr1.evaluation.intervals`.

    Returns:
        n; accuracy and confidence: means.
        ece: expected calibration error over bins of equal size, {value, ci95, floor}. It is never 0 by chance: floor
            is what a perfectly calibrated model with these confidences would show on average, rows taken as
            independent. The interval is the reflected bootstrap, which takes that bias off (Hall 1988, Ann. Statist.
            16:927), from 0 where a calibrated model with such groups would show as much in one of 20 evaluations (see
            `_chance_ece`); one more group, all wrong, may lower it, and it reaches as far as accuracy may be from mean
            confidence. In simulation with 240 rows it covers 90 to 100 %, see docs/statistics.md.
        brier: mean squared difference of confidence and being right, {value, ci95}.
        nll: mean negative log-probability of the right option in nats, {value, ci95}.
        aurc: area under the risk-coverage curve, the mean error rate of the k most confident answers over all k
            (Geifman and El-Yaniv, arXiv:1705.08500), {value, ci95}; lower is better. The interval is a bootstrap
            that one more group, all right or all wrong at any confidence, joins with a random weight: so it has a
            width where all answers are right, namely up to the error rate that is then still possible.
        at_coverage: {accuracy, ci95} of the COVERAGE most confident.
        bins: {confidence, accuracy, ci95, n} each, the least confident first. Rows of equal confidence count their mean
            in an accuracy; its interval is of as many rows by id, and holds that mean.
        curve: (coverage, accuracy of the so many most confident), about 200 points.
    """
    groups = [row["group"] for row in rows]
    confidence_N = np.array([row["confidence"] or 0.0 for row in rows])
    correct_N = np.array([float(row["correct"]) for row in rows])
    brier_N = (confidence_N - correct_N) ** 2
    nll_N = _nll(*_options(rows), np.array([[row.get("temperature", 1.0)] for row in rows]))
    nll_ci = jackknife_interval(nll_N.tolist(), groups, (0.0, math.inf))

    sorted_confidence_N, sorted_correct_N = _in_order(confidence_N, correct_N)

    def statistics(picks: np.ndarray) -> np.ndarray:
        ordered = _in_order(confidence_N[picks], correct_N[picks])
        return np.array([_ece(*ordered), _aurc(ordered[1])])

    ece, aurc = statistics(np.arange(len(rows))).tolist()
    rng = np.random.default_rng(seed)
    ideal = [_ece(*_in_order(sorted_confidence_N, rng.random(len(rows)) < sorted_confidence_N)) for _ in range(200)]
    ece_ci: list[float] | None = None
    aurc_ci: list[float] | None = None
    if resampled := bootstrap(statistics, groups, seed):
        found_RK, tail = resampled
        # As in `interval`, one more group, all wrong or all right, spread over all confidences and weighed at random.
        independent = worth(np.bincount(np.unique(groups, return_inverse=True)[1]))
        more_R = rng.beta(1, independent, size=len(found_RK))
        low, high = np.quantile(found_RK[:, 0], [tail, 1 - tail]).tolist()
        least = min(2 * ece - high, float(np.quantile(found_RK[:, 0] - more_R, tail)))  # the group lessens the error
        within = ece <= _chance_ece(confidence_N, correct_N, groups, rng)
        mean, accuracy = float(confidence_N.mean()), interval(correct_N.tolist(), groups)
        assert accuracy, "there are rows"
        most = max(2 * ece - low, mean - accuracy[0], accuracy[1] - mean)  # it is at least what the means are apart
        ece_ci = [0.0 if within else max(0.0, least), most]
        aurc_ci = [
            min(aurc, float(np.quantile((1 - more_R) * found_RK[:, 1], tail))),
            max(aurc, float(np.quantile((1 - more_R) * found_RK[:, 1] + more_R, 1 - tail))),
        ]
    order_N = np.lexsort(([row["id"] for row in rows], -confidence_N))

    def cell(places_K: np.ndarray) -> dict[str, Any]:
        accuracy = float(sorted_correct_N[places_K].mean())
        rows_K = order_N[places_K]  # each with its own answer: of means nothing would be left to vary
        ci = interval(correct_N[rows_K].tolist(), [groups[row] for row in rows_K])
        assert ci, "there are rows"
        return {"accuracy": accuracy, "ci95": [min(ci[0], accuracy), max(ci[1], accuracy)]}

    top = int(np.ceil(COVERAGE * len(rows) - 1e-9))
    accuracies = np.cumsum(sorted_correct_N) / np.arange(1, len(rows) + 1)
    shown = np.unique(np.linspace(0, len(rows) - 1, min(200, len(rows))).astype(int))
    return {
        "n": len(rows),
        "accuracy": float(correct_N.mean()),
        "confidence": float(confidence_N.mean()),
        "ece": {"value": ece, "ci95": ece_ci, "floor": float(np.mean(ideal))},
        "brier": {"value": float(brier_N.mean()), "ci95": interval(brier_N.tolist(), groups)},
        "nll": {"value": float(nll_N.mean()), "ci95": nll_ci},
        "aurc": {"value": aurc, "ci95": aurc_ci},
        "at_coverage": cell(np.arange(top)),
        "bins": [
            {
                "confidence": float(sorted_confidence_N[places_K].mean()),
                **cell(places_K),
                "n": len(places_K),
            }
            for places_K in reversed(_bins(len(rows)))
        ],
        "curve": [((at + 1) / len(rows), float(accuracies[at])) for at in shown],
    }


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Raises MedR1Error where the file cannot be written."""
    write_atomic(path, calibration.model_dump_json(indent=1) + "\n")


def read_calibration(path: Path) -> Calibration:
    """A calibration that `medr1 calibrate` wrote.

    Raises:
        MedR1Error: no such file, or something else in it.
    """
    try:
        return Calibration.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "is no calibration"
        raise MedR1Error(f"{path}: {reason}; give a file that `medr1 calibrate` wrote") from error


def _weighed(rows: Sequence[Row]) -> Sequence[Row]:
    for row in rows:
        if "option_probs" not in row:
            raise MedR1Error(
                f"record {row['id']}: its row has no option_probs; evaluate with --score-options or --samples"
            )
    return rows


def _options(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the options at temperature 1 (-inf beyond a row's last) and which are right, both (N, O)."""
    most = max(len(row["options"]) for row in rows)
    logp_NO, right_NO = np.full((len(rows), most), -np.inf), np.zeros((len(rows), most), dtype=bool)
    for logp_O, right_O, row in zip(logp_NO, right_NO, rows, strict=True):
        texts = [normalise_option(option) for option in row["options"]]
        logp_O[: len(texts)] = _log(np.array(row["option_probs"]))
        right_O[: len(texts)] = [text == texts[LETTERS.index(row["gold"])] for text in texts]
    return logp_NO, right_NO


def _nll(logp_NO: np.ndarray, right_NO: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Negative log-probability, in nats, of the right option or options (equal texts): (N,)."""
    scaled_NO = logp_NO / temperature
    return special.logsumexp(scaled_NO, axis=1) - special.logsumexp(np.where(right_NO, scaled_NO, -np.inf), axis=1)


def _log(probs_O: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs_O, 1e-30))


def _sorted(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    confidence_N = np.array([row["confidence"] or 0.0 for row in rows])
    return _in_order(confidence_N, np.array([float(row["correct"]) for row in rows]))


def _in_order(confidence_N: np.ndarray, correct_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, the most confident first. Rows of equal confidence all get their mean of `correct`: what a random order
    of them would give on average, whatever the order of the rows."""
    values, place_N, count = np.unique(-confidence_N, return_inverse=True, return_counts=True)
    mean = np.bincount(place_N, weights=correct_N) / count
    return np.repeat(-values, count), np.repeat(mean, count)


def _bins(num_rows: int) -> list[np.ndarray]:
    """Places of the sorted rows in bins of equal size, to within a row."""
    return np.array_split(np.arange(num_rows), min(NUM_BINS, num_rows))


def _chance_ece(
    confidence_N: np.ndarray, correct_N: np.ndarray, groups: Sequence[str], rng: np.random.Generator
) -> float:
    """What chance alone exceeds in one of 20 evaluations with these groups: the greater of two calibration errors.

    One heeds what the groups show: what each bin is off by is taken off, and what is left of each group turns its sign
    or not (wild bootstrap; Cameron, Gelbach and Miller 2008, Rev. Econ. Stat. 90:414). Of few wrong answers it leaves
    nothing to turn. The other takes the model by its word: a group's rows are right where one number, drawn for all of
    them, is below their confidence.
    """
    group_N = np.unique(groups, return_inverse=True)[1]
    order_N = np.lexsort((correct_N, group_N, -confidence_N))  # the same whatever the order of the rows
    confidence_N, correct_N, group_N = confidence_N[order_N], correct_N[order_N], group_N[order_N]
    bins = _bins(len(group_N))
    left_N = correct_N - confidence_N
    for rows_K in bins:
        left_N[rows_K] -= left_N[rows_K].mean()
    shape = (200, group_N.max() + 1)
    turned_RN = rng.choice([-1.0, 1.0], size=shape)[:, group_N] * left_N
    claimed_RN = (rng.random(shape)[:, group_N] < confidence_N) - confidence_N
    starts = [rows_K[0] for rows_K in bins]
    eces = (np.abs(np.add.reduceat(off_RN, starts, axis=1)).sum(1) / len(left_N) for off_RN in (turned_RN, claimed_RN))
    return max(float(np.quantile(ece_R, 0.95)) for ece_R in eces)


def _ece(confidence_N: np.ndarray, correct_N: np.ndarray) -> float:
    """Of sorted rows: mean over bins, by size, of |accuracy - mean confidence| (Naeini et al. 2015, equal sizes)."""
    difference_N = correct_N - confidence_N
    return sum(abs(difference_N[rows].sum()) for rows in _bins(len(confidence_N))) / len(confidence_N)


def _aurc(correct_N: np.ndarray) -> float:
    return float(np.mean(1 - np.cumsum(correct_N) / np.arange(1, len(correct_N) + 1)))
