"""Which records a step gets: an endless seeded order, by weights of one's own and in balance over what was asked.

The order depends on the records, the recipe and the seed alone, so that a resumed run, and any number of processes,
go on in it. `Draws` goes along it by what the replies were worth: records whose completions all earned the same are
replaced, and those that are far from a wanted pass rate are left aside more often.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medr1.data.kept import taken
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.training.looking import needs_image
from medr1.training.own import as_number, find_function, naming

Weights = Callable[[Sequence[Record]], Any]
"""Of all training records to a list, array or tensor with a number of at least 0 for each: how often it is drawn."""

WEIGHTS: dict[str, Weights] = {"needs_image": needs_image}
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
    generator = torch.Generator().manual_seed(seed)
    strata = _strata(records, weights.nonzero().flatten(), balance)
    streams = [_passes(indices, _shares(weights[indices]), generator) for indices in strata]
    return streams[0] if len(streams) == 1 else _in_turns(streams, generator)


def _strata(records: Sequence[Record], indices: Tensor, balance: str) -> list[Tensor]:
    if balance == "off":
        return [indices]
    numbers: dict[tuple[Any, ...], int] = {}
    names = (stratum(records[index], balance) for index in indices.numpy())
    number_of = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int32, len(indices))
    return [indices[torch.from_numpy(number_of == number)] for number in range(len(numbers))]


def stratum(record: Record, balance: str) -> tuple[Any, ...]:
    """What a record counts as in a balance: its modality, its question type, or both."""
    by = {"off": (), "both": ("modality", "question_type")}.get(balance, (balance,))
    return tuple(getattr(record, name) for name in by)


def _in_turns(streams: Sequence[Iterator[int]], generator: torch.Generator) -> Iterator[int]:
    while True:
        for place in torch.randperm(len(streams), generator=generator).tolist():
            yield next(streams[place])


def _shares(weights: Tensor) -> Tensor | None:
    """How often each record comes in a pass, on average; None where each comes once."""
    return None if (weights == weights[0]).all() else weights / weights.mean()


def _passes(indices: Tensor, shares: Tensor | None, generator: torch.Generator) -> Iterator[int]:
    """One seeded pass after another over records of weights above 0."""
    while True:
        order = torch.randperm(len(indices), generator=generator)
        if shares is not None:
            start = torch.rand(1, dtype=torch.float64, generator=generator)
            times = torch.cat([start, start + shares[order].cumsum(0)]).floor().diff().long()
            order = order.repeat_interleave(times)
            order = order[torch.randperm(len(order), generator=generator)]
        order = indices[order]
        for some in order.split(1024):  # a million whole numbers of Python take five times the room
            yield from some.tolist()


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
        values = list(function(taken(records, range(len(records)))))
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


SHARPNESS = 4.0
"""Of the curriculum: a record of one nat of divergence from the wanted pass rate is drawn exp(-4) times as often."""
LEAST = 0.05
"""Smallest chance of a record that is drawn not to be left aside, so that none is lost as the policy changes."""
PRIOR = 2.0
"""Replies that what is known of a record's modality and question type counts for, beside those to the record itself."""


class Draws:
    """How far a run has come in its order, and how often the policy was right about each record.

    Every process of a run holds the same, asks for the same and is told the same.

    Args:
        order: begins the order; it is the same each time.
    """

    def __init__(self, records: Sequence[Record], order: Callable[[], Iterator[int]], seed: int) -> None:
        self.records, self.begin, self.seed = records, order, seed
        self.load({"drawn": 0, "left_aside": 0, "passed": []})

    def take(self, count: int, rate: float | None = None) -> list[int]:
        """Indices of the next `count` records; with a pass rate in (0, 1) each is left aside but for its `chance`."""
        taken: list[int] = []
        while len(taken) < count:
            index = next(self.order)
            self.drawn += 1
            if rate is None or random.Random(f"{self.seed} {self.drawn}").random() < self.chance(index, rate):
                taken.append(index)
            else:
                self.left_aside += 1
        return taken

    def cell(self, index: int) -> tuple[Any, ...]:
        """What a record is known by until it was asked: its modality and question type."""
        return stratum(self.records[index], "both")

    def chance(self, index: int, rate: float) -> float:
        """exp(-SHARPNESS KL(rate ‖ the record's pass rate)), LEAST at least: 1 where the policy is right that often.

        A record's pass rate is that of its last group, drawn by PRIOR replies towards that of its modality and question
        type, which stands alone where the record was not asked yet, and is 1/2 where none of them was.
        """
        cell_right, cell_replies = self.of_cells.get(self.cell(index), (0, 0))
        right, replies = self.passed.get(index, (0, 0))
        known = (right + PRIOR * (cell_right + 1) / (cell_replies + 2)) / (replies + PRIOR)
        divergence = rate * math.log(rate / known) + (1 - rate) * math.log((1 - rate) / (1 - known))
        return max(LEAST, math.exp(-SHARPNESS * divergence))

    def learn(self, index: int, right: int, replies: int) -> None:
        """A record's group had so many right replies; what the group before it had is forgotten."""
        before, cell = self.passed.get(index, (0, 0)), self.cell(index)
        cell_right, cell_replies = self.of_cells.get(cell, (0, 0))
        self.of_cells[cell] = cell_right + right - before[0], cell_replies + replies - before[1]
        self.passed[index] = right, replies

    def state(self) -> dict[str, Any]:
        """What `load` takes, as JSON."""
        passed = [[index, *counts] for index, counts in self.passed.items()]
        return {"drawn": self.drawn, "left_aside": self.left_aside, "passed": passed}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where a `state` was taken."""
        self.drawn, self.left_aside = state["drawn"], state["left_aside"]
        self.order = islice(self.begin(), self.drawn, None)
        self.passed: dict[int, tuple[int, int]] = {}
        self.of_cells: dict[tuple[Any, ...], tuple[int, int]] = {}
        for index, right, replies in state["passed"]:
            self.learn(index, right, replies)
