"""Kill -9 at random moments: do training and evaluation end as if nothing had happened?

    python benchmarks/kills.py            # minutes on two cores; writes kills.json

Training: full fine-tuning, LoRA, a frozen vision tower (GRPO) and SFT, five runs each. A run is killed up to three
times at moments drawn over the time of a run that was left alone, taken up each time by the same call, and in the end
compared with that one: every weight bit by bit, every log line but its times, every completion, every answer of the
evaluations within. Evaluation: replies, options weighed, votes and shuffled images, three each, killed in the same way.

Processes are forked from one that has imported everything, so that a kill falls into the work and not into imports.
The last line of stdout is one JSON object; the exit status is 1 where anything differs.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from safetensors.torch import load_file

from medr1.config import Config, load_config
from medr1.data.parts import load_parts
from medr1.data.phantoms import write_phantoms
from medr1.data.records import read_jsonl
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import load_vlm
from medr1.training.run import train

TRAINING: dict[str, dict[str, Any]] = {
    "full": {"grpo.beta": 0.04},
    "lora": {"model.lora_rank": 4, "optimizer.learning_rate": 1e-3, "grpo.num_iterations": 2},
    "frozen tower": {"model.train_vision": False, "grpo.beta": 0.0},
    "sft": {"method": "sft"},
}
RUNS_EACH = 5
EVALUATION: dict[str, dict[str, Any]] = {
    "replies": {},
    "options weighed": {"scoring": "options"},
    "votes": {"scoring": "votes", "num_samples": 3},
    "shuffled images": {"condition": "shuffled"},
}
EVALUATIONS_EACH = 3
MAX_KILLS = 3
SAID = Path(tempfile.gettempdir()) / f"medr1-kills-{os.getpid()}.log"
"""What the last process said."""
TIMES = re.compile("second|runtime|flos|total_flos")


def recipe(data: Path, kind: str) -> Config:
    return load_config(
        overrides={
            "model.name": "tiny",
            "data.path": str(data),
            "rollout.mode": "no-think",
            "rollout.num_completions": 4,
            "rollout.max_new_tokens": 6,
            "optimizer.steps": 6,
            "optimizer.prompts_per_step": 2,
            "optimizer.learning_rate": 1e-4,
            "log.save_every": 2,
            "log.eval_every": 3,
            "log.eval_records": 4,
        }
        | TRAINING[kind]
    )


def silently(work: Callable[[], object]) -> None:
    """What a process does that may be killed."""
    said = os.open(SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    work()


def once(work: Callable[[], object], kill_after: float | None = None) -> tuple[bool, float]:
    """Run `work` in a process, killed after so many seconds; whether it was, and how long it ran."""
    process = multiprocessing.get_context("fork").Process(target=silently, args=(work,))
    began = time.monotonic()
    process.start()
    process.join(kill_after)
    killed = process.is_alive()
    if killed:
        process.kill()
        process.join()
    elif process.exitcode != 0:
        raise SystemExit(f"a run ended with status {process.exitcode}:\n{SAID.read_text()[-2000:]}")
    return killed, time.monotonic() - began


def killed_run(work: Callable[[], object], out: Path, seconds: float, draw: random.Random) -> list[dict[str, Any]]:
    """Kill `work` at random moments of what it should take, until it ends; the kills, at least one."""
    for attempt in range(10):
        kills: list[dict[str, Any]] = []
        for _ in range(draw.randint(1, MAX_KILLS)):
            moment = draw.uniform(0.02, 0.98) * seconds / (1 + attempt)
            killed, _ = once(work, moment)
            if not killed:
                break
            there = sorted(path.name for path in out.glob("*")) if out.is_dir() else []
            kills.append({"after_seconds": round(moment, 2), "found": [name for name in there if "eval" not in name]})
        once(work)
        if kills:
            return kills
        shutil.rmtree(out, ignore_errors=True)  # it was faster than the run that was left alone: earlier, then
    raise SystemExit("no kill fell into a run")


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not TIMES.search(name)} for row in read_jsonl(path)]


def differences(expected: Path, run: Path) -> list[str]:
    """What differs between two runs' folders."""
    found = []
    files = [{path.name for path in folder.glob("*.jsonl")} for folder in (expected, run)]
    if files[0] != files[1]:
        found.append(f"files {sorted(files[0] ^ files[1])}")
    for name in sorted(files[0] & files[1]):
        one, two = timeless(expected / name), timeless(run / name)
        if one != two:
            rows = [pair for pair in itertools.zip_longest(one, two) if pair[0] != pair[1]]
            found.append(f"{name}: {len(rows)} rows, such as {rows[0]}")
    for path in sorted((expected / "model").glob("*.safetensors")):
        weights, others = load_file(path), load_file(run / "model" / path.name)
        if weights.keys() != others.keys() or not all(torch.equal(weights[name], others[name]) for name in weights):
            found.append(f"model/{path.name}")
    leftovers = [path.name for path in run.iterdir() if path.name.startswith(".")]
    return found + leftovers


def train_all(folder: Path, data: Path, draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for kind in TRAINING:
        config = recipe(data, kind)
        alone = folder / f"{kind}-alone"
        _, seconds = once(lambda: train(config, alone))  # noqa: B023 - run at once
        for number in range(RUNS_EACH):
            out = folder / f"{kind}-{number}"
            kills = killed_run(lambda: train(config, out), out, seconds, draw)  # noqa: B023 - run at once
            wrong = differences(alone, out)
            rows.append({"kind": kind, "run": number, "equal": not wrong, "differs": wrong, "kills": kills})
            print(f"{kind} {number}: {wrong or 'equal'} after {len(kills)} kills", flush=True)
            shutil.rmtree(out)
    return rows


def evaluate_all(folder: Path, data: Path, draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    train_records, test_records = load_parts(recipe(data, "full").data)
    records = (test_records + train_records)[::5]  # of every modality, to shuffle within it
    for kind, settings in EVALUATION.items():

        def answer(out: Path, settings: dict[str, Any] = settings) -> None:
            shown = {"mode": "no-think", "max_new_tokens": 8, "batch_size": 4, "donors": records}
            evaluate(load_vlm("tiny", device="cpu"), records, out=out, **shown, **settings)

        alone = folder / "alone" / f"{kind}.jsonl"
        alone.parent.mkdir(exist_ok=True)
        _, seconds = once(lambda: answer(alone))  # noqa: B023 - run at once
        for number in range(EVALUATIONS_EACH):
            out = folder / f"evaluation-{kind}-{number}" / f"{kind}.jsonl"  # images are named relative to the folder
            out.parent.mkdir()
            kills = killed_run(lambda: answer(out), out.parent, seconds, draw)  # noqa: B023 - run at once
            equal = sorted(map(str, timeless(alone))) == sorted(map(str, timeless(out)))
            rows.append({"kind": kind, "run": number, "equal": equal, "kills": kills})
            print(f"{kind} {number}: {'equal' if equal else 'DIFFERS'} after {len(kills)} kills", flush=True)
    return rows


PARTS = {"training": train_all, "evaluation": evaluate_all}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "kills.json")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=("training", "evaluation"), help="this part; the other is left as it is")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_phantoms(folder / "phantoms", num_images=32, seed=0)
        parts = {name: work for name, work in PARTS.items() if args.only in (None, name)}
        found = {name: work(folder, data, draw) for name, work in parts.items()}
    result = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    for name, rows in found.items():
        result[name] = {
            "equal": f"{sum(row['equal'] for row in rows)} of {len(rows)}",
            "kills": sum(len(row["kills"]) for row in rows),
            "seed": args.seed,
            "runs": rows,
        }
    SAID.unlink(missing_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: {key: result[name][key] for key in ("equal", "kills", "seed")} for name in found}))
    sys.exit(not all(row["equal"] for rows in found.values() for row in rows))


if __name__ == "__main__":
    main()
