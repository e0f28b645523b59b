"""Rewards agree with the extractor, the format is strict, and a user's own reward is found by its path."""

import math
from pathlib import Path

import pytest

from medr1.data.answers import format_ok
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.training.rewards import accuracy_reward, format_reward, load_rewards

RECORD = Record(
    id="1",
    images=(),
    question="Which?",
    options=("CT", "MRI"),
    answer="B",
    modality="MRI",
    question_type=None,
    source="s",
    group="g",
)


@pytest.mark.parametrize(
    ("reply", "mode", "expected"),
    [
        ("<think>It is grey.</think><answer>B</answer>", "think", True),
        (" <think>\nIt < 3 is.\n</think>\n<answer> b </answer>\n", "think", True),
        ("<answer>B</answer>", "think", False),
        ("<think> </think><answer>B</answer>", "think", False),  # no reasoning in it
        ("<think>x</think><think>y</think><answer>B</answer>", "think", False),
        ("<think>x <answer>A</answer></think><answer>B</answer>", "think", False),
        ("<think>x</think><answer>A</answer><answer>B</answer>", "think", False),
        ("<think>x</think> so <answer>B</answer>", "think", False),
        ("<think>x</think><answer>B</answer> done", "think", False),
        ("<think>x</think><answer>MRI</answer>", "think", True),  # an option's text is an option
        ("<think>x</think><answer>MRI\nsince it is grey</answer>", "think", False),
        ("<think>x</think><answer> </answer>", "think", False),
        ("<think>x</think><answer>B", "think", False),
        ("<answer>B</answer><think>x</think>", "think", False),
        ("<answer>B</answer>", "no-think", True),
        ("\n<answer>\nB\n</answer> ", "no-think", True),
        ("<think>x</think><answer>B</answer>", "no-think", False),
        ("<answer>B</answer><answer>B</answer>", "no-think", False),
        ("<answer>BC</answer>", "no-think", True),  # as asked; that it is no option is for accuracy to say
        ("B", "no-think", False),
        ("", "no-think", False),
        ("<answer>B</answer><think>It is grey.</think>", "think-after", True),
        ("<answer>B</answer>", "think-after", False),
        ("<think>x</think><answer>B</answer>", "think-after", False),
    ],
)
def test_format(reply: str, mode: str, expected: bool) -> None:
    assert format_ok(reply, mode) is expected
    assert format_reward(reply, RECORD, mode) == float(expected)


def test_format_needs_a_known_mode() -> None:
    with pytest.raises(MedR1Error, match="unknown prompt mode"):
        format_ok("B", "deep")


def test_accuracy_forgives_wrapping_and_nothing_else() -> None:
    for reply in ("<answer>B</answer>", "<answer>\n(b)\n</answer>", "MRI", "The answer is B."):
        assert accuracy_reward(reply, RECORD, "think") == 1.0
    for reply in ("<answer>A</answer>", "A or B", "", "CT", "<think>B"):
        assert accuracy_reward(reply, RECORD, "think") == 0.0


def brevity(reply: str, record: Record, mode: str) -> float:
    return 1 / (1 + len(reply))


def test_load_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    loaded = load_rewards({"accuracy": 1, "format": 0.5, "test_rewards:brevity": -0.1})
    assert [(name, weight) for name, _, weight in loaded] == [
        ("accuracy", 1.0),
        ("format", 0.5),
        ("test_rewards:brevity", -0.1),
    ]
    assert [function("B", RECORD, "no-think") for _, function, _ in loaded] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({}, "no reward is set"),
        ({"acuracy": 1.0}, "unknown reward 'acuracy'; use accuracy, format, exact, token_f1 or"),
        ({"no_such_module:f": 1.0}, "cannot be imported (No module named 'no_such_module')"),
        ({"math:no_such": 1.0}, "cannot be imported"),
        ({":f": 1.0}, "cannot be imported"),
        ({"math:pi": 1.0}, "is not a function but a float"),
        ({"accuracy": math.nan}, "the weight of reward 'accuracy' is nan"),
        ({"accuracy": True}, "the weight of reward 'accuracy' is True"),
        ({"accuracy": "1"}, "the weight of reward 'accuracy' is '1'"),
    ],
)
def test_bad_rewards(weights: dict, reason: str) -> None:
    with pytest.raises(MedR1Error) as error:
        load_rewards(weights)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reward_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside.py").write_text("WORTH = 0.25\n")
    (tmp_path / "mine.py").write_text("from beside import WORTH\ndef brevity(reply, record, mode):\n    return WORTH\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py:brevity", "./mine.py:brevity", f"{tmp_path}/mine.py:brevity"):
        [(_, reward, weight)] = load_rewards({name: 0.5})
        assert (reward("", RECORD, "think"), weight) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py:f", "", "no such file as gone.py"),
        ("mine.py:f", "x = 1\n", "mine.py has no function 'f'"),
        ("mine.py:x", "x = 1\n", "is not a function but a int"),
        ("mine.py:f", "import nothing_of_this_name\n", r"ModuleNotFoundError: .*at mine.py:1\); mend it"),
        ("mine.py:f", "x = 1\ny = x + undefined\n", r"NameError: .*undefined.* at mine.py:2"),
        ("mine.py:f", "def f(:\n", "SyntaxError"),
        ("mine.py:", "x = 1\n", "has no function ''"),
        ("mine:f", "", "FILE.py:function"),
        ("acuracy", "", "did you mean accuracy"),
    ],
)
def test_mistakes_with_a_file_are_one_line(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedR1Error, match=message) as error:
        load_rewards({name: 1.0})
    assert "\n" not in str(error.value)
