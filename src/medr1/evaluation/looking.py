"""Does a model look at the image, and does its answer follow from its reasoning? Measures over rows of evaluations.

One model is asked the same questions in several ways, each an evaluation of `medr1.evaluation.run` (`look` asks them
all); `WAYS` names them. Two of them give a measure: what exchanging the image does, and what it does while the
reasoning stays. After *Beyond Accuracy* (arXiv:2603.03437); reliance with the reasoning kept and removed, and
consistency, are our own.

- accuracy, accuracy_other, accuracy_blank: shares of right answers, each question counting once.
- reliance, reliance_blank: accuracy with the own image less accuracy with another record's image of the same modality,
  or with a blank one (its visual reliance score).
- sensitivity: share of answers that change when the image is exchanged for another of the modality.
- claims: share of replies that claim to see something (`medr1.data.claims`).
- hallucinated: share of replies that claim to see something although the answer stays the same whatever image is shown
  (another of the modality, and a blank one where that was asked too).
- reliance_kept, sensitivity_kept: as above, while the reply's own reasoning is held fixed and only the answer is drawn
  again, the most probable option after it (`confidence.option_logprobs`). What is left of reliance is the answer's own
  look at the image; little is left where the reasoning carries all that was seen.
- reliance_removed: as above, with no reasoning at all.
- consistency: share of replies whose answer is the one that a reader draws from the reasoning alone. The reader is a
  model that is shown question, options in another order and reasoning, and no image: the model that the run began with,
  or the model itself where that is unknown; its rows name it. A reply without a readable answer or without reasoning is
  not consistent. unread: the same share where the reader is shown no reasoning: what guessing gives.

Each question counts once, and intervals are over groups. Another image of the modality leaves the answers right that
the modality alone gives, such as the modality itself: these count as if the model did not look, in reliance and
sensitivity, so that both are less than 1 for a perfect model. Multiple choice alone, or where there is none open
questions alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medr1.data.claims import claims_to_see
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.evaluation.confidence import reasoning_of
from medr1.evaluation.controls import ALONE, can_be_asked
from medr1.evaluation.intervals import interval
from medr1.evaluation.metrics import by_kind, chosen, paired_p, untrained
from medr1.evaluation.rows import Row, differing, question_of, read_rows, said
from medr1.evaluation.run import evaluate
from medr1.policy.vlm import VLM

Asked = Mapping[str, Sequence[Row]]
"""Way of asking (see WAYS) to the rows that it gave, all of the same records."""

WAYS = {
    "image": "its own image",
    "shuffled": "another image of the modality",
    "blank": "a blank image",
    "kept": "its own image, the reasoning kept",
    "kept_shuffled": "another image of the modality, the reasoning kept",
    "removed": "its own image, without reasoning",
    "removed_shuffled": "another image of the modality, without reasoning",
    "reader": "a reader who sees the reasoning and no image",
    "unread": "a reader who sees neither",
}
MEASURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "accuracy": ("accuracy with its own image", ("image",)),
    "accuracy_other": ("accuracy with another image of the modality", ("shuffled",)),
    "accuracy_blank": ("accuracy with a blank image", ("blank",)),
    "reliance": ("accuracy that the image adds, over another image", ("image", "shuffled")),
    "reliance_blank": ("accuracy that the image adds, over a blank one", ("image", "blank")),
    "sensitivity": ("answers that change with the image", ("image", "shuffled")),
    "claims": ("replies that claim to see something", ("image",)),
    "hallucinated": ("replies that claim to see, whose answer no image changes", ("image", "shuffled")),
    "reliance_kept": ("accuracy that the image adds, the reasoning kept", ("kept", "kept_shuffled")),
    "sensitivity_kept": ("answers that change with the image, the reasoning kept", ("kept", "kept_shuffled")),
    "reliance_removed": ("accuracy that the image adds, the reasoning removed", ("removed", "removed_shuffled")),
    "consistency": ("answers that follow from their reasoning", ("image", "reader")),
    "unread": ("the same, read without the reasoning", ("image", "unread")),
}
"""Measure to its words and the ways of asking that it needs."""
READERS = ("reader", "unread")


def look(
    rows: Sequence[Row],
    records: Sequence[Record],
    ask: Callable[..., list[Row]],
    *,
    out: Path,
    given: Mapping[str, Sequence[Row]] | None = None,
    vlm: VLM | None = None,
    reader: VLM | None = None,
    donors: Sequence[Record] | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Sequence[Row]]:
    """Ask a model in every way but the first, on the records that have an image; rows go to OUT/WAY.jsonl.

    What cannot be asked is left out: another image where a record has no partner (told on stderr), reasoning kept or
    removed in a mode other than "think", of open questions, or without the model at hand.

    Args:
        rows: of these records, condition "image".
        ask: `evaluate` or `evaluate_remote` with all that the rows were made with but records, condition and out.
        out: a folder; `folder_of` names the one beside a file of rows.
        given: controls "shuffled" and "blank" that were asked before.
        vlm: the model, whose options can be weighed; None: behind a server.
        reader: see this module's head; None: no consistency.
        donors: whose images are shown instead, see `evaluate`; those that `ask` has.
        seed: of that choice; the one that `ask` has.

    Raises:
        MedR1Error: as `evaluate`.
    """
    records = [record for record in records if record.images]
    asked: dict[str, Sequence[Row]] = {"image": rows}
    if not records:
        return asked
    shown = [name for name in ("shuffled", "blank") if can_be_asked(records, name, donors)]
    for name in shown:
        asked[name] = (given or {}).get(name) or ask(records, condition=name, out=out / f"{name}.jsonl")
    listed = [record for record in records if not record.is_open]
    if vlm is None or rows[0]["mode"] != "think" or not listed:
        return asked
    kept = {row["id"]: kept_reasoning(row["reply"]) for row in rows}
    removed = dict.fromkeys(kept, "")
    ways: list[tuple[str, VLM | None, str, dict[str, str]]] = [
        ("kept", vlm, "image", kept),
        ("kept_shuffled", vlm, "shuffled", kept),
        ("removed", vlm, "image", removed),
        ("removed_shuffled", vlm, "shuffled", removed),
        ("reader", reader, ALONE, kept),
        ("unread", reader, ALONE, removed),
    ]
    for way, model, condition, reasoning in ways:
        if model is not None and condition in ("image", ALONE, *shown):
            asked[way] = evaluate(
                model,
                listed,
                mode="think",
                out=out / f"{way}.jsonl",
                max_new_tokens=rows[0]["max_new_tokens"],
                batch_size=batch_size,
                condition=condition,
                seed=seed,
                donors=donors,
                reasoning=reasoning,
            )
    return asked


def folder_of(rows: Path) -> Path:
    """Where `medr1 eval --looking` puts the rows of the other ways of asking: answers.looking of answers.jsonl."""
    return rows.with_name(f"{rows.name.removesuffix('.jsonl')}.looking")


def read_looking(path: Path, rows: Sequence[Row]) -> dict[str, Sequence[Row]]:
    """The ways of asking that lie beside a file of rows, these among them.

    Raises:
        MedR1Error: a file there is of another model, mode, limit of tokens or of other questions.
    """
    asked: dict[str, Sequence[Row]] = {"image": rows}
    files = {way: folder_of(path) / f"{way}.jsonl" for way in WAYS}
    files = {way: file for way, file in files.items() if file.is_file()}
    questions = {row["id"]: question_of(row) for row in rows} if files else {}
    for way, file in files.items():
        found = read_rows(file)
        names = ("mode", "max_new_tokens", *(() if way in READERS else ("model",)))
        told = differing(found[0], rows[0], names)
        if told or any(questions.get(row["id"]) != question_of(row) for row in found):
            what = "is of other questions"
            if told:
                what = f"is of {said(found[0], told)}, and {path} of {said(rows[0], told)}"
            raise MedR1Error(f"{file}: {what}; evaluate again with --looking, or remove {file.parent}")
        asked[way] = found
    return asked


def of_all(asked: Asked) -> dict[str, Sequence[Row]]:
    """The ways in which every question was asked that "image" asks: accuracies of others are of other questions."""
    ids = {row["id"] for row in asked["image"]}
    return {way: rows for way, rows in asked.items() if {row["id"] for row in rows} == ids}


def values(asked: Asked) -> dict[str, dict[str, float]]:
    """Each measure's value of each question, by id: a share's 0 or 1, a reliance's -1, 0 or 1.

    Measures whose ways of asking are not there are left out, and so are questions that the model's run trained on, or
    that one of a measure's ways did not ask.
    """
    return {name: _values(name, asked) for name, (_, ways) in MEASURES.items() if all(way in asked for way in ways)}


def _values(name: str, asked: Asked) -> dict[str, float]:
    """By question, so that means over several models, or over seeds, can be taken before the interval."""
    ways = [way for way in MEASURES[name][1] if way in asked]
    if name == "hallucinated" and "blank" in asked:
        ways.append("blank")
    rows = [{row["id"]: row for row in _judged(asked[way])} for way in ways]
    common = [number for number in rows[0] if all(number in others for others in rows)]
    return {number: _value(name, *(by_id[number] for by_id in rows)) for number in common}


def _value(name: str, row: Row, *others: Row) -> float:
    if name.startswith("accuracy"):
        return float(row["correct"])
    if name.startswith("reliance"):
        return float(row["correct"]) - float(others[0]["correct"])
    same = all(chosen(row) == chosen(other) for other in others)
    if name.startswith("sensitivity"):
        return float(not same)
    if name == "claims":
        return float(_claims(row))
    if chosen(row) is None or not same:
        return 0.0
    return float(_claims(row) if name == "hallucinated" else bool(kept_reasoning(row["reply"]).strip()))


def _claims(row: Row) -> bool:
    """By its reply, or as was found before where the long texts are not kept."""
    return row["claims"] if "claims" in row else claims_to_see(row["reply"], row["question"])


def measure(asked: Asked) -> dict[str, dict[str, Any]]:
    """Each measure that can be taken: {value, ci95 (over groups), n}.

    `hallucinated` has also `of_claims`, the same cell over those replies alone that claim to see something;
    `consistency` also `reader`, the reader's name.
    """
    groups = _groups(asked)
    found = {name: cell_of(name, of, groups) for name, of in values(asked).items()}
    if "hallucinated" in found:
        of, claiming = _values("hallucinated", asked), _values("claims", asked)
        found["hallucinated"]["of_claims"] = cell_of(
            "hallucinated", {number: value for number, value in of.items() if claiming[number]}, groups
        )
    if "consistency" in found:
        found["consistency"]["reader"] = asked["reader"][0]["model"]
    return found


def change(before: Asked, after: Asked, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired change of each measure that both allow, see `paired`."""
    groups = _groups(before) | _groups(after)
    old, new = values(before), values(after)
    return {name: paired(name, old[name], new[name], groups, seed) for name in old if name in new}


def paired(
    name: str, old: Mapping[str, float], new: Mapping[str, float], groups: Mapping[str, str], seed: int = 0
) -> dict[str, Any]:
    """Paired change of a measure from its `values`: {difference, ci95, n, groups, p}, as `metrics.paired_change`.

    Args:
        groups: by question.

    Raises:
        MedR1Error: the two have no question in common.
    """
    common = [number for number in old if number in new]
    if (old or new) and not common:
        raise MedR1Error("two evaluations to compare have no question in common; evaluate both on the same data")
    differences, group_N = [new[number] - old[number] for number in common], [groups[number] for number in common]
    low, high = _span(name)
    return {
        "difference": sum(differences) / len(common) if common else None,
        "ci95": _list(interval(differences, group_N, (low - high, high - low))),
        "n": len(common),
        "groups": len(set(group_N)),
        "p": paired_p(differences, group_N, seed),
    }


def cell_of(name: str, of: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, Any]:
    """A measure from its `values`: {value, ci95 (over groups, by question), n}."""
    return {
        "value": sum(of.values()) / len(of) if of else None,
        "ci95": _list(interval([*of.values()], [groups[number] for number in of], _span(name))),
        "n": len(of),
    }


def _span(name: str) -> tuple[float, float]:
    return (-1.0, 1.0) if name.startswith("reliance") else (0.0, 1.0)


def _judged(rows: Sequence[Row]) -> Sequence[Row]:
    choice, of_own_words = by_kind(untrained(rows))
    return choice or of_own_words


def _groups(asked: Asked) -> dict[str, str]:
    return {row["id"]: row["group"] for rows in asked.values() for row in rows}


def _list(ci: tuple[float, float] | None) -> list[float] | None:
    return list(ci) if ci else None


def kept_reasoning(reply: str) -> str:
    """The reasoning that is held fixed; "" of a reply that was cut off before it was whole."""
    text = reply.partition("<think>")[2] or reply
    return reasoning_of(reply) if "</think>" in text or "<answer>" in text else ""
