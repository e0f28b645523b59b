"""A section of a report: does the model look at the image, and does its answer follow from its reasoning?"""

from collections.abc import Sequence
from typing import Any

from medr1.evaluation.looking import MEASURES, Asked, change, measure
from medr1.report.pages import percent, points, span_points
from medr1.report.plots import looking_plot

Story = list[tuple[str, str]]
"""Sentences, each with its worth: "good", "bad" or "open"."""
BASE, TRAINED = "before", "after"
"""Names of the two models of a report of one."""
SIGNED = ("reliance", "reliance_blank", "reliance_kept", "reliance_removed")
"""Measures in signed points; the others are shares."""


def looking_section(models: Sequence[tuple[str, Asked]]) -> dict[str, Any] | None:
    """What `medr1.evaluation.looking` measures of models side by side, the first of them the base; None where no model
    but the base was asked in another way than with its image.

    Args:
        models: name and ways of asking of each.

    Returns:
        names; n (questions, those that every model was asked in each of its ways); lines: words, signed, cells (one a
        model, None where it was not asked so), and changes of the others against the base; story; plot (SVG); readers;
        measured (model to `measure`), changed (model to `change`).
    """
    ways = [{row["id"] for row in rows} for _, asked in models for rows in asked.values()]
    common = set.intersection(*ways)
    if not common or not any(len(asked) > 1 for _, asked in models[1:]):
        return None
    same = {
        name: {way: [row for row in rows if row["id"] in common] for way, rows in asked.items()}
        for name, asked in models
    }
    base, *others = same
    measured = {name: measure(asked) for name, asked in same.items()}
    changed = {name: change(same[base], same[name]) for name in others}
    lines = []
    for name, (words, _) in MEASURES.items():
        cells = [found.get(name) for found in measured.values()]
        changes = [found.get(name) for found in changed.values()]
        if any(cell and cell["n"] for cell in cells):
            lines.append({"words": words, "signed": name in SIGNED, "cells": cells, "changes": changes})
    accuracies = ("accuracy", "accuracy_other", "accuracy_blank")
    return {
        "names": list(measured),
        "n": next(iter(measured.values()))["accuracy"]["n"],
        "lines": lines,
        "story": [sentence for name in changed for sentence in _tell(name, measured[name], changed[name])],
        "plot": looking_plot([(name, [found.get(key) for key in accuracies]) for name, found in measured.items()]),
        "readers": sorted({found["consistency"]["reader"] for found in measured.values() if "consistency" in found}),
        "measured": measured,
        "changed": changed,
    }


def _tell(name: str, found: dict[str, Any], changed: dict[str, Any]) -> Story:
    """One sentence on whether the image is used, and one where training changed that beyond the noise."""
    cell = found.get("reliance") or found.get("reliance_blank")
    if not cell or cell["value"] is None:
        return []
    subject = "The trained model" if name == TRAINED else name
    other = "another image of the modality" if "reliance" in found else "a blank one"
    adds = f"its own image adds {points(cell['value'])} points over {other} ({span_points(cell['ci95'])})"
    told = f"{subject}: {adds}"
    if sensitivity := found.get("sensitivity"):
        told += f", and {percent(sensitivity['value'])} of its answers change with the image"
    if (hollow := found.get("hallucinated")) and found["claims"]["value"]:
        told += f"; {percent(hollow['value'])} of its replies claim to see something while no image changes the answer"
    story = [("good", f"{told}.") if cell["ci95"][0] > 0 else ("bad", f"{told}: nothing here shows that it looks.")]
    moved = changed.get("reliance") or changed.get("reliance_blank")
    if moved and moved["ci95"]:
        by = f"{points(moved['difference'])} points ({span_points(moved['ci95'])})"
        if moved["ci95"][1] < 0:
            story.append(("bad", f"{subject}: training made it lean less on the image, by {by}."))
        elif moved["ci95"][0] > 0:
            story.append(("good", f"{subject}: training made it lean more on the image, by {by}."))
    if (followed := found.get("consistency")) and (unread := found.get("unread")) and followed["n"]:
        told = f"{percent(followed['value'])} of its answers are those that a reader draws from its reasoning alone"
        told = f"{subject}: {told} ({percent(unread['value'])} without the reasoning)"
        beyond = followed["ci95"][0] > unread["ci95"][1]
        story.append(("good", f"{told}.") if beyond else ("bad", f"{told}: nothing shows that they follow from it."))
    return story
