"""Evaluation: one greedy reply a record, one JSON line a reply, and scoring as a second step over the raw
text.

The file is the interface: tables and reports read it and never run the model again. Rows are appended batch
by batch and forced to disk, so that a killed evaluation goes on where it stopped. A row is known by the
content it came from (weights, processor, prompt, image bytes, generation settings, condition), never by its
place or a file's name. The extractor's version is not part of that: `score` reads the stored replies again.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.distributed.tensor import DTensor

from medr1.data.answers import EXTRACTOR_VERSION
from medr1.data.heldout import RunSplit, Seen, split_of
from medr1.data.images import all_cores, by_warning, content_digest, load_image, read_image
from medr1.data.kept import taken
from medr1.data.parts import skipped_list
from medr1.data.prompts import build_messages
from medr1.data.records import LETTERS, Record, append_jsonl, read_jsonl, write_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.confidence import option_logprobs, reasoning_of
from medr1.evaluation.controls import ALONE, as_shown, blank_image
from medr1.evaluation.rows import Row, voted
from medr1.evaluation.scoring import score
from medr1.policy.drafts import Drafts
from medr1.policy.encoding import PromptBatch, check_lengths, encode_prompts, text_too_long
from medr1.policy.rollouts import sample
from medr1.policy.vlm import VLM, evaluating
from medr1.processes import alone, is_first, num_cores, tell, tell_once

Asked = list[tuple[str, Record]]
"""Key and record of each question of a batch."""
Loaded = dict[tuple[Path, ...], list[Image.Image]]
"""The images of a batch by their paths."""

ROW_START = b'{"key": "'
"""How each line of a file of rows begins, so that no other file is taken for one and changed."""


def evaluate(
    vlm: VLM,
    records: Sequence[Record],
    *,
    mode: str,
    out: Path,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    condition: str = "image",
    seed: int = 0,
    donors: Sequence[Record] | None = None,
    scoring: str = "reply",
    num_samples: int = 0,
    reasoning: Mapping[str, str] | None = None,
    fingerprint: str | None = None,
) -> list[Row]:
    """Answer every record once, greedily, and write one row each to `out`.

    Images are all read before the model runs: an unreadable one stops the evaluation at once, since leaving
    its record out would change the denominator. Rows already in `out` are kept and not computed again; the
    file must hold nothing else, so that what is in it is always one evaluation.

    Args:
        mode: one of prompts.MODES.
        out: a .jsonl file. Image paths in its rows are relative to its folder.
        max_new_tokens: a longer reply is cut there and counts as it stands.
        condition: "image", "repeat" (the same once more), or a control: "blank" (mean colour, same size), "no_image"
            (a text-only prompt), "shuffled" (the image of another group of the same modality), "shuffled_other" (the
            image of another modality), "permuted" (the options in another order), "reasoning_alone" (that, and no
            image; for a given reasoning); drawn by `seed`.
        donors: records whose images "shuffled" and "shuffled_other" show; None takes them from `records`.
        scoring: "reply"; "options" also weighs the options (see `confidence.option_logprobs`), after the reply's
            reasoning in mode "think", and in mode "no-think" without any reply: the most probable option is the
            answer; "votes" answers with the option that most of `num_samples` replies name, sampled by `seed` and the
            row's key, so that neither the batch nor a pause changes a draw.
        reasoning: mode "think" only: by record id the text that stands in <think></think>. Nothing is generated: the
            answer is the option that is most probable after it.
        fingerprint: `weights_fingerprint` of the model, where the caller has it.

    Returns:
        One row a record, in the order of `records`:
        key, id, modality, question_type, source, group, images, question, options, gold (letter), chance, all as
        the model was asked (images that were shown, options in the order shown, the right letter in that order; of
        an open question options is empty, gold a text, and alternatives lists other right texts);
        model, weights (the beginning of `weights_fingerprint`), condition, mode, max_new_tokens;
        reply (raw text), finish ("stop" or "length"), tokens, seconds (its batch's time divided by the batch's rows);
        outcome, letter, correct, format_ok, extractor_version, and of an open question text and token_f1 (see `score`).
        Of a model in the folder of a run seen_by_run: whether that run "held out" the question, "trained on" it or has
        "never seen" it (see `medr1.data.heldout`). Where options are weighed or votes taken also scoring, option_probs
        (in the order shown, sum 1), confidence (the chosen option's; None without one), and samples (raw texts) of
        votes. Where reasoning was given, also reasoning: "kept", or "removed" where all of it is empty.

    Raises:
        MedR1Error: no records, two records of one id, a given reasoning of an open question or in another mode, an
            unreadable image, a prompt that does not fit into the model's
            positions, no partner to shuffle with, rows of another evaluation in `out`, another process at work there,
            or a full disk. Rows written until then are whole and used again.
    """
    for record in records:
        if reason := too_long(vlm, record, mode=mode, max_new_tokens=max_new_tokens):
            raise MedR1Error(reason)
    fingerprint = fingerprint or weights_fingerprint(vlm.model)
    if reasoning is not None:
        scoring = "options"
        if mode != "think":
            raise MedR1Error(f"mode {mode} has no reasoning before its answer to keep; use mode think")
    elif condition == ALONE:
        raise MedR1Error(f"condition {condition!r} needs a reasoning to show; use `medr1 eval --looking`")
    with open_evaluation(
        records,
        name=vlm.name,
        model=[fingerprint, vlm.processor.image_processor.to_dict()],
        weights=fingerprint[:16],
        mode=mode,
        out=out,
        max_new_tokens=max_new_tokens,
        condition=condition,
        seed=seed,
        donors=donors,
        scoring=f"{scoring} {num_samples}" if scoring == "votes" else scoring,
        reasoning=reasoning,
        split=split_of(vlm.folder),
    ) as evaluation:
        ordered = _reading_order(list(evaluation.records.items()), mode)
        pending = [(key, record) for key, record in ordered if key not in evaluation.rows]
        drafts = Drafts()

        batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
        started = time.perf_counter()
        for batch, loaded in _with_images(evaluation, batches):
            prompts = encode_prompts(
                vlm,
                [build_messages(record, mode) for _, record in batch],
                [loaded[record.images] for _, record in batch],
                thinking=mode == "think",
            )
            check_lengths(vlm, prompts, [f"record {record.id}" for _, record in batch], max_new_tokens)
            answers = _answer(
                vlm,
                prompts,
                [record for _, record in batch],
                mode=mode,
                max_new_tokens=max_new_tokens,
                scoring=scoring,
                num_samples=num_samples,
                reasoning=None if reasoning is None else [reasoning[record.id] for _, record in batch],
                seeds=[int(_digest([seed, key])[:12], 16) for key, _ in batch],
                drafts=drafts,
            )
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            evaluation.add(
                (key, {**answer, "seconds": seconds}) for (key, _), answer in zip(batch, answers, strict=True)
            )
            started = time.perf_counter()
    return evaluation.result


def leave_out_too_long(
    vlm: VLM, records: Sequence[Record], *, mode: str, max_new_tokens: int, out: Path
) -> Sequence[Record]:
    """The records whose prompts fit into the model's positions, by their text; the others are counted on stderr and
    listed where `medr1.data.parts.leave_out_unreadable` lists others, after these.

    Raises:
        MedR1Error: nothing is left, or the list cannot be written.
    """
    found = (too_long(vlm, record, mode=mode, max_new_tokens=max_new_tokens) for record in records)
    reasons = {place: reason for place, reason in enumerate(found) if reason}
    if reasons and is_first():
        listing = skipped_list(out)
        append_jsonl(listing, [{"id": records[place].id, "reason": reason} for place, reason in reasons.items()])
        told = f"{len(reasons)} of {len(records)} records left out: too long for the model; see {listing}"
        tell(told, "yellow")
    if len(reasons) == len(records):
        raise MedR1Error(f"{out}: all {len(records)} records are too long for {vlm.name}; shorten them")
    return taken(records, (place for place in range(len(records)) if place not in reasons))


def too_long(vlm: VLM, record: Record, *, mode: str, max_new_tokens: int) -> str | None:
    """A line, if the record's text alone does not fit into the model's positions; its images are not looked at."""
    text = build_messages(record, mode)[0]["content"][-1]["text"]
    return text_too_long(vlm, text, f"record {record.id}", max_new_tokens)


def _answer(
    vlm: VLM,
    prompts: PromptBatch,
    records: Sequence[Record],
    *,
    mode: str,
    max_new_tokens: int,
    scoring: str,
    num_samples: int,
    reasoning: Sequence[str] | None,
    seeds: list[int],
    drafts: Drafts,
) -> list[Row]:
    """What a row says of the reply: reply, finish, tokens; where options are weighed scoring and option_probs too."""
    if reasoning is not None or (scoring == "options" and mode == "no-think"):
        replies: list[Row] = [{"finish": "stop", "tokens": 0} for _ in records]
    else:
        votes = scoring == "votes"
        rollout = sample(
            vlm,
            prompts,
            num_completions=num_samples if votes else 1,
            max_new_tokens=max_new_tokens,
            greedy=not votes,
            seed=seeds,
            drafts=drafts,
        )
        drafts.learn(rollout.tokens, rollout.guesses)
        replies = [
            {"reply": text, "finish": "stop" if finished else "length", "tokens": tokens}
            for text, finished, tokens in zip(
                rollout.texts, rollout.finished_N.tolist(), rollout.mask_NT.sum(1).tolist(), strict=True
            )
        ]
    if scoring == "reply":
        return replies
    if scoring == "votes":
        groups = [replies[start : start + num_samples] for start in range(0, len(replies), num_samples)]
        return [
            {**voted(group, record.options), "scoring": scoring, "samples": group}
            for group, record in zip(groups, records, strict=True)
        ]
    if reasoning is None and mode == "think":
        reasoning = [reasoning_of(reply["reply"]) for reply in replies]
    with evaluating(vlm.model):
        logps = option_logprobs(vlm, prompts, records, mode=mode, reasoning=reasoning)
    return [
        {
            "reply": f"<answer>{LETTERS[int(logp.argmax())]}</answer>",  # where none was written
            **reply,
            "scoring": scoring,
            "option_probs": [float(f"{p:.6g}") for p in logp.exp().tolist()],
        }
        for reply, logp in zip(replies, logps, strict=True)
    ]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation under way: what is asked, the rows that are there, and the file that they are added to."""

    stated: Row
    """What each row says of the evaluation: model, condition, mode, max_new_tokens; weights where they are known."""
    out: Path
    records: dict[str, Record]
    """The record as the condition asks it, by the key of its row."""
    seen: dict[str, Seen]
    """What the model's run has to do with each question, by id; empty where no run made it."""
    rows: dict[str, Row]
    """By key."""
    progress: Progress
    task: TaskID

    @property
    def pending(self) -> list[tuple[str, Record]]:
        """Key and record of each question without a row."""
        return [(key, record) for key, record in self.records.items() if key not in self.rows]

    @property
    def result(self) -> list[Row]:
        """One row a record, in the order of the records."""
        return [self.rows[key] for key in self.records]

    def images(self, record: Record) -> list[Image.Image]:
        """What the model sees when this record is asked, RGB."""
        images = [load_image(path) for path in record.images]
        return [blank_image(image) for image in images] if self.stated["condition"] == "blank" else images

    def add(self, replies: Iterable[tuple[str, Row]]) -> None:
        """Score replies (key; reply, finish, tokens, seconds) and force their rows to disk."""
        new = score(
            {
                "key": key,
                **record_fields(self.records[key], self.out.parent),
                **self.stated,
                **({"seen_by_run": self.seen[self.records[key].id]} if self.seen else {}),
                **reply,
            }
            for key, reply in replies
        )
        append_jsonl(self.out, new)
        self.rows.update({row["key"]: row for row in new})
        self.progress.advance(self.task, len(new))


@contextmanager
def open_evaluation(
    records: Sequence[Record],
    *,
    name: str,
    model: list[Any],
    mode: str,
    out: Path,
    max_new_tokens: int,
    condition: str,
    seed: int,
    donors: Sequence[Record] | None = None,
    scoring: str = "reply",
    reasoning: Mapping[str, str] | None = None,
    split: RunSplit | None = None,
    weights: str | None = None,
) -> Iterator[Evaluation]:
    """Read every image, find the rows that `out` already has, and show progress until the block is left.

    No other process can write to `out` until then.

    Args:
        model: JSON-like values that tell this model from any other; with the settings, the prompt and the
            images they make a row's key.
        scoring: "reply", or how options are weighed as well.
        reasoning: by record id what stands before the answer, see `evaluate`.
        split: of the run that made the model, to say of each question whether it was held out.
        weights: names the weights in each row.

    Raises:
        MedR1Error: as `evaluate`.
    """
    if not records:
        raise MedR1Error(f"{out}: no records to evaluate; widen the filters")
    if scoring != "reply" and (unlisted := [record.id for record in records if not record.options]):
        raise MedR1Error(f"record {unlisted[0]}: an open question has no options to weigh; score replies instead")
    ids = Counter(record.id for record in records)
    if len(ids) < len(records):
        raise MedR1Error(f"record {ids.most_common(1)[0][0]} is there twice; give each record its own id")
    seen = dict(zip(ids, split.seen(records), strict=True)) if split else {}
    shown = as_shown(records, condition, seed, donors)

    with alone(out), _progress() as progress:
        digests = _read_images(shown, progress)
        settings = {"max_new_tokens": max_new_tokens, "greedy": True, "condition": condition}
        settings |= {} if scoring == "reply" else {"scoring": scoring}  # nothing new in the keys of older rows
        run = _digest([*model, settings])
        by_key = {}
        for record in shown:
            # Without defaults, so that rows made before a field was added keep their keys.
            content = record.model_dump_json(exclude={"images", "licence", "groups"}, exclude_defaults=True)
            images = [digests[path] for path in record.images]
            held = [] if reasoning is None else [reasoning[record.id]]
            by_key[_digest([run, build_messages(record, mode), content, images, *held])] = record

        resumed = _resume(out)
        rows = {row["key"]: row for row in resumed}
        if len(rows) < len(resumed):
            raise MedR1Error(
                f"{out}: {len(resumed)} rows of {len(rows)} questions: two evaluations wrote it; name another file"
            )
        if foreign := rows.keys() - by_key.keys():
            raise MedR1Error(f"{out}: holds {len(foreign)} rows of another model, setting or data; name another file")
        stated = {"model": name, "condition": condition, "mode": mode, "max_new_tokens": max_new_tokens}
        stated |= {"weights": weights} if weights else {}
        told = f"{name}, {condition}"
        if reasoning is not None:
            stated["reasoning"] = "kept" if any(reasoning.values()) else "removed"
            told += f", reasoning {stated['reasoning']}"
        task = progress.add_task(told, total=len(records), completed=len(rows))
        yield Evaluation(stated, out, by_key, seen, rows, progress, task)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 (hex) of all names, types and values of a model's state, adapters included.

    Of a model whose weights are sharded over processes, all of these must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _read_images(records: Sequence[Record], progress: Progress) -> dict[Path, str]:
    """`content_digest` of each image, all of them decoded once to see that they can be; warnings about them are counted
    on stderr.
    """
    asking = {
        path: record.id for record in reversed(records) for path in reversed(record.images)
    }  # the first that does
    paths = list(reversed(asking))
    read = progress.track(all_cores(_read_image, paths), total=len(paths), description="images")
    looked = dict(zip(paths, read, strict=True))
    failures = [f"record {asking[path]}: {error}" for path, error in looked.items() if isinstance(error, MedR1Error)]
    if failures:
        others = f" (the first of {len(failures)} unreadable images)" if len(failures) > 1 else ""
        raise MedR1Error(f"{failures[0]}{others}; or leave their records out")
    told = {path: look for path, look in looked.items() if not isinstance(look, MedR1Error)}
    if warned := by_warning({path: warnings for path, (_, warnings) in told.items()}):
        counts = "; ".join(f"{warning} ({len(images)}, first {images[0]})" for warning, images in warned.items())
        num_warned = len({image for images in warned.values() for image in images})
        tell_once(f"{num_warned} of {len(told)} images are read with a warning: {counts}", "yellow")
    return {path: digest for path, (digest, _) in told.items()}


def _read_image(path: Path) -> tuple[str, list[str]] | MedR1Error:
    """Digest of what the image's reference names, and what `read_image` warns of."""
    try:
        warnings = read_image(path).decisions["warnings"]
        return content_digest(path), warnings
    except MedR1Error as error:
        return error


def _with_images(evaluation: Evaluation, batches: Iterable[Asked]) -> Iterator[tuple[Asked, Loaded]]:
    """Each batch with its images, which are read on all cores while the caller has the batch before.

    Images alone are read ahead: a tokenizer is not for two threads, since padding is a state of it.
    """
    with ThreadPoolExecutor(num_cores()) as readers:  # threads, since decoders work outside of Python's lock
        waiting: list[tuple[Asked, dict[tuple[Path, ...], Record], Iterator[list[Image.Image]]]] = []
        for batch in batches:
            asked = {record.images: record for _, record in batch}
            waiting.append((batch, asked, readers.map(evaluation.images, asked.values())))
            if len(waiting) > 1:
                first, of_first, read = waiting.pop(0)
                yield first, dict(zip(of_first, read, strict=True))
        for last, of_last, read in waiting:
            yield last, dict(zip(of_last, read, strict=True))


def _reading_order(asked: list[tuple[str, Record]], mode: str) -> list[tuple[str, Record]]:
    """Questions about the same images side by side, so that a batch reads these once; among them, and among sets of
    images, prompts of like length, so that there is little padding. Longest first: too little memory shows at once.
    """
    lengths = {record.id: len(build_messages(record, mode)[0]["content"][-1]["text"]) for _, record in asked}
    longest: dict[tuple[Path, ...], int] = {}
    for _, record in asked:
        longest[record.images] = max(lengths[record.id], longest.get(record.images, 0))

    def place(item: tuple[str, Record]) -> tuple[int, tuple[Path, ...], int]:
        return -longest[item[1].images], item[1].images, -lengths[item[1].id]

    return sorted(asked, key=place)


def record_fields(record: Record, folder: Path) -> Row:
    """What a row says of the record as it was asked; image paths relative to the row's folder."""
    return {
        "id": record.id,
        "modality": record.modality,
        "question_type": record.question_type,
        "source": record.source,
        "group": record.group,
        "images": [os.path.relpath(path, folder) for path in record.images],
        "question": record.question,
        "options": list(record.options),
        "gold": record.answer,
        "chance": record.chance,
        **({"alternatives": list(record.alternatives)} if record.is_open else {}),
    }


def _resume(out: Path) -> list[Row]:
    """Rows that a former run left, scored by the present extractor; a torn last line is cut off the file."""
    if not out.exists():
        return []
    content = out.read_bytes()
    if not content.startswith(ROW_START[: len(content)]):
        raise MedR1Error(f"{out}: is no file of evaluation rows; give another file")
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(out, whole)
    rows = read_jsonl(out)
    if any(row["extractor_version"] != EXTRACTOR_VERSION for row in rows):
        rows = score(rows)
        write_jsonl(out, rows)
    return rows


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr), disable=not is_first())
