"""Divide records into train and test so that no patient, lesion, study, image file, bytes or pixels are on both sides.

The public Med-R1 splits are drawn by question: up to a third of their test images are also in train.

What may not be parted hangs together by links: groups, files, contents. The split, the leak report (`medr1 data check`)
and the names that intervals count by all divide by the connected components that `_clusters` finds.

A cluster's side is a keyed hash of itself, so it depends neither on other data nor on where the data lie: what is
added, removed, moved or reordered leaves every other cluster where it was. A cluster is hashed by one of its groups'
names, else by the bytes of one of its images. Which one is drawn by hash too, so that a cluster that grows to k names
changes sides with probability 2 f (1 - f) / k only, f being the test fraction; so it is with clusters that new data
link. What a run trained on and held out does not change with it: its own list rules (`medr1.data.heldout`).
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from medr1.data.images import Content, contents_of, file_of, is_salted
from medr1.data.records import Record, normalise_option
from medr1.errors import MedR1Error
from medr1.processes import is_first

MAX_RATIO = 2.0
"""A part that is larger than asked for by more than this is not left to the hash."""

Link = tuple[str, str]
"""What two records may share, and so must stay together: ("group", name), ("file", path), ("bytes", SHA-256),
("pixels", SHA-256) or, of a question without image and group, ("question", SHA-256 of its words)."""


def split_by_group(records: Sequence[Record], test_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, test), each in the order of ids, whatever the order of the records.

    Records that share a link (see `links_of`), also by way of other records, stay together. Each cluster is drawn for
    test with probability `test_fraction`, by a hash of `seed` and of the cluster alone. Where that leaves a part of a
    modality empty or more than twice as large as asked for, as it may in a small set, the modality is divided as nearly
    as its clusters allow, in the order of their hashes, and stderr says so. A modality's division depends only on its
    own records, so training on one modality holds out the same images as training on all.

    Raises:
        MedR1Error: the fraction is not between 0 and 1, or all records hang together.
    """
    train, test, note = divided(records, test_fraction, seed)
    if note:
        tell(note)
    return train, test


def divided(records: Sequence[Record], test_fraction: float, seed: int) -> tuple[list[Record], list[Record], str]:
    """As `split_by_group`, and what is to be said of a small set instead of saying it; else ""."""
    if not 0 < test_fraction < 1:
        raise MedR1Error(f"test_fraction is {test_fraction}; give a number between 0 and 1")
    found = _found(records)
    together = _clusters(records, found)
    if len(together) < 2:
        raise MedR1Error(_undividable(records, found))
    drawn = {
        cluster[0]: _draw([records[number] for number in cluster], [found[number] for number in cluster], seed)
        for cluster in together
    }
    together.sort(key=lambda cluster: drawn[cluster[0]])
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for cluster in together:
        strata[min(filter(None, (records[number].modality for number in cluster)), default="")].append(cluster)
    test: list[list[int]] = []
    small = []
    for modality, clusters_of_it in sorted(strata.items()):
        by_hash = [cluster for cluster in clusters_of_it if drawn[cluster[0]] < test_fraction]
        chosen = (
            by_hash if _is_fair(by_hash, clusters_of_it, test_fraction) else _nearest(clusters_of_it, test_fraction)
        )
        if chosen != by_hash or not 0 < len(chosen) < len(clusters_of_it):
            small.append(f"{len(chosen)} of {len(clusters_of_it)} groups of {modality or 'unstated modality'}")
        test += chosen
    if not test or len(test) == len(together):
        wanted = test_fraction * len(records)
        nearest = min(together, key=lambda cluster: abs(len(cluster) - (wanted if not test else len(records) - wanted)))
        test = [nearest] if not test else [cluster for cluster in together if cluster is not nearest]
        small = [f"{len(test)} of {len(together)} groups"]
    note = f"split: too few groups to hold out {test_fraction:g} by hash; nearest possible: {', '.join(small)}"
    held_out = {number for cluster in test for number in cluster}
    parts: tuple[list[Record], list[Record]] = ([], [])
    for number, record in enumerate(records):
        parts[number in held_out].append(record)
    for part in parts:
        part.sort(key=lambda record: record.id)
    return *parts, note if small else ""


def links_of(records: Sequence[Record]) -> list[frozenset[Link]]:
    """What each record may not be parted from, in the order of the records: its groups, files, bytes and pixels.

    Patients and studies of DICOM files are groups. An image that cannot be read has its file alone, and one that cannot
    be decoded no pixels.
    """
    return [frozenset(links) for links in _found(records)]


def joined(records: Sequence[Record], *, by_content: bool = True) -> list[Record]:
    """The same records, in their order, `group` naming the whole cluster: the smallest of its records' groups.

    Args:
        by_content: without it groups alone join, and no image is looked at.
    """
    named = list(records)
    groups = [{("group", group) for group in (record.group, *record.groups)} for record in records]
    for cluster in _clusters(records, _found(records) if by_content else groups):
        name = min(records[number].group for number in cluster)
        for number in cluster:
            if named[number].group != name:
                named[number] = named[number].model_copy(update={"group": name})
    return named


def question_digest(record: Record) -> str:
    """SHA-256 (hex) of a question's words and its options', up to case and white space."""
    return hashlib.sha256("\0".join(map(normalise_option, (record.question, *record.options))).encode()).hexdigest()


def content_links(record: Record, contents: Mapping[Path, Content]) -> set[Link]:
    """The links of a record that any copy of it has, wherever it lies and whatever its groups are called."""
    links: set[Link] = set()
    for image in record.images:
        if content := contents.get(image):
            links |= {("bytes", content.file)} | ({("pixels", content.pixels)} if content.pixels else set())
    if not record.images and not record.groups:
        links.add(("question", question_digest(record)))
    return links


def _found(records: Sequence[Record]) -> list[set[Link]]:
    contents = contents_of(image for record in records for image in record.images)
    found = []
    for record in records:
        owners = [owner for image in record.images if image in contents for owner in contents[image].owners]
        links = {("group", group) for group in (record.group, *record.groups, *owners)}
        links |= {("file", str(file_of(image))) for image in record.images}
        found.append(links | content_links(record, contents))
    return found


def _clusters(records: Sequence[Record], found: Sequence[Collection[Link]]) -> list[list[int]]:
    """Connected components as places in `records`, in the order of ids within and among them."""
    parent: dict[Link, Link] = {}

    def root(node: Link) -> Link:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for record, links in zip(records, found, strict=True):
        for link in links:
            parent[root(link)] = root(("group", record.group))
    together: dict[Link, list[int]] = defaultdict(list)
    for number in sorted(range(len(records)), key=lambda number: records[number].id):
        together[root(("group", records[number].group))].append(number)
    return list(together.values())


def _draw(cluster: Sequence[Record], found: Sequence[Collection[Link]], seed: int) -> float:
    """A number in [0, 1) by the name of the cluster, which does not tell where its files lie."""
    links = {link for links in found for link in links}
    # A salted name differs from machine to machine, and so would the split.
    names = {group for record in cluster for group in record.groups if not is_salted(group)}
    for kind in ("bytes", "question", "group"):
        names = names or {name for link, name in links if link == kind}
    return _hash(f"{seed} side {min(names, key=lambda name: (_hash(f'{seed} name {name}'), name))}")


def _hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"medr1 split").digest()
    return int.from_bytes(digest) / 2**64


def _is_fair(test: Sequence[list[int]], together: Sequence[list[int]], test_fraction: float) -> bool:
    """Whether neither part is empty, or larger than MAX_RATIO times what was asked for."""
    total = sum(map(len, together))
    share = sum(map(len, test)) / total
    return 0 < share <= MAX_RATIO * test_fraction and 0 < 1 - share <= MAX_RATIO * (1 - test_fraction)


def _nearest(together: Sequence[list[int]], test_fraction: float) -> list[list[int]]:
    """Clusters in their order, each taken where it brings the part nearer to the wanted number of records."""
    wanted = test_fraction * sum(map(len, together))
    chosen: list[list[int]] = []
    taken = 0
    for cluster in together:
        if taken + len(cluster) / 2 <= wanted:
            taken += len(cluster)
            chosen.append(cluster)
    return chosen


def _undividable(records: Sequence[Record], found: Sequence[Collection[Link]]) -> str:
    if len(records) < 2:
        return f"no division is possible: there {'is one record' if records else 'are no records'}; give more data"
    (kind, name), num = Counter(sorted(link for links in found for link in links)).most_common(1)[0]
    first = next(record for record, links in zip(records, found, strict=True) if (kind, name) in links)
    what = {"bytes": "copies of an image", "pixels": "copies of a picture", "question": "the same question"}
    shared = f"{what[kind]} (record {first.id})" if kind in what else f"the {kind} {name}"
    return (
        f"no division is possible: all {len(records)} records hang together by shared groups or images, {num} of"
        f" them by {shared}; give data of more patients, or groups that tell them apart"
    )


def tell(note: str) -> None:
    """Say it on stderr, in the first process alone."""
    if is_first():
        Console(stderr=True, soft_wrap=True).print(note, style="yellow", markup=False, highlight=False)
