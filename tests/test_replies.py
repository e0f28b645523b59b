"""Our own replies (`replies.py`, and the quarter that was held back), and that each letter is read alike."""

import re
import time
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replies import OPTIONS_OF, REPLIES
from replies_held_back import HELD_BACK

from medr1.data.answers import extract_answer
from medr1.data.records import LETTERS

Reply = tuple[str, str, str]


def read(options: tuple[str, ...], reply: str) -> str:
    answer = extract_answer(reply, options)
    return answer.letter or answer.outcome


def judged(rows: list[Reply]) -> dict[str, list[tuple[Reply, str]]]:
    """Replies by how they were read: as expected, a wrong letter, a letter lost, or another reason for no letter."""
    found: dict[str, list[tuple[Reply, str]]] = {"as expected": [], "wrong": [], "lost": [], "other reason": []}
    for row in rows:
        name, reply, expected = row
        said = read(OPTIONS_OF[name], reply)
        if said == expected or (expected == "none" and len(said) > 1):
            kind = "as expected"
        elif len(said) == 1:
            kind = "wrong"
        else:
            kind = "lost" if len(expected) == 1 else "other reason"
        found[kind].append((row, said))
    return found


def test_every_reply_is_read_as_a_careful_reader_does() -> None:
    found = judged(REPLIES)
    assert len(REPLIES) >= 400 and len(HELD_BACK) * 4 >= len(REPLIES + HELD_BACK)
    assert not any((found["wrong"], found["lost"], found["other reason"]))


def test_what_was_held_back() -> None:
    """Scored once, when the extractor was finished: 159 of 161 as expected, no wrong letter, 2 lost (1.2 %).

    The extractor before it: 123 as expected, 8 wrong letters, 28 lost.
    """
    found = judged(HELD_BACK)
    assert not found["wrong"]
    assert len(found["lost"]) + len(found["other reason"]) <= 0.05 * len(HELD_BACK)


def lettered(name: str, expected: str) -> bool:
    return name == "skin" and (len(expected) == 1 or expected in ("ambiguous", "unparsed", "none"))


# Letters that stand alone in a reply about the skin, except in "I"; texts are swapped with them.
_LETTER = re.compile(r"(?<![^\W_\u3040-\ud7af'’.])(?<!\w')([A-Da-dＡ-Ｄ])(?![^\W_\u3040-\ud7af])(?!'\w)(?!\.[a-z]\b)")
TEMPLATES = [row for row in REPLIES + HELD_BACK if lettered(row[0], row[2])]


def in_other_letters(reply: str, order: tuple[int, ...]) -> str | None:
    """The reply with A, B, C, D written as other letters; None where a lower-case "a" is an article in it."""
    if re.search(
        r"(?<![\w'])a (?!\W)|(?<![\w'])A (?=[a-z]{2,}|\d)|[A-D]\. [a-z]|á|à|Ⓑ|\\text|Vitamin|Hepatitis", reply
    ):
        return None

    def other(match: re.Match[str]) -> str:
        char = match[0]
        base = "A" if "A" <= char <= "D" else "a" if "a" <= char <= "d" else "Ａ"
        return chr(ord(base) + order[ord(char) - ord(base)])

    return _LETTER.sub(other, reply)


@pytest.mark.parametrize("order", list(permutations(range(4)))[1:])
def test_other_letters_give_the_other_letters(order: tuple[int, ...]) -> None:
    """Letters and options in another order: the outcome is the same option. Every template, all 23 orders."""
    options = OPTIONS_OF["skin"]
    moved = tuple(options[order.index(place)] for place in range(4))
    wrong, tried = [], 0
    for _, reply, _ in TEMPLATES:
        if (changed := in_other_letters(reply, order)) is None:
            continue
        tried += 1
        said, said_then = read(options, reply), read(moved, changed)
        if len(said) == 1:
            said = LETTERS[order[LETTERS.index(said)]]
        if said != said_then:
            wrong.append((reply, said, changed, said_then))
    assert tried > 250
    assert not wrong, wrong[:5]


FRAMES = [
    "{L}",
    "({L})",
    "{L}.",
    "{L})",
    "{L}: it is dark",
    "{L}, because it is dark",
    "{L} because it is dark",
    "**{L}** because",
    "{L} is correct.",
    "Pick {L}, since it is dark.",
    "我选{L}。",
    "{L}正确",
    "The answer is {L}.",
    "the answer is {l}",
    "<answer>{L}, because it is dark</answer>",
    "<answer>{L} (dark)</answer>",
    "<answer>{L} is right</answer>",
    "{L} fits best",
    "Answer: {L}",
    "I choose {L}.",
    "{L} seems right",
    "{L}! Surely.",
    "Therefore {L}",
    "{l}",
    "{l}) it is",
    "option {l}",
    "{L} lesion",
    "A lesion is seen. {L}",
    "{L} large dark lesion is seen.",
    "{L} 2 cm lesion",
    "{L}-scan",
    "vitamin {L}",
    "It is not {L}.",
    "{L} is wrong.",
    "I think it is {L}",
    "{L}?",
    "It could be {L}",
    "{L} or so",
    "\\boxed{{{L}}}",
    '{{"answer": "{L}"}}',
    "Die Antwort ist {L}.",
    "La respuesta es la {L}.",
    "{L}が正解です。",
    "정답은 {L}입니다.",
    "Ответ: {L}",
]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_reads_each_letter_or_none(frame: str) -> None:
    """Of nine options, so that the article "A" and the pronoun "I" are letters too."""
    options = OPTIONS_OF["nine"]
    said = [read(options, frame.format(L=letter, l=letter.lower())) for letter in LETTERS[:9]]
    assert said == list(LETTERS[:9]) or (len(set(said)) == 1 and len(said[0]) > 1)


def test_letters_are_read_equally_often() -> None:
    options = OPTIONS_OF["skin"]
    read_as = Counter(read(options, frame.format(L=letter, l=letter.lower())) for frame in FRAMES for letter in "ABCD")
    assert len({read_as[letter] for letter in "ABCD"}) == 1


def test_renamed_options_are_read_alike() -> None:
    new = ("Zebrafinch", "Yellowbill", "Xanthorea", "Weaverbird")
    old = OPTIONS_OF["skin"]
    for name, reply, _ in REPLIES + HELD_BACK:
        if name != "skin" or re.search("naevi|elanoma in situ", reply):
            continue
        renamed = reply
        for before, after in zip(old, new, strict=True):
            renamed = renamed.replace(before, after).replace(before.lower(), after.lower())
        assert read(new, renamed) == read(old, reply), renamed


UNRELATED = [
    "The picture has good quality. ",
    "A lesion is seen. ",
    "I have looked at the image. ",
    "Let me look at the picture.\n\n",
    "The patient is 45 years old and has no fever. ",
    "这张图像质量很好。",
]


@pytest.mark.parametrize("before", UNRELATED)
def test_an_unrelated_sentence_before_changes_nothing(before: str) -> None:
    wrong = []
    for name, reply, expected in REPLIES + HELD_BACK:
        if len(expected) == 1 and "<" not in reply and name not in ("yesno", "count") and len(reply) > 1:
            said = read(OPTIONS_OF[name], before + reply)
            if said != read(OPTIONS_OF[name], reply):
                wrong.append((reply, said))
    assert sum(len(said) == 1 for _, said in wrong) == 0, wrong
    assert len(wrong) <= 6, wrong  # a head ("B. MRI: …") no longer stands first; it may be lost, never another letter


@settings(max_examples=300)
@given(
    reply=st.one_of(st.text(), st.sampled_from([reply for _, reply, _ in REPLIES])),
    more=st.text(alphabet="ABI ab.,:;()[]{}<>/\\*_`$'\"-+0123456789\n答案是不정답은", max_size=30),
    options=st.sampled_from(list(OPTIONS_OF.values())),
)
@example(reply="\ud800A", more="", options=OPTIONS_OF["skin"])
def test_any_text_is_read_the_same_way_twice(reply: str, more: str, options: tuple[str, ...]) -> None:
    for text in (reply + more, more + reply):
        answer = extract_answer(text, options)
        assert answer == extract_answer(text, options)
        assert (answer.letter is not None) == (answer.outcome == "letter")


REPEATED = [
    "The answer is ",
    "not ",
    "A ",
    "<answer>",
    "</answer>",
    "B or ",
    "MRI, ",
    "CT MRI ",
    "X-ray",
    "<think>",
    "(",
    "\\boxed{",
    "**",
    "*a",
    "_",
    "`",
    "$",
    "\n",
    " ",
    "A) ",
    "no, ",
    "wait, not A ",
    "1 ",
    "1-",
    "5 x ",
    "-",
    "between ",
    '"a": ',
    "A. CT\n",
    "中",
    "정답은",
    "は",
    "the answer to a ",
    "<a ",
    "less than ",
    "\\text{",
    "I choose ",
    "is it? ",
    "besides A ",
    "besides A. ",
    "absence of ",
    "I cannot say ",
    "if A ",
    "A or E ",
]


@pytest.mark.parametrize("unit", REPEATED)
def test_time_grows_with_length_alone(unit: str) -> None:
    """Ten times the reply takes about ten times as long, not a hundred times; processor time, the best of three."""

    def seconds(length: int) -> float:
        reply = unit * (length // len(unit)) + " B"
        times = []
        for _ in range(3):
            start = time.process_time()
            extract_answer(reply, OPTIONS_OF["scan"])
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(20_000) < 35 * max(seconds(2_000), 1e-3)
