"""What a model's name stands for: a folder on this machine, where its weights lie and where its processor.

    tiny                        the one in the package
    FOLDER                      a model, or a LoRA adapter that names its base
    RUN                         a run's folder: its model, or the newest whole checkpoint of an unfinished run
    OWNER/NAME                  a repository of the Hugging Face hub
    OWNER/NAME/FOLDER           a model in a folder of one, as several checkpoints in one repository are published
    …@REVISION                  a branch, tag or commit of it

The hub is asked once, for a few seconds, and what was downloaded before is used without it. No torch is needed here.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medr1.errors import MedR1Error
from medr1.processes import tell_once

TINY = Path(__file__).parents[1] / "bases" / "tiny" / "checkpoint"
"""The checkpoint that the package carries."""
PATIENCE = 10.0
"""Seconds in which the hub must answer."""
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files that a processor may consist of."""
PUBLISHERS = {"qwen": "Qwen", "gemma": "google", "internvl": "OpenGVLab", "llava": "llava-hf"}
"""Beginning of a model type to who publishes such models on the hub under the names that people keep for folders."""
WEIGHTS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
NO_SHIPPED_CODE = {"trust_remote_code": False}
"""For whatever transformers loads: it would ask on the terminal else, and a yes runs the code of a repository."""
OFFLINE = "On a machine without network: download it elsewhere and pass the folder, or set HF_HOME to a filled cache"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w./-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Place:
    """Where a model lies."""

    weights: Path
    """A folder with config.json, or of an adapter adapter_config.json."""
    processor: Path
    """A folder with the processor's files: the same one, or of a checkpoint saved without them the one that it lies in
    (of the hub its repository's root), or its base model."""


def find_model(name: str, *, weights: bool = True) -> Place:
    """The folders that a model's name stands for; says on stderr what the name left open.

    Args:
        weights: whether they are wanted; without them config.json alone comes from the hub.

    Raises:
        MedR1Error: nothing has this name here, or the hub does not give it; the line says what to do.
    """
    if found := check_name(name):
        return Place(found, _processor_beside(name, found, found.parent, str(found.parent)) if weights else found)
    return _on_hub(name, weights)


def check_name(name: str) -> Path | None:
    """The folder that a name stands for; None for a name of the hub, which is not asked.

    Raises:
        MedR1Error: nothing has this name here, and no model of the hub can have it.
    """
    if name == "tiny":
        if not TINY.is_dir():
            raise MedR1Error(
                "tiny: the package carries no checkpoint; reinstall medr1, or build it with medr1.bases.tiny"
            )
        return TINY
    folder = Path(name).expanduser()
    if folder.exists():
        return model_in(folder)
    if not _HUB.fullmatch(name):
        raise MedR1Error(f"{name}: no such folder, and a model of the hub is named OWNER/NAME{_meant(name)}")
    return None


def model_in(folder: Path) -> Path:
    """The model in a folder that exists: the folder itself, or of a run its model or its newest checkpoint.

    Raises:
        MedR1Error: there is none.
    """
    if _holds_model(folder):
        return folder
    from medr1.config import RECIPE  # needs pydantic, which a borrowed GPU may lack

    if not (folder / RECIPE).is_file():
        raise MedR1Error(f"{folder}: holds no config.json; give a model folder, a run's folder, a hub id or 'tiny'")
    kept = checkpoints(folder)
    # While a run is extended its model is still the one of its old end, and nothing says that it is complete.
    if _holds_model(folder / "model") and (not kept or (folder / "result.json").is_file()):
        tell_once(f"{folder}: a run; taking {folder / 'model'}", "dim")
        return folder / "model"
    if not kept:
        raise MedR1Error(f"{folder}: a run without a model or a checkpoint yet; let `medr1 train` go on first")
    newest = kept[-1]
    tell_once(f"{folder}: an unfinished run; taking its newest checkpoint, {newest}", "dim")
    return newest


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that hold a model, oldest first."""
    return sorted((place for place in run.glob("checkpoint-*") if _holds_model(place)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _meant(name: str) -> str:
    """A name that is there and is written nearly so."""
    from medr1.config import RECIPE

    here = [str(path.parent) for pattern in (f"*/{RECIPE}", f"*/*/{RECIPE}") for path in Path().glob(pattern)]
    near = difflib.get_close_matches(name, ["tiny", *here], n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; give a model folder, a run's folder, a hub id or 'tiny'"


def _on_hub(name: str, with_weights: bool) -> Place:
    path, _, revision = name.partition("@")
    owner, repository, *inside = path.strip("/").split("/")
    prefix = "".join(f"{part}/" for part in inside)
    settings: dict[str, Any] = {"repo_id": f"{owner}/{repository}", "revision": revision or None}
    patterns = [f"{prefix}{pattern}" for pattern in (WEIGHTS if with_weights else ("config.json",))]
    # Folders within are other models, or what an optimizer needs.
    root = _download(
        name,
        settings,
        [*patterns, *(PROCESSOR if with_weights else ())],
        [f"{prefix}*/*", "*/optimizer*"] if inside else ["*/*"],
    )
    weights = root.joinpath(*inside)
    if not _holds_model(weights):
        folders = sorted({place.parent.relative_to(root).as_posix() for place in root.glob("**/*config.json")} - {"."})
        near = f"; it has {', '.join(folders[:5])}" if folders else ""
        raise MedR1Error(f"{name}: no config.json there{near}; name a folder of the repository as OWNER/NAME/FOLDER")
    return Place(weights, _processor_beside(name, weights, root, "its repository") if with_weights else weights)


def _processor_beside(name: str, weights: Path, root: Path, roots_name: str) -> Path:
    """Where a checkpoint's processor lies: it was often saved without one."""
    if (weights / "adapter_config.json").is_file() or not (missing := _missing(weights)):
        return weights
    if root != weights and not _missing(root):
        tell_once(f"{name}: holds no {missing}; taking the processor of {roots_name}", "dim")
        return root
    base = _base_of(weights)
    if not base:
        return weights  # what is missing is told when it is read
    tell_once(f"{name}: holds no {missing}; taking the processor of {base}, its base model", "dim")
    return (
        found if (found := check_name(base)) else _download(base, {"repo_id": base, "revision": None}, [*PROCESSOR], [])
    )


def _missing(folder: Path) -> str:
    """What a processor lacks in a folder, in words; empty where nothing."""
    parts = {
        "image processor": ("preprocessor_config.json", "processor_config.json"),
        "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    }
    return " and no ".join(
        part for part, files in parts.items() if not any((folder / file).is_file() for file in files)
    )


def _base_of(weights: Path) -> str:
    """The model that a checkpoint's configuration says it came from; of a path on another machine the published one."""
    try:
        config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        base, family = str(config.get("_name_or_path") or ""), str(config.get("model_type"))
    except (OSError, ValueError, AttributeError):
        return ""
    if base == "tiny" or _HUB.fullmatch(base) or _holds_model(Path(base)):
        return base
    publisher = next((PUBLISHERS[start] for start in PUBLISHERS if family.startswith(start)), "")
    return f"{publisher}/{Path(base).name}" if base and publisher else ""


def _download(name: str, settings: dict[str, Any], patterns: list[str], ignored: list[str]) -> Path:
    """A repository's files in the local cache: fetched, or without network what is there.

    Raises:
        MedR1Error: it is not there; one line that says what to do.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    wanted: dict[str, Any] = {**settings, "allow_patterns": patterns, "ignore_patterns": ignored}
    offline = constants.is_offline_mode()
    try:
        if not offline:
            try:
                HfApi().model_info(settings["repo_id"], revision=settings["revision"], timeout=PATIENCE)
            except errors.HfHubHTTPError:
                raise
            except Exception:  # of whatever client the hub's library uses: there is no common one
                offline = True
                os.environ["HF_HUB_OFFLINE"] = "1"
        found = Path(snapshot_download(**wanted, local_files_only=offline))
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the model hub cannot be reached"
        raise MedR1Error(f"{name}: no local folder, not downloaded before, and {why}. {OFFLINE}") from error
    except errors.GatedRepoError as error:
        raise MedR1Error(
            f"{name}: asks for its terms to be accepted; do so on its page, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MedR1Error(f"{name}: the hub knows no revision {settings['revision']} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise MedR1Error(
            f"{name}: no local folder, and the hub knows no such model, or only to its members (`hf auth login`);"
            " check the name"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MedR1Error(f"{name}: the model hub did not give it ({reason}). {OFFLINE}") from error
    if offline and not constants.is_offline_mode():
        tell_once(f"{name}: the model hub cannot be reached; using what was downloaded before", "dim")
    return found
