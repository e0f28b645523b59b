"""From a recipe's [data] section to training and held-out records: the one way in, for every command.

The split comes before the filters. So a model trained on one modality and an evaluation over all of them agree about
which images are held out.
"""

import os
import shutil
from pathlib import Path

from medr1.config import DataConfig
from medr1.datasets import load_records, require_images, select_records
from medr1.errors import MedR1Error
from medr1.phantoms import write_phantoms
from medr1.records import Record
from medr1.splits import split_by_group


def load_parts(config: DataConfig) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records), divided by group with the recipe's seed, then filtered.

    Raises:
        MedR1Error: bad data, or filters that leave a part empty.
    """
    root = Path(config.image_root) if config.image_root else None
    records = load_records(data_path(config), image_root=root, check_images=False)
    train, test = split_by_group(records, test_fraction=config.test_fraction, seed=config.split_seed)
    filters = {
        "modalities": config.modalities or None,
        "question_types": config.question_types or None,
        "sources": config.sources or None,
    }
    train, test = select_records(train, **filters), select_records(test, **filters)
    require_images([*train, *test])
    return train, test


def data_path(config: DataConfig) -> Path:
    """The file or folder of questions that a recipe names; phantoms are drawn on first use."""
    return phantom_folder(config.num_phantoms) if config.path == "phantoms" else Path(config.path)


def image_folder(config: DataConfig) -> Path:
    """The folder that the questions' image paths start from."""
    path = data_path(config)
    return Path(config.image_root) if config.image_root else path if path.is_dir() else path.parent


def phantom_folder(num_images: int, seed: int = 0) -> Path:
    """Phantoms as an OmniMedVQA folder in the user's cache (MEDR1_CACHE moves it), drawn on first use."""
    cache = Path(os.environ.get("MEDR1_CACHE", Path.home() / ".cache" / "medr1"))
    folder = cache / f"phantoms2-{num_images}-seed{seed}"  # the second layout of this folder: with regions.csv
    if not folder.is_dir():
        drawing = cache / f".{folder.name}.{os.getpid()}"
        try:
            write_phantoms(drawing, num_images=num_images, seed=seed)
            drawing.rename(folder)
        except OSError as error:
            shutil.rmtree(drawing, ignore_errors=True)
            if not folder.is_dir():  # another process may have drawn it meanwhile
                raise MedR1Error(
                    f"{folder}: cannot be written ({error.strerror}); free space or set MEDR1_CACHE"
                ) from error
    return folder
