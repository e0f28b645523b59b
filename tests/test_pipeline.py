"""One recipe from beginning to end, gone on with and made longer."""

from pathlib import Path

from typer.testing import CliRunner

from medr1.cli import app
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl


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
