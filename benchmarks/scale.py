"""What a data set of a million questions takes before the first step: seconds and megabytes, at three sizes.

    python benchmarks/scale.py run --out DIR                  # 10,000, 100,000 and 1,000,000 questions
    python benchmarks/scale.py run --out DIR --questions 20000

Questions are synthetic, in the format of one's own data (JSON lines), ten to an image of 8 x 8 pixels, or more where
there are more than 100,000: images are hashed once and their time is no matter of questions. Three images are of one
patient. Each command of a run is a process of its own, as a user starts it: the first hashes the images and begins a
run, the second goes on with it in the middle of its second epoch. Writes scale.json into DIR: seconds of each part,
of the processor and by the clock, and megabytes at most and afterwards, beside what the imports take.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from PIL import Image

from medr1.config import Config, load_config
from medr1.data.heldout import write_split
from medr1.data.parts import load_parts
from medr1.data.records import MODALITIES, QUESTION_TYPES, to_json, write_atomic
from medr1.policy.vlm import VLM  # noqa: F401  (what any command imports, so that it is not counted)
from medr1.training.draws import draw_order, record_weights
from medr1.training.looking import OtherImages

SIZES = (10_000, 100_000, 1_000_000)
AN_IMAGE = 10
"""Questions about each image, at least."""
IMAGES = 10_000
"""Images at most."""
STEPS, BATCH = 100, 64

app = typer.Typer(add_completion=False)
T = TypeVar("T")


def write_data(folder: Path, questions: int) -> None:
    """Questions and images, the same each time."""
    draw = random.Random(0)
    findings = [f"finding {number} of the {place}" for number in range(40) for place in ("left side", "right side")]
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        num_images = min(IMAGES, questions // AN_IMAGE)
        for image in range(num_images):
            name = f"images/{image // 1000:04d}/{image:08d}.png"
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(pixels.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / name)
            for number in range(questions // num_images):
                options = draw.sample(findings, 4)
                row = {
                    "id": f"synthetic/{image:08d}/{number}",
                    "image": name,
                    "question": f"Which of these is seen in part {draw.randrange(1000)} of this image?",
                    "options": options,
                    "answer": draw.choice("ABCD"),
                    "modality": draw.choice(MODALITIES),
                    "question_type": draw.choice(QUESTION_TYPES),
                    "group": f"patient-{image // 3}",
                }
                file.write(to_json(row) + "\n")


class Meter:
    """Seconds and peak megabytes of each part of a process."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self.before = memory("VmRSS")

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is of this part alone
        began = time.perf_counter(), time.process_time()
        result = work()
        self.parts[name] = {
            "seconds": round(time.perf_counter() - began[0], 3),
            "cpu_seconds": round(time.process_time() - began[1], 3),
            "peak_mb": round(memory("VmHWM") - self.before, 1),
            "kept_mb": round(memory("VmRSS") - self.before, 1),
        }
        print(name, self.parts[name], file=sys.stderr, flush=True)
        return result


def memory(field: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


@app.command()
def command(name: str, folder: Path) -> None:
    """One of the two processes; prints what it took as JSON."""
    meter = Meter()
    config: Config = load_config(overrides={"data.path": str(folder / "data")})
    train, test = meter("load and split", lambda: load_parts(config.data))
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "recipe.toml").write_text(f'[data]\npath = "{folder / "data"}"\n')
    meter("list of what is held out", lambda: write_split(run, train, test, "tiny"))
    images = meter("other images", lambda: OtherImages(train))
    weights = meter("weights", lambda: record_weights(train, ""))
    order = partial(draw_order, train, weights, "off", 0)
    start = 0 if name == "begin" else len(train) * 3 // 2
    meter("order", lambda: [train[index].id for index in islice(order(), start, start + STEPS * BATCH)])
    assert images is not None
    print(json.dumps(meter.parts))


@app.command()
def run(
    out: Annotated[Path, typer.Option()],
    questions: Annotated[list[int], typer.Option(min=100)] = list(SIZES),  # noqa: B006
) -> None:
    """Measure each size in new folders, which are removed."""
    results: dict[str, Any] = {}
    for size in questions:
        folder = out / f"work-{size}"
        shutil.rmtree(folder, ignore_errors=True)
        write_data(folder / "data", size)
        settings = os.environ | {"MEDR1_CACHE": str(folder / "cache")}
        results[str(size)] = {}
        for name in ("begin", "resume"):
            done = subprocess.run(
                [sys.executable, __file__, "command", name, folder], env=settings, stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise SystemExit(done.returncode)
            results[str(size)][name] = json.loads(done.stdout.splitlines()[-1])
            print(size, name, json.dumps(results[str(size)][name]), flush=True)
        shutil.rmtree(folder)
    write_atomic(out / "scale.json", to_json(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
