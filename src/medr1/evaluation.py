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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medr1.answers import EXTRACTOR_VERSION, extract_answer, is_correct
from medr1.controls import CONDITIONS, blank_image, shuffled_partners
from medr1.errors import MedR1Error
from medr1.images import load_image
from medr1.models import VLM, encode_prompts
from medr1.prompts import build_messages
from medr1.records import Record, append_jsonl, read_jsonl, write_atomic
from medr1.rewards import format_ok
from medr1.rollouts import sample

Row = dict[str, Any]

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
) -> list[Row]:
    """Answer every record once, greedily, and write one row each to `out`.

    Images are all read before the model runs: an unreadable one stops the evaluation at once, since leaving
    its record out would change the denominator. Rows already in `out` are kept and not computed again; the
    file must hold nothing else, so that what is in it is always one evaluation.

    Args:
        mode: one of prompts.MODES.
        out: a .jsonl file. Image paths in its rows are relative to its folder.
        max_new_tokens: a longer reply is cut there and counts as it stands.
        condition: "image"; or a control: "blank" (mean colour, same size) or "shuffled" (the image of another
            group of the same modality, drawn by `seed`).

    Returns:
        One row a record, in the order of `records`:
        key, id, modality, question_type, source, group, images, question, options, gold (letter), chance;
        model, condition, mode; reply (raw text), finish ("stop" or "length"), tokens, seconds (its batch's
        time divided by the batch's rows); outcome, letter, correct, format_ok, extractor_version (see
        `score`).

    Raises:
        MedR1Error: no records, two records of one id, an unreadable image, no partner to shuffle with, rows
            of another evaluation in `out`, or a full disk. Rows written until then are whole and used again.
    """
    if condition not in CONDITIONS:
        raise MedR1Error(f"condition {condition!r} is unknown; choose {', '.join(CONDITIONS)}")
    if not records:
        raise MedR1Error(f"{out}: no records to evaluate; widen the filters")
    shown = _shown(records, condition, seed)

    with _progress() as progress:
        digests = _read_images(progress.track(shown.values(), description="images"))
        settings = {"max_new_tokens": max_new_tokens, "greedy": True, "condition": condition}
        run = _digest([weights_fingerprint(vlm.model), vlm.processor.image_processor.to_dict(), settings])
        by_key = {}
        for record in records:
            content = record.model_dump_json(exclude={"images", "licence"})
            images = [digests[path] for path in shown[record.id].images]
            by_key[_digest([run, build_messages(record, mode), content, images])] = record

        rows = {row["key"]: row for row in _resume(out)}
        if foreign := rows.keys() - by_key.keys():
            raise MedR1Error(f"{out}: holds {len(foreign)} rows of another model, setting or data; name another file")
        pending = [(key, record) for key, record in by_key.items() if key not in rows]
        # Prompts of like length share a batch: less padding. Longest first: too little memory shows at once.
        pending.sort(key=lambda item: -len(build_messages(item[1], mode)[0]["content"][-1]["text"]))
        task = progress.add_task(f"{vlm.name}, {condition}", total=len(records), completed=len(rows))
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            started = time.perf_counter()
            prompts = encode_prompts(
                vlm,
                [build_messages(record, mode) for _, record in batch],
                [_images(shown[record.id], condition) for _, record in batch],
            )
            rollout = sample(vlm, prompts, num_completions=1, max_new_tokens=max_new_tokens, greedy=True, seed=seed)
            seconds = round((time.perf_counter() - started) / len(batch), 4)
            replies = zip(
                batch,
                rollout.texts,
                rollout.finished_N.tolist(),
                rollout.mask_NT.sum(1).tolist(),
                strict=True,
            )
            new = score(
                {
                    "key": key,
                    **_record_fields(record, shown[record.id], out.parent),
                    "model": vlm.name,
                    "condition": condition,
                    "mode": mode,
                    "reply": reply,
                    "finish": "stop" if finished else "length",
                    "tokens": tokens,
                    "seconds": seconds,
                }
                for (key, record), reply, finished, tokens in replies
            )
            append_jsonl(out, new)
            rows |= {row["key"]: row for row in new}
            progress.advance(task, len(batch))
    return [rows[key] for key in by_key]


def score(rows: Iterable[Row]) -> list[Row]:
    """The same rows with outcome, letter, correct and format_ok read anew from the stored replies."""
    scored = []
    for row in rows:
        record = Record(
            id=row["id"],
            images=(),
            question=row["question"],
            options=tuple(row["options"]),
            answer=row["gold"],
            modality=row["modality"],
            question_type=row["question_type"],
            source=row["source"],
            group=row["group"],
        )
        answer = extract_answer(row["reply"], record.options)
        scored.append(
            {
                **row,
                "outcome": answer.outcome,
                "letter": answer.letter,
                "correct": is_correct(answer, record),
                "format_ok": format_ok(row["reply"], row["mode"]),
                "extractor_version": EXTRACTOR_VERSION,
            }
        )
    return scored


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 (hex) of all names, types and values of a model's state, adapters included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _shown(records: Sequence[Record], condition: str, seed: int) -> dict[str, Record]:
    """For each record id, the record whose images are shown."""
    shown = {record.id: record for record in records}
    if len(shown) < len(records):
        ids = Counter(record.id for record in records)
        raise MedR1Error(f"record {ids.most_common(1)[0][0]} is there twice; give each record its own id")
    if condition == "blank" and (textual := [record.id for record in records if not record.images]):
        raise MedR1Error(f"record {textual[0]}: no image to blank; leave the blank control out")
    return shuffled_partners(records, seed) if condition == "shuffled" else shown


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _read_images(records: Iterable[Record]) -> dict[Path, str]:
    """SHA-256 of each image file, all of them decoded once to see that they can be."""
    digests: dict[Path, str] = {}
    failures: dict[Path, str] = {}
    for record in records:
        for path in record.images:
            if path in digests or path in failures:
                continue
            try:
                load_image(path)
                digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except MedR1Error as error:
                failures[path] = f"record {record.id}: {error}"
    if failures:
        first = next(iter(failures.values()))
        others = f" (the first of {len(failures)} unreadable images)" if len(failures) > 1 else ""
        raise MedR1Error(f"{first}{others}; or leave their records out")
    return digests


def _images(record: Record, condition: str) -> list[Image.Image]:
    images = [load_image(path) for path in record.images]
    return [blank_image(image) for image in images] if condition == "blank" else images


def _record_fields(record: Record, shown: Record, folder: Path) -> Row:
    return {
        "id": record.id,
        "modality": record.modality,
        "question_type": record.question_type,
        "source": record.source,
        "group": record.group,
        "images": [os.path.relpath(path, folder) for path in shown.images],
        "question": record.question,
        "options": list(record.options),
        "gold": record.answer,
        "chance": record.chance,
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
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr))
