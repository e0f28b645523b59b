"""The demonstration: the whole job on a fresh machine, in minutes on a CPU.

Draws phantoms, evaluates the tiny base on held-out ones, trains it with GRPO on the others, evaluates again with the
controls (blank image, another phantom's image, text alone), and writes a report. Every stage is a file in the output
folder and is not repeated by a second call.
"""

from pathlib import Path
from typing import Any

from medr1.config import Config, load_config
from medr1.study.pipeline import run_recipe


def demo_config(seed: int) -> Config:
    """The demo's recipe: what differs from the defaults, for a model of 2.5 million parameters."""
    return load_config(
        overrides={
            "model.name": "tiny",
            "data.path": "phantoms",
            "data.test_fraction": 0.1,
            "rollout.max_new_tokens": 64,
            "grpo.beta": 0.0,
            "optimizer.steps": 120,
            "optimizer.prompts_per_step": 16,
            "optimizer.learning_rate": 5e-5,
            "optimizer.schedule": "constant_with_warmup",
            "optimizer.warmup_steps": 5,
            "optimizer.seed": seed,
            "log.eval_every": 10,
            "log.eval_records": 160,
        }
    )


def run_demo(out: Path, *, seed: int) -> dict[str, Any]:
    """Run or go on with the demo in `out`; leaves out/report.html. One that is complete loads no model.

    Returns:
        base_macro, trained_macro, gain_points, chance, text_only, blank_image, shuffled_image (accuracies in [0, 1]
        averaged over eight modalities; gain in points), n, seconds (of all calls together), seeds, report, and what
        else `run_recipe` says.
    """
    result = run_recipe(demo_config(seed), out, forced=False)
    controls = {f"{name}_image": result.get(name) for name in ("blank", "shuffled")}  # None for one that was left out
    return {**result, **controls, "seeds": [seed]}
