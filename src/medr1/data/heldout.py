"""What a run trained on and what it held out: a list in the run's folder, by which its model is asked.

    split = split_of("runs/mine/model")      # also of a checkpoint; None for a model that is no run's
    split.seen(records)                       # "held out", "trained on" or "never seen" of each

A question is known by what it shows, not by its id or path, so data that were moved, renamed, converted or added to are
recognised. It counts as trained on where it shares bytes or pixels of an image with a question that was, or a group of
the same data; so no wording and no new link makes a seen patient unseen.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from medr1.config import RECIPE, DataConfig, load_config
from medr1.data.images import Content, contents_of
from medr1.data.records import Record, write_atomic
from medr1.data.splits import content_links, tell
from medr1.errors import MedR1Error

SPLIT = "split.json"
"""The list's file in a run's folder."""

Seen = Literal["held out", "trained on", "never seen"]


@dataclass(frozen=True)
class RunSplit:
    """The list of one run.

    Example: `RunSplit(Path("runs/mine"), DataConfig(), {"trained_on": […], "held_out": […], "trained_on_before": []})`
    """

    folder: Path
    data: DataConfig
    """Of the run's recipe."""
    parts: dict[str, list[dict[str, Any]]]
    """trained_on, held_out, and trained_on_before by the runs that its base came from: id, groups and contents (digests
    of bytes, pixels or words) of each question."""

    def seen(self, records: Sequence[Record]) -> list[Seen]:
        """What the run has to do with each record, given all that are asked.

        Groups count only where one of the records shows an image of the run's: in other data too there is a patient 1.
        """
        contents = contents_of(image for record in records for image in record.images)
        shown = [set(_contents(record, contents)) for record in records]
        trained, held = self._known("contents", trained=True), self._known("contents", trained=False)
        is_same = any(not of_one.isdisjoint(trained | held) for of_one in shown)
        trained_groups, held_groups = (self._known("groups", trained=t) if is_same else set() for t in (True, False))
        found: list[Seen] = []
        for record, of_one in zip(records, shown, strict=True):
            if not (of_one.isdisjoint(trained) and trained_groups.isdisjoint(record.groups)):
                found.append("trained on")
            else:
                is_known = not (of_one.isdisjoint(held) and held_groups.isdisjoint(record.groups))
                found.append("held out" if is_known else "never seen")
        return found

    def _known(self, name: str, *, trained: bool) -> set[str]:
        names = ("trained_on", "trained_on_before") if trained else ("held_out",)
        return {value for part in names for question in self.parts[part] for value in question[name]}


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
    path = folder / SPLIT
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        for part in ("trained_on", "held_out", "trained_on_before"):
            for question in parts[part]:
                _ = question["id"], set(question["groups"]), set(question["contents"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedR1Error(
            f"{path}: cannot be read as the list of what the run held out; restore it, or delete it and be told nothing"
        ) from error
    return RunSplit(folder, load_config(folder / RECIPE).data, parts)


def write_split(folder: Path, train: Sequence[Record], test: Sequence[Record], base: str) -> None:
    """Write a run's list, or check that it is the one that the run began with.

    Args:
        train, test: what is trained on, and what is held out.
        base: the model that the run starts from; where it is a run's, what that one trained on stays so.

    Raises:
        MedR1Error: the run in the folder began with other data, or the folder cannot be written.
    """
    contents = contents_of(image for record in [*train, *test] for image in record.images)

    def listed(records: Sequence[Record]) -> list[dict[str, Any]]:
        return [
            {
                "id": record.id,
                "groups": list(record.groups),
                "contents": _contents(record, contents),
            }
            for record in records
        ]

    earlier = split_of(base)
    before = [*earlier.parts["trained_on"], *earlier.parts["trained_on_before"]] if earlier else []
    parts = {"trained_on": listed(train), "held_out": listed(test), "trained_on_before": before}
    path = folder / SPLIT
    if there := read_split(folder):
        for part in ("trained_on", "held_out"):
            old, new = ({question["id"]: question for question in of[part]} for of in (there.parts, parts))
            # Bytes suffice: what they decode to may change with the libraries.
            changed = [
                id
                for id in old.keys() & new.keys()
                if new[id]["contents"] and set(old[id]["contents"]).isdisjoint(new[id]["contents"])
            ]
            if old.keys() != new.keys() or changed:
                raise MedR1Error(
                    f"{folder}: the run there began with other data: of the questions {part.replace('_', ' ')}"
                    f" {len(old.keys() - new.keys())} went, {len(new.keys() - old.keys())} came and {len(changed)} show"
                    f" other images (see {SPLIT}); restore the data or choose another --out"
                )
        return
    write_atomic(path, "{" + ",\n".join(f"{json.dumps(part)}: {_lines(parts[part])}" for part in parts) + "}\n")


def _lines(questions: Sequence[dict[str, Any]]) -> str:
    """A JSON list, one question a line."""
    return "[\n" + ",\n".join(json.dumps(question, ensure_ascii=False) for question in questions) + "\n]"


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
    tell(", ".join(said))


def _contents(record: Record, contents: Mapping[Path, Content]) -> list[str]:
    """Digests of what a record shows: 32 hexadecimal digits, 128 bits, are enough to tell all images apart."""
    return sorted(digest[:32] for _, digest in content_links(record, contents))
