"""Verifiable rewards: functions (reply, record, mode) -> float, looked up by name, Python path or file.

The accuracy reward and the evaluation share one extractor, so what is trained is what is measured. A reward of one's
own may give any finite number (NumPy's and torch's, and True for 1), or None where it does not apply to a reply.
"""

import difflib
import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from decimal import Decimal
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from medr1.data.answers import exact_match, extract_answer, format_ok, is_correct, read_answer, token_f1
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error

Reward = Callable[[str, Record, str], float | None]


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


def reward_of(name: str, reward: Reward, reply: str, record: Record, mode: str) -> float | None:
    """What a reward gives for one reply, as a finite float; None where it says that it does not apply.

    Raises:
        MedR1Error: it raised, or gave anything else; the line names reward and record. The cause, with its traceback,
            is the error's `__cause__`.
    """
    try:
        value: Any = reward(reply, record, mode)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MedR1Error(
            f"reward {name!r} raised {reason} at {Path(last.filename).name}:{last.lineno} on a reply to record"
            f" {record.id}; mend it, or return None where it does not apply"
        ) from error
    if value is None:
        return None
    number = _as_float(value)
    if number is None or not abs(number) <= MAX_REWARD:
        shown = " ".join(repr(value).split())[:80]
        raise MedR1Error(
            f"reward {name!r} gave {shown} for a reply to record {record.id}; return one finite number, or None where"
            " it does not apply"
        )
    return number


MAX_REWARD = torch.finfo(torch.float32).max
"""The largest reward, since advantages are float32."""


def _as_float(value: Any) -> float | None:
    """A number of Python, NumPy or torch, also the only one of an array; None of anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, Real | Decimal) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several values, or more than a float holds
        return None


_NAMED: dict[str, Reward] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "exact": exact_reward,
    "token_f1": token_f1_reward,
}


def load_rewards(weights: Mapping[str, float]) -> list[tuple[str, Reward, float]]:
    """(name, function, weight) for each entry, e.g. of {"accuracy": 1.0, "my_package.rewards:brevity": 0.1}.

    Raises:
        MedR1Error: there is no entry, a name is neither known nor an importable "module:function" or
            "FILE.py:function", or a weight is not a finite number.
    """
    if not weights:
        raise MedR1Error(f"no reward is set; name one or more of {', '.join(_NAMED)} or a module:function")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise MedR1Error(f"the weight of reward {name!r} is {weight!r}; give a number")
    return [(name, _NAMED.get(name) or _import(name), float(weight)) for name, weight in weights.items()]


def _import(name: str) -> Reward:
    """A reward of the user's own: "package.module:function", or "FILE.py:function" from the working directory."""
    module, colon, function = name.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, _NAMED, n=1, cutoff=0.6)
        raise MedR1Error(
            f"unknown reward {name!r}; use {', '.join(_NAMED)} or your own as module:function or FILE.py:function"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    path = Path(module).expanduser()
    is_file = path.suffix == ".py" or "/" in module
    if is_file and not path.is_file():
        raise MedR1Error(f"reward {name!r}: no such file as {path}, seen from {Path.cwd()}")
    try:
        found = getattr(_run_file(path) if is_file else importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises
        kind = "" if isinstance(error, ImportError) and not is_file else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:200]
        places = [place for place in traceback.extract_tb(error.__traceback__) if Path(place.filename).suffix == ".py"]
        where = f" at {Path(places[-1].filename).name}:{places[-1].lineno}" if is_file and places else ""
        remedy = "mend it" if is_file else "install it, set PYTHONPATH, or give the file as FILE.py:function"
        raise MedR1Error(f"reward {name!r} cannot be imported ({reason}{where}); {remedy}") from error
    if found is None:
        raise MedR1Error(f"reward {name!r} cannot be imported: {module} has no function {function!r}")
    if not callable(found):
        raise MedR1Error(f"reward {name!r} is not a function but a {type(found).__name__}")
    return cast(Reward, found)


def _run_file(path: Path) -> ModuleType:
    """The module in a file; it may import what lies beside it, and is run once."""
    path = path.resolve()
    if (name := f"medr1_rewards_{path.stem}_{abs(hash(path))}") in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("Python cannot load a file of this kind")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
