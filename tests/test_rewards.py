"""Rewards agree with the extractor, the format is strict, and a user's own reward is found by its path; it is asked
about a reply or about a step's replies, and may be async.
"""

import asyncio
import math
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medr1.data.answers import format_ok
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.training.rewards import accuracy_reward, format_reward, is_of_step, load_rewards, rewards_of

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


# --- a whole step, and async ---------------------------------------------------------------------------------------

REPLIES = ["a", "bbb", "cc", ""]
STEP = REPLIES, [RECORD.model_copy(update={"id": str(number)}) for number in range(4)], "think"


def longest(replies: list[str], records: list[Record], mode: str) -> list[float | None]:
    """1 for the longest reply of the step; does not apply to an empty one."""
    most = max(map(len, replies))
    return [float(len(reply) == most) if reply else None for reply in replies]


async def longest_later(replies: list[str], records: list[Record], mode: str) -> list[float | None]:
    await asyncio.sleep(0)
    return longest(replies, records, mode)


async def length_later(reply: str, record: Record, mode: str) -> float:
    await asyncio.sleep(0.01 / (1 + len(reply)))
    return len(reply)


class Judge:
    """An object with a client that belongs to the event loop it was first used on."""

    lock: asyncio.Lock | None = None

    async def __call__(self, replies: list[str], records: list[Record], mode: str, *, scale: float = 1.0) -> Any:
        self.lock = self.lock or asyncio.Lock()
        await asyncio.gather(*(self.one() for _ in replies))
        return np.array([len(reply) for reply in replies]) * scale

    async def one(self) -> None:
        assert self.lock
        async with self.lock:
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("reward", "whole", "expected"),
    [
        (longest, True, [0.0, 1.0, 0.0, None]),
        (longest_later, True, [0.0, 1.0, 0.0, None]),
        (length_later, False, [1.0, 3.0, 2.0, 0.0]),
        (lambda replies, *_: torch.arange(4), True, [0.0, 1.0, 2.0, 3.0]),
        (lambda replies, *_: (x for x in (True, None, 2, np.float32(3))), True, [1.0, None, 2.0, 3.0]),
        (lambda *of_one: len(of_one[0]), False, [1.0, 3.0, 2.0, 0.0]),
        (partial(Judge(), scale=0.5), True, [0.5, 1.5, 1.0, 0.0]),
        (max, False, None),
    ],
)
def test_a_reward_of_a_reply_or_of_a_step(reward: Any, whole: bool, expected: list[float | None] | None) -> None:
    assert is_of_step(reward) is whole
    if expected is not None:
        for _ in range(2):  # what is async keeps its event loop from step to step
            assert rewards_of("mine", reward, *STEP) == expected


def test_async_replies_are_under_way_together_and_in_a_notebook() -> None:
    under_way, most = 0, 0

    async def counted(reply: str, record: Record, mode: str) -> float:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return 1.0

    async def notebook() -> list[float | None]:
        return rewards_of("mine", counted, *STEP)

    assert asyncio.run(notebook()) == [1.0] * 4 and most == 4


def test_what_is_not_async_runs_where_it_was_made() -> None:
    here = threading.current_thread()
    assert rewards_of("mine", lambda *_: threading.current_thread() is here, *STEP) == [1.0] * 4


def test_a_reward_of_a_step_may_not_change_the_step() -> None:
    def spoil(replies: list[str], records: list[Record], mode: str) -> list[float]:
        given = list(map(float, map(len, replies)))
        replies.clear()
        records.reverse()
        return given

    assert rewards_of("mine", spoil, *STEP) == [1.0, 3.0, 2.0, 0.0]
    assert REPLIES == ["a", "bbb", "cc", ""] and STEP[1][0].id == "0"


async def breaks(reply: str, record: Record, mode: str) -> float:
    return 1 / (0 if record.id == "2" else 1)


async def refused(replies: list[str], records: list[Record], mode: str) -> list[float]:
    raise MedR1Error("http://here: cannot be reached; start the server")


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (lambda replies, *_: [1.0, 2.0], r"gave \[1.0, 2.0\] for the step's 4 replies; return a list with a number or"),
        (lambda replies, *_: 0.5, r"gave 0.5 for the step's 4 replies"),
        (lambda replies, *_: None, r"gave None for the step's 4 replies"),
        (lambda replies, *_: "four", r"gave 'four' for the step's 4 replies"),
        (lambda replies, *_: dict.fromkeys("abcd", 1.0), r"gave {'a': 1.0, .* for the step's 4 replies"),
        (lambda replies, *_: [1.0, math.nan, 1.0, 1.0], r"gave nan for a reply to record 1; return one finite number"),
        (lambda replies, *_: {}[0], r"raised KeyError: 0 at test_rewards.py:\d+ on the step's 4 replies; mend it"),
        (breaks, r"raised ZeroDivisionError: .* at test_rewards.py:\d+ on a reply to record 2; mend it"),
        (refused, r"^reward 'mine' on the step's 4 replies: http://here: cannot be reached; start the server$"),
    ],
)
def test_a_mistake_of_a_step_or_async_is_one_line(reward: Any, line: str) -> None:
    with pytest.raises(MedR1Error, match=line) as error:
        rewards_of("mine", reward, *STEP)
    assert "\n" not in str(error.value)
