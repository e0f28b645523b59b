"""What trackers hold after a short run, read back from their own files."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest
from test_training import LETTERS, make_trainer, recipe

from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.errors import MedR1Error
from medr1.training.trackers import _as_text, check_trackers


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run goes; trackers that write to the working folder write beside it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def train(run: Path, tracker: str, **overrides: object) -> list[dict]:
    """Four steps, completions after the first and the third; the log's lines."""
    phantoms = write_phantoms(run.parent / "phantoms", num_images=24, seed=1)
    settings = {"log.trackers": [tracker], "log.completions_every": 3} | overrides
    make_trainer(recipe(phantoms, **LETTERS, **settings), run).run()
    return read_jsonl(run / "log.jsonl")


def test_tensorboard(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    log = train(run, "tensorboard")
    folder = run / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    for name in ("reward", "reward_test_training:letters_reward", "kl", "loss"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([row[name] for row in log if name in row], abs=1e-6), name
    images = events.Images("completions/0")
    assert [event.step for event in images] == [1, 3]
    rows = read_jsonl(run / "completions.jsonl")
    first = [row for row in rows if row["step"] == 1]
    text = make_ndarray(events.Tensors("completions/0/text_summary")[0].tensor_proto)[0].decode()
    assert text.startswith(f"{first[0]['id']}, right answer {first[0]['answer']}\n\n    ")
    assert text.count("reward ") == 3 and f"reward {first[2]['reward']:g}, advantage" in text


def test_a_reply_without_a_reward_is_shown(run: Path) -> None:
    row = {"id": "r", "answer": "A", "question": "Which?", "reply": "B", "reward": None, "advantage": 0.0}
    text = _as_text([row, row | {"reward": 1.0, "advantage": 0.5}])
    assert "no reward, advantage 0\n\n    B" in text and "reward 1, advantage 0.5" in text


def test_wandb_offline(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(run.parent))
    train(run, "wandb")
    wandb.finish()
    media = next((run.parent / "wandb").glob("offline-run-*")) / "files" / "media" / "table"
    tables = sorted(media.glob("completions_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == [
        "image",
        "id",
        "question",
        "answer",
        "reply",
        "outcome",
        "letter",
        "reward",
        "advantage",
    ]
    rows = [row for row in read_jsonl(run / "completions.jsonl") if row["step"] in (1, 3)]
    sent = [row for file in tables for row in json.loads(file.read_text())["data"]]
    assert sorted((row[1], row[4]) for row in sent) == sorted((row["id"], row["reply"]) for row in rows)
    staged = [path.read_bytes() for path in (run.parent / "artifacts" / "staging").iterdir()]  # what a sync will send
    assert sum(content.startswith(b"\x89PNG") for content in staged) == len({(row["step"], row["id"]) for row in rows})


def test_mlflow_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (run.parent / "mlruns").as_uri())
    mlflow.set_tracking_uri((run.parent / "mlruns").as_uri())
    train(run, "mlflow")
    assert next((run.parent / "mlruns").rglob("metrics/reward"))
    steps = {path.stem: json.loads(path.read_text()) for path in (run.parent / "mlruns").rglob("completions/*.json")}
    assert sorted(steps) == ["step-1", "step-3"]
    rows = [row for row in read_jsonl(run / "completions.jsonl") if row["step"] == 1]
    assert [row["reply"] for row in steps["step-1"]["completions"]] == [row["reply"] for row in rows]
    assert len(list((run.parent / "mlruns").rglob("completions/step-1-*.png"))) == len({row["id"] for row in rows})


def test_trackio(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    folder = run.parent / "trackio"
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        for name, path in (("TRACKIO_DIR", folder), ("MEDIA_DIR", folder / "media")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, path)
    log = train(run, "trackio")
    with sqlite3.connect(next(folder.glob("*.db"))) as database:
        sent = [json.loads(line) for (line,) in database.execute("select metrics from metrics order by id")]
    assert [row["train/reward"] for row in sent if "train/reward" in row] == [
        row["reward"] for row in log if "reward" in row
    ]
    tables = [row["completions"]["_value"] for row in sent if "completions" in row]
    rows = [row for row in read_jsonl(run / "completions.jsonl") if row["step"] in (1, 3)]
    assert [line["reply"] for table in tables for line in table] == [row["reply"] for row in rows]
    assert (folder / "media" / tables[0][0]["image"]["file_path"]).is_file()


def test_supervised_runs_send_numbers(run: Path) -> None:
    pytest.importorskip("tensorboard")
    train(run, "tensorboard", method="sft", **{"rollout.mode": "no-think"})
    assert list((run / "tensorboard").rglob("events.*"))


def test_what_is_missing_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    with pytest.raises(MedR1Error, match=r"log.trackers: visdom is not known; choose tensorboard, wandb, mlflow"):
        check_trackers(["visdom"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MedR1Error, match="mlflow is not installed; pip install mlflow, or leave it out"):
        check_trackers(["mlflow"])


def test_wandb_without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(MedR1Error, match="wandb has no login; run `wandb login`, or set WANDB_MODE=offline"):
        check_trackers(["wandb"])
