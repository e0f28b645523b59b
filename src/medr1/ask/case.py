"""One case as a self-contained HTML page, or as the part of a page that shows one model's answer.

The page names no file and carries nothing of the images but their pixels, shrunk; it needs no network. What a model or
a user wrote is shown as text, never as markup.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from medr1.ask.ask import Case, shrunk
from medr1.data.images import selector_of
from medr1.data.records import write_atomic
from medr1.errors import MedR1Error
from medr1.report.pages import environment, html_file, package_versions

OUTCOMES = {
    "ambiguous": "it names several options",
    "refusal": "it declines",
    "truncated": "it was cut off while reasoning",
    "invalid": "it names no such option",
    "unparsed": "none can be read",
}
"""Why a reply chooses no option (`answers.Answer.outcome`), in words."""
APART = 0.2
"""An option's share of the votes and its probability part where they differ by this much."""


def png_file(out: Path) -> Path:
    """The path, if a heatmap can be written there.

    Raises:
        MedR1Error: its name is not that of a PNG file.
    """
    if out.suffix.lower() != ".png":
        raise MedR1Error(f"{out}: heatmaps are PNG; name it {out.with_suffix('.png').name}")
    return out


def votes_apart(case: Case) -> str:
    """Why votes need not go as the probabilities do, and which options show it."""
    letters, votes = case.record.letters, case.votes or {}
    pairs = zip(letters, case.probabilities or (), strict=False)
    odd = [letter for letter, share in pairs if abs(votes.get(letter, 0) / case.num_samples - share) >= APART]
    why = (
        "Probabilities hold for the one reply shown, after its own reasoning; each vote is a new reply, which may"
        " reason its way elsewhere."
        if case.mode == "think"
        else "Probabilities weigh the options alone, at the end of the prompt; each vote is a whole new reply, drawn at"
        " temperature 1 and read like any other."
    )
    if not odd:
        return why
    return f"{why} That is why they part here for {' and '.join(odd)}: the model’s answer hangs on chance."


def case_page(cases: Sequence[Case]) -> str:
    """HTML of one question that one or several models were asked."""
    page = environment("ask").get_template("case.html.j2")
    known = {"outcomes": OUTCOMES, "votes_apart": votes_apart}
    return page.render(cases=cases, versions=package_versions(), command=_command(cases), **known)


def case_cards(cases: Sequence[Case]) -> str:
    """HTML of the models' answers side by side, finished or not, to stand in another page."""
    card = _parts().card
    return f'<div class="cases">{"".join(card(case) for case in cases)}</div>'


def picture(image: Image.Image, name: str) -> str:
    """HTML of a picture that can be enlarged, shrunk like those of a case."""
    return str(_parts().zoom(shrunk(image), name))


def _parts() -> Any:
    known = {"outcomes": OUTCOMES, "votes_apart": votes_apart}
    return environment("ask").get_template("card.html.j2").make_module(known)


def _command(cases: Sequence[Case]) -> str:
    """The command that asks this again; files have no name here, only what is selected in them."""
    first, *others = cases
    words = ["medr1", "ask", *(f"IMAGE{selector_of(path)}" for path in first.record.images), first.record.question]
    words += [word for option in first.record.options for word in ("--option", option)]
    words += ["--model", first.model, *(word for other in others for word in ("--compare", other.model))]
    words += ["--mode", first.mode, "--max-new-tokens", str(first.max_new_tokens)]
    words += ["--samples", str(first.num_samples)] * bool(first.num_samples)
    words += ["--modality", first.record.modality] if first.record.modality else []
    words += ["--calibration", "CALIBRATION"] * (first.calibration is not None)
    return shlex.join(words)


def write_case(cases: Sequence[Case], out: Path) -> None:
    """Write the page.

    Raises:
        MedR1Error: it is not named as HTML, or cannot be written.
    """
    write_atomic(html_file(out), case_page(cases))


def write_heatmaps(cases: Sequence[Case], out: Path) -> list[Path]:
    """Write heatmaps as PNG: `out`, or with several of them (models, images) NAME-1.png, NAME-2.png, …; these files.

    Raises:
        MedR1Error: it is not named as PNG, no model gave an answer to explain, or a file cannot be written.
    """
    png_file(out)
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
