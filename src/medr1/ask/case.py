"""One case as a self-contained HTML page, or as the part of a page that shows one model's answer.

The page names no file and carries nothing of the images but their pixels, shrunk; it needs no network. What a model or
a user wrote is shown as text, never as markup.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from medr1.ask.ask import Case, shrunk
from medr1.data.records import write_atomic
from medr1.errors import MedR1Error
from medr1.report.pages import data_uri, environment, package_versions

OUTCOMES = {
    "ambiguous": "it names several options",
    "refusal": "it declines",
    "truncated": "it was cut off while reasoning",
    "invalid": "it names no such option",
    "unparsed": "none can be read",
}
"""Why a reply chooses no option (`answers.Answer.outcome`), in words."""


def case_page(cases: Sequence[Case]) -> str:
    """HTML of one question that one or several models were asked."""
    page = environment("ask").get_template("case.html.j2")
    return page.render(cases=cases, outcomes=OUTCOMES, versions=package_versions())


def case_cards(cases: Sequence[Case]) -> str:
    """HTML of the models' answers side by side, finished or not, to stand in another page."""
    card = environment("ask").get_template("card.html.j2").make_module({"outcomes": OUTCOMES}).card  # type: ignore[attr-defined]
    return f'<div class="cases">{"".join(card(case) for case in cases)}</div>'


def picture(image: Image.Image, name: str) -> str:
    """An <img>, shrunk like those of a case."""
    return f'<img src="{data_uri(shrunk(image))}" alt="{name}">'


def write_case(cases: Sequence[Case], out: Path) -> None:
    """Write the page.

    Raises:
        MedR1Error: it cannot be written.
    """
    write_atomic(out, case_page(cases))


def write_heatmaps(cases: Sequence[Case], out: Path) -> list[Path]:
    """Write heatmaps as PNG: `out`, or with several of them (models, images) NAME-1.png, NAME-2.png, …; these files.

    Raises:
        MedR1Error: no model gave an answer to explain, or a file cannot be written.
    """
    heatmaps = [heatmap for case in cases for heatmap in case.heatmaps or ()]
    if not heatmaps:
        raise MedR1Error(f"{out}: there is no heatmap, since there is no answer to explain or no image; leave it out")
    numbers = range(1, len(heatmaps) + 1)
    paths = [out] if len(heatmaps) == 1 else [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers]
    for heatmap, path in zip(heatmaps, paths, strict=True):
        try:
            heatmap.save(path, "PNG")
        except OSError as error:
            raise MedR1Error(f"{path}: cannot be written ({error.strerror}); name another file") from error
    return paths
