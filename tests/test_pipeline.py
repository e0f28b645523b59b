"""One recipe from beginning to end, gone on with and made longer."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from medr1.cli import app
from medr1.config import Config, to_toml
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl, write_atomic, write_jsonl
from medr1.errors import MedR1Error
from medr1.study.pipeline import _add_seconds, completed
from medr1.training.folder import finished


def test_a_longer_run_is_asked_again_and_its_base_is_not(tmp_path: Path) -> None:
    phantoms, out = write_phantoms(tmp_path / "phantoms", num_images=24, seed=1), tmp_path / "all"
    said = ["run", "--model", "tiny", "--data", str(phantoms), "--limit", "4", "--out", str(out)]
    small = ("rollout.mode=no-think", "rollout.max_new_tokens=8", "optimizer.prompts_per_step=2")
    said += [word for setting in (*small, "optimizer.learning_rate=1e-3") for word in ("--set", setting)] + ["--steps"]

    def weights(name: str) -> set[str]:
        return {row["weights"] for row in read_jsonl(out / name)}

    of_trained = ("trained.jsonl", "blank.jsonl")
    first = CliRunner().invoke(app, [*said, "1"])
    assert first.exit_code == 0, first.output
    base, before = (out / "base.jsonl").read_bytes(), weights("trained.jsonl")
    refused = CliRunner().invoke(app, [*said, "2"])
    assert refused.exit_code == 1 and "Add --extend to go on all the same" in str(refused.exception)
    longer = CliRunner().invoke(app, [*said, "2", "--extend"])
    assert longer.exit_code == 0, longer.exception
    after = weights("trained.jsonl")
    assert len(after) == 1 and after != before and all(weights(name) == after for name in of_trained)
    assert (out / "base.jsonl").read_bytes() == base and len(read_jsonl(out / "trained.jsonl")) == 4

    answers = {name: (out / name).read_bytes() for name in of_trained}
    (out / "result.json").unlink()  # as of a run that was stopped before its report
    assert CliRunner().invoke(app, [*said, "2"]).exit_code == 0
    assert {name: (out / name).read_bytes() for name in of_trained} == answers, "what is the model's own stays"


def test_a_damaged_file_of_its_own_is_named_with_the_remedy(tmp_path: Path) -> None:
    """By a copy that broke off, or a failing disk: a traceback stood there, and of seconds.json after all was done."""
    config, run = Config(), tmp_path / "train"
    (run / "model").mkdir(parents=True)
    write_atomic(run / "recipe.toml", to_toml(config))
    for damaged in (b"", b'{"recipe": "', b"\0\0\0", b"\xff"):
        for name in ("result.json", "seconds.json", "train/result.json"):
            (tmp_path / name).write_bytes(damaged)
        line = "json: is damaged; restore it, or delete it and run the same command again"
        for read in (
            lambda: completed(config, tmp_path),
            lambda: _add_seconds(tmp_path / "seconds.json", 1.0),
            lambda: finished(config, run),
        ):
            with pytest.raises(MedR1Error, match=line):
                read()
    write_atomic(run / "result.json", '{"steps": 3}')
    for rows in ([], [{"step": 1, "loss": 0.5}]):
        write_jsonl(run / "log.jsonl", rows)
        with pytest.raises(MedR1Error, match=r"log\.jsonl: ends before the run did; restore it"):
            finished(config, run)


def test_what_the_accuracies_are_of_is_counted_and_the_rest_beside(tmp_path: Path) -> None:
    phantoms = write_phantoms(tmp_path / "phantoms", num_images=24, seed=1)
    records = [record.model_dump(mode="json") for record in load_records(phantoms)]
    opened = {id(record) for record in records[::3]}
    unstated = {id(record) for record in records[1::3]}
    for record in records:
        record["images"] = [str(Path(image).relative_to(tmp_path)) for image in record["images"]]
        if id(record) in opened:
            record |= {"answer": record["options"]["ABCD".index(record["answer"])], "options": []}
        elif id(record) in unstated:
            record["modality"] = None
    broken = {record["images"][0] for record in records[::20]}
    for image in broken:
        (tmp_path / image).write_bytes(image.encode())  # equal bytes would be one group
    write_jsonl(tmp_path / "mixed.jsonl", records)
    said = ["run", "--model", "tiny", "--data", str(tmp_path / "mixed.jsonl"), "--limit", "18", "--steps", "1"]
    small = ("rollout.mode=no-think", "rollout.max_new_tokens=4", "optimizer.prompts_per_step=2")
    for setting in (*small, "data.skip_unreadable=true"):
        said += ["--set", setting]
    ended = CliRunner().invoke(app, [*said, "--out", str(tmp_path / "all")])
    assert ended.exit_code == 0, ended.exception
    rows = read_jsonl(tmp_path / "all" / "trained.jsonl")
    skipped = read_jsonl(tmp_path / "all" / "base.skipped.jsonl")
    assert skipped and {str(Path(row["image"]).relative_to(tmp_path)) for row in skipped} <= broken
    assert not {row["id"] for row in rows} & {row["id"] for row in skipped}
    counted = sum("token_f1" not in row and row["modality"] is not None for row in rows)
    assert 0 < counted < len(rows) == 18
    assert f"accuracy on {counted} held-out questions" in ended.stdout
    assert f"{18 - counted} more held-out questions, open or of no stated modality, are counted apart" in ended.stdout
