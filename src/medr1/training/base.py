"""What GRPO and SFT training share: data order, whole checkpoints, held-out evaluation, the log.

Both are transformers' Trainer with another `training_step`, so optimizers, schedules, checkpoints, resume, trackers
and Accelerate (DDP, FSDP2, DeepSpeed) are the library's. A step's records are one Trainer batch; memory is bounded by
`prompts_per_forward` inside a step, and every loss has the denominator of the whole step over all processes.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from medr1.config import Config, to_toml
from medr1.errors import MedR1Error
from medr1.evaluation import evaluate
from medr1.images import load_image
from medr1.metrics import summarise
from medr1.models import VLM, PromptBatch, add_lora, encode_prompts, freeze_vision
from medr1.prompts import build_messages
from medr1.records import Record, append_jsonl, read_jsonl, write_atomic

RECIPE = "recipe.toml"
LOG = "log.jsonl"


class RecordTrainer(Trainer):
    """A Trainer whose batches are lists of records.

    Args:
        vlm: the policy; LoRA is added and the vision tower frozen here, as the recipe says.
        train_records: what to train on.
        test_records: held out, for evaluation during training; only `log.eval_records` of them are used.
        output_dir: gets the recipe, log.jsonl, checkpoints and in the end the model (a plain Hugging Face folder).

    Raises:
        MedR1Error: no records, or an output folder that holds another recipe.
    """

    repeats = 1
    """How often each batch comes, one after the other."""

    def __init__(
        self,
        vlm: VLM,
        config: Config,
        train_records: list[Record],
        test_records: list[Record],
        output_dir: Path,
    ) -> None:
        if not train_records:
            raise MedR1Error("no training records; relax the filters of [data]")
        if config.model.lora_rank:
            vlm = add_lora(vlm, rank=config.model.lora_rank, alpha=config.model.lora_alpha)
        elif not config.model.train_vision:
            freeze_vision(vlm)
        self.vlm, self.config, self.out = vlm, config, output_dir
        self.num_records = len(train_records)
        self._checkpoint_dir = str(output_dir)
        chosen = min(config.log.eval_records, len(test_records))
        self.eval_records = random.Random(config.data.split_seed).sample(test_records, chosen)
        self.sums: dict[str, float] = {}
        optimizer, log = config.optimizer, config.log
        self.num_steps = optimizer.steps or math.ceil(
            optimizer.epochs * len(train_records) / optimizer.prompts_per_step * self.repeats
        )
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=self.num_steps,
            per_device_train_batch_size=optimizer.prompts_per_step,
            learning_rate=optimizer.learning_rate,
            lr_scheduler_type=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            activation_checkpointing=optimizer.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            # Full fine-tuning keeps float32 weights, since bfloat16 would round small updates away, and computes in
            # bfloat16 where the GPU can.
            bf16=vlm.device.type == "cuda" and torch.cuda.is_bf16_supported() and config.model.dtype != "float32",
            seed=optimizer.seed,
            data_seed=optimizer.seed,
            logging_steps=log.log_every,
            logging_first_step=True,
            save_steps=log.save_every,
            save_total_limit=log.keep_checkpoints,
            eval_strategy="steps" if log.eval_every else "no",
            eval_steps=log.eval_every or None,
            report_to=list(log.trackers),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=vlm.device.type == "cpu",
            label_names=[],
            disable_tqdm=False,  # else a quiet transformers would print every log line to stdout
        )
        write_recipe(output_dir, config)
        super().__init__(
            model=cast(nn.Module, vlm.model),
            args=arguments,
            data_collator=lambda records: {"records": records},
            train_dataset=cast("Dataset[Any]", train_records),
            eval_dataset=cast("Dataset[Any]", self.eval_records) if log.eval_every else None,
            processing_class=vlm.processor,
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(_OneLineProgress)

    def run(self) -> None:
        """Train to the end, from the last whole checkpoint in the output folder where there is one; save the model."""
        last = get_last_checkpoint(str(self.out))
        start = int(last.rsplit("-", 1)[1]) if last else 0
        if self.is_world_process_zero():
            self._forget_after(start)
        self.train(resume_from_checkpoint=last)
        with _whole_folder(self.out / "model") as staging:
            self.save_model(str(staging))
            if self.config.model.lora_rank:  # an adapter folder that loads by itself
                self.vlm.processor.save_pretrained(staging)

    def encode(self, records: list[Record]) -> PromptBatch:
        """Prompts of records in the recipe's mode, with their images."""
        messages = [build_messages(record, self.config.rollout.mode) for record in records]
        return encode_prompts(self.vlm, messages, [[load_image(path) for path in record.images] for record in records])

    def add_to_log(self, sums: Mapping[str, float]) -> None:
        """Add to the sums since the last log line; `log_line` makes means of them."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def log_line(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from the sums over its steps and all processes."""
        raise NotImplementedError

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.sums:
            names = sorted(self.sums)
            values = torch.tensor([self.sums[name] for name in names], device=self.accelerator.device)
            total = cast(Tensor, self.accelerator.reduce(values))
            logs = logs | self.log_line(dict(zip(names, total.tolist(), strict=True)))
            self.sums = {}
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            append_jsonl(self.out / LOG, [self.state.log_history[-1]])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Greedy accuracy on held-out records by the one evaluator; rows are kept as eval-step-N.jsonl.

        Multiple choice is "eval_accuracy", open questions are "eval_open_accuracy".
        """
        metrics: dict[str, float] = {}
        if self.is_world_process_zero():
            rows = evaluate(
                self.vlm,
                self.eval_records,
                mode=self.config.rollout.mode,
                out=self.out / f"eval-step-{self.state.global_step}.jsonl",
                max_new_tokens=self.config.rollout.max_new_tokens,
            )
            summary = summarise(rows)
            for name, cell in (("eval", summary), ("eval_open", summary["open"])):
                if cell and cell["n"]:
                    low, high = cell["ci95"]
                    metrics |= {f"{name}_accuracy": cell["accuracy"], f"{name}_ci_low": low, f"{name}_ci_high": high}
            self.log(metrics)
        self.accelerator.wait_for_everyone()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        world = self.args.world_size * self.args.per_device_train_batch_size
        return RecordOrder(self.num_records, self.num_steps, world, self.repeats, self.args.seed)

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:
        return None  # losses are already whole: their denominator is counted in training_step

    def _forget_after(self, step: int) -> None:
        """Cut the logs back to a checkpoint, so that a resumed run writes each step once."""
        for path in self.out.glob("*.jsonl"):
            if path.name.startswith("eval-step-"):
                if int(path.stem.rsplit("-", 1)[1]) > step:
                    path.unlink()
            else:
                rows = [row for row in read_jsonl(path) if row["step"] <= step]
                write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights of a checkpoint by `from_pretrained`.

        Trainer's own way reads the file's names literally, and a Qwen2-VL file bears other names than the module: it
        would warn, load nothing, and go on from the base model (transformers 5.24).
        """
        if self.config.model.lora_rank or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            core = self.vlm.core
            core.load_state_dict(type(core).from_pretrained(resume_from_checkpoint, dtype=core.dtype).state_dict())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, written aside and renamed when whole: a full disk or a kill leaves the older ones."""
        with _whole_folder(self.out / f"checkpoint-{self.state.global_step}") as staging:
            self._checkpoint_dir = str(staging.parent)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            rotate_checkpoints(output_dir=str(self.out), save_total_limit=self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return self._checkpoint_dir


class _OneLineProgress(ProgressCallback):
    """The library's progress bar, with the newest numbers on the bar and not a line for each step."""

    SHOWN = ("loss", "reward_accuracy", "format_rate", "kl", "completion_tokens", "eval_accuracy", "eval_open_accuracy")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in self.SHOWN if name in logs})


class _whole_folder:
    """A folder that appears under its name only when its writing has ended well.

    Gives a folder of the same name inside a hidden one; on success it takes its place, on failure it is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.hidden = folder, folder.parent / f".{folder.name}.saving"

    def __enter__(self) -> Path:
        shutil.rmtree(self.hidden, ignore_errors=True)
        return self.hidden / self.folder.name

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.hidden / self.folder.name).replace(self.folder)
        shutil.rmtree(self.hidden, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # each library has its own for a full disk
            reason = str(error).split("\n")[0]
            raise MedR1Error(
                f"{self.folder}: cannot be written ({reason}); earlier checkpoints are whole,"
                " free space and run the same command to resume"
            ) from error


class RecordOrder(Sampler[int]):
    """Indices of `num_steps` batches: one seeded permutation after another, so that no record is dropped at the end.

    Each batch of `batch` indices comes `repeats` times in a row (several updates on one set of rollouts).
    """

    def __init__(self, num_records: int, num_steps: int, batch: int, repeats: int, seed: int) -> None:
        self.num_records, self.num_steps, self.batch, self.repeats = num_records, num_steps, batch, repeats
        self.seed = seed

    def __len__(self) -> int:
        return self.num_steps * self.batch

    def __iter__(self) -> Iterator[int]:
        stream = self._stream()
        for step in range(self.num_steps):
            if step % self.repeats == 0:
                indices = [next(stream) for _ in range(self.batch)]
            yield from indices

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.num_records, generator=generator).tolist()


def write_recipe(output_dir: Path, config: Config) -> None:
    """Write the recipe into a run's folder, or check that it is the one that the run began with.

    Raises:
        MedR1Error: the folder holds a run of another recipe.
    """
    path, text = output_dir / RECIPE, to_toml(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise MedR1Error(f"{output_dir}: holds a run of another recipe (see {RECIPE}); choose another --out")
    write_atomic(path, text)
