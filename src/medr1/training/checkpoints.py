"""Whether a checkpoint is as it was written: each carries the digests of its files, and a damaged one is passed over.

A kill cannot leave half a checkpoint (it is written aside and renamed), but a full or failing disk, an interrupted copy
and a careless hand can. Libraries notice some of that with a traceback, and some not at all.
"""

import hashlib
import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medr1.data.records import to_json, write_atomic
from medr1.errors import MedR1Error

FILES = "files.json"
"""In each checkpoint: path of every other file to its SHA-256 (hex)."""


def seal(folder: Path) -> None:
    """Write down what a checkpoint holds.

    Raises:
        MedR1Error: the disk is full.
    """
    write_atomic(folder / FILES, to_json(_digests(folder), indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is not as it was written, in a few words; None of a whole checkpoint."""
    try:
        written: dict[str, str] = dict(json.loads((folder / FILES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return f"{FILES} is missing or damaged"
    found = _digests(folder)
    return next(
        (
            f"{name} is {'damaged' if name in found else 'missing'}"
            for name, digest in written.items()
            if found.get(name) != digest
        ),
        None,
    )


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole, and a line about each newer one that is not.

    None of a run that has no checkpoint yet.

    Raises:
        MedR1Error: there are some, and none of them is whole.
    """
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    }
    lines: list[str] = []
    for step in sorted(steps, reverse=True):
        wrong = damage(steps[step])
        if wrong is None:
            return steps[step], lines
        lines.append(f"{steps[step]}: {wrong}")
    if lines:
        raise MedR1Error(
            f"{lines[0]}, and no other checkpoint of the run is whole; restore one, or remove"
            f" {'it' if len(lines) == 1 else f'all {len(lines)}'} to begin the run anew"
        )
    return None, []


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != FILES:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
