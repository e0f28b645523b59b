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
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medr1.data.images import Content, file_of, is_salted, with_contents
from medr1.data.kept import code, in_order, kept, taken
from medr1.data.records import MODALITIES, Record, normalise_option
from medr1.errors import MedR1Error
from medr1.processes import tell

MAX_RATIO = 2.0
"""A part that is larger than asked for by more than this is not left to the hash."""

STRATA = (*sorted(MODALITIES), "unstated modality")
"""What is divided by itself."""

Link = tuple[str, str]
"""What two records may share, and so must stay together: ("group", name), ("file", path), ("bytes", SHA-256),
("pixels", SHA-256) or, of a question without image and group, ("question", SHA-256 of its words)."""


def split_by_group(
    records: Sequence[Record], test_fraction: float, seed: int
) -> tuple[Sequence[Record], Sequence[Record]]:
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
        tell(note, "yellow")
    return train, test


def divided(
    records: Sequence[Record], test_fraction: float, seed: int
) -> tuple[Sequence[Record], Sequence[Record], str]:
    """As `split_by_group`, and what is to be said of a small set instead of saying it; else ""."""
    if not 0 < test_fraction < 1:
        raise MedR1Error(f"test_fraction is {test_fraction}; give a number between 0 and 1")
    ordered = taken(records, in_order(records, lambda record: record.id))
    notes = _Notes(seed)
    cluster_N = _clusters(map(notes.noted, _found(ordered)), len(ordered))
    sizes_C = np.bincount(cluster_N)
    if len(sizes_C) < 2:
        raise MedR1Error(_undividable(records))
    drawn_C, modality_C = notes.of_clusters(cluster_N)
    by_hash_C = np.argsort(drawn_C, kind="stable")
    in_test_C = np.zeros(len(sizes_C), bool)
    small = []
    for number, name in (-1, STRATA[-1]), *enumerate(STRATA[:-1]):
        of_it = by_hash_C[modality_C[by_hash_C] == number % len(STRATA)]
        if not len(of_it):
            continue
        by_hash = of_it[drawn_C[of_it] < test_fraction]
        is_fair = _is_fair(sizes_C[by_hash], sizes_C[of_it], test_fraction)
        chosen = by_hash if is_fair else of_it[_nearest(sizes_C[of_it], test_fraction)]
        if not np.array_equal(chosen, by_hash) or not 0 < len(chosen) < len(of_it):
            small.append(f"{len(chosen)} of {len(of_it)} groups of {name}")
        in_test_C[chosen] = True
    if in_test_C.all() or not in_test_C.any():
        is_empty, wanted = not in_test_C.any(), test_fraction * len(ordered)
        distance_C = abs(sizes_C[by_hash_C] - (wanted if is_empty else len(ordered) - wanted))
        in_test_C[by_hash_C[distance_C.argmin()]] = is_empty
        small = [f"{in_test_C.sum()} of {len(sizes_C)} groups"]
    note = f"split: too few groups to hold out {test_fraction:g} by hash; nearest possible: {', '.join(small)}"
    in_test_N = in_test_C[cluster_N]
    train, test = (taken(ordered, np.flatnonzero(part_N)) for part_N in (~in_test_N, in_test_N))
    return train, test, note if small else ""


def links_of(records: Sequence[Record]) -> list[frozenset[Link]]:
    """What each record may not be parted from, in the order of the records: its groups, files, bytes and pixels.

    Patients and studies of DICOM files are groups. An image that cannot be read has its file alone, and one that cannot
    be decoded no pixels.
    """
    return [frozenset(links) for _, links in _found(records)]


def joined(records: Sequence[Record], *, by_content: bool = True) -> Sequence[Record]:
    """The same records, in their order, `group` naming the whole cluster: the smallest of its records' groups.

    Args:
        by_content: without it groups alone join, and no image is looked at.
    """
    groups = ((record, {("group", group) for group in (record.group, *record.groups)}) for record in records)
    cluster_N = _clusters((links for _, links in (_found(records) if by_content else groups)), len(records))
    names = array("i", [-1]) * (int(cluster_N.max(initial=0)) + 1)
    """Of each cluster: the place of a record that has its name."""
    last, name = -1, ""
    for place, (cluster, record) in enumerate(zip(cluster_N, records, strict=True)):
        if cluster != last:  # neighbours are mostly of one cluster
            last, name = cluster, records[names[cluster]].group if names[cluster] >= 0 else record.group
        if names[cluster] < 0 or record.group < name:
            names[cluster], name = place, record.group

    def named() -> Iterator[Record]:
        last, name = -1, ""
        for cluster, record in zip(cluster_N, records, strict=True):
            if cluster != last:
                last, name = cluster, records[names[cluster]].group
            yield record if record.group == name else record.model_copy(update={"group": name})

    return kept(named())


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


def _found(records: Sequence[Record]) -> Iterator[tuple[Record, set[Link]]]:
    for record, contents in with_contents(records, lambda record: record.images):
        owners = [owner for image in record.images if image in contents for owner in contents[image].owners]
        links = {("group", group) for group in (record.group, *record.groups, *owners)}
        links |= {("file", str(file_of(image))) for image in record.images}
        yield record, links | content_links(record, contents)


def _clusters(found: Iterable[Collection[Link]], num_records: int) -> npt.NDArray[np.int32]:
    """The connected component (records,) of each record, numbered in the order of their first records."""
    codes, places = array("Q"), array("i")
    before: set[Link] = set()
    for place, links in enumerate(found):
        shared = before.intersection(links)
        # Most records share all their links with the one before: one of these is enough to join them.
        for kind, name in {*links} - shared | {*islice(shared, 1)}:
            codes.append(code(kind, name))
            places.append(place)
        before = {*links}
    code_L = np.asarray(codes)
    order_L = np.argsort(code_L, kind="stable")
    pairs = np.flatnonzero(code_L[order_L[1:]] == code_L[order_L[:-1]])
    place_L = np.asarray(places)
    edges = place_L[order_L[pairs]], place_L[order_L[pairs + 1]]
    graph = coo_array((np.ones(len(pairs), bool), edges), shape=(num_records, num_records))
    cluster_N = connected_components(graph, directed=False)[1]
    _, first_C = np.unique(cluster_N, return_index=True)
    number_C = np.empty_like(cluster_N, shape=len(first_C))
    number_C[first_C.argsort()] = np.arange(len(first_C))
    return number_C[cluster_N]


class _Notes:
    """What clusters are divided by: the best name of each record, of which a cluster is hashed by the best, and its
    modality.

    A name counts by its kind, and among those of a kind by its hash. It does not tell where files lie.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kinds, self.hashes, self.sides, self.modalities = array("b"), array("d"), array("d"), array("b")

    def noted(self, found: tuple[Record, set[Link]]) -> set[Link]:
        """The links as they are given with their record."""
        record, links = found
        # A salted name differs from machine to machine, and so would the split.
        names, kind = {group for group in record.groups if not is_salted(group)}, 0
        while not names:
            kind += 1
            names = {name for link, name in links if link == ("bytes", "question", "group")[kind - 1]}
        hashed, name = min((_hash(f"{self.seed} name {name}"), name) for name in names)
        self.kinds.append(kind)
        self.hashes.append(hashed)
        self.sides.append(_hash(f"{self.seed} side {name}"))
        self.modalities.append(STRATA.index(record.modality or STRATA[-1]))
        return links

    def of_clusters(self, cluster_N: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int8]]:
        """A number in [0, 1) for each (clusters,), and which of STRATA it belongs to, the first of its records'."""
        kind_N, hash_N, side_N, modality_N = map(np.asarray, (self.kinds, self.hashes, self.sides, self.modalities))
        order_N = np.lexsort((hash_N, kind_N, cluster_N))
        _, first_C = np.unique(cluster_N[order_N], return_index=True)
        modality_C = np.full(len(first_C), len(STRATA) - 1, np.int8)
        np.minimum.at(modality_C, cluster_N, modality_N)
        return side_N[order_N[first_C]], modality_C


@lru_cache(maxsize=1 << 14)  # neighbours share their names
def _hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"medr1 split").digest()
    return int.from_bytes(digest) / 2**64


def _is_fair(test_K: npt.NDArray[Any], sizes_K: npt.NDArray[Any], test_fraction: float) -> bool:
    """Whether neither part is empty, or larger than MAX_RATIO times what was asked for."""
    share = test_K.sum() / sizes_K.sum()
    return bool(0 < share <= MAX_RATIO * test_fraction and 0 < 1 - share <= MAX_RATIO * (1 - test_fraction))


def _nearest(sizes_K: npt.NDArray[Any], test_fraction: float) -> list[int]:
    """Places of clusters in their order, each taken where it brings the part nearer to the wanted number of records."""
    wanted = test_fraction * sizes_K.sum()
    chosen: list[int] = []
    total = 0
    for place, size in enumerate(sizes_K.tolist()):
        if total + size / 2 <= wanted:
            total += size
            chosen.append(place)
    return chosen


def _undividable(records: Sequence[Record]) -> str:
    if len(records) < 2:
        return f"no division is possible: there {'is one record' if records else 'are no records'}; give more data"
    times = Counter(link for _, links in _found(records) for link in links)
    (kind, name), num = min(times.items(), key=lambda item: (-item[1], item[0]))
    first = next(record for record, links in _found(records) if (kind, name) in links)
    what = {"bytes": "copies of an image", "pixels": "copies of a picture", "question": "the same question"}
    shared = f"{what[kind]} (record {first.id})" if kind in what else f"the {kind} {name}"
    return (
        f"no division is possible: all {len(records)} records hang together by shared groups or images, {num} of"
        f" them by {shared}; give data of more patients, or groups that tell them apart"
    )
