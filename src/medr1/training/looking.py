"""Objectives that keep a policy looking at the image."""

import random
from collections.abc import Sequence

from medr1.data.records import LETTERS, Record, normalise_option

Pool = dict[str, list[Record]]
"""Records by the text of their right option."""


class OtherImages:
    """Training images to which another of a question's options is right, as their own records tell.

    Those are the images of records that were asked the same type of question with the same options (in any order, up to
    case, white space and a final full stop), of the same modality where there are such.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.pools: dict[object, Pool] = {}
        for record in records:
            for key in _keys(record):
                self.pools.setdefault(key, {}).setdefault(_text(record.gold), []).append(record)

    def pool(self, record: Record) -> Pool:
        """The record itself and all others of its pool; empty where there is no other right answer."""
        pools = (self.pools.get(key, {}) for key in _keys(record))
        return next((pool for pool in pools if len(pool) > 1), {})

    def exchanged(self, record: Record, share: float, seed: str) -> Record:
        """In a `share` of the draws the question about another image, its right answer drawn with equal chance."""
        draw = random.Random(f"{seed} {record.id}")
        if draw.random() >= share or not (pool := self.pool(record)):
            return record
        right = draw.choice(sorted(pool))
        answer = LETTERS[[_text(option) for option in record.options].index(right)]
        return record.model_copy(update={"images": draw.choice(pool[right]).images, "answer": answer})


def _keys(record: Record) -> list[tuple[str | None, str | None, frozenset[str]]]:
    texts = frozenset(map(_text, record.options))
    if not record.images or record.is_open or len(texts) < len(record.options):
        return []
    return [(modality, record.question_type, texts) for modality in (record.modality, "any")]


def _text(option: str) -> str:
    return normalise_option(option).rstrip(".")
