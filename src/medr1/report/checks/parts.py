"""What train and test share: the published pairs of files, and our own split, which must share nothing."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

from medr1.config import DataConfig
from medr1.data.kept import kept, taken
from medr1.data.records import Record, plain
from medr1.data.splits import joined, split_by_group
from medr1.errors import MedR1Error
from medr1.evaluation.controls import group_disjoint, image_disjoint, text_only_prior
from medr1.report.checks.images import Pictures

Parts = tuple[Sequence[Record], Sequence[Record]]

_PART = re.compile(r"(?P<name>.*[_\-/ ]|)(?P<part>train|test)(?P<rest>/.*|)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-\w+)?$")


def by_file(records: Sequence[Record], files: Sequence[tuple[str, int]]) -> dict[str, Sequence[Record]]:
    """Records by the file that they are of.

    Args:
        files: of each its short name and its number of records, in their order, see `load_records`.
    """
    ends = accumulate(num for _, num in files)
    return {name: taken(records, range(end - num, end)) for (name, num), end in zip(files, ends, strict=True)}


def asked_apart(files: Mapping[str, Sequence[Record]]) -> list[Sequence[Record]]:
    """The records of each part of a published split by itself, and those of no part as one."""
    others = [records for file, records in files.items() if not _part_of(file)]
    together = others if len(others) < 2 else [kept(chain(*others))]
    return [*(records for file, records in files.items() if _part_of(file)), *together]


def _part_of(file: str) -> re.Match[str] | None:
    return _PART.fullmatch(_SHARD.sub("", file))


def published_parts(files: Mapping[str, Sequence[Record]]) -> dict[str, Parts]:
    """(train, test) of each pair of files that differ in the word train or test: "CT_train" and "CT_test", "train" and
    "test", "train/rows" and "test/rows"; of several shards ("train-00000-of-00002-…") as one.
    """
    found: dict[str, dict[str, list[Sequence[Record]]]] = defaultdict(lambda: {"train": [], "test": []})
    for file, records in sorted(files.items()):
        if match := _part_of(file):
            name = (match["name"] + match["rest"]).strip("_-/ ")
            found[name or "the published split"][match["part"]].append(records)
    return {
        name: (kept(chain(*parts["train"])), kept(chain(*parts["test"])))
        for name, parts in found.items()
        if all(map(any, parts.values()))
    }


def own_parts(records: Sequence[Record]) -> Parts | None:
    """(train, test) as every command divides by default; None where there are too few groups to divide."""
    defaults = DataConfig()
    try:
        return split_by_group(records, test_fraction=defaults.test_fraction, seed=defaults.split_seed)
    except MedR1Error:
        return None


def compare_parts(train: Sequence[Record], test: Sequence[Record], pictures: Pictures) -> dict[str, Any]:
    """What the test part shares with the training part.

    Returns:
        train, test: numbers of questions. Numbers of test questions: image_in_train (the same path),
        group_in_train, copy_in_train (the same pixels), near_in_train (no copy, but a picture that looks alike),
        question_in_train (the same image and stem), stem_in_train (the same stem up to case and punctuation).
        copy_in_train and near_in_train are None where no image was read.
        text_only: `text_only_prior` learned from the training part.
    """

    def shown(record: Record) -> tuple[str, ...]:
        return tuple(pictures.content[image] for image in record.images)

    contents = {content for record in train for content in shown(record)}
    alike = {other for content in contents for other in pictures.near_content.get(content, ())}
    asked = {(shown(record), plain(record.question)) for record in train}
    stems = {stem for _, stem in asked}
    copied = [not contents.isdisjoint(shown(record)) for record in test]
    near = [not alike.isdisjoint(shown(record)) for record in test]
    return {
        "train": len(train),
        "test": len(test),
        "image_in_train": len(test) - len(image_disjoint(train, test)),
        "group_in_train": len(test) - len(group_disjoint(train, test)),
        "copy_in_train": sum(copied) if pictures.paths else None,
        "near_in_train": sum(n and not c for n, c in zip(near, copied, strict=True)) if pictures.paths else None,
        "question_in_train": sum((shown(record), plain(record.question)) in asked for record in test),
        "stem_in_train": sum(plain(record.question) in stems for record in test),
        "text_only": text_only_prior(train, joined(test)),
    }
