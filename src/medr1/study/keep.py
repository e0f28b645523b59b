"""Finished cells kept without weights, one small file each, so that a study goes on in another folder or machine.

    medr1 study FILE --data DATA --out runs/study --keep results/study

    KEEP/study.json            the study, and digests of its data and of the weights of its base
    KEEP/cells/CELL.json.gz    seconds; log (rows) and faithfulness (numbers), null where there is none; evaluations:
                               condition to {column: values}, sorted by id

Rows are kept as columns, without what the data set has of a question, so that a reply takes under twenty bytes. What is
taken up gives the rows back as they were, but for their keys, which only an evaluation that goes on needs.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medr1.data.records import Record, read_jsonl, to_json, write_atomic
from medr1.errors import MedR1Error
from medr1.evaluation.rows import Row
from medr1.evaluation.run import record_fields
from medr1.trust.faithfulness import read_faithfulness

LEFT_OUT = ("key", "seconds", "source", "images", "question", "options", "chance")
"""Columns that the data set has, or nobody needs; those that tables are counted by stay."""


def kept_file(keep: Path, name: str) -> Path:
    """Where a cell is kept."""
    return keep / "cells" / f"{name}.json.gz"


def keep_cell(
    path: Path, *, seconds: float, evaluations: Mapping[str, Path], log: Path | None, faithfulness: Path | None
) -> None:
    """Write what is kept of a finished cell; equal cells give equal bytes.

    Args:
        evaluations: condition to its file of rows.
        log: of the training run.
        faithfulness: the folder of its numbers.

    Raises:
        MedR1Error: a file cannot be read or written.
    """
    content = {
        "seconds": seconds,
        "log": read_jsonl(log) if log else None,
        "faithfulness": read_faithfulness(faithfulness) if faithfulness else None,
        "evaluations": {condition: _columns(read_jsonl(file)) for condition, file in evaluations.items()},
    }
    write_atomic(path, gzip.compress(to_json(content, separators=(",", ":")).encode(), mtime=0))


def kept_cell(path: Path) -> dict[str, Any] | None:
    """What `keep_cell` wrote; None where there is none.

    Raises:
        MedR1Error: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        kept: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise MedR1Error(
            f"{path}: cannot be read as a kept cell; restore it, or delete it and train it again"
        ) from error
    return kept


def whole_rows(columns: Mapping[str, Sequence[Any]], shown: Sequence[Record], folder: Path) -> list[Row]:
    """Rows of one evaluation from their kept columns.

    Args:
        shown: the records as the condition asked them.
        folder: of the file of rows, which image paths start from.
    """
    by_id = {record.id: record for record in shown}
    kept = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [{"key": row["id"], **record_fields(by_id[row["id"]], folder), **row} for row in kept]


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    ordered = sorted(rows, key=lambda row: row["id"])
    return {name: [row[name] for row in ordered] for name in ordered[0] if name not in LEFT_OUT}
