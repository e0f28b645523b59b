"""Divide records into train and test so that no patient, lesion or image is on both sides.

The public Med-R1 splits are drawn by question: up to a third of their test images are also in train.
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

from medr1.data.images import file_of
from medr1.data.records import Record
from medr1.errors import MedR1Error


def split_by_group(records: Sequence[Record], test_fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, test), each in the order of ids, whatever the order of the records.

    Records that share a group or an image, also by way of other records, stay together. Within each modality
    whole clusters are drawn until the test side has about `test_fraction` of its records. A modality's draw
    depends only on its own records, so training on one modality holds out the same images as training on all.

    Raises:
        MedR1Error: the fraction is not between 0 and 1, or a side would be empty.
    """
    if not 0 < test_fraction < 1:
        raise MedR1Error(f"test_fraction is {test_fraction}; give a number between 0 and 1")
    strata: dict[str, list[list[Record]]] = defaultdict(list)
    for cluster in _clusters(records):
        strata[cluster[0].modality or ""].append(cluster)
    test: list[Record] = []
    for modality, clusters in strata.items():
        random.Random(f"{seed} {modality}").shuffle(clusters)
        wanted = test_fraction * sum(map(len, clusters))
        taken = 0
        for cluster in clusters:
            if taken + len(cluster) / 2 <= wanted:  # taking it brings the side nearer to the wanted size
                taken += len(cluster)
                test += cluster
    test.sort(key=lambda record: record.id)
    held_out = {record.id for record in test}
    train = sorted((record for record in records if record.id not in held_out), key=lambda record: record.id)
    if not train or not test:
        raise MedR1Error(
            f"the {'test' if train else 'train'} side of the split is empty: {len(records)} records in "
            f"{sum(map(len, strata.values()))} separate groups; use more groups or another test_fraction"
        )
    return train, test


def _clusters(records: Sequence[Record]) -> list[list[Record]]:
    """Connected components over shared groups and image files, in the order of ids within and among them."""
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for record in records:
        for image in record.images:
            parent[root(file_of(image))] = root(("group", record.group))
    clusters: dict[Hashable, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.id):
        clusters[root(("group", record.group))].append(record)
    return list(clusters.values())
