"""Which records a step gets: an endless seeded order, by weights of one's own and in balance over what was asked.

The order depends on the records, the recipe and the seed alone, so that a resumed run, and any number of processes,
go on in it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.training.own import as_number, find_function, naming

Weights = Callable[[Sequence[Record]], Any]
"""Of all training records to a list, array or tensor with a number of at least 0 for each: how often it is drawn."""

WEIGHTS: dict[str, Weights] = {}
"""Those that a recipe can name by a word."""


def draw_order(records: Sequence[Record], weights: Tensor, balance: str, seed: int) -> Iterator[int]:
    """Indices of records without end.

    Without weights each comes once before any comes again. With them a pass, as many draws as there are records, holds
    each as often as its share of all weights says, rounded up or down by chance (systematic sampling, of the least
    variance: Madow 1949, doi:10.1214/aoms/1177729988). With `balance` the strata take turns, in an order that is drawn
    anew each round, and each has its own passes: among as many draws as there are strata in a row, none has two more
    than another. A record of weight 0 never comes, nor a stratum of such records.

    Args:
        weights: (records,), see `record_weights`.
        balance: of `DrawsConfig`.
    """
    strata: dict[tuple[Any, ...], list[int]] = {}
    for index, record in enumerate(records):
        if weights[index] > 0:
            strata.setdefault(stratum(record, balance), []).append(index)
    generator = torch.Generator().manual_seed(seed)
    streams = [_passes(torch.tensor(indices), weights[indices], generator) for indices in strata.values()]
    return streams[0] if len(streams) == 1 else _in_turns(streams, generator)


def stratum(record: Record, balance: str) -> tuple[Any, ...]:
    """What a record counts as in a balance: its modality, its question type, or both."""
    by = {"off": (), "both": ("modality", "question_type")}.get(balance, (balance,))
    return tuple(getattr(record, name) for name in by)


def _in_turns(streams: Sequence[Iterator[int]], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(streams), generator=generator).tolist():
            yield next(streams[place])


def _passes(indices: Tensor, weights: Tensor, generator: torch.Generator) -> Iterator[int]:
    """One seeded pass after another over records of weights above 0."""
    shares = weights / weights.mean()
    alike = bool((weights == weights[0]).all())
    while True:
        order = torch.randperm(len(indices), generator=generator)
        if not alike:
            start = torch.rand(1, dtype=torch.float64, generator=generator)
            times = torch.cat([start, start + shares[order].cumsum(0)]).floor().diff().long()
            order = order.repeat_interleave(times)
            order = order[torch.randperm(len(order), generator=generator)]
        yield from indices[order].tolist()


def record_weights(records: Sequence[Record], name: str) -> Tensor:
    """Weights (records,) in float64 by a name of WEIGHTS or a function of the user's own; without a name all are 1.

    Raises:
        MedR1Error: the function cannot be found, raises, or gives anything but a finite number of at least 0 for each
            record, with one above 0 among them.
    """
    if not name:
        return torch.ones(len(records), dtype=torch.float64)
    function = find_function(name, WEIGHTS, "weights")
    with naming(f"weights {name!r}", f"the {len(records)} training records", "mend it"):
        values = list(function(list(records)))
    numbers = [as_number(value) for value in values]
    if len(values) != len(records):
        raise MedR1Error(
            f"weights {name!r} gave {len(values)} for {len(records)} training records; return one for each"
        )
    for record, value, number in zip(records, values, numbers, strict=True):
        if number is None or not 0 <= number < torch.inf:
            raise MedR1Error(
                f"weights {name!r} gave {value!r:.80} for record {record.id}; return a finite number of at least 0"
            )
    if not any(numbers):
        raise MedR1Error(f"weights {name!r} gave 0 for every training record; return a number above 0 for some")
    return torch.tensor(numbers, dtype=torch.float64)
