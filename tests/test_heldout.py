"""What a run trained on and held out lies in its folder, and every command that asks its model goes by that."""

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medr1.cli import main
from medr1.config import DataConfig, load_config
from medr1.data.datasets import load_records
from medr1.data.heldout import SPLIT, RunSplit, split_of, write_split
from medr1.data.parts import load_parts, split_of_run
from medr1.data.phantoms import write_phantoms
from medr1.data.records import Record, read_jsonl
from medr1.errors import MedR1Error
from medr1.evaluation.metrics import compare, summarise
from medr1.training.folder import write_recipe

SMALL = ("--steps", "1", "--mode", "no-think", "--set", "rollout.num_completions=2")
SMALL = (*SMALL, "--set", "rollout.max_new_tokens=4", "--set", "optimizer.prompts_per_step=2")
SPLIT_SEED = ("--set", "data.test_fraction=0.1", "--set", "data.split_seed=3")


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8))


def own_data(folder: Path, numbers: range, *, form: str = "png", start: str = "", groups: bool = True) -> Path:
    """A table with an image a row, two images a patient."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        picture(number).save(folder / f"{start}{number}.{form}")
        row = {"id": f"{start}{number}", "image": f"{start}{number}.{form}", "question": f"{number}?", "answer": "x"}
        rows.append(row | ({"group": f"patient {number // 2}"} if groups else {}))
    (folder / "mine.json").write_text(json.dumps(rows))
    return folder


def make_run(folder: Path, data: Path, **overrides: Any) -> RunSplit:
    """A run's folder without a model."""
    config = load_config(overrides={"data.path": str(data), "data.test_fraction": 0.3} | overrides)
    train, test = load_parts(config.data)
    write_recipe(config, folder)
    write_split(folder, train, test, config.model.name)
    run = split_of(folder / "model")
    assert run is not None
    return run


def side_of(run: RunSplit, records: list[Record]) -> dict[str, str]:
    return dict(zip((record.id for record in records), run.seen(records), strict=True))


def test_the_same_images_are_known_wherever_they_lie(tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", range(40))
    run = make_run(tmp_path / "run", data)
    sides = side_of(run, load_records(data))
    assert Counter(sides.values()).keys() == {"trained on", "held out"}
    _, test = load_parts(run.data)
    assert {r.id for r in test} == {id for id, side in sides.items() if side == "held out"}

    shutil.move(data, tmp_path / "elsewhere")
    assert side_of(run, load_records(tmp_path / "elsewhere")) == sides
    # other names, another format, no groups
    again = own_data(tmp_path / "again", range(40), form="bmp", start="x", groups=False)
    assert side_of(run, load_records(again)) == {f"x{id}": side for id, side in sides.items()}


def test_a_new_image_of_a_seen_patient_is_trained_on_and_of_a_new_one_never_seen(tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", range(40))
    run = make_run(tmp_path / "run", data)
    sides = side_of(run, load_records(data))
    rows = json.loads((data / "mine.json").read_text())
    for number, row in enumerate(rows[:40:2]):
        picture(100 + number).save(data / f"new{number}.png")
        rows.append(row | {"id": f"new{row['id']}", "image": f"new{number}.png"})
    picture(200).save(data / "other.png")
    rows.append(rows[0] | {"id": "other", "image": "other.png", "group": "patient 99"})
    # one that links a patient who was trained on with one who was held out
    ids = {side: next(id for id in sides if sides[id] == side) for side in ("trained on", "held out")}
    rows.append(rows[0] | {"id": "link", "image": [f"{id}.png" for id in ids.values()], "group": ["patient 98"]})
    (data / "mine.json").write_text(json.dumps(rows))

    grown = load_records(data)
    assert side_of(run, grown) == {
        **sides,
        **{f"new{row['id']}": sides[row["id"]] for row in rows[:40:2]},
        "other": "never seen",
        "link": "trained on",
    }
    # The parts that its model is asked by: the run's list rules, though new data join two of its clusters.
    train, test = load_parts(run.data, run)
    held_out = {record.id for record in test}
    assert {id for id, side in sides.items() if side == "held out"} <= held_out
    assert not {id for id, side in sides.items() if side == "trained on"} & held_out
    assert "link" not in held_out
    assert len(train) + len(test) == len(grown)


def test_groups_of_other_data_say_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", own_data(tmp_path / "data", range(40)))
    other = load_records(own_data(tmp_path / "other", range(500, 520), start="q"))
    assert {record.groups[0] for record in other} == {f"patient {n}" for n in range(250, 260)}
    other = [record.model_copy(update={"groups": (f"patient {n}",)}) for n, record in enumerate(other)]
    assert set(run.seen(other)) == {"never seen"}


def test_questions_without_images_are_known_by_their_words(tmp_path: Path) -> None:
    table = [{"image": [], "question": f"What is {n}?", "answer": "x"} for n in range(30)]
    (tmp_path / "mine.json").write_text(json.dumps(table))
    run = make_run(tmp_path / "run", tmp_path / "mine.json")
    before = load_records(tmp_path / "mine.json")
    sides = dict(zip((record.question for record in before), run.seen(before), strict=True))
    (tmp_path / "mine.json").write_text(json.dumps([{"image": [], "question": "New?", "answer": "x"}, *table]))
    after = load_records(tmp_path / "mine.json")  # each has the id that another had
    found = dict(zip((record.question for record in after), run.seen(after), strict=True))
    assert found == {"New?": "never seen", **sides}


def test_questions_without_images_are_known_by_their_words_also_where_they_have_a_group(tmp_path: Path) -> None:
    """One patient's questions stay together, and the same words about two patients apart."""
    table = [{"image": [], "question": f"Is it {n % 7}?", "answer": "x", "group": f"p{n // 2}"} for n in range(30)]
    (tmp_path / "mine.json").write_text(json.dumps(table))
    run = make_run(tmp_path / "run", tmp_path / "mine.json")
    train, test = load_parts(run.data)
    assert {record.group for record in train}.isdisjoint(record.group for record in test) and train and test
    assert set(run.seen(train)) == {"trained on"}
    lists = {question["id"]: question["contents"] for question in run.questions("trained_on", "held_out")}
    assert len(lists) == 30 and all(len(contents) == 1 for contents in lists.values())
    other = [record.model_copy(update={"question": "New?", "groups": ("q",), "group": "q"}) for record in test]
    assert set(run.seen(other)) == {"never seen"}


def test_a_list_that_lacks_the_words_of_questions_without_images_is_gone_on_with(tmp_path: Path) -> None:
    """A version before wrote none for those with a group."""
    table = [{"image": [], "question": f"Is it {n}?", "answer": "x", "group": f"p{n // 2}"} for n in range(30)]
    (tmp_path / "mine.json").write_text(json.dumps(table))
    run = make_run(tmp_path / "run", tmp_path / "mine.json")
    path = run.folder / SPLIT
    older = re.sub(r'"contents": \["\w+"\]', '"contents": []', path.read_text())
    path.write_text(older)
    make_run(tmp_path / "run", tmp_path / "mine.json")
    assert path.read_text() == older


def test_what_the_base_was_trained_on_stays_so(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", own_data(tmp_path / "data", range(40)))
    (tmp_path / "first" / "model").mkdir()
    # the second run divides the same images with another seed
    overrides = {"model.name": str(tmp_path / "first" / "model"), "data.split_seed": 5}
    second = make_run(tmp_path / "second", tmp_path / "data", **overrides)
    trained_before = {question["id"] for question in first.questions("trained_on")}
    shutil.rmtree(tmp_path / "first")  # its list is needed no more
    sides = side_of(second, load_records(tmp_path / "data"))
    _, test = load_parts(second.data)
    assert trained_before & {record.id for record in test}
    for record in test:
        assert sides[record.id] == ("trained on" if record.id in trained_before else "held out")


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", range(40))
    run = make_run(tmp_path / "run", data)
    text = (tmp_path / "run" / SPLIT).read_text()
    make_run(tmp_path / "run", data)  # the same data: it goes on
    assert (tmp_path / "run" / SPLIT).read_text() == text
    own_data(data, range(39))
    with pytest.raises(MedR1Error, match=r"began with other data: of the questions .* 1 went, 0 came"):
        make_run(tmp_path / "run", data)
    own_data(data, range(40))
    picture(77).save(data / "0.png")
    with pytest.raises(MedR1Error, match="0 went, 0 came and 1 show other images"):
        make_run(tmp_path / "run", data)
    (tmp_path / "run" / SPLIT).write_text(text[:200])
    with pytest.raises(MedR1Error, match=r"split\.json: cannot be read as the list"):
        split_of(run.folder / "model")


def test_a_model_that_is_no_runs_has_no_list(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert split_of("tiny") is split_of(None) is split_of("some/hub-name") is split_of(tmp_path / "model") is None


def test_language_and_fraction_of_the_run_are_those_it_is_asked_by(tmp_path: Path) -> None:
    """The audit's case: trained on all languages, asked with the default."""
    (tmp_path / "imgs").mkdir()
    rows = []
    for number in range(60):
        (tmp_path / "imgs" / f"x{number}").mkdir()
        picture(number).save(tmp_path / "imgs" / f"x{number}" / "source.jpg")
        for language in ("en", "zh")[: 1 + number % 2]:
            row = {"img_name": f"x{number}/source.jpg", "question": f"{language}?", "answer": "x", "q_lang": language}
            rows.append(row | {"modality": "CT"})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    run = make_run(tmp_path / "run", tmp_path, **{"data.language": "all"})
    _, test = load_parts(DataConfig(path=str(tmp_path), test_fraction=0.3), run)
    assert set(run.seen(test)) == {"held out"}
    _, test = load_parts(DataConfig(path=str(tmp_path), test_fraction=0.3))  # without the list as well
    assert set(run.seen(test)) == {"held out"}


# -- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", ["medr1", *map(str, arguments), "--json"])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = capsys.readouterr()
        assert status == 0, said.err
        return json.loads(said.out.splitlines()[-1]), said.err

    return call


def test_a_trained_model_is_asked_by_its_own_list(run: Any, tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "phantoms", num_images=40, seed=2)
    run("train", "--data", data, "--out", tmp_path / "run", *SMALL, *SPLIT_SEED)
    split = split_of(tmp_path / "run" / "model")
    assert split is not None
    held_out = {question["id"] for question in split.questions("held_out")}
    assert len(held_out) + len([*split.questions("trained_on")]) == 200
    model = ("--model", tmp_path / "run" / "model", "--mode", "no-think", "--score-options")

    # The audit's case: the data at another path, asked with the default fraction and seed.
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(data, moved)
    for place in (data, moved):
        _, told = run("eval", *model, "--data", place, "--out", tmp_path / f"{place.name}.jsonl")
        rows = read_jsonl(tmp_path / f"{place.name}.jsonl")
        assert {row["id"] for row in rows} == held_out
        assert {row["seen_by_run"] for row in rows} == {"held out"} and "trained on" not in told

    # A part that was trained on is counted apart, and said.
    summary, told = run("eval", *model, "--data", data, "--part", "all", "--out", tmp_path / "all.jsonl")
    assert (summary["n"], summary["trained_on"]["n"]) == (len(held_out), 200 - len(held_out))
    assert f"{len(held_out)} of 200 questions were held out by the run" in told.replace("\n", "")
    assert f"{200 - len(held_out)} were trained on (they are counted apart)" in told.replace("\n", "")
    summary, _ = run("score", tmp_path / "all.jsonl")
    assert (summary["n"], summary["trained_on"]["n"]) == (len(held_out), 200 - len(held_out))
    rows = read_jsonl(tmp_path / "all.jsonl")
    assert summarise(rows)["accuracy"] == summarise([r for r in rows if r["id"] in held_out])["accuracy"]
    assert compare(rows, rows)["n"] == len(held_out)

    # The base, which is no run's, is asked about the same with the run's fraction and seed; its rows say nothing.
    run("eval", "--model", "tiny", "--mode", "no-think", "--score-options", "--data", data, *SPLIT_SEED,
        "--out", tmp_path / "base.jsonl")  # fmt: skip
    base = read_jsonl(tmp_path / "base.jsonl")
    assert {row["id"] for row in base} == held_out and not any("seen_by_run" in row for row in base)

    # Other data: nothing of it was seen.
    other = write_phantoms(tmp_path / "other", num_images=40, seed=3)
    _, told = run("eval", *model, "--data", other, "--out", tmp_path / "other.jsonl")
    rows = read_jsonl(tmp_path / "other.jsonl")
    assert {row["seen_by_run"] for row in rows} == {"never seen"}
    assert f"{len(rows)} never seen by it" in told.replace("\n", "")


def test_a_validation_part_is_of_the_training_part(tmp_path: Path) -> None:
    """What is held out for the end is neither trained on nor asked, also when the run's model is."""
    data = own_data(tmp_path / "data", range(120))
    settings = {"path": str(data), "test_fraction": 0.3}
    train, test = load_parts(DataConfig(**settings))
    fewer, validation = load_parts(DataConfig(**settings, validation=True))
    assert sorted(record.id for record in [*fewer, *validation]) == [record.id for record in train]
    assert {record.group for record in fewer}.isdisjoint(record.group for record in validation)
    assert 0.15 < len(validation) / len(train) < 0.45
    run = make_run(tmp_path / "run", data, **{"data.validation": True})
    assert load_parts(run.data, run) == (fewer, validation)
    assert load_parts(DataConfig(**settings), run) == (
        fewer,
        sorted([*validation, *test], key=lambda record: record.id),
    )
    assert split_of_run(str(tmp_path / "run/model"), str(data))["data.validation"] is True
