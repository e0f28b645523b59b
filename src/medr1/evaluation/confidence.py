"""How probable each option is to a model: no sampling, one pass over the prompt and the few ways to write an answer.

A model may write an option as its letter, its text or both, so an option's probability is the summed probability of
its spellings, divided by that of all options' spellings. Spellings are read by `answers.extract_answer`, as replies
are. They are tokenised together with what stands before them, as the model would have written them, and what all
spellings of a question begin with is read once, as a part of its prompt.

Shapes: B prompts, P prompt tokens, R tokens that all spellings share, G spellings a prompt (the most of any), N = B*G
rows, T tokens of a spelling after the shared ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from medr1.data.answers import extract_answer
from medr1.data.prompts import check_mode
from medr1.data.records import LETTERS, Record
from medr1.errors import MedR1Error
from medr1.policy.encoding import PromptBatch
from medr1.policy.repeated import padded
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM

ANSWERS = ("<answer>{}</answer>", "<answer> {}</answer>")
AFTER_REASONING = (*ANSWERS, "\n<answer>{}</answer>", " <answer>{}</answer>")


def option_logprobs(
    vlm: VLM,
    prompts: PromptBatch,
    records: Sequence[Record],
    *,
    mode: str,
    reasoning: Sequence[str | None] | None = None,
) -> list[Tensor]:
    """Log-probability of answering with each option, normalised over the options.

    Gradients flow to weights and images where the caller has them on.

    Args:
        prompts: of these records in this mode, from `encode_prompts`.
        reasoning: mode "think" only: for each record the text that stands inside <think></think> before the answer;
            None, like "", is reasoning without a word.

    Returns:
        One tensor (number of options,) a record, float32 (float64 for a float64 model); exp of it sums to 1.

    Raises:
        MedR1Error: a record without options, or reasoning in a mode that answers first.
    """
    check_mode(mode)
    if reasoning is not None and mode != "think":
        raise MedR1Error(f"mode {mode} has no reasoning before its answer; use mode think")
    for record in records:
        if not record.options:
            raise MedR1Error(f"record {record.id}: an open question has no options to compare; leave it out")
    thoughts = reasoning if reasoning is not None else [None] * len(records)
    assert len(prompts) == len(records) == len(thoughts), "one prompt and one reasoning a record"
    shared, endings, options = [], [], []
    for record, thought, opened in zip(records, thoughts, prompts.opened, strict=True):
        before = f"<think>{thought or ''}</think>" if mode == "think" else ""
        if before and opened:  # by the prompt's template
            before = before.removeprefix(opened if before.startswith(opened) else "<think>")
        by_tokens: dict[tuple[int, ...], int] = {}
        for text, option in spellings(record.options, AFTER_REASONING if before else ANSWERS).items():
            ids = vlm.tokenizer(before + text, add_special_tokens=False)["input_ids"]
            by_tokens.setdefault(tuple(ids), option)  # the same tokens are one way to write, however it is typed
        start = next(place for place, column in enumerate(zip(*by_tokens, strict=False)) if len(set(column)) > 1)
        shared.append(list(next(iter(by_tokens))[:start]))
        endings.append([ids[start:] for ids in by_tokens])
        options.append(torch.tensor(list(by_tokens.values()), device=vlm.device))
    most = max(map(len, endings))
    rows = [row for group in endings for row in [*group, *[()] * (most - len(group))]]
    ids_NT, mask_NT = _padded(vlm, rows)
    logp_NT, _ = completion_logprobs(vlm, continued(vlm, prompts, shared), ids_NT, mask_NT)
    result = []
    for record, option_G, logp_G in zip(records, options, logp_NT.sum(1).split(most), strict=True):
        logp_G = logp_G[: len(option_G)]
        masses = [logp_G[option_G == option].logsumexp(0) for option in range(len(record.options))]
        result.append(torch.stack(masses).log_softmax(0))
    return result


@lru_cache(maxsize=1024)  # eight replies to a question are read with the same options
def spellings(options: tuple[str, ...], answers: tuple[str, ...] = ANSWERS) -> dict[str, int]:
    """Ways to write an answer, each with the place of the option that the extractor reads it as.

    Every option has its letter. What the extractor reads as no option ("A) …" with the text of another) is left out;
    a text that several options share is the first's, as in a reply.
    """
    found = {}
    for letter, option in zip(LETTERS, options, strict=False):
        text = " ".join(option.split())  # as the prompt shows it
        # A text with a closing tag would be another spelling with something after it, and count twice.
        inside = (letter, f"{letter}) {text}", text) if "</answer>" not in text else (letter,)
        for answer in answers:
            for content in inside:
                spelled = answer.format(content)
                if read := extract_answer(spelled, options).letter:
                    found[spelled] = LETTERS.index(read)
    return found


def reasoning_of(reply: str) -> str:
    """The reasoning of a reply: what stands in <think></think>, also where only one of the two is there (of a reply
    that was cut off as far as it goes), or before <answer> where neither is; "" where it is not parted from the answer.
    """
    before, opened, after = reply.partition("<think>")
    text = after if opened else before
    thought = text.partition("</think>")[0].partition("<answer>")[0]
    return thought if opened or "</think>" in text or "<answer>" in text else ""


def continued(vlm: VLM, prompts: PromptBatch, ids: Sequence[Sequence[int]]) -> PromptBatch:
    """The prompts with further text tokens after each, as one left-padded batch."""
    ids_BR, mask_BR = _padded(vlm, ids)
    steps_BR = prompts.next_position_B[:, None] + torch.arange(ids_BR.shape[1], device=ids_BR.device)
    positions_ABR = (steps_BR * mask_BR).expand(len(prompts.position_ids_ABP), -1, -1)
    mask = torch.cat([prompts.attention_mask_BP, mask_BR.to(prompts.attention_mask_BP.dtype)], dim=1)
    order = mask.argsort(dim=1, stable=True)  # padding to the left, all else in its order
    order = order[:, mask.shape[1] - int(mask.sum(1).max()) :]
    positions = torch.cat([prompts.position_ids_ABP, positions_ABR], dim=2)
    return replace(
        prompts,
        input_ids_BP=torch.cat([prompts.input_ids_BP, ids_BR], dim=1).gather(1, order),
        attention_mask_BP=mask.gather(1, order),
        position_ids_ABP=positions.gather(2, order.expand(len(positions), -1, -1)),
        kinds={name: _in_order(kind, order) for name, kind in prompts.kinds_before(ids_BR.shape[1]).items()},
    )


def _in_order(kind_BP: Tensor, order: Tensor) -> Tensor:
    return kind_BP[torch.arange(len(order), device=order.device)[:, None], order]


def _padded(vlm: VLM, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask (boolean), each (rows, longest) on the model's device."""
    ids = padded(rows, vlm.pad_token_id, vlm.device)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids, mask.to(vlm.device)
