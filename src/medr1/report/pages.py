"""What all pages share: their templates, the format of a number with its interval, small pictures."""

import base64
import importlib.metadata
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

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


def percent(value: float | None) -> str:
    """0.5 as "50.0 %"; a dash where undefined."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of accuracies in signed percentage points; a dash where undefined."""
    return "–" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "−")  # + 0.0: no -0.0


def span(ci: Sequence[float] | None) -> str:
    """An interval of accuracies in percent; a dash where undefined."""
    return "–" if ci is None else f"{100 * ci[0]:.1f}–{100 * ci[1]:.1f}"


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


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; a dash for one not installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "–"
    return versions


def environment(*wings: str) -> Environment:
    """Where pages come from: templates of this wing and of the named ones ("study"), escaping on, with the formats of
    numbers as filters.
    """
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(f"medr1.{wing}", "templates") for wing in ("report", *wings)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (label, percent, points, span, span_points, p_value, data_uri):
        pages.filters[function.__name__] = function
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
