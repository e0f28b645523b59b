"""Data sets of the Hugging Face hub, by `datasets`: `hub:flaviagiammarino/vqa-rad`, with a configuration
`hub:TsinghuaC3I/MedXpertQA#MM`. Each of its splits is a table.
"""

from collections.abc import Iterator
from typing import Any

from medr1.data.datasets.tables import Table, column
from medr1.errors import MedR1Error

PREFIX = "hub:"


def hub_tables(name: str) -> list[Table]:
    """The splits of "hub:OWNER/NAME" or "hub:OWNER/NAME#CONFIGURATION"; images as bytes, not decoded.

    Raises:
        MedR1Error: `datasets` is not installed, or the hub does not give this data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise MedR1Error(f"{name}: data of the hub needs datasets; pip install 'medr1[hub]'") from error
    repository, _, configuration = name.removeprefix(PREFIX).partition("#")
    try:
        splits = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # of the hub's client, of the builder, of pyarrow: there is no common one
        reason = str(error).strip().split("\n")[0]
        raise MedR1Error(
            f"{name}: the hub does not give this data set ({reason}); check its name, the network and its terms,"
            " or download it and give the folder"
        ) from error
    return [
        Table(f"{name} {split}", split, frozenset(map(column, data.column_names)), _rows(data))
        for split, data in splits.items()
    ]


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    for batch in data.with_format("arrow").iter(64):  # as stored: an image is its bytes
        yield from batch.to_pylist()
