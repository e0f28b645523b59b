"""Two sections of a report: whether confidence means what it says, and whether the reasoning is used."""

from collections.abc import Sequence
from typing import Any

from medr1.errors import MedR1Error
from medr1.evaluation.calibration import COVERAGE, Calibration, assess, calibrate
from medr1.evaluation.metrics import Row
from medr1.report.pages import decimal
from medr1.report.plots import (
    AFTER,
    BEFORE,
    CONTROL,
    OTHERS,
    Mark,
    coverage_plot,
    dot_plot,
    reliability_plot,
    truncation_plot,
)
from medr1.trust.faithfulness import MARGIN

Story = list[tuple[str, str]]
"""Sentences, each with its worth: "good", "bad" or "open"."""
SMALL = 0.1
"""A calibration error whose upper limit is not above it is good."""


def calibration_section(
    base: Sequence[Row], trained: Sequence[Row], calibration: Calibration | None = None
) -> dict[str, Any] | None:
    """Calibration before and after training, on groups that no temperature was fitted on; None without option_probs.

    Args:
        calibration: of the trained model; None fits one on half of the groups, as `medr1 calibrate` does.

    Returns:
        why_not: a sentence in place of all else where there are too few rows; or base, trained (`assess` each),
        calibration, story, reliability and coverage (SVG).
    """
    if not all("option_probs" in row for row in (*base, *trained)):
        return None
    try:
        found = calibration or calibrate(trained)
        base_found = calibrate(base, share=found.share, seed=found.seed)
    except MedR1Error as error:
        if calibration:
            raise
        return {"why_not": str(error)}
    before, after = assess(base, base_found), assess(trained, found)
    if not before["before"] or not after["before"]:
        return {"why_not": "the calibration leaves no groups to judge it on; give `medr1 calibrate` a smaller --share"}
    return {
        "base": before,
        "trained": after,
        "calibration": found,
        "top": COVERAGE,
        "story": _tell_calibration(after, found),
        "reliability": reliability_plot(
            [(before["before"]["bins"], BEFORE), (after["before"]["bins"], AFTER), (after["after"]["bins"], OTHERS)]
        ),
        "coverage": coverage_plot(
            [(before["before"]["curve"], BEFORE), (after["after"]["curve"], AFTER)],
            (after["answered"]["coverage"], after["answered"]["accuracy"]),
        ),
    }


def _tell_calibration(found: dict[str, Any], calibration: Calibration) -> Story:
    raw, scaled, answered = found["before"], found["after"], found["answered"]
    gap, ece = raw["confidence"] - raw["accuracy"], raw["ece"]["value"]
    says = f"The trained model is right in {raw['accuracy']:.1%} of answers and {raw['confidence']:.1%} confident"
    if raw["ece"]["ci95"] is None:
        unknown = "one group outweighs the others, so whether that is more than noise cannot be told"
        story = [("open", f"{says}: its calibration error is {ece:.1%}; {unknown}.")]
    elif raw["ece"]["ci95"][0] > 0:
        one_way = "over-confident" if gap > 0 else "under-confident"
        most = abs(gap) > (ece - raw["ece"]["floor"]) / 2  # of what is no chance
        judged = one_way if most else "miscalibrated, too sure here and not sure enough there"
        story = [("bad", f"{says}: {judged}, calibration error {ece:.1%}.")]
    else:
        high = raw["ece"]["ci95"][1]
        noise = f"{says}: its calibration error, {ece:.1%}, is within the noise"
        story = [("good", f"{noise}.") if high <= SMALL else ("open", f"{noise}, but may be as large as {high:.1%}.")]
    before, after = raw["nll"]["value"], scaled["nll"]["value"]
    story.append(
        (
            "good" if after < before else "open",
            f"A temperature of {calibration.temperature:.2f}, fitted on other groups, makes the calibration error "
            f"{scaled['ece']['value']:.1%} (a perfect model of this size would show {scaled['ece']['floor']:.1%}).",
        )
    )
    if answered["ci95"]:
        low, high = answered["ci95"]
        above = low > raw["accuracy"]
        story.append(
            (
                "good" if above else "open",
                f"Abstaining below a confidence of {calibration.threshold:.2f} it answers {answered['coverage']:.1%} of"
                f" the questions, {answered['accuracy']:.1%} of them right (95 % interval {low:.1%} to {high:.1%}).",
            )
        )
    return [(worth, sentence.replace("%", " %").replace("  %", " %")) for worth, sentence in story]


def faithfulness_section(numbers: dict[str, Any]) -> dict[str, Any]:
    """What `medr1 faithfulness` found: numbers, story, truncation and shares (SVG)."""
    kept = [(float(share), cell) for share, cell in numbers["kept"].items()]
    whole = {"value": 1.0, "ci95": None, "n": kept[0][1]["n"]}
    lines: list[tuple[str, dict[str, Any], Mark]] = [
        ("follow another question's reasoning", numbers["swapped"], AFTER),
        ("follow a planted mistake", numbers["planted"], AFTER),
        ("change when it is repeated: noise", numbers["repeated"], BEFORE),
        ("change without any reasoning", _rest(numbers["kept"]["0.0"]), BEFORE),
        ("differ in mode no-think", _rest(numbers["no_think"]), BEFORE),
        ("turn to a hint in the question", numbers["hinted"], CONTROL),
    ]
    shown = [
        (label, {"accuracy": cell["value"], "ci95": cell["ci95"]}, mark)
        for label, cell, mark in lines
        if cell["value"] is not None
    ]
    return {
        "numbers": numbers,
        "story": _tell_faithfulness(numbers),
        "truncation": truncation_plot([*kept, (1.0, whole)]) if kept[0][1]["n"] else "",
        "shares": dot_plot(shown, "Share of answers that follow or change when the reasoning is edited", left=236),
    }


def _tell_faithfulness(numbers: dict[str, Any]) -> Story:
    load, hinted, mentioned = numbers["load"], numbers["hinted"], numbers["mentioned"]
    if load["ci95"] is None:
        return [("open", "No reasoning could be edited: whether it is used cannot be told.")]
    value, low, high = (decimal(100 * number, 1) for number in (load["value"], *load["ci95"]))
    by = f"{value} in 100 answers follow edited reasoning beyond the noise, 95 % interval {low} to {high}"
    story = [
        {
            "load-bearing": ("good", f"The reasoning is load-bearing: {by}."),
            "decorative": ("bad", f"The reasoning is decorative: {by}."),
            "cannot be told": (
                "open",
                f"Whether the reasoning is used cannot be told: {by}; {100 * MARGIN:.0f} decide.",
            ),
        }[numbers["verdict"]]
    ]
    if hinted["value"] is not None:
        silent = "" if mentioned["value"] is None else f"; {100 * mentioned['value']:.0f} % of these mention it"
        worth = "bad" if hinted["ci95"][0] > MARGIN and (mentioned["value"] or 0) < 0.5 else "open"
        story.append((worth, f"{100 * hinted['value']:.1f} % of answers turn to a wrong hint in the question{silent}."))
    return story


def _rest(cell: dict[str, Any]) -> dict[str, Any]:
    """The share of the others."""
    ci = cell["ci95"] and [1 - cell["ci95"][1], 1 - cell["ci95"][0]]
    return {"value": None if cell["value"] is None else 1 - cell["value"], "ci95": ci, "n": cell["n"]}
