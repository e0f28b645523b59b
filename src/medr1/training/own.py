"""Functions that a recipe names: the package's own by a word, the user's by a Python path or a file."""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from medr1.errors import MedR1Error


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
        raise MedR1Error(
            f"unknown {kind} {name!r}; use {', '.join(known)} or your own as module:function or FILE.py:function"
            + (f"; did you mean {near[0]}?" if near else "")
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
