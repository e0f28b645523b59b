"""The benchmark runs, and both of its sides do the same work; what it measures needs a quiet machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is a test dependency: pip install 'medr1[test]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench
import gpu
import looking
from typer.testing import CliRunner
from workload import Workload

from medr1.data.phantoms import write_phantoms

SMALL = {"new_tokens": 3, "num_completions": 2, "num_prompts": 2, "pixels": 56, "short_prompt": True, "small": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overrides", [{}, {"beta": 0.0, "lora_rank": 2}, {"model": "tiny"}])
def test_a_comparison(overrides: dict[str, float]) -> None:
    """Equal prompts, weights and lengths are asserted inside."""
    result = bench.compare(Workload("test", **SMALL | overrides), rounds=1)
    parts = {"step", "rollout", "policy"} | ({"reference"} if overrides.get("beta", 0.04) else set())
    assert set(result["ratio"]) == parts
    for side in ("ours", "trl"):
        assert sum(result[side][part] for part in parts - {"step"}) < result[side]["step"], "parts of a step"
    assert result["step_ratios"] == [result["ratio"]["step"]]


@pytest.mark.filterwarnings("ignore")
def test_evaluation_answers_as_generate_does() -> None:
    assert bench.compare_evaluation(rounds=1, num_records=5, new_tokens=4, questions=2, small=True)["ratio"] > 0


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the base are trained and asked in this process, since a new one takes longer to start than it works."""
    apart = looking.job

    def job(compared: looking.Comparison, part: str, arm: str, seed: int) -> None:
        if arm == "base":
            return apart(compared, part, arm, seed)
        done = compared.folder(part, arm, seed) / "done"
        if not done.exists():
            done.parent.mkdir(parents=True)
            looking.ask(compared, part, arm, seed)
            done.touch()

    monkeypatch.setattr(looking, "job", job)


def test_a_comparison_of_looking_ends_with_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    monkeypatch.setattr(looking, "IMAGES", {"positions": 64, "texts": 64})
    asked = ["--steps", "1", "--seeds", "1", "--shortcut", "1", "--out", str(tmp_path / "out"), "--json"]
    asked += ["--processes", "1"]
    done = CliRunner().invoke(looking.app, asked)
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert (result["seeds"], result["shortcut"], result["steps"]) == ([0], 1.0, 1) and result["seconds"] > 0
    for arm in ("base", "accuracy", "looking"):
        assert set(result[arm]) == set(looking.MEASURES)
        for name, (mean, low, high) in result[arm].items():
            assert (-1 if name in looking.SIGNED else 0) <= low <= mean <= high <= 1
    again = json.loads(CliRunner().invoke(looking.app, asked).output.splitlines()[-1])
    assert {**again, "seconds": 0} == {**result, "seconds": 0}, "nothing is done twice"
    other = CliRunner().invoke(looking.app, [*asked, "--shortcut-in", "texts"])
    assert other.exit_code and "other settings" in " ".join(other.output.split())


def test_limits_over_seeds_and_groups() -> None:
    """Two seeds that agree keep the limits of groups; apart by 0.2 they add t(1) 0.1 = 1.27, more than a share has.
    Of two parts of equal size one adds half of its own 0.1, with t(2) = 4.30.
    """
    groups = {str(n): str(n) for n in range(100)}
    one = {name: float(int(name) < 50) for name in groups}
    mean, low, high = looking.cell([[one, one]], groups)
    assert mean == 0.5 and 0.38 < low < 0.42 and high == pytest.approx(1 - low)
    better = {name: float(int(name) < 70) for name in groups}
    assert looking.cell([[one, better]], groups) == [0.6, 0.0, 1.0]
    other = {f"{name} of another part": 0.5 for name in groups}
    alone = looking.cell([[one, better], [other, other]], groups | dict.fromkeys(other, "all"), (-1, 1), seeds=False)
    with_seeds = looking.cell([[one, better], [other, other]], groups | dict.fromkeys(other, "all"), (-1, 1))
    assert with_seeds[0] == alone[0] == 0.55
    assert (with_seeds[2] - 0.55) ** 2 == pytest.approx((alone[2] - 0.55) ** 2 + (4.303 * 0.05) ** 2, abs=2e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_comparison_on_a_data_set(tmp_path: Path, here: None) -> None:
    """Of any data: what most often is right in training takes the place of the shortcut that was planted."""
    write_phantoms(tmp_path / "data", num_images=64, seed=0)
    asked = ["--data", str(tmp_path / "data"), "--model", "tiny", "--parts", "MRI"]
    asked += ["--steps", "1", "--seeds", "1", "--processes", "1", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(looking.app, asked)
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert set(result["over_accuracy"]) == {"looking"} and result["parts"] == ["MRI"]
    for name, change in result["over_accuracy"]["looking"].items():
        looked, plain = (result[arm][name][0] for arm in ("looking", "accuracy"))
        assert change["questions"] > 0 and set(change["runs"]) == {"MRI"}
        assert change["with_seeds"][0] == pytest.approx(looked - plain, abs=2e-4)
    assert not list((tmp_path / "out").rglob("*.safetensors")), "weights are not kept"
    wrong = CliRunner().invoke(looking.app, [*asked[:4]])
    assert wrong.exit_code and "go together" in " ".join(wrong.output.split())


@pytest.mark.filterwarnings("ignore")
def test_questions_that_share_an_image() -> None:
    assert bench.compare_sharing(Workload("test", **SMALL | {"questions": 2}), rounds=1)["ratio"] > 0


@pytest.mark.filterwarnings("ignore")
def test_drafts_of_the_demo() -> None:
    """The same completions are asserted inside."""
    found = bench.compare_drafts(steps=2)
    assert found["that rounding turned"] == 0 and found["completions"] == 2 * 16 * 8
    assert found["start"]["calls"] > 1.2 and found["start"]["seconds"] > 0


def test_what_a_gpu_would_run(tmp_path: Path) -> None:
    """benchmarks/gpu.py with tiny models on the CPU, and without what a borrowed machine may not have."""
    absent = ("pydantic", "imagehash", "trl", "datasets")
    start = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent}))"
    start += f"; runpy.run_path({gpu.__file__!r}, run_name='__main__')"
    command = [sys.executable, "-c", start]
    command += ["--device", "cpu", "--tiny", "--minutes", "20", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["passed"] and last["card"] == "cpu", ran.stdout + ran.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert "left out" in found["TRL"] and found["equality"]["passed"] and found["flex_attention"]["passed"]
    plain, drafted = found["equality"]["calls, without and with drafts"]
    assert drafted < plain, "completions seen before take fewer calls"
    for name in (f"{gpu.SMALLER}, LoRA {gpu.LORA}", f"{gpu.LARGER}, LoRA {gpu.LORA}", f"{gpu.SMALLER}, full"):
        for size in ("56 px, G = 2", "84 px, G = 3"):
            assert found[name][size]["ours"].keys() >= {"step", "rollout", "reference", "policy", "planned"}
    assert found[f"{gpu.SMALLER}, LoRA {gpu.LORA}"]["56 px, G = 2"]["ratio"] > 0


@pytest.mark.filterwarnings("ignore")
def test_trl_beside_it() -> None:
    assert gpu.beside_trl(gpu.Machine("cpu", tiny=True, minutes=5))["step"] > 0


def test_no_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--minutes", "0", "--out", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["equality"]["left out"] == "no time left"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"]
