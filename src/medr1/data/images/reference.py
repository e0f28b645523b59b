"""Which part of a file is meant: `scan.dcm#frame=12&window=lung`, carried as a `Path` wherever an image is named.

A selector is `key=value` pairs after the last `#`, joined by `&`. A file that really has such a name wins over the
selector. Frames and slices count from 1.
"""

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from medr1.errors import MedR1Error

_PAIRS = re.compile(r"\w+=[^&#]*(?:&\w+=[^&#]*)*")


@dataclass(frozen=True)
class Reference:
    """A file and what is selected in it.

    Example:
        Reference.parse("scan.dcm#frame=12&window=lung").selector == {"frame": "12", "window": "lung"}
    """

    path: Path
    selector: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, reference: Path | str) -> "Reference":
        """The file and the selector that a reference names.

        Raises:
            MedR1Error: a key is there twice or has no value.
        """
        path = file_of(reference)
        pairs = [pair.split("=", 1) for pair in str(reference)[len(str(path)) + 1 :].split("&") if pair]
        selector: dict[str, str] = {}
        for key, value in pairs:
            if key in selector or not value:
                raise MedR1Error(f"{reference}: {key!r} {'is there twice' if key in selector else 'has no value'}")
            selector[key] = value
        return cls(path, selector)

    def __str__(self) -> str:
        pairs = "&".join(f"{key}={value}" for key, value in self.selector.items())
        return f"{self.path}#{pairs}" if pairs else str(self.path)

    def allow(self, kind: str, *keys: str) -> None:
        """Raise MedR1Error, with the keys that there are, if another is used in a file of this kind."""
        keys = (*keys, "redact")
        if unknown := [key for key in self.selector if key not in keys]:
            raise MedR1Error(f"{self}: {unknown[0]!r} selects nothing in a {kind}; use {', '.join(keys)}")

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high].

        Raises:
            MedR1Error: it is something else.
        """
        text = self.selector.get(key, str(default))
        if not re.fullmatch(r"\d{1,9}", text) or not low <= int(text) <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return int(text)

    def wrong(self, key: str, expected: str) -> MedR1Error:
        """The error for a value that the key does not take."""
        return MedR1Error(f"{self}: {key} is {self.selector[key]!r}; give {expected}")


def file_of(reference: Path | str) -> Path:
    """The file that a reference names, without its selector. The file need not exist."""
    text = str(reference)
    before, sharp, after = text.rpartition("#")
    return Path(before) if before and sharp and _PAIRS.fullmatch(after) and not os.path.exists(text) else Path(text)


def selector_of(reference: Path | str) -> str:
    """What a reference says after its file's name, "#" first; "" where that is all."""
    return str(reference)[len(str(file_of(reference))) :]


def content_digest(reference: Path | str) -> str:
    """SHA-256 (hex) of the file's bytes, and of the selector where there is one. The file's name is not in it.

    Raises:
        MedR1Error: it is a folder.
    """
    parsed = Reference.parse(reference)
    if parsed.path.is_dir():
        raise MedR1Error(f"{parsed}: is a folder; name the file of one of its slices")
    with parsed.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not parsed.selector:
        return digest
    return hashlib.sha256(f"{digest} {sorted(parsed.selector.items())}".encode()).hexdigest()


def resolve_inside(root: Path, relative: str) -> Path:
    """Where a data set's own relative path (or reference) leads, below the folder `root`. It need not exist.

    Raises:
        ValueError: it is empty or absolute, or leads out of the folder by ".." or a symbolic link.
    """
    if not relative or "\0" in relative:
        raise ValueError(f"image path {relative!r} is not a file name")
    path = root / relative
    given = PurePosixPath(relative)
    inside = os.path.join(os.path.realpath(root), "")
    if given.is_absolute() or ".." in given.parts or not os.path.realpath(file_of(path)).startswith(inside):
        raise ValueError(f"image path {relative!r} leads out of the data folder; use a path inside {root}")
    return path
