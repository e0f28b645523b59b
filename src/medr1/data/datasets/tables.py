"""Tables of questions as they lie on disk or on the hub: CSV, TSV, JSON, JSON lines, Parquet, all as dicts by row.

Column names are compared in lower case, a blank for an underscore ("Choice A", "option_a"). A row that cannot be read
is given as a `ValueError` in its place, so that it can be refused without its neighbours.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medr1.errors import MedR1Error

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
MAX_CELL = 1 << 28
"""Largest cell of a CSV file, in characters: GMAI-MMBench holds whole images in them, above Python's own limit."""


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Example:
        Table("data/mine.csv", "mine", frozenset({"image", "question", "answer"}), [{"image": "a.png", …}, …])
    """

    name: str
    """As messages name it: a path, or a hub name with its split."""
    stem: str
    """Short name; ids of rows without an id of their own begin with it. See `stems_of`."""
    columns: frozenset[str]
    """Names as `column` gives them, of the first row where each row names its own."""
    rows: Iterable[Any]
    """A dict each, or a ValueError for one that cannot be read."""


def column(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[\s_]+", " ", name.strip().casefold())


class NoRows(MedR1Error):
    """A JSON file that holds neither a list nor a question, as metadata beside tables does."""


def stems_of(files: Iterable[Path], folder: Path) -> dict[Path, str]:
    """Short name of each file: its stem, or where others have the same its path below the folder."""
    below = {file: file.relative_to(folder) for file in files}
    names = {file: (file.stem, str(path.with_suffix("")), str(path)) for file, path in below.items()}
    times = Counter(name for three in names.values() for name in set(three))
    return {file: next((name for name in three if times[name] == 1), three[-1]) for file, three in names.items()}


_MISSING = frozenset({"", "nan", "<na>", "null", "nat", "#n/a"})
"""What stands for no value wherever it stands, in lower case: pandas writes most of them."""
_MISSING_NAMES = _MISSING | {"none", "n/a", "na"}
"""The same in cells that name something; as an option or an answer "None" and "N/A" are words."""


def is_missing(value: object, *, names: bool = False) -> bool:
    """Whether a cell holds no value: None, a NaN, blank, or one of the texts that stand for it.

    Args:
        names: of a cell that names something (a group, a source, a modality): "None" is no name either.
    """
    if isinstance(value, str):
        return value.strip().casefold() in (_MISSING_NAMES if names else _MISSING)
    return value is None or value != value


def without_missing(values: Sequence[Any], name: str) -> list[Any]:
    """Options or answers without the missing ones at the end, also several that read "None" (pandas writes them so).

    Raises:
        ValueError: a missing one stands before others, so that letters would shift.
    """
    kept = list(values)
    if sum(value in (None, "None") for value in kept) > 1:
        kept = [None if value == "None" else value for value in kept]
    while kept and is_missing(kept[-1]):
        kept.pop()
    if any(map(is_missing, kept)):
        raise ValueError(f"{name!r} lacks a value before others; fill it in or take it out")
    return kept


def _holds_words(name: str) -> bool:
    """Whether a column, by its compared name, holds words and not a name of something."""
    options = r"(option|choice)s?|(option|choice|opt|op|answer)? ?([a-z]|\d{1,2})"
    return re.fullmatch(rf"{options}|answer|anwser|alternatives|question|label", name) is not None


def by_column(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under the compared names of its columns, without cells that hold no value (see `is_missing`).

    Raises:
        ValueError: two columns have the same name.
    """
    named = {column(name): value for name, value in row.items()}
    if len(named) < len(row):
        raise ValueError(f"two of the columns {', '.join(row)} have the same name; rename one")
    return {name: value for name, value in named.items() if not is_missing(value, names=not _holds_words(name))}


def read_table(path: Path) -> Table:
    """The table in a file of one of SUFFIXES. All but JSON lists are read while the rows are gone through.

    Raises:
        MedR1Error: the file cannot be read or is not what its name says.
    """
    _refuse_packed(path)
    rows: Iterable[Any]
    beginning: Iterable[Any]
    match path.suffix.lower():
        case ".csv" | ".tsv":
            header, delimiter = _header(path)
            return Table(str(path), path.stem, frozenset(map(column, header)), _csv_rows(path, delimiter))
        case ".parquet":
            return _parquet_table(path)
        case ".jsonl" if not _is_list(path):
            rows, beginning = _json_lines(path), _json_lines(path)
        case _:
            rows = beginning = read_rows(path)
    first = next((row for row in beginning if isinstance(row, dict)), {})
    return Table(str(path), path.stem, frozenset(map(column, first)), rows)


def _is_list(path: Path) -> bool:
    """Whether a list takes a whole text file. All of it is gone through, so that what is no text is told before rows.

    Raises:
        MedR1Error: as `read_text`.
    """
    first = ""
    for line in _lines(path):
        if "\0" in line:
            raise _no_text(path)
        first = first or line.lstrip()[:1]
    return first == "["


def read_text(path: Path) -> str:
    """A whole text file in UTF-8, or by its byte order mark UTF-16; without that mark.

    Raises:
        MedR1Error: it cannot be read, or is in neither.
    """
    try:
        text = path.read_text(encoding=_encoding(path))
        if "\0" in text:
            raise _no_text(path)
        return text
    except UnicodeDecodeError as error:
        raise MedR1Error(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def read_rows(path: Path) -> list[Any]:
    """The list in a JSON file, or the objects in one that holds a line each.

    Raises:
        MedR1Error: the file cannot be read, is not JSON (the line is named), or holds no list.
    """
    text = read_text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return [*_json_lines(path)]
        why = _why_not_json(error)
        raise MedR1Error(f"{path}: line {error.lineno} is not JSON ({why}); repair the file") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists nested too deep
        raise MedR1Error(f"{path}: cannot be read as JSON ({error}); repair the file") from error
    if not isinstance(rows, list):
        lists = [part for part in rows.values() if isinstance(part, list)] if isinstance(rows, dict) else []
        parts = [rows, *(part[0] for part in lists if part)]
        told = any(isinstance(part, dict) and "question" in map(column, part) for part in parts)
        raise (MedR1Error if told else NoRows)(f"{path}: expected a list of questions, found a {type(rows).__name__}")
    return rows


def _json_lines(path: Path) -> Iterator[Any]:
    """A value a line, read while they are gone through; a ValueError for a line that is none.

    Raises:
        MedR1Error: not one line is JSON; the first is named.
    """
    first = ""
    wrong: list[ValueError] = []
    has_value = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = _why_not_json(error) if isinstance(error, json.JSONDecodeError) else str(error)
            first = first or f"line {number} is not JSON ({why})"
            wrong.append(ValueError(f"is not JSON (line {number}: {why})"))
            if has_value:
                yield wrong.pop()
        else:
            yield from wrong
            wrong, has_value = [], True
            yield value
    if wrong:
        raise MedR1Error(f"{path}: {first}, nor is any other line; repair the file")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file: not as splitlines has them, for JSON may hold U+2028."""
    try:
        with path.open(encoding=_encoding(path)) as file:
            yield from file
    except UnicodeDecodeError:
        read_text(path)  # raises, and counts the bytes from the beginning of the file
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _why_not_json(error: json.JSONDecodeError) -> str:
    """The parser's complaint, or what people do who get it."""
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    at = f"column {error.colno}"
    if error.msg == "Extra data" and rest.startswith(","):
        return f"a comma follows the object, {at}: take it away, a line holds one object alone"
    if (rest[:1] in ("]", "}") and before.endswith(",")) or "trailing comma" in error.msg:
        return f"a comma stands before a closing bracket, {at}: take it away"
    if rest.startswith("'"):
        return f"single quotes, {at}: JSON has double ones; write it with json.dumps, not str"
    if re.match(r"(True|False|None)\b", rest):
        return f"{rest[:5].strip(' ,]}')} is Python's, {at}: write it with json.dumps, not str"
    return f"{error.msg}, {at}"


def _refuse_packed(path: Path) -> None:
    """Raise MedR1Error for a file without content, and for a packed one, whatever its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not head:
        raise MedR1Error(f"{path}: the file is empty; fetch it again")
    if head.startswith(b"\x1f\x8b"):
        raise MedR1Error(f"{path}: is packed by gzip; unpack it first")
    if head == b"PK\3\4":
        raise MedR1Error(f"{path}: is a zip archive or a spreadsheet; unpack it, or save the sheet as CSV (UTF-8)")


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _no_text(path: Path) -> MedR1Error:
    return MedR1Error(f"{path}: holds NUL bytes, so it is no text, or UTF-16 without a mark; save it as UTF-8")


def _header(path: Path) -> tuple[list[str], str]:
    """Column names and delimiter of a CSV file: a tab in .tsv, else what divides the first line into most columns.

    Spreadsheets write semicolons where the comma is the decimal sign.
    """
    with _opened(path) as file:
        try:
            line = file.readline()
            headers = {sign: next(csv.reader([line], delimiter=sign), []) for sign in ",;\t"}
        except (UnicodeError, csv.Error) as error:
            raise _bad_csv(path, "its first line", error) from error
    if "\0" in line:
        raise _no_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(headers, key=lambda sign: len(headers[sign]))
    header = headers[delimiter]
    names = [column(name) for name in header]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise MedR1Error(f"{path}: two columns are named {repeated[0]!r}; rename one")
    return header, delimiter


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, str] | ValueError]:
    csv.field_size_limit(MAX_CELL)
    with _opened(path) as file:
        # Strict: a quotation mark that is never closed would swallow the rest of the file without a word.
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        number = 1  # of the row that is being read
        try:
            for row in reader:
                number += 1
                if None in row:
                    yield ValueError("has more cells than there are columns; quote the text that holds the delimiter")
                else:
                    yield row
        except (UnicodeError, csv.Error) as error:
            raise _bad_csv(path, f"row {number}", error) from error


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding=_encoding(path), newline="")
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _bad_csv(path: Path, place: str, error: Exception) -> MedR1Error:
    if isinstance(error, UnicodeError):
        return MedR1Error(f"{path}: not UTF-8 text, near {place}; save it as UTF-8 (spreadsheets: CSV UTF-8)")
    return MedR1Error(f"{path}: {place} is no CSV ({error}); close its quotation marks, double those in texts")


def _parquet_table(path: Path) -> Table:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MedR1Error(f"{path}: a Parquet file needs pyarrow; pip install 'medr1[hub]'") from error
    try:
        file = parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise MedR1Error(f"{path}: cannot be read as Parquet ({error}); fetch it again") from error

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for batch in file.iter_batches(batch_size=64):  # rows hold images
                yield from batch.to_pylist()
        except (OSError, arrow.ArrowException) as error:
            raise MedR1Error(f"{path}: cannot be read as Parquet ({error}); fetch it again") from error

    return Table(str(path), path.stem, frozenset(map(column, file.schema_arrow.names)), rows())
