"""What a GRPO step learns from: completions of its prompts, sampled, rewarded, and compared within their groups.

A round samples some prompts and rewards what comes of it. A step has one, and with `draws.redraws` more of them, for
the prompts whose completions all earned the same.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor

from medr1.config import Config
from medr1.data.answers import Answer, format_ok, is_correct, read_answer
from medr1.data.records import Record, to_json, write_atomic
from medr1.errors import MedR1Error
from medr1.policy.drafts import Drafts
from medr1.policy.encoding import FeatureCache, PromptBatch, with_vision_features
from medr1.policy.rollouts import Rollout, sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, evaluating
from medr1.processes import agree, gather, tell
from medr1.training.base import RecordTrainer
from medr1.training.draws import Draws, stratum
from medr1.training.folder import COMPLETIONS, LOG
from medr1.training.looking import (
    OF_POLICY,
    OtherView,
    choices,
    consistency,
    deciding_tokens,
    image_margins,
    of_policy,
)
from medr1.training.objective import group_advantages, group_deviation
from medr1.training.rewards import MAX_REWARD, Reward, is_of_step, load_rewards, rewards_of
from medr1.training.trackers import SendCompletions

if TYPE_CHECKING:
    from medr1.policy.rollouts_colocate import ColocatedVLLM
    from medr1.policy.rollouts_vllm import VLLMServer
    from medr1.training.ahead import Ahead
    from medr1.training.judge import Judge

AHEAD = "ahead.json"
"""In a checkpoint: what was sampled for the step after it, which a resumed run trains on as it is."""
DRAFTS = "drafts.json"
"""In a checkpoint: what next tokens are guessed from. Without it a resumed run would make other calls, whose rounding
could draw another token."""
DRAWS = "draws.json"
"""In a checkpoint: how far the run is in the order of its records, and how often each was answered right."""
TRACEBACK = "reward-error.txt"
"""What a reward of the user's own raised."""
WEIGHTS = "vllm-weights"
"""The folder from which a vLLM server reads the policy before each step."""


@dataclass(frozen=True)
class Experience:
    """The sampled and rewarded groups of one step on one process."""

    records: list[Record]
    """As they were asked."""
    prompts: PromptBatch
    rollout: Rollout
    advantages_BG: Tensor
    old_logp_NT: Tensor
    """Of the policy before the first update, which fills them in: a sampler's log-probs are of other kernels, and in
    bfloat16, or of a server, not quite the policy's."""
    ref_logp_NT: Tensor
    """Of the reference, which the first update asks once for all; zeros without one."""
    other: OtherView | None
    """Another image for each prompt, where the objective asks for one."""


@dataclass(frozen=True)
class Group:
    """A prompt's completions and what they earned."""

    record: Record
    rollout: Rollout
    parts: dict[str, list[float | None]]
    """Of each completion by each reward."""
    rewards_G: Tensor
    """Their weighted sums, NaN where none applies."""
    redraw: int
    """How many records had been drawn for this prompt's place in the step before it."""

    @cached_property
    def answers(self) -> list[Answer]:
        return [read_answer(text, self.record) for text in self.rollout.texts]

    @property
    def right(self) -> list[bool]:
        return [is_correct(answer, self.record) for answer in self.answers]

    @property
    def is_alike(self) -> bool:
        """Whether no completion earned more than another, so that the group teaches nothing."""
        return not group_advantages(self.rewards_G[None], scale="none").any()


class CollectingTrainer(RecordTrainer):
    """Collects an `Experience` of each step's records; see `RecordTrainer` for the arguments.

    Raises:
        MedR1Error: G = 1, or an unknown reward.
    """

    reads_prompts_once = False
    """Whether the policy pass goes on from where sampling has read the prompts."""

    def __init__(
        self,
        vlm: VLM,
        config: Config,
        train_records: Sequence[Record],
        test_records: Sequence[Record],
        output_dir: Path,
    ) -> None:
        judge = self._judge(config.grpo.judge, output_dir) if config.grpo.judge else None
        named: dict[str, Reward] = dict.fromkeys(OF_POLICY, of_policy)
        if judge:
            named["judge"] = judge
        self.rewards = load_rewards(config.grpo.rewards, named)
        self.looks = config.grpo.perception > 0 or config.grpo.hold_to_chance > 0
        self.reads_reasoning = "consistency" in config.grpo.rewards
        if self.reads_reasoning and config.rollout.mode != "think":
            raise MedR1Error(
                f"grpo.rewards: consistency reads the reasoning before an answer, and rollout.mode ="
                f" {config.rollout.mode!r} has none; set it to think, or leave the reward out"
            )
        if config.rollout.num_completions < 2:
            raise MedR1Error("rollout.num_completions is 1, and GRPO compares completions of one prompt; set 2 or more")
        # The reference is the policy before training. With LoRA that is the model with its adapters off.
        needs_copy = (config.grpo.beta > 0 or self.reads_reasoning) and not config.model.lora_rank
        self.reference = copy.deepcopy(vlm.model).requires_grad_(False).eval() if needs_copy else None
        if self.reference is not None:
            if config.grpo.reference == "cpu":
                self.reference.cpu()
            elif config.grpo.reference == "bfloat16":  # weights alone: buffers such as rotary frequencies need more
                for weight in self.reference.parameters():
                    weight.data = weight.data.bfloat16()
        super().__init__(vlm, config, train_records, test_records, output_dir)
        self.features = FeatureCache()
        self.told_unscored = False
        if config.log.trackers and (every := config.log.completions_every):
            self.add_callback(
                SendCompletions(
                    every, train_records, self.as_asked, lambda: self.completions, self.callback_handler.callbacks
                )
            )
        if self.reference is not None and self.is_fsdp_enabled and config.grpo.reference != "cpu":
            if self.reads_reasoning and config.draws.redraws:
                raise MedR1Error(
                    "grpo.rewards: consistency asks a divided reference, which all processes wait for; draws.redraws"
                    " asks in some; set grpo.reference to cpu, or leave one of the two out"
                )
            self.reference = fsdp2_prepare_model(self.accelerator, self.reference)
        self.server = None if config.rollout.engine == "local" else self._connect()
        self.ahead = self._ahead() if config.rollout.ahead else None
        self.drafts = Drafts() if config.rollout.drafts and self.server is None else None
        self.draws: Draws | None = None
        if config.draws.redraws or config.draws.curriculum:
            self.draws = Draws(train_records, self.order, config.optimizer.seed)
        states = {AHEAD: self.ahead, DRAFTS: self.drafts, DRAWS: self.draws}
        self.kept = {name: kept for name, kept in states.items() if kept is not None}
        if judge and self.is_world_process_zero():
            judge.measure(train_records, config.grpo.judge_agreement, config.optimizer.seed)

    @staticmethod
    def _judge(name: str, output_dir: Path) -> "Judge":
        from medr1.training.judge import FOLDER, Judge  # needs the openai client

        return Judge(name, output_dir / FOLDER)

    @property
    def sends(self) -> bool:
        """Whether servers get weights from GPU to GPU."""
        rollout = self.config.rollout
        return rollout.engine == "vllm" and rollout.vllm_transfer == "nccl" and not self.config.model.lora_rank

    def _connect(self) -> "VLLMServer | ColocatedVLLM":
        rollout = self.config.rollout
        if rollout.engine == "vllm":
            from medr1.policy.rollouts_vllm import VLLMServer  # needs the openai client

            if self.sends and self.is_sharded:
                raise MedR1Error(
                    "rollout.vllm_transfer = nccl sends whole weights, and these are divided; set it to files"
                )
            return VLLMServer(
                self.vlm,
                rollout.vllm_url,
                self.out / WEIGHTS,
                mode=rollout.mode,
                lora=self.config.model.lora_rank > 0,
                nccl=(torch.bfloat16 if self.args.bf16 else torch.float32) if self.sends else None,
            )
        from medr1.policy.rollouts_colocate import ColocatedVLLM

        return ColocatedVLLM(
            self.vlm,
            mode=rollout.mode,
            dtype="bfloat16" if self.args.bf16 else "float32",
            memory=rollout.vllm_memory,
            tensor_parallel=rollout.vllm_tensor_parallel,
        )

    def _ahead(self) -> "Ahead":
        from medr1.training.ahead import Ahead  # needs the openai client

        if self.is_deepspeed_enabled:
            raise MedR1Error(
                "rollout.ahead holds completions against the weights before they change, and DeepSpeed changes these"
                " within the backward pass; set it to 0, or use configs/accelerate/fsdp2.yaml"
            )
        return Ahead(cast("VLLMServer", self.server), self.order, self.config.optimizer.prompts_per_step)

    def run(self, *, dry_step: bool = False) -> None:
        super().run(dry_step=dry_step)
        if self.server:
            self.server.close()
            if self.is_world_process_zero():
                shutil.rmtree(self.out / WEIGHTS, ignore_errors=True)

    def collect(self, records: list[Record]) -> Experience:
        """Sample, reward and compare G completions of each record; write those of all processes down.

        Records are those of the step, or with `Draws` the next ones, drawn as often as it takes.
        """
        server, step = self.server, self.state.global_step
        self.weights_step = self.ahead.weights_step if self.ahead and self.ahead.replies else step
        if self.config.rollout.engine == "vllm" and not self.sends:
            # In what the policy computes in, as a server in the same type would round them.
            rounded = self.args.bf16 and not self.config.model.lora_rank
            self._write_folder(self.out / WEIGHTS, training_state=False, dtype=torch.bfloat16 if rounded else None)
        if server:
            agree(lambda: server.push(step, load=self.is_world_process_zero()))
        prompts, rollout, groups, thrown = self._drawn(records)
        records = [group.record for group in groups]
        other = agree(lambda: self._other_view(records, rollout)) if self.looks else None
        advantages_BG = self._advantages(torch.stack([group.rewards_G for group in groups]), records)
        used = [self._rows(*pair) for pair in zip(groups, advantages_BG, strict=True)]
        unused = [self._rows(group, torch.zeros_like(group.rewards_G)) for group in thrown]
        parts = gather((used, unused))
        self.completions = [row for used, _ in parts for rows in used for row in rows]
        if self.config.draws.redraws:
            rest = sorted(
                (row for _, unused in parts for rows in unused for row in rows), key=lambda row: row["redraw"]
            )
            self.completions = [{**row, "used": True} for row in self.completions]
            self.completions += [{**row, "used": False} for row in rest]
        self._tell_unscored()
        self.first_appends(COMPLETIONS, self.completions)
        zeros_NT = torch.zeros_like(rollout.logp_NT)
        device = prompts.input_ids_BP.device
        return Experience(records, prompts, rollout, advantages_BG.to(device), zeros_NT, zeros_NT.clone(), other)

    def _drawn(self, records: list[Record]) -> tuple[PromptBatch, Rollout, list[Group], list[Group]]:
        """This process's prompts of a step, their completions, and these by group; then the groups thrown away.

        Each place of the step that has a group without a difference is drawn for again, and sampled by the process
        that has it: so all have as many prompts, and any number of processes draws the same.
        """
        draws, rank, count = self.draws, self.args.process_index, len(records)
        first, thrown = rank * count, list[Group]()
        if draws is None:
            prompts, rollout, groups = self._round(records, range(first, first + count), 0)
            assert prompts is not None and rollout is not None
            return prompts, rollout, groups, thrown
        before = draws.drawn, draws.left_aside
        rate = self._wanted_rate()
        indices = draws.take(self.args.world_size * count, rate)[first : first + count]
        prompts, rollout, groups = self._round(self._at(indices), range(first, first + count), 0, indices)
        for redraw in range(1, self.config.draws.redraws + 1):
            alike = [place for place, group in enumerate(groups) if group.is_alike]
            counts = gather(len(alike))
            if not any(counts):
                break
            indices = draws.take(sum(counts), rate)[sum(counts[:rank]) :][: len(alike)]
            _, _, fresh = self._round(self._at(indices), [first + place for place in alike], redraw, indices)
            for place, group in zip(alike, fresh, strict=True):
                thrown.append(groups[place])
                groups[place] = group
            prompts = rollout = None
        if prompts is None or rollout is None:
            prompts = agree(lambda: self._read([group.record for group in groups]))
            rollout = Rollout.joined([group.rollout for group in groups], self.vlm.pad_token_id)
        self.add_to_log({"used": count, "thrown_away": len(thrown)})
        if self.is_world_process_zero():
            self.add_to_log({"drawn": draws.drawn - before[0], "left_aside": draws.left_aside - before[1]})
        return prompts, rollout, groups, thrown

    @property
    def num_drawn(self) -> int:
        return self.draws.drawn if self.draws else super().num_drawn

    def _at(self, indices: Sequence[int]) -> list[Record]:
        return [self.train_records[index] for index in indices]

    def _wanted_rate(self) -> float | None:
        """The pass rate near which this step draws its prompts."""
        rates = self.config.draws.curriculum
        return rates[0] + (rates[-1] - rates[0]) * self.state.global_step / self.num_steps if rates else None

    def _round(
        self, records: list[Record], places: Sequence[int], redraw: int, indices: Sequence[int] = ()
    ) -> tuple[PromptBatch | None, Rollout | None, list[Group]]:
        """Prompts, completions, and these by group with what they earned; of no records, which a redraw may have, None.

        Args:
            places: of these prompts among those of the whole step.
            redraw: rounds of the step before this one.
            indices: of the records, for `Draws.learn`.
        """
        records = [self.as_asked(record, self.state.global_step + 1) for record in records]
        with self.whole_weights():
            prompts = agree(lambda: self._prompts(records) if records else None)
            rollout = agree(lambda: self._sample(records, prompts, places, redraw) if prompts else None)
            agree(self._ask_ahead)
            parts = agree(lambda: self._rewards_of_policy(records, rollout))
        num_completions = self.config.rollout.num_completions
        owners = [record for record in records for _ in range(num_completions)]
        parts = self._reward(rollout.texts if rollout else [], owners, parts)
        rewards_BG = agree(lambda: self._weighted(parts))
        if self.drafts is not None:
            for tokens, guesses in gather((rollout.tokens, rollout.guesses) if rollout else ([], {})):
                self.drafts.learn(tokens, guesses)
        groups = []
        for place, record in enumerate(records):
            assert rollout is not None
            rows = slice(place * num_completions, (place + 1) * num_completions)
            values = {name: of_all[rows] for name, of_all in parts.items()}
            groups.append(Group(record, rollout.select(rows), values, rewards_BG[place], redraw))
        self._log_groups(groups)
        if self.draws and self.config.draws.curriculum:
            told = [(index, sum(group.right), num_completions) for index, group in zip(indices, groups, strict=True)]
            for part in gather(told):
                for index, right, replies in part:
                    self.draws.learn(index, right, replies)
        return prompts, rollout, groups

    def save_more(self, folder: Path) -> None:
        for name, kept in self.kept.items():
            write_atomic(folder / name, to_json(kept.state()))

    def load_more(self, folder: Path) -> None:
        for name, kept in self.kept.items():
            kept.load(json.loads((folder / name).read_text(encoding="utf-8")))

    def _tell_unscored(self) -> None:
        """Say once that no reward applied to a reply, which may be meant and may be a mistake in them."""
        row = next((row for row in self.completions if row["reward"] is None), None)
        if row and not self.told_unscored:
            self.told_unscored = True
            tell(
                f"step {row['step']}: every reward gave None for a reply to record {row['id']}, which is left out of"
                f" its group; {LOG} counts such replies as unscored_rate"
            )

    def _read(self, records: list[Record]) -> PromptBatch:
        return with_vision_features(self.vlm, self.encode(records), self.features)

    def _prompts(self, records: list[Record]) -> PromptBatch:
        """As `_read`, or as they were asked a step ahead."""
        if not (self.ahead and self.ahead.replies and self.ahead.asked):
            return self._read(records)
        asked, prompts, _ = self.ahead.asked
        assert asked == records, "a step has the next records of the order"
        return prompts

    def _sample(self, records: list[Record], prompts: PromptBatch, places: Sequence[int], redraw: int) -> Rollout:
        step = self.state.global_step
        if self.ahead and self.ahead.replies:
            size = len(records) * self.config.rollout.num_completions
            replies, self.ahead.replies = self.ahead.replies[self.args.process_index * size :][:size], ()
            return self.ahead.server.rollout(prompts, replies)
        settings = self._settings(step, places, redraw)
        if self.server is None:
            # Autocast around all of it, so that each weight is cast once, not for each token.
            with self.naming_step(step + 1, records), self.accelerator.autocast():
                return sample(self.vlm, prompts, keep_prefill=self.reads_prompts_once, drafts=self.drafts, **settings)
        return self.server.sample(records, prompts, **settings)

    def _settings(self, step: int, places: Sequence[int] = (), redraw: int = 0) -> dict[str, Any]:
        """How a step is sampled, by this process or a server.

        Each step has a stream of draws of its own, so that a resumed run samples what it would have sampled; later
        rounds have one for each place of them, so that any number of processes samples the same.
        """
        config = self.config
        of_step = (config.optimizer.seed * 1_000_003 + step) * 1_009
        seed: int | list[int] = of_step
        if redraw:
            shape = config.draws.redraws, config.optimizer.prompts_per_step
            of_places = torch.randint(2**31, shape, generator=torch.Generator().manual_seed(of_step + 1))
            seed = of_places[redraw - 1, list(places)].tolist()
        return {
            "num_completions": config.rollout.num_completions,
            "max_new_tokens": config.rollout.max_new_tokens,
            "temperature": config.rollout.temperature,
            "seed": seed,
            "part": (self.args.process_index, self.args.world_size),
        }

    def _ask_ahead(self) -> None:
        """Begin to sample the next step, by the weights that this one begins with."""
        step, count = self.state.global_step + 1, self.args.per_device_train_batch_size
        if self.ahead is None or step == self.num_steps:
            return
        indices = self.ahead.indices(step)[self.args.process_index * count :][:count]
        records = [self.as_asked(record, step + 1) for record in self._at(indices)]
        self.ahead.begin(records, self._read(records), self._settings(step))

    def _other_view(self, records: list[Record], rollout: Rollout) -> OtherView:
        """Another image for each prompt, and what of the completions is asked under it."""
        num_completions, seed = self.config.rollout.num_completions, self.config.optimizer.seed
        owners = [record for record in records for _ in range(num_completions)]
        controls = [self.images.control(record, f"{seed} {self.state.global_step}") for record in records]
        shown = [control or record for control, record in zip(controls, records, strict=True)]
        device = rollout.mask_NT.device
        has_other_N = torch.tensor([control is not None for control in controls]).repeat_interleave(num_completions)
        said = None
        if self.config.grpo.hold_to_chance:
            said = choices(self.vlm, rollout.tokens, owners)
            said.chosen_N[~has_other_N] = -1
            said.mask_KT[~has_other_N.repeat_interleave(len(said.mask_KT) // len(owners))] = False
            said = said.to(device)
        return OtherView(self._read(shown), rollout.mask_NT & has_other_N.to(device)[:, None], said)

    def _rewards_of_policy(self, records: list[Record], rollout: Rollout | None) -> dict[str, list[float | None]]:
        """Those rewards that take the policy, or its reference, to tell."""
        owners = [record for record in records for _ in range(self.config.rollout.num_completions)]
        parts: dict[str, list[float | None]] = {name: [] for name in OF_POLICY if name in self.config.grpo.rewards}
        if rollout is not None and "image_margin" in parts:
            other = self._other_view(records, rollout)
            with evaluating(self.vlm.model), torch.no_grad(), self.accelerator.autocast():
                other_logp_NT, _ = completion_logprobs(
                    self.vlm,
                    other.prompts,
                    rollout.completion_ids_NT,
                    other.mask_NT,
                    temperature=self.config.rollout.temperature,
                )
            decides_NT = deciding_tokens(self.vlm, rollout.tokens, owners).to(other.mask_NT.device) & other.mask_NT
            margins = image_margins(rollout.texts, owners, rollout.logp_NT, other_logp_NT, decides_NT)
            has_other = other.mask_NT.any(1).tolist()
            parts["image_margin"] = [margin if has else None for margin, has in zip(margins, has_other, strict=True)]
        if rollout is not None and "consistency" in parts:
            with self._reference() as reader:
                parts["consistency"] = consistency(reader, rollout.texts, owners, self.config.optimizer.seed)
        return parts

    def _reward(
        self, texts: list[str], owners: list[Record], known: dict[str, list[float | None]]
    ) -> dict[str, list[float | None]]:
        """What each reward gives for each reply of this process, beside what is known already.

        Those of a whole step are called by process 0, with the replies of all processes in the order of the step.
        """
        asked = [reward for reward in self.rewards if reward[0] not in known]
        whole = [reward for reward in asked if is_of_step(reward[1])]
        single = [reward for reward in asked if reward not in whole]
        parts = known | agree(lambda: self._ask(single, texts, owners))
        if whole:
            step = gather((texts, owners))
            everything = [reply for part in step for reply in part[0]], [record for part in step for record in part[1]]
            given = gather(agree(lambda: self._ask(whole, *everything) if self.is_world_process_zero() else {}))[0]
            first = sum(len(part[0]) for part in step[: self.args.process_index])
            parts |= {name: values[first : first + len(texts)] for name, values in given.items()}
        return {name: parts[name] for name, _, _ in self.rewards}

    def _ask(
        self, rewards: list[tuple[str, Reward, float]], texts: list[str], owners: list[Record]
    ) -> dict[str, list[float | None]]:
        mode = self.config.rollout.mode
        try:
            return {name: rewards_of(name, reward, texts, owners, mode) for name, reward, _ in rewards}
        except MedR1Error as error:
            line = f"step {self.state.global_step + 1}: {error}"
            if error.__cause__:
                write_atomic(self.out / TRACEBACK, "".join(traceback.format_exception(error.__cause__)))
                line += f" (traceback in {self.out / TRACEBACK})"
            raise MedR1Error(line) from error

    def _weighted(self, parts: dict[str, list[float | None]]) -> Tensor:
        """The rewards' weighted sums (B, G) in float64.

        A reward that does not apply (None) adds nothing; NaN where none of them applies (as in TRL 1.16).
        """
        weights_R1 = torch.tensor([[weight] for _, _, weight in self.rewards], dtype=torch.float64)
        values_RN = torch.tensor(
            [[math.nan if value is None else value for value in values] for values in parts.values()],
            dtype=torch.float64,
        )
        rewards_N = (values_RN * weights_R1).nansum(0).masked_fill(values_RN.isnan().all(0), math.nan)
        if bool((rewards_N.abs() > MAX_REWARD).any()):
            raise MedR1Error(
                f"step {self.state.global_step + 1}: rewards times weights exceed {MAX_REWARD:.1g}; lower them"
            )
        num_completions = self.config.rollout.num_completions
        return rewards_N.view(len(rewards_N) // num_completions, num_completions)

    def _advantages(self, rewards_BG: Tensor, records: list[Record]) -> Tensor:
        """Of this process's groups, scaled by all groups of the step where the recipe says so."""
        scale = self.config.grpo.advantage_scale
        if scale in ("group", "none"):
            return group_advantages(rewards_BG, scale=scale).float()
        by = "off" if scale == "batch" else scale
        parts = gather((rewards_BG, [stratum(record, by) for record in records]))
        domains = [domain for _, part in parts for domain in part]
        numbers = {domain: number for number, domain in enumerate(dict.fromkeys(domains))}
        domain_B = torch.tensor([numbers[domain] for domain in domains])
        whole_BG = group_advantages(torch.cat([rewards for rewards, _ in parts]), scale="domain", domain_B=domain_B)
        first = sum(len(rewards) for rewards, _ in parts[: self.args.process_index])
        return whole_BG[first : first + len(records)].float()

    @contextlib.contextmanager
    def _reference(self) -> Iterator[VLM]:
        """The policy before training, computing in the precision of the policy."""
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                yield replace(self.vlm, model=self.reference)
        else:
            with evaluating(self.vlm.model), self.vlm.model.disable_adapter():  # type: ignore[operator]
                yield self.vlm

    def _log_groups(self, groups: list[Group]) -> None:
        """Add what was sampled to the log."""
        mode = self.config.rollout.mode
        for group in groups:
            self.add_to_log(
                {
                    "completions": len(group.answers),
                    "groups": 1,
                    "tokens": float(group.rollout.mask_NT.sum()),
                    "lag": len(group.answers) * (self.state.global_step - self.weights_step),
                    "reward": float(group.rewards_G.nansum()),
                    "scored": float((~group.rewards_G.isnan()).sum()),
                    "group_std": float(group_deviation(group.rewards_G[None])),
                    "zero_variance": float(group.is_alike),
                    "truncated": float((~group.rollout.finished_N).sum()),
                    "unparsed": sum(answer.outcome not in ("letter", "text") for answer in group.answers),
                    "format_ok": sum(format_ok(text, mode) for text in group.rollout.texts),
                    **{f"reward_{name}": sum(value or 0.0 for value in values) for name, values in group.parts.items()},
                    **{
                        f"given_{name}": sum(value is not None for value in values)
                        for name, values in group.parts.items()
                    },
                }
            )

    def _rows(self, group: Group, advantages_G: Tensor) -> list[dict[str, Any]]:
        """Of COMPLETIONS, one for each completion of a group."""
        record, rollout, config = group.record, group.rollout, self.config
        images = [os.path.relpath(path, self.out) for path in record.images]
        rewards, lengths = group.rewards_G.tolist(), rollout.mask_NT.sum(1).tolist()
        return [
            {
                "step": self.state.global_step + 1,
                **({"weights_step": self.weights_step} if self.server else {}),
                "id": record.id,
                "answer": record.answer,
                **({"images": images} if config.draws.exchanged_images else {}),
                "reply": rollout.texts[row],
                "outcome": group.answers[row].outcome,
                "letter": group.answers[row].letter,
                "tokens": lengths[row],
                "reward": None if math.isnan(rewards[row]) else round(rewards[row], 6),
                "rewards": {name: values[row] for name, values in group.parts.items()},
                "advantage": round(advantage, 6),
                **({"redraw": group.redraw} if config.draws.redraws else {}),
            }
            for row, advantage in enumerate(advantages_G.tolist())
        ]
