"""From a model's raw text to the option it chose, or to the reason why none can be told.

One function, `extract_answer`, serves reward, evaluation and viewer. It never raises, never guesses and never
picks the nearest option: a reply that names two options, or a letter against another option's text, is
ambiguous. Of an open question, which has no options, it gives the span that holds the answer; `read_answer` knows
the record and tells yes from no as well.

In order: formatting is removed; reasoning in <think></think> is dropped; the last complete <answer></answer>
is read, else an unclosed one; without tags the last declaration ("the answer is …"), else the last
\\boxed{…}, else all text.

A span is read for mentions: option texts at word boundaries, longest first, so that "Stage II" is not found
in "Stage III"; then letters that stand alone, without the article "A" and the pronoun "I". A mention that is
denied ("not CT", "C is ruled out") does not count.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from medr1.data.prompts import check_mode
from medr1.data.records import LETTERS, Record, normalise_answer, normalise_option

EXTRACTOR_VERSION = 1
"""Goes up whenever a reply may be read differently; stored beside every score."""

Outcome = Literal["letter", "text", "ambiguous", "refusal", "truncated", "invalid", "unparsed"]


@dataclass(frozen=True)
class Answer:
    """What a reply says.

    Example:
        Answer(outcome="letter", letter="B") for "<think>…</think><answer>B</answer>"
    """

    outcome: Outcome
    """letter: one option; text: an answer to an open question; ambiguous: several, a letter against a text, or yes
    and no; refusal: declines to answer; truncated: cut off while reasoning; invalid: a choice beyond the options;
    unparsed: nothing readable."""
    letter: str | None = None
    """The option's letter where outcome is "letter", else None."""
    unclosed: bool = False
    """Whether the answer tag was opened and never closed."""
    text: str | None = None
    """What was answered to an open question, cleaned of formatting; None without one. Of a refusal it is kept too:
    "cannot be determined" is the right answer of some questions."""


def extract_answer(reply: str, options: Sequence[str]) -> Answer:
    """Read a model's reply to a question with these option texts (at most 26, the first is A; none: it is open).

    Where several options have the same text up to case and white space, the text means the first of them;
    `is_correct` takes any.
    """
    text = _clean(reply)
    text, cut = _without_reasoning(text)
    closed = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    if closed:
        return _read_span(closed[-1], options) if options else _open_span(closed[-1])
    _, opened, span = text.rpartition("<answer>")
    if opened:
        span = re.sub(r"</?\w*$", "", span)
        return replace(_read_span(span, options) if options else _open_span(span), unclosed=True)
    if cut:
        return Answer("truncated")
    text = text.replace("</answer>", "\n")
    return _read_free_text(text, options) if options else _open_free_text(text)


def read_answer(reply: str, record: Record) -> Answer:
    """`extract_answer` for a record. Where the right answer is yes or no, a reply that says both is ambiguous, and
    one that says neither is unparsed.
    """
    answer = extract_answer(reply, record.options)
    if record.is_yes_no and answer.outcome == "text":
        said = _yes_and_no(answer.text or "")
        if len(said) != 1:
            return replace(answer, outcome="ambiguous" if said else "unparsed")
    return answer


def is_correct(answer: Answer, record: Record) -> bool:
    """Whether an answer of `read_answer` is right.

    With options: it chose the right one, or another one with the same text. Open: it is `exact_match`, or it says
    yes or no as the right answer does ("Yes, there is a nodule").
    """
    if not record.is_open:
        return answer.letter is not None and answer.letter in record.right_letters
    if record.is_yes_no:
        return answer.outcome == "text" and _yes_and_no(answer.text or "") == {normalise_answer(record.answer)}
    return exact_match(answer.text or "", (record.answer, *record.alternatives))


def exact_match(text: str, right: Sequence[str]) -> bool:
    """Whether a text is one of the right answers up to `normalise_answer`."""
    return normalise_answer(text) in map(normalise_answer, right)


def token_f1(text: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of two normalised texts, counted with repetition; the
    best over the right answers, in [0, 1] (the F1 of SQuAD, arXiv:1606.05250; words as in `normalise_answer`).
    """
    return max(_f1(normalise_answer(text).split(), normalise_answer(answer).split()) for answer in right)


def _f1(words: list[str], right: list[str]) -> float:
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


# -- formatting and tags -------------------------------------------------------------------------------------

_FORMATTING = re.compile(
    r"<\|[^|<>]*\|>"  # chat control tokens
    r"|</?(?:b|i|u|em|p|br|strong|code|span)\s*/?>"
    r"|```(?:[a-z]+\n)?|`|\*\*|__|\$|\\[()\[\]]",
    re.IGNORECASE,
)

# What a broken byte sequence decodes to: no punctuation, or noise around a "D" would make it an answer.
_GARBAGE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


def _clean(text: str) -> str:
    """Plain letters (NFKC) and tags; no invisible characters, Markdown or LaTeX dress, runs of blanks."""
    text = _GARBAGE.sub("\N{CYRILLIC LETTER MULTIOCULAR O}", unicodedata.normalize("NFKC", text))
    if not text.isascii():
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    text = re.sub(r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1", _FORMATTING.sub("", text))
    text = re.sub(r"<\s*(/?)\s*(think|answer)\s*>", lambda tag: f"<{tag[1]}{tag[2].lower()}>", text, flags=re.I)
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", text))


def _without_reasoning(text: str) -> tuple[str, bool]:
    """(text outside of reasoning, whether the reply was cut off while reasoning).

    Some chat templates open the tag in the prompt, so a lone </think> ends reasoning that began with the
    reply. Reasoning that was never closed is kept from its first answer tag on, unless an answer tag came
    before it.
    """
    kept: list[str] = []
    inside = False
    pieces = re.split(r"<(/?)think>", text)  # text, "" or "/", text, …
    tail = pieces[0]
    for slash, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if not slash and not inside:
            kept.append(tail)
        inside = not slash
        tail = piece
    if not inside:
        return "\n".join([*kept, tail]), False
    before = "\n".join(kept)
    if "<answer>" in before:
        return before, True
    _, tag, answer = tail.partition("<answer>")
    return (tag + answer if tag else before), True


# -- what is denied ------------------------------------------------------------------------------------------

_BREAK = re.compile(  # a new clause, which a denial in the one before does not reach
    r"[.;!?。；！？\n]"
    r"|\b(?:but|however|so|hence|therefore|thus|because|since|rather(?!\s+than)|instead(?!\s+of))\b"
    r"|,\s*(?:it|this|that|the|which|then|we|i)\b|[,，]?\s*(?:而是|但|所以|因此)",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|without|cannot|excluded?|excludes|excluding|unlikely|(?:rather|other)\s+than"
    r"|instead\s+of|(?:rule|rules|ruled|ruling)\s+out)\b|n['’]t\b)(?:\W+\w[\w'’-]*){0,6}\W*$|(?:不是|并非|排除)\W*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\"'”’)\]]*(?:\s+(?!(?:and|or|but|because|since|while|whereas|as|not)\b)[\w'’-]+){0,4}?"
    r"\s*(?:\b(?:ruled\s+out|excluded|wrong|incorrect|unlikely|false|eliminated|rejected|absent|cannot)\b"
    r"|\b(?:is|are|was|were|does|do|did|can|could|would|should|has|have)(?:\s+(?:not|never)\b|n?['’]t\b)"
    r"|(?:被|可以?)?排除|不正确|不对|错)",
    re.IGNORECASE,
)

_REST_OF_LIST = re.compile(r"(?:(?:\s*(?:,|/|&|\b(?:and|or|nor)\b))+\s*[\w-]+){1,4}", re.IGNORECASE)


def _denied(text: str, start: int, end: int, *, in_list: bool = True) -> bool:
    """Whether a mention at text[start:end] is denied in its own clause, before it or after it.

    With `in_list` a denial of the list that it begins counts too ("CT, MRI and X-ray are excluded").
    """
    before = _BREAK.split(text[max(0, start - 120) : start])[-1]
    after = _BREAK.split(text[end : end + 120], maxsplit=1)[0]
    if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(after):
        return True
    rest_of_list = _REST_OF_LIST.match(after) if in_list else None
    return rest_of_list is not None and _DENIED_AFTER.match(after, rest_of_list.end()) is not None


# -- options and letters -------------------------------------------------------------------------------------

Meaning = frozenset[str]
"""Letters that a mention stands for: several where options share a text, none for a letter out of range."""

# A word character. Chinese and Japanese put no spaces between words, so theirs are none.
_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff]"
_OPEN, _CLOSE = r"[\s\"'“‘(\[{*_]*", r"[\s\"'”’)\]}*_]*"
_DASH = r"\s_\-‐-―"
_AND = r"(?:,?\s*\b(?:and|or|nor)\b|[/&、]|和|或)"

# Not a choice: "type B", "hepatitis B", "B cell".
_NAME_BEFORE = re.compile(
    r"\b(?:type|stage|grade|class|group|phase|category|level|zone|segment|lead|panel|figure|fig\.?|factor|protein"
    r"|vitamin|hepatitis|influenza)\s*$",
    re.IGNORECASE,
)
_NAME_AFTER = re.compile(r"\s+(?:cells?|lines?|waves?|mode|lymphocytes?|scans?)\b", re.IGNORECASE)

_LETTER = re.compile(rf"(?<!-)(?<!{_WORD})(?<!{_WORD}[.'’])([A-Z])(?!['’.-]?{_WORD})")
# The article "A" and the pronoun "I" need a sign that a letter is meant.
_LETTER_ENDS = re.compile(r"[ \t\"'”’*]*(?:[).:\]\n]|$)")
_LETTER_LIST_AFTER = re.compile(rf"\s*(?:,|{_AND})\s*[A-Z](?!['’.-]?{_WORD})")
_LETTER_SIGN_BEFORE = re.compile(
    rf"(?:\b(?:option|choice|answer|letter)\s+|(?<!{_WORD})[A-Z]\s*(?:,|{_AND})\s*)$", re.IGNORECASE
)


class _Option(NamedTuple):
    plain: str
    """The text up to case and white space."""
    words: tuple[str, ...]
    """The text up to dashes and punctuation at its ends as well; empty if it is nothing else."""


@lru_cache(maxsize=65536)
def _option(text: str) -> _Option:
    text = _clean(text)
    return _Option(normalise_option(text), _words(text))


@lru_cache(maxsize=65536)
def _pattern(option: str) -> re.Pattern[str] | None:
    """An option's text as a whole: not in a longer word, not joined by a dash or stroke ("PET/CT").

    "No" is an answer only where a sign or the end follows, not in "no doubt".
    """
    words = _option(option).words
    if not words:
        return None
    text = rf"[{_DASH}]+".join(map(re.escape, words))
    end = r"(?=\s*(?:[^\w\s]|$))" if words in (("no",), ("none",)) else ""
    return re.compile(rf"(?<![-/])(?<!{_WORD}){text}(?![-/]?{_WORD}){end}", re.IGNORECASE)


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(rf"[{_DASH}]+", text.casefold().strip(" \n.。,;:!?\"'“”‘’-_"))))


def _meaning(text: str, options: Sequence[str]) -> Meaning:
    """Letters of the options that a text equals up to case, else up to dashes and punctuation as well."""
    known = [(letter, _option(option)) for letter, option in zip(LETTERS, options, strict=False)]
    plain, words = normalise_option(text), _words(text)
    same = [letter for letter, option in known if option.plain == plain]
    return frozenset(same or (letter for letter, option in known if words and option.words == words))


def _letter_meaning(letter: str, options: Sequence[str]) -> Meaning:
    return frozenset(letter.upper()) & frozenset(LETTERS[: len(options)])


def _patterns(options: Sequence[str]) -> list[re.Pattern[str]]:
    """Patterns of all option texts, the longest first."""
    patterns = {pattern for option in options if (pattern := _pattern(option))}
    return sorted(patterns, key=lambda pattern: (-len(pattern.pattern), pattern.pattern))


def _decide(meanings: Sequence[Meaning], options: Sequence[str]) -> Answer:
    """The one option that all mentions agree on."""
    common = frozenset.intersection(*meanings)
    if not any(meanings):
        return Answer("invalid")
    if not common or len({normalise_option(options[LETTERS.index(letter)]) for letter in common}) > 1:
        return Answer("ambiguous")
    return Answer("letter", min(common))


# -- reading -------------------------------------------------------------------------------------------------

_BOXED = re.compile(r"\\f?boxed\s*\{([^{}]*)\}")
_WHOLE_LETTER = re.compile(
    r"[\W_]*(?:(?:(?:the\s+)?(?:(?:final|correct|best)\s+)*(?:answer|option|choice|letter)\b\s*(?:is\b)?"
    r"|(?:正确)?(?:答案|选项)(?:是|为)?|选择?)[\W_]*)?([A-Za-z])[\W_]*",
    re.IGNORECASE,
)
_LETTER_AND_TEXT = re.compile(rf"[\W_]*([A-Z])\s*[)\].:,}}>{_DASH}]+\s*(.+)", re.DOTALL)
_LETTER_FIRST = re.compile(r"[\W_]*([A-Z])\s*[).:\]]")
_NONE_OF_THEM = re.compile(r"\bnone of (?:the above|these|them|the options)\b", re.IGNORECASE)
_REFUSAL = re.compile(
    r"(?:\b(?:cannot|can\s?not|could\s+not|unable\s+to|not\s+able\s+to|impossible\s+to)|\b(?:can|couldn)['’]t)"
    r"\s+(?:\w+\s+){0,2}?(?:be\s+)?(?:determined?|help|assist|identif(?:y|ied)|diagnosed?|provide|answer|tell|say"
    r"|interpret|analy[sz]e|assess|comment|decide|(?:see|view|open)\s+(?:the|an|any|this)?\s*(?:image|picture))\b"
    r"|\b(?:do\s+not|don['’]t)\s+know\b|\bnot\s+enough\s+information\b|\bas\s+an\s+ai\b|无法|抱歉",
    re.IGNORECASE,
)


def _read_free_text(text: str, options: Sequence[str]) -> Answer:
    """Read a reply without answer tags."""
    if answer := _read_whole(text, options):
        return answer
    if declared := _declared(_BOXED.sub(r" \1 ", text), options):
        return _decide(declared, options)
    if boxed := _BOXED.findall(text):
        answer = _read_span(boxed[-1], options)
        if answer.outcome != "unparsed":
            return answer
    return _read_span(text, options)


def _read_span(span: str, options: Sequence[str]) -> Answer:
    """Read a text for letters and option texts alone."""
    span = _BOXED.sub(r" \1 ", span)
    if answer := _read_whole(span, options):
        return answer
    meanings: list[Meaning] = []
    masked = span
    for pattern in _patterns(options):
        for match in pattern.finditer(masked):
            # A text of one sign ("2", "A") is too easily part of something else.
            if len(match[0]) > 1 and not _denied(span, *match.span()):
                meanings.append(_meaning(match[0], options))
        masked = pattern.sub(lambda match: "\0" * len(match[0]) if len(match[0]) > 1 else match[0], masked)
    if _REFUSAL.search(masked):
        return Answer("refusal")
    for match in _LETTER.finditer(masked):
        meaning = _letter_meaning(match[1], options)
        if meaning and _is_choice(masked, match) and not _denied(span, *match.span()):
            meanings.append(meaning)
    if meanings:
        return _decide(meanings, options)
    first = _LETTER_FIRST.match(span)
    beyond = first is not None and not _letter_meaning(first[1], options)
    return Answer("invalid" if beyond or _NONE_OF_THEM.search(masked) else "unparsed")


def _read_whole(span: str, options: Sequence[str]) -> Answer | None:
    """Read a text that is nothing but a letter, an option's text, or a letter with a text."""
    span = _BOXED.sub(r" \1 ", span).strip()
    if len(span) > 1 and (same := _meaning(span, options)):
        return _decide([same], options)
    letter = _WHOLE_LETTER.fullmatch(span)
    if letter and (meaning := _letter_meaning(letter[1], options)):
        return _decide([meaning], options)
    if same := _meaning(span, options):
        return _decide([same], options)
    if letter:
        return Answer("invalid")
    pair = _LETTER_AND_TEXT.fullmatch(span)
    if pair and (same := _meaning(pair[2], options)):
        return _decide([_letter_meaning(pair[1], options), same], options)
    return None


def _is_choice(text: str, match: re.Match[str]) -> bool:
    """Whether a capital that stands alone is meant as a letter of an option."""
    before, start, end = text[max(0, match.start() - 20) : match.start()], match.start(), match.end()
    if _NAME_BEFORE.search(before) or _NAME_AFTER.match(text, end):
        return False
    if match[1] not in "AI":
        return True
    enclosed = text[start - 1 : start] in tuple("\"'“‘([{") and text[end : end + 1] in tuple("\"'”’)]}")
    return bool(
        enclosed
        or _LETTER_ENDS.match(text, end)
        or _LETTER_LIST_AFTER.match(text, end)
        or _LETTER_SIGN_BEFORE.search(before)
    )


# -- open questions ------------------------------------------------------------------------------------------

_YES = re.compile(rf"(?<![-/])(?<!{_WORD})yes(?![-/]?{_WORD})", re.IGNORECASE)
_NO = re.compile(rf"(?<![-/])(?<!{_WORD})no(?![-/]?{_WORD})(?!\s+doubt\b)", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[;!?。；！？\n]|\.(?!\d)|,?\s*\b(?:because|since)\b", re.IGNORECASE)


def _yes_and_no(text: str) -> set[str]:
    """Which of "yes" and "no" a text has as a word: not in "normal", "nodule", "I do not know" or "no doubt"."""
    return {word for word, pattern in (("yes", _YES), ("no", _NO)) if pattern.search(text)}


def _open_span(span: str) -> Answer:
    text = " ".join(_BOXED.sub(r" \1 ", span).split())
    if not re.search(r"\w", text):
        return Answer("unparsed")
    return Answer("refusal" if _REFUSAL.search(text) else "text", text=text)


def _open_free_text(text: str) -> Answer:
    """A reply without tags: its last boxed text, else its last declaration ("the answer is …") up to the end of the
    clause, else all of it. Boxed text comes first, since nothing tells where a declared answer ends.
    """
    if boxed := _BOXED.findall(text):
        return _open_span(boxed[-1])
    for match in reversed(list(_DECLARATION.finditer(text))):
        before = _BREAK.split(text[max(0, match.start() - 120) : match.start()])[-1]
        answer = _open_span(_CLAUSE_END.split(text[match.end() :].lstrip(), maxsplit=1)[0])
        if answer.outcome != "unparsed" and not _DENIED_BEFORE.search(before):
            return answer
    return _open_span(text)


# -- declarations --------------------------------------------------------------------------------------------

_DECLARATION = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:to|for)(?:\s+[\w'’]+){1,4}?)?"
    r"\s*(?:\b(?:is|would\s+be|should\s+be|must\s+be)\b|[:=→‐-―-])+"
    r"(?:\s*(?:[:=]|\b(?:(?:most\s+)?likely|probably|clearly|definitely|therefore|thus)\b))*"
    r"|(?:答案|选项)\s*(?:应该|应)?\s*(?:是|为|选)?\s*:?",
    re.IGNORECASE,
)
_HEAD_LETTER = re.compile(
    rf"{_OPEN}(?:(?:the\s+)?(?:option|choice|letter|answer|选项)\s*)?{_OPEN}([A-Za-z])(?!['’.-]?{_WORD})"
)
_HEAD_TEXT = re.compile(rf"{_OPEN}(?:(?:the|an?)\s+(?=\w\w))?{_OPEN}", re.IGNORECASE)
_HEAD_ENDS = re.compile(
    rf"{_CLOSE}(?:[).:;,!?。，；/&\n]|$|\b(?:because|since|as|and|or|but|due|given)\b|[^\x00-\x7f])",
    re.IGNORECASE,
)
_JOIN = re.compile(rf"{_CLOSE}(?:(?P<and>{_AND})|[\s:.,{_DASH}]*)(?:\s*(?:option|choice)\b)?\s*", re.IGNORECASE)
_ENDS = re.compile(rf"{_CLOSE}(?:[.。;；!！?？,，\n]|$)")
_OPTION_MARK = re.compile(rf"(?<!{_WORD})([A-Z])[).:]")


def _declared(text: str, options: Sequence[str]) -> list[Meaning]:
    """What the last readable declaration ("the answer is …", "Answer: …") names; empty without one."""
    for match in reversed(list(_DECLARATION.finditer(text))):
        before = _BREAK.split(text[max(0, match.start() - 120) : match.start()])[-1]
        rest = text[match.end() :]
        marks = "".join(_OPTION_MARK.findall(rest))
        echoed = marks.startswith(LETTERS[: len(options)])  # "Which is the answer: A) … B) …"
        if not echoed and not _DENIED_BEFORE.search(before) and (meanings := _read_head(rest, options)):
            return meanings
    return []


def _read_head(text: str, options: Sequence[str]) -> list[Meaning]:
    """Options named at the very start of a text, as in "B, because …", "B: MRI" or "CT or MRI".

    Empty if the first is denied. A further one counts if "and" or "or" joins it, or if the sentence ends with
    it, a letter only after a comma: "B. CT shows bone" names B alone, "A, B" names both.
    """
    meanings: list[Meaning] = []
    join: re.Match[str] | None = None
    position = 0
    while item := _read_item(text, position, options):
        start, end, meaning, is_letter = item
        if join and not join["and"] and not (_ENDS.match(text, end) and ("," in join[0] or not is_letter)):
            break
        if not _denied(text, start, end, in_list=bool(meanings)):  # "the answer is B and C is wrong"
            meanings.append(meaning)
        elif not meanings:
            break
        join = _JOIN.match(text, end)
        if not join or join.end() == end:
            break
        position = join.end()
    return meanings


def _read_item(text: str, position: int, options: Sequence[str]) -> tuple[int, int, Meaning, bool] | None:
    """(start, end, meaning, whether a letter) of an option text or letter that begins at a position."""
    head = _HEAD_TEXT.match(text, position)
    starts = (position, head.end()) if head else (position,)
    for pattern in _patterns(options):
        for start in starts:
            match = pattern.match(text, start)
            if match and not (len(match[0]) == 1 and match[0].isalpha()):
                return match.start(), match.end(), _meaning(match[0], options), False
    letter = _HEAD_LETTER.match(text, position)
    if letter is None or _NAME_AFTER.match(text, letter.end()):
        return None
    meaning = _letter_meaning(letter[1], options)
    sure = letter[1].isupper() and letter[1] not in "AI" and meaning
    if not sure and not _HEAD_ENDS.match(text, letter.end()):
        return None
    return letter.start(1), letter.end(1), meaning, True


_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # any text without one of the four tags


_THINK = rf"<think>(?!\s*</think>){_INSIDE}</think>"


_ANSWER = r"<answer>(?!\s*</answer>)\s*(?:(?!</?(?:think|answer)>)[^\n])*\s*</answer>"  # one line, not blank


_FORMAT = {
    "think": re.compile(rf"\s*{_THINK}\s*{_ANSWER}\s*", re.DOTALL),
    "no-think": re.compile(rf"\s*{_ANSWER}\s*"),
    "think-after": re.compile(rf"\s*{_ANSWER}\s*{_THINK}\s*", re.DOTALL),
}


def format_ok(reply: str, mode: str) -> bool:
    """Whether a reply is exactly as asked.

    That is: each pair of tags once and in order, reasoning that is not blank, one line as the answer, and
    nothing but white space outside. Med-R1's pattern also takes repeated tags and any text as the answer.
    """
    check_mode(mode)
    return _FORMAT[mode].fullmatch(reply) is not None
