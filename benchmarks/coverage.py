"""How often the 95 % intervals of `medr1.evaluation.intervals` hold the truth, where groups are uneven, few or alike.

Groups draw their accuracy from a beta distribution, rows are right by it, so that two rows of a group correlate as
stated. Seeds are fixed. Writes benchmarks/coverage.md, which docs/statistics.md shows; takes some minutes on one core.

    python benchmarks/coverage.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from medr1.data.records import QUESTION_TYPES
from medr1.evaluation.calibration import measure
from medr1.evaluation.intervals import (
    DIFFERENCE,
    TAIL,
    Floats,
    chance_below_zero,
    interval,
    jackknife_interval,
    mean_interval,
    with_worst,
)
from medr1.evaluation.metrics import Row, paired_change
from medr1.evaluation.metrics import macro as macro_average

REGIMES: dict[str, list[int]] = {
    "150 single rows": [1] * 150,
    "100 of 5": [5] * 100,
    "30 of 5": [5] * 30,
    "20 of 24": [24] * 20,
    "one of 40, nine single": [40] + [1] * 9,
    "six of 24, 60 single": [24] * 6 + [1] * 60,
    "three of 50, 20 single": [50] * 3 + [1] * 20,
    "30, Zipf: 60, 30, 20 … 2": [round(60 / rank) for rank in range(1, 31)],
    "2 of 25": [25] * 2,
    "3 of 20": [20] * 3,
    "4: 30, 10, 5, 1": [30, 10, 5, 1],
    "5 of 10": [10] * 5,
}
ACCURACIES = (0.3, 0.9, 0.99)
CORRELATIONS = (0.1, 0.3, 0.9)
CALIBRATION = ["calibration error of 240 rows, 200 draws", "single rows, %", "48 groups of five, %"]


def drawn(rng: np.random.Generator, size_C: Floats, accuracy: float, correlation: float, num: int) -> Floats:
    """Share of right rows in each group, (num, C)."""
    like = (1 - correlation) / correlation
    chance_RC = rng.beta(accuracy * like, (1 - accuracy) * like, size=(num, len(size_C)))
    return rng.binomial(size_C.astype(int), chance_RC) / size_C


def covers(size_C: Floats, share_C: Floats, accuracy: float) -> bool:
    """Whether `interval` holds the accuracy: what it solves for, asked at one place."""
    one_C = np.ones(len(size_C), dtype=np.int64)
    chances = []
    for values, at in ((share_C, accuracy), (1 - share_C, 1 - accuracy)):
        if values.max() <= at:  # the limit is below the greatest value
            chances.append(1.0)
            continue
        weight_J, value_J, count_J = with_worst(size_C, values, one_C)
        chances.append(chance_below_zero(weight_J * (value_J - at), count_J))
    return min(chances) >= TAIL


def cell(sizes: list[int], accuracy: float, correlation: float, num: int, num_widths: int = 40) -> dict[str, float]:
    """coverage of `num` draws; width: mean of `num_widths`, over that of a normal interval which knows the truth."""
    size_C = np.array(sizes, dtype=np.float64)
    share_RC = drawn(np.random.default_rng(0), size_C, accuracy, correlation, num)
    groups = np.repeat(np.arange(len(sizes)), sizes).tolist()
    known = accuracy * (1 - accuracy) * (size_C + correlation * size_C * (size_C - 1)).sum() / size_C.sum() ** 2
    widths = []
    for share_C in share_RC[:num_widths]:
        low, high = interval(np.repeat(share_C, sizes).tolist(), groups) or (0, 1)
        widths.append(high - low)
    return {
        "coverage": float(np.mean([covers(size_C, share_C, accuracy) for share_C in share_RC])),
        "width": float(np.mean(widths)) / (2 * 1.96 * known**0.5),
    }


def other_statistics(num: int) -> dict[str, float]:
    """Coverage of what is made from intervals or beside them."""
    rng = np.random.default_rng(1)
    uneven, even = np.array([24.0] * 6 + [1.0] * 60), np.array([5.0] * 20)

    def of(sizes: Floats) -> list[int]:
        return np.repeat(np.arange(len(sizes)), sizes.astype(int)).tolist()

    def rows(sizes: Floats, shares: Floats) -> list[float]:
        return np.repeat(shares, sizes.astype(int)).tolist()

    def difference(sizes: Floats) -> bool:
        gained, lost = (drawn(rng, sizes, share, 0.3, 1)[0] for share in (0.2, 0.1))
        low, high = interval(rows(sizes, gained - lost), of(sizes), DIFFERENCE) or (0, 0)
        return low <= 0.1 <= high

    def macro() -> bool:
        accuracies = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        cells = []
        for place, accuracy in enumerate(accuracies):
            sizes = uneven if place % 2 else even
            shares = drawn(rng, sizes, accuracy, 0.3, 1)[0]
            ci = interval(rows(sizes, shares), of(sizes))
            assert ci
            cells.append((float((sizes * shares).sum() / sizes.sum()), ci))
        low, high = mean_interval(cells) or (0, 0)
        return low <= sum(accuracies) / 8 <= high

    def log_likelihood(sizes: Floats) -> bool:
        shares = drawn(rng, sizes, 0.7, 0.3, 1)[0]
        low, high = jackknife_interval(rows(sizes, 0.1 + 2 * (1 - shares)), of(sizes)) or (0, 0)
        return low <= 0.7 <= high

    def answers(accuracy: float) -> list[Row]:
        """Of five question types about the same 100 images, whose rows correlate with 0.9."""
        like = (1 - 0.9) / 0.9
        chance_C = rng.beta(accuracy * like, (1 - accuracy) * like, size=100)
        about = {"modality": None, "question": "", "chance": 0.25}
        return [
            {**about, "id": f"{kind} {image}", "group": image, "question_type": kind, "correct": bool(right)}
            for kind in QUESTION_TYPES
            for image, right in enumerate(rng.random(100) < chance_C)
        ]

    def shared() -> bool:
        low, high = macro_average(answers(0.98), "question_type")["ci95"]
        return low <= 0.98 <= high

    def shared_change() -> bool:
        after = answers(0.02)
        low, high = paired_change([{**row, "correct": False} for row in after], after, "question_type")["ci95"]
        return low <= 0.02 <= high

    asked: dict[str, Callable[[], bool]] = {
        "paired difference, 20 of 5": lambda: difference(even),
        "paired difference, six of 24 and 60 single": lambda: difference(uneven),
        "average over eight modalities, both kinds": macro,
        "log-likelihood, 20 of 5": lambda: log_likelihood(even),
        "log-likelihood, six of 24 and 60 single": lambda: log_likelihood(uneven),
        "average of five question types, same 100 images": shared,
        "its paired change, of few answers": shared_change,
    }
    return {name: float(np.mean([ask() for _ in range(num)])) for name, ask in asked.items()}


def calibration_error(num: int) -> dict[str, list[float]]:
    """Coverage of `calibration.measure`'s interval: with 240 single rows, and with 48 groups of five that agree."""
    rng = np.random.default_rng(2)

    def spread(count: int) -> Floats:
        return rng.uniform(0.25, 1, count)

    def high(count: int) -> Floats:
        return rng.beta(20, 1, count)

    def alike(count: int) -> Floats:
        return rng.normal(0.9, 0.005, count)

    regimes: dict[str, tuple[Callable[[int], Floats], Callable[[Floats], Floats]]] = {
        "none, confidence 0.25 to 1": (spread, lambda confidence_N: confidence_N),
        "none, confidence mostly above 0.9": (high, lambda confidence_N: confidence_N),
        "right as often as confidence squared": (spread, lambda confidence_N: confidence_N**2),
        "0.98 right at a confidence of 0.9": (alike, lambda confidence_N: np.full_like(confidence_N, 0.98)),
        "too sure above 0.6, not sure enough below": (
            spread,
            lambda confidence_N: (confidence_N + 0.3 * np.sin(2 * np.pi * (confidence_N - 0.25) / 0.75)).clip(0, 1),
        ),
    }

    def covered(regime: str, size: int) -> bool:
        draw, right = regimes[regime]
        confidence_N = draw(240)
        correct_N = np.repeat(rng.random(240 // size), size) < right(confidence_N)
        rows = [
            {"id": str(row), "group": str(row // size), "confidence": confidence, "correct": correct,
             "options": ["a", "b"], "option_probs": [confidence, 1 - confidence], "gold": "A" if correct else "B"}
            for row, (confidence, correct) in enumerate(zip(confidence_N.tolist(), correct_N.tolist(), strict=True))
        ]  # fmt: skip
        low, high = measure(rows)["ece"]["ci95"]
        return low <= truth[regime] <= high

    sample = {name: draw(100_000) for name, (draw, _) in regimes.items()}
    truth = {name: float(np.abs(right(sample[name]) - sample[name]).mean()) for name, (_, right) in regimes.items()}
    return {name: [float(np.mean([covered(name, size) for _ in range(num)])) for size in (1, 5)] for name in regimes}


def main() -> None:
    lines: list[list[Any]] = []
    for name, sizes in REGIMES.items():
        for correlation in CORRELATIONS:
            cells = [cell(sizes, accuracy, correlation, num=1000) for accuracy in ACCURACIES]
            numbers = [f"{100 * found['coverage']:.1f} ({found['width']:.2f})" for found in cells]
            lines.append([name, correlation, *numbers])
            print(*lines[-1], flush=True)
    head = ["groups", "correlation", *(f"accuracy {accuracy}" for accuracy in ACCURACIES)]
    others = [[name, f"{100 * share:.1f}"] for name, share in other_statistics(num=400).items()]
    errors = [[name, *(f"{100 * share:.1f}" for share in both)] for name, both in calibration_error(num=200).items()]
    Path(__file__).with_suffix(".md").write_text(
        "Coverage in % of 1,000 draws; in brackets the mean width, over that of a normal interval that knows accuracy"
        " and correlation.\n\n"
        + tabulate(lines, head, tablefmt="github", disable_numparse=True)
        + "\n\n"
        + tabulate(others, ["other statistics, 400 draws", "coverage, %"], tablefmt="github", disable_numparse=True)
        + "\n\n"
        + tabulate(errors, CALIBRATION, tablefmt="github", disable_numparse=True)
        + "\n"
    )


if __name__ == "__main__":
    main()
