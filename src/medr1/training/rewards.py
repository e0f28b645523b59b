"""Verifiable rewards: functions (reply, record, mode) -> float, looked up by name or by Python path.

The accuracy reward and the evaluation share one extractor, so what is trained is what is measured.
"""

import importlib
import math
from collections.abc import Callable, Mapping

from medr1.data.answers import exact_match, extract_answer, format_ok, is_correct, read_answer, token_f1
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error

Reward = Callable[[str, Record, str], float]


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


_NAMED: dict[str, Reward] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "exact": exact_reward,
    "token_f1": token_f1_reward,
}


def load_rewards(weights: Mapping[str, float]) -> list[tuple[str, Reward, float]]:
    """(name, function, weight) for each entry, e.g. of {"accuracy": 1.0, "my_package.rewards:brevity": 0.1}.

    Raises:
        MedR1Error: there is no entry, a name is neither known nor an importable "module:function", or a
            weight is not a finite number.
    """
    if not weights:
        raise MedR1Error(f"no reward is set; name one or more of {', '.join(_NAMED)} or a module:function")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise MedR1Error(f"the weight of reward {name!r} is {weight!r}; give a number")
    return [(name, _NAMED.get(name) or _import(name), float(weight)) for name, weight in weights.items()]


def _import(name: str) -> Reward:
    module, colon, function = name.partition(":")
    if not colon:
        raise MedR1Error(f"unknown reward {name!r}; use {', '.join(_NAMED)} or the path of your own as module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
        raise MedR1Error(f"reward {name!r} cannot be imported ({error}); install it or set PYTHONPATH") from error
    if not callable(found):
        raise MedR1Error(f"reward {name!r} is not a function but a {type(found).__name__}")
    return found
