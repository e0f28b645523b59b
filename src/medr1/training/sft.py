"""The supervised baseline, done right: the loss is on the answer alone, in the same prompts as GRPO and evaluation.

The records hold no rationale, so the target is `<answer> TEXT</answer>` with the text of the right option or answer,
and the end token, and the mode is no-think. A step takes `prompts_per_step` examples, as a GRPO step takes that many
prompts: at equal steps both methods have seen the same questions equally often (GRPO draws G completions of each).

    medr1 train --method sft --model tiny --data phantoms --out runs/sft
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from medr1.config import Config
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM
from medr1.processes import agree, gather
from medr1.training.base import RecordTrainer


class SFTTrainer(RecordTrainer):
    """SFT on records; see `RecordTrainer` for the arguments.

    Raises:
        MedR1Error: a mode that asks for a rationale, which the records do not have.
    """

    def __init__(
        self,
        vlm: VLM,
        config: Config,
        train_records: Sequence[Record],
        test_records: Sequence[Record],
        output_dir: Path,
    ) -> None:
        if config.rollout.mode != "no-think":
            raise MedR1Error(
                f"rollout.mode = {config.rollout.mode} asks for a rationale, and records have none to imitate;"
                " use --mode no-think for SFT"
            )
        super().__init__(vlm, config, train_records, test_records, output_dir)

    def learn(self, model: nn.Module, records: list[Record]) -> Tensor:
        """One backward pass; the mean negative log-probability of the answer's tokens over the whole step."""
        records = [self.as_asked(record, self.state.global_step + 1) for record in records]
        end, replies = self.vlm.tokenizer.eos_token_id, [f"<answer> {record.gold}</answer>" for record in records]
        # Some tokenizers (Gemma, LLaVA) put a token before a text, which the prompt has and no reply begins with.
        targets = [[*ids, end] for ids in self.vlm.tokenizer(replies, add_special_tokens=False)["input_ids"]]
        denominator = sum(gather(sum(map(len, targets))))
        size = self.config.optimizer.prompts_per_forward or len(records)
        total = torch.zeros((), device=self.accelerator.device)
        for start in range(0, len(records), size):
            chunk = records[start : start + size]
            prompts = agree(partial(self.encode, chunk))
            rows = [torch.tensor(target) for target in targets[start : start + size]]
            ids_NT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)
            lengths = torch.tensor([len(row) for row in rows])
            mask_NT = torch.arange(ids_NT.shape[1]) < lengths[:, None]
            device = prompts.input_ids_BP.device
            with self.last_of_step(model, start + size >= len(records)):
                logp_NT, _ = completion_logprobs(self.vlm, prompts, ids_NT.to(device), mask_NT.to(device), model=model)
                loss = -logp_NT.sum() / denominator
                self.accelerator.backward(loss * self.args.world_size)
            total += loss.detach()
        self.add_to_log({"steps": 1 / self.args.world_size, "examples": len(records)})
        return total * self.args.world_size

    def log_line(self, sums: dict[str, float]) -> dict[str, float]:
        return {"examples_per_step": sums["examples"] / sums["steps"]}
