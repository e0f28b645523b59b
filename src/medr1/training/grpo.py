"""GRPO training: sample G completions a prompt, reward them, push the policy towards the better ones of each group.

One step: the prompts' images and texts are read once and G completions are decoded from them, each reply is rewarded,
advantages are taken within the group (`collecting`), and the clipped loss is formed (`objective`) from log-probs of
one packed row a prompt (`shared_prefix`). Groups whose rewards are all equal carry no gradient without a KL term:
their forward and backward are skipped, and they are counted.

    medr1 train --method grpo --model tiny --data phantoms --out runs/grpo
"""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from medr1.config import Config
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.policy.mismatch import Watch
from medr1.policy.rollouts import read_shared, sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM
from medr1.processes import agree, gather
from medr1.training.base import LOG
from medr1.training.collecting import CollectingTrainer, Experience
from medr1.training.looking import longest_choices
from medr1.training.objective import (
    above_chance,
    entropy_share,
    loss_denominator,
    perception_term,
    policy_loss,
    rollout_weights,
    row_means,
)

if TYPE_CHECKING:
    from medr1.training.ahead import Ahead

DIFFERENCE = "rollout_difference"
"""In the log: between the log-probs of a server and those of the policy that learns, which is newer one step ahead."""
WATCHED = "server_difference"
"""In the log, one step ahead: between the log-probs of a server and those of the weights that it was given."""

Gap = tuple[str, float, int]
"""Of a completion: who drew it, the sum of |log π - log μ| over its tokens, and their number."""


class _EnoughError(Exception):
    """Ends sampling."""


class GRPOTrainer(CollectingTrainer):
    """GRPO on records; see `RecordTrainer` for the arguments.

    Example:
        config = load_config(overrides={"model.name": "tiny", "optimizer.steps": 100})
        GRPOTrainer(load_vlm("tiny", dtype="float32"), config, train, test, Path("runs/grpo")).run()

    Raises:
        MedR1Error: as `CollectingTrainer`; checkpoints, or an end, that would fall between two updates on one set of
            rollouts.
    """

    def __init__(
        self,
        vlm: VLM,
        config: Config,
        train_records: Sequence[Record],
        test_records: Sequence[Record],
        output_dir: Path,
    ) -> None:
        self.repeats = config.grpo.num_iterations
        if config.log.save_every % self.repeats:
            raise MedR1Error(
                f"log.save_every = {config.log.save_every} is no multiple of grpo.num_iterations = {self.repeats};"
                " a checkpoint may not fall between updates on one set of rollouts"
            )
        if (steps := config.optimizer.steps) % self.repeats:
            raise MedR1Error(
                f"optimizer.steps = {steps} is no multiple of grpo.num_iterations = {self.repeats}; set it to"
                f" {steps + -steps % self.repeats}, so that the run does not end between updates on one set of rollouts"
            )
        super().__init__(vlm, config, train_records, test_records, output_dir)
        # Sampling reads the prompts with gradient, and the policy pass goes on from there, where one backward pass of
        # one unwrapped model follows. A dropout layer would make sampling's and training's reading differ.
        optimizer, model = config.optimizer, cast(nn.Module, self.vlm.model)
        dropout = getattr(self.vlm.core.config.get_text_config(), "attention_dropout", 0.0) > 0 or any(
            module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout)
        )
        whole = optimizer.prompts_per_forward in (0, optimizer.prompts_per_step)
        alone = self.args.world_size == 1 and not self.is_sharded and not optimizer.gradient_checkpointing
        self.reads_prompts_once = self.repeats == 1 and whole and alone and not (dropout or config.draws.redraws)
        self.reads_prompts_once &= self.server is None
        # A wrapped model takes one call for each backward pass.
        self.shares_images = alone and not self.vlm.not_shared

    @property
    def is_first_update(self) -> bool:
        """Whether the policy is still the one that this step's completions were sampled from."""
        return self.state.global_step % self.repeats == 0

    def learn(self, model: nn.Module, records: list[Record]) -> Tensor:
        """Sample (every `num_iterations`-th step), then one backward pass; the loss of the whole step, detached."""
        began = time.perf_counter()
        if self.is_first_update:
            self.experience = self.collect(records)
        self.step_records = self.experience.records
        model.train()
        loss = self._update(model, self.experience)
        if self.ahead and self.state.global_step + 1 < self.num_steps:
            self._arrive(model, self.ahead)
        world = self.args.world_size
        self.add_to_log({"steps": 1 / world, "seconds": (time.perf_counter() - began) / world})
        return loss

    def rehearse(self, model: nn.Module, records: list[Record]) -> None:
        """A step whose completions are as long as they may be and begin alike nowhere, and whose groups all have a
        difference."""
        rollout, server = self.config.rollout, self.server
        settings: dict[str, Any] = {"num_completions": rollout.num_completions, "seed": 0}
        calls = iter((False, True))

        def stop(ids_NT: Tensor) -> None:
            if next(calls):
                raise _EnoughError

        with self.whole_weights():
            prompts = agree(lambda: self._read(records))
            with self.accelerator.autocast():
                if server is None:  # a call over caches of full length
                    with contextlib.suppress(_EnoughError):
                        sample(self.vlm, prompts, max_new_tokens=rollout.max_new_tokens, on_step=stop, **settings)
                first = sample(self.vlm, prompts, max_new_tokens=1, keep_prefill=self.reads_prompts_once, **settings)
        barred = {*self.vlm.stop_token_ids, *self.vlm.banned_token_ids}
        tokens = (token for token in range(len(self.vlm.tokenizer)) if token not in barred)
        ids_G = torch.tensor([*islice(tokens, rollout.num_completions)], device=first.completion_ids_NT.device)
        ids_NT = ids_G.repeat(len(records))[:, None].repeat(1, rollout.max_new_tokens)
        zeros_NT = first.logp_NT.new_zeros(ids_NT.shape)
        full = replace(
            first,
            completion_ids_NT=ids_NT,
            mask_NT=torch.ones_like(ids_NT, dtype=torch.bool),
            logp_NT=zeros_NT,
            finished_N=torch.ones_like(first.finished_N),
        )
        signs_G = 1 - 2 * (torch.arange(rollout.num_completions, device=ids_NT.device) % 2)
        advantages_BG = signs_G.float().expand(len(records), -1)
        try:
            self.server = None  # whose log-probs these are not
            other = self._other_view(records, full) if self.looks else None
            if other is not None and other.choices is not None:
                owners = [record for record in records for _ in range(rollout.num_completions)]
                longest = longest_choices(self.vlm, full.tokens, owners)
                other = replace(other, choices=longest.to(ids_NT.device))
            self._update(
                model, Experience(records, prompts, full, advantages_BG, zeros_NT.clone(), zeros_NT.clone(), other)
            )
        finally:
            self.server = server

    def _update(self, model: nn.Module, experience: Experience) -> Tensor:
        config, objective = self.config, self.config.grpo
        num_completions, temperature = config.rollout.num_completions, config.rollout.temperature
        mask_NT = experience.rollout.mask_NT
        if objective.mask_truncated:  # arXiv:2503.14476, section 3.4
            mask_NT = mask_NT & experience.rollout.finished_N[:, None]
        denominator = loss_denominator(mask_NT, objective.aggregate, config.rollout.max_new_tokens)
        always = objective.beta > 0 or objective.entropy_bonus > 0 or self.looks
        learns_N = (experience.advantages_BG.flatten() != 0) | always
        carries_B = (learns_N & mask_NT.any(1)).view(-1, num_completions).any(1)
        told = gather((denominator, float(mask_NT.sum()), int(carries_B.sum())))
        denominator, num_tokens, _ = map(sum, zip(*told, strict=True))
        most = max(count for _, _, count in told)
        # Every process makes the same calls of a wrapped model: those with fewer groups to learn from take others too,
        # with nothing scored.
        indices = (~carries_B).to(torch.uint8).argsort(stable=True)[:most].tolist()
        if len(indices) < len(experience.prompts):  # what is learned from is read again, without the others
            experience = self.experience = replace(experience, rollout=replace(experience.rollout, prefill=None))
        size = config.optimizer.prompts_per_forward or len(indices)
        chunks = [indices[start : start + size] for start in range(0, len(indices), size or 1)]
        total = torch.zeros((), device=mask_NT.device)
        gaps: list[Gap] = []
        for number, chunk in enumerate(chunks):
            rows = torch.cat([torch.arange(b * num_completions, (b + 1) * num_completions) for b in chunk])
            prompts, prefill = experience.prompts, experience.rollout.prefill
            if prefill is None:
                prompts = prompts.select(chunk)
                prefill = read_shared(self.vlm, prompts) if self.shares_images else None
            rows_mask_NT = mask_NT[rows] & carries_B[chunk].repeat_interleave(num_completions)[:, None]
            part = rows, slice(max(1, int(rows_mask_NT.sum(1).max())))  # of these rows no more than their longest
            rows_mask_NT = rows_mask_NT[:, part[1]]
            ids_NT = experience.rollout.completion_ids_NT[part]
            with self.last_of_step(model, number + 1 == len(chunks)):
                if objective.beta > 0 and self.is_first_update:
                    with self._reference() as reference:
                        asked, there = prompts, reference.device
                        if there != ids_NT.device:
                            asked = replace(prompts, features=None).to(there)
                        ref_logp_NT, _ = completion_logprobs(
                            reference,
                            asked,
                            ids_NT.to(there),
                            rows_mask_NT.to(there),
                            temperature=temperature,
                            prefill=read_shared(reference, asked) if self.shares_images else None,
                        )
                        experience.ref_logp_NT[part] = ref_logp_NT.to(ids_NT.device)
                logp_NT, entropy_NT = completion_logprobs(
                    self.vlm,
                    prompts,
                    ids_NT,
                    rows_mask_NT,
                    temperature=temperature,
                    entropy="gradient" if objective.entropy_bonus or objective.perception_entropy else True,
                    model=model,
                    prefill=prefill,
                )
                if self.is_first_update:
                    experience.old_logp_NT[part] = logp_NT.detach()
                weight_NT = None
                if self.server:
                    weight_NT, mismatch = rollout_weights(
                        experience.old_logp_NT[part],
                        experience.rollout.logp_NT[part],
                        rows_mask_NT,
                        cap=objective.rollout_ratio_cap,
                    )
                    samplers = [experience.rollout.samplers[row] for row in rows.tolist()]
                    difference_NT = experience.old_logp_NT[part] - experience.rollout.logp_NT[part]
                    gaps += _gaps(samplers, difference_NT, rows_mask_NT)
                    self.add_to_log({f"policy_{name}": value for name, value in mismatch.items()})
                loss, sums = policy_loss(
                    logp_NT,
                    None if self.is_first_update else experience.old_logp_NT[part],
                    experience.advantages_BG[chunk].flatten(),
                    rows_mask_NT,
                    denominator=denominator,
                    objective=objective.objective,
                    aggregate=objective.aggregate,
                    clip_low=objective.clip_low,
                    clip_high=objective.clip_high,
                    delta=objective.delta,
                    beta=objective.beta,
                    ref_logp_NT=experience.ref_logp_NT[part] if objective.beta > 0 else None,
                    kl_by_ratio=objective.kl_by_ratio,
                    kl_clamp=objective.kl_clamp,
                    weight_NT=weight_NT,
                )
                assert entropy_NT is not None
                if objective.entropy_bonus:
                    share = entropy_share(entropy_NT, rows_mask_NT, num_tokens=num_tokens)
                    loss = loss - objective.entropy_bonus * share
                if self.looks:
                    loss = loss + self._looking(model, experience, chunk, part, rows_mask_NT, logp_NT, entropy_NT)
                # DDP averages gradients over processes, and the denominator already counts them all.
                self.accelerator.backward(loss * self.args.world_size)
            self.add_to_log({f"policy_{name}": value for name, value in sums.items()})
            self.add_to_log({"policy_entropy": float(entropy_NT.detach().sum())})
            total += loss.detach()
        if self.server and self.is_first_update and not self.ahead:
            self._check(self.server, gaps)
        return total * self.args.world_size

    def _looking(
        self,
        model: nn.Module,
        experience: Experience,
        chunk: list[int],
        part: tuple[Tensor, slice],
        rows_mask_NT: Tensor,
        logp_NT: Tensor,
        entropy_NT: Tensor,
    ) -> Tensor:
        """What these prompts' completions cost by what they, or their answers, would be under another image.

        Args:
            rows_mask_NT: True at tokens that were scored under their own image; others have no part in this either.
        """
        objective, other = self.config.grpo, experience.other
        assert other is not None
        num_completions = self.config.rollout.num_completions
        num_rows = self.config.optimizer.prompts_per_step * num_completions
        loss = torch.zeros((), device=logp_NT.device)

        def asked(
            ids_NT: Tensor, mask_NT: Tensor, entropy: bool | Literal["gradient"] = False
        ) -> tuple[Tensor, Tensor | None]:
            prompts, temperature = other.prompts.select(chunk), self.config.rollout.temperature
            return completion_logprobs(
                self.vlm, prompts, ids_NT, mask_NT, temperature=temperature, entropy=entropy, model=model
            )

        if objective.perception:
            mask_NT = other.mask_NT[part] & rows_mask_NT
            other_logp_NT, other_entropy_NT = asked(
                experience.rollout.completion_ids_NT[part],
                mask_NT,
                "gradient" if objective.perception_entropy else False,
            )
            term, kl = perception_term(
                logp_NT, other_logp_NT, mask_NT, cap=objective.perception_cap, denominator=num_rows
            )
            loss = loss - objective.perception * term
            if other_entropy_NT is not None:
                entropy = row_means(entropy_NT + other_entropy_NT, mask_NT).sum() / num_rows
                loss = loss + objective.perception_entropy * entropy
            self.add_to_log({"other_kl": kl, "other_tokens": float(mask_NT.sum())})
        if (said := other.choices) is not None:
            rows, _ = part
            num_options = len(said.ids_KT) // len(said.chosen_N)
            rows_K = (rows[:, None] * num_options + torch.arange(num_options)).flatten()
            scored_N = rows_mask_NT.any(1)
            mask_KT = said.mask_KT[rows_K] & scored_N.repeat_interleave(num_options)[:, None]
            chosen_N = said.chosen_N[rows].masked_fill(~scored_N, -1)
            length = max(1, int((mask_KT * torch.arange(1, 1 + mask_KT.shape[1], device=mask_KT.device)).max()))
            option_logp_KT, _ = asked(said.ids_KT[rows_K, :length], mask_KT[:, :length])
            above, num_above = above_chance(
                option_logp_KT.sum(1).view(-1, num_options),
                mask_KT.any(1).view(-1, num_options),
                chosen_N,
                denominator=num_rows,
            )
            loss = loss + objective.hold_to_chance * above
            self.add_to_log({"above_chance": num_above, "other_rows": float((chosen_N >= 0).sum())})
        return loss

    def _arrive(self, model: nn.Module, ahead: "Ahead") -> None:
        """Wait for the next step's completions, and see that they are of the weights that the servers were given.

        The policy still has these. It is asked for the first prompts, one a server, which are shared out among them.
        """
        assert ahead.asked is not None
        _, prompts, asked = ahead.asked
        began = time.perf_counter()
        replies = agree(asked.result)
        self.add_to_log({"waited": (time.perf_counter() - began) / self.args.world_size})
        chosen = prompts.select(list(range(min(len(prompts), len(ahead.server.servers)))))
        rollout = ahead.server.rollout(chosen, replies[: len(chosen) * self.config.rollout.num_completions])
        with torch.no_grad():
            logp_NT, _ = completion_logprobs(
                self.vlm,
                chosen,
                rollout.completion_ids_NT,
                rollout.mask_NT,
                temperature=self.config.rollout.temperature,
                model=model,
            )
        gaps = _gaps(rollout.samplers, logp_NT - rollout.logp_NT, rollout.mask_NT)
        self.add_to_log({"gap": sum(gap for _, gap, _ in gaps), "gap_tokens": sum(tokens for *_, tokens in gaps)})
        self._check(ahead.server, gaps)
        ahead.replies = [reply for part in gather(replies) for reply in part]
        ahead.weights_step = self.state.global_step

    def _check(self, server: Watch, gaps: list[Gap]) -> None:
        """See by all processes' tokens that each server has the policy's weights, before these change again."""
        differences, counts = defaultdict[str, float](float), Counter[str]()
        for name, gap, tokens in (row for part in gather(gaps) for row in part if row[2]):
            differences[name] += gap
            counts[name] += tokens
        if not server.usual and (self.out / LOG).exists():  # of the run that is gone on with
            name = WATCHED if self.ahead else DIFFERENCE
            server.remember([row[name] for row in read_jsonl(self.out / LOG) if name in row])
        if counts:
            agree(lambda: server.check({name: differences[name] / count for name, count in counts.items()}))

    def log_line(self, sums: dict[str, float]) -> dict[str, float]:
        line: dict[str, float] = {}
        if completions := sums.get("completions"):
            given = {name: sums[f"given_{name}"] for name, _, _ in self.rewards}
            line = {
                **({"reward": sums["reward"] / sums["scored"]} if sums["scored"] else {}),
                **{f"reward_{name}": sums[f"reward_{name}"] / count for name, count in given.items() if count},
                **({"unscored_rate": 1 - sums["scored"] / completions} if sums["scored"] < completions else {}),
                "reward_std": sums["group_std"] / sums["groups"],
                "zero_variance_groups": sums["zero_variance"] / sums["groups"],
                "format_rate": sums["format_ok"] / completions,
                "truncated_rate": sums["truncated"] / completions,
                "unparsed_rate": sums["unparsed"] / completions,
                **({"rollout_lag": sums["lag"] / completions} if self.ahead else {}),
                "completion_tokens": sums["tokens"] / completions,
                "tokens_per_second": sums["tokens"] / sums["seconds"],
                **{name: sums[name] for name in ("drawn", "used", "thrown_away", "left_aside") if name in sums},
            }
        if tokens := sums.get("policy_tokens"):
            line |= {
                "entropy": sums["policy_entropy"] / tokens,
                "ratio": sums["policy_ratio"] / tokens,
                "clipped_low": sums["policy_clipped_low"] / tokens,
                "clipped_high": sums["policy_clipped_high"] / tokens,
            }
            optional = {
                "kl": "kl",
                DIFFERENCE: "mismatch_abs",
                "rollout_kl": "mismatch_kl",
                "rollout_capped": "capped",
            }
            line |= {name: sums[f"policy_{key}"] / tokens for name, key in optional.items() if f"policy_{key}" in sums}
        if tokens := sums.get("other_tokens"):
            line["other_image_kl"] = sums["other_kl"] / tokens
        if rows := sums.get("other_rows"):
            line["above_chance_rate"] = sums["above_chance"] / rows
        if "waited" in sums:
            line |= {WATCHED: sums["gap"] / sums["gap_tokens"], "wait_seconds": sums["waited"] / sums["steps"]}
        return line | {"step_seconds": sums["seconds"] / sums["steps"]}


def _gaps(samplers: list[str], difference_NT: Tensor, mask_NT: Tensor) -> list[Gap]:
    sums = (difference_NT.abs() * mask_NT).sum(1).tolist()
    return list(zip(samplers, sums, mask_NT.sum(1).tolist(), strict=True))
