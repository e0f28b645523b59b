"""Recipes and studies that come with the package, by name: `--preset omnimedvqa-qwen2vl-2b`, `study --preset tiny`.

The files are those of the repository's configs/, which a wheel holds as medr1/cli/configs/.
"""

import difflib
from pathlib import Path
from typing import Literal

from medr1.errors import MedR1Error

_PACKAGED = Path(__file__).with_name("configs")
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "configs"
"""The wheel's copy, or in an editable install the repository's own folder."""

Kind = Literal["recipe", "study"]


def presets(kind: Kind) -> dict[str, Path]:
    """Name -> TOML file of every preset: study-NAME.toml is the study NAME, any other file a recipe."""
    studies = {path.stem.removeprefix("study-"): path for path in sorted(FOLDER.glob("study-*.toml"))}
    if kind == "study":
        return studies
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml")) if path not in studies.values()}


def preset(name: str, kind: Kind) -> Path:
    """The TOML file of a preset.

    Raises:
        MedR1Error: no preset has this name; the line names those that there are.
    """
    known = presets(kind)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise MedR1Error(f"--preset {name}: no such {kind}; {hint}There are: {', '.join(known)}")
