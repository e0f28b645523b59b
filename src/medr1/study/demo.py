"""The demonstration: the whole job on a fresh machine, in minutes on a CPU.

Draws phantoms, evaluates the tiny base on held-out ones, trains it with GRPO on the others, evaluates again with the
controls (blank image, another phantom's image, text alone), and writes a report. Every stage is a file in the output
folder and is not repeated by a second call.
"""

import json
import time
from pathlib import Path
from typing import Any

from medr1.config import Config, load_config
from medr1.data.parts import load_parts
from medr1.data.records import write_atomic
from medr1.evaluation.controls import text_only_prior
from medr1.evaluation.metrics import summarise
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.report.run import report_from_files
from medr1.training.run import train

SECONDS = "seconds.json"


def demo_config(seed: int) -> Config:
    """The demo's recipe: what differs from the defaults, for a model of three million parameters."""
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
    """Run or go on with the demo in `out`; leaves out/report.html.

    Returns:
        base_macro, trained_macro, gain_points, chance, text_only, blank_image, shuffled_image (accuracies in [0, 1]
        averaged over eight modalities; gain in points), n, seconds (of all calls together), seeds, report.
    """
    began = time.perf_counter()
    config = demo_config(seed)
    out.mkdir(parents=True, exist_ok=True)
    train_records, test_records = load_parts(config.data)
    settings: dict[str, Any] = {
        "mode": config.rollout.mode,
        "max_new_tokens": config.rollout.max_new_tokens,
        "batch_size": 64,
    }
    base = evaluate(load_vlm("tiny"), test_records, out=out / "base.jsonl", **settings)
    trained_folder = out / "train" / "model"
    if not trained_folder.is_dir():
        train(config, out / "train")
    trained_vlm = load_vlm(str(trained_folder))
    answers = {
        name: evaluate(trained_vlm, test_records, out=out / f"{file}.jsonl", condition=name, **settings)
        for name, file in (("image", "trained"), ("blank", "blank"), ("shuffled", "shuffled"))
    }
    before, after = summarise(base), summarise(answers["image"])
    report_from_files(
        out / "base.jsonl",
        out / "trained.jsonl",
        run=out / "train",
        controls=[f"{name}={out / f'{name}.jsonl'}" for name in ("blank", "shuffled")],
        text_only=text_only_prior(train_records, test_records),
        out=out / "report.html",
    )
    result = {
        "base_macro": before["macro"]["accuracy"],
        "trained_macro": after["macro"]["accuracy"],
        "gain_points": 100 * (after["macro"]["accuracy"] - before["macro"]["accuracy"]),
        "chance": after["macro"]["chance"],
        "text_only": text_only_prior(train_records, test_records)["macro"]["accuracy"],
        "blank_image": summarise(answers["blank"])["macro"]["accuracy"],
        "shuffled_image": summarise(answers["shuffled"])["macro"]["accuracy"],
        "n": after["n"],
        "seconds": _add_seconds(out / SECONDS, time.perf_counter() - began),
        "seeds": [seed],
        "report": str(out / "report.html"),
    }
    return result


def _add_seconds(path: Path, seconds: float) -> float:
    """Seconds of this call and of those that it went on from."""
    earlier = json.loads(path.read_text()) if path.exists() else 0.0
    write_atomic(path, json.dumps(earlier + seconds))
    return round(earlier + seconds, 1)
