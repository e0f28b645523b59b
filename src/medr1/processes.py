"""One run as several processes, one a GPU: who writes and speaks, and how a mistake of one of them ends all.

`torchrun` and `accelerate launch` start the same command once a process and say its rank in the environment. Everything
here is also right for a single process, where it costs nothing.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from medr1.errors import MedR1Error

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another, which may be downloading a model or writing it."""


def is_first() -> bool:
    """Whether this process writes files and speaks to the user: the only one, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def join() -> Any:
    """Meet the other processes that the launcher started; the torch.device of this one, None without a launcher."""
    if "LOCAL_RANK" not in os.environ:
        return None
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE).device


def leave() -> None:
    """Part from the others in good order, at the end of the command."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def gather(value: T) -> list[T]:
    """The value of every process, by rank. Every process must call it."""
    from torch import distributed

    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def agree(work: Callable[[], T]) -> T:
    """What `work` gives here, once it has ended well in every process; every process must call it.

    `work` may not wait for other processes, so that all come to the end of it.

    Raises:
        MedR1Error: of any process, raised by rank 0, so that it is said once; the others end with SystemExit(1).
    """
    error: MedR1Error | None = None
    try:
        result = work()
    except MedR1Error as caught:
        error = caught
    errors = [message for message in gather(None if error is None else str(error)) if message is not None]
    if not errors:
        return result
    raise (error or MedR1Error(errors[0])) if is_first() else SystemExit(1)
