"""Every phrase of every table in its example, with each two letters and with option texts: a phrase without a test
cannot be written down, and none reads one letter otherwise than another."""

from itertools import permutations

import pytest

from medr1.data.answers import extract_answer
from medr1.data.phrases import TABLES, phrases
from medr1.data.records import LETTERS

OPTIONS = ("Melanoma", "Haemangioma", "Wart", "Cyst")
NOTHING = ("unparsed", "refusal", "invalid", "ambiguous")


def written(example: str, phrase: str, meant: str, other: str) -> str:
    text = example.format(p=phrase, x=other, y=meant)
    return text[:1].upper() + text[1:]


@pytest.mark.parametrize("table", TABLES)
def test_each_phrase_does_what_its_table_says(table: str) -> None:
    wrong = []
    for example, phrase in phrases(TABLES[table]):
        for one, two in permutations(range(4), 2):
            for name in (lambda option: LETTERS[option], lambda option: OPTIONS[option])[: 1 if table in "Vv" else 2]:
                reply = written(example, phrase, name(one), name(two))
                answer = extract_answer(reply, OPTIONS)
                good = answer.letter == LETTERS[one] if "{y}" in example else answer.outcome in NOTHING
                if not good:
                    wrong.append((reply, answer.letter or answer.outcome))
    assert not wrong, f"{len(wrong)}: {wrong[:12]}"
