"""The page of `medr1 explain`: what the maps are worth, then the maps over their images. Drawn from stored rows."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medr1.data.records import write_atomic
from medr1.data.regions import ABOUT_REGION
from medr1.evaluation.metrics import MIN_N, Row
from medr1.report.pages import decimal, environment, span_points, thumbnail, with_span
from medr1.report.plots import AFTER, CHANCE, CONTROL, dot_plot, hiding_plot
from medr1.trust.explain import NOT_CAUSAL

MAX_MAPS = 24
"""Questions whose maps the page shows; of more so many are drawn at random."""
ALIKE = 0.5
"""Mean rank correlation with the map of shuffled weights above which a map is said to show the image."""

METHODS = {
    "occlusion": (
        "Each window of the image is hidden in turn behind the image's mean colour; its score is the fall of the "
        "answer's log-probability."
    ),
    "gradient": (
        "Integrated gradients of the answer's log-probability, from the image in its mean colour, "
        "summed over the pixels of each image token."
    ),
}


def write_heatmaps_page(rows: Sequence[Row], numbers: dict[str, Any], out: Path) -> None:
    """Write explain.html into the folder of the rows.

    Args:
        rows, numbers: what `fidelity.measure_heatmaps` returned.

    Raises:
        MedR1Error: the folder cannot be written.
    """
    shown = rows if len(rows) <= MAX_MAPS else random.Random(0).sample(rows, MAX_MAPS)
    curves = numbers["curves"]
    about = (numbers["pointing"] or {}).get("about the region")
    page = (
        environment()
        .get_template("heatmaps.html.j2")
        .render(
            numbers=numbers,
            not_causal=NOT_CAUSAL,
            method=METHODS[numbers["method"]],
            story=tell(numbers),
            about=ABOUT_REGION,
            num_rows=len(rows),
            pointing_plot=dot_plot(_lines(about), "How often the hottest cell lies in the region", left=132)
            if about and about["n"]
            else "",
            curve_plot=hiding_plot(
                curves["fraction"],
                {
                    "hottest shown first": curves["insertion"],
                    "hidden in random order": curves["random"],
                    "hottest hidden first": curves["deletion"],
                },
            ),
            shown=[
                row
                | {
                    "pictures": [thumbnail(out / path) for path in row["images"]],
                    "painted": [thumbnail(out / path) for path in row["overlays"]],
                }
                for row in shown
            ],
        )
    )
    write_atomic(out / "explain.html", page)


def tell(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings in sentences, each with its worth ("good", "bad", "open"); nothing within noise is a win."""
    return [*_pointing(numbers["pointing"]), *_weights(numbers), *_hiding(numbers)]


def _pointing(pointing: dict[str, Any] | None) -> list[tuple[str, str]]:
    about = (pointing or {}).get("about the region")
    if not about or not about["n"]:
        return [("open", "No region is known here for a question about one: whether maps point at it cannot be told.")]
    times = about["hit"]["value"] / about["chance"]
    hits = (
        f"In {with_span(about['hit']['value'], about['hit']['ci95'])} of {about['n']} maps the hottest cell "
        f"lies in the region that the question is about, {times:.1f} times as often as a random cell"
    )
    others, alone = "another image's map", ""
    if (num_others := about["over_other"]["n"]) < about["n"]:
        others += f" ({num_others} maps have one of the same grid)"
        alone = "" if num_others else "; no other map of the same grid is there to compare with"
    over = {
        "a random cell": about["over_chance"],
        others: about["over_other"],
        "shuffled weights": about["over_shuffled"],
    }
    beaten = [name for name, gain in over.items() if _above(gain)]
    lost = [name for name, gain in over.items() if name not in beaten and gain["n"]]
    if not lost:
        return [("good", f"{hits}; beyond the noise it beats {', '.join(beaten[:-1])} and {beaten[-1]}{alone}.")]
    few = " in so few maps" if about["n"] < MIN_N else ""
    return [("open" if beaten or few else "bad", f"{hits}; it is not clearly above {' or '.join(lost)}{few}{alone}.")]


def _weights(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    alike = numbers["correlation"]
    if alike["ci95"] is None:
        return [("open", "Too few maps to compare with those of the same model with shuffled weights.")]
    low, high = alike["ci95"]
    rho, from_rho, to_rho = (decimal(value, 2) for value in (alike["value"], low, high))
    said = f"Maps of the same model with its weights shuffled correlate by {rho} ({from_rho} to {to_rho})"
    if high < ALIKE:
        return [("good", f"{said}: what the maps show depends on what the model has learned.")]
    return [("bad" if low > ALIKE else "open", f"{said}: the maps may show the image rather than the model.")]


def _hiding(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    story = []
    for key, what in (
        ("deletion_gain", "Hiding the hottest cells first costs the answer more probability than a random order"),
        ("insertion_gain", "Showing the hottest cells first restores the answer sooner than a random order"),
    ):
        gain = numbers[key]
        by = f"{decimal(100 * gain['value'], 1)} points of area, 95 % interval {span_points(gain['ci95'])}"
        if _above(gain):
            story.append(("good", f"{what} ({by})."))
        else:
            story.append(("bad" if gain["value"] <= 0 else "open", f"Not shown: {what[0].lower()}{what[1:]} ({by})."))
    return story


def _above(difference: dict[str, Any]) -> bool:
    return bool(difference["ci95"] and difference["ci95"][0] > 0)


def _lines(about: dict[str, Any]) -> list[tuple[str, dict[str, Any], Any]]:
    def cell(value: float, ci95: Any = None) -> dict[str, Any]:
        return {"accuracy": value, "ci95": ci95}

    lines = [("a random cell", cell(about["chance"]), CHANCE)]
    if about["other"] is not None:
        lines.append(("another image's map", cell(about["other"]), CONTROL))
    return [
        *lines,
        ("shuffled weights", cell(about["shuffled"]["value"], about["shuffled"]["ci95"]), CONTROL),
        ("this map", cell(about["hit"]["value"], about["hit"]["ci95"]), AFTER),
    ]
