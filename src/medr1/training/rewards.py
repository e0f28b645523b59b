"""Verifiable rewards, looked up by name, Python path or file: functions of a reply, or of all replies of a step.

    (reply, record, mode) -> float | None
    (replies, records, mode) -> a list of these, one for each reply in their order

Which of the two is told by the name of the first parameter, and either may be async. The accuracy reward and the
evaluation share one extractor, so what is trained is what is measured. A reward of one's own may give any finite number
(NumPy's and torch's, and True for 1), or None where it does not apply to a reply.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from medr1.data.answers import exact_match, extract_answer, format_ok, is_correct, read_answer, token_f1
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error, first_alone
from medr1.training.own import as_number, awaited, find_function, naming

Reward = Callable[..., Any]
"""Of a reply or of a step, see above."""


def accuracy_reward(reply: str, record: Record, mode: str) -> float:
    """1.0 for the right option however it is wrapped, or for the right answer to an open question (yes and no are
    understood in a sentence, any other text must be the same up to case, punctuation and articles); else 0.0.
    """
    return float(is_correct(read_answer(reply, record), record))


def exact_reward(reply: str, record: Record, mode: str) -> float:
    """1.0 where what was answered is the right text and nothing else, up to case, punctuation and articles."""
    return float(exact_match(_answered(reply, record), (record.gold, *record.alternatives)))


def token_f1_reward(reply: str, record: Record, mode: str) -> float:
    """`token_f1` of what was answered and the right text, in [0, 1]."""
    return token_f1(_answered(reply, record), (record.gold, *record.alternatives))


def _answered(reply: str, record: Record) -> str:
    """Text of the chosen option, or of the answer to an open question; empty without one."""
    answer = extract_answer(reply, record.options)
    return record.options[LETTERS.index(answer.letter)] if answer.letter else answer.text or ""


def format_reward(reply: str, record: Record, mode: str) -> float:
    """1.0 for a reply in the asked format, right or wrong, else 0.0."""
    return float(format_ok(reply, mode))


def is_of_step(reward: Reward) -> bool:
    """Whether a reward is called once with all replies of a step: its first parameter is named `replies`."""
    try:
        return next(iter(inspect.signature(reward).parameters), "") == "replies"
    except (TypeError, ValueError):  # a function written in C
        return False


def rewards_of(
    name: str, reward: Reward, replies: Sequence[str], records: Sequence[Record], mode: str
) -> list[float | None]:
    """What a reward gives for replies, each as a finite float; None where it says that it does not apply.

    What is async is awaited, all replies at once, on one event loop that lives as long as the process.

    Args:
        records: that of each reply.

    Raises:
        MedR1Error: it raised, or gave anything else; the line names reward and record. The cause, with its traceback,
            is the error's `__cause__`.
    """
    if is_of_step(reward):
        whole = f"the step's {len(replies)} replies"
        [given] = _called(name, reward, [(whole, (list(replies), list(records), mode))])
        try:
            values = list(given) if not isinstance(given, str | bytes | Mapping) else []
        except TypeError:
            values = []
        if len(values) != len(replies):
            raise MedR1Error(
                f"reward {name!r} gave {_shown(given)} for {whole}; return a list with a number or None for each, in"
                " their order"
            )
    else:
        calls = [
            (f"a reply to record {record.id}", (reply, record, mode))
            for reply, record in zip(replies, records, strict=True)
        ]
        values = _called(name, reward, calls)
    return [_checked(name, value, record) for value, record in zip(values, records, strict=True)]


def _called(name: str, reward: Reward, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """What a reward gives for several arguments, each with words that say what it was called on."""
    said, remedy = f"reward {name!r}", "mend it, or return None where it does not apply"
    values = []
    for what, arguments in calls:
        with naming(said, what, remedy):
            values.append(reward(*arguments))
    if not any(map(inspect.isawaitable, values)):
        return values

    async def settled(what: str, value: Any) -> Any:
        with naming(said, what, remedy):
            return await value if inspect.isawaitable(value) else value

    async def all_settled() -> list[Any]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(settled(what, value)) for (what, _), value in zip(calls, values, strict=True)]
        return [task.result() for task in tasks]

    with first_alone():
        return awaited(all_settled())


def _checked(name: str, value: Any, record: Record) -> float | None:
    if value is None:
        return None
    number = as_number(value)
    if number is None or not abs(number) <= MAX_REWARD:
        raise MedR1Error(
            f"reward {name!r} gave {_shown(value)} for a reply to record {record.id}; return one finite number, or None"
            " where it does not apply"
        )
    return number


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


MAX_REWARD = torch.finfo(torch.float32).max
"""The largest reward, since advantages are float32."""


_NAMED: dict[str, Reward] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "exact": exact_reward,
    "token_f1": token_f1_reward,
}


def load_rewards(
    weights: Mapping[str, float], more: Mapping[str, Reward] | None = None
) -> list[tuple[str, Reward, float]]:
    """(name, function, weight) for each entry, e.g. of {"accuracy": 1.0, "my_package.rewards:brevity": 0.1}.

    Args:
        more: rewards by a word that this run has beside those of the package.

    Raises:
        MedR1Error: there is no entry, a name is neither known nor an importable "module:function" or
            "FILE.py:function", or a weight is not a finite number.
    """
    if not weights:
        raise MedR1Error(f"no reward is set; name one or more of {', '.join(_NAMED)} or a module:function")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise MedR1Error(f"the weight of reward {name!r} is {weight!r}; give a number")
    known = {**_NAMED, **(more or {})}
    return [(name, find_function(name, known, "reward"), float(weight)) for name, weight in weights.items()]
