"""From a recipe to a trained model: data, model, trainer, and what a stranger needs to repeat it."""

import ctypes
import gc
import json
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medr1.config import RECIPE, Config
from medr1.data.kept import kept, taken
from medr1.data.parts import leave_out_unreadable, load_parts
from medr1.data.records import write_atomic
from medr1.errors import MedR1Error
from medr1.evaluation.run import leave_out_too_long, too_long
from medr1.policy.vlm import load_vlm
from medr1.processes import agree, alone, gather, is_first, join, make_folder
from medr1.training.base import RecordTrainer
from medr1.training.folder import MODEL, RESULT, write_recipe
from medr1.training.grpo import GRPOTrainer
from medr1.training.sft import SFTTrainer

METHODS: dict[str, type[RecordTrainer]] = {"grpo": GRPOTrainer, "sft": SFTTrainer}


def train(config: Config, out: Path, *, extend: bool = False) -> dict[str, Any]:
    """Train by a recipe into `out`, resuming what is there. The model lies in `out/model`.

    Under `torchrun` or `accelerate launch` every process calls this, and they share the work.

    Args:
        extend: whether a run there may get more steps under any schedule, see `check_recipe`.

    Returns:
        model (folder), steps, train_records, test_records, and the last log line.
    """
    device = join()
    make_folder(out)
    with ExitStack() as held:
        agree(lambda: held.enter_context(alone(out)))
        if len(gather(None)) > 1:  # images are hashed once, and not once a process
            agree(lambda: load_parts(config.data) if is_first() else None)
        trainer = agree(lambda: _prepare(config, out, device, extend))
        trainer.run(dry_step=True)
        counts = {
            "steps": trainer.state.global_step,
            "train_records": trainer.num_records,
            "test_records": trainer.num_test_records,
        }
        if is_first():
            write_atomic(out / RESULT, json.dumps(counts))
    result = {"model": str(out / MODEL), **counts, "last": trainer.state.log_history[-1]}
    del trainer
    _give_back()
    return result


def dry_run(config: Config) -> dict[str, Any]:
    """Whether the longest step of a run by this recipe fits; nothing of it is kept. See `medr1.training.dry`."""
    device = join()
    with TemporaryDirectory() as folder:
        out = gather(folder)[0]
        return agree(lambda: _prepare(config, Path(out), device, False)).dry_run()


def _give_back() -> None:
    """Free what a Trainer, which is a cycle, would keep on the GPU, and give the system what malloc would keep."""
    gc.collect()
    with suppress(AttributeError):  # a C library other than glibc; of 9 GB after a training of `small` it kept 7
        ctypes.CDLL(None).malloc_trim(0)


def _prepare(config: Config, out: Path, device: Any, extend: bool) -> RecordTrainer:
    train_records, test_records = load_parts(config.data)
    if config.data.skip_unreadable:
        left = {record.id for record in leave_out_unreadable(kept(chain(train_records, test_records)), out)}
        train_records, test_records = (
            taken(part, (place for place, record in enumerate(part) if record.id in left))
            for part in (train_records, test_records)
        )
    # Full fine-tuning keeps float32 weights, since bfloat16 would round small updates away; see `RecordTrainer`.
    dtype = config.model.dtype if config.model.lora_rank else "float32"
    vlm = load_vlm(config.model.name, **config.model.loading | {"dtype": dtype}, device=device)
    asked: dict[str, Any] = {"mode": config.rollout.mode, "max_new_tokens": config.rollout.max_new_tokens}
    if config.data.skip_unreadable:
        train_records, test_records = (
            leave_out_too_long(vlm, part, **asked, out=out) for part in (train_records, test_records)
        )
    for record in train_records:
        if reason := too_long(vlm, record, **asked):
            raise MedR1Error(reason)
    new = not (out / RECIPE).exists()
    if is_first():
        write_recipe(config, out, extend=extend)
    try:
        return METHODS[config.method](vlm, config, train_records, test_records, out)
    except MedR1Error:
        if new and is_first():  # a recipe that is refused keeps no folder from the next one
            (out / RECIPE).unlink(missing_ok=True)
        raise
