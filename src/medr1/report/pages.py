"""What all pages share: their templates, when and how they were made, the format of a number with its interval, small
pictures.
"""

import base64
import importlib.metadata
import io
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from medr1 import NOTICE
from medr1.data.images import load_image
from medr1.errors import MedR1Error

THUMBNAIL = 224
"""Longest side of an image in the page, in pixels."""


CONTROLS = {"text_only": "option text only", "blank": "image blanked", "shuffled": "another image"}
"""Names of the controls as the page says them; others appear under their own name."""


PACKAGES = ("medr1", "torch", "transformers", "accelerate", "peft", "numpy", "pillow")


def label(control: str) -> str:
    """A control's name as the page says it."""
    return CONTROLS.get(control, control)


def decimal(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with so many decimals and a true minus, never "−0.0"; a dash where undefined."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}".replace("-", "−")  # + 0.0: no -0.0


def percent(value: float | None) -> str:
    """0.5 as "50.0 %"; a dash where undefined."""
    return "–" if value is None else f"{decimal(100 * value, 1)} %"


def points(value: float | None) -> str:
    """A difference of accuracies in signed percentage points; a dash where undefined."""
    return "–" if value is None else decimal(100 * value, 1, sign=True)


def span(ci: Sequence[float] | None) -> str:
    """An interval of accuracies in percent; a dash where undefined."""
    return "–" if ci is None else f"{decimal(100 * ci[0], 1)}–{decimal(100 * ci[1], 1)}"


def span_points(ci: Sequence[float] | None) -> str:
    """An interval of differences in signed percentage points; a dash where undefined."""
    return "–" if ci is None else f"{points(ci[0])} to {points(ci[1])}"


def with_span(share: float | None, ci: Sequence[float] | None) -> str:
    """A share in percent and its interval: "62.5 % (58.2–66.6)"."""
    return f"{percent(share)} ({span(ci)})"


def points_with_span(change: dict[str, Any]) -> str:
    """A paired change {difference, ci95} in points and its interval: "+9.6 (+3.3 to +15.6)"."""
    return f"{points(change['difference'])} ({span_points(change['ci95'])})"


def p_value(p: float | None) -> str:
    """Three decimals, or that it is smaller; a dash where undefined."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def in_code(sentence: str) -> Markup:
    """A sentence in which what stands between `backticks` is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; a dash for one not installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "–"
    return versions


def html_file(out: Path) -> Path:
    """The path, if a page can be written there.

    Raises:
        MedR1Error: its name is not that of an HTML file.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        instead = out.with_suffix(".html").name
        raise MedR1Error(f"{out}: pages are HTML; name it {instead}, and print it from the browser for a PDF")
    return out


def made_on() -> str:
    """Today's date (UTC), or that of SOURCE_DATE_EPOCH, by which a build is told to be the same on every day."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    return f"{now:%Y-%m-%d}"


def made_by() -> str | None:
    """The command that this process runs, with no folder named that is not below the working one; None where it is a
    program of the user's that calls Python functions.
    """
    program = Path(sys.argv[0])
    if "medr1" not in (program.stem, program.parent.name):
        return None
    return shlex.join(["medr1", *(re.sub(r"(?<![^=@])/[^=@]+", _nearby, word) for word in sys.argv[1:])])


def _nearby(path: re.Match[str]) -> str:
    """An absolute path as seen from the working folder; of one elsewhere the name alone, since pages are handed on."""
    here = Path(path[0])
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else f"…/{here.name}"


def contents(body: str, least: int = 4) -> Markup:
    """The page's body, each plain <h2> of it with a name, and before it a list of them if there are so many."""
    titles: dict[str, str] = {}

    def named(head: re.Match[str]) -> str:
        title = re.sub("<[^>]*>", "", head[1])
        name = "on-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        while name in titles:
            name += "-more"
        titles[name] = title
        return f'<h2 id="{name}">{head[1]}</h2>'

    body = re.sub("<h2>(.*?)</h2>", named, body)
    if len(titles) < least:
        return Markup(body)
    links = "".join(f'<li><a href="#{name}">{title}</a></li>\n' for name, title in titles.items())
    return Markup(f'<nav class="contents" aria-label="On this page"><ul>\n{links}</ul></nav>\n{body}')


def environment(*wings: str) -> Environment:
    """Where pages come from: templates of this wing and of the named ones ("study"), escaping on, with the formats of
    numbers as filters, and the date and the command of now.
    """
    pages = _templates(*wings)
    pages.globals |= {"made_on": made_on(), "made_by": made_by()}
    return pages


@cache
def _templates(*wings: str) -> Environment:
    """Kept with the templates that were compiled, which takes longer than to fill them in."""
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(f"medr1.{wing}", "templates") for wing in ("report", *wings)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (label, in_code, percent, points, span, span_points, p_value, decimal, data_uri, contents):
        pages.filters[function.__name__] = function
    pages.globals["notice"] = NOTICE
    return pages


def thumbnail(path: Path) -> str | None:
    """An image file as a data URI of at most THUMBNAIL pixels a side; None where it cannot be read."""
    try:
        image = load_image(path)
    except MedR1Error:
        return None  # the page says how many; rows outlive the images that they were made from
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """An image to stand in a page, without anything else that its file held."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
