"""A step before the first one, on the longest prompts, thrown away: whether a run fits is known at once.

    medr1 train --config recipe.toml --data DATA --dry-run

It takes what any step of the run can take: its longest prompts with their images, completions of full length, a
difference in every group, and the optimizer's state. Weights, optimizer and random numbers are afterwards what they
were.
"""

import math
import sys
import warnings
from collections.abc import Sequence
from heapq import nlargest
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from PIL import Image

from medr1.data.images import load_image
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.processes import gather, tell
from medr1.training.plan import GB, count, image_tokens, remedies, remedy

if TYPE_CHECKING:
    from medr1.training.base import RecordTrainer

CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Bytes that a container may take, where one is limited."""


class DryRunEndsError(Exception):
    """Ends a run that was to make the dry step alone."""


def dry_step(trainer: "RecordTrainer", records: Sequence[Record]) -> dict[str, Any]:
    """Make the step and say on stderr what it took.

    Returns:
        peak_gb: of the GPU of the process that took most; without GPU of the whole process, at any time until now.
        memory_gb: what there is; prompts (of a process), prompt_tokens (of the longest).

    Raises:
        MedR1Error: it does not fit; the line says which settings would.
    """
    device = trainer.args.device
    chosen, tokens = longest(trainer, records, trainer.args.per_device_train_batch_size)
    total = _memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _step(trainer, chosen)
        peak: float = _peak(device)
    except (MemoryError, RuntimeError) as error:  # torch says both of a GPU and of a CPU that memory is out
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        peak = math.inf
    peak = max(gather(peak))
    if peak > total:
        raise MedR1Error(_refusal(trainer, chosen[0], tokens, total))
    rollout = trainer.config.rollout
    replies = f", {rollout.num_completions} completions of {rollout.max_new_tokens:,} tokens each"
    measured = {"peak_gb": peak / GB, "memory_gb": total / GB, "prompts": len(chosen), "prompt_tokens": tokens}
    prompts = "prompt" if len(chosen) == 1 else f"{len(chosen)} prompts"
    tell(
        f"dry step: {peak / GB:.2f} of {total / GB:.1f} GB, with the longest {prompts} (up to {tokens:,} tokens)"
        f"{replies if trainer.config.method == 'grpo' else ''}",
        "dim",
    )
    return {name: round(value, 3) for name, value in measured.items()}


def longest(trainer: "RecordTrainer", records: Sequence[Record], count: int) -> tuple[list[Record], int]:
    """The records with the longest prompts, images included, and the tokens of the longest; fewer are repeated."""
    sizes: dict[Path, int] = {}

    def guess(record: Record) -> float:
        text = sum(len(part.get("text", "")) for turn in build_messages(record, mode) for part in turn["content"])
        for path in record.images:
            sizes.setdefault(path, _pixels(path))
        return text / 4 + sum(sizes[path] for path in record.images) / 28**2

    mode = trainer.config.rollout.mode
    likely = nlargest(2 * count, records, key=guess)
    lengths = trainer.encode(likely).attention_mask_BP.sum(1).tolist()
    order = sorted(range(len(likely)), key=lambda place: -lengths[place])
    return list(islice(cycle([likely[place] for place in order[:count]]), count)), max(lengths)


def _pixels(path: Path) -> int:
    """Width times height of an image; of most kinds of files only the beginning is read."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            return opened.width * opened.height
    except Exception:  # of no kind that Pillow knows, a selector, or so large that it refuses: `load_image` tells
        image = load_image(path)
        return image.width * image.height


def _step(trainer: "RecordTrainer", records: list[Record]) -> None:
    """One step that changes nothing: the optimizer is called with a rate of 0, and then forgets what it kept."""
    device, model, optimizer = trainer.args.device, trainer.model_wrapped, trainer._bare_optimizer
    sums, rates = dict(trainer.sums), [group["lr"] for group in optimizer.param_groups]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            trainer.rehearse(model, records)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            optimizer.state.clear()
            model.zero_grad()
            trainer.sums = sums
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _memory(device: torch.device) -> int:
    """Bytes that there are, for a GPU of it, else of the machine or the container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    total = int(psutil.virtual_memory().total)
    return min(total, int(limit)) if limit.isdecimal() else total


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _refusal(trainer: "RecordTrainer", record: Record, tokens: int, total: int) -> str:
    """The line of a run that does not fit: settings that are counted to make it, else all that make it smaller."""
    config = trainer.config
    if config.model.dtype == "auto" and not trainer.args.bf16:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    said = f"a step does not fit into {total / GB:.1f} GB (longest prompt: record {record.id}, {tokens:,} tokens)"
    added = remedies(config)
    try:
        sizes = count(config.model.name)
        side = max((math.isqrt(_pixels(path)) for path in record.images), default=28)
        seen = image_tokens(sizes, config, side)
        machine: dict[str, Any] = {"image_side": side, "gpu": "a100", "memory": total / GB}
        machine |= {"gpus": trainer.args.world_size, "text_tokens": max(0, tokens - seen)}
        counted, needs = remedy(sizes, config, **machine)
        if counted and needs["fits"]:
            added = counted
            said += f"; counted to need {needs['needed_gb']:.1f} GB with these"
    except MedR1Error:
        pass
    settings = " ".join(f"--set {setting}" for setting in added)
    return f"{said}: add {settings}" if added else f"{said}; lower model.max_pixels or take a smaller model"
