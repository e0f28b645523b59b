"""One run as several processes, one a GPU: who writes and speaks, and how a mistake of one of them ends all.

`torchrun` and `accelerate launch` start the same command once a process and say its rank in the environment. Everything
here is also right for a single process, where it costs nothing.
"""

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rich import control
from rich.console import Console

from medr1.errors import MedR1Error

T = TypeVar("T")

# What models, files and servers wrote is shown to a terminal, never obeyed: of a text's control characters Rich drops a
# few, and passes on those that begin a sequence.
control._CONTROL_STRIP_TRANSLATE.update(dict.fromkeys([*range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0)]))

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another, which may be downloading a model or writing it."""


def is_first() -> bool:
    """Whether this process writes files and speaks to the user: the only one, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str, style: str = "") -> None:
    """Say one line to the user on stderr, in the first process alone; nothing in it is read as markup.

    Args:
        style: of Rich: "yellow" for what may change a number, "dim" for what only explains.
    """
    if is_first():
        Console(stderr=True, soft_wrap=True).print(line, style=style, markup=False, highlight=False)


@cache  # a study divides its data again and again, and a command may look at a name more than once
def tell_once(line: str, style: str = "") -> None:
    """As `tell`, and the same line never again."""
    tell(line, style)


def num_launched() -> int:
    """Processes that a launcher started together, this one among them; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def make_folder(out: Path) -> None:
    """A folder for results, where it is not there yet.

    Raises:
        MedR1Error: a file has its name, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror
        raise MedR1Error(f"{out}: cannot be a folder of results ({reason}); choose another --out") from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Nobody else writes into a file or an existing folder of results until the block is left, or this process dies.

    Raises:
        MedR1Error: another process writes there, or nothing can be written there.
    """
    with if_free(out) as free:
        if not free:
            raise MedR1Error(f"{out}: another process is writing it; let it end, or give another --out")
        yield


@contextmanager
def if_free(out: Path) -> Iterator[bool]:
    """Whether nobody else writes there; if so, nobody does until the block is left, or this process dies.

    A lock of the system on a hidden file, which goes when the block is left; after a `kill -9` the file may stay, and
    holds nobody up. Of several processes of one run only the first takes it.

    Raises:
        MedR1Error: nothing can be written there.
    """
    if not is_first():
        yield True
        return
    path = out / ".lock" if out.is_dir() else out.with_name(f".{out.name}.lock")
    handle = _lock(path, out)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, out: Path) -> int | None:
    """A handle that holds the lock as long as it is open; None where another process has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise MedR1Error(f"{out}: cannot be written ({error.strerror}); free space and run again") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:  # a file system that knows no locks
            return handle
        try:  # whoever had it may have removed the file between our two calls; then others would meet another one
            same = os.path.samestat(os.fstat(handle), path.stat())
        except OSError:  # there is none, or on NFS the handle has gone stale with it
            same = False
        if same:
            return handle
        os.close(handle)


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


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Interrupts:
    """Whether Ctrl-C was pressed and whether the user was told, for `heed_interrupts` and the command line."""

    pressed = False
    told = False


def heed_interrupts() -> None:
    """Make Ctrl-C end this process with one line and status 130, whatever it is at, imports under way included.

    Within an import it leaves at once: a library that is half imported turns KeyboardInterrupt into errors of its own,
    and nothing is lost, since every file is written aside and renamed. Elsewhere KeyboardInterrupt is raised, so that
    temporary files go; a second Ctrl-C does not wait for that. A process that was started to ignore Ctrl-C still does.
    """

    def on_interrupt(number: int, frame: Any) -> None:
        if Interrupts.told:  # and Python is closing down
            os._exit(130)
        again, Interrupts.pressed = Interrupts.pressed, True
        while frame is not None and not again:
            again = frame.f_code.co_filename.startswith("<frozen importlib")
            frame = frame.f_back
        if again:
            say_stopped()
            os._exit(130)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, on_interrupt)


def say_stopped() -> None:
    """The one line after Ctrl-C, on a line of its own below what the terminal echoed, with the cursor shown again."""
    Interrupts.told = True
    if is_first():
        below = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{below}medr1: stopped; the same command goes on from what is saved\n")
        sys.stderr.flush()
