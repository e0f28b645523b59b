"""Open questions: what is read out of a reply, how it is scored, and that multiple choice never mixes with it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_vlms import tiny_vlm

from medr1.data.answers import exact_match, extract_answer, is_correct, read_answer, token_f1
from medr1.data.prompts import build_messages
from medr1.data.records import Record, normalise_answer
from medr1.evaluation.controls import permuted, text_only_prior
from medr1.evaluation.metrics import accuracy_table, compare, flip_rate, open_table, summarise
from medr1.evaluation.run import evaluate
from medr1.evaluation.scoring import score
from medr1.report.run import ReportData, num_counted, write_report
from medr1.training.rewards import load_rewards


def record(id: str = "1", answer: str = "heart", **fields: object) -> Record:
    defaults = {
        "images": (),
        "question": "Which organ is enlarged?",
        "options": (),
        "modality": "X-Ray",
        "question_type": None,
        "source": "made",
        "group": id,
    }
    return Record(id=id, answer=answer, **{**defaults, **fields})


# -- the record ----------------------------------------------------------------------------------------------


def test_open_record() -> None:
    one = record(alternatives=("cardiac silhouette",))
    assert one.is_open and not one.is_yes_no
    assert (one.letters, one.right_letters, one.gold, one.chance) == ((), (), "heart", None)
    assert [record(answer=text).is_yes_no for text in ("Yes ", "no.", "NO", "none", "yes, mild")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert record(answer="yes").chance == 0.5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": " "}, "an answer of an open question is empty"),
        ({"alternatives": ("",)}, "an answer of an open question is empty"),
        ({"options": ("a",), "answer": "A"}, "1 options, expected 2 to 26"),
        ({"options": ("a", "b"), "answer": "A", "alternatives": ("c",)}, "alternatives are for open questions"),
    ],
)
def test_inconsistent_records(fields: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        record(**fields)


def test_prompt_has_no_letters_and_does_not_tell_yes_no_from_other_questions() -> None:
    text = build_messages(record(), "think")[0]["content"][-1]["text"]
    assert text == (
        "Which organ is enlarged?\n\nReason inside <think></think>, then write a short answer inside <answer></answer>."
    )
    assert build_messages(record(answer="yes"), "think") == build_messages(record(), "think")


# -- extraction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "outcome", "text"),
    [
        ("<answer>the heart</answer>", "text", "the heart"),
        ("<think>liver? <answer>liver</answer></think>\n<answer> Heart\n</answer>", "text", "Heart"),
        ("<answer>liver</answer> no, <answer>heart</answer>", "text", "heart"),
        ("<answer>left  **lower** lobe", "text", "left lower lobe"),
        ("I see it. The answer is the heart, because it is large.", "text", "the heart"),
        ("Answer: 2.5 cm. It is large.", "text", "2.5 cm"),
        ("The answer is H. pylori.", "text", "H. pylori"),
        ("The answer is -5.", "text", "-5"),
        ("The answer is: - a cyst.", "text", "a cyst"),
        ("The organism is seen. Answer: E. coli. It is a rod.", "text", "E. coli"),
        ("The answer is hepatitis B. It is viral.", "text", "hepatitis B"),
        ("The answer is approx. 5 cm. It is large.", "text", "approx. 5 cm"),
        ("Answer: liver. Wait. Answer: heart.", "text", "heart"),
        ("The answer is not known, but \\boxed{heart}", "text", "heart"),
        ("So \\boxed{\\text{heart}}", "text", "heart"),
        ("heart", "text", "heart"),
        ("Ｈｅａｒｔ", "text", "Heart"),
        ("<think>it is the", "truncated", None),
        ("<answer> </answer>", "unparsed", None),
        ("<answer>?</answer>", "unparsed", None),
        ("", "unparsed", None),
        ("<answer>It cannot be determined.</answer>", "refusal", "It cannot be determined."),
    ],
)
def test_span(reply: str, outcome: str, text: str | None) -> None:
    answer = extract_answer(reply, ())
    assert (answer.outcome, answer.text, answer.letter) == (outcome, text, None)


@given(st.text() | st.text(alphabet="<>/answerthink \\boxed{}.:isyno"))
def test_any_text_is_read(reply: str) -> None:
    for answer in (extract_answer(reply, ()), read_answer(reply, record(answer="yes"))):
        assert answer.letter is None
        assert answer.outcome in ("text", "ambiguous", "refusal", "truncated", "unparsed")
        assert answer.text is None or answer.text == " ".join(answer.text.split())
    assert 0 <= token_f1(reply, ["yes", "heart"]) <= 1


@pytest.mark.parametrize(
    ("said", "outcome", "means"),
    [
        ("Yes", "text", "yes"),
        ("yes, there is a nodule", "text", "yes"),
        ("No.", "text", "no"),
        ("There is no evidence of a fracture", "text", "no"),
        ("NO", "text", "no"),
        ("There is no doubt about it", "unparsed", None),
        ("yes and no", "ambiguous", None),
        ("Yes, no pneumothorax is seen", "ambiguous", None),
        ("The lungs look normal", "unparsed", None),  # "no" as a part of "normal" counts elsewhere
        ("I do not know", "refusal", None),
        ("A nodule is seen", "unparsed", None),
        ("yes-man", "unparsed", None),
        ("No idea", "refusal", None),
        ("No clue.", "refusal", None),
        ("No clear answer", "refusal", None),
        ("There is no way to tell", "refusal", None),
        ("No comment", "refusal", None),
        ("No diagnosis possible", "refusal", None),
        ("No. 3 rib", "unparsed", None),
    ],
)
def test_yes_and_no(said: str, outcome: str, means: str | None) -> None:
    for gold in ("yes", "no"):
        for reply in (f"<answer>{said}</answer>", said):
            answer = read_answer(reply, record(answer=gold))
            assert answer.outcome == outcome
            assert is_correct(answer, record(answer=gold)) is (gold == means)


# -- scoring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "same"),
    [
        ("The Heart.", "heart", True),
        ("T2-weighted", "t2 weighted", True),
        ("x ray", "X-Ray", True),
        ("left, upper lobe", "Left upper lobe", True),
        ("upper left lobe", "Left upper lobe", False),
        ("hearts", "heart", False),
        ("2.5 cm", "25 cm", False),
        ("肺。", "肺", True),
        ("肺部", "肺 部", True),
        ("A", "a", True),  # an article alone is a word
        ("a", "the", False),
        ("+", "+", True),
        ("+", "-", False),
        ("", "heart", False),
        ("ER-", "ER+", False),
        ("ER −", "ER-", True),
        ("HER2 (-)", "HER2-", True),
        ("HER2 (-)", "HER2", False),
        ("ER-, PR+", "er - , pr +", True),
        ("<5 cm", ">5 cm", False),
        ("> 5 cm", ">5 cm", True),
        ("a >5 cm mass", ">5 cm mass", True),
        ("≤3", "≥3", False),
        (">=3", "≥ 3", True),
        ("5", "-5", False),
        ("−5 HU", "-5 HU", True),
        ("5 +/- 2", "5±2", True),
        ("5 mm", "5 %", False),
        ("grade-3", "grade 3", True),
        ("3–5 cm", "3-5 cm", True),
        ("left lung - upper lobe", "left lung, upper lobe", True),
        ("lung -- upper lobe", "lung, upper lobe", True),
        ("- heart", "heart", True),
        ("T2‑weighted", "T2-weighted", True),
        ("hepatitis", "Hepatitis A", False),
        ("A-", "A+", False),
    ],
)
def test_exact_match(text: str, gold: str, same: bool) -> None:
    assert exact_match(text, ["something else", gold]) is same


def test_token_f1_by_hand() -> None:
    # 2 shared of 3 said ("left", "lower", "lobe") and 2 right ("lower", "lobe"): P 2/3, R 1, F1 = 2*2/5
    assert token_f1("the left lower lobe", ["Lower lobe"]) == pytest.approx(4 / 5)
    assert token_f1("lobe lobe", ["lower lobe"]) == pytest.approx(2 * 1 / 4)  # repetition counts once
    assert token_f1("lower lobe", ["heart", "Lower lobe"]) == 1
    assert token_f1("", ["heart"]) == token_f1("liver", ["heart"]) == 0
    assert token_f1("左肺", ["右肺"]) == pytest.approx(1 / 2)


@given(st.text(), st.text(min_size=1))
def test_scores_agree(text: str, gold: str) -> None:
    if exact_match(text, [gold]) and normalise_answer(text):
        assert token_f1(text, [gold]) == 1
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)
    assert token_f1(text, [gold]) == pytest.approx(token_f1(gold, [text]))


def test_rewards() -> None:
    names = {"accuracy": 1.0, "exact": 1.0, "token_f1": 1.0}
    rewards = {name: function for name, function, _ in load_rewards(names)}

    def scores(reply: str, one: Record) -> list[float]:
        return [rewards[name](reply, one, "no-think") for name in names]

    lobe = record(answer="lower lobe", alternatives=("inferior lobe",))
    assert scores("<answer>the lower lobe</answer>", lobe) == [1, 1, 1]
    assert scores("<answer>inferior lobe</answer>", lobe) == [1, 1, 1]
    assert scores("<answer>left lower lobe</answer>", lobe) == pytest.approx([0, 0, 0.8])
    assert scores("", lobe) == [0, 0, 0]
    # "yes" is understood in a sentence; the strict rewards want the word alone
    assert scores("<answer>Yes, it is</answer>", record(answer="yes")) == pytest.approx([1, 0, 0.5])
    unknown = record(answer="cannot be determined")
    assert scores("<answer>It cannot be determined</answer>", unknown) == pytest.approx([0, 0, 6 / 7])
    assert scores("<answer>Cannot be determined.</answer>", unknown) == [1, 1, 1]  # it declines, and rightly
    choice = record(options=("left lobe", "right lobe"), answer="B")
    assert scores("<answer>B</answer>", choice) == [1, 1, 1]
    assert scores("<answer>A</answer>", choice) == pytest.approx([0, 0, 0.5])
    assert scores("<answer>C</answer>", choice) == [0, 0, 0]


# -- numbers -------------------------------------------------------------------------------------------------


def row(id: str, reply: str, one: Record) -> dict:
    fields = {"images": [], "model": "m", "condition": "image", "mode": "no-think", "finish": "stop", "tokens": 3}
    record_fields = one.model_dump(include={"modality", "question_type", "source", "question", "options"})
    more = {"gold": one.answer, "chance": one.chance, "id": id, "group": id, "reply": reply}
    return score([{**fields, **record_fields, **more, "alternatives": list(one.alternatives)}])[0]


def mixed_rows(open_reply: str = "heart") -> list[dict]:
    choice = record(options=("a", "b"), answer="A")
    return [
        row("c1", "A", choice),
        row("c2", "B", choice),
        row("y1", "<answer>yes it is</answer>", record(answer="Yes")),
        row("y2", "<answer>no</answer>", record(answer="yes")),
        row("t1", open_reply, record()),
        row("t2", "<answer>lower lobe</answer>", record(answer="left lower lobe")),
        row("t3", "<answer></answer>", record()),
    ]


def test_open_questions_are_summed_up_apart() -> None:
    rows = mixed_rows()
    summary = summarise(rows)
    choice = accuracy_table(rows[:2])
    assert {name: summary[name] for name in choice} == choice
    assert (summary["n"], summary["outcomes"], summary["unparsed"]) == (2, {"letter": 2}, 0)
    found = summary["open"]
    assert found == open_table(rows[2:])
    assert (found["n"], found["accuracy"], found["chance"]) == (5, 2 / 5, None)
    assert (found["yes_no"]["n"], found["yes_no"]["accuracy"], found["yes_no"]["chance"]) == (2, 1 / 2, 1 / 2)
    assert (found["text"]["n"], found["text"]["accuracy"], found["text"]["chance"]) == (3, 1 / 3, None)
    assert found["token_f1"]["accuracy"] == pytest.approx((1 + 4 / 5 + 0) / 3)  # 2*2/(2+3)
    assert (found["outcomes"], found["unparsed"]) == ({"text": 4, "unparsed": 1}, 1)
    assert summarise(rows[:2])["open"] is None
    only_open = summarise(rows[2:])
    assert (only_open["n"], only_open["accuracy"], only_open["macro"]["accuracy"]) == (0, None, None)


def test_the_headline_is_of_multiple_choice_of_stated_modalities() -> None:
    rows = mixed_rows()
    assert num_counted(summarise(rows)) == 2
    assert num_counted(summarise(rows[2:])) == 5  # open questions where there are no others
    rows[0]["modality"], rows[1]["modality"] = "CT", None
    assert num_counted(summarise(rows)) == 1
    rows[0]["modality"] = None
    assert num_counted(summarise(rows)) == 2


def test_change_of_open_questions_is_told_apart() -> None:
    before, after = mixed_rows("liver"), mixed_rows("heart")
    change = compare(before, after)
    assert (change["difference"], change["n"], change["gained"]) == (0, 2, 0)
    assert (change["open"]["difference"], change["open"]["n"]) == (pytest.approx(1 / 5), 5)
    assert compare(before[:2], after[:2])["open"] is None
    assert flip_rate(before, after)["rate"] == pytest.approx(1 / 7)


def test_multiple_choice_rows_have_no_new_fields() -> None:
    assert not {"text", "token_f1"} & mixed_rows()[0].keys()


def test_controls_leave_open_questions_alone() -> None:
    one, choice = record(), record("2", options=("a", "b"), answer="A", group="2")
    assert permuted(one, 0) == one
    assert text_only_prior([one, choice], [one, choice]) == text_only_prior([choice], [choice])
    assert text_only_prior([one], [one])["accuracy"] is None


def test_evaluation_of_a_mixed_set_resumes_and_scores_again(tmp_path: Path) -> None:
    records = [
        record("1", alternatives=("cardiac shadow",)),
        record("2", answer="no", question="Is it broken?"),
        record("3", options=("a", "b"), answer="B"),
    ]
    out = tmp_path / "rows.jsonl"
    vlm = tiny_vlm("qwen2_vl")
    rows = evaluate(vlm, records, mode="no-think", out=out, max_new_tokens=6)
    assert [one["options"] for one in rows] == [[], [], ["a", "b"]]
    assert [one["chance"] for one in rows] == [None, 0.5, 0.5]
    assert rows[0]["alternatives"] == ["cardiac shadow"] and "alternatives" not in rows[2]
    text = out.read_text()
    assert evaluate(vlm, records, mode="no-think", out=out, max_new_tokens=6) == rows
    assert out.read_text() == text
    replied = [one | {"reply": "<answer>Cardiac shadow</answer>"} for one in map(json.loads, text.splitlines())]
    assert {one["id"]: one["correct"] for one in score(replied)} == {"1": True, "2": False, "3": False}


def test_report_has_a_table_of_its_own(tmp_path: Path) -> None:
    rows = mixed_rows("liver"), mixed_rows("heart")
    write_report(ReportData(base=rows[0], trained=rows[1], image_root=tmp_path), tmp_path / "mixed.html")
    page = (tmp_path / "mixed.html").read_text()
    assert "5 questions without options are counted apart" in page
    assert "a text, token F1" in page and "+20.0 points" in page
    write_report(ReportData(base=rows[0][2:], trained=rows[1][2:], image_root=tmp_path), tmp_path / "open.html")
    page = (tmp_path / "open.html").read_text()
    assert "Open questions" in page and "Accuracy in numbers" not in page
    write_report(ReportData(base=rows[0][:2], trained=rows[1][:2], image_root=tmp_path), tmp_path / "choice.html")
    assert "Open questions" not in (tmp_path / "choice.html").read_text()
