"""What GRPO and SFT training share: data order, whole checkpoints, held-out evaluation, the log.

Both are transformers' Trainer with another `training_step`, so optimizers, schedules, trackers and Accelerate (DDP,
FSDP2, DeepSpeed) are the library's. A step's records are one Trainer batch; memory is bounded by `prompts_per_forward`
inside a step, and every loss has the denominator of the whole step over all processes.

A run does the same on any number of processes, up to rounding: a step's prompts are divided among them in order, each
samples with the draws that one process would use, and a checkpoint holds the whole weights and the whole state of the
optimizer by name, so that it loads on another number and another kind of them. Process 0 writes every file.
"""

import contextlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset, Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from medr1.config import Config
from medr1.data.heldout import write_split
from medr1.data.images import load_image
from medr1.data.kept import taken
from medr1.data.prompts import build_messages
from medr1.data.records import Record, append_jsonl, read_jsonl, to_json, write_atomic, write_jsonl
from medr1.errors import MedR1Error, NotFiniteError
from medr1.evaluation.controls import as_shown
from medr1.evaluation.looking import measure
from medr1.evaluation.metrics import summarise
from medr1.evaluation.run import Row, evaluate, weights_fingerprint
from medr1.policy import four_bit
from medr1.policy.adapters import add_lora, compile_text_layers, freeze_vision
from medr1.policy.encoding import PromptBatch, check_lengths, encode_prompts
from medr1.policy.pixels import limit_pixels
from medr1.policy.vlm import VLM, computes_in_bfloat16, disk_errors, first_not_finite
from medr1.processes import agree, gather, tell
from medr1.training.checkpoints import newest_whole, seal
from medr1.training.draws import draw_order, record_weights
from medr1.training.dry import DryRunEndsError, dry_step
from medr1.training.folder import COMPLETIONS, LOG, place_trackers, write_recipe
from medr1.training.looking import OtherImages
from medr1.training.progress import TrainingProgress
from medr1.training.trackers import check_trackers

SUMS = "log-sums.json"
"""In a checkpoint: what the next log line, and the last, have summed up so far."""
RESUME = "earlier checkpoints are whole, free space and run the same command to resume"
"""Remedy where a checkpoint cannot be written."""
NAMED = 3
"""Records that an error names; more are counted."""
HELD_OUT = re.compile(r"(?:eval|looking-image|looking-shuffled)-step-(\d+)(?:\.\d+)?\.jsonl")
"""Files of `_held_out`, those of a process's own share among them."""


class RecordTrainer(Trainer):
    """A Trainer whose batches are lists of records.

    Args:
        vlm: the policy; LoRA is added and the vision tower frozen here, as the recipe says.
        train_records: what to train on.
        test_records: held out, for evaluation during training; only `log.eval_records` of them are used.
        output_dir: gets the recipe, log.jsonl, checkpoints and in the end the model (a plain Hugging Face folder).

    Raises:
        MedR1Error: no records, weights to be trained that are narrower than float32, or an output folder that holds
            another recipe.
    """

    repeats = 1
    """How often each batch comes, one after the other."""

    def __init__(
        self,
        vlm: VLM,
        config: Config,
        train_records: Sequence[Record],
        test_records: Sequence[Record],
        output_dir: Path,
    ) -> None:
        if not train_records:
            raise MedR1Error("no training records; relax the filters of [data]")
        check_trackers(config.log.trackers)
        if config.optimizer.name == "adamw_8bit":
            four_bit.require("optimizer.name = adamw_8bit")
        place_trackers(config.log.trackers, output_dir)
        limits = {"min_pixels": config.model.min_pixels, "max_pixels": config.model.max_pixels}
        limit_pixels(vlm.processor, vlm.name, **limits)
        if four_bit.is_four_bit(vlm.core) and not config.model.lora_rank:
            raise MedR1Error(
                f"{vlm.name}: its weights are in 4 bits and cannot be trained themselves; add --set model.lora_rank=16"
            )
        if config.model.lora_rank:
            rank, alpha, targets = config.model.lora_rank, config.model.lora_alpha, config.model.lora_targets
            vlm = add_lora(vlm, rank=rank, alpha=alpha, targets=targets, seed=config.optimizer.seed)
        elif not config.model.train_vision:
            freeze_vision(vlm)
        _refuse_rounding(vlm)
        if config.model.compile == "on" or (config.model.compile == "auto" and vlm.device.type == "cuda"):
            compile_text_layers(vlm)
        self.vlm, self.config, self.out = vlm, config, output_dir
        self.train_records = train_records
        self.num_records, self.num_test_records = len(train_records), len(test_records)
        weights = record_weights(train_records, config.draws.weights)
        self.order = partial(draw_order, train_records, weights, config.draws.balance, config.optimizer.seed)
        chosen = min(config.log.eval_records, len(test_records))
        self.eval_records = random.Random(config.data.split_seed).sample(test_records, chosen)
        if config.draws.exchanged_images and not any(map(self.images.pool, train_records)):
            raise MedR1Error(
                "draws.exchanged_images: no two training records have the same question and options, and other right"
                " ones; leave it at 0, and see grpo.hold_to_chance"
            )
        donors = (place for place, record in enumerate(test_records) if record.images)
        self.donors = taken(test_records, donors if config.log.looking_every else ())
        self.looking_records = self._looking_records()
        self.step_records: list[Record] = []
        self.sums: dict[str, float] = {}
        self.sums_before: dict[str, Any] | None = None
        """What a checkpoint that the run goes on from had summed up for its log."""
        optimizer, log = config.optimizer, config.log
        num_batches = math.ceil(optimizer.epochs * len(train_records) / optimizer.prompts_per_step)
        self.num_steps = optimizer.steps or num_batches * self.repeats
        arguments = TrainingArguments(
            output_dir=str(output_dir),
            max_steps=self.num_steps,
            per_device_train_batch_size=optimizer.prompts_per_step,
            optim="adamw_bnb_8bit" if optimizer.name == "adamw_8bit" else "adamw_torch_fused",
            learning_rate=optimizer.learning_rate,
            lr_scheduler_type=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            activation_checkpointing=optimizer.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            bf16=computes_in_bfloat16(config.model.dtype, vlm.device),
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
            ddp_find_unused_parameters=True,  # no image in a process's prompts: its vision tower gets no gradient
            disable_tqdm=False,  # else a quiet transformers would print every log line to stdout
        )
        if optimizer.prompts_per_step % arguments.world_size:
            raise MedR1Error(
                f"optimizer.prompts_per_step = {optimizer.prompts_per_step} cannot be divided among"
                f" {arguments.world_size} processes; set a multiple of that, or start fewer"
            )
        arguments.per_device_train_batch_size //= arguments.world_size
        arguments._n_gpu = min(arguments.n_gpu, 1)  # more of them are for a launcher; Trainer would use DataParallel
        if arguments.process_index == 0:
            write_recipe(config, output_dir)
            write_split(output_dir, train_records, test_records, config.model.name)
        vlm.folder = output_dir / "model"  # so that rows say what this run has to do with their questions
        super().__init__(
            model=cast(nn.Module, vlm.model),
            args=arguments,
            data_collator=lambda records: {"records": records},
            train_dataset=cast("Dataset[Any]", train_records),
            eval_dataset=cast("Dataset[Any]", self.eval_records) if log.eval_every else None,
            processing_class=vlm.processor,
        )
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin and plugin.zero_stage == 3 and (config.method == "grpo" or log.eval_every or log.looking_every):
            raise MedR1Error(
                "DeepSpeed ZeRO-3 waits for all processes in each call of the model, and sampling makes another number"
                " of calls in each; use configs/accelerate/fsdp2.yaml (ZeRO-3 is for SFT with log.eval_every and"
                " log.looking_every = 0)"
            )
        if self.is_sharded and four_bit.is_four_bit(vlm.core):
            raise MedR1Error(
                "a base in 4 bits cannot be divided among processes; start them without FSDP or DeepSpeed, each with a"
                " copy of it, or leave model.quantize at none"
            )
        self.add_callback(_TakeUpSums(self))
        if log.looking_every:
            self.add_callback(_Look(self))
        self.remove_callback(ProgressCallback)
        self.progress = TrainingProgress()
        self.add_callback(self.progress)

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @cached_property
    def images(self) -> OtherImages:
        """Where a step may need them: they are gone through once more."""
        return OtherImages(self.train_records)

    def run(self, *, dry_step: bool = False) -> None:
        """Train to the end, from the last whole checkpoint in the output folder where there is one; save the model.

        Args:
            dry_step: before step 1 see whether the longest one fits, see `medr1.training.dry`.
        """
        if dry_step and not self.is_deepspeed_enabled:  # it would change weights within the backward pass
            self.callback_handler.callbacks.insert(0, _DryStep(self))
        last = self._last_checkpoint()
        if last:
            agree(lambda: self._load_weights(last))
        agree(lambda: self._forget_after(int(last.rsplit("-", 1)[1]) if last else 0))
        try:
            self.train(resume_from_checkpoint=last)
        finally:
            self.progress.stop()
        self._write_folder(self.out / "model", training_state=False)

    def dry_run(self) -> dict[str, Any]:
        """Make the dry step alone; what `medr1.training.dry.dry_step` measured."""
        ending = _DryStep(self, ends=True)
        self.callback_handler.callbacks.insert(0, ending)
        with contextlib.suppress(DryRunEndsError):
            self.train()
        self.progress.stop()
        return ending.measured

    def rehearse(self, model: nn.Module, records: list[Record]) -> None:
        """What `learn` does with these records at most, for the memory that it takes."""
        self.learn(model, records)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step's backward passes; this process's share of its loss, times the processes, detached."""
        model.train()
        self.step_records = inputs["records"]
        self.step_loss = self.learn(model, self.step_records)
        return self.step_loss

    def as_asked(self, record: Record, step: int) -> Record:
        """A record as it is asked in a step."""
        seed, share = self.config.optimizer.seed, self.config.draws.exchanged_images
        return self.images.exchanged(record, share, f"{seed} {step}") if share else record

    def learn(self, model: nn.Module, records: list[Record]) -> Tensor:
        """What `training_step` does with the records of one step."""
        raise NotImplementedError

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm. A loss or a gradient that is no number ends the run here, before the weights change.

        (DeepSpeed has changed them within the backward pass; they are not written.)
        """
        norm = super()._get_grad_norm(model, grad_norm)
        ids = [record.id for record in self.step_records]
        told = gather((float(self.step_loss), float(norm), ids))
        wrong = [part for part in told if not math.isfinite(part[0])] or told
        loss, length = wrong[0][:2]
        if not math.isfinite(loss + length):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {length}"
            names = [name for part in wrong for name in part[2]]
            agree(partial(_refuse, self.stopped(self.state.global_step + 1, what, names)))
        return norm

    def stopped(self, step: int, what: str, ids: Sequence[str]) -> str:
        """The line of a run that ends because something is not a finite number."""
        shown = f"{', '.join(ids[:NAMED])}{f' and {len(ids) - NAMED} more' if len(ids) > NAMED else ''}"
        last = get_last_checkpoint(str(self.out))
        return (
            f"step {step}: {what}, at records {shown}; nothing of it is kept, and the last good"
            f" checkpoint is {last or 'none yet'}; look at these records, or choose another --out and a lower"
            " optimizer.learning_rate"
        )

    @contextlib.contextmanager
    def naming_step(self, step: int, records: Sequence[Record]) -> Iterator[None]:
        """Within this block a policy that computes no numbers ends the run with this step and these records."""
        try:
            yield
        except NotFiniteError as error:
            raise MedR1Error(self.stopped(step, str(error), [record.id for record in records])) from error

    def _last_checkpoint(self) -> str | None:
        """The newest whole checkpoint, chosen by process 0; damaged ones after it are passed over with a line each."""
        gather(None)  # process 0 has made the folder
        if len(set(gather(get_last_checkpoint(str(self.out))))) > 1:
            agree(partial(_refuse, f"{self.out}: not all processes see the same checkpoints; choose a shared folder"))
        last, passed_over = gather(
            agree(lambda: newest_whole(self.out) if self.is_world_process_zero() else (None, []))
        )[0]
        for line in passed_over:
            tell(f"{line}; going on from {last.name if last else 'the beginning'}")
        return str(last) if last else None

    def encode(self, records: list[Record]) -> PromptBatch:
        """Prompts of records in the recipe's mode, with their images."""
        messages = [build_messages(record, self.config.rollout.mode) for record in records]
        loaded = {record.images: [load_image(path) for path in record.images] for record in records}
        images = [loaded[record.images] for record in records]
        prompts = encode_prompts(self.vlm, messages, images, thinking=self.config.rollout.mode == "think")
        names = [f"record {record.id}" for record in records]
        check_lengths(self.vlm, prompts, names, self.config.rollout.max_new_tokens)
        return prompts

    def add_to_log(self, sums: Mapping[str, float]) -> None:
        """Add to the sums since the last log line; `log_line` makes means of them."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def log_line(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from the sums over its steps and all processes."""
        raise NotImplementedError

    @property
    def num_drawn(self) -> int:
        """Records that the steps until now were given, those left aside or thrown away among them."""
        return -(-self.state.global_step // self.repeats) * self.config.optimizer.prompts_per_step

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        sums: dict[str, float] = {}
        if logs.keys() & {"loss", "train_loss"}:  # and no evaluation, whose line leaves the steps' means as they are
            sums, self.sums = self._gathered_sums(), {}
        if "train_loss" in logs:  # Trainer's own is of the steps since the last resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
            logs.pop("total_flos", None)  # which are not counted
        self.state.epoch = self.num_drawn / self.num_records  # Trainer's own is the fraction of the run
        super().log(logs | (self.log_line(sums) if sums else {}), *args, **kwargs)
        self.first_appends(LOG, [self.state.log_history[-1]])

    def _gathered_sums(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for part in gather(self.sums):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def first_appends(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Process 0 appends rows to a .jsonl file of the run; if it cannot, all end."""
        agree(lambda: append_jsonl(self.out / name, rows) if self.is_world_process_zero() else None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Greedy answers to held-out records by the one evaluator: accuracy, or whether the policy looks, or both.

        Multiple choice is "eval_accuracy", open questions are "eval_open_accuracy"; what `medr1.evaluation.looking`
        measures of another image of the modality is "looking_…", each with its limits "…_low" and "…_high".
        """
        log, step = self.config.log, self.state.global_step
        looks = log.looking_every > 0 and step % log.looking_every == 0
        metrics: dict[str, float] = {}
        if not looks or (step and log.eval_every and step % log.eval_every == 0):
            summary = summarise(self._held_out(self.eval_records, "eval"))
            for name, cell in (("eval", summary), ("eval_open", summary["open"])):
                if cell and cell["n"]:
                    low, high = cell["ci95"]
                    metrics |= {f"{name}_accuracy": cell["accuracy"], f"{name}_ci_low": low, f"{name}_ci_high": high}
        if looks:
            ways = ("image", "shuffled")
            asked = {way: self._held_out(self.looking_records, f"looking-{way}", condition=way) for way in ways}
            for name, found in measure(asked).items():
                if found["n"]:
                    low, high = found["ci95"]
                    limits = {f"looking_{name}_low": low, f"looking_{name}_high": high}
                    metrics |= {f"looking_{name}": found["value"], **limits}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _looking_records(self) -> list[Record]:
        """Of those held-out records that have another group's image of their modality, as many as are asked for."""
        if not self.config.log.looking_every:
            return []
        groups: dict[Any, set[str]] = {}
        for record in self.donors:
            groups.setdefault((record.modality, len(record.images)), set()).add(record.group)
        possible = [record for record in self.donors if len(groups[record.modality, len(record.images)]) > 1]
        if not possible:
            raise MedR1Error(
                "log.looking_every: no held-out record has another image of its modality to show; set it to 0, or hold"
                " out more (data.test_fraction)"
            )
        seed, num = self.config.data.split_seed, min(self.config.log.looking_records, len(possible))
        chosen = random.Random(seed).sample(possible, num)
        as_shown(chosen, "shuffled", seed, self.donors)  # now, rather than at the first measurement
        return chosen

    def _held_out(self, records: list[Record], name: str, condition: str = "image") -> list[Row]:
        """Rows of held-out records, kept as NAME-step-N.jsonl.

        Each process answers its share into a file of its own; process 0 joins them.
        """
        rank, world, step = self.args.process_index, self.args.world_size, self.state.global_step
        share = records[rank::world]
        path = self.out / f"{name}-step-{step}.jsonl"
        part = path if world == 1 else path.with_suffix(f".{rank}.jsonl")
        fingerprint = weights_fingerprint(self.vlm.model)
        with self.whole_weights():
            rows = agree(lambda: self._answer(share, part, fingerprint, condition) if share else [])
        parts = gather(rows)
        rows = [parts[place % world][place // world] for place in range(len(records))]
        if world > 1:
            agree(lambda: write_jsonl(path, rows) if self.is_world_process_zero() else None)
            part.unlink(missing_ok=True)
        return rows

    def _answer(self, records: list[Record], out: Path, fingerprint: str, condition: str) -> list[Row]:
        with self.naming_step(self.state.global_step, records):
            return evaluate(
                self.vlm,
                records,
                mode=self.config.rollout.mode,
                out=out,
                max_new_tokens=self.config.rollout.max_new_tokens,
                condition=condition,
                seed=self.config.data.split_seed,
                donors=self.donors or None,
                fingerprint=fingerprint,
            )

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within this block every process holds all weights, and may call the model as often as it likes.

        Sampling and evaluation take another number of calls in each process; a sharded layer would wait in each call
        for the others. So weights are gathered once for all tokens, at the cost of one copy of them in their
        computing precision.
        """
        layers = [module for module in cast(nn.Module, self.vlm.model).modules() if isinstance(module, FSDPModule)]
        if layers:  # else the first part that is called by itself, such as the vision tower, is taken for the whole
            layers[0]._get_fsdp_state()._lazy_init()
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in layers:
                layer.reshard()
                layer.set_reshard_after_forward(True, recurse=False)

    @contextlib.contextmanager
    def last_of_step(self, model: nn.Module, last: bool) -> Iterator[None]:
        """One of a step's backward passes: gradients are summed over processes after the last.

        A sharded model sums each time, since a process has no room for whole gradients.
        """
        if self.is_deepspeed_enabled:  # it takes its optimizer step within the backward pass
            self.accelerator.gradient_state._set_sync_gradients(last)
        with contextlib.nullcontext() if last or self.is_sharded else self.accelerator.no_sync(model):
            yield

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return RecordOrder(self.order, self.num_steps, self.config.optimizer.prompts_per_step, self.repeats)

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:
        return None  # losses are already whole: their denominator is counted in training_step

    def _forget_after(self, step: int) -> None:
        """Cut the logs back to a checkpoint, so that a resumed run writes each step once, and its end at its end.

        Other files in the folder, such as answers that `medr1 eval` wrote there, are the user's.
        """
        if not self.is_world_process_zero():
            return
        for path in self.out.glob("*.jsonl"):
            if held_out := HELD_OUT.fullmatch(path.name):
                if int(held_out[1]) > step:
                    path.unlink()
            elif path.name in (LOG, COMPLETIONS):
                rows = [row for row in read_jsonl(path) if row["step"] <= step and "train_loss" not in row]
                if not step:  # what was measured before the first step is measured again
                    rows = [row for row in rows if "looking_reliance" not in row]
                write_jsonl(path, rows)

    def _load_weights(self, checkpoint: str) -> None:
        """Weights of a checkpoint, before anything wraps or shards the model.

        Trainer's own way reads the file's names literally, and a Qwen2-VL file bears other names than the module: it
        would warn, load nothing, and go on from the base model (transformers 5.24).
        """
        if self.config.model.lora_rank:
            set_peft_model_state_dict(self.vlm.model, load_peft_weights(checkpoint, device="cpu"))
        else:
            core = self.vlm.core
            core.load_state_dict(type(core).from_pretrained(checkpoint, dtype=core.dtype).state_dict())
        self.sums_before = json.loads((Path(checkpoint) / SUMS).read_text(encoding="utf-8"))
        self.load_more(Path(checkpoint))

    def save_more(self, folder: Path) -> None:
        """Write into a checkpoint what a method has to keep beside weights and optimizer; process 0 alone."""

    def load_more(self, folder: Path) -> None:
        """Take up again what `save_more` wrote."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """`run` has done it."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._write_folder(self.out / f"checkpoint-{self.state.global_step}", training_state=True)
        if self.is_world_process_zero():
            rotate_checkpoints(output_dir=str(self.out), save_total_limit=self.args.save_total_limit)

    def _write_folder(self, folder: Path, *, training_state: bool, dtype: torch.dtype | None = None) -> None:
        """The whole model, and with `training_state` all that a run needs to go on from here; `dtype` rounds weights.

        Written aside and renamed when every process has written its part: a full disk or a kill leaves older folders
        as they are. Weights that are not finite are not written.
        """
        agree(self._refuse_not_finite)
        sums = self._sums_so_far() if training_state else None
        weights = self._gathered_weights() if self.is_sharded else None
        optimizer = self._optimizer_state() if training_state and not self.is_deepspeed_enabled else None
        first, hidden = self.is_world_process_zero(), folder.parent / f".{folder.name}.saving"
        staging = hidden / folder.name

        def clean() -> None:
            if first:
                shutil.rmtree(hidden, ignore_errors=True)

        def write() -> None:
            if first:
                rounded = _rounded(weights or cast(nn.Module, self.model).state_dict(), dtype) if dtype else weights
                self._save(str(staging), state_dict=rounded)
                if self.config.model.lora_rank:  # an adapter folder that loads by itself
                    self.vlm.processor.save_pretrained(staging)
                    if four_bit.is_four_bit(self.vlm.core):  # says what its base was
                        self.vlm.core.config.save_pretrained(staging)
            if training_state:
                if self.is_deepspeed_enabled:  # its own files, for as many processes
                    cast(Any, self.model_wrapped).save_checkpoint(str(staging))
                elif first:
                    torch.save(optimizer, staging / OPTIMIZER_NAME)
                if first:
                    torch.save(self._schedule.state_dict(), staging / SCHEDULER_NAME)
                    self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
                    write_atomic(staging / SUMS, to_json(sums))
                    self.save_more(staging)
                self._save_rng_state(str(staging))

        def put_in_place() -> None:
            if first:
                if training_state:
                    seal(staging)
                shutil.rmtree(folder, ignore_errors=True)
                staging.replace(folder)

        agree(clean)
        try:
            agree(disk_errors(folder, RESUME)(write))
            agree(disk_errors(folder, RESUME)(put_in_place))
        finally:
            clean()

    def _refuse_not_finite(self) -> None:
        parameters = cast(nn.Module, self.vlm.model).named_parameters()
        name = first_not_finite((name, weight) for name, weight in parameters if weight.requires_grad)
        if name:
            ids = [record.id for record in self.step_records]
            raise MedR1Error(self.stopped(self.state.global_step, f"its update left {name} not finite", ids))

    def _sums_so_far(self) -> dict[str, Any]:
        """Ours and Trainer's, these under the names of its fields; over all processes."""
        losses = gather(float(self._tr_loss))
        return {
            "sums": self._gathered_sums(),
            "_tr_loss": sum(losses) / len(losses),
            "_total_loss_scalar": self._total_loss_scalar,
            "_globalstep_last_logged": self._globalstep_last_logged,
        }

    def _gathered_weights(self) -> dict[str, Tensor]:
        """Whole weights of a sharded model by name, in process 0."""
        weights = self.accelerator.get_state_dict(self.model_wrapped) or {}
        names: dict[nn.Parameter, str] = {}
        for name, parameter in cast(nn.Module, self.model).named_parameters(remove_duplicate=False):
            first = names.setdefault(parameter, name)
            if first in weights:  # one tensor, such as a head that is also the embedding, is saved once
                weights[name] = weights[first]
        return weights

    def _optimizer_state(self) -> dict[str, Any]:
        """The optimizer's whole state by parameter name, in process 0; whatever holds it, one process or many."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.vlm.model, self._bare_optimizer, options=options)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        # Mapped, not read, on its way to a GPU: the processes of a machine share one copy, and each takes its part.
        mapped = self.args.device.type != "cpu"
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=mapped)
        set_optimizer_state_dict(
            self.vlm.model, self._bare_optimizer, state, options=StateDictOptions(full_state_dict=True)
        )
        schedule = cast(torch.optim.lr_scheduler.LambdaLR, self._schedule)
        schedule.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        # What was stored is the rate of the length that the run had then; of the same length it is the same to the bit.
        schedule._last_lr = [
            rate * factor(schedule.last_epoch)
            for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self._bare_optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    @property
    def _schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        assert self.lr_scheduler is not None, "made before the first step"
        return self.lr_scheduler

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        optimizer = cast(Any, self.optimizer)
        return getattr(optimizer, "optimizer", optimizer)


class _TakeUpSums(TrainerCallback):
    """Log lines of a run that was resumed cover the steps that they would have covered without a break."""

    def __init__(self, trainer: RecordTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.sums_before is None:
            return
        before = trainer.sums_before
        trainer.sums = before["sums"] if state.is_world_process_zero else {}
        trainer._tr_loss = torch.tensor(before["_tr_loss"], device=args.device)
        trainer._total_loss_scalar = before["_total_loss_scalar"]
        trainer._globalstep_last_logged = before["_globalstep_last_logged"]


class _Look(TrainerCallback):
    """Has the trainer measure whether the policy looks: before the first step, and at each step that is due."""

    def __init__(self, trainer: RecordTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step % self.trainer.config.log.looking_every == 0


class _DryStep(TrainerCallback):
    """The dry step of a run that begins, once all is in its place."""

    def __init__(self, trainer: RecordTrainer, *, ends: bool = False) -> None:
        self.trainer, self.ends = trainer, ends
        self.measured: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.measured = dry_step(self.trainer, self.trainer.train_records)
        if self.ends:
            raise DryRunEndsError


def _refuse(message: str) -> None:
    raise MedR1Error(message)


def _refuse_rounding(vlm: VLM) -> None:
    """At a usual rate nearly every update is less than half a step of bfloat16: the run would end where it began."""
    for parameter in vlm.model.parameters():
        if parameter.requires_grad and torch.finfo(parameter.dtype).bits < 32:
            name = str(parameter.dtype).removeprefix("torch.")
            raise MedR1Error(
                f"{vlm.name}: its weights are in {name}, where updates are rounded away; load them in float32 (products"
                " may still be in bfloat16, model.dtype), or train an adapter"
            )


def _rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floats in this type, in main memory; a tensor of two names, such as a head that is also the embedding, is one."""
    kept: dict[int, Tensor] = {}
    for weight in weights.values():
        if weight.data_ptr() not in kept:
            kept[weight.data_ptr()] = (weight.to(dtype) if weight.is_floating_point() else weight).cpu()
    return {name: kept[weight.data_ptr()] for name, weight in weights.items()}


class RecordOrder(Sampler[int]):
    """Indices of `num_steps` batches, from an endless order of records.

    Each batch of `batch` indices comes `repeats` times in a row (several updates on one set of rollouts).

    Args:
        order: begins the order; it is the same each time.
    """

    def __init__(self, order: Callable[[], Iterator[int]], num_steps: int, batch: int, repeats: int) -> None:
        self.order, self.num_steps, self.batch, self.repeats = order, num_steps, batch, repeats

    def __len__(self) -> int:
        return self.num_steps * self.batch

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for step in range(self.num_steps):
            if step % self.repeats == 0:
                indices = [next(order) for _ in range(self.batch)]
            yield from indices
