"""One recipe from beginning to end, gone on with and made longer."""

from pathlib import Path

from typer.testing import CliRunner

from medr1.cli import app
from medr1.data.datasets import load_records
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl, write_jsonl


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
    write_jsonl(tmp_path / "mixed.jsonl", records)
    said = ["run", "--model", "tiny", "--data", str(tmp_path / "mixed.jsonl"), "--limit", "18", "--steps", "1"]
    for setting in ("rollout.mode=no-think", "rollout.max_new_tokens=4", "optimizer.prompts_per_step=2"):
        said += ["--set", setting]
    ended = CliRunner().invoke(app, [*said, "--out", str(tmp_path / "all")])
    assert ended.exit_code == 0, ended.exception
    rows = read_jsonl(tmp_path / "all" / "trained.jsonl")
    counted = sum("token_f1" not in row and row["modality"] is not None for row in rows)
    assert 0 < counted < len(rows) == 18
    assert f"accuracy on {counted} held-out questions" in ended.stdout
    assert f"{18 - counted} more held-out questions, open or of no stated modality, are counted apart" in ended.stdout
