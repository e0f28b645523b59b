"""Where a reply writes out an option: texts as tokens in which signs, decimals, units and ranges stay whole.

"2.5 cm" is the two tokens 2.5 and cm, so that "5 cm" is not in it; "HER2-" is her2 and a minus, as "HER2 negative" is;
"5-10", "1/2", "<5" and "2 x 5" are one token each. Two texts are the same if their tokens are. An option may be written
in several ways: without its brackets, with "xray" for "x-ray", by what tells it from the others alone ("III" where all
begin with "Stage").
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple

from medr1.data.records import LETTERS, normalise_option

Meaning = frozenset[str]
"""Letters that a mention stands for: several where options share a text, none for a letter out of range."""

TEXT, LOWER_TEXT, WEAK_TEXT = "\ue000", "\ue001", "\ue002"
"""Stand for an option's text in `OptionTexts.mask`: as a name; begun in lower case where the option is not, as a word
of a sentence is; and one that is too easily part of something else (a bare number, "III" for "Stage III")."""

CJK = "\u3040-\u30ff\u3400-\u9fff"
"""Kana and Chinese characters, which have no spaces between words."""
HANGUL = "가-힣"
_LATIN = rf"[^\W_{CJK}{HANGUL}]"
_PARTICLES = "입니다|이다|이에요|예요|이고|으로|로|가|이|은|는|을|를|의|과|와|도|만"
_WORD = rf"(?!\d){_LATIN}+(?:'{_LATIN}+)*\*?|[{HANGUL}]+?(?=(?:{_PARTICLES})(?![{HANGUL}]))|[{HANGUL}]+"
_NUM = r"(?:\d+(?:[.,]\d+)*|\.\d+)(?:\s?[x×]?\s?10?\^[+-]?\d+|\^[+-]?\d+)?"
_SIGNED = rf"(?:(?<![\w)\]])[+\-±])?{_NUM}"
_UNIT = r"(?:\s?(?:[mcµμu]?m|mg|ml|kg|g|%|years?|days?|weeks?|months?)\b)?"
_SMALLER = r"less than|fewer than|smaller than|under|below|weniger als|moins de|menos de|менее"
_LARGER = r"more than|greater than|larger than|over|above|mehr als|plus de|más de|mais de|более"
_AT_MOST, _AT_LEAST = r"no more than|not more than|at most|up to", r"no less than|not less than|at least"
_NUMBER = rf"""
    (?P<op><=|>=|[<>≤≥])?[ ]?
    (?P<number>(?<![^\W\d_{CJK}])(?<!\w[.,])(?:
        \d+\s?[/:]\s?\d+(?:[/:]\d+)*                        # fractions, ratios
        |{_NUM}{_UNIT}(?:\s?[x×]\s?{_NUM}{_UNIT})+          # dimensions
        |{_SIGNED}{_UNIT}\s?(?:[-–—~]|\bto\b|\bbis\b)\s?{_NUM}   # ranges
        |{_SIGNED}
    ))
"""
_TOKEN = re.compile(
    rf"(?=[\d+\-±.<>≤≥])(?:{_NUMBER})|(?P<word>[{CJK}]|{_WORD})|(?P<sign>[+-]+)|(?P<unit>[%°])|(?P<hard>[.;:!?。！？\n/|])"
    rf"|(?P<soft>[^\w+\-±.<>≤≥%°;:!?。！？\n/|]+|.)",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_COMPARED = {  # by the words
    tuple(words.split()): sign
    for sign, several in (
        ("<=", _AT_MOST),
        (">=", _AT_LEAST),
        ("<", _SMALLER),
        (">", _LARGER),
        ("+", "plus"),
        ("-", "minus"),
    )
    for words in several.split("|")
}
_OPERATORS = {"<=": "<=", "≤": "<=", ">=": ">=", "≥": ">=", "<": "<", ">": ">"}
_SAME = {
    **dict.fromkeys(("positive", "plus", "positiv", "positif", "positivo", "positiva"), "+"),
    **dict.fromkeys(("negative", "minus", "negativ", "négatif", "negativo", "negativa"), "-"),
    **dict.fromkeys(("percent", "percentage", "prozent"), "%"),
    **dict.fromkeys(("centimeters", "centimetres", "centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("millimeters", "millimetres", "millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("degrees", "degree"), "°"),
    **{word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six"))},
    **{word: str(number) for number, word in enumerate(("seven", "eight", "nine", "ten", "eleven", "twelve"), start=7)},
}
_ROMAN = dict(zip(["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x"], map(str, range(1, 11)), strict=True))
_RANKS = {"stage", "grade", "type", "class", "phase", "category", "degree", "level", "stadium", "grad", "typ"}
_UNITS = {"%", "°", "mm", "cm", "m", "um", "km", "mg", "g", "kg", "ml", "l", "dl", "year", "years", "month", "months"}
_UNITS |= {"week", "weeks", "day", "days", "hour", "hours", "minute", "minutes", "second", "seconds", "t", "hz", "mhz"}
_COMMON_WORDS = frozenset(
    "us it or is as he am an on no so in at do be we me my who all can may are was has for and but".split()  # noqa: SIM905
)


class Token(NamedTuple):
    value: str
    start: int
    end: int
    apart: bool
    """Whether a sign that ends a sentence, or a stroke, stands before it."""


def tokens_of(text: str, signs: bool) -> list[Token]:
    """The words, numbers and units of a cleaned text; lone signs too where these tell options apart."""
    tokens: list[Token] = []
    words: list[str] = []  # as they are written
    apart, rank = False, False
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        start, value = match.start(), ""
        if match["number"]:
            value = _number(match["op"] or "", match["number"])
            start = match.start("op") if match["op"] else match.start("number")
        elif kind == "word":
            value = _word(match[0], rank)
        elif kind == "unit" or (kind == "sign" and signs and _is_sign(text, match)):
            value = match[0]
        elif kind == "hard":
            apart = True
        if not value:
            continue
        if value == "star" and tokens and not apart and re.fullmatch(r"t\d", tokens[-1].value):
            tokens[-1] = tokens[-1]._replace(value=tokens[-1].value + "*", end=match.end())  # T2 star
            continue
        if match["number"] and not apart:
            start, value, apart = _compared(tokens, words, start, value)
        if tokens and tokens[-1].value == "no" and re.match(r",|\s[-–—]\s", text[tokens[-1].end : start]):
            apart = True  # "No, effusion" is not "No effusion"
        tokens.append(Token(value, start, match.end(), apart))
        words.append(match[0].casefold())
        apart, rank = False, value in _RANKS
    return tokens


def _compared(tokens: list[Token], words: list[str], start: int, value: str) -> tuple[int, str, bool]:
    """A number together with the words before it that compare it ("less than 5", "between 2 and 5"), which go away."""
    for length in (3, 2, 1):
        before = tokens[-length:]
        if len(before) == length and (sign := _COMPARED.get(tuple(words[-length:]))) and value[0].isdigit():
            del tokens[-length:], words[-length:]
            return before[0].start, sign + value, before[0].apart
    for length in (3, 4):
        before = tokens[-length:]
        if (
            len(before) == length
            and words[-length] == "between"
            and words[-1] == "and"
            and before[1].value[0].isdigit()
        ):
            del tokens[-length:], words[-length:]
            return before[0].start, f"{before[1].value}-{value}", before[0].apart
    return start, value, False


def _is_sign(text: str, match: re.Match[str]) -> bool:
    """Whether + or - says positive or negative ("HER2-", "Gram -", "(+)") and is no dash between words."""
    after = text[match.end() : match.end() + 1]
    before = text[match.start() - 1 : match.start()] if match.start() else ""
    dash = before == " " and re.match(r"[ ]*[^\s.,;:!?)\]\"']", text[match.end() : match.end() + 20])
    return (not after or after in " .,;:!?)]\"'\n") and not dash


@lru_cache(maxsize=65536)
def _number(operator: str, text: str) -> str:
    """Equal for equal numbers: "2,50" is "2.5", "≤ 5" is "at most 5"."""
    text = " ".join(text.casefold().split())
    sign = _OPERATORS.get(operator, "")
    if re.search(r"\d\s?[/:]\s?\d", text):
        return sign + text.replace(" ", "")
    joint = "x" if re.search(r"[x×](?!10)", text) else "-"
    return sign + joint.join(map(_value, re.findall(rf"^[+\-±]?{_NUM}|{_NUM}", text)))


def _value(text: str) -> str:
    sign = text[0] if text[0] in "+-±" else ""
    digits = text[len(sign) :]
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+", digits):
        digits = digits.replace(",", "")
    digits = digits.replace(",", ".", 1)
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", digits):
        return sign + digits
    return sign + format(Decimal(digits).normalize(), "f")


@lru_cache(maxsize=65536)
def _word(text: str, after_rank: bool) -> str:
    word = text.casefold().replace("'", "")
    if after_rank and word in _ROMAN:
        return _ROMAN[word]
    if len(word) <= 3:
        word = word.replace("μ", "u").replace("µ", "u")
    if len(word) > 4:  # British and American spelling
        word = re.sub(r"our(s?)$", r"or\1", word.replace("ae", "e").replace("oe", "e"))
    return _SAME.get(word, word)


@dataclass(frozen=True)
class _Way:
    """One way to write one or several options."""

    values: tuple[str, ...]
    apart: tuple[bool, ...]
    """For each token whether a sentence's end may stand before it."""
    meaning: Meaning
    weak: bool
    capitals: bool
    """Whether it counts in capitals only: "ALL" is no "all"."""
    upper: bool
    """Whether the option begins with a capital."""


@dataclass(frozen=True)
class OptionTexts:
    """The options of a question, ready to be found in replies."""

    plain: dict[str, Meaning]
    """By text up to case and white space."""
    signs: bool
    ways: dict[str, tuple[_Way, ...]]
    """By first token, the longest first."""
    letters: dict[str, Meaning]
    """What a single letter means, by the letter in capitals: the option with that letter, else with that text."""

    def mask(self, text: str) -> tuple[str, list[Meaning]]:
        """A cleaned text with one character in place of each option's text, and what these mean, in order."""
        found = []
        tokens = tokens_of(text, self.signs)
        ends: set[int] = set()
        position = 0
        while position < len(tokens):
            way = self._way_at(text, tokens, position)
            if way is None:
                position += 1
                continue
            last = position + len(way.values)
            found.append((tokens[position].start, tokens[last - 1].end, way))
            ends.add(tokens[last - 1].end)
            position = last
        starts = {start for start, _, _ in found}
        pieces, meanings, done = [], [], 0
        for start, end, way in found:
            if not _stands_alone(text, start, end, starts, ends):
                continue
            lower = way.upper and text[start : start + 1].islower()
            pieces += [text[done:start], WEAK_TEXT if way.weak else LOWER_TEXT if lower else TEXT]
            meanings.append(way.meaning)
            done = end
        return "".join([*pieces, text[done:]]), meanings

    def _way_at(self, text: str, tokens: list[Token], position: int) -> _Way | None:
        for way in self.ways.get(tokens[position].value, ()):
            last = position + len(way.values)
            part = tokens[position:last]
            if tuple(token.value for token in part) != way.values:
                continue
            if any(token.apart and not may for token, may in zip(part[1:], way.apart[1:], strict=True)):
                continue
            written = text[part[0].start : part[-1].end]
            following = tokens[last] if last < len(tokens) and not tokens[last].apart else None
            if way.capitals and written != written.upper():
                continue
            if following and _is_number(way.values[-1]) and following.value in _UNITS:
                continue  # "5" is not in "5 cm"
            if following and following.value in "+-" and following.start == part[-1].end:
                continue  # nor "HER2" in "HER2+"
            if way.values in (("no",), ("none",)) and re.match(r"\s*[^\W_]", text[part[-1].end : part[-1].end + 40]):
                continue  # "no doubt"
            return way
        return None


def _stands_alone(text: str, start: int, end: int, starts: set[int], ends: set[int]) -> bool:
    """Whether no dash or stroke joins it to a longer name ("PET/CT", "CT-guided"); to another option it may."""
    before, after = text[max(0, start - 2) : start], text[end : end + 2]
    joined_before = re.fullmatch(r"[^\W_][-‐‑/]", before) and start - 1 not in ends
    if joined_before and (label := re.search(r"(?:^|[^\w-])[A-Za-z]$", text[max(0, start - 3) : start - 1])):
        joined_before = None if label else joined_before  # "B-MRI"
    joined_after = re.fullmatch(r"[-‐‑/][^\W_]", after) and end + 1 not in starts
    glued = re.match(_LATIN, after) and re.search(rf"{_LATIN}$", text[start:end])
    more = re.match(r"\+(?!\w)", after) and text[end - 1] not in "+-"
    negated = before.endswith("不")  # 不正常
    return not (
        joined_before
        or joined_after
        or more
        or negated
        or (glued and end not in starts and not text[end - 1].isdigit())
    )


def _is_number(value: str) -> bool:
    return value[-1:].isdigit() and not value[:1].isalpha()


@lru_cache(maxsize=65536)  # questions that differ may share an option
def _option_tokens(text: str, signs: bool) -> tuple[Token, ...]:
    return tuple(tokens_of(text, signs))


@lru_cache(maxsize=4096)
def option_texts(options: tuple[str, ...], plain_texts: tuple[str, ...]) -> OptionTexts:
    """The options of a question; `plain_texts` are the same, cleaned as replies are."""
    letters = LETTERS[: len(options)]
    texts = [_without_label(text, letter, plain_texts) for letter, text in zip(letters, plain_texts, strict=True)]
    plain: dict[str, set[str]] = {}
    for letter, text, whole in zip(letters, texts, plain_texts, strict=True):
        for spelling in {normalise_option(text), normalise_option(whole)}:
            plain.setdefault(spelling, set()).add(letter)
    signs = any(token.value in ("+", "-") for text in texts for token in _option_tokens(text, True))
    exact: dict[tuple[str, ...], set[str]] = {}
    more: dict[tuple[str, ...], set[str]] = {}
    weak: dict[tuple[str, ...], set[str]] = {}
    parts: dict[tuple[str, ...], tuple[Token, ...]] = {}
    sources: dict[tuple[str, ...], str] = {}
    rows = [_option_tokens(text, signs) for text in texts]
    values = [tuple(token.value for token in row) for row in rows]
    for letter, text, row, key in zip(letters, texts, rows, values, strict=True):
        exact.setdefault(key, set()).add(letter)
        parts.setdefault(key, row)
        sources.setdefault(key, text)
        for variant in _variants(text, row, values, signs):
            more.setdefault(variant, set()).add(letter)
            sources.setdefault(variant, text)
        for variant in _weak_variants(key, values, texts):
            weak.setdefault(variant, set()).add(letter)
            sources.setdefault(variant, text)
    ways: dict[str, list[_Way]] = {}
    for table, is_weak in ((exact, False), (more, False), (weak, True)):
        for key, meaning in table.items():
            unknown = table is not exact and (key in exact or len({texts[LETTERS.index(one)] for one in meaning}) > 1)
            if not key or (unknown and not _unsigned(key, exact)) or (table is weak and key in more):
                continue
            one_letter = len(key) == 1 and len(key[0]) == 1 and key[0].isascii() and key[0].isalpha()
            if one_letter or (key in exact and table is not exact):
                continue
            row_parts = parts.get(key)
            source = sources[key]
            bare = all(_is_number(value) or value in ("+", "-") for value in key) or sum(map(len, key)) == 1
            ways.setdefault(key[0], []).append(
                _Way(
                    key,
                    tuple(token.apart for token in row_parts) if row_parts else (False,) * len(key),
                    frozenset(meaning),
                    is_weak or bare,
                    len(key) == 1 and key[0] in _COMMON_WORDS and source.isupper() and len(source) > 1,
                    source[:1].isupper(),
                )
            )
    known = {letter: frozenset(letter) for letter in letters}
    for table in (weak, exact):
        for key, meaning in table.items():
            if len(key) == 1 and len(key[0]) == 1 and key[0].isalpha() and key[0].upper() not in letters:
                known[key[0].upper()] = frozenset(meaning)
    return OptionTexts(
        {text: frozenset(meaning) for text, meaning in plain.items()},
        signs,
        {first: tuple(sorted(group, key=lambda way: -len(way.values))) for first, group in ways.items()},
        known,
    )


def _without_label(text: str, letter: str, texts: Sequence[str]) -> str:
    """Without the option's own letter, where each option's text begins with its own ("A. Naevus")."""
    labels = [re.match(rf"[(\[]?{own}[).:\]]+\s*(?=\S)", other) for own, other in zip(LETTERS, texts, strict=False)]
    return text[label.end() :] if all(labels) and (label := labels[LETTERS.index(letter)]) else text


def _variants(text: str, row: tuple[Token, ...], keys: list[tuple[str, ...]], signs: bool) -> Iterator[tuple[str, ...]]:
    """Other ways to write the whole option."""
    values = tuple(token.value for token in row)
    if len(values) > 1 and values[0] in ("the", "a", "an"):
        yield values[1:]
    bracket = re.fullmatch(r"(.*\w.*?)\s*\(([^()]*\w[^()]*)\)\s*", text, re.DOTALL)
    if bracket:
        yield tuple(token.value for token in tokens_of(bracket[1], signs))
        if bracket[2].isupper() and len(bracket[2]) > 1:
            yield tuple(token.value for token in tokens_of(bracket[2], signs))
    if values and values[-1].isalpha() and len(values[-1]) > 3:
        number = values[-1].removesuffix("s") if values[-1].endswith("s") else f"{values[-1]}s"
        if not any(number in key for key in keys):
            yield (*values[:-1], number)
    glued = re.sub(r"(?<=[^\W_])[-‐‑](?=[^\W\d_])", "", text)
    if glued != text:
        yield tuple(token.value for token in tokens_of(glued, signs))
    unsigned = (values[0].lstrip("+-"), *values[1:]) if values else ()
    if (
        unsigned != values
        and unsigned[0][:1].isdigit()
        and (values[0][0] == "+" or ("+" + unsigned[0], *values[1:]) in keys)
    ):
        yield unsigned


def _unsigned(key: tuple[str, ...], exact: dict[tuple[str, ...], set[str]]) -> bool:
    """Whether this is what +2 and -2 share, so that a bare 2 means either."""
    signed = ("+" + key[0], *key[1:]), ("-" + key[0], *key[1:])
    return all(one in exact for one in signed)


def _weak_variants(
    key: tuple[str, ...], keys: list[tuple[str, ...]], texts: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """What tells an option from all others, where they begin or end alike, or from another one of as many words."""
    if len(key) > 1:
        alike = [other for other in keys if len(other) == len(key) and other != key]
        others = {value for other in keys if other != key for value in other}
        if key[0] not in others and any(other[1:] == key[1:] for other in alike):
            yield key[:1]  # "left" of "Left lung", beside "Right lung" and "Heart"
        if key[-1] not in others and any(other[:-1] == key[:-1] for other in alike):
            yield key[-1:]
    start = next((place for place, column in enumerate(zip(*keys, strict=False)) if len(set(column)) > 1), 0)
    backward = [one[::-1] for one in keys]
    end = next((place for place, column in enumerate(zip(*backward, strict=False)) if len(set(column)) > 1), 0)
    if start + end < min(map(len, keys)) and start + end:
        core = key[start : len(key) - end]
        yield core
        if start and keys[0][start - 1] in _RANKS and len(core) == 1:
            for roman, number in _ROMAN.items():
                if number == core[0]:
                    yield (roman,)
