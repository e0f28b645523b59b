"""From a recipe's [data] section to training and held-out records: the one way in, for every command.

The split comes before the filters. So a model trained on one modality and an evaluation over all of them agree about
which images are held out.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import track

from medr1.config import EXPORTED, DataConfig, recipe_of
from medr1.data.cache import cache_folder
from medr1.data.datasets import load_records, num_refused, require_images, select_records
from medr1.data.heldout import RunSplit
from medr1.data.images import load_image
from medr1.data.kept import in_order, taken
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, write_jsonl
from medr1.data.splits import divided, joined
from medr1.errors import MedR1Error
from medr1.processes import is_first, tell, tell_once


def load_parts(config: DataConfig, run: RunSplit | None = None) -> tuple[Sequence[Record], Sequence[Record]]:
    """(training records, held-out records), divided by group with the recipe's seed, then filtered.

    For `validation` the training part of that division is divided once more, and the rest left out.

    Rows that could not be read are left out, and told on stderr. `group` names the whole cluster of each record.

    Args:
        run: whose model is to be asked. Where it knows some of the records, its list rules: what it trained on is in
            the training part, what it held out in the other, and only what it never saw is divided, as it would have.

    Raises:
        MedR1Error: bad data, or filters that leave a part empty.
    """
    root = Path(config.image_root) if config.image_root else None
    refused: list[str] = []
    records = load_records(
        data_path(config), image_root=root, check_images=False, language=config.language, refused=refused
    )
    tell_refused(config.path, len(records), tuple(refused))
    records = joined(records)
    if config.validation:
        records, _, _ = divided(records, config.test_fraction, config.split_seed)
    train, test = _divided(records, config, run)
    filters = {
        "modalities": config.modalities or None,
        "question_types": config.question_types or None,
        "sources": config.sources or None,
    }
    train, test = select_records(train, **filters), select_records(test, **filters)
    if not config.skip_unreadable:
        require_images(chain(train, test))
    return train, test


def _divided(
    records: Sequence[Record], config: DataConfig, run: RunSplit | None
) -> tuple[Sequence[Record], Sequence[Record]]:
    seen = run.seen(records) if run else []
    if run is None or all(one == "never seen" for one in seen):
        train, test, note = divided(records, config.test_fraction, config.split_seed + config.validation)
        if note:
            tell_once(note, "yellow")
        return train, test
    _, test, _ = divided(records, run.data.test_fraction, run.data.split_seed + config.validation)
    held_out = {record.id for record in test}
    sides: tuple[list[int], list[int]] = ([], [])
    for place in in_order(records, lambda record: record.id):
        one = seen[place]
        sides[one == "held out" or (one == "never seen" and records[place].id in held_out)].append(place)
    return taken(records, sides[0]), taken(records, sides[1])


def split_of_run(model: str, path: str) -> dict[str, Any]:
    """Settings of the data that a model was trained with, to ask it about images that it was not trained on.

    Empty unless the model lies in the folder of a run, beside its recipe; of other data than that run's, the language
    alone.

    Raises:
        MedR1Error: the recipe is damaged.
    """
    recipe = recipe_of(model)
    if recipe is None:
        return {}
    trained, kept = recipe.data, ["language"]
    if trained.path == path or (Path(path).exists() and Path(trained.path).resolve() == Path(path).resolve()):
        kept += ["test_fraction", "split_seed", "validation", "image_root", "skip_unreadable"]
        kept += ["num_phantoms"] if path == "phantoms" else []
    return {f"data.{name}": getattr(trained, name) for name in kept}


def tell_older(model: str) -> None:
    """Say on stderr that there is no list of what a model's run held out: it is an export, or of an older version."""
    if (Path(model).expanduser() / EXPORTED).is_file():
        tell_once(
            f"{model}: is an export, which carries no list of what its run held out: some of these questions may have"
            " been trained on; evaluate the run's folder to leave them out",
            "yellow",
        )
    elif recipe_of(model) is not None:
        tell_once(
            f"{model}: its run left no list of what it held out (an older version made it), and the split is drawn"
            " otherwise now: some of these questions may have been trained on",
            "yellow",
        )


def data_path(config: DataConfig) -> Path:
    """The file or folder of questions that a recipe names; phantoms are drawn on first use."""
    return phantom_folder(config.num_phantoms) if config.path == "phantoms" else Path(config.path)


def image_folder(config: DataConfig) -> Path:
    """The folder that the questions' image paths start from."""
    path = data_path(config)
    return Path(config.image_root) if config.image_root else path if path.is_dir() else path.parent


def leave_out_unreadable(records: Sequence[Record], out: Path) -> Sequence[Record]:
    """The records all of whose images can be decoded; the others are counted on stderr and listed in a file.

    Every image is decoded once. The file lies beside `out`, the file or folder of the results: NAME.skipped.jsonl with
    id, image and reason of each record, for NAME or NAME.jsonl. It is there only if a record was left out.

    Raises:
        MedR1Error: nothing is left, or the list cannot be written.
    """
    problems: dict[Path, str | None] = {}
    skipped = []
    for record in track(records, "images", console=Console(stderr=True), disable=not is_first()):
        for image in record.images:
            if image not in problems:
                problems[image] = _problem(image)
            if reason := problems[image]:
                skipped.append({"id": record.id, "image": str(image), "reason": reason})
                break
    listing = skipped_list(out)
    left_out = {row["id"] for row in skipped}
    if is_first():
        if skipped:
            write_jsonl(listing, skipped)
            told = f"{len(skipped)} of {len(records)} records left out: an image cannot be read; see {listing}"
            tell(told, "yellow")
        else:
            listing.unlink(missing_ok=True)
    if len(left_out) == len(records):
        raise MedR1Error(f"{listing}: of all {len(records)} records an image cannot be read; mend the images")
    return taken(records, [place for place, record in enumerate(records) if record.id not in left_out])


def skipped_list(out: Path) -> Path:
    """The list of left-out records beside a file or folder of results."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.skipped.jsonl")


def _problem(image: Path) -> str | None:
    try:
        load_image(image)
    except MedR1Error as error:
        return str(error)
    return None


def tell_refused(path: str, num_records: int, refused: tuple[str, ...]) -> None:
    """Say on stderr, once, how much of a data set was left out."""
    if refused:
        lost = f"{num_refused(refused, num_records)} left out, first {refused[0]}"
        tell_once(f"{path}: {lost}; `medr1 data check {path}` lists them", "yellow")


def phantom_folder(num_images: int, seed: int = 0) -> Path:
    """Phantoms as an OmniMedVQA folder in the user's cache (MEDR1_CACHE moves it), drawn on first use."""
    cache = cache_folder()
    folder = cache / f"phantoms2-{num_images}-seed{seed}"  # the second layout of this folder: with regions.csv
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # A name of chance: process numbers are the same in many containers that share a cache.
            with TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as aside:
                write_phantoms(drawing := Path(aside) / folder.name, num_images=num_images, seed=seed)
                drawing.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # another process may have drawn it meanwhile
                raise MedR1Error(
                    f"{folder}: cannot be written ({error.strerror}); free space or set MEDR1_CACHE"
                ) from error
    return folder
