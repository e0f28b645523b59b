"""Does training keep looking where the text gives most answers away? Plain GRPO, and the objective that we advise.

    python benchmarks/looking.py --json                                        # 46 minutes on two cores
    python benchmarks/looking.py --shortcut-in texts --out runs/looking-texts
    python benchmarks/looking.py --no-shortcut --out runs/looking-none         # what it costs where nothing is amiss
    python benchmarks/looking.py --arms hold_to_chance --arms perception …     # other objectives beside them
    python benchmarks/looking.py --data DATA --model runs/small/model --parts MRI --parts OCT --out runs/looking-real

The tiny base is trained on phantoms with a planted shortcut (`medr1 data phantoms --shortcut`), by the demo's recipe,
and asked about phantoms where the shortcut holds by chance alone. Two processes of one thread each; stopped, the same
command goes on. The last line of stdout is with --json one JSON object; every mean is over all questions and seeds, its
limits are of the questions' images and of the seeds together (see `cell`).

With --data the arms are trained on each of the named modalities of a data set by itself, by the recipe of
configs/study-small.toml, and asked all held-out questions of it. What nobody planted takes the shortcut's place: the
option whose text was right most often in the training part. Differences from plain GRPO are paired by question; their
limits are given with the seeds and, as everywhere in `medr1`, of the questions' groups alone.
"""

import json
import os
import shutil
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

from medr1.config import Config, DataConfig, load_config
from medr1.data.datasets import load_records
from medr1.data.parts import load_parts
from medr1.data.phantoms import Shortcut, pointed_at, write_planted
from medr1.data.records import LETTERS, MODALITIES, Record, read_jsonl, write_atomic
from medr1.evaluation.controls import ALONE, most_often_right
from medr1.evaluation.intervals import DIFFERENCE, SHARE, interval
from medr1.evaluation.looking import values as of_rows

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
PHANTOMS = ""
"""The only part of a comparison on phantoms."""

app = typer.Typer(add_completion=False)


class Comparison:
    """What is compared, as a folder says it: its settings, and of each part the data, the runs and their replies."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.settings: dict[str, Any] = json.loads((out / "settings.json").read_text())
        self.real = "data" in self.settings
        self.base = self.settings.get("model", "tiny")

    def folder(self, part: str, arm: str, seed: int) -> Path:
        return self.out / part / f"{arm}-{seed}"

    def recipe(self, arm: str, seed: int) -> Config:
        common = {
            "model.name": self.base,
            "optimizer.steps": self.settings["steps"],
            "optimizer.schedule": "constant_with_warmup",
            "optimizer.seed": seed,
            "log.keep_checkpoints": 1,
        }
        phantoms = {
            "model.dtype": "float32",
            "rollout.max_new_tokens": 64,
            "grpo.beta": 0.0,
            "optimizer.prompts_per_step": 16,
            "optimizer.learning_rate": 5e-5,
            "optimizer.warmup_steps": 5,
            "log.save_every": 40,
        }
        small = {
            "model.dtype": "bfloat16",
            "model.train_vision": False,
            "rollout.max_new_tokens": 48,
            "grpo.beta": 0.04,
            "optimizer.prompts_per_step": 8,
            "optimizer.learning_rate": 1e-5,
            "optimizer.warmup_steps": 3,
            "log.save_every": 25,
            # A term has the passes over both images in memory until its gradient is known: 15 GB, and 12 by halves.
            "optimizer.prompts_per_forward": 2 if ARMS[arm].keys() & {"grpo.hold_to_chance", "grpo.perception"} else 0,
        }
        return load_config(overrides=common | (small if self.real else phantoms) | ARMS[arm])

    def questions(self, part: str) -> tuple[list[Record], list[Record]]:
        """What is trained on, and what is asked: of phantoms what TESTED images ask, evenly over modalities."""
        if self.real:
            return load_parts(DataConfig(path=self.settings["data"], modalities=(part,)))
        train, test = (load_records(self.out / "data" / name) for name in ("train", "test"))
        images = sorted({record.images for record in test})
        asked = set(images[:: max(1, len(images) // TESTED)])
        return train, [record for record in test if record.images in asked]

    def pointed(self, part: str) -> dict[str, set[str]]:
        """Letters that the shortcut points at, of each question that is asked."""
        train, test = self.questions(part)
        if self.real:
            return dict(zip([record.id for record in test], most_often_right(train, test), strict=True))
        place = self.settings["shortcut_in"]
        return {record.id: {LETTERS[record.options.index(pointed_at(record.options, place))]} for record in test}


def ask(compared: Comparison, part: str, arm: str, seed: int) -> None:
    """Train an arm (the base is as it is) and ask it: rows by condition, then those of a reader of its reasoning."""
    import torch

    from medr1.evaluation.looking import kept_reasoning
    from medr1.evaluation.run import evaluate
    from medr1.policy.vlm import load_vlm
    from medr1.training import GRPOTrainer

    torch.set_num_threads(1)
    folder, (train, test) = compared.folder(part, arm, seed), compared.questions(part)
    config, model = compared.recipe("accuracy" if arm == "base" else arm, seed), compared.base
    if arm != "base":
        model = str(folder / "train" / "model")
        if not Path(model).is_dir():
            vlm = load_vlm(compared.base, **config.model.loading | {"dtype": "float32"})  # bfloat16 rounds updates away
            GRPOTrainer(vlm, config, train, test, folder / "train").run()
    vlm = load_vlm(model, **config.model.loading)
    settings = {"mode": "think", "max_new_tokens": config.rollout.max_new_tokens, "batch_size": 40}
    for condition in CONDITIONS:
        rows = evaluate(vlm, test, out=folder / f"{condition}.jsonl", condition=condition, **settings)
        if condition == "image":
            reasoning = {row["id"]: kept_reasoning(row["reply"]) for row in rows}
    reader, out = load_vlm(compared.base, **config.model.loading), folder / "reader.jsonl"
    evaluate(reader, test, out=out, condition=ALONE, reasoning=reasoning, **settings)
    if compared.real:  # half a gigabyte each
        shutil.rmtree(folder / "train" / "model", ignore_errors=True)
        for checkpoint in folder.glob("train/checkpoint-*"):
            shutil.rmtree(checkpoint)


Values = dict[str, dict[str, float]]
"""Each measure's value of each question that it is about."""


def values(folder: Path, pointed: Mapping[str, set[str]]) -> Values:
    asked = {way: read_jsonl(folder / f"{way}.jsonl") for way in (*CONDITIONS, "reader")}
    rows = asked["image"]
    found = of_rows(asked)
    return {
        "accuracy": {row["id"]: float(row["correct"]) for row in rows},
        "accuracy_where_wrong": {
            row["id"]: float(row["correct"]) for row in rows if row["gold"] not in pointed[row["id"]]
        },
        "follows_shortcut": {row["id"]: float(row["letter"] in pointed[row["id"]]) for row in rows},
        "reliance": found["reliance"],
        "image_sensitivity": found["sensitivity"],
        "consistency": found["consistency"],
    }


def cell(
    of_parts: Sequence[Sequence[Mapping[str, float]]],
    groups: Mapping[str, str],
    span: tuple[float, float] = SHARE,
    *,
    seeds: bool = True,
) -> list[float]:
    """[mean, low, high] over the questions of all parts, of which each seed has a value in each.

    The limits are those of the interval over groups of the seeds' means by question (`intervals.interval`) and, beside
    it, of the seeds: the variance of their means within each part, pooled by the parts' shares of the questions, with
    Student's t of as many degrees of freedom as all parts have together. Distances from the mean add like standard
    errors. Without `seeds` the interval over groups alone.
    """
    by_question = {
        name: statistics.mean(of_one[name] for of_one in of_seeds) for of_seeds in of_parts for name in of_seeds[0]
    }
    mean = statistics.mean(by_question.values())
    low, high = interval([*by_question.values()], [groups[name] for name in by_question], span) or span
    variance, freedom = 0.0, 0
    for of_seeds in of_parts if seeds else ():
        if len(of_seeds) > 1:
            means = [statistics.mean(of_one.values()) for of_one in of_seeds]
            share = len(of_seeds[0]) / len(by_question)
            variance += share**2 * statistics.variance(means) / len(of_seeds)
            freedom += len(of_seeds) - 1
    apart = float(stats.t.ppf(0.975, freedom)) * variance**0.5 if freedom else 0.0
    below, above = ((limit**2 + apart**2) ** 0.5 for limit in (mean - low, high - mean))
    return [round(value, 4) for value in (mean, max(span[0], mean - below), min(span[1], mean + above))]


def differences(arm: Values, plain: Values, name: str) -> dict[str, float]:
    return {number: value - plain[name][number] for number, value in arm[name].items() if number in plain[name]}


def job(compared: Comparison, part: str, arm: str, seed: int) -> None:
    """`ask` in a process of its own with one thread, if it is still to do; what it says goes into a file."""
    folder = compared.folder(part, arm, seed)
    done = folder / "done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--only", str(compared.out), part, arm, str(seed)]
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
    data: Annotated[str, typer.Option(help="a data set instead of phantoms; needs --model and --parts")] = "",
    model: Annotated[str, typer.Option(help="the base, with --data")] = "",
    parts: Annotated[list[str], typer.Option(help="modalities, each trained on by itself; may be repeated")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1)] = 240,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    first_seed: Annotated[int, typer.Option(min=0)] = 0,
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
    if bool(data) != bool(model and parts) or any(part not in MODALITIES for part in parts):
        raise typer.BadParameter(f"--data, --model and --parts go together; parts are of {', '.join(MODALITIES)}")
    began, share = time.perf_counter(), None if no_shortcut else shortcut
    planted = {"shortcut": share, "shortcut_in": shortcut_in, "steps": steps}
    asked = {"data": data, "model": model, "steps": steps} if data else planted
    settings = out / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != asked:
        raise typer.BadParameter(f"{out} holds a comparison with other settings; name another --out")
    if not settings.exists():
        if not data:
            write_planted(out / "data", num_images=IMAGES[shortcut_in], seed=0, shortcut=Shortcut(shortcut_in, share))
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(settings, json.dumps(asked))
    compared, of = Comparison(out), parts or [PHANTOMS]
    runs = range(first_seed, first_seed + seeds)
    jobs = [(part, "base", 0) for part in of] + [(part, arm, seed) for seed in runs for part in of for arm in arms]
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda one: job(compared, *one), jobs))
    groups = {record.id: record.group for part in of for record in compared.questions(part)[1]}
    pointed = {part: compared.pointed(part) for part in of}
    found = {(part, arm, seed): values(compared.folder(part, arm, seed), pointed[part]) for part, arm, seed in jobs}
    cells = {
        arm: {
            name: cell(
                [[found[part, arm, seed][name] for seed in (runs if arm != "base" else [0])] for part in of],
                groups,
                DIFFERENCE if name in SIGNED else SHARE,
            )
            for name in MEASURES
        }
        for arm in ("base", *arms)
    }
    result: dict[str, Any] = {"seeds": list(runs), **asked, **({"parts": of} if data else {})}
    if "accuracy" in arms and data:
        result["over_accuracy"] = {
            arm: {name: over_plain(found, groups, of, arm, runs, name) for name in MEASURES}
            for arm in arms
            if arm != "accuracy"
        }
    spent = out / "seconds.json"
    seconds = time.perf_counter() - began + (json.loads(spent.read_text()) if spent.exists() else 0.0)
    write_atomic(spent, json.dumps(seconds))
    show(cells)
    if as_json:
        print(json.dumps({**result, "seconds": round(seconds), **cells}))


def over_plain(
    found: Mapping[tuple[str, str, int], Values],
    groups: Mapping[str, str],
    parts: Sequence[str],
    arm: str,
    seeds: Sequence[int],
    name: str,
) -> dict[str, Any]:
    """An arm's measure less plain GRPO's of the same seed, paired by question: see `cell`; and each run's by itself."""
    of_parts = [
        [differences(found[part, arm, seed], found[part, "accuracy", seed], name) for seed in seeds] for part in parts
    ]
    low, high = DIFFERENCE if name in SIGNED else SHARE
    span = (low - high, high - low)
    runs = {
        part: [round(statistics.mean(of_one.values()), 4) for of_one in of_seeds]
        for part, of_seeds in zip(parts, of_parts, strict=True)
    }
    return {
        "with_seeds": cell(of_parts, groups, span),
        "over_groups": cell(of_parts, groups, span, seeds=False),
        "questions": sum(len(of_seeds[0]) for of_seeds in of_parts),
        "runs": runs,
    }


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
        out, part, arm, seed = sys.argv[2:]
        ask(Comparison(Path(out)), part, arm, int(seed))
    else:
        app()
