"""Many questions are kept in a file, a few in a list, and nothing that is done with them tells which."""

import json
import random
import re
import weakref
from collections.abc import Iterator
from itertools import count, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medr1.config import DataConfig
from medr1.data import kept as module
from medr1.data.cache import cache_folder
from medr1.data.datasets import load_records
from medr1.data.heldout import SPLIT, split_of, write_split
from medr1.data.kept import in_order, kept, taken
from medr1.data.parts import load_parts
from medr1.data.records import Record
from medr1.errors import MedR1Error
from medr1.training.draws import Draws, draw_order, record_weights
from medr1.training.looking import OtherImages

FEW = 7


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """From the eighth record on there is a file, in this cache."""
    monkeypatch.setattr(module, "LIMIT", FEW)
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def record(number: int) -> Record:
    """Every third is open, and every other has no image."""
    images = (Path(f"a/{number // 4}.png"), Path("b.tiff#frame=2"))[: number % 3]
    options: dict[str, Any] = {"options": ("a", "b\0c"), "answer": "AB"[number % 2]}
    if number % 3 == 0:
        options = {"options": (), "answer": "größer", "alternatives": ("larger",)}
    return Record(
        id=f"r{(number * 7) % 20:02}", images=images, question="Which?", modality=(None, "CT")[number % 2],
        question_type=None, source="s", group=f"g{number // 3}", groups=("p", "q")[: number % 3], **options,
    )  # fmt: skip


RECORDS = [record(number) for number in range(20)]


def test_a_file_holds_what_a_list_does(few: Path) -> None:
    assert isinstance(kept(RECORDS[:FEW]), list)
    stored = kept(iter(RECORDS))
    assert not isinstance(stored, list) and len(stored) == 20 and [*stored] == RECORDS
    assert (stored[3], stored[-1], stored[np.int32(5)]) == (RECORDS[3], RECORDS[-1], RECORDS[5])
    assert [*stored[2:15:4]] == RECORDS[2:15:4]
    part = taken(stored, (place for place in (9, 2, 2, 17)))
    assert [*part] == taken(RECORDS, [9, 2, 2, 17])
    assert [*taken(part, [3, 0])] == [RECORDS[17], RECORDS[9]]
    assert random.Random(0).sample(stored, 6) == random.Random(0).sample(RECORDS, 6)
    assert {one.group for one in kept(one.model_copy(update={"group": "x"}) for one in stored)} == {"x"}
    with pytest.raises(IndexError):
        stored[20]
    assert not [*few.iterdir()], "the file has no name, so that nothing is ever left"


def test_places_in_order_are_those_of_a_stable_sort(few: Path) -> None:
    for key in (attrgetter("id"), attrgetter("group")):
        right = sorted(range(20), key=[*map(key, RECORDS)].__getitem__)
        assert in_order(kept(RECORDS), key).tolist() == right
    assert in_order([], lambda record: record.id).tolist() == []


def test_no_room_is_one_line_and_a_break_leaves_nothing(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off() -> Iterator[Record]:
        yield from RECORDS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(broken_off())
    assert not [*few.iterdir()]
    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(MedR1Error, match=r"cache: more than 7 questions .*No space left .*free space or set MEDR1_"):
        kept(RECORDS)
    monkeypatch.setenv("MEDR1_CACHE", __file__)
    with pytest.raises(MedR1Error, match=r"test_kept\.py: more than 7 questions .*set MEDR1_CACHE"):
        kept(RECORDS)


def test_a_cache_that_is_named_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("MEDR1_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("MEDR1_CACHE")
    with pytest.raises(MedR1Error, match="set MEDR1_CACHE"):
        cache_folder()


def write_questions(folder: Path) -> Path:
    """Six questions about each of 20 images: rows that are refused, ids used twice, groups that an image joins."""
    options = [["cyst", "scar", "fluid"], ["left", "right"]]
    rows: list[dict[str, Any]] = []
    for number in range(20):
        Image.new("RGB", (3, 3), (number // 2 * 9, 0, 0)).save(folder / f"{number}.png")  # two alike each time
        for question in range(6):
            given = options[question % 2]
            row = {"id": f"{question}-{number}", "image": f"{number}.png", "options": given}
            row |= {"question": f"What is there ({question // 3})?", "answer": "ABC"[number % len(given)]}
            row |= {"modality": ("CT", "MRI")[number % 2], "question type": "Disease Diagnosis"}
            rows.append(row | ({"group": f"patient {number // 3}"} if number % 4 else {}))
    rows[30]["id"] = rows[100]["id"] = rows[5]["id"]
    rows[50]["answer"] = "Z"
    lines = [json.dumps(row) for row in rows]
    lines[70] += ","
    (folder / "first.jsonl").write_text("\n".join(lines[:40]))
    (folder / "second.jsonl").write_text("\n".join(lines[40:]))
    return folder


def all_that_is_done(folder: Path, run: Path) -> tuple[Any, ...]:
    """With the records of a training run, in values that can be compared."""
    refused: list[str] = []
    records = [*load_records(folder, refused=refused)]
    config = DataConfig(path=str(folder), modalities=["CT", "MRI"], test_fraction=0.3)
    train, test = load_parts(config)
    run.mkdir()
    (run / "recipe.toml").write_text(f'[data]\npath = "{folder}"\ntest_fraction = 0.3\n')
    for _ in range(2):  # the second goes on with it
        write_split(run, train, test, "tiny")
    split = split_of(run)
    assert split is not None
    others = OtherImages(train)
    shown = [(others.exchanged(one, 0.5, "0"), others.control(one, "0")) for one in train]
    weights = record_weights(train, "needs_image")
    orders = [[*islice(draw_order(train, weights, balance, 3), 200)] for balance in ("off", "both", "modality")]
    draws = Draws(train, lambda: draw_order(train, weights, "off", 0), 0)
    draws.learn(3, 2, 8)
    taken_ones = draws.take(40, rate=0.5)
    written = (run / SPLIT).read_text()
    by_run = [[*part] for part in load_parts(config, split)]
    seen = split.seen(kept([*train, *test]))
    return refused, records, [*train], [*test], written, seen, shown, weights.tolist(), orders, taken_ones, by_run


def test_a_run_from_a_file_is_the_run_from_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDR1_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    folder = write_questions(tmp_path / "data")
    listed = all_that_is_done(folder, tmp_path / "listed")
    monkeypatch.setattr(module, "LIMIT", FEW)
    stored = all_that_is_done(folder, tmp_path / "stored")
    for of_list, of_file in zip(listed, stored, strict=True):
        assert of_list == of_file
    refused, records = listed[:2]
    assert len(records) == 116
    assert [re.findall(r"(\w+)\.jsonl: (row \d+)", line)[0] for line in refused] == [
        ("first", "row 31"), ("second", "row 11"), ("second", "row 31"), ("second", "row 61"),
    ]  # fmt: skip
    assert "id '5-0' was used before, at" in refused[0] and refused[0].endswith("first.jsonl: row 6; make ids unique")
    assert {*listed[5]} == {"trained on", "held out"}


def test_a_few_records_are_there_at_a_time(few: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However many there are: the most that exist while questions are loaded and divided is the same."""
    monkeypatch.setattr("medr1.data.images.contents.TOGETHER", FEW)
    alive: dict[int, weakref.ref[Record]] = {}
    most = [0]
    unpacked = Record.unpacked

    def counted(values: dict[str, Any]) -> Record:
        made, number = unpacked(values), next(numbers)
        alive[number] = weakref.ref(made, lambda _: alive.pop(number))
        most[0] = max(most[0], len(alive))
        return made

    numbers = count()
    monkeypatch.setattr(Record, "unpacked", counted)
    found = []
    for number in (40, 120):
        rows = [{"image": [], "question": f"What is {n}?", "answer": "x", "group": f"g{n}"} for n in range(number)]
        (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
        most[0] = 0
        train, test = load_parts(DataConfig(path=str(tmp_path / "many.jsonl")))
        assert len(train) + len(test) == number and not isinstance(train, list)
        assert torch.equal(record_weights(train, ""), torch.ones(len(train), dtype=torch.float64))
        found.append(most[0])
    assert found[0] == found[1] < 40
