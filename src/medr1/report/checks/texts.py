"""Defects of what stands in words: questions asked twice, options, spellings, and what the answers alone give away."""

import contextlib
import difflib
import itertools
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from medr1.data.datasets import canonical_modality, canonical_question_type, is_omnimedvqa, question_tables
from medr1.data.datasets.medr1_splits import is_medr1_splits, split_files
from medr1.data.datasets.omnimedvqa import question_files
from medr1.data.datasets.rows import letter_of
from medr1.data.datasets.tables import Table, read_table
from medr1.data.kept import taken
from medr1.data.records import LETTERS, MODALITIES, QUESTION_TYPES, Record, normalise_option, plain
from medr1.evaluation.metrics import NOT_STATED

NEAR_STEM = 0.9
"""difflib's ratio from which two stems, in `plain` form, are near the same."""
NUM_ANSWERS = 5
"""Answers shown for a question type, the most frequent ones."""
OPEN_KINDS = ("open, a text", "open, yes or no")


def questions(files: Iterable[Sequence[Record]], content: Mapping[Path, str]) -> dict[str, list[Any]]:
    """Questions that are asked more than once about one picture, each file by itself.

    A published split has the same question in its families of files, which is no defect; what its train and
    test files share is told by `medr1.report.checks.parts`.

    Args:
        files: the records of each file, or of several as one, see `medr1.report.checks.parts.asked_apart`.
        content: image to what identifies its pixels.

    Returns:
        repeated: sets of ids with the same picture and stem. conflicting: those of them whose right answers
        differ. near_same: pairs of ids about one picture whose stems are near the same, but not the same.
    """
    found: dict[str, list[Any]] = {"repeated": [], "conflicting": [], "near_same": []}
    for records in files:
        about: dict[tuple[str, ...], dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            shown = about[tuple(content[image] for image in record.images)]
            shown[plain(record.question)].append((record.id, plain(record.gold)))
        for by_stem in about.values():
            for same in by_stem.values():
                ids = [name for name, _ in same]
                if len(same) > 1:
                    found["repeated"].append(ids)
                if len({gold for _, gold in same}) > 1:
                    found["conflicting"].append(ids)
            for stem, other in itertools.combinations(by_stem, 2):
                if _near_same(stem, other):
                    found["near_same"].append([by_stem[stem][0][0], by_stem[other][0][0]])
    return found


def options(records: Sequence[Record]) -> dict[str, list[Any]]:
    """duplicates: ids of records of which two options agree up to case and spaces (never the right one, which
    the reader refuses). variants: option texts, and stem_variants: stems, that differ only in case, punctuation
    or spacing, as {text: number of records}: a model may tell the right option by its spelling.
    """
    return {
        "duplicates": [r.id for r in records if len(set(map(normalise_option, r.options))) < len(r.options)],
        "variants": _variants(option for record in records for option in record.options),
        "stem_variants": _variants(record.question for record in records),
    }


def spellings(path: Path) -> dict[str, Any]:
    """What the reader mends in the files.

    Returns:
        canonicalised: {"field", "written", "read_as", "rows"} for each spelling of a modality, a question type,
        a key or an answer that is not the canonical one; mended: their rows together. spaces: the rows,
        "<file>: row <number>", in which a text begins or ends with white space or has it doubled.
    """
    seen: Counter[tuple[str, str, str]] = Counter()
    spaces = []
    omnimedvqa = is_omnimedvqa(path)
    for table in _tables(path):
        for number, row in enumerate(table.rows, start=1):
            if not isinstance(row, dict):
                continue  # refused by the reader, and told there
            if omnimedvqa:
                with contextlib.suppress(AttributeError, KeyError, ValueError):  # refused likewise
                    seen.update([*_canonicalised(row)])
            elif "problem" in table.columns:
                seen["file name", table.stem, _file_read_as(table.stem)] += 1
            texts = [text for key, text in row.items() if isinstance(text, str) and not key.startswith("image")]
            if any(text != " ".join(text.split()) for text in texts):
                spaces.append(f"{Path(table.name).name}: row {number}")
    canonicalised = [
        {"field": field, "written": written, "read_as": read_as, "rows": rows}
        for (field, written, read_as), rows in seen.most_common()
        if written != read_as
    ]
    return {
        "canonicalised": canonicalised,
        "mended": sum(line["rows"] for line in canonicalised),
        "spaces": spaces,
    }


def letters(records: Sequence[Record]) -> dict[str, Any]:
    """Where the right option stands.

    Args:
        records: multiple choice, at least one.

    Returns:
        by_num_options: for each number of options, letter to the number of records that have it right.
        p: chi-squared test that the letters of an item are equally likely, summed over numbers of options.
        best: the letter that is right most often; best_share: of the records.
    """
    by_num_options: dict[int, dict[str, int]] = {}
    for num in sorted({len(record.options) for record in records}):
        right = Counter(record.answer for record in records if len(record.options) == num)
        by_num_options[num] = {letter: right[letter] for letter in LETTERS[:num]}
    statistic = sum(stats.chisquare(list(right.values())).statistic for right in by_num_options.values())
    best, times = Counter(record.answer for record in records).most_common(1)[0]
    return {
        "by_num_options": {str(num): right for num, right in by_num_options.items()},
        "p": float(stats.chi2.sf(statistic, sum(num - 1 for num in by_num_options))),
        "best": best,
        "best_share": times / len(records),
    }


def answers(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """What the commonest answer alone scores, by question type, or by modality where no type is stated; of open
    questions apart, by whether yes or no is the answer.

    Returns:
        For each: n, distinct (right answers, up to case and punctuation), top ([text, n] of the most frequent),
        chance (None of open texts), and majority: the accuracy of always giving the most frequent answer, and a
        guess where it is not offered.
    """
    by_kind: dict[str, array[int]] = defaultdict(lambda: array("i"))
    for place, record in enumerate(records):
        kind = record.question_type or f"{record.modality or NOT_STATED}, any type"
        by_kind[OPEN_KINDS[record.is_yes_no] if record.is_open else kind].append(place)
    order = (*QUESTION_TYPES, *(f"{modality}, any type" for modality in (*MODALITIES, NOT_STATED)), *OPEN_KINDS)
    table = {}
    for kind in sorted(by_kind, key=order.index):
        some = taken(records, by_kind[kind])
        right = Counter(plain(record.gold) for record in some)
        spelt = {plain(record.gold): record.gold for record in some}
        best = right.most_common(1)[0][0]
        guessed = sum(r.chance or 0 for r in some if not r.is_open and best not in map(plain, r.options))
        table[kind] = {
            "n": len(some),
            "distinct": len(right),
            "top": [[spelt[answer], times] for answer, times in right.most_common(NUM_ANSWERS)],
            "chance": None if kind == OPEN_KINDS[False] else mean_chance(some),
            "majority": (right[best] + guessed) / len(some),
        }
    return table


def mean_chance(records: Sequence[Record]) -> float:
    """Mean accuracy of a guess, of records that can be guessed at."""
    return sum(record.chance or 0 for record in records) / len(records)


def _near_same(stem: str, other: str) -> bool:
    matcher = difflib.SequenceMatcher(None, stem, other, autojunk=False)
    return all(ratio() >= NEAR_STEM for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def _variants(texts: Iterable[str]) -> list[dict[str, int]]:
    """Sets of texts that agree up to case, punctuation and spacing, each with its count; the most frequent first."""
    by_key: dict[str, dict[str, int]] = defaultdict(dict)
    for text, times in Counter(texts).items():
        by_key[plain(text).replace(" ", "")][text] = times
    sets = [dict(sorted(same.items(), key=lambda item: -item[1])) for same in by_key.values() if len(same) > 1]
    return sorted(sets, key=lambda same: -sum(same.values()))


def _tables(path: Path) -> Iterable[Table]:
    """The tables that a data set's records come from; those of the hub are not read a second time."""
    if is_omnimedvqa(path):
        return map(read_table, question_files(path))
    if not path.exists():
        return []
    return (
        map(read_table, split_files(path))
        if is_medr1_splits(path)
        else [table for table, _ in question_tables(path)[0]]
    )


def _canonicalised(row: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """(field, as written, as read) of one row of OmniMedVQA that the reader accepts."""
    key = "modality_type" if "modality_type" in row else "modality"
    yield "key", key, "modality_type"
    yield key, row[key], canonical_modality(row[key])
    yield "question_type", row["question_type"], canonical_question_type(row["question_type"])
    gold = row["gt_answer"].strip()
    texts = [row[key].strip() for key in row if key.startswith("option_") and row[key] is not None]
    yield "gt_answer", gold, texts[LETTERS.index(letter_of(gold, texts))]


def _file_read_as(stem: str) -> str:
    """A split file's name with the canonical modality or question type in it."""
    name, _, part = stem.rpartition("_")
    for canonical in (canonical_modality, canonical_question_type):
        with contextlib.suppress(ValueError):
            return f"{canonical(name)}_{part}"
    return "modality of each row's source"
