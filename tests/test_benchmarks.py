"""The benchmark runs, and both of its sides do the same work; what it measures needs a quiet machine."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is a test dependency: pip install 'medr1[test]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench
from workload import Workload

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
