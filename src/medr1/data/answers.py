"""From a model's raw text to the option it chose, or to the reason why none can be told.

One function, `extract_answer`, serves reward, evaluation and viewer. It never raises, never guesses and never picks
the nearest option: a reply that names two options, or a letter against another option's text, is ambiguous. Of an open
question, which has no options, it gives the span that holds the answer; `read_answer` knows the record and tells yes
from no as well.

In order: formatting is removed; reasoning in <think></think>, or as other models mark it, is dropped; the last complete
<answer></answer> is read, else an unclosed one, else all text. What it says is found in three steps, each in a file:
option texts (`option_texts`), known phrases (`phrases`), and rules that see neither which letter nor which option they
read (`sentences`), so that A is read as B is. All of it takes time in proportion to the reply's length.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from medr1.data.option_texts import CJK, OptionTexts, option_texts
from medr1.data.prompts import check_mode
from medr1.data.records import LETTERS, Record, normalise_answer, normalise_option, plain
from medr1.data.sentences import BOX, END_BOX, read, refuses

EXTRACTOR_VERSION = 3
"""Goes up whenever a reply may be read differently; stored beside every score."""

SHORT = 12
"""Words of a text that says an option in other words, at most."""

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
    text, cut = _without_reasoning(_clean(reply))
    closed, opened = _answer_spans(text)
    if closed is not None:
        return _read(closed, options)
    if opened is not None:
        return replace(_read(re.sub(r"</?\w*$", "", opened), options), unclosed=True)
    if cut:
        return Answer("truncated")
    text = text.replace("</answer>", "\n")
    return _read(text, options) if options else _open_free_text(text)


def _read(text: str, options: Sequence[str]) -> Answer:
    """Read a text without tags."""
    if not options:
        return _open_span(text)
    # What the prompt asks for: a letter alone. Where no option holds a lone letter it is nothing else, and the options
    # need no reading, which takes most of the time.
    lone = text.strip().removesuffix(".")
    if len(lone) == 1 and lone in LETTERS[: len(options)] and not any(map(_LONE.search, options)):
        return Answer("letter", lone)
    texts = _texts(tuple(options))
    # A text that is an option's whole text needs no reading; a letter alone may be one.
    same = texts.plain.get(normalise_option(text), texts.plain.get(normalise_option(text.strip(" .\n\"'"))))
    if same and (len(text.strip()) > 1 or text.strip().upper() not in texts.letters):
        return Answer("letter", min(same))
    said, meaning, lettered = read(_BOXED.sub(f" {BOX}\\1{END_BOX} ", text), texts)
    if said == "unparsed" and (words := _first_yes_or_no(text)):
        word = min(words)
        meaning = texts.plain.get(word) or texts.plain.get(f"{word}.", frozenset())
        said = "letter" if meaning else said
    if said != "letter":
        return Answer(said)
    letter = min(meaning)
    return Answer("ambiguous") if not lettered and _says_more(text, options, letter) else Answer("letter", letter)


def _says_more(text: str, options: Sequence[str], letter: str) -> bool:
    """Whether a short text has all words of a longer option that holds the chosen one, but apart: "cancer of the lung"
    of "Lung" and "Lung cancer". Where they stand together, they have been read.
    """
    said = plain(text)
    if len(set(said.split())) > SHORT:
        return False
    chosen = set(plain(options[LETTERS.index(letter)]).split())
    longer = map(plain, options)
    return any(chosen < set(option.split()) <= set(said.split()) and option not in said for option in longer)


_LONE = re.compile(r"(?<![^\W_])[A-Za-z](?![^\W_])|[^\x00-\x7f]")
"""A letter that stands alone, or a character that cleaning may change."""


@lru_cache(maxsize=4096)
def _texts(options: tuple[str, ...]) -> OptionTexts:
    return option_texts(options, tuple(map(_clean_option, options)))


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

_THINK_OPENS = re.compile(
    r"(?:<\|start\|>\w+)?<\|channel\|>(?:analysis|commentary)[^<]{0,40}<\|message\|>"  # gpt-oss
    r"|^analysis(?=[A-Z\"'])|<\|begin_of_thought\|>|<unused94>(?:thought)?|◁think▷|\[THINK\]|<\|channel>thought"
    r"|<\s*(?:think|thinking|thoughts?|reason|reasoning|rationale|analysis|scratchpad|reflection|seed:think)\s*>",
    re.IGNORECASE,
)
_THINK_CLOSES = re.compile(
    r"(?:<\|end\|>)?(?:<\|start\|>\w+)?<\|channel\|>final[^<]{0,40}<\|message\|>|(?<=[\s\S])assistantfinal"
    r"|<\|end_of_thought\|>|<unused95>|◁/think▷|\[/THINK\]|<channel\|>"
    r"|<\s*/\s*(?:think|thinking|thoughts?|reason|reasoning|rationale|analysis|scratchpad|reflection|seed:think)\s*>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"[<\[]\s*(/?)\s*(?:final[_ ]?)?(?:answer|choice|final)\s*[>\]]", re.IGNORECASE)
_TAG = re.compile(
    r"<\|[^|<>\n]{0,60}\|>|<(?!/?(?:think|answer)>)/?[A-Za-z][\w:-]{0,30}(?:\s[\w-]{1,20}=\"[^\"<>\n]{0,80}\")*\s*/?>"
)
_BLOCK_TAG = re.compile(r"</?(?:br|p|li|div|h\d|tr)\b", re.IGNORECASE)
_TABLE_ROW = re.compile(r"(?:(?<=\n)|^)[ ]*\|([^\n]{1,400})\|[ ]*(?=\n|$)")
_LATEX = {r"\%": "%", r"\times": "×", r"\leq": "≤", r"\geq": "≥", r"\le": "≤", r"\ge": "≥", r"\mu": "μ", r"\pm": "±"}
_DRESS = re.compile(
    r"```(?:[a-z]+\n)?|`|\*\*|__|~~|\$|\\[()\[\],!;]|(?:(?<=\n)|^)(?:#{1,6}|>(?![ ]?\d))[ ]?|\\quad", re.IGNORECASE
)
_LONE_LETTER = re.compile(r"(?<![\w*])(\*{1,3}|_{1,3}|`{1,3}|~~)\s?(\(?[A-Za-z]\)?)\s?\1(?![\w*])")
_EMPHASIS = re.compile(r"(?<![\w*])\*(?=[^\s*])([^*\n]{1,200})(?<=[^\s*])\*(?![\w*])")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("“”„‟«»「」『』", '"'),
        **dict.fromkeys("‘’‚‛´", "'"),
        **dict.fromkeys("【〔《", "["),
        **dict.fromkeys("】〕》", "]"),
        **{chr(0x1F150 + place): letter for place, letter in enumerate(LETTERS)},  # 🅐
        **{chr(0x1F170 + place): letter for place, letter in enumerate(LETTERS)},  # 🅰
        "−": "-",
        "⁄": "/",
    }
)
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_BOXED = re.compile(r"\\?f?boxed\s*\{([^{}]*)\}")

# What a broken byte sequence decodes to: no punctuation, or noise around a "D" would make it an answer. Private
# characters too, which stand for option texts later.
_GARBAGE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff⟦⟧]")


def _clean(text: str) -> str:
    """Plain letters (NFKC) and tags; no invisible characters, Markdown or LaTeX dress, runs of blanks."""
    text = text.replace("\x08oxed{", "\\boxed{")  # a "\b" that was taken for a backspace
    if not text.isascii():
        text = re.sub(r"(?<=\w)[⁰¹²³⁴-⁹⁺⁻]+", lambda power: "^" + power[0].translate(_POWERS), text)
        text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # 1½ is not 11/2
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
        text = "".join(char for char in text if unicodedata.category(char) != "Cf")
    text = _GARBAGE.sub("\N{CYRILLIC LETTER MULTIOCULAR O}", text)
    text = _THINK_CLOSES.sub("</think>", _THINK_OPENS.sub("<think>", text))
    text = _ANSWER_TAG.sub(lambda tag: f"<{tag[1]}answer>", text)
    text = re.sub(r"<?[-=]{1,6}>", "→", text)
    text = re.sub(r"<([A-Z])>(?![^<\n]{0,200}</\1>)", r"(\1)", text)
    text = _TAG.sub(lambda tag: "\n" if _BLOCK_TAG.match(tag[0]) else "", text)
    if "|" in text:
        text = _TABLE_ROW.sub(lambda row: re.sub(r"\s*\|\s*", ": ", row[1].strip(" -:|")), text)
    if "\\" in text:
        text = re.sub(r"\\(?:%|(?:times|leq?|geq?|mu|pm)\b)", lambda sign: _LATEX[sign[0]], text)
        for _ in range(3):
            text = re.sub(r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\w)(?:[A-Za-z]\.){2,}", lambda dotted: dotted[0].replace(".", ""), text)  # e.g. is no letter
    text = re.sub(r"(?<=\w)\*\*\*(?!\*)", "*", text) if "***" in text and "****" not in text else text  # **T2***
    text = _EMPHASIS.sub(r"\1", _DRESS.sub("", _LONE_LETTER.sub(r'"\2"', text)))
    text = re.sub(r"[\"'](\w{1,40})[\"']\s*:", lambda key: key[1].replace("_", " ") + ":", text)  # of JSON
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text))


_clean_option = lru_cache(maxsize=65536)(_clean)  # questions that differ may share an option


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


def _answer_spans(text: str) -> tuple[str | None, str | None]:
    """What stands in the last complete pair of answer tags, and after the last opening tag."""
    closed, opened = None, None
    pieces = re.split(r"<(/?)answer>", text)
    for slash, piece, before in zip(pieces[1::2], pieces[2::2], pieces[:-2:2], strict=True):
        if slash and opened is not None:
            closed, opened = before, None
        elif not slash:
            opened = piece
    return closed, opened


# -- open questions -----------------------------------------------------------------------------

_YES_NO = {
    "yes": ("ja", "oui", "sí", "si", "sim", "да", "是", "是的", "はい", "네", "예"),
    "no": ("nein", "non", "não", "нет", "否", "不是", "いいえ", "아니요", "아니오"),
}
_YES = re.compile(r"(?<![\w/-])yes(?![\w/]|-\w)", re.IGNORECASE)
_NO = re.compile(r"(?<![\w/-])no(?![\w/]|-\w)(?!\s+(?:doubt|question|wonder)\b|\.\s*\d)", re.IGNORECASE)
_FIRST_WORD = re.compile(
    rf"\W*(?:答案|答え|正解|정답)?[是は은:\s]*(是的?|不是|否|はい|いいえ|(?:네|예|아니요|아니오)(?![가-힣])|[^\W\d_{CJK}]+)"
)
_CLAUSE_END = re.compile(  # no full stop of "H. pylori" or "approx. 5 cm"
    r"[;!?。！？；\n]|(?<!\bapprox)\.(?!\d)(?!(?<=\b[A-Z]\.)\s(?-i:[a-z]))|,?\s*\b(?:because|since)\b", re.IGNORECASE
)
_DECLARATION = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:to|for)(?:\s+[\w'’]+){1,4}?)?"
    r"\s*(?:\b(?:is|would\s+be|should\s+be|must\s+be)\b|[:=→‐-―-])(?:[:=→\s]|[‐-―-](?!\d))*"
    r"(?:\s*(?:[:=]|\b(?:(?:most\s+)?likely|probably|clearly|definitely|therefore|thus)\b)){0,4}"
    r"|\b(?:antwort\s+(?:ist|lautet)|réponse\s+est|respuesta\s+(?:correcta\s+)?es|resposta\s+(?:correta\s+)?é)\b\s*:?"
    r"|\b(?:antwort|réponse|respuesta|resposta|ответ)\s*:"
    r"|(?:答案|选项)\s*(?:应该|应)?\s*(?:是|为|选)?\s*:?|(?:答え|正解)\s*(?:は|:)|정답\s*(?:은|:)",
    re.IGNORECASE,
)
_DENIED_BEFORE = re.compile(r"(?:\b(?:not|no|never|cannot)\b|n't\b)[^.;!?\n]{0,60}$", re.IGNORECASE)


def _yes_and_no(text: str) -> set[str]:
    """Which of "yes" and "no" a text has as a word: not in "normal", "nodule", "I do not know" or "no doubt".

    Of another language the first word counts alone, as "no" may be something else in it.
    """
    said = {word for word, pattern in (("yes", _YES), ("no", _NO)) if pattern.search(text)}
    return said or _first_yes_or_no(text)


def _first_yes_or_no(text: str) -> set[str]:
    first = _FIRST_WORD.match(text)
    return {word for word, others in _YES_NO.items() if first and first[1].casefold() in others}


def _open_span(span: str) -> Answer:
    text = " ".join(_BOXED.sub(r" \1 ", span).split())
    if not re.search(r"\w", text):
        return Answer("unparsed")
    return Answer("refusal" if refuses(text) else "text", text=text)


def _open_free_text(text: str) -> Answer:
    """A reply without tags: its last boxed text, else its last declaration ("the answer is …") up to the end of the
    clause, else all of it. Boxed text comes first, since nothing tells where a declared answer ends.
    """
    if boxed := _BOXED.findall(text):
        return _open_span(boxed[-1])
    stop = len(text)
    for match in reversed(list(_DECLARATION.finditer(text))):
        end = _CLAUSE_END.search(
            text,
            match.end() + len(text[match.end() : match.end() + 2]) - len(text[match.end() : match.end() + 2].lstrip()),
            stop,
        )
        answer = _open_span(text[match.end() : end.start() if end else stop])
        if answer.outcome != "unparsed" and not _DENIED_BEFORE.search(text[max(0, match.start() - 80) : match.start()]):
            return answer
        stop = match.end()  # what a later declaration ends with was tried
    return _open_span(text)


# -- the asked format ----------------------------------------------------------------------------------------

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
