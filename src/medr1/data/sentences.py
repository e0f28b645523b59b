"""What a text says, as one character for each phrase, word and sign: no rule here sees which letter or option it reads.

"The answer is B. CT shows bone." becomes `aKQL.TPw`: an article, what an answer is called, is, a letter; an option's
text, a verb, a word. What the letter and the text mean stands in a list beside it. So a rule that reads A reads B, C
and D alike, and one for an option's text reads any text.

The rules, in order: compose phrases ("answer" and "is" declare); tell letters from words by what stands about them;
join a letter with its text, and lists; find what is denied, hedged and taken back; take what is said with most weight.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from medr1.data.option_texts import LOWER_TEXT, WEAK_TEXT, Meaning, OptionTexts
from medr1.data.phrases import TREE, phrase_at, split, words_of

Said = Literal["letter", "ambiguous", "refusal", "invalid", "unparsed"]

BOX, END_BOX = "⟦", "⟧"
"""Stand around what was boxed."""

# -- from text to characters ---------------------------------------------------------------------------------
#
# L a letter that stands alone, l the same in lower case; T an option's text, q the same begun in lower case, t a weak
# one; w a word, W one with a capital, c a Chinese, Japanese or Korean one, n a number; the characters of
# `phrases.TABLES`; signs, of which brackets are ( and ), quotes ", dashes -, sentence ends . ! ?, and the newline.

_SIGNS = {
    **dict.fromkeys("([{⟨", "("), **dict.fromkeys(")]}⟩" + END_BOX, ")"), **dict.fromkeys("\"'`", '"'),
    **dict.fromkeys("-–—―‐‑~", "-"), **dict.fromkeys(".。…", "."), **dict.fromkeys("!！", "!"),
    **dict.fromkeys("?？", "?"), **dict.fromkeys(",，", ","), **dict.fromkeys(";；", ";"), **dict.fromkeys("=:：", ":"),
    **dict.fromkeys("→⇒>", ">"), **dict.fromkeys("/|+<", "/"), "、": "J", "&": "J", BOX: "D",
}  # fmt: skip
_CJK_KINDS = re.compile(r"[⺀-鿿가-힣]")


def _characters(
    text: str, marks: Sequence[Meaning], letters: dict[str, Meaning]
) -> tuple[str, list[Meaning | None], str]:
    """The characters, what each of them means (None: nothing), and the same with c for all that is CJK."""
    pieces = list(split(text))
    found: list[str] = []
    glyphs: list[str] = []
    meanings: list[Meaning | None] = []
    rest = iter(marks)
    words = words_of(pieces)
    position = 0
    while position < len(pieces):
        piece = pieces[position]
        meaning = None
        character, length = phrase_at(TREE, words, position)
        if not length:
            length = 1
            if piece.kind == "text":
                character = {LOWER_TEXT: "q", WEAK_TEXT: "t"}.get(piece.text, "T")
                meaning = next(rest)
            elif piece.kind == "letter":
                character = "L" if piece.capital else "l"
                meaning = letters.get(piece.text.upper(), frozenset())
            elif piece.kind == "sign":
                character = _SIGNS.get(piece.text, "." if piece.text[0] == "." else "*")
            else:
                character = {"number": "n", "cjk": "c", "newline": "\n"}.get(piece.kind, "W" if piece.capital else "w")
        found.append(character)
        glyphs.append("c" if _CJK_KINDS.match(piece.text) else character)
        meanings.append(meaning)
        position += length
    return "".join(found), meanings, "".join(glyphs)


_MEANT = re.compile(  # what a phrase becomes by what stands about it
    r"(?P<N>(?<=d[LTlqt])o(?=K?[LTlqt])|s(?![^.,;:!?\n]{1,30}(?<!a)m))"  # "I prefer A to B"; "absence of A"
    r"|(?P<r>(?<=N[LTlqt])o(?=K?[LTlqt]))"  # "I change from A to B"
    r"|(?P<O>(?<=[LTlqt])o(?=[Ka]?[LTlqt]))"  # "A to B"
    r"|(?P<w>[os]|(?<=a)g|g(?=[woWTqt])|(?:(?<=[.\n,;(\"])|^)g(?=:)"  # "on the right", "right lung", "right: …"
    r"|(?<=[wWQPX])r(?=[wWQPX.;!?\n)]|$))"  # "is actually visible", "must wait."
    r"|(?P<D>d)|(?P<G>g)|(?P<I>m)"
)
_COMPOSED = [  # (pattern, what its first character becomes; the others go away)
    (r"L?ZK[\")]*[Q:\-]", "N"),  # "the wrong answer is", "a wrong answer is"
    (r"(?:(?<=[.\n;,])|^)[aw]?ZK?Q", "N"),
    (r"k[wWanpKLlcTqtGI]{0,6}Q", "D"),
    (r"K[w]?G?w?[QI](?!N?G)", "D"),  # "answer is", "respuesta correcta es"
    (r"(?<![Qa])GK?w?Q(?![.,;!?\n]|$)", "D"),  # "richtig ist", "correct answer is"
    (r"K[\")]*(?::|-|>)", "D"),
    (r"(?:(?<=[.\n,;(\"])|^)G:", "D"),
    (r"(?:(?<=\n)|^)[\"(]*[aGwf]{0,3}K(?=[\")]*\n)", "D"),  # a heading
    (r"(?:(?<=[.\n;])|^)[aw]?Z[wK]?:", "N"),  # "excluded: …"
    (r"(?:(?<=[.\n;])|^)f:|(?:(?<=\n)|^)G(?=[\"(]*[LTlqt])", "D"),  # "Final: …", "✓ …"
    (r"(?:(?<=\n)|^)Z(?=[\"(]*[LTlqt])", "N"),
    (r"(?<=[LTlqt])l(?=[LTlqt])", "O"),  # Spanish "A o B", "A y B"
    (r"QN", "X"),
    (r"EN", "Y"),
]
_NO = re.compile(
    r"(?:(?<=[LTlqt][:\-?])|(?<=[LTlqt][)\"][:\-?]))(?:r|N(?=[,;.\n]|$))"
    r"|(?:(?<=\n[LTlqt]\.)|(?<=^[LTlqt]\.))r(?=\n|$)"
)
_COMPOSE = [(re.compile(pattern), character) for pattern, character in _COMPOSED]

# -- letters or words ----------------------------------------------------------------------------------------

_AFTER = (
    r"[\"]*(?:[.,:;!?()\->*\n]|/(?=L(?:[.,:;!?()\-/\"JO\n]|$))|$|[PQEXZYNBbSJOhRrczGKvL](?<![GKvL])"
    r"|G(?=c|,L|Q?(?:[.!\n]|$)))"
)
_IS_LETTER = re.compile(
    r"(?<=[(\"])L(?=[)\"])"
    r"|(?<=K)L|(?<=K\()L|(?<=K\")L"
    rf"|(?<![Vnt])(?<!V:)(?<!VL[/JO])L(?!v)(?!\.w)(?={_AFTER})"
    r"|(?<=c)(?<!Vc)L(?=c|[.,;!?]|$)"
    r"|(?:(?<=[.\n])|^)L(?=ww?L(?:[.,;!?\n]|$))"
    r"|L(?=Kc|IG|n[).]|[LT]|I(?:[.!\n]|$)|q[.\")]*$)"
    r"|(?<![Vnt])L(?=[/>JOM]L)|(?<!VL[/>JOM])(?<=[LTq][/>JOM])L"
)
_IS_SMALL_LETTER = re.compile(
    r"(?<=[(\"])l(?=[)\"])"
    r"|(?<=K)l(?=[.,:;!?)\"\-\nBbQPXh]|$)|(?<=D)l(?=[.,;:!?)\"\n\-Bb]|[/JO]l|$)|(?<=D[I:(\"K\n])l(?=[.,;:!?)\"\n\-Bb]|$)"
    r"|(?:(?<=[.\n])|^)l(?=[QBX])|(?:(?<=\n)|^)l\)(?=[QBP])|(?<=[IS])l(?=[.,;:!?)\n]|$)"
    r"|(?:(?<=[.\n!?:>])|^)[\"(\-]*l(?=[).\":!]*(?:\n|$))"
    r"|(?:(?<=[.\n!?>])|^)[\"(\-]*l(?=[).:\-\"]+[\"(]*[Tqt])"
    r"|(?<=Dl[/JO])l|(?<=Dl,[JO])l|(?<=Dl,)l(?=[.,;:!?)\"\n\-Bb]|$)"
)
_IS_WEAK_TEXT = re.compile(
    r"(?<=[DI])t|(?<=[DI][:\"(Iac\n])t"
    r"|(?:(?<=[.\n!?;])|^)[\"(\-]*[aW]?t(?=[wW]?[)\".,!c]*(?:\n|$)|[),.!]*\n)|^t(?=[,.;])"
    r"|(?<=[Ll][).:\-,\"(])t(?=[)\".,;!?\n]|$)|(?<=[Ll])t$|(?<=[Ll][).:\-,\"(]{2})t(?=[)\".,;!?\n]|$)"
    r"|(?<=Q)t(?=[.,;!?\n]|$)"
    r"|(?<=[Tqt][JOMz/\-])t|(?<=[Tqt][JOMz/\-]a)t|t(?=[JOMz/\-]a?[Tqt])"
)

# -- units, lists and what is said of them -------------------------------------------------------------------

_CLAUSE_ENDS = r"(?=[.,;!?\n()\-BbSRr\"]|$)"
_UNIT = re.compile(rf"L[)\"]*(?:[.:,\-/]|\n)?[\"(]*[IaK]{{0,2}}[\"(]*T{_CLAUSE_ENDS}|[LT]")
_JOINED = re.compile(r"[)\"]*(?:[/>]|[,(]?[JO][aKI]?|[,;:\-M]|\.?\n[-(]?|\.|)[\"(]*[aK]?")
_ALWAYS = re.compile(r"[)\"]*(?:[/>]|[,(]?O[aKI]?|)[\"(]*[aK]?")
_GOES_ON = re.compile(r"[)\"]*(?:[,;.!?\n/>BJO)]|$)")
_VERB_FOLLOWS = re.compile(r"[)\"]*[PQXhZ]")
_OF_BOTH = re.compile(r"[)\"]*(?:[PQ][awp]{0,2}G|h)")
_BEGINS = re.compile(r"(?:[.:!?\n]|^)[\"(]*W?[aK]?[\"(]*$")
_ACCEPTED = re.compile(
    r"[)\"]*\.G(?=[.!\n]|$)"
    r"|[)\"]*(?:[PQI][awp]{0,2}|[EY]a?|c{1,2}|[:\-(,]|K|)G(?![wWi])|c{1,2}K(?=[.,!\n]|$)|[)\"]*QI(?=[.,;!?\nBb]|$)"
)
_REJECTED = re.compile(
    r"[)\"]*\.Z(?=[.!\n]|$)"
    r"|[)\"]*[:\-(?]*[wWcKPQEIaphb]{0,4}(?:(Y|E[wa]{0,2}Z)|[XZ])|[)\"]*(?:[:\-]+N|\(N\)|N(?=[.;\n]|$))"
)
_HEDGED = re.compile(r"[)\"]*[wQPp]{0,2}[hH]")
_FILL = r"[:\"(\-IaSKQpcr\n]{0,8}"
_DECLARING = re.compile(rf"D{_FILL}([Hh]?){_FILL}(?:[wWn]{{0,2}}(?=T))?(?=[LT])")
_STATING = re.compile(r"[IS][,:\"(aKpIcQ]{0,6}(?:[wWn]{0,2}(?=T)|(?=L))")
_TOLD = re.compile(r"[PQ]a?$")
_FINAL = re.compile(r"[Sf][,:\"aGwWI]{0,4}$")
_HEAD = re.compile(r"[\"(\-*,:.]*[aKIS,]*[\"(]*(?=[LT])")
_HEAD_GOES_ON = re.compile(r"[)\"]*(?:[.,;:\-(\n!?]|$|[Bb])")
_LABEL = re.compile(
    r"(?:(?<=[.\n;,!?])|^)[\"(\-*]*([LT])(?:[)\"]*[:)\-]|(?=L))|(?:(?<=\n)|^)[\"(\-*]*([LT])[)\"]*\.(?=.)"
)
_LABELS = re.compile(r"[)\"]*[.:)\-][\"]*")
_LINE = re.compile(r"[\"(\-#.*:]*[aKI]?[\"(]*")
_LINE_ENDS = re.compile(r"[\").:,!;*c]*$")


@dataclass
class _Mention:
    start: int
    end: int
    meaning: Meaning
    weight: int = 1
    """3 declared, accepted or alone in the first or last line; 2 stated, concluded or first; 1 mentioned; 0 hedged."""
    final: bool = False
    denied: bool = False
    hedged: bool = False


class _Reading(NamedTuple):
    said: Said = "unparsed"
    meaning: Meaning = frozenset()
    weight: int = -1
    """Of the mentions that it rests on; -1 without one."""
    start: int = -1
    """Where the first of these stands."""
    lettered: bool = False
    """Whether one of these is a letter, not an option's text alone."""


class _Unit(NamedTuple):
    start: int
    end: int
    meaning: Meaning


@dataclass
class _Text:
    characters: str
    meanings: list[Meaning | None]
    mentions: list[_Mention] = field(default_factory=list)


def read(text: str, texts: OptionTexts) -> tuple[Said, Meaning, bool]:
    """What a cleaned text without tags says; the letters that it names where it says "letter", and whether it does so
    by a letter, not by an option's text alone."""
    masked, marks = texts.mask(text)
    characters, meanings, glyphs = _characters(masked, marks, texts.letters)
    raw = characters
    characters, meanings, glyphs = _composed(characters, meanings, glyphs)
    characters = _resolved(characters, glyphs)
    read_text = _weighed(characters, meanings)
    said, meaning, weight, start, lettered = _decided(read_text, texts)
    refused = characters.find("F")
    # What a refusal supposes is no answer, nor an option's text that it only mentions ("the organ is the spleen" is).
    told = lettered or bool(_TOLD.search(characters, max(0, start - 2), max(0, start)))
    if refused >= 0 and (weight < 0 or (weight + told < 2 and refused < start)):
        return "refusal", meaning, lettered
    if said == "unparsed" and not _has_meaning(read_text):
        first = re.match(r"[\"(\-]*L[).:)]", raw)
        if "U" in raw or (first and meanings and not meanings[first.end() - 2]):
            return "invalid", meaning, lettered
    if said == "unparsed" and "A" in raw:
        return "ambiguous", meaning, lettered
    return said, meaning, lettered


def refuses(text: str) -> bool:
    """Whether a cleaned text declines to answer."""
    return "F" in _characters(text, (), {})[0]


def _has_meaning(text: _Text) -> bool:
    return any(mention.meaning for mention in text.mentions)


def _composed(characters: str, meanings: list[Meaning | None], glyphs: str) -> tuple[str, list[Meaning | None], str]:
    """Phrases that belong together as one character."""
    characters = _MEANT.sub(lambda match: match.lastgroup or "", characters)
    for pattern, character in _COMPOSE:
        pieces, kept, shown, done = [], [], [], 0
        for match in pattern.finditer(characters):
            pieces += [characters[done : match.start()], character]
            kept += [*meanings[done : match.start()], None]
            shown += [glyphs[done : match.start()], character]
            done = match.end()
        if done:
            characters = "".join([*pieces, characters[done:]])
            meanings = [*kept, *meanings[done:]]
            glyphs = "".join([*shown, glyphs[done:]])
    # "A: no, …", "A: none", "A? No." and the line "A. No." reject A; elsewhere "no," may take back what stands before.
    characters = _NO.sub("Z", characters)
    characters = re.sub(r"(?<![LTlqt])M|M(?!a?[LTlqt])", "w", characters)
    # "over" compares two options
    characters = re.sub(r"(?<=[DGK][LTlqt])z(?=K?[LTlqt])", "N", characters)
    return characters, meanings, glyphs


def _resolved(characters: str, glyphs: str) -> str:
    """L and T for what is meant as an option; all other letters, and texts that may be something else, as words."""

    def kept(pattern: re.Pattern[str], text: str, letter: str, word: str) -> str:
        places = {match.end() - (text[match.end() - 1] == ")") - 1 for match in pattern.finditer(text)}
        return "".join(word if one == letter and at not in places else one for at, one in enumerate(characters))

    mixed = "".join(
        "c" if glyph == "c" and one not in "KDGZVv" else one for one, glyph in zip(characters, glyphs, strict=True)
    )
    cjk = "".join("c" if glyph == "c" and one in "GZ" else one for one, glyph in zip(mixed, glyphs, strict=True))
    characters = kept(_IS_LETTER, cjk, "L", "W")
    characters = kept(_IS_SMALL_LETTER, characters, "l", "a")
    characters = kept(_IS_WEAK_TEXT, characters, "t", "n")
    return characters.translate(str.maketrans("lqt", "LTT"))


def _weighed(characters: str, meanings: list[Meaning | None]) -> _Text:
    units = []
    for match in _UNIT.finditer(characters):
        named = [meaning for meaning in meanings[match.start() : match.end()] if meaning is not None]
        sure = [
            m
            for m, c in zip(meanings[match.start() : match.end()], match[0], strict=True)
            if c in "LT" and m is not None
        ]
        units.append(
            _Unit(
                match.start(), match.end(), frozenset.intersection(*(sure or named)) if sure or named else frozenset()
            )
        )
    lists = _lists(characters, units)
    declared = {match.end(): match for match in _DECLARING.finditer(characters)}
    stated = {match.end() for match in _STATING.finditer(characters)}
    denied, hedged, refused = _scopes(characters)
    labelled = {meanings[max(match.start(1), match.start(2))] for match in _LABEL.finditer(characters)}
    mentions = []
    for group in lists:
        weight, final, unsure = 1, False, False
        start, end = group[0].start, group[-1].end
        if declaring := declared.get(start):
            weight, unsure = 3, bool(declaring[1])
            final = bool(_FINAL.search(characters[max(0, declaring.start() - 6) : declaring.start()]))
        elif start in stated or "I" in characters[start : group[0].end]:
            weight = 2
        closing = _REJECTED.match(characters, end)
        whole = len(group) > 2 or (closing and closing[1]) or "O" in characters[start:end]
        accepted = not closing and _ACCEPTED.match(characters, end)
        doubted = _HEDGED.match(characters, end)
        known = any(unit.meaning for unit in group)
        for unit in group:
            last = unit is group[-1]
            # A letter beyond the options beside one of them ("N/A") is a conflict, as of a letter with another's text.
            mention = _Mention(unit.start, unit.end if unit.meaning or not known else end, unit.meaning, weight, final)
            mention.denied = unit.start in denied or bool(closing and (last or whole)) or unit.start in refused
            mention.hedged = unsure or unit.start in hedged or bool(doubted)
            if accepted:
                mention.weight = 3
            mentions.append(mention)
    for tag, word in pairwise(mentions):  # "B. Pneumothorax is wrong"
        if word.denied and tag.meaning == word.meaning and _LABELS.fullmatch(characters, tag.end, word.start):
            tag.denied = True
    text = _Text(characters, meanings, mentions)
    by_start = {mention.start: mention for mention in mentions}
    for sentence in re.finditer(r"[^.;!?\n]+", characters):
        if "x" not in sentence[0]:
            continue
        both = [one for place in range(*sentence.span()) if (one := by_start.get(place)) and not one.denied]
        weight = max((one.weight for one in both), default=0)
        for one in both:  # "besides A there is B"
            one.weight = weight
    _weigh_lines(characters, lists, by_start)
    if len(labelled) < 2:
        _weigh_heads(characters, lists, by_start)
    return text


def _lists(characters: str, units: list[_Unit]) -> list[list[_Unit]]:
    """Units that "and", "or" or a sign joins."""
    lists: list[list[_Unit]] = []
    for number, unit in enumerate(units):
        if lists and not _parted(characters, lists[-1][-1], unit, units[number + 1 : number + 2]):
            lists[-1].append(unit)
        else:
            lists.append([unit])
    return lists


def _parted(characters: str, before: _Unit, unit: _Unit, following: list[_Unit]) -> bool:
    if unit.start - before.end > 8:
        return True
    between = characters[before.end : unit.start]
    if between == "a" or not _JOINED.fullmatch(between):
        return True
    if _ALWAYS.fullmatch(between):
        return False
    begins = between in (".", "J") and _BEGINS.search(characters, max(0, before.start - 4), before.start)
    if between == "." and not begins:
        return True
    if "J" in between:  # "A and B is right" is of both, "the answer is A and B is wrong" of one
        both = begins and _OF_BOTH.match(characters, unit.end)
        return bool(_VERB_FOLLOWS.match(characters, unit.end)) and not both
    adjacent = bool(following) and following[0].start == unit.end
    return not (_GOES_ON.match(characters, unit.end) or adjacent)


def _scopes(characters: str) -> tuple[set[int], set[int], set[int]]:
    """Places of mentions that are denied, hedged, and refused to be told, each by what stands before them in their
    clause; refused also by what stands after them in it."""
    denied: set[int] = set()
    hedged: set[int] = set()
    refused: set[int] = set()
    deny = hedge = 0
    refuse = listed = supposed = False
    clause: list[int] = []
    sentence: list[int] = []
    for place, character in enumerate(characters):
        if character in "LT":
            clause.append(place)
            sentence.append(place)
            if deny:
                denied.add(place)
            if hedge or supposed:
                hedged.add(place)
            if refuse:
                refused.add(place)
        elif character in "NXY":
            deny, listed = 20, False
        elif character in "Hh":
            hedge = 6
        elif character == "F":
            refuse = True
            refused.update(clause)
        elif character == "i":
            supposed = "F" in characters
        elif character in ".;!?\n>BbSRr":
            if character == "?":  # a question says nothing yet
                hedged.update(sentence)
            if character in ".;!?\nRr":
                sentence = []
            deny = hedge = 0
            refuse = supposed = False
            clause = []
        elif character == ":":
            if characters[place - 1 : place] not in ("N", "X", "H"):
                deny = hedge = 0
        elif character == "," and (listed or _NEW_CLAUSE.match(characters, place + 1)):
            deny = hedge = 0  # "neither … nor …, but it is …", "no … or …, normal"
        elif deny or hedge:
            listed = listed or (character in "JO" and bool(clause) and clause[-1] in denied)
            deny, hedge = max(0, deny - 1), max(0, hedge - 1)
    return denied, hedged, refused


_NEW_CLAUSE = re.compile(r"[apIDSQfR]|J?[\"(]*[LT][)\"]*[PQEXZYG]")


def _weigh_lines(characters: str, lists: list[list[_Unit]], by_start: dict[int, _Mention]) -> None:
    """What stands alone in the first or the last line is as good as declared."""
    begin = len(characters) - len(characters.lstrip("\n"))
    stop = len(characters.rstrip("\n"))
    first_end = characters.find("\n", begin, stop)
    last_start = characters.rfind("\n", begin, stop) + 1
    for group in lists:
        start, end = group[0].start, group[-1].end
        for low, high in ((begin, first_end if first_end >= 0 else stop), (last_start or begin, stop)):
            near = low <= start <= low + 8 and high - 8 <= end <= high
            if near and _LINE.fullmatch(characters, low, start) and _LINE_ENDS.match(characters[end:high]):
                for unit in group:
                    by_start[unit.start].weight = 3


def _weigh_heads(characters: str, lists: list[list[_Unit]], by_start: dict[int, _Mention]) -> None:
    """What a text, or what follows a retraction or a refusal, begins with."""
    starts = {0, *(match.end() for match in re.finditer(r"[Rr]|F[^Fb.;!?\n]*[b.;!?\n]", characters))}
    heads = {match.end() for start in starts if (match := _HEAD.match(characters, start))}
    for number, group in enumerate(lists):
        following = lists[number + 1 : number + 2]
        if following and _other_in_sentence(characters, group, following[0], by_start):
            continue
        if group[0].start in heads and _HEAD_GOES_ON.match(characters, group[-1].end):
            for unit in group:
                by_start[unit.start].weight = max(2, by_start[unit.start].weight)


def _other_in_sentence(characters: str, group: list[_Unit], other: list[_Unit], by_start: dict[int, _Mention]) -> bool:
    """Whether the sentence goes on with another option, as in "A, then B"."""
    low, high = group[-1].end, other[0].start
    if high - low > 60 or re.search(r"[.;!?\nBbRr]", characters[low:high]):
        return False
    mention = by_start[other[0].start]
    return not (mention.denied or mention.hedged or mention.meaning & group[-1].meaning)


# -- decision ------------------------------------------------------------------------------------------------


def _decided(text: _Text, texts: OptionTexts) -> _Reading:
    """The reading of what follows the last retraction; where that says nothing, and may not have been one, of what
    stands before it too."""
    cuts = [match.start() for match in re.finditer(r"[Rr]", text.characters)]
    bounds = [0, *cuts, len(text.characters)]
    stop = len(text.characters)
    place = len(bounds) - 2
    mentions = sorted(text.mentions, key=lambda mention: mention.start)
    last = len(mentions)
    while place >= 0:
        start = bounds[place]
        first = last
        while first and mentions[first - 1].start >= start:
            first -= 1
        found = _agreed(mentions[first:last], text.characters[start:stop], start, texts)
        doubt = text.characters[start : start + 1] == "r"
        if found.said == "letter" and found.weight < 2:
            earlier = _agreed(mentions[:first], text.characters[:start], 0, texts)
            stronger = earlier.said == "letter" and earlier.weight >= (2 if doubt else 3)
            if stronger and earlier.meaning != found.meaning:
                asked = doubt and text.characters[start - 1] == "?"  # "Is bone bright? No." takes nothing back
                return earlier if asked else found._replace(said="ambiguous")
        if found.said != "unparsed":
            return found
        if place and not doubt:
            break
        place, last, stop = place - 1, first, start  # a doubt that nothing readable follows
    return _Reading()


def _agreed(mentions: list[_Mention], characters: str, offset: int, texts: OptionTexts) -> _Reading:
    """What mentions of most weight agree on."""
    kept = [mention for mention in mentions if not mention.denied]
    for mention in kept:
        if mention.hedged:
            mention.weight = 0
    for weight in (3, 2, 1, 0):
        said = [mention for mention in kept if mention.weight == weight]
        if weight in (0, 1):
            conflicts = [one for one in said if not one.meaning and one.end - one.start > 1]
            said = [mention for mention in said if mention.meaning] + conflicts
        if not said:
            continue
        if weight == 3 and len({mention.meaning for mention in said}) > 1 and any(mention.final for mention in said):
            said = [mention for mention in said if mention.final]
        if not any(mention.meaning for mention in said):
            conflict = any(mention.end - mention.start > 1 for mention in said)
            return _Reading("ambiguous" if conflict else "invalid", weight=weight)
        common = frozenset.intersection(*(mention.meaning for mention in said))
        start = min(one.start for one in said)
        lettered = any("L" in characters[one.start - offset : one.end - offset] for one in said)
        if not common or not any(common <= same for same in texts.plain.values()):
            return _Reading("ambiguous", common, weight, start, lettered)
        if weight > 1 and _contradicted(kept, max(one.end for one in said), weight, characters, offset, common):
            return _Reading("ambiguous", common, weight, start, lettered)
        return _Reading("letter", common, weight, start, lettered)
    return _Reading()


def _contradicted(kept: list[_Mention], end: int, weight: int, characters: str, offset: int, common: Meaning) -> bool:
    """Whether "but" and another option of about the same weight follow in the same sentence."""
    rest = characters[end - offset :]
    sentence = re.match(r"[^.;!?\n]*", rest)
    stop = end + (sentence.end() if sentence else 0)
    contrast = characters.find("b", end - offset, stop - offset)
    return contrast >= 0 and any(
        contrast + offset < one.start < stop and one.weight >= weight - 1 and one.meaning and not one.meaning & common
        for one in kept
    )
