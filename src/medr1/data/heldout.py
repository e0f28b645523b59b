"""What a run trained on and what it held out: a list in the run's folder, by which its model is asked.

    split = split_of("runs/mine/model")      # also of a checkpoint; None for a model that is no run's
    split.seen(records)                       # "held out", "trained on" or "never seen" of each

A question is known by what it shows, not by its id or path, so data that were moved, renamed, converted or added to are
recognised. It counts as trained on where it shares bytes or pixels of an image with a question that was, or a group of
the same data; so no wording and no new link makes a seen patient unseen.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medr1.config import RECIPE, DataConfig, load_config
from medr1.data.images import Content, with_contents
from medr1.data.kept import code
from medr1.data.records import Record, write_atomic
from medr1.data.splits import content_links, question_digest
from medr1.errors import MedR1Error
from medr1.processes import tell

SPLIT = "split.json"
"""The list's file in a run's folder."""
PARTS = ("trained_on", "held_out", "trained_on_before")

Seen = Literal["held out", "trained on", "never seen"]


@dataclass(frozen=True)
class RunSplit:
    """The list of one run.

    Of each kind of name the codes are kept that `medr1.data.kept.code` gives them: 8 bytes for 32 digits or more.
    """

    folder: Path
    data: DataConfig
    """Of the run's recipe."""
    trained_contents: npt.NDArray[np.uint64]
    """Of what was trained on, by it or by the runs that its base came from: digests of bytes, pixels or words. In order
    and each once, as in the others."""
    trained_groups: npt.NDArray[np.uint64]
    held_contents: npt.NDArray[np.uint64]
    """Of what it held out."""
    held_groups: npt.NDArray[np.uint64]

    def seen(self, records: Sequence[Record]) -> list[Seen]:
        """What the run has to do with each record, given all that are asked.

        Groups count only where one of the records shows an image of the run's: in other data too there is a patient 1.
        """
        by_content, by_group = bytearray(), bytearray()
        for record, contents in with_contents(records, lambda record: record.images):
            shown, groups = _codes(_contents(record, contents)), _codes(record.groups)
            by_content.append(_among(shown, self.trained_contents) + 2 * _among(shown, self.held_contents))
            by_group.append(_among(groups, self.trained_groups) + 2 * _among(groups, self.held_groups))
        if not any(by_content):
            by_group = bytearray(len(records))
        names: tuple[Seen, ...] = ("never seen", "trained on", "held out", "trained on")
        return [names[content | group] for content, group in zip(by_content, by_group, strict=True)]

    def questions(self, *parts: str) -> Iterator[dict[str, Any]]:
        """Id, groups and contents of each question in these PARTS, from the file."""
        return (question for part, question in _questions(self.folder / SPLIT) if part in parts)


def _codes(names: Iterable[str]) -> npt.NDArray[np.uint64]:
    return np.unique(np.fromiter(map(code, names), np.uint64))


def _among(some: npt.NDArray[np.uint64], all_of: npt.NDArray[np.uint64]) -> bool:
    """Whether one of some codes is among others, which are in order."""
    return bool((all_of.searchsorted(some, "left") < all_of.searchsorted(some, "right")).any())


def split_of(model: str | Path | None) -> RunSplit | None:
    """The list of a run, given its folder or a model or checkpoint in it; None for any other model.

    Raises:
        MedR1Error: the run's list or recipe is damaged.
    """
    if model is None or str(model) == "tiny":
        return None
    folder = Path(model).expanduser().resolve()
    return read_split(folder if (folder / RECIPE).is_file() else folder.parent)


def read_split(folder: Path) -> RunSplit | None:
    """The list in a run's folder; None where there is none.

    Raises:
        MedR1Error: the list or the recipe is damaged.
    """
    path = folder / SPLIT
    if not (folder / RECIPE).is_file() or not path.is_file():
        return None
    status = path.stat()
    return _read(folder, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)  # an evaluation asks several times
def _read(folder: Path, mtime_ns: int, size: int) -> RunSplit:
    found = {(trained, name): array("Q") for trained in (True, False) for name in ("contents", "groups")}
    for part, question in _questions(folder / SPLIT):
        for name in ("contents", "groups"):
            found[part != "held_out", name].extend(map(code, question[name]))
    codes = [
        np.unique(np.asarray(found[trained, name])) for trained in (True, False) for name in ("contents", "groups")
    ]
    return RunSplit(folder, load_config(folder / RECIPE).data, *codes)


def _questions(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each question of a list, which has a line of its own there, and the part that it is in."""
    parts, line = [], ""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if begins := re.fullmatch(r'\{?"(\w+)": \[\n', line):
                    parts.append(begins[1])
                elif line.startswith('{"id": '):
                    question = json.loads(line.rstrip(",\n"))
                    _ = question["id"], set(question["groups"]), set(question["contents"])
                    yield parts[-1], question
                elif line.strip("]},\n"):
                    raise ValueError(line)
        if (*parts, line) != (*PARTS, "]}\n"):
            raise ValueError(line)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise MedR1Error(
            f"{path}: cannot be read as the list of what the run held out; restore it, or delete it and be told nothing"
        ) from error


def write_split(folder: Path, train: Sequence[Record], test: Sequence[Record], base: str) -> None:
    """Write a run's list, or check that it is the one that the run began with.

    Args:
        train, test: what is trained on, and what is held out.
        base: the model that the run starts from; where it is a run's, what that one trained on stays so.

    Raises:
        MedR1Error: the run in the folder began with other data, or the folder cannot be written.
    """
    earlier = split_of(base)

    def listed(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        for record, contents in with_contents(records, lambda record: record.images):
            yield {"id": record.id, "groups": list(record.groups), "contents": _contents(record, contents)}

    def pieces() -> Iterator[str]:
        before = earlier.questions("trained_on", "trained_on_before") if earlier else iter(())
        questions = listed(train), listed(test), before
        for sign, part, of_it in zip(("{", ",\n", ",\n"), PARTS, questions, strict=True):
            yield f"{sign}{json.dumps(part)}: [\n"
            for number, question in enumerate(of_it):
                yield (",\n" if number else "") + json.dumps(question, ensure_ascii=False)
            yield "\n]"
        yield "}\n"

    path = folder / SPLIT
    if _holds(path, pieces()):  # so it is nearly always, and one question is in memory at a time
        return
    there = read_split(folder)
    if there is None:
        write_atomic(path, pieces())
        return
    for part, of_it in zip(PARTS, (train, test), strict=False):
        old = {question["id"]: question for question in there.questions(part)}
        new = {question["id"]: question for question in listed(of_it)}
        # Bytes suffice: what they decode to may change with the libraries. Where a side names nothing, nothing is told.
        changed = [
            id
            for id in old.keys() & new.keys()
            if old[id]["contents"] and new[id]["contents"] and set(old[id]["contents"]).isdisjoint(new[id]["contents"])
        ]
        if old.keys() != new.keys() or changed:
            raise MedR1Error(
                f"{folder}: the run there began with other data: of the questions {part.replace('_', ' ')}"
                f" {len(old.keys() - new.keys())} went, {len(new.keys() - old.keys())} came and {len(changed)} show"
                f" other images (see {SPLIT}); restore the data or choose another --out"
            )


def _holds(path: Path, pieces: Iterable[str]) -> bool:
    """Whether a file holds this text, in UTF-8, and nothing else."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return all(file.read(len(piece)) == piece for piece in map(str.encode, pieces)) and not file.read(1)


def tell_seen(split: RunSplit | None, seen: Sequence[Seen], what: str) -> None:
    """Say on stderr how many of the questions asked the run trained on or never saw, where there are such.

    Args:
        what: what becomes of those that were trained on.
    """
    counts = Counter(seen)
    if split is None or counts["held out"] == len(seen):
        return
    said = [f"{counts['held out']} of {len(seen)} questions were held out by the run {split.folder}"]
    if num := counts["trained on"]:
        said.append(f"{num} were trained on ({what})")
    if num := counts["never seen"]:
        said.append(f"{num} never seen by it")
    tell(", ".join(said), "yellow")


def _contents(record: Record, contents: Mapping[Path, Content]) -> list[str]:
    """Digests of what a record shows: 32 hexadecimal digits, 128 bits, are enough to tell all images apart.

    Without an image it shows its words, which do not link it to others where it has a group, and yet were trained on.
    """
    words = set() if record.images else {question_digest(record)}
    return sorted(digest[:32] for digest in {digest for _, digest in content_links(record, contents)} | words)
