"""From a recipe's [data] section to training and held-out records: the one way in, for every command.

The split comes before the filters. So a model trained on one modality and an evaluation over all of them agree about
which images are held out.
"""

import os
import shutil
from pathlib import Path

from medr1.config import DataConfig
from medr1.datasets import load_records
from medr1.errors import MedR1Error
from medr1.phantoms import write_phantoms
from medr1.records import Record
from medr1.splits import split_by_group


def load_parts(config: DataConfig) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records), divided by group with the recipe's seed, then filtered.

    Raises:
        MedR1Error: bad data, or filters that leave a part empty.
    """
    path = phantom_folder(config.num_phantoms) if config.path == "phantoms" else Path(config.path)
    train, test = split_by_group(load_records(path), test_fraction=config.test_fraction, seed=config.split_seed)
    return _keep(train, config, "training"), _keep(test, config, "held-out")


def phantom_folder(num_images: int, seed: int = 0) -> Path:
    """Phantoms as an OmniMedVQA folder in the user's cache (MEDR1_CACHE moves it), drawn on first use."""
    cache = Path(os.environ.get("MEDR1_CACHE", Path.home() / ".cache" / "medr1"))
    folder = cache / f"phantoms-{num_images}-seed{seed}"
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


def _keep(records: list[Record], config: DataConfig, part: str) -> list[Record]:
    kept = [
        record
        for record in records
        if (not config.modalities or record.modality in config.modalities)
        and (not config.question_types or record.question_type in config.question_types)
        and (not config.sources or record.source in config.sources)
    ]
    if not kept:
        have = sorted({f"{record.modality} / {record.question_type}" for record in records})
        raise MedR1Error(f"{config.path}: no {part} record passes the filters; it has {'; '.join(have)}")
    return kept
