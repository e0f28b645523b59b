"""What one process of tests/test_processes.py does: the training runs of a JSON file, one after the other.

    torchrun --nproc-per-node 2 tests/processes_worker.py JOBS.json

A job: {"recipe": overrides, "data": folder, "out": folder}, and where wanted "stop": true (after step 3), "spoil":
the name of a function here that is given the trainer, and "goes_on": true for the next job after a mistake in this one.
"""

import contextlib
import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from test_training import StopAfter, recipe
from tiny_vlms import picture, tiny_vlm
from transformers import TrainerCallback

from medr1.data.parts import load_parts
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.policy.vlm import VLM
from medr1.processes import agree, join, leave
from medr1.training import GRPOTrainer, SFTTrainer
from medr1.training.base import RecordTrainer


def is_second() -> bool:
    return os.environ.get("RANK") == "1"


def only_second_learns(reply: str, record: Record, mode: str) -> float:
    """A reward that differs within groups of rank 1 alone."""
    return len(reply) % 7 * 0.1 if is_second() else 0.5


async def unlike_the_step(replies: list[str], records: list[Record], mode: str) -> list[float]:
    """How far a reply's length is from the mean of the whole step, and how often its record is in it."""
    mean = sum(map(len, replies)) / len(replies)
    return [
        abs(len(reply) - mean) + 0.1 * place + records.count(record)
        for place, (reply, record) in enumerate(zip(replies, records, strict=True))
    ]


def small_beside_large_image(trainer: RecordTrainer) -> None:
    """Rank 0 gets an image of 4 tokens and replies of one token, rank 1 an image of 784 tokens."""
    trainer.vlm.processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 784 * 784}
    side = 784 if is_second() else 56
    trainer.out.mkdir(parents=True, exist_ok=True)
    path = trainer.out / f"side-{side}.png"
    picture(side, side, side).save(path)
    encode = trainer.encode
    trainer.encode = lambda records: encode(  # type: ignore[method-assign]
        [record.model_copy(update={"images": (path,)}) for record in records]
    )
    if not is_second():
        trainer.vlm.stop_token_ids = list(range(300))


def killed_in_step_3(trainer: RecordTrainer) -> None:
    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and is_second():
                os.kill(os.getpid(), signal.SIGKILL)

    trainer.add_callback(Kill)


def first_has_a_full_disk(trainer: RecordTrainer) -> None:
    """Files may grow to 300 kB, less than the weights: the first checkpoint fails inside a library."""
    if not is_second():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def second_cannot_read_an_image(trainer: RecordTrainer) -> None:
    encode = trainer.encode
    if is_second():
        trainer.encode = lambda records: encode(  # type: ignore[method-assign]
            [record.model_copy(update={"images": (Path("gone.png"),)}) for record in records]
        )


def second_rewards_nan(trainer: RecordTrainer) -> None:
    if is_second():
        trainer.rewards = [("judge", lambda *_: math.nan, 1.0)]  # type: ignore[attr-defined]


def second_has_no_loss(trainer: RecordTrainer) -> None:
    learn = trainer.learn
    if is_second():
        trainer.learn = lambda *step: learn(*step) * math.nan  # type: ignore[method-assign]


def make(job: dict[str, Any]) -> RecordTrainer:
    config = recipe(Path(job["data"]), **job["recipe"])
    train, test = load_parts(config.data)
    base = tiny_vlm("qwen2_vl", dtype=torch.float64)
    core = type(base.core).from_pretrained(Path(job["data"]).with_name("base"), dtype=torch.float64)
    vlm = VLM(core, base.processor, "tiny")
    trainer = (GRPOTrainer if config.method == "grpo" else SFTTrainer)(vlm, config, train, test, Path(job["out"]))
    if job.get("stop"):
        trainer.add_callback(StopAfter)
    if "spoil" in job:
        globals()[job["spoil"]](trainer)
    return trainer


def run(job: dict[str, Any]) -> None:
    trainer = agree(lambda: make(job))
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()


def shard_on_cpu() -> None:
    """Accelerate shards (FSDP2) on GPUs only; told that these processes have one each, it does the same with gloo."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def main() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    join()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run(job)
        except (MedR1Error, SystemExit) as error:
            if isinstance(error, MedR1Error):
                print(f"medr1: {error}", file=sys.stderr)
            if not job.get("goes_on"):
                sys.exit(1)
    leave()


if __name__ == "__main__":
    main()
