"""Does training keep looking where the text gives most answers away? Plain GRPO, and the objective that we advise.

    python benchmarks/looking.py --json                                        # half an hour at most on two cores
    python benchmarks/looking.py --shortcut-in texts --out runs/looking-texts
    python benchmarks/looking.py --no-shortcut --out runs/looking-none         # what it costs where nothing is amiss
    python benchmarks/looking.py --arms hold_to_chance --arms perception …     # other objectives beside them

The tiny base is trained on phantoms with a planted shortcut (`medr1 data phantoms --shortcut`), by the demo's recipe,
and asked about phantoms where the shortcut holds by chance alone. Two processes of one thread each; stopped, the same
command goes on. The last line of stdout is with --json one JSON object; every mean is over all questions and seeds, its
limits are of the questions' images and of the seeds together (see `cell`).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from medr1.config import Config, load_config
from medr1.data.datasets import load_records
from medr1.data.phantoms import Shortcut, pointed_at, write_planted
from medr1.data.records import LETTERS, Record, read_jsonl, write_atomic

ARMS: dict[str, dict[str, Any]] = {
    "accuracy": {},
    "looking": {"draws.exchanged_images": 1.0, "draws.weights": "needs_image"},
    "exchanged_images": {"draws.exchanged_images": 1.0},
    "needs_image": {"draws.weights": "needs_image"},
    "hold_to_chance": {"grpo.hold_to_chance": 0.2},
    "perception": {"grpo.perception": 0.05},
    "image_margin": {"grpo.rewards": {"accuracy": 1.0, "format": 0.2, "image_margin": 1.0}},
    "consistency": {"grpo.rewards": {"accuracy": 1.0, "format": 0.2, "consistency": 1.0}},
    "hold_and_consistency": {
        "grpo.hold_to_chance": 0.2,
        "grpo.rewards": {"accuracy": 1.0, "format": 0.2, "consistency": 0.5},
    },
}
"""Objectives by name: what the recipe says beside the demo's."""
CONDITIONS = ("image", "shuffled")
MEASURES = ("accuracy", "accuracy_where_wrong", "follows_shortcut", "reliance", "image_sensitivity", "consistency")
SIGNED = {"reliance"}
IMAGES, TESTED = {"positions": 1280, "texts": 2560}, 80
"""Images drawn for training (a shortcut in texts leaves three questions of four out), and asked about."""

app = typer.Typer(add_completion=False)


def recipe(arm: str, seed: int, steps: int) -> Config:
    return load_config(
        overrides={
            "model.name": "tiny",
            "rollout.max_new_tokens": 64,
            "grpo.beta": 0.0,
            "optimizer.steps": steps,
            "optimizer.prompts_per_step": 16,
            "optimizer.learning_rate": 5e-5,
            "optimizer.schedule": "constant_with_warmup",
            "optimizer.warmup_steps": 5,
            "optimizer.seed": seed,
            "log.save_every": 40,
            "log.keep_checkpoints": 1,
        }
        | ARMS[arm]
    )


def test_questions(data: Path) -> list[Record]:
    """All questions about TESTED images of the test part, evenly over modalities."""
    records = load_records(data / "test")
    images = sorted({record.images for record in records})
    asked = set(images[:: max(1, len(images) // TESTED)])
    return [record for record in records if record.images in asked]


def ask(arm: str, seed: int, steps: int, data: Path, folder: Path) -> None:
    """Train an arm (the base is as it is) and ask it: rows by condition, then those of a reader of its reasoning."""
    import torch

    from medr1.evaluation.controls import ALONE
    from medr1.evaluation.looking import kept_reasoning
    from medr1.evaluation.run import evaluate
    from medr1.policy.vlm import load_vlm
    from medr1.training import GRPOTrainer

    torch.set_num_threads(1)
    model, test = "tiny", test_questions(data)
    if arm != "base":
        model = str(folder / "train" / "model")
        if not Path(model).is_dir():
            config = recipe(arm, seed, steps)
            vlm = load_vlm("tiny", dtype="float32")
            GRPOTrainer(vlm, config, load_records(data / "train"), test, folder / "train").run()
    vlm, settings = load_vlm(model, dtype="float32"), {"mode": "think", "max_new_tokens": 64, "batch_size": 40}
    for condition in CONDITIONS:
        rows = evaluate(vlm, test, out=folder / f"{condition}.jsonl", condition=condition, **settings)
        if condition == "image":
            reasoning = {row["id"]: kept_reasoning(row["reply"]) for row in rows}
    reader, out = load_vlm("tiny", dtype="float32"), folder / "reader.jsonl"
    evaluate(reader, test, out=out, condition=ALONE, reasoning=reasoning, **settings)


def values(folder: Path, place: str) -> dict[str, dict[str, float]]:
    """Each measure's value of each question that it is about."""
    from medr1.evaluation import looking

    asked = {way: read_jsonl(folder / f"{way}.jsonl") for way in (*CONDITIONS, "reader")}
    rows = asked["image"]
    pointed = {row["id"]: LETTERS[row["options"].index(pointed_at(row["options"], place))] for row in rows}
    found = looking.values(asked)
    return {
        "accuracy": {row["id"]: float(row["correct"]) for row in rows},
        "accuracy_where_wrong": {row["id"]: float(row["correct"]) for row in rows if row["gold"] != pointed[row["id"]]},
        "follows_shortcut": {row["id"]: float(row["letter"] == pointed[row["id"]]) for row in rows},
        "reliance": found["reliance"],
        "image_sensitivity": found["sensitivity"],
        "consistency": found["consistency"],
    }


def cell(of_seeds: Sequence[Mapping[str, float]], groups: Mapping[str, str], signed: bool) -> list[float]:
    """[mean, low, high]: the seeds' mean of each question, its interval over groups (`intervals.interval`), and beside
    it the interval of the seeds' means (Student's t); distances from the mean add like standard errors.
    """
    from medr1.evaluation.intervals import DIFFERENCE, SHARE, interval

    span, count = DIFFERENCE if signed else SHARE, len(of_seeds)
    by_question = {name: statistics.mean(of_one[name] for of_one in of_seeds) for name in of_seeds[0]}
    mean = statistics.mean(by_question.values())
    low, high = interval([*by_question.values()], [groups[name] for name in by_question], span) or span
    apart = 0.0
    if count > 1:
        means = [statistics.mean(of_one.values()) for of_one in of_seeds]
        apart = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(means) / count**0.5
    below, above = ((limit**2 + apart**2) ** 0.5 for limit in (mean - low, high - mean))
    return [round(value, 4) for value in (mean, max(span[0], mean - below), min(span[1], mean + above))]


def job(arm: str, seed: int, steps: int, data: Path, folder: Path) -> None:
    """`ask` in a process of its own with one thread, if it is still to do; what it says goes into a file."""
    done = folder / "done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--only", arm, str(seed), str(steps), str(data), str(folder)]
    with (folder / "said.txt").open("a") as said:
        ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said)
    if ended.returncode:
        raise SystemExit(f"{folder}: stopped; see {folder / 'said.txt'}, and run the same command to go on")
    done.touch()


@app.command()
def main(
    shortcut: Annotated[
        float, typer.Option(min=0, max=1, help="share of the training questions where it is right")
    ] = 0.95,
    no_shortcut: Annotated[bool, typer.Option("--no-shortcut", help="right by chance alone in training too")] = False,
    shortcut_in: Annotated[Literal["positions", "texts"], typer.Option()] = "positions",
    steps: Annotated[int, typer.Option(min=1)] = 240,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    arms: Annotated[list[str], typer.Option(help=f"of {', '.join(ARMS)}; may be repeated")] = ["accuracy", "looking"],  # noqa: B006
    processes: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path, typer.Option(help="folder of the runs; an unfinished one is gone on with")] = Path(
        "runs/looking"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON line")] = False,
) -> None:
    """Train every arm with every seed, ask each and the base, compare."""
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise typer.BadParameter(f"{unknown[0]}: choose among {', '.join(ARMS)}")
    began, share = time.perf_counter(), None if no_shortcut else shortcut
    asked = {"shortcut": share, "shortcut_in": shortcut_in, "steps": steps}
    settings = out / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != asked:
        raise typer.BadParameter(f"{out} holds a comparison with other settings; name another --out")
    data = out / "data"
    if not settings.exists():
        write_planted(data, num_images=IMAGES[shortcut_in], seed=0, shortcut=Shortcut(shortcut_in, share))
        write_atomic(settings, json.dumps(asked))
    jobs = [("base", 0), *((arm, seed) for seed in range(seeds) for arm in arms)]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda one: job(*one, steps, data, out / f"{one[0]}-{one[1]}"), jobs))
    groups = {record.id: record.group for record in test_questions(data)}
    of_arms = {
        arm: [values(out / f"{arm}-{seed}", shortcut_in) for seed in range(1 if arm == "base" else seeds)]
        for arm in ("base", *arms)
    }
    cells = {
        arm: {name: cell([of_one[name] for of_one in of_seeds], groups, name in SIGNED) for name in MEASURES}
        for arm, of_seeds in of_arms.items()
    }
    spent = out / "seconds.json"
    seconds = time.perf_counter() - began + (json.loads(spent.read_text()) if spent.exists() else 0.0)
    write_atomic(spent, json.dumps(seconds))
    show(cells)
    if as_json:
        print(json.dumps({"seeds": list(range(seeds)), **asked, "seconds": round(seconds), **cells}))


def show(cells: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    table = Table(title="percent, with 95 % limits")
    table.add_column("arm")
    for name in MEASURES:
        table.add_column(name.replace("_", " "))
    for arm, of_arm in cells.items():
        texts = ("{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in of_arm[name])) for name in MEASURES)
        table.add_row(arm, *texts)
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        arm, seed, steps, data, folder = sys.argv[2:]
        ask(arm, int(seed), int(steps), Path(data), Path(folder))
    else:
        app()
