"""What one process of tests/test_processes.py does: the training runs of a JSON file, one after the other.

    torchrun --nproc-per-node 2 tests/processes_worker.py JOBS.json

A job: {"recipe": overrides, "out": folder, "dtype": "float64", "stop": true, "spoil": name of a function here}.
"""

# ruff: noqa: E402 - the tests' folder must be importable first

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from test_training import StopAfter, recipe
from tiny_vlms import tiny_vlm

from medr1.data import load_parts
from medr1.errors import MedR1Error
from medr1.processes import agree, join, leave
from medr1.records import Record
from medr1.training import GRPOTrainer, SFTTrainer
from medr1.training.base import RecordTrainer


def shard_on_cpu() -> None:
    """Accelerate shards (FSDP2) on GPUs only; told that these processes are such, it does the same with gloo."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def make(job: dict[str, Any]) -> RecordTrainer:
    config = recipe(Path(job["data"]), **job["recipe"])
    train, test = load_parts(config.data)
    vlm = tiny_vlm("qwen2_vl", dtype=getattr(torch, job.get("dtype", "float64")))
    trainer = (GRPOTrainer if config.method == "grpo" else SFTTrainer)(vlm, config, train, test, Path(job["out"]))
    if job.get("stop"):
        trainer.add_callback(StopAfter)
    return trainer


def run(job: dict[str, Any]) -> None:
    if "spoil" in job:
        globals()[job["spoil"]]()
    trainer = agree(lambda: make(job))
    try:
        trainer.run()
    except KeyboardInterrupt:
        assert job.get("stop")


def only_second_learns(reply: str, record: Record, mode: str) -> float:
    """A reward that differs within the groups of rank 1 alone."""
    return len(reply) % 7 * 0.1 if os.environ.get("RANK") == "1" else 0.5


def main() -> None:
    shard_on_cpu()
    join()
    try:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run(job)
    except MedR1Error as error:
        print(f"medr1: {error}", file=sys.stderr)
        sys.exit(1)
    leave()


if __name__ == "__main__":
    main()
