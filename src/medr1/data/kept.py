"""Many records in little memory: in a list up to LIMIT of them, beyond that in a file, from which each is read when it
is asked for.

    records = kept(readers)               # gone through once
    records[3], len(records), [*records]  # as of any sequence
    part = taken(records, [5, 2, 7])      # these, in this order, and none of them is read

The file has no name. It goes when the process does, however that ends, so that it is never stale and never left over.
A list is quicker, and short enough ones cost nothing, so there both are; nothing else need know which.
"""

import hashlib
import heapq
import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from medr1.data.cache import cache_folder
from medr1.data.records import Record
from medr1.errors import MedR1Error

LIMIT = 20_000
"""Records that are kept in a list at most: some 50 MB."""


def kept(records: Iterable[Record]) -> Sequence[Record]:
    """The records, in their order. In a list equal parts of them are the same objects.

    Raises:
        MedR1Error: there are more than LIMIT, and the cache has no room for them.
    """
    rest = iter(records)
    known: dict[Any, Any] = {}
    first = [record.sharing(known) for record in islice(rest, LIMIT + 1)]
    return first if len(first) <= LIMIT else _OnDisk(*_written(chain(first, rest)))


def taken(records: Sequence[Record], places: Iterable[int]) -> Sequence[Record]:
    """The records at these places, in this order: a list of a list, and of a file a view."""
    if isinstance(records, _OnDisk):
        places = places if isinstance(places, np.ndarray) else np.fromiter(places, np.int32)
        return _OnDisk(records.file, records.starts, records.places[places])
    return [records[place] for place in places]


def in_order(records: Sequence[Record], key: Callable[[Record], str]) -> npt.NDArray[np.int32]:
    """Places (records,) of the records by rising key, those of one key as they stand: runs of LIMIT, merged."""

    def key_at(place: int) -> str:
        return key(records[place])

    numbers = range(len(records))
    runs = [array("i", sorted(numbers[start : start + LIMIT], key=key_at)) for start in numbers[::LIMIT]]
    return np.fromiter(heapq.merge(*runs, key=key_at), np.int32, len(records))


def code(*parts: str) -> int:
    """64 bits that stand for texts where these would take too much room; two of a million are alike once in 10^7."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


class _OnDisk(Sequence[Record]):
    """Records in a file: 8 bytes in memory for each in it, and 4 for each in a view.

    Args:
        file: packed records, one after the other.
        starts: (in the file + 1,) uint64, where each begins and the last ends.
        places: (in the view,) int32, which of them these are.
    """

    def __init__(self, file: Any, starts: npt.NDArray[np.uint64], places: npt.NDArray[np.int32]) -> None:
        self.file, self.starts, self.places = file, starts, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | Sequence[Record]:
        if isinstance(place, slice):
            return _OnDisk(self.file, self.starts, self.places[place])
        number = self.places[place]
        start, end = self.starts[number : number + 2].tolist()
        # Unlike a seek this is safe among threads, and among processes that fork with the file open.
        return Record.unpacked(pickle.loads(os.pread(self.file.fileno(), end - start, start)))

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))


def _written(records: Iterable[Record]) -> tuple[Any, npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """What `_OnDisk` takes."""
    folder = cache_folder()
    starts = array("Q", [0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (its views close it)
    except OSError as error:
        raise _no_room(error) from error
    for record in records:
        packed = pickle.dumps(record.packed(), pickle.HIGHEST_PROTOCOL)
        starts.append(starts[-1] + len(packed))
        try:
            file.write(packed)
        except OSError as error:
            raise _no_room(error) from error
    try:
        file.flush()
    except OSError as error:
        raise _no_room(error) from error
    return file, np.frombuffer(starts, np.uint64), np.arange(len(starts) - 1, dtype=np.int32)


def _no_room(error: OSError) -> MedR1Error:
    return MedR1Error(
        f"{cache_folder()}: more than {LIMIT:,} questions are kept in a file there while they are needed, and it cannot"
        f" be written ({error.strerror}); free space or set MEDR1_CACHE"
    )
