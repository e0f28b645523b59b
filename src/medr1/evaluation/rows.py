"""Rows of evaluations as they lie in files, believed for what they say of themselves and not for a file's name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medr1.data.answers import EXTRACTOR_VERSION, extract_answer, format_ok, is_correct, read_answer, token_f1
from medr1.data.records import LETTERS, Record, normalise_option, read_jsonl
from medr1.errors import MedR1Error
from medr1.processes import tell_once

Row = dict[str, Any]

STATED = ("model", "condition", "mode", "max_new_tokens", "scoring", "reasoning")
"""What every row says of its evaluation, and one evaluation has one value of. Rows of older versions state less."""
NEEDED: dict[str, Any] = {
    **dict.fromkeys(("id", "source", "group", "question", "gold", "model", "condition", "mode", "outcome"), str),
    **dict.fromkeys(("images", "options"), list),
    **dict.fromkeys(("modality", "question_type", "finish", "letter"), str | None),
    **dict.fromkeys(("chance", "tokens"), float | int | None),
    **dict.fromkeys(("correct", "format_ok"), int),
    "reply": str,
}
"""Fields that rows of every version have, and what may stand in them."""


def read_rows(path: Path) -> list[Row]:
    """The rows of one evaluation, as the extractor of this version reads their replies; a line on stderr says where
    another had.

    Raises:
        MedR1Error: no such file, no rows of an evaluation in it, a row in which a field is missing or of another
            type, a question that stands there twice, or rows of several evaluations.
    """
    rows = read_jsonl(path)
    if not rows or not all(isinstance(row, dict) and {"id", "outcome"} <= row.keys() for row in rows):
        raise MedR1Error(f"{path}: holds no evaluation rows; give a file that `medr1 eval` wrote")
    for row in rows:
        if absent := [name for name in NEEDED if name not in row]:
            raise MedR1Error(f"{path}: record {row['id']} has no {absent[0]}; give the file as `medr1 eval` wrote it")
        wrong = [name for name, kind in NEEDED.items() if not isinstance(row[name], kind)]
        wrong += [name for name in ("images", "options") if not all(isinstance(part, str) for part in row[name])]
        if wrong:
            raise MedR1Error(
                f"{path}: record {row['id']} says {str(row[wrong[0]])[:40]!r} under {wrong[0]}; give the file as"
                " `medr1 eval` wrote it"
            )
    ids = Counter(row["id"] for row in rows)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise MedR1Error(
            f"{path}: {len(twice)} of {len(ids)} questions stand there twice, such as {twice[0]}; two evaluations wrote"
            " it, evaluate anew into another file"
        )
    kinds: dict[str, Row] = {}  # one row of each, the first
    for row in rows:
        kinds.setdefault(str([row.get(name) for name in (*STATED, "weights")]), row)
    for row in kinds.values():
        if name := differing(rows[0], row, STATED):
            raise MedR1Error(
                f"{path}: holds rows of {said(rows[0], name)} and of {said(row, name)}; evaluate anew, one file each"
            )
    if former := {row.get("extractor_version", EXTRACTOR_VERSION) for row in rows} - {EXTRACTOR_VERSION}:
        from medr1.evaluation.scoring import score  # which knows rows by this module

        tell_once(
            f"{path.parent}: its replies were read by extractor version {min(former)}, and are read again by version"
            f" {EXTRACTOR_VERSION}",
            "yellow",
        )
        return score(rows)
    return rows


def differing(row: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of these fields in which they differ; what only one of them states is no difference."""
    for name in names:
        own, others = (_stated(row, name, other), _stated(other, name, row))
        if None not in (own, others) and own != others:
            return name
    return None


def _stated(row: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> Any:
    if name == "model" and row.get("weights") and other.get("weights"):
        return row["weights"]  # the same model may have been called by two names, and two models by one
    if name == "scoring":  # where there is a reply besides, it is what was answered, whatever was weighed
        scoring = row.get("scoring", "reply")
        return "reply" if scoring == "options" and row["mode"] != "no-think" else scoring
    if name == "reasoning":
        return row.get(name, "its own")
    return row.get(name)


def said(row: Mapping[str, Any], name: str) -> str:
    """As in "model runs/ct/model": the weights too, where the name alone does not tell two models apart."""
    weights = f" (weights {row['weights'][:8]})" if name == "model" and row.get("weights") else ""
    absent = {"scoring": "reply", "reasoning": "its own"}
    return f"{name} {row.get(name, absent.get(name))}{weights}"


def check_pair(rows: Sequence[Row], path: Path, others: Sequence[Row], other: Path, names: Sequence[str]) -> None:
    """That two evaluations may be set side by side: alike in these fields, and of the same questions.

    Raises:
        MedR1Error: what differs, and the remedy.
    """
    if name := differing(rows[0], others[0], names):
        raise MedR1Error(
            f"{path}: is of {said(rows[0], name)}, and {other} of {said(others[0], name)}; evaluate both alike"
        )
    asked, others_asked = ({row["id"]: question_of(row) for row in part} for part in (rows, others))
    ids = asked.keys() | others_asked.keys()
    if unlike := sorted(name for name in ids if asked.get(name) != others_asked.get(name)):
        raise MedR1Error(
            f"{path} and {other}: {len(unlike)} of {len(ids)} questions are not the same in both, such as {unlike[0]};"
            " evaluate both on the same data, --part and --limit"
        )


def question_of(row: Row) -> tuple[Any, ...]:
    """What was asked, whatever the order of the options: question, their texts, the right one."""
    texts = [normalise_option(text) for text in row["options"]]
    gold = texts[LETTERS.index(row["gold"])] if texts else row["gold"]
    return row["question"], row["modality"], row["question_type"], sorted(texts), gold


def record_of(row: Row) -> Record:
    """The record that a row answers, without its images."""
    return Record(
        id=row["id"],
        images=(),
        question=row["question"],
        options=tuple(row["options"]),
        answer=row["gold"],
        modality=row["modality"],
        question_type=row["question_type"],
        source=row["source"],
        group=row["group"],
        alternatives=tuple(row.get("alternatives", ())),
    )


def read_reply(row: Row) -> Row:
    """The fields of a row that are read from its reply, or its samples, alone; see `medr1.evaluation.scoring.score`."""
    record = record_of(row)
    chosen = voted(row["samples"], record.options) if "samples" in row else {}
    row = {**row, **chosen}
    answer = read_answer(row["reply"], record)
    # A service's filter took the whole reply, or reasoning that it does not show all the tokens.
    unsaid = {"content_filter": "refusal", "length": "truncated"} if not row["reply"].strip() else {}
    fields = {
        **chosen,
        "outcome": unsaid.get(row.get("finish") or "", answer.outcome),
        "letter": answer.letter,
        "correct": is_correct(answer, record),
        "format_ok": format_ok(row["reply"], row["mode"]),
        "extractor_version": EXTRACTOR_VERSION,
    }
    if record.is_open:
        right = (record.answer, *record.alternatives)
        fields |= {"text": answer.text, "token_f1": token_f1(answer.text or "", right)}
    return fields


def voted(samples: Sequence[dict[str, Any]], options: Sequence[str]) -> dict[str, Any]:
    """The answer of several replies {reply, …} to one question: the option that most of them name, tied the first.

    Returns:
        The first sample that names it (the first of all where none names an option), with option_probs: each
        option's share of the votes after one more vote that is divided equally, so that none is 0.
    """
    letters = [extract_answer(sample["reply"], options).letter for sample in samples]
    votes = Counter(filter(None, letters))
    chosen = letters.index(votes.most_common(1)[0][0]) if votes else 0
    share = 1 / len(options)
    counts = [votes[letter] for letter in LETTERS[: len(options)]]
    return {**samples[chosen], "option_probs": [(count + share) / (sum(counts) + 1) for count in counts]}
