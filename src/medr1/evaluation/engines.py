"""Where an engine that samples for training parts from transformers, and why.

    medr1 engines check runs/ct --data DATA --url http://127.0.0.1:8000/v1

Both answer the same records greedily, asked as training asks them. Compared are the tokens of each prompt; the
log-probs of our tokens as far as both replies go together, and of both tokens where they part; the replies; what they
answer. A difference has one of these causes:

- template: the text of a prompt has other tokens;
- processor: its text has the same, its images another number;
- dtype: log-probs are off by no more than a few times what bfloat16 changes in our own (weights that are hardly older
  look the same, and the line says so);
- weights: they are off by more, as by older weights, a stale output head, a quantised or another model;
- sampling: they agree, and yet the engine writes another token than the likeliest, or ends elsewhere.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medr1.config import Config
from medr1.data.answers import read_answer
from medr1.data.heldout import RunSplit
from medr1.data.images import load_image
from medr1.data.parts import load_parts
from medr1.data.prompts import build_messages
from medr1.data.records import Record
from medr1.evaluation.named import limited
from medr1.policy.encoding import PromptBatch, check_lengths, encode_prompts
from medr1.policy.mismatch import LEAST_MISMATCH, MAX_GROWTH, Greedy
from medr1.policy.rollouts import Rollout, reply_texts, sample
from medr1.policy.shared_prefix import completion_logprobs
from medr1.policy.vlm import VLM, computes_in_bfloat16, evaluating, load_vlm

EXACT = 1e-3
"""Mean difference of log-probs, in nats a token, within which two computations in float32 agree."""
BATCH = 16

Ask = Callable[[Sequence[Record], PromptBatch], Sequence[Greedy]]
"""An engine: what it makes of each of these records."""


def check_engine(
    model: str,
    config: Config,
    *,
    url: str | None,
    run: RunSplit | None,
    limit: int,
    max_new_tokens: int,
    served: str = "",
) -> dict[str, Any]:
    """`compare` on records that a model's run held out, with a vLLM server, or with vLLM in this process.

    Args:
        url: of the server; None: in this process.
        limit: so many records, drawn by the split seed.
        served: the server's name of the model; empty: the one that it was started with.

    Raises:
        MedR1Error: as `compare`; the server cannot be reached, fails or refuses; or no vLLM is installed here.
    """
    records = limited(load_parts(config.data, run)[1], limit, config)
    vlm, mode = load_vlm(model, **config.model.loading), config.rollout.mode
    how: dict[str, Any] = {"mode": mode, "max_new_tokens": max_new_tokens}
    if url:
        from medr1.policy.rollouts_vllm import greedy  # needs the openai client

        return compare(vlm, records, lambda asked, _: greedy(vlm, url, asked, served=served, **how), **how)
    from medr1.policy.rollouts_colocate import ColocatedVLLM

    dtype = "bfloat16" if computes_in_bfloat16(config.model.dtype, vlm.device) else "float32"
    engine = ColocatedVLLM(vlm, mode=mode, dtype=dtype, memory=config.rollout.vllm_memory)
    try:
        return compare(vlm, records, lambda asked, prompts: engine.greedy(asked, prompts, max_new_tokens), **how)
    finally:
        engine.close()


@dataclass(frozen=True)
class Token:
    """One side's choice at a place, and its log-prob by transformers and by the engine, where these tell."""

    text: str | None
    """None where that side's reply has ended before."""
    here: float | None = None
    there: float | None = None


@dataclass(frozen=True)
class Parting:
    """The first place at which two replies to one record differ, counted from 0 in tokens of the reply."""

    id: str
    position: int
    ours: Token
    theirs: Token


@dataclass(frozen=True)
class _Line:
    """One record on both sides."""

    id: str
    differs: str
    """How the prompts differ, in words; empty where they do not."""
    cause: str
    """"template" or "processor", where they do."""
    gaps: list[float]
    """|log-prob here - there| of each token that can be compared; none where the prompts differ."""
    parting: Parting | None
    same_outcome: bool


def compare(vlm: VLM, records: Sequence[Record], ask: Ask, *, mode: str, max_new_tokens: int) -> dict[str, Any]:
    """Answer records by transformers and by an engine.

    Returns:
        "n"; how many records agree, by "prompts", "logps", "replies", "outcomes"; "compared", the records whose prompts
        agree, so that log-probs say something; "gap" and "max_gap", of log-probs, in nats a token; "rounding", what
        bfloat16 changes in our own; "partings", and "causes": cause -> what was seen and the remedy. No cause where
        prompts and log-probs agree, and replies part at most where both tokens are as likely.

    Raises:
        MedR1Error: a prompt that does not fit, or what `ask` raises.
    """
    lines: list[_Line] = []
    rounding: list[float] = []
    wide = next(vlm.model.parameters()).dtype in (torch.float32, torch.float64)
    with evaluating(vlm.model):
        for start in range(0, len(records), BATCH):
            batch = records[start : start + BATCH]
            images = [[load_image(path) for path in record.images] for record in batch]
            messages = [build_messages(record, mode) for record in batch]
            prompts = encode_prompts(vlm, messages, images, thinking=mode == "think")
            check_lengths(vlm, prompts, [f"record {record.id}" for record in batch], max_new_tokens)
            rollout = sample(vlm, prompts, num_completions=1, max_new_tokens=max_new_tokens, greedy=True, seed=0)
            lines += _lines(vlm, batch, prompts, rollout, ask(batch, prompts))
            if wide:
                with torch.autocast(vlm.device.type, torch.bfloat16):
                    rounded_NT, _ = completion_logprobs(vlm, prompts, rollout.completion_ids_NT, rollout.mask_NT)
                rounding += (rounded_NT - rollout.logp_NT)[rollout.mask_NT].abs().tolist()
    gaps = [gap for line in lines for gap in line.gaps]
    within = EXACT if wide else LEAST_MISMATCH
    usual = statistics.fmean(rounding) if wide else LEAST_MISMATCH
    found = {
        "n": len(lines),
        "prompts": sum(not line.cause for line in lines),
        "compared": sum(bool(line.gaps) for line in lines),
        "logps": sum(statistics.fmean(line.gaps) <= within for line in lines if line.gaps),
        "replies": sum(line.parting is None for line in lines),
        "outcomes": sum(line.same_outcome for line in lines),
        "gap": statistics.fmean(gaps) if gaps else None,
        "max_gap": max(gaps, default=None),
        "rounding": usual,
        "partings": [asdict(line.parting) for line in lines if line.parting],
    }
    return found | {"causes": _causes(lines, gaps, within, usual)}


def _lines(
    vlm: VLM, records: Sequence[Record], prompts: PromptBatch, rollout: Rollout, theirs: Sequence[Greedy]
) -> list[_Line]:
    texts = reply_texts(vlm, prompts, [reply.tokens for reply in theirs])
    places = [_parted(*pair) for pair in zip(rollout.tokens, (reply.tokens for reply in theirs), strict=True)]
    forced = _logps_of_theirs(vlm, prompts, rollout, theirs, places)
    lines = []
    for row, (record, reply, place) in enumerate(zip(records, theirs, places, strict=True)):
        ours, logps = rollout.tokens[row], rollout.logp_NT[row].tolist()
        pairs: list[tuple[float | None, float | None]] = list(
            zip(logps, reply.logps[: len(ours) if place is None else place], strict=False)
        )
        parting = None
        if place is not None:
            own = ours[place] if place < len(ours) else None
            other = reply.tokens[place] if place < len(reply.tokens) else None
            told = reply.tops[place] if place < len(reply.tops) else {}
            parting = Parting(
                record.id,
                place,
                Token(
                    _text(vlm, own), None if own is None else logps[place], told.get(own) if own is not None else None
                ),
                Token(_text(vlm, other), forced.get(row), None if other is None else reply.logps[place]),
            )
            pairs += [(token.here, token.there) for token in (parting.ours, parting.theirs)]
        cause, differs = _prompt_differs(vlm, record, prompts.tokens[row], reply.prompt_ids)
        gaps = [] if cause else [abs(here - there) for here, there in pairs if here is not None and there is not None]
        answers = [read_answer(text, record) for text in (rollout.texts[row], texts[row])]
        same = (answers[0].outcome, answers[0].letter) == (answers[1].outcome, answers[1].letter)
        lines.append(_Line(record.id, differs, cause, gaps, parting, same))
    return lines


def _parted(ours: list[int], theirs: list[int]) -> int | None:
    """The first place at which they differ; None where they do not."""
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))


def _logps_of_theirs(
    vlm: VLM, prompts: PromptBatch, rollout: Rollout, theirs: Sequence[Greedy], places: Sequence[int | None]
) -> dict[int, float]:
    """Row -> our log-prob of the engine's token where the replies part."""
    rows = [row for row, place in enumerate(places) if place is not None and place < len(theirs[row].tokens)]
    if not rows:
        return {}
    columns = [place for row in rows if (place := places[row]) is not None]
    longer = max(0, max(columns) + 1 - rollout.mask_NT.shape[1])
    ids_NT = nn.functional.pad(rollout.completion_ids_NT[rows], (0, longer), value=vlm.pad_token_id)
    ids_NT[range(len(rows)), columns] = torch.tensor(
        [theirs[row].tokens[column] for row, column in zip(rows, columns, strict=True)], device=ids_NT.device
    )
    mask_NT: Tensor = torch.zeros_like(ids_NT, dtype=torch.bool)
    mask_NT[range(len(rows)), columns] = True
    logp_NT, _ = completion_logprobs(vlm, prompts.select(rows), ids_NT, mask_NT)
    return dict(zip(rows, logp_NT[range(len(rows)), columns].tolist(), strict=True))


def _text(vlm: VLM, token: int | None) -> str | None:
    return None if token is None else vlm.tokenizer.decode([token])


def _prompt_differs(vlm: VLM, record: Record, ours: list[int], theirs: list[int]) -> tuple[str, str]:
    """The cause and what is seen of it; both empty where the prompts are the same."""
    if ours == theirs:
        return "", ""
    of_images = set(vlm.banned_token_ids)
    texts = [[token for token in ids if token not in of_images] for ids in (ours, theirs)]
    place = _parted(*texts)
    if place is None:
        counts = [len(ids) - len(text) for ids, text in zip((ours, theirs), texts, strict=True)]
        return "processor", f"record {record.id}: {counts[0]} tokens of images here, {counts[1]} there"
    near = [vlm.tokenizer.decode(text[max(0, place - 2) : place + 6]) for text in texts]
    return "template", f"record {record.id}, token {place}: {near[0]!r} here, {near[1]!r} there"


def _causes(lines: Sequence[_Line], gaps: Sequence[float], within: float, usual: float) -> dict[str, str]:
    causes = {}
    remedies = {
        "template": "serve the model's own chat template (vllm serve --chat-template)",
        "processor": "serve the model's own image sizes (vllm serve --mm-processor-kwargs)",
    }
    for cause, remedy in remedies.items():
        if found := [line for line in lines if line.cause == cause]:
            causes[cause] = f"{len(found)} of {len(lines)} prompts differ ({found[0].differs}); {remedy}"
    seen = f"log-probs are {statistics.fmean(gaps):.1e} nats a token off" if gaps else ""
    if gaps and statistics.fmean(gaps) > within:
        if statistics.fmean(gaps) <= max(LEAST_MISMATCH, MAX_GROWTH * usual):
            causes["dtype"] = (
                f"{seen}, and bfloat16 changes ours by {usual:.1e}; serve in the type that is computed in here (vllm"
                " serve --dtype); if it is, the server's weights are a little older: start it anew"
            )
        else:
            first = statistics.fmean(line.gaps[0] for line in lines if line.gaps)
            causes["weights"] = (
                f"{seen}, {first:.1e} at the first token, and bfloat16 would change ours by {usual:.1e}: other weights,"
                " a stale output head, or a quantised model; start the server anew with this model"
            )
    elif odd := [line for line in lines if line.parting and not line.cause and not _is_tie(line.parting, within)]:
        causes["sampling"] = (
            f"{seen}, and {len(odd)} of {len(lines)} replies go on otherwise (record {odd[0].id}); serve without"
            " sampling settings, stop words or lengths of the server's own"
        )
    return causes


def _is_tie(parting: Parting, within: float) -> bool:
    """Whether both tokens are as likely, as near as two computations agree."""
    ours, theirs = parting.ours.here, parting.theirs.here
    return ours is not None and theirs is not None and ours - theirs <= MAX_GROWTH * within
