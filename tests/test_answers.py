"""The extractor against replies that public extractors misread, its rules, fuzz, and all real options."""

import random
import re
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medr1.data.answers import Answer, extract_answer, is_correct
from medr1.data.datasets import load_records
from medr1.data.records import LETTERS, Record

OPTIONS = ("CT", "MRI", "Ultrasound", "X-ray")

# Replies to a question with these options, and the letter or outcome that they have. Each of the first block
# was misread by at least one public evaluation kit.
REPLIES = [
    ("b", "B"),
    ("The correct option is b", "B"),  # "ct" stands inside "correct"
    ("This is not a CT; it is an MRI.", "B"),
    ("The answer is B, because A shows bone well.", "B"),
    ("A CT scan is excluded, hence B", "B"),
    ("A lesion is seen. MRI.", "B"),
    ("Answer: A\nWait, I made a mistake.\nAnswer: B", "B"),
    ("<answer>A</answer> … correction <answer>B</answer>", "B"),
    ("<think>… <answer>A</answer> is wrong </think><answer>B</answer>", "B"),
    ("<answer>B</answer>", "B"),
    ("<answer>(B)</answer>", "B"),
    ("<answer>B. MRI</answer>", "B"),
    ("Option B", "B"),
    ("Answer - B", "B"),
    (r"\boxed{\text{B}}", "B"),
    ("Ｂ", "B"),
    ("答案是B。", "B"),
    ('"B"', "B"),
    ("A and B", "ambiguous"),
    ("A or B", "ambiguous"),
    ("A, B, C, D", "ambiguous"),
    ("I cannot determine the modality from this image.", "refusal"),
    ("I'm sorry, but I can't help with medical images.", "refusal"),
    ("None of the above", "invalid"),
    ("E", "invalid"),
    ("", "unparsed"),
    ("Based on the image, the Disease is malignant", "unparsed"),
    ("X-ray is ruled out; Ultrasound is ruled out; CT is ruled out.", "unparsed"),
    # Formatting
    ("**B**", "B"),
    ("*B*", "B"),
    ("`B`", "B"),
    ("```\nB\n```", "B"),
    ("```text\nB\n```", "B"),
    ("$B$", "B"),
    (r"\(B\)", "B"),
    ("\u200bB\ufeff", "B"),
    ("（Ｂ）", "B"),
    ("B）", "B"),
    ("[B]", "B"),
    ("<|im_start|>B<|im_end|>", "B"),
    # Reasoning
    ("<think>I think B", "truncated"),
    ("<think>A or B?</think>", "unparsed"),
    ("<THINK>A</THINK>\n<ANSWER> b </ANSWER>", "B"),
    ("<think>a<think>b</think>A</think><answer>B</answer>", "B"),
    ("reasoning about A </think> B", "B"),  # the chat template opened the tag
    ("<answer>B</answer><think>because A", "B"),
    ("<think>hmm <answer>B</answer>", "B"),
    # Answer tags
    ("<answer>b</answer>", "B"),
    ("<answer>MRI</answer>", "B"),
    ("<answer>mri.</answer>", "B"),
    ("<answer>B: CT</answer>", "ambiguous"),
    ("<answer>A or B</answer>", "ambiguous"),
    ("<answer>F</answer>", "invalid"),
    ("<answer></answer> B", "unparsed"),
    ("<answer>I don't know</answer>", "refusal"),
    ("<answer>\\boxed{B}</answer>", "B"),
    ("<answer>A <answer>B</answer>", "B"),
    ("A</answer>", "A"),  # the prompt opened the tag
    ("< Answer > A </ Answer >", "A"),
    ("<answer>A CT scan</answer>", "A"),
    # Declarations
    ("Final Answer: (B) MRI. Explanation: CT shows bone.", "B"),
    ("The answer is MRI rather than CT.", "B"),
    ("The answer to the question is B.", "B"),
    ("The answer is most likely B.", "B"),
    ("The answer is \\boxed{B}", "B"),
    ("\\boxed{42} but Answer: B", "B"),
    ("So x = 3, \\boxed{B}. It is not CT.", "B"),
    ("答案：Ｂ", "B"),
    ("正确答案为 B", "B"),
    ("The answer is B, C is wrong", "B"),
    ("The answer is B and C is wrong", "B"),
    ("The answer is B. CT would show bone.", "B"),
    ("Answer: B\nC) is wrong", "B"),
    ("The answer is B. Option C: ultrasound shows flow.", "B"),
    ("The answer is A because bone is bright", "A"),
    ("The answer is A lesion", "unparsed"),
    ("The answer is a lesion seen on MRI", "B"),
    ("The answer is X-ray", "D"),
    ("The answer is I think B", "B"),
    ("The answer is E.", "invalid"),
    ("Answer: B: CT", "ambiguous"),
    ("Answer: A/B", "ambiguous"),
    ("Answer: A, B, C, D", "ambiguous"),
    ("The answer is CT or MRI", "ambiguous"),
    ("I don't think the answer is B", "unparsed"),
    ("The correct option isn't B", "unparsed"),
    ("The answer is not A, it is B.", "B"),
    ("What is the correct answer: A) CT, B) MRI, C) Ultrasound, D) X-ray", "ambiguous"),
    ("Options: A) CT, B) MRI, C) Ultrasound, D) X-ray. Answer: B", "B"),
    # Letters in running text
    ("I'd go with B", "B"),
    ("我认为是B", "B"),
    ("选B", "B"),
    ("不是A，而是B", "B"),
    ("B is correct and A is wrong.", "B"),
    ("Option A shows an image", "A"),
    ("A", "A"),
    ("A.", "A"),
    ("B and A are right", "ambiguous"),
    ("B: CT", "ambiguous"),
    ("A: CT", "A"),
    ("B-MRI", "B"),
    ("hepatitis B", "unparsed"),
    ("B cell lymphoma", "unparsed"),
    ("E. something else", "invalid"),
    # Texts, and what denies them
    ("x ray", "D"),
    ("PET/CT", "unparsed"),
    ("Not CT but MRI", "B"),
    ("It can't be CT. It is MRI", "B"),
    ("not CT or MRI", "unparsed"),
    ("CT or MRI is excluded", "unparsed"),
    ("CT, MRI and X-ray are excluded", "unparsed"),
    ("Excluded: CT, MRI.", "unparsed"),
    ("I cannot determine whether this is CT or MRI", "refusal"),
]


@pytest.mark.parametrize(("reply", "expected"), REPLIES)
def test_reply(reply: str, expected: str) -> None:
    answer = extract_answer(reply, OPTIONS)
    assert (answer.letter or answer.outcome) == expected
    assert (answer.outcome == "letter") == (answer.letter is not None)


def test_an_unclosed_answer_counts_and_is_flagged() -> None:
    assert extract_answer("<answer>B", OPTIONS) == Answer("letter", "B", unclosed=True)
    assert extract_answer("<think>x</think><answer>B</ans", OPTIONS) == Answer("letter", "B", unclosed=True)
    assert extract_answer("<answer>B</answer>", OPTIONS) == Answer("letter", "B")


def test_a_text_is_not_found_in_a_longer_one() -> None:
    stages = ("Stage I", "Stage II", "Stage III")
    assert extract_answer("This is Stage III disease", stages).letter == "C"
    assert extract_answer("This is Stage II.", stages).letter == "B"
    assert extract_answer("This is not melanoma.", ("Melanoma", "Not melanoma")).letter == "B"
    assert extract_answer("No tumor is seen.", ("Tumor", "No tumor")).letter == "B"


def test_yes_and_no() -> None:
    options = ("Yes", "No")
    for reply, letter in [
        ("No.", "B"),
        ("no", "B"),
        ("No, there is no fracture.", "B"),
        ("Yes, it is.", "A"),
        ("The answer is no.", "B"),
        ("I would say no.", "B"),
        ("The lungs look normal", None),
        ("I do not know", None),
        ("There is no doubt about this", None),
    ]:
        assert extract_answer(reply, options).letter == letter, reply


def test_letters_inside_an_option_are_not_choices() -> None:
    options = ("Hepatitis A", "Vitamin D deficiency", "T3 N0 M1, Stage III, B")
    assert extract_answer("I see vitamin D deficiency", options).letter == "B"
    assert extract_answer("It is T3 N0 M1, Stage III, B.", options).letter == "C"


def test_options_may_refuse_or_be_letters() -> None:
    assert extract_answer("It cannot be determined.", ("Fracture", "Normal")).outcome == "refusal"
    assert extract_answer("It cannot be determined.", ("Fracture", "Cannot be determined")).letter == "B"
    assert extract_answer("B", ("AB", "A", "B")).letter == "B"  # a letter is what the prompt asks for
    assert extract_answer("AB", ("O", "AB", "B")).letter == "B"
    assert extract_answer("O", ("O", "AB", "B")).letter == "A"


def test_repeated_option_texts() -> None:
    record = Record(
        id="1",
        images=(),
        question="Where?",
        options=("Right atrium", "Aorta", "Right Atrium"),
        answer="C",
        modality=None,
        question_type=None,
        source="s",
        group="g",
    )
    for reply in ("A", "C", "right atrium", "C) Right Atrium", "A: Right atrium", "C: right atrium"):
        assert is_correct(extract_answer(reply, record.options), record), reply
    assert not is_correct(extract_answer("B", record.options), record)
    assert extract_answer("B: right atrium", record.options).outcome == "ambiguous"
    # Equal but for a dash: the exact spelling tells them apart, another one does not.
    assert extract_answer("x_ray", ("X-Ray", "x_ray")).letter == "B"
    assert extract_answer("x ray", ("X-Ray", "x_ray")).outcome == "ambiguous"


WRAPPINGS = [
    "{L}",
    "{l}",
    "({L})",
    "{L}.",
    "{L})",
    "{L}:",
    "{L}）",
    "[{L}]",
    '"{L}"',
    "**{L}**",
    "`{L}`",
    "${L}$",
    "```\n{L}\n```",
    r"\boxed{{{L}}}",
    r"\boxed{{\text{{{L}}}}}",
    "Option {L}",
    "Answer - {L}",
    "Answer: {L}",
    "The answer is {L}.",
    "The correct option is {l}",
    "Answer: ({L}), I am sure.",
    "答案是{L}。",
    "<answer>{L}</answer>",
    "<answer> {L} </answer>",
    "<answer>\n({l})\n</answer>",
    "<ANSWER>{L}</ANSWER>",
    "<answer>{L}",
    "<answer>{L}. {gold}</answer>",
    "<answer>{gold}</answer>",
    "<think>Option A or B, not C.</think><answer>{L}</answer>",
    "<answer>{L}</answer><think>A or B? {gold}</think>",
    "{gold}",
    "{gold}.",
    "The answer is {gold}.",
    "{L}: {gold}",
    "{L}) {gold}",
    "Answer: {L}) {gold}",
]


def wrap(wrapping: str, letter: str, gold: str) -> str:
    return wrapping.format(L=letter, l=letter.lower(), gold=gold)


def test_gold_is_right_in_every_wrapping(shared) -> None:
    """Each public row in one of the wrappings by turns, and each 100th in all of them."""
    records = [*load_records(shared / "data" / "medr1_splits", check_images=False)]
    records += load_records(shared / "data" / "real", check_images=False)
    wrong = []
    for number, record in enumerate(records):
        turn = WRAPPINGS if number % 100 == 0 else [WRAPPINGS[number % len(WRAPPINGS)]]
        for wrapping in turn:
            reply = wrap(wrapping, record.answer, record.gold)
            if not is_correct(extract_answer(reply, record.options), record):
                wrong.append((reply, record.options))
    assert len(records) == 36_598 + 12_807
    assert not wrong, wrong[:3]


words = st.sampled_from(
    ["Stage II", "Stage III", "x_ray", "X-Ray", "no", "normal", "A", "?", "Ⅳ", "(b)", "CT", "è", "是"]
)
option_lists = st.lists(st.one_of(words, st.text(max_size=12)), min_size=2, max_size=26)
tags = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "**", "`", "$", "```", "<"]
phrases = [
    "A",
    "B,",
    "C.",
    "D)",
    "(E)",
    "I",
    "a",
    "is",
    "the answer is",
    ":",
    "not",
    "or",
    "and",
    "but",
    "wrong",
]
others = ["excluded", "MRI", "CT", "X-ray", "答案是", "。", "不是", "\n", "\0", "ﬁ", " "]
pieces = st.sampled_from(tags + phrases + others)


@settings(max_examples=400)
@given(
    reply=st.one_of(st.text(), st.lists(pieces).map(" ".join), st.lists(pieces).map("".join)),
    options=option_lists,
)
def test_never_raises_and_stays_among_the_options(reply: str, options: list[str]) -> None:
    answer = extract_answer(reply, options)
    assert answer.letter is None or answer.letter in LETTERS[: len(options)]
    assert (answer.outcome == "letter") == (answer.letter is not None)
    assert extract_answer(reply, options) == answer


@settings(max_examples=200)
@given(
    options=st.lists(
        st.from_regex(r"[A-Za-z][a-z]{3,9}( [a-z]{4,9}){0,2}", fullmatch=True),
        min_size=2,
        max_size=8,
        unique_by=str.casefold,
    ),
    choice=st.integers(0, 7),
    wrapping=st.sampled_from([wrapping for wrapping in WRAPPINGS if "gold" not in wrapping]),
)
def test_a_letter_reads_the_same_in_every_wrapping(options: list[str], choice: int, wrapping: str) -> None:
    letter = LETTERS[choice % len(options)]
    assert extract_answer(wrap(wrapping, letter, ""), options).letter == letter


def test_broken_bytes_are_no_punctuation() -> None:
    """An untrained model's noise around a capital must not become an answer."""
    assert extract_answer("\ufffd\ufffd?</think>\ufffd\ufffdd\ufffd\x1b", OPTIONS).outcome == "unparsed"
    assert extract_answer("\x00B\x07", OPTIONS).outcome == "unparsed"


def test_the_words_of_a_longer_option_apart() -> None:
    """ "Lung" alone is not what is said; the longer option is not guessed either."""
    for options in (("Lung", "Lung cancer"), ("Lung cancer", "Lung")):
        assert extract_answer("cancer of the lung", options).outcome == "ambiguous"
        assert extract_answer("Lung", options).letter == "AB"[options.index("Lung")]
        assert extract_answer("The finding is lung cancer.", options).letter == "AB"[options.index("Lung cancer")]
        assert extract_answer("The lung, not lung cancer", options).letter in ("AB"[options.index("Lung")], None)


@pytest.mark.parametrize("name", ["Hepatitis", "Vitamin", "Type", "Grade", "Group", "Influenza"])
def test_a_letter_with_an_option_that_ends_in_another_letter(name: str) -> None:
    """In the asked format, whatever letter the option has and ends in."""
    for ends in permutations("ABC"):
        options = tuple(f"{name} {end}" for end in ends)
        for letter, option in zip("ABC", options, strict=True):
            for form in ("<answer>{}) {}</answer>", "{}. {}", "The answer is {}, {}."):
                assert extract_answer(form.format(letter, option), options).letter == letter, (form, options)
            assert extract_answer(option, options).letter == letter


def test_a_lone_letter_is_what_the_whole_reading_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of a few words, among them letters, numbers, signs and words that mean several options."""
    drawn = random.Random(0)
    phrase = "left right lung T2 PET grade 2 stage I vitamin A B none of the above all yes no IgA an x-ray + - 5 mm Ⅱ α"
    words = phrase.split()
    asked = []
    for _ in range(300):
        options = [" ".join(drawn.choices(words, k=drawn.randrange(1, 4))) for _ in range(drawn.randrange(2, 7))]
        letter = "ABCDEFGH"[drawn.randrange(len(options))]
        form = drawn.choice(["{}", "{}.", " {}\n", "<answer>{}</answer>", "<think>x</think><answer> {}. </answer>"])
        asked.append((form.format(letter), options))
    quick = [extract_answer(*question) for question in asked]
    monkeypatch.setattr("medr1.data.answers._LONE", re.compile(""))
    assert quick == [extract_answer(*question) for question in asked]
