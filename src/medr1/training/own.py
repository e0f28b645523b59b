"""Functions that a recipe names: the package's own by a word, the user's by a Python path or a file."""

import asyncio
import contextlib
import difflib
import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from decimal import Decimal
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from medr1.errors import MedR1Error

T = TypeVar("T")


def find_function(name: str, known: Mapping[str, Callable[..., Any]], kind: str) -> Callable[..., Any]:
    """One of the known functions, or the user's own: "package.module:function", or "FILE.py:function" from the working
    directory.

    Args:
        kind: what it is, for the line about a mistake.

    Raises:
        MedR1Error: the name is neither known nor can be imported.
    """
    if name in known:
        return known[name]
    module, colon, function = name.rpartition(":")
    if not colon:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        ways = [*([", ".join(known)] if known else []), "your own as module:function or FILE.py:function"]
        raise MedR1Error(
            f"unknown {kind} {name!r}; use {' or '.join(ways)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    path = Path(module).expanduser()
    is_file = path.suffix == ".py" or "/" in module
    if is_file and not path.is_file():
        raise MedR1Error(f"{kind} {name!r}: no such file as {path}, seen from {Path.cwd()}")
    try:
        found = getattr(_run_file(path) if is_file else importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises
        error_type = "" if isinstance(error, ImportError) and not is_file else f"{type(error).__name__}: "
        reason = " ".join(f"{error_type}{error}".split())[:200]
        places = [place for place in traceback.extract_tb(error.__traceback__) if Path(place.filename).suffix == ".py"]
        where = f" at {Path(places[-1].filename).name}:{places[-1].lineno}" if is_file and places else ""
        remedy = "mend it" if is_file else "install it, set PYTHONPATH, or give the file as FILE.py:function"
        raise MedR1Error(f"{kind} {name!r} cannot be imported ({reason}{where}); {remedy}") from error
    if found is None:
        raise MedR1Error(f"{kind} {name!r} cannot be imported: {module} has no function {function!r}")
    if not callable(found):
        raise MedR1Error(f"{kind} {name!r} is not a function but a {type(found).__name__}")
    return cast(Callable[..., Any], found)


def _run_file(path: Path) -> ModuleType:
    """The module in a file; it may import what lies beside it, and is run once."""
    path = path.resolve()
    if (name := f"medr1_own_{path.stem}_{abs(hash(path))}") in sys.modules:
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


@contextlib.contextmanager
def naming(function: str, arguments: str, remedy: str) -> Iterator[None]:
    """Within this block an exception of the user's becomes one line: what was called, on what, where, and a remedy.

    Raises:
        MedR1Error: with the exception as its `__cause__`.
    """
    try:
        yield
    except MedR1Error as error:
        raise MedR1Error(f"{function} on {arguments}: {error}") from error.__cause__
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MedR1Error(
            f"{function} raised {reason} at {Path(last.filename).name}:{last.lineno} on {arguments}; {remedy}"
        ) from error


def as_number(value: Any) -> float | None:
    """A number of Python, NumPy or torch, also the only one of an array; None of anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, Real | Decimal) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several values, or more than a float holds
        return None


def awaited(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives, run on the one event loop that this process keeps for all of them.

    One, as a client belongs to the loop that it first ran on; and a thread's, as a notebook has its own running here.
    """
    under_way = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return under_way.result()
    finally:
        under_way.cancel()  # where Ctrl-C came first


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
