"""What a model's name stands for: runs, folders of a hub repository with a revision, and names that are nothing."""

import json
import shutil
from pathlib import Path

import pytest

from medr1.config import RECIPE, Config, recipe_of, to_toml
from medr1.errors import MedR1Error
from medr1.policy import names
from medr1.policy.names import PROCESSOR, TINY, check_name, find_model
from medr1.policy.vlm import load_vlm
from medr1.processes import tell_once

WEIGHTS = ("config.json", "generation_config.json", "model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in of the hub's cache: one repository with a checkpoint in a folder, saved without its processor."""
    commit = "0" * 40
    repository = tmp_path / "models--acme--Med-R1"
    snapshot = repository / "snapshots" / commit
    (snapshot / "CT").mkdir(parents=True)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(commit)
    for file in TINY.iterdir():
        if file.name in WEIGHTS:
            shutil.copy(file, snapshot / "CT" / file.name)
        elif file.name in PROCESSOR:
            shutil.copy(file, snapshot / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


@pytest.mark.parametrize("name", ["acme/Med-R1/CT", "acme/Med-R1/CT@v1"])
def test_a_folder_of_a_repository(hub: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tell_once.cache_clear()
    place = find_model(name)
    assert (place.weights, place.processor) == (hub / "CT", hub)
    assert (
        "holds no image processor and no tokenizer; taking the processor of its repository" in capsys.readouterr().err
    )
    vlm = load_vlm(name)
    assert vlm.name == name and vlm.processor.image_processor is not None


def test_a_processor_of_the_base(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = hub.parents[2] / "models--acme--base"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(hub.name)
    (base / "snapshots" / hub.name).mkdir(parents=True)
    for file in [path for path in hub.iterdir() if path.is_file()]:
        file.rename(base / "snapshots" / hub.name / file.name)
    config = json.loads((hub / "CT" / "config.json").read_text())
    (hub / "CT" / "config.json").write_text(json.dumps(config | {"_name_or_path": "acme/base"}))
    tell_once.cache_clear()
    assert find_model("acme/Med-R1/CT").processor == base / "snapshots" / hub.name
    assert "acme/base" in capsys.readouterr().err


def test_a_folder_of_this_machine_without_a_processor(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As checkpoints are published: the configuration names a folder of the machine that trained, or nothing."""
    copied = tmp_path / "downloads" / "CT"
    shutil.copytree(hub / "CT", copied)
    tell_once.cache_clear()
    assert find_model(str(copied)).processor == copied, "nothing is known"
    config = json.loads((copied / "config.json").read_text())
    for base, processor in {
        "tiny": TINY,
        str(TINY): TINY,
        "acme/Med-R1": hub,
        "/data/someone/models/Qwen2-VL-2B-Instruct": "Qwen/Qwen2-VL-2B-Instruct",
    }.items():
        (copied / "config.json").write_text(json.dumps(config | {"_name_or_path": base}))
        if isinstance(processor, Path):
            assert find_model(str(copied)).processor == processor
            assert f"taking the processor of {base}, its base model" in capsys.readouterr().err
        else:
            with pytest.raises(MedR1Error, match=f"{processor}: no local folder, not downloaded before"):
                find_model(str(copied))
    shutil.copy(TINY / "tokenizer.json", copied)
    (copied / "config.json").write_text(json.dumps(config | {"_name_or_path": "tiny"}))
    assert find_model(str(copied)).processor == TINY
    assert "holds no image processor; taking" in capsys.readouterr().err
    for file in PROCESSOR:
        if (TINY / file).is_file():
            shutil.copy(TINY / file, copied.parent)
    assert find_model(str(copied)).processor == copied.parent
    assert f"taking the processor of {copied.parent}" in capsys.readouterr().err


def test_a_repository_without_a_model_at_its_root_names_its_folders(hub: Path) -> None:
    with pytest.raises(MedR1Error, match=r"acme/Med-R1: no config\.json there; it has CT; name a folder"):
        find_model("acme/Med-R1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinyy", r"did you mean tiny\?"),
        ("Tiny", r"did you mean tiny\?"),
        ("./nowhere", "no such folder"),
        ("a b/c", "no such folder"),
        ("~/nowhere-at-all", "no such folder"),
    ],
)
def test_what_can_be_no_name_is_told_without_asking_the_hub(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_on_hub", None)
    with pytest.raises(MedR1Error, match=message) as error:
        find_model(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["acme/other", "acme/Med-R1/CT@v2"])
def test_offline_and_not_downloaded_is_one_line_with_the_remedy(hub: Path, name: str) -> None:
    with pytest.raises(MedR1Error, match=r"HF_HUB_OFFLINE is set\. .*pass the folder, or set HF_HOME") as error:
        find_model(name)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_not_reached_is_asked_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(self: object, repository: str, **settings: object) -> None:
        asked.append(settings["timeout"])
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    assert find_model("acme/Med-R1/CT").weights == hub / "CT", "what was downloaded before is used"
    with pytest.raises(MedR1Error, match="acme/other: no local folder, not downloaded before, and the model hub"):
        find_model("acme/other")
    assert asked == [names.PATIENCE] * 2


def test_a_run_stands_for_its_model_or_its_newest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / RECIPE).write_text(to_toml(Config()))
    with pytest.raises(MedR1Error, match="a run without a model or a checkpoint yet"):
        check_name(str(run))
    for folder in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.saving", "checkpoint-12"):
        (run / folder).mkdir()
        if folder != "checkpoint-12":  # torn
            (run / folder / "config.json").write_text("{}")
    assert check_name(str(run)) == run / "checkpoint-10"
    assert "newest checkpoint" in capsys.readouterr().err
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    (run / "result.json").write_text("{}")
    assert check_name(str(run)) == run / "model"
    (run / "result.json").unlink()  # more steps were asked for, and the model is the one of the old end
    assert check_name(str(run)) == run / "checkpoint-10"
    (run / "result.json").write_text("{}")
    assert recipe_of(str(run)) == recipe_of(str(run / "model")) == recipe_of(str(run / "checkpoint-9")) == Config()


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(MedR1Error, match=r"holds no config\.json"):
        check_name(str(tmp_path))
