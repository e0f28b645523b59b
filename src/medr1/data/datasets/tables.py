"""Tables of questions as they lie on disk or on the hub: CSV, TSV, JSON, JSON lines, Parquet, all as dicts by row.

Column names are compared in lower case, a blank for an underscore ("Choice A", "option_a"). A row that cannot be read
is given as a `ValueError` in its place, so that it can be refused without its neighbours.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
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
    """Short name; ids of rows without an id of their own begin with it."""
    columns: frozenset[str]
    """Names as `column` gives them, of the first row where each row names its own."""
    rows: Iterable[Any]
    """A dict each, or a ValueError for one that cannot be read."""


def column(name: str) -> str:
    """A column's name as it is compared."""
    return re.sub(r"[\s_]+", " ", name.strip().casefold())


def by_column(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under the compared names of its columns, without cells that are empty or blank.

    Raises:
        ValueError: two columns have the same name.
    """
    named = {column(name): value for name, value in row.items()}
    if len(named) < len(row):
        raise ValueError(f"two of the columns {', '.join(row)} have the same name; rename one")
    return {
        name: value
        for name, value in named.items()
        if not (value is None or (isinstance(value, str) and value.strip() == ""))
    }


def read_table(path: Path) -> Table:
    """The table in a file of one of SUFFIXES. CSV and Parquet are read while the rows are gone through.

    Raises:
        MedR1Error: the file cannot be read or is not what its name says.
    """
    match path.suffix.lower():
        case ".csv" | ".tsv":
            header, delimiter = _header(path)
            return Table(str(path), path.stem, frozenset(map(column, header)), _csv_rows(path, delimiter))
        case ".parquet":
            return _parquet_table(path)
        case ".jsonl":
            rows = _json_lines(path)
        case _:
            rows = read_rows(path)
    first = next((row for row in rows if isinstance(row, dict)), {})
    return Table(str(path), path.stem, frozenset(map(column, first)), rows)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without a byte order mark.

    Raises:
        MedR1Error: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MedR1Error(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def read_rows(path: Path) -> list[Any]:
    """The list in a JSON file.

    Raises:
        MedR1Error: the file cannot be read, is not JSON (the line is named), or holds no list.
    """
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise MedR1Error(f"{path}: line {error.lineno} is not JSON ({error.msg}); repair the file") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists nested too deep
        raise MedR1Error(f"{path}: cannot be read as JSON ({error}); repair the file") from error
    if not isinstance(rows, list):
        raise MedR1Error(f"{path}: expected a list of questions, found a {type(rows).__name__}")
    return rows


def _json_lines(path: Path) -> list[Any]:
    rows: list[Any] = []
    for line in read_text(path).split("\n"):  # not splitlines: JSON may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                rows.append(ValueError(f"is not JSON ({error})"))
    return rows


def _header(path: Path) -> tuple[list[str], str]:
    """Column names and delimiter of a CSV file: a tab in .tsv, else what divides the first line into most columns.

    Spreadsheets write semicolons where the comma is the decimal sign.
    """
    with _opened(path) as file:
        try:
            line = file.readline()
            headers = {sign: next(csv.reader([line], delimiter=sign), []) for sign in ",;\t"}
        except (UnicodeDecodeError, csv.Error) as error:
            raise _bad_csv(path, "its first line", error) from error
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
        except (UnicodeDecodeError, csv.Error) as error:
            raise _bad_csv(path, f"row {number}", error) from error


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise MedR1Error(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _bad_csv(path: Path, place: str, error: Exception) -> MedR1Error:
    if isinstance(error, UnicodeDecodeError):
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
